"""Any LeRobot `Robot` (SO-100/101, Koch, OpenArm, Reachy and plugins) as an arm with cameras.

LeRobot speaks flat dictionaries of degrees or of normalised numbers; `JointCalibration` says what a number means. Its
buses do not stand two threads, so reading and sending share one lock, and a thread reads: `read` never waits.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vla_rl.real_robot.drivers.vendor import Poller, checked_target
from vla_rl.real_robot.interfaces import ArmSpec, ArmState, Command, HardwareError, Picture, Vector


class LeRobotRobot(Protocol):
    """What is used of `lerobot.robots.Robot`."""

    @property
    def is_connected(self) -> bool: ...

    def connect(self) -> None: ...

    def get_observation(self) -> dict[str, Any]: ...

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]: ...

    def disconnect(self) -> None: ...


@dataclass(frozen=True)
class JointCalibration:
    """rad = scale * value + offset, for the number that LeRobot has under `key` ("shoulder_pan.pos")."""

    key: str
    scale: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale == 0 or not math.isfinite(self.offset):
            raise ValueError(f"JointCalibration of {self.key}: scale must be finite and not 0, got {self}")

    @staticmethod
    def degrees(key: str, zero: float = 0.0, sign: float = 1.0) -> JointCalibration:
        """A joint in degrees that reads `zero` where our angle is 0."""
        scale = sign * math.pi / 180
        return JointCalibration(key, scale, -scale * zero)

    @staticmethod
    def normalized(key: str, low: float, high: float) -> JointCalibration:
        """A joint in -100 to 100, whose calibrated range is `low` to `high` rad."""
        return JointCalibration(key, (high - low) / 200, (high + low) / 2)

    def to_rad(self, value: float) -> float:
        return self.scale * float(value) + self.offset

    def from_rad(self, angle: float) -> float:
        return (angle - self.offset) / self.scale


@dataclass(frozen=True)
class _Reading:
    state: ArmState
    pictures: Mapping[str, Picture]


class LeRobotArm:
    """Implements `Arm` over a connected or unconnected LeRobot robot.

    `joints`: one calibration a joint, in the order of `spec.joint_names`. `gripper_key`: a number from 0 (closed) to
    100 (open), "" for an arm without. Velocities are differences of positions.
    """

    def __init__(
        self,
        robot: LeRobotRobot,
        spec: ArmSpec,
        joints: tuple[JointCalibration, ...],
        *,
        gripper_key: str = "gripper.pos",
        camera_keys: tuple[str, ...] = (),
    ) -> None:
        if len(joints) != spec.num_joints:
            raise ValueError(f"{spec.name} has {spec.num_joints} joints, got {len(joints)} calibrations")
        self.spec = spec
        self._robot, self._joints = robot, joints
        self._gripper_key, self._camera_keys = gripper_key, camera_keys
        self._bus = threading.RLock()
        self._last: ArmState | None = None
        self._sent: Command | None = None
        self._captures = 0
        self._poller: Poller[_Reading] | None = None

    def connect(self) -> None:
        """Raises HardwareError where the robot does not answer or lacks a key of the calibration."""
        if self._poller is not None:
            return
        try:
            if not self._robot.is_connected:
                self._robot.connect()
        except Exception as error:  # LeRobot's own kinds, serial errors
            raise HardwareError(f"{self.spec.name}: LeRobot cannot connect: {error}") from error
        poller = Poller(self._read_bus, self.spec.rate_hz, self.spec.name)
        poller.start()
        self._poller = poller

    def read(self) -> ArmState:
        return self._newest().state

    def send(self, command: Command) -> Command:
        """What was applied: LeRobot may clamp (`max_relative_target`) and says what it sent."""
        position = checked_target(command, self.spec)
        action = {joint.key: joint.from_rad(q) for joint, q in zip(self._joints, position.tolist(), strict=True)}
        if self._gripper_key:
            action[self._gripper_key] = self._gripper_value(command.gripper)
        with self._bus:
            try:
                sent = self._robot.send_action(action)
            except Exception as error:
                raise HardwareError(f"{self.spec.name}: LeRobot refuses the action: {error}") from error
            applied = Command(self._angles(sent), self._width(sent, command.gripper), command.sequence)
            self._sent = applied
        return applied

    def stop(self, reason: str) -> None:  # noqa: ARG002  the motors hold by position, whatever the reason
        """Hold the last sent target; the measured pose where nothing was sent. An arm held by its measured pose again
        and again would sag."""
        with self._bus:
            if self._sent is not None:
                self.send(self._sent)
            elif self._last is not None:
                self.send(Command(self._last.position, self._last.gripper))

    def close(self) -> None:
        if self._poller is None:
            return
        self._poller.stop()
        self._poller = None
        with self._bus:
            self._robot.disconnect()

    def camera(self, key: str) -> LeRobotCamera:
        """The camera that the robot has under `key`; raises ValueError where it was not among `camera_keys`."""
        if key not in self._camera_keys:
            raise ValueError(f"{self.spec.name} was built with the cameras {list(self._camera_keys)}, not {key!r}")
        return LeRobotCamera(self, key)

    def picture(self, key: str) -> Picture:
        return self._newest().pictures[key]

    # -------------------------------------------------------------------------------------------------------- the bus
    def _newest(self) -> _Reading:
        if self._poller is None:
            raise HardwareError(f"{self.spec.name} is not connected; call connect()")
        return self._poller.latest()

    def _read_bus(self) -> _Reading:
        with self._bus:
            observation = self._robot.get_observation()
            stamp = time.monotonic()
        position = self._angles(observation)
        velocity = np.zeros_like(position)
        if self._last is not None and stamp > self._last.stamp:
            velocity = (position - self._last.position) / (stamp - self._last.stamp)
        self._last = ArmState(position, velocity, self._width(observation, 0.0), stamp)
        self._captures += 1  # LeRobot gives pictures no stamp of their own
        pictures = {
            key: Picture(np.asarray(observation[key], dtype=np.uint8), stamp, self._captures)
            for key in self._camera_keys
        }
        return _Reading(self._last, pictures)

    def _angles(self, values: Mapping[str, Any]) -> Vector:
        missing = [joint.key for joint in self._joints if joint.key not in values]
        if missing:
            raise HardwareError(f"{self.spec.name}: LeRobot has no {missing}; it has {sorted(values)}")
        return np.array([joint.to_rad(values[joint.key]) for joint in self._joints])

    def _width(self, values: Mapping[str, Any], without: float) -> float:
        closed, opened = self.spec.gripper_range
        return closed + float(values[self._gripper_key]) / 100 * (opened - closed) if self._gripper_key else without

    def _gripper_value(self, width: float) -> float:
        closed, opened = self.spec.gripper_range
        return float(np.clip(100 * (width - closed) / (opened - closed), 0, 100))


@dataclass(frozen=True)
class LeRobotCamera:
    """A camera of the robot's own, read together with its joints. Such a picture has no stamp of its camera, so one
    that is frozen is not noticed: prefer a camera driver of its own."""

    arm: LeRobotArm
    name: str

    def connect(self) -> None:
        self.arm.connect()

    def latest(self) -> Picture:
        return self.arm.picture(self.name)

    def close(self) -> None:
        """The arm closes its cameras."""


__all__ = ["JointCalibration", "LeRobotArm", "LeRobotCamera", "LeRobotRobot"]
