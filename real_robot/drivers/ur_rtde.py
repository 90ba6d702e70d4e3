"""A Universal Robots arm through `ur_rtde`: servoJ, with the controller's own watchdog.

The watchdog runs in the robot's controller: once the first command has come and the next ones do not (this process
hangs, dies or has called `stop`), the controller ends the program and the arm stands. `recover` starts it again.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vla_rl.real_robot.drivers.vendor import checked_target, import_vendor
from vla_rl.real_robot.interfaces import ArmSpec, ArmState, Command, HardwareError

_INSTALL = "run: pip install ur-rtde"


class WidthGripper(Protocol):
    """A gripper beside the arm; widths in m. Neither call may block."""

    def width(self) -> float: ...

    def move(self, width: float) -> None: ...


@dataclass(frozen=True)
class UrRtdeConfig:
    """`host`: address of the robot. `lookahead_s` (0.03 to 0.2) smooths and `gain` (100 to 2000) stiffens servoJ.
    `watchdog_hz`: slower than this, the controller stops the arm. `stop_deceleration`: rad/s^2 of servoStop."""

    host: str
    lookahead_s: float = 0.1
    gain: float = 300.0
    watchdog_hz: float = 10.0
    stop_deceleration: float = 10.0

    def __post_init__(self) -> None:
        if not 0.03 <= self.lookahead_s <= 0.2 or not 100 <= self.gain <= 2000 or self.watchdog_hz <= 0:
            raise ValueError(
                f"UrRtdeConfig: expected lookahead_s in [0.03, 0.2], gain in [100, 2000], watchdog_hz > 0, got {self}"
            )


class UrRtdeArm:
    """Implements `Arm` for a UR arm. `gripper`: what moves the fingers, None for an arm without."""

    def __init__(self, config: UrRtdeConfig, spec: ArmSpec, gripper: WidthGripper | None = None) -> None:
        if spec.rate_hz < config.watchdog_hz:
            raise ValueError(
                f"{spec.name}: commands come at {spec.rate_hz} Hz, slower than the watchdog of {config.watchdog_hz} Hz"
            )
        self.config, self.spec, self._gripper = config, spec, gripper
        self._control: Any = None
        self._receive: Any = None
        self._lock = threading.Lock()
        self._watched = False

    def connect(self) -> None:
        """Raises HardwareError where ur_rtde is missing, the robot does not answer, or it stands in a stop."""
        if self._control is not None:
            return
        control = import_vendor("rtde_control", _INSTALL)
        receive = import_vendor("rtde_receive", _INSTALL)
        try:
            self._receive = receive.RTDEReceiveInterface(self.config.host)
            fault = self._faults()
            if fault:
                raise HardwareError(f"{self.spec.name}: {fault}; release it at the pendant")
            self._control = control.RTDEControlInterface(self.config.host)
        except HardwareError:
            raise
        except Exception as error:  # RuntimeError of the binding
            raise HardwareError(
                f"no UR robot at {self.config.host}: {error}. Power it on and set it to remote control"
            ) from error

    def read(self) -> ArmState:
        if self._receive is None:
            raise HardwareError(f"{self.spec.name} is not connected; call connect()")
        if not self._receive.isConnected():
            raise HardwareError(f"{self.spec.name}: the connection to {self.config.host} is lost")
        position = np.array(self._receive.getActualQ(), dtype=float)
        velocity = np.array(self._receive.getActualQd(), dtype=float)
        if position.shape != (self.spec.num_joints,):
            raise HardwareError(f"{self.spec.name}: the robot has {position.size} joints, not {self.spec.num_joints}")
        width = self._gripper.width() if self._gripper is not None else 0.0
        return ArmState(position, velocity, width, time.monotonic(), self._faults())

    def send(self, command: Command) -> Command:
        position = checked_target(command, self.spec)
        with self._lock:
            if self._control is None:
                raise HardwareError(f"{self.spec.name} is not connected; call connect()")
            if self._watched:
                self._control.kickWatchdog()
            else:  # from the first command on: it would end the program of an arm that nobody moves yet
                self._watched = bool(self._control.setWatchdog(self.config.watchdog_hz))
            # Speed and acceleration are not used by servoJ; the period is the time that the target is servoed to.
            period = 1.0 / self.spec.rate_hz
            if not self._control.servoJ(position.tolist(), 0.0, 0.0, period, self.config.lookahead_s, self.config.gain):
                raise HardwareError(f"{self.spec.name}: servoJ was refused ({self._faults() or 'no program runs'})")
            if self._gripper is not None:
                self._gripper.move(float(np.clip(command.gripper, *self.spec.gripper_range)))
        return Command(position, command.gripper if self._gripper is not None else 0.0, command.sequence)

    def stop(self, reason: str) -> None:  # noqa: ARG002
        """Leave servo mode and stand. The controller's watchdog stops the program too if nothing follows."""
        with self._lock:
            if self._control is not None:
                self._control.servoStop(self.config.stop_deceleration)

    def recover(self) -> None:
        """Start the program again that the watchdog or a protective stop ended. Raises HardwareError where the robot
        still stands in a stop."""
        with self._lock:
            if self._control is None:
                raise HardwareError(f"{self.spec.name} is not connected; call connect()")
            if self._receive.isEmergencyStopped() or self._receive.isProtectiveStopped():
                raise HardwareError(f"{self.spec.name}: {self._faults()}; release it at the pendant")
            if not self._control.reuploadScript():
                raise HardwareError(f"{self.spec.name}: the program does not start; is it in remote control?")
            self._watched = False

    def close(self) -> None:
        self.stop("close")
        with self._lock:
            if self._control is not None:
                self._control.stopScript()
                self._control.disconnect()
            if self._receive is not None:
                self._receive.disconnect()
            self._control = self._receive = None

    def _faults(self) -> str:
        if self._receive.isEmergencyStopped():
            return "emergency stop"
        if self._receive.isProtectiveStopped():
            return "protective stop"
        if self._control is not None and not self._control.isProgramRunning():
            return "the robot's program does not run"
        return ""


__all__ = ["UrRtdeArm", "UrRtdeConfig", "WidthGripper"]
