"""Small modules in place of vendors' libraries. They record calls in the vendor's own units; signatures are those of
lerobot 0.4, ur-rtde 1.6.5 and xarm-python-sdk 1.18.4."""

from __future__ import annotations

import math
import threading
from types import ModuleType
from typing import Any

import numpy as np


class DegreesRobot:
    """A LeRobot robot of two joints in degrees with a gripper from 0 to 100. A bus that two threads use at once is
    broken, and so says this one."""

    def __init__(self) -> None:
        self.is_connected = False
        self.values = {"pan.pos": 30.0, "lift.pos": -100.0, "gripper.pos": 25.0}
        self.actions: list[dict[str, float]] = []
        self.max_relative: float | None = None
        self.broken = ""
        self._busy = threading.Lock()
        self.clashes = 0

    def connect(self) -> None:
        self.is_connected = True

    def _use(self) -> None:
        if not self._busy.acquire(blocking=False):
            self.clashes += 1
            return
        threading.Event().wait(0.001)
        self._busy.release()

    def get_observation(self) -> dict[str, Any]:
        self._use()
        if self.broken:
            raise ConnectionError(self.broken)
        return dict(self.values) | {"front": np.full((4, 6, 3), 7, np.uint8)}

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self._use()
        sent = dict(action)
        if self.max_relative is not None:
            for key in sent:
                low, high = self.values[key] - self.max_relative, self.values[key] + self.max_relative
                sent[key] = min(max(sent[key], low), high)
        self.actions.append(sent)
        return sent

    def disconnect(self) -> None:
        self.is_connected = False


class UrModules:
    """`rtde_control` and `rtde_receive` of one robot, in rad."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.position, self.velocity = [0.1, -1.2, 1.3, 0.0, 0.5, 0.0], [0.0] * 6
        self.protective = self.emergency = False
        self.running, self.connected, self.accepts = True, True, True
        robot = self

        class RTDEControlInterface:
            def __init__(self, hostname: str, frequency: float = -1.0) -> None:
                robot.calls.append(("control", hostname))

            def __getattr__(self, name: str) -> Any:
                if name not in ("setWatchdog", "kickWatchdog", "servoStop", "stopScript", "disconnect"):
                    raise AttributeError(name)

                def call(*values: Any) -> bool:
                    robot.calls.append((name, *values))
                    return True

                return call

            def servoJ(self, q: list[float], speed: float, acc: float, t: float, lookahead: float, gain: float) -> bool:
                assert all(type(x) is float for x in q), "the binding takes a list of floats"
                robot.calls.append(("servoJ", q, speed, acc, t, lookahead, gain))
                return robot.accepts

            def isProgramRunning(self) -> bool:
                return robot.running

            def reuploadScript(self) -> bool:
                robot.calls.append(("reuploadScript",))
                robot.running = True
                return True

        class RTDEReceiveInterface:
            def __init__(self, hostname: str) -> None:
                if hostname == "nowhere":
                    raise RuntimeError("connect: Connection refused")

            def getActualQ(self) -> list[float]:
                return list(robot.position)

            def getActualQd(self) -> list[float]:
                return list(robot.velocity)

            def isProtectiveStopped(self) -> bool:
                return robot.protective

            def isEmergencyStopped(self) -> bool:
                return robot.emergency

            def isConnected(self) -> bool:
                return robot.connected

            def disconnect(self) -> None:
                robot.calls.append(("receive.disconnect",))

        self.control, self.receive = ModuleType("rtde_control"), ModuleType("rtde_receive")
        self.control.RTDEControlInterface = RTDEControlInterface  # type: ignore[attr-defined]
        self.receive.RTDEReceiveInterface = RTDEReceiveInterface  # type: ignore[attr-defined]


class XArmModules:
    """`xarm.wrapper` of a controller with seven joint slots; the gripper in 0.1 mm."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.angles, self.pulses, self.error, self.code = [0.2] * 6 + [0.0], 400.0, 0, 0
        self.state, self.mode = 4, 0
        robot = self

        class XArmAPI:
            def __init__(self, port: str, is_radian: bool = False) -> None:
                assert is_radian, "degrees would be sent as rad"
                robot.calls.append(("XArmAPI", port))

            @property
            def error_code(self) -> int:
                return robot.error

            def _call(self, *call: Any) -> int:
                robot.calls.append(call)
                return robot.code

            def motion_enable(self, enable: bool = True) -> int:
                return self._call("motion_enable", enable)

            def set_mode(self, mode: int = 0) -> int:
                robot.mode, robot.state = mode, 5
                return self._call("set_mode", mode)

            def set_state(self, state: int = 0) -> int:
                robot.state = state
                return self._call("set_state", state)

            def set_gripper_enable(self, enable: bool) -> int:
                return self._call("set_gripper_enable", enable)

            def clean_error(self) -> int:
                robot.error = 0
                return self._call("clean_error")

            def get_joint_states(self, is_radian: bool | None = None) -> tuple[int, list[list[float]]]:
                scale = 1.0 if is_radian else 180 / math.pi
                return robot.code, [[scale * a for a in robot.angles], [0.0] * 7, [0.0] * 7]

            def get_gripper_position(self) -> tuple[int, float]:
                return robot.code, robot.pulses

            def set_servo_angle_j(self, angles: list[float], is_radian: bool | None = None) -> int:
                if robot.mode != 1 or robot.state != 0:
                    return 9  # not ready to move
                return self._call("set_servo_angle_j", angles, is_radian)

            def set_gripper_position(self, pos: float, wait: bool = False) -> int:
                assert not wait
                return self._call("set_gripper_position", pos)

            def disconnect(self) -> None:
                robot.calls.append(("disconnect",))

        self.package, self.wrapper = ModuleType("xarm"), ModuleType("xarm.wrapper")
        self.wrapper.XArmAPI = XArmAPI  # type: ignore[attr-defined]
