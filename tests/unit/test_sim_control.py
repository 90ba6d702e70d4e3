"""Control: an action moves the fingertip by what it says, within workspace, joint and speed limits."""

from __future__ import annotations

import pytest
import torch

from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv
from vla_rl.sim.arm import JOINT_HIGH, JOINT_LOW, JOINT_SPEED
from vla_rl.sim.control import CONTROLLERS, EeDeltaController, make_controller

torch.set_num_threads(1)


def _env(control: str, num_envs: int, **options) -> TabletopEnv:
    env = TabletopEnv("reach", num_envs, TabletopConfig(control=control, num_threads=1, **options))
    env.reset(torch.arange(num_envs), torch.arange(num_envs))
    return env


def _step(env: TabletopEnv, actions: torch.Tensor, times: int = 1, active: torch.Tensor | None = None) -> None:
    mask = torch.ones(env.num_envs, dtype=torch.bool) if active is None else active
    for _ in range(times):
        env.step(actions, mask)


DIRECTIONS = torch.tensor(
    [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1], [0.6, 0.6, -0.5], [-0.4, 0.8, 0.4]]
)


def _settled(control: str = "ee_delta") -> TabletopEnv:
    env = _env(control, len(DIRECTIONS), joint_noise=0.0)
    _step(env, torch.zeros(env.num_envs, env.spec.action.dim), 5)
    return env


def test_a_delta_moves_the_tip_by_as_much() -> None:
    """One action of 1 is 2 cm; the arm is there, to 2 mm, within three control steps."""
    env = _settled()
    before = env.view.tip_pos.clone()
    _step(env, torch.cat([DIRECTIONS, torch.zeros(8, 1)], dim=1))
    moved_at_once = env.view.tip_pos - before
    _step(env, torch.zeros(8, 4), 2)
    moved = env.view.tip_pos - before
    wanted = 0.02 * DIRECTIONS.double()
    assert (moved - wanted).norm(dim=1).max() < 0.002
    share = (moved_at_once * wanted).sum(dim=1) / (wanted * wanted).sum(dim=1)
    assert (share > 0.6).all()


def test_a_stream_of_deltas_adds_up_and_the_gripper_points_down() -> None:
    env = _settled()
    before = env.view.tip_pos.clone()
    _step(env, torch.cat([0.5 * DIRECTIONS, torch.zeros(8, 1)], dim=1), 8)
    _step(env, torch.zeros(8, 4), 4)
    moved = env.view.tip_pos - before
    assert (moved - 0.08 * DIRECTIONS.double()).norm(dim=1).max() < 0.004
    axis = env.view.tip_rotation[:, :, 2]
    assert torch.allclose(axis, torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64).expand(8, 3), atol=0.02)
    assert env.view.tip_yaw.abs().max() < 0.02


def test_without_an_action_the_arm_holds_still() -> None:
    env = _settled()
    before = env.view.tip_pos.clone()
    _step(env, torch.zeros(8, 4), 40)
    assert (env.view.tip_pos - before).norm(dim=1).max() < 5e-4


def test_yaw_turns_the_gripper_in_place() -> None:
    env = _settled("ee_delta_yaw")
    before = env.view.tip_pos.clone()
    action = torch.zeros(8, 5)
    action[:, 3] = torch.linspace(-1, 1, 8)
    _step(env, action, 5)
    _step(env, torch.zeros(8, 5), 4)
    expected = 5 * 0.15 * torch.linspace(-1, 1, 8, dtype=torch.float64)
    assert torch.allclose(env.view.tip_yaw, expected, atol=0.02)
    assert (env.view.tip_pos - before).norm(dim=1).max() < 0.003


def test_the_tip_stays_in_the_workspace() -> None:
    env = _settled()
    low = torch.tensor(env.config.scene.workspace_low, dtype=torch.float64)
    high = torch.tensor(env.config.scene.workspace_high, dtype=torch.float64)
    for t in range(60):
        _step(env, torch.cat([DIRECTIONS.sign(), torch.zeros(8, 1)], dim=1))
        assert (env.view.tip_pos > low - 0.006).all(), t
        assert (env.view.tip_pos < high + 0.006).all(), t
    assert (env.view.tip_pos[0, 0] - high[0]).abs() < 0.003  # and it does get there


def test_joint_speed_and_joint_limits_hold() -> None:
    """Full-speed random actions, far out: joint targets never ask for more than the speed limit."""
    env = _env("ee_delta", 16)
    limit = torch.tensor(JOINT_SPEED, dtype=torch.float64) / 20
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        joints = env.view.joint_positions.clone()
        env.step(torch.randn(16, 4, generator=generator).sign(), torch.ones(16, dtype=torch.bool))
        targets = env.engine.ctrl[:, :7]
        assert ((targets - joints).abs() <= limit + 1e-9).all()
        assert (targets >= torch.tensor(JOINT_LOW, dtype=torch.float64)).all()
        assert (targets <= torch.tensor(JOINT_HIGH, dtype=torch.float64)).all()


def test_joint_deltas_move_one_joint_and_stop_at_its_limit() -> None:
    env = _env("joint_delta", 7, joint_noise=0.0)
    before = env.view.joint_positions.clone()
    one_each = torch.cat([torch.eye(7), torch.zeros(7, 1)], dim=1)
    _step(env, one_each)
    _step(env, torch.zeros(7, 8), 4)
    assert torch.allclose(env.view.joint_positions - before, 0.1 * torch.eye(7, dtype=torch.float64), atol=0.003)
    _step(env, -one_each, 60)
    joints = env.view.joint_positions
    assert (joints >= torch.tensor(JOINT_LOW, dtype=torch.float64) - 0.02).all()
    assert abs(float(joints[3, 3]) - JOINT_LOW[3]) < 0.02


def test_the_gripper_goes_where_it_is_told() -> None:
    env = _env("ee_delta", 3)
    actions = torch.zeros(3, 4)
    actions[:, 3] = torch.tensor([-1.0, 0.0, 1.0])
    _step(env, actions, 10)
    assert torch.allclose(env.view.gripper_opening, torch.tensor([0.0, 0.04, 0.08], dtype=torch.float64), atol=1e-3)


def test_pushing_against_the_table_stores_no_wish() -> None:
    """After 30 steps of pushing down, one centimetre up is seen within a few steps: the setpoint is on a leash."""
    env = _settled()
    down = torch.zeros(8, 4)
    down[:, 2] = -1
    _step(env, down, 30)
    height = env.view.tip_pos[:, 2].clone()
    _step(env, -0.5 * down, 1)
    _step(env, torch.zeros(8, 4), 3)
    assert ((env.view.tip_pos[:, 2] - height) > 0.007).all()


def test_inactive_environments_keep_their_setpoints() -> None:
    env = _env("ee_delta", 2)
    before = {k: v.clone() for k, v in env.controller.state_dict().items()}
    ctrl = env.engine.ctrl.clone()
    _step(env, torch.ones(2, 4), 3, torch.tensor([True, False]))
    after = env.controller.state_dict()
    assert torch.equal(before["target_pos"][1], after["target_pos"][1])
    assert not torch.equal(before["target_pos"][0], after["target_pos"][0])
    assert torch.equal(ctrl[1], env.engine.ctrl[1])


def test_action_names_and_unknown_control() -> None:
    env = _env("ee_delta", 1)
    assert env.controller.action.names == ("dx", "dy", "dz", "gripper")
    assert make_controller("ee_delta_yaw", env.view).action.dim == 5
    assert make_controller("joint_delta", env.view).action.dim == 8
    with pytest.raises(ValueError, match=", ".join(CONTROLLERS)):
        make_controller("torque", env.view)
    assert isinstance(env.controller, EeDeltaController)
