"""A UFACTORY xArm (5, 6, 7, Lite 6) through the xArm Python SDK, in servo mode.

The SDK asks the controller over TCP, so a thread reads; angles are radians (`is_radian=True`) everywhere. The gripper
speaks tenths of a millimetre.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_rl.real_robot.drivers.vendor import Poller, checked_target, import_vendor
from vla_rl.real_robot.interfaces import ArmSpec, ArmState, Command, HardwareError

_INSTALL = "run: pip install xarm-python-sdk"
_SERVO_MODE, _READY, _STOP = 1, 0, 4  # of set_mode and set_state
_GRIPPER_UNIT = 1e-4  # m


@dataclass(frozen=True)
class XArmConfig:
    """`host`: address of the controller. `gripper`: a UFACTORY gripper is there. `gripper_step` m: a width nearer to
    the last one that was sent is not sent again."""

    host: str
    gripper: bool = True
    gripper_step: float = 0.002


class XArm:
    """Implements `Arm`. The controller's error code is the fault; `recover` clears it."""

    def __init__(self, config: XArmConfig, spec: ArmSpec) -> None:
        self.config, self.spec = config, spec
        self._api: Any = None
        self._lock = threading.RLock()
        self._poller: Poller[ArmState] | None = None
        self._gripper_sent: float | None = None
        self._stopped = False

    def connect(self) -> None:
        """Raises HardwareError where the SDK is missing, the arm does not answer, or it is in error."""
        if self._api is not None:
            return
        wrapper = import_vendor("xarm.wrapper", _INSTALL)
        try:
            api = wrapper.XArmAPI(self.config.host, is_radian=True)
        except Exception as error:
            raise HardwareError(f"no xArm at {self.config.host}: {error}") from error
        self._api = api
        try:
            if api.error_code:
                raise HardwareError(f"{self.spec.name}: error {api.error_code}; clear it, or call recover()")
            self._enter_servo_mode()
            if self.config.gripper:
                self._ask("set_gripper_enable", True)
            poller = Poller(self._read_api, self.spec.rate_hz, self.spec.name)
            poller.start()
        except BaseException:
            self._api = None
            api.disconnect()
            raise
        self._poller = poller

    def read(self) -> ArmState:
        if self._poller is None:
            raise HardwareError(f"{self.spec.name} is not connected; call connect()")
        return self._poller.latest()

    def send(self, command: Command) -> Command:
        position = checked_target(command, self.spec)
        with self._lock:
            if self._stopped:
                self._enter_servo_mode()
            self._ask("set_servo_angle_j", position.tolist(), is_radian=True)
            width = self._send_width(command.gripper)
        return Command(position, width, command.sequence)

    def stop(self, reason: str) -> None:  # noqa: ARG002
        """The controller stops the motion; the next `send` makes it ready again."""
        with self._lock:
            if self._api is not None:
                self._api.set_state(_STOP)
                self._stopped = True

    def recover(self) -> None:
        """Clear the controller's error and make it ready; raises HardwareError where it refuses."""
        with self._lock:
            self._ask("clean_error")
            self._enter_servo_mode()

    def close(self) -> None:
        if self._poller is not None:
            self._poller.stop()
            self._poller = None
        self.stop("close")
        with self._lock:
            if self._api is not None:
                self._api.disconnect()
            self._api = None

    def _enter_servo_mode(self) -> None:
        self._ask("motion_enable", True)
        self._ask("set_mode", _SERVO_MODE)
        self._ask("set_state", _READY)
        self._stopped = False

    def _ask(self, name: str, *values: Any, is_radian: bool | None = None) -> Any:
        """Call the SDK; its answers are a code, or (code, value), and a code that is not 0 is a refusal."""
        if self._api is None:
            raise HardwareError(f"{self.spec.name} is not connected; call connect()")
        call = getattr(self._api, name)
        answer = call(*values) if is_radian is None else call(*values, is_radian=is_radian)
        code, value = answer if isinstance(answer, tuple) else (answer, None)
        if code != 0:
            raise HardwareError(
                f"{self.spec.name}: {name} was refused with code {code} (error {self._api.error_code}); "
                "the xArm API code table says what it means"
            )
        return value

    def _read_api(self) -> ArmState:
        with self._lock:
            joints = self._ask("get_joint_states", is_radian=True)
            width = self._ask("get_gripper_position") * _GRIPPER_UNIT if self.config.gripper else 0.0
            error = self._api.error_code
        count = self.spec.num_joints  # the controller always answers with seven
        position, velocity = np.array(joints[0][:count]), np.array(joints[1][:count])
        return ArmState(position, velocity, float(width), time.monotonic(), f"error {error}" if error else "")

    def _send_width(self, width: float) -> float:
        """The width that stands after this command."""
        if not self.config.gripper:
            return 0.0
        width = float(np.clip(width, *self.spec.gripper_range))
        if self._gripper_sent is None or abs(width - self._gripper_sent) >= self.config.gripper_step:
            self._ask("set_gripper_position", width / _GRIPPER_UNIT)
            self._gripper_sent = width
        return self._gripper_sent


__all__ = ["XArm", "XArmConfig"]
