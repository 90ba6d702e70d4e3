"""What the bridge asks of hardware: an arm with its gripper, cameras, teleoperation. SI units; numpy, no torch.

The digital twin, a ROS 2 arm and a vendor's driver are the same to everything above.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class HardwareError(RuntimeError):
    """The hardware, or the way to it, does not answer or refuses; the message says what to do."""


@dataclass(frozen=True)
class ArmSpec:
    """Limits of `joint_names`, each [J]: position rad, velocity rad/s, acceleration rad/s^2, jerk rad/s^3.

    `gripper_range`: closed and open width in m. `rate_hz`: at which commands are wanted. `home`: [J] rad.
    """

    name: str
    joint_names: tuple[str, ...]
    position_low: Vector
    position_high: Vector
    max_velocity: Vector
    max_acceleration: Vector
    max_jerk: Vector
    gripper_range: tuple[float, float]
    rate_hz: float
    home: Vector

    @property
    def num_joints(self) -> int:
        return len(self.joint_names)


@dataclass(frozen=True)
class ArmState:
    """The newest measurement. `position`, `velocity`: [J]. `gripper`: width in m. `stamp`: when it was received,
    seconds of `time.monotonic()`. `fault`: what the robot itself reports, "" for nothing."""

    position: Vector
    velocity: Vector
    gripper: float
    stamp: float
    fault: str = ""


@dataclass(frozen=True)
class Command:
    """Joint targets [J] rad and a gripper width in m, for the next control period. `sequence` rises by source."""

    position: Vector
    gripper: float
    sequence: int = 0


@runtime_checkable
class Arm(Protocol):
    """`send` returns what was applied. `stop` may be called from any thread, any number of times: the arm holds."""

    spec: ArmSpec

    def connect(self) -> None: ...

    def read(self) -> ArmState:
        """The newest state; never blocks. Raises HardwareError before the first one has come."""
        ...

    def send(self, command: Command) -> Command: ...

    def stop(self, reason: str) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Picture:
    """`image`: uint8 [h, w, 3]. `stamp`: when it was first received, `time.monotonic()`. `source_stamp_ns`: of the
    camera's own clock, which a frozen camera repeats."""

    image: NDArray[np.uint8]
    stamp: float
    source_stamp_ns: int


@runtime_checkable
class Camera(Protocol):
    name: str

    def connect(self) -> None: ...

    def latest(self) -> Picture: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class TeleopSample:
    """`delta`: [6] m and rad of the tool since the last sample, or joint targets [J] of a leader arm in `joints`.
    `engaged`: the human wants control (deadman held). `buttons`: by name. `stamp`: `time.monotonic()`."""

    delta: Vector
    gripper: float
    engaged: bool
    buttons: Mapping[str, bool]
    stamp: float
    joints: Vector | None = None


@runtime_checkable
class Teleop(Protocol):
    def connect(self) -> None: ...

    def read(self) -> TeleopSample: ...

    def close(self) -> None: ...


__all__ = [
    "Arm", "ArmSpec", "ArmState", "Camera", "Command", "HardwareError", "Picture", "Teleop", "TeleopSample", "Vector",
]  # fmt: skip
