"""A Franka arm (FR3, Panda) through `franky`, which plans from target to target on the 1 kHz interface (Ruckig).

Each command is an asynchronous joint motion that takes over from the one before, so 10 to 50 Hz of targets become a
trajectory within the robot's limits. `relative_dynamics` scales all of them.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_rl.real_robot.drivers.vendor import checked_target, import_vendor
from vla_rl.real_robot.interfaces import ArmSpec, ArmState, Command, HardwareError

_INSTALL = "run: pip install franky-control"


@dataclass(frozen=True)
class FrankyConfig:
    """`host`: address of the robot. `relative_dynamics`: share of its velocity, acceleration and jerk limits.
    `realtime`: refuse to run without a real-time kernel. `gripper`: the Franka hand is there. `gripper_step` m: a width
    nearer to the last one that was sent is not sent again, since each is a motion of its own."""

    host: str
    relative_dynamics: float = 0.1
    realtime: bool = True
    gripper: bool = True
    gripper_speed: float = 0.1
    gripper_step: float = 0.005

    def __post_init__(self) -> None:
        if not 0 < self.relative_dynamics <= 1:
            raise ValueError(f"FrankyConfig: relative_dynamics must lie in (0, 1], got {self.relative_dynamics}")


class FrankyArm:
    """Implements `Arm`. Errors of the robot (reflexes, limits) are its fault and stay until `recover`."""

    def __init__(self, config: FrankyConfig, spec: ArmSpec) -> None:
        if spec.num_joints != 7:
            raise ValueError(f"a Franka arm has 7 joints, {spec.name} has {spec.num_joints}")
        self.config, self.spec = config, spec
        self._franky: Any = None
        self._robot: Any = None
        self._gripper: Any = None
        self._gripper_sent: float | None = None
        self._lock = threading.RLock()
        self._fault = ""
        self._stopping = False

    def connect(self) -> None:
        """Raises HardwareError where franky is missing or the robot does not answer. Nothing moves."""
        if self._robot is not None:
            return
        self._franky = franky = import_vendor("franky", _INSTALL)
        real_time = franky.RealtimeConfig.Enforce if self.config.realtime else franky.RealtimeConfig.Ignore
        try:
            robot = franky.Robot(self.config.host, realtime_config=real_time)
            robot.relative_dynamics_factor = self.config.relative_dynamics
            self._gripper = franky.Gripper(self.config.host) if self.config.gripper else None
        except Exception as error:  # franky's own kinds
            raise HardwareError(
                f"no Franka robot at {self.config.host}: {error}. Open the brakes, activate FCI, and check that nobody "
                "else controls it; without a real-time kernel set realtime=False"
            ) from error
        self._robot = robot
        self._fault = "the robot reports errors; call recover()" if robot.has_errors else ""

    def read(self) -> ArmState:
        robot = self._connected()
        try:
            state = robot.state
            width = self._gripper.width if self._gripper is not None else 0.0
        except Exception as error:
            raise HardwareError(f"{self.spec.name} does not answer: {error}") from error
        fault = self._fault or ("the robot reports errors; call recover()" if robot.has_errors else "")
        position, velocity = np.array(state.q, dtype=float), np.array(state.dq, dtype=float)
        return ArmState(position, velocity, float(width), time.monotonic(), fault)

    def send(self, command: Command) -> Command:
        position = checked_target(command, self.spec)
        robot = self._connected()
        with self._lock:
            if self._fault:
                raise HardwareError(f"{self.spec.name}: {self._fault}")
            try:
                robot.poll_motion()  # raises what ended the motion before
                motion = self._franky.JointMotion(self._franky.JointState(position.tolist()))
                robot.move(motion, asynchronous=True)
                self._stopping = False
                width = self._send_width(command.gripper)
            except Exception as error:
                self._fault = f"the motion ended: {error}; call recover()"
                raise HardwareError(f"{self.spec.name}: {self._fault}") from error
        return Command(position, width, command.sequence)

    def stop(self, reason: str) -> None:  # noqa: ARG002
        """Decelerate to a stand within the robot's limits; the robot holds its pose by itself then."""
        if self._robot is None:
            return
        with self._lock:
            try:
                if self._robot.is_in_control and not self._stopping:  # a second stop would begin to brake anew
                    self._stopping = True
                    self._robot.move(self._franky.JointStopMotion(), asynchronous=True)
            except Exception as error:  # the motion was aborted: the robot stands already
                self._fault = f"the motion ended: {error}; call recover()"

    def recover(self) -> None:
        """Clear the robot's errors. Raises HardwareError where it refuses (a pressed button, an open brake)."""
        robot = self._connected()
        with self._lock:
            if robot.has_errors and not robot.recover_from_errors():
                raise HardwareError(f"{self.spec.name} cannot recover; look at the robot and at Desk")
            self._fault = ""

    def close(self) -> None:
        self.stop("close")
        if self._robot is not None:
            try:
                self._robot.join_motion(1.0)
            except Exception as error:
                self._fault = str(error)
        self._robot = self._gripper = None

    def _connected(self) -> Any:
        if self._robot is None:
            raise HardwareError(f"{self.spec.name} is not connected; call connect()")
        return self._robot

    def _send_width(self, width: float) -> float:
        """The width that stands after this command."""
        if self._gripper is None:
            return 0.0
        low, high = self.spec.gripper_range
        width = float(np.clip(width, low, high))
        if self._gripper_sent is None or abs(width - self._gripper_sent) >= self.config.gripper_step:
            self._gripper.move_async(width, self.config.gripper_speed)
            self._gripper_sent = width
        return self._gripper_sent


__all__ = ["FrankyArm", "FrankyConfig"]
