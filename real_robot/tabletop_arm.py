"""A tabletop policy on a measured arm: its actions become joint targets, and the arm's joints become its state.

The tabletop's own controller runs on the tabletop's model of the arm, placed at the measured joints: the same setpoint
on a leash to the measured fingertip, the same least squares, the same limits, to the last bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vla_rl.core import ActionSpec
from vla_rl.envs.robot_actions import ToolDelta
from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv
from vla_rl.real_robot.drivers.dds_arm import twin_arm_spec
from vla_rl.real_robot.interfaces import ArmSpec, ArmState, Command, Vector
from vla_rl.real_robot.kinematics import Chain, chain_from_mujoco
from vla_rl.real_robot.modes import Event, Mode
from vla_rl.real_robot.safety import SafetyConfig
from vla_rl.real_robot.supervisor import Applied, GuardedArm
from vla_rl.sim.arm import FINGER_NAMES, JOINT_NAMES, NUM_JOINTS
from vla_rl.sim.control import EeDeltaConfig
from vla_rl.sim.scene import build_scene

_EVERYONE, _ACTIVE = torch.tensor([0]), torch.tensor([True])


class TabletopArm:
    """A `GuardedArm` that keeps its newest measurement, since tool deltas are relative to where the arm is.

    `control`: of the tabletop (`sim.control.CONTROLLERS`). `target` and `observe` are the control loop's `to_command`
    and `observe`; `begin` an episode before the first of them. With `action_of`, for tool deltas, it is an
    `ActionMapping` too. One thread uses it. Raises ValueError for an arm of other joints.
    """

    def __init__(self, arm: GuardedArm, control: str = "ee_delta") -> None:
        if arm.spec.joint_names != JOINT_NAMES:
            raise ValueError(f"a tabletop policy moves {', '.join(JOINT_NAMES)}; this arm has {arm.spec.joint_names}")
        self.spec = arm.spec
        self._arm = arm
        self._env = TabletopEnv("reach", 1, TabletopConfig(control=control, num_threads=1))
        qpos = self._env.scene.joint_qpos
        self._columns = [qpos[name] for name in (*JOINT_NAMES, *FINGER_NAMES)]
        self._env.reset(_EVERYONE, torch.tensor([0]))
        steps = EeDeltaConfig()
        self._tool = ToolDelta(arm.spec, self._jacobian, steps.max_step, steps.max_turn)

    @property
    def state_names(self) -> tuple[str, ...]:
        return self._env.spec.state_names

    @property
    def action(self) -> ActionSpec:
        return self._env.spec.action

    # ---------------------------------------------------------------------------------------------------- guarded arm
    def read(self) -> tuple[ArmState, Mode, str]:
        state, mode, reason = self._arm.read()
        self._place(state)
        return state, mode, reason

    def fire(self, event: Event, reason: str = "") -> Mode:
        return self._arm.fire(event, reason)

    def apply(self, command: Command) -> Applied:
        return self._arm.apply(command)

    def stop(self, reason: str) -> None:
        self._arm.stop(reason)

    # -------------------------------------------------------------------------------------------------- the tabletop's
    def begin(self) -> None:
        """The setpoint is where the arm was measured last."""
        self._env.controller.reset(_EVERYONE)

    def target(self, action: NDArray[np.floating], standing: Command) -> Command:
        """The command of `action` [A], clamped to [-1, 1], for the arm as it was read last. Raises ValueError for
        another size, or numbers that are not finite."""
        size = len(self.action.names)
        if action.shape != (size,) or not np.isfinite(action).all():
            raise ValueError(f"an action is {size} finite numbers ({', '.join(self.action.names)}), got {action}")
        clamped = torch.from_numpy(np.clip(action, -1.0, 1.0).astype(np.float64))[None]
        self._env.controller.apply(clamped, _ACTIVE)
        target = self._env.engine.ctrl[0].numpy()
        position, fingers = target[:NUM_JOINTS].copy(), target[NUM_JOINTS : NUM_JOINTS + 2]
        return Command(position, float(fingers.sum()), standing.sequence + 1)

    def action_of(self, target: Command, standing: Command) -> Vector:
        """The action [A], not clamped, whose setpoint moves as the tool does from `standing` to `target`: what a person
        did."""
        action = self._tool.action_of(target, standing)
        return action[[self._tool.action.names.index(name) for name in self.action.names]]

    def solve(self, position: Vector, delta: Vector) -> Vector:
        """The `InverseKinematics` of a takeover."""
        return self._tool.solve(position, delta)

    def _jacobian(self, position: Vector) -> Vector:
        """Of the fingertip, [6, 7] m and rad a rad in the base's frame. The model stays where it is."""
        engine, view = self._env.engine, self._env.view
        before = engine.qpos.clone()
        engine.qpos[0, self._columns[:NUM_JOINTS]] = torch.from_numpy(position.copy())
        engine.forward(_EVERYONE)
        anchors = torch.tensor(self._env.scene.arm_joints)
        axis, arm = engine.xaxis[0, anchors], view.tip_pos[0] - engine.xanchor[0, anchors]
        jacobian = torch.cat([torch.linalg.cross(axis, arm), axis], dim=1).T.numpy().copy()
        engine.qpos.copy_(before)
        engine.forward(_EVERYONE)
        return jacobian

    def observe(self, state: ArmState) -> NDArray[np.float32]:
        """The tabletop's state [12]: seven joints, tip_x, tip_y, tip_z, tip_yaw, gripper_opening."""
        self._place(state)
        return self._env.observe(_EVERYONE, images=False).state[0].numpy()

    def _place(self, state: ArmState) -> None:
        """Put the model where the arm is."""
        joints = np.append(state.position, [state.gripper / 2, state.gripper / 2])
        self._env.engine.qpos[0, self._columns] = torch.from_numpy(joints)
        self._env.engine.forward(_EVERYONE)


def tabletop_chain() -> Chain:
    """From the base to the point between the fingertips, for the safety filter's box."""
    return chain_from_mujoco(build_scene(()).model, JOINT_NAMES, "tip")


def tabletop_limits(limits: Literal["tabletop", "panda"]) -> ArmSpec:
    """The twin's arm with the limits that `DeployConfig` explains."""
    spec = twin_arm_spec()
    if limits == "tabletop":  # from one way at full speed to the other within a period
        acceleration = 2 * spec.max_velocity * spec.rate_hz
        spec = replace(spec, max_acceleration=acceleration, max_jerk=2 * acceleration * spec.rate_hz)
    return spec


def tabletop_safety() -> SafetyConfig:
    """The filter for the tabletop's arm, with its box above the table."""
    return SafetyConfig(chain=tabletop_chain(), workspace_low=(0.25, -0.35, 0.0), workspace_high=(0.75, 0.35, 0.5))


__all__ = ["TabletopArm", "tabletop_chain", "tabletop_limits", "tabletop_safety"]
