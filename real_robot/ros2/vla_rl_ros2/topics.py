"""What the node publishes, with the quality of service of each, and the messages as plain values. No rclpy.

Status is kept for whoever joins late; sensors are best effort. The arm's commands, reliable and never kept, are the
driver's (`ros2_control`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vla_rl.real_robot.control_loop import LoopReport, Tick
from vla_rl.real_robot.dds import SENSOR, STATUS, QoS
from vla_rl.real_robot.drivers.ros2_messages import Message, diagnostic
from vla_rl.real_robot.interfaces import TeleopSample
from vla_rl.real_robot.modes import Mode
from vla_rl.real_robot.teleop import Axes

TELEMETRY = QoS(reliable=True, depth=10)

# name -> (type, quality of service); "~" is the node
PUBLISHED: dict[str, tuple[str, QoS]] = {
    "~/mode": ("std_msgs/msg/String", STATUS),
    "~/episode": ("std_msgs/msg/String", STATUS),
    "~/action_raw": ("std_msgs/msg/Float64MultiArray", TELEMETRY),
    "~/action_applied": ("std_msgs/msg/Float64MultiArray", TELEMETRY),
    "/diagnostics": ("diagnostic_msgs/msg/DiagnosticArray", TELEMETRY),
}
JOY = ("sensor_msgs/msg/Joy", SENSOR)

# service -> type
SERVICES: dict[str, str] = {
    "~/estop": "std_srvs/srv/Trigger",
    "~/reset_estop": "std_srvs/srv/Trigger",
    "~/takeover": "std_srvs/srv/SetBool",
    "~/start_episode": "std_srvs/srv/Trigger",
    "~/end_episode": "std_srvs/srv/SetBool",
    "~/set_task": "vla_rl_interfaces/srv/SetTask",
}
ACTION = ("~/run_policy", "vla_rl_interfaces/action/RunPolicy")

# What diagnostics say of a mode: 0 fine, 1 warning, 2 error.
_LEVELS = {Mode.IDLE: 0, Mode.SHADOW: 0, Mode.RUN: 0, Mode.HUMAN: 0, Mode.HOLD: 1, Mode.ESTOP: 2}


def text(value: str) -> Message:
    return Message("std_msgs/msg/String", {"data": value})


def numbers(values: Any) -> Message:
    return Message("std_msgs/msg/Float64MultiArray", {"data": np.asarray(values, np.float64).reshape(-1).tolist()})


def action_messages(tick: Tick) -> dict[str, Message]:
    """What was proposed and what was applied in a tick; a topic is left out where there was nothing."""
    out = {}
    if tick.proposal is not None:
        out["~/action_raw"] = numbers(tick.proposal)
    if tick.applied is not None:
        out["~/action_applied"] = numbers(np.append(tick.applied.position, tick.applied.gripper))
    return out


def diagnostics(name: str, now_ns: int, mode: Mode, tick: Tick | None, report: LoopReport | None, hz: float) -> Message:
    """The state of the loop: rates, ages, latencies, counts. `hz`: achieved since the last one."""
    values: dict[str, object] = {"mode": mode.value, "achieved_hz": round(hz, 1)}
    problem = ""
    if tick is not None:
        problem = tick.problem
        values["state_age_ms"] = round(1e3 * (tick.at - tick.state.stamp), 1)
        for camera, picture in tick.pictures.items():
            values[f"{camera}_age_ms"] = round(1e3 * (tick.at - picture.stamp), 1)
        values["source"] = tick.source.name.lower()
    if report is not None:
        values |= report.summary()
        problem = report.stop_reason or problem
    level = _LEVELS[mode] if mode is not Mode.RUN or not problem else 1
    status = diagnostic(f"{name}: control loop", level, problem or mode.value, values)
    stamp = {"sec": now_ns // 10**9, "nanosec": now_ns % 10**9}
    return Message("diagnostic_msgs/msg/DiagnosticArray", {"header": {"stamp": stamp}, "status": [status]})


class JoyDevice:
    """An `AxesDevice` of sensor_msgs/Joy, as spacenav (6 axes) and joy publish it. `buttons`: name to number."""

    def __init__(self, buttons: Mapping[str, int]) -> None:
        self._buttons = dict(buttons)
        self._axes = np.zeros(6)
        self._pressed: list[int] = []

    def take(self, message: Any) -> None:
        """The callback of the subscription. Axes that the device has not are at rest."""
        axes = np.zeros(6)
        axes[: min(6, len(message.axes))] = np.asarray(message.axes, float)[:6]
        self._axes, self._pressed = axes, list(message.buttons)

    def open(self) -> None: ...

    def read(self) -> Axes:
        pressed = self._pressed
        held = {name: 0 <= i < len(pressed) and bool(pressed[i]) for name, i in self._buttons.items()}
        return Axes(self._axes, held)

    def close(self) -> None: ...


def held_by_service(sample: TeleopSample, held: bool) -> TeleopSample:
    """The sample while `~/takeover` is on: engaged whatever the device's deadman says."""
    if not held or sample.engaged:
        return sample
    return TeleopSample(np.zeros(6), sample.gripper, True, sample.buttons, sample.stamp)


__all__ = [
    "ACTION", "JOY", "PUBLISHED", "SERVICES", "JoyDevice", "action_messages", "diagnostics", "held_by_service",
    "numbers", "text",
]  # fmt: skip
