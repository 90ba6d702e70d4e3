"""Control of the arm at the control rate, for all environments at once: actions in [-1, 1] to servo targets.

* `EeDeltaController`: the action moves a Cartesian setpoint of the down-pointing gripper; damped least squares turns
  the setpoint into joint targets (Buss, "Introduction to inverse kinematics with Jacobian transpose, pseudoinverse and
  damped least squares methods", 2004, eq. 11), with the posture of home in the null space.
* `JointDeltaController`: the action moves joint setpoints.

The last dimension is the gripper's position in both: -1 closed, +1 open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vla_rl.core import ActionSpec
from vla_rl.sim.arm import FINGER_TRAVEL, HOME, JOINT_HIGH, JOINT_LOW, JOINT_NAMES, JOINT_SPEED, NUM_JOINTS
from vla_rl.sim.view import SceneView


class Controller(Protocol):
    """Turns actions into servo targets. `action`: names and bounds of an action."""

    action: ActionSpec

    def reset(self, env_ids: Tensor) -> None:
        """Set the setpoints of `env_ids` to where the arm is."""
        ...

    def apply(self, actions: Tensor, active: Tensor) -> None:
        """Write servo targets for `actions [N, A]` (within bounds) where `active`; others keep theirs."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class EeDeltaConfig:
    """`max_step`: how far an action of 1 moves the setpoint in a control step, m (2 cm at 20 Hz is 0.4 m/s).
    `max_turn`: the same for yaw, rad. `yaw`: whether the action has a yaw; without it the jaws stay along y.
    `leash`: how far the setpoint may run ahead of the fingertip, m, so that pushing on a wall stores no wish for later.
    `damping`: of least squares. `posture_gain`: share of the way home that the null space goes in a step."""

    max_step: float = 0.02
    max_turn: float = 0.15
    yaw: bool = False
    leash: float = 0.04
    damping: float = 0.02
    posture_gain: float = 0.1


class EeDeltaController:
    """Cartesian delta control: dx, dy, dz, [dyaw], gripper; see the module's text for the method.

    The setpoint stays in the scene's workspace box and on a leash to the fingertip; joint targets respect joint limits
    and joint speed limits (the whole step is shortened, so its direction stays).
    """

    def __init__(self, view: SceneView, config: EeDeltaConfig | None = None) -> None:
        self.config = config or EeDeltaConfig()
        self._view = view
        names = ("dx", "dy", "dz", *(("dyaw",) if self.config.yaw else ()), "gripper")
        self.action = ActionSpec((-1.0,) * len(names), (1.0,) * len(names), names)
        like = view.engine.qpos
        config_ = view.scene.config
        self._low, self._high = like.new_tensor(config_.workspace_low), like.new_tensor(config_.workspace_high)
        self._limits = _JointLimits(view)
        self._home = like.new_tensor(HOME)
        self._anchors = torch.tensor(view.scene.arm_joints, device=view.device)
        self._damping = self.config.damping**2 * torch.eye(6, dtype=like.dtype, device=view.device)
        self._target_pos = like.new_zeros(view.num_envs, 3)
        self._target_yaw = like.new_zeros(view.num_envs)

    def reset(self, env_ids: Tensor) -> None:
        ids = env_ids.to(self._view.device)
        self._target_pos[ids] = torch.clamp(self._view.tip_pos[ids], self._low, self._high)
        self._target_yaw[ids] = self._view.tip_yaw[ids] if self.config.yaw else 0.0

    def apply(self, actions: Tensor, active: Tensor) -> None:
        tip = self._view.tip_pos
        pos = self._target_pos + self.config.max_step * actions[:, :3]
        pos = tip + torch.clamp(pos - tip, -self.config.leash, self.config.leash)
        pos = torch.clamp(pos, self._low, self._high)
        yaw = self._target_yaw + self.config.max_turn * actions[:, 3] if self.config.yaw else self._target_yaw
        error = torch.cat([pos - tip, self._rotation_error(yaw)], dim=1)
        joints = self._limits.toward(self._joint_step(error))
        self._target_pos.copy_(torch.where(active[:, None], pos, self._target_pos))
        self._target_yaw.copy_(torch.where(active, yaw, self._target_yaw))
        _write_targets(self._view, joints, actions[:, -1], active)

    def _rotation_error(self, yaw: Tensor) -> Tensor:
        """Rotation vector [N, 3] from the gripper to the down-pointing one at `yaw`: half the sum of the cross products
        of matching axes, exact to second order."""
        now = self._view.tip_rotation
        cos, sin = torch.cos(yaw), torch.sin(yaw)
        goal = torch.zeros_like(now)
        goal[:, 0, 0], goal[:, 1, 0] = cos, sin
        goal[:, 0, 1], goal[:, 1, 1] = sin, -cos
        goal[:, 2, 2] = -1.0
        return 0.5 * torch.linalg.cross(now, goal, dim=1).sum(dim=2)

    def _joint_step(self, error: Tensor) -> Tensor:
        """Damped least squares: dq = q0 + J^T (J J^T + lambda^2 I)^-1 (e - J q0), with q0 a step towards home."""
        engine = self._view.engine
        axis = engine.xaxis.index_select(1, self._anchors)
        arm = self._view.tip_pos[:, None] - engine.xanchor.index_select(1, self._anchors)
        jacobian = torch.cat([torch.linalg.cross(axis, arm), axis], dim=2)  # [N, 7, 6], the transpose
        posture = self.config.posture_gain * (self._home - self._view.joint_positions)
        rest = error - (jacobian * posture[:, :, None]).sum(dim=1)
        gram = jacobian.mT @ jacobian + self._damping
        solution = torch.cholesky_solve(rest[:, :, None], torch.linalg.cholesky_ex(gram)[0])
        return posture + (jacobian @ solution).squeeze(2)

    def state_dict(self) -> dict[str, Any]:
        return {"target_pos": self._target_pos.clone(), "target_yaw": self._target_yaw.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._target_pos.copy_(state["target_pos"])
        self._target_yaw.copy_(state["target_yaw"])


@dataclass(frozen=True)
class JointDeltaConfig:
    """`max_step`: how far an action of 1 moves a joint's setpoint in a control step, rad. `leash`: how far the setpoint
    may run ahead of the joint, rad."""

    max_step: float = 0.1
    leash: float = 0.2


class JointDeltaController:
    """Joint delta control: seven joint deltas and the gripper. The fingertip may leave the workspace box, which is
    Cartesian; joint and speed limits hold."""

    def __init__(self, view: SceneView, config: JointDeltaConfig | None = None) -> None:
        self.config = config or JointDeltaConfig()
        self._view = view
        names = (*(f"d{name}" for name in JOINT_NAMES), "gripper")
        self.action = ActionSpec((-1.0,) * len(names), (1.0,) * len(names), names)
        self._limits = _JointLimits(view)
        self._target = view.engine.qpos.new_zeros(view.num_envs, NUM_JOINTS)

    def reset(self, env_ids: Tensor) -> None:
        ids = env_ids.to(self._view.device)
        self._target[ids] = self._view.joint_positions[ids]

    def apply(self, actions: Tensor, active: Tensor) -> None:
        now = self._view.joint_positions
        target = self._target + self.config.max_step * actions[:, :NUM_JOINTS]
        target = now + torch.clamp(target - now, -self.config.leash, self.config.leash)
        joints = self._limits.clamp(target)
        self._target.copy_(torch.where(active[:, None], joints, self._target))
        _write_targets(self._view, self._limits.toward(joints - now), actions[:, -1], active)

    def state_dict(self) -> dict[str, Any]:
        return {"target": self._target.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._target.copy_(state["target"])


class _JointLimits:
    """Joint position limits and, per control step, joint speed limits."""

    def __init__(self, view: SceneView) -> None:
        like = view.engine.qpos
        self._view = view
        self._low, self._high = like.new_tensor(JOINT_LOW), like.new_tensor(JOINT_HIGH)
        self._max_step = like.new_tensor(JOINT_SPEED) / view.scene.config.control_hz

    def clamp(self, joints: Tensor) -> Tensor:
        return torch.clamp(joints, self._low, self._high)

    def toward(self, delta: Tensor) -> Tensor:
        """Joint targets [N, 7] from where the joints are, `delta` shortened to the speed limit."""
        excess = (delta.abs() / self._max_step).amax(dim=1, keepdim=True).clamp(min=1.0)
        return self.clamp(self._view.joint_positions + delta / excess)


def _write_targets(view: SceneView, joints: Tensor, gripper: Tensor, active: Tensor) -> None:
    """Servo targets are the first columns of `ctrl`: seven joints, then both fingers."""
    fingers = (0.5 * FINGER_TRAVEL * (gripper + 1.0))[:, None].expand(-1, 2)
    columns = view.engine.ctrl[:, : NUM_JOINTS + 2]
    columns.copy_(torch.where(active[:, None], torch.cat([joints, fingers], dim=1), columns))


CONTROLLERS = ("ee_delta", "ee_delta_yaw", "joint_delta")


def make_controller(kind: str, view: SceneView) -> Controller:
    """A controller by name, one of `CONTROLLERS`. Raises ValueError for another name."""
    if kind == "ee_delta":
        return EeDeltaController(view)
    if kind == "ee_delta_yaw":
        return EeDeltaController(view, EeDeltaConfig(yaw=True))
    if kind == "joint_delta":
        return JointDeltaController(view)
    raise ValueError(f"control {kind!r} is unknown; use one of {', '.join(CONTROLLERS)}")
