"""What a policy's action means for an arm: joint deltas, joint positions, tool deltas.

Deltas are added to the standing target, not to the measured joints: an arm that lags behind does not creep. The last
dimension is the gripper, -1 closed to +1 open, as in the simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vla_rl.core import ActionSpec
from vla_rl.real_robot.interfaces import ArmSpec, Command, Vector


class ActionMapping(Protocol):
    """An action, clamped to `action`, to the next target and back."""

    @property
    def action(self) -> ActionSpec: ...

    def target(self, action: Vector, standing: Command) -> Command:
        """The command of `action` [A], given the target that stands."""
        ...

    def action_of(self, target: Command, standing: Command) -> Vector:
        """The action [A], not clamped, that leads from `standing` to `target`: what a person did."""
        ...


@dataclass(frozen=True)
class JointDelta:
    """J deltas in -1 to 1, times `max_step` rad, and the gripper."""

    arm: ArmSpec
    max_step: float

    @property
    def action(self) -> ActionSpec:
        names = (*(f"d{name}" for name in self.arm.joint_names), "gripper")
        return ActionSpec((-1.0,) * len(names), (1.0,) * len(names), names)

    def target(self, action: Vector, standing: Command) -> Command:
        return _command(self.arm, standing.position + self.max_step * action[:-1], action[-1], standing)

    def action_of(self, target: Command, standing: Command) -> Vector:
        return np.append((target.position - standing.position) / self.max_step, _gripper_action(self.arm, target))


@dataclass(frozen=True)
class JointPosition:
    """J joint targets in rad within the arm's limits, and the gripper."""

    arm: ArmSpec

    @property
    def action(self) -> ActionSpec:
        low, high = (*self.arm.position_low.tolist(), -1.0), (*self.arm.position_high.tolist(), 1.0)
        return ActionSpec(low, high, (*self.arm.joint_names, "gripper"))

    def target(self, action: Vector, standing: Command) -> Command:
        return _command(self.arm, action[:-1], action[-1], standing)

    def action_of(self, target: Command, standing: Command) -> Vector:  # noqa: ARG002
        return np.append(target.position, _gripper_action(self.arm, target))


@dataclass(frozen=True)
class ToolDelta:
    """Six numbers in -1 to 1: translations times `max_translation` m and turns times `max_rotation` rad in the base's
    frame, and the gripper. `jacobian(position [J]) -> [6, J]`.

    Damped least squares, dq = J^T (J J^T + damping^2 I)^-1 dx (Wampler 1986, eq. 11): bounded near a singularity,
    where the tool then goes less far than asked.
    """

    arm: ArmSpec
    jacobian: Callable[[Vector], Vector]
    max_translation: float
    max_rotation: float
    damping: float = 0.02

    @property
    def action(self) -> ActionSpec:
        names = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
        return ActionSpec((-1.0,) * 7, (1.0,) * 7, names)

    def target(self, action: Vector, standing: Command) -> Command:
        position = self.solve(standing.position, self._scale() * action[:6])
        return _command(self.arm, position, action[-1], standing)

    def action_of(self, target: Command, standing: Command) -> Vector:
        delta = self.jacobian(standing.position) @ (target.position - standing.position)
        return np.append(delta / self._scale(), _gripper_action(self.arm, target))

    def solve(self, position: Vector, delta: Vector) -> Vector:
        """Joints [J] that move the tool by `delta` [6]: the `InverseKinematics` of `real_robot.takeover`."""
        jacobian = self.jacobian(position)
        damped = jacobian @ jacobian.T + self.damping**2 * np.eye(6)
        return position + jacobian.T @ np.linalg.solve(damped, delta)

    def _scale(self) -> Vector:
        return np.repeat([self.max_translation, self.max_rotation], 3)


def _command(arm: ArmSpec, position: Vector, gripper: float, standing: Command) -> Command:
    closed, opened = arm.gripper_range
    width = closed + 0.5 * (float(np.clip(gripper, -1.0, 1.0)) + 1.0) * (opened - closed)
    position = np.clip(position, arm.position_low, arm.position_high)
    return Command(position, width, standing.sequence + 1)


def _gripper_action(arm: ArmSpec, target: Command) -> float:
    closed, opened = arm.gripper_range
    return 2.0 * (target.gripper - closed) / (opened - closed) - 1.0


__all__ = ["ActionMapping", "JointDelta", "JointPosition", "ToolDelta"]
