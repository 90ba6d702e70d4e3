"""robosuite behind the contract: needs `vla-rl env install robosuite` (found through VLA_RL_ENVS), else skipped."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from vla_rl.envs import install
from vla_rl.envs.remote import SimulatorError
from vla_rl.envs.robosuite import TASKS, RobosuiteConfig
from vla_rl.envs.vector import ChunkedEnv

needs_robosuite = pytest.mark.skipif(
    not install.is_installed("robosuite"), reason="robosuite is not installed: vla-rl env install robosuite"
)
LIFT = RobosuiteConfig(cameras=("agentview", "robot0_eye_in_hand"), image_size=48, privileged_state=True)


@pytest.fixture(scope="module")
def lift() -> Iterator[ChunkedEnv]:
    env = LIFT.make(2, split="train")
    yield env
    env.close()


def _expert_episode(env: ChunkedEnv, seed: int) -> tuple[torch.Tensor, int, bool]:
    """States of environment 0 along the expert's episode, its length, its success."""
    obs = env.reset([seed], [0])
    states = [obs.state[0]]
    for step in range(1, 501):
        actions = torch.zeros(env.num_envs, 1, env.spec.action.dim)
        actions[0, 0] = env.step_env.expert_actions(torch.tensor([0]))[0]
        out = env.step(actions)
        states.append(out.next_obs.state[0])
        if out.ended[0]:
            return torch.stack(states), step, bool(out.success[0])
    raise AssertionError("the episode has no end")


@needs_robosuite
def test_spec_says_what_robosuite_has(lift: ChunkedEnv) -> None:
    spec = lift.spec
    assert (spec.name, spec.max_episode_steps, spec.control_hz) == ("robosuite/Lift", 400, 20.0)
    assert spec.action.names == ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
    assert spec.action.low == (-1.0,) * 7
    assert spec.action.high == (1.0,) * 7
    assert len(spec.state_names) == 19  # 3 + 4 + 2 of the gripper, 10 of object-state
    assert spec.state_names[0] == "robot0_eef_pos_0"
    assert spec.state_names[9:12] == ("cube_pos_0", "cube_pos_1", "cube_pos_2")
    assert {c: (s.height, s.width) for c, s in spec.cameras.items()} == dict.fromkeys(LIFT.cameras, (48, 48))


@needs_robosuite
def test_a_seed_is_an_episode_whatever_ran_before(lift: ChunkedEnv) -> None:
    actions = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 8, 7))).float()
    first = lift.reset([5, 5])
    moved = lift.step(actions[:1].expand(2, -1, -1))
    assert torch.equal(first.state[0], first.state[1])
    assert torch.equal(moved.obs.state[0], moved.obs.state[1])
    for camera in LIFT.cameras:
        assert torch.equal(first.images[camera][0], first.images[camera][1])
    lift.reset([7], [0])
    lift.step(actions)
    again = lift.reset([5], [0])
    assert torch.equal(again.state[0], first.state[0])
    assert torch.equal(lift.step(actions[:1].expand(2, -1, -1)).obs.state[0], moved.obs.state[0])
    assert not torch.equal(lift.reset([6], [0]).state[0], first.state[0])


@needs_robosuite
def test_pictures_are_upright(lift: ChunkedEnv) -> None:
    """The agent's view has the light wall above and the darker floor below; the red cube lies near the middle."""
    picture = lift.reset([0, 0]).images["agentview"][0].float()
    assert picture.std() > 20
    red = (picture[..., 0] > 90) & (picture[..., 1] < 60)
    rows, columns = red.nonzero().float().mean(0).tolist()
    assert 0.3 * 48 < rows < 0.9 * 48
    assert 0.3 * 48 < columns < 0.7 * 48
    assert lift.render([0]).shape == (1, 256, 256, 3)


@needs_robosuite
def test_expert_lifts_and_success_ends_the_episode_with_reward_one(lift: ChunkedEnv) -> None:
    names = lift.spec.state_names
    states, length, success = _expert_episode(lift, 3)
    assert success
    assert length < 80
    height = states[:, names.index("cube_pos_2")]
    assert height[0] < 0.832
    assert height[-1] > 0.84  # 4 cm above the table: robosuite's own predicate
    hand = states[:, [names.index(f"robot0_eef_pos_{i}") for i in range(3)]]
    cube = states[:, [names.index(f"cube_pos_{i}") for i in range(3)]]
    offset = states[:, [names.index(f"gripper_to_cube_pos_{i}") for i in range(3)]]
    assert torch.allclose((hand - cube).norm(dim=1), offset.norm(dim=1), atol=1e-5)


@needs_robosuite
def test_splits_share_no_episode_and_workers_change_nothing() -> None:
    config = RobosuiteConfig(cameras=(), privileged_state=True, reward="dense", max_episode_steps=7, num_workers=2)
    train, test = config.make(3, split="train"), config.make(1, split="test")
    try:
        states = train.reset([0, 1, 2]).state
        assert not torch.isclose(states[:, 9:11], test.reset([0]).state[:, 9:11]).any()
        out = train.step(torch.zeros(3, 10, 7))
        assert out.truncated.all()
        assert out.executed.sum(1).tolist() == [7, 7, 7]
        assert ((out.rewards[:, :7] > 0) & (out.rewards[:, :7] < 0.5)).all()  # the reaching part of the shaping
        assert out.obs.images == {}
        one = RobosuiteConfig(cameras=(), privileged_state=True).make(1, split="train")
        assert torch.equal(one.reset([2]).state[0], states[2])
        one.close()
    finally:
        train.close()
        test.close()


@needs_robosuite
@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(TASKS))
def test_experts_solve_their_tasks(task: str) -> None:
    env = RobosuiteConfig(task=task, cameras=()).make(1, split="train")
    try:
        assert env.spec.max_episode_steps == TASKS[task][1]
        assert [_expert_episode(env, seed)[2] for seed in range(3)] == [True] * 3
    finally:
        env.close()


@needs_robosuite
def test_joint_control_has_its_own_actions() -> None:
    env = RobosuiteConfig(task="Stack", control="joint_position", cameras=()).make(1, split="train")
    try:
        env.reset([0])
        assert env.spec.action.names == (*(f"joint_{i}" for i in range(7)), "gripper")
        with pytest.raises(SimulatorError, match="no scripted expert for Stack with control 'joint_position'"):
            env.step_env.expert_actions(torch.tensor([0]))
    finally:
        env.close()


@needs_robosuite
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RobosuiteConfig(task="Juggle"), "task 'Juggle' is unknown; use one of"),
        (RobosuiteConfig(control="telepathy"), "control 'telepathy' is unknown; use one of osc_pose"),
        (RobosuiteConfig(cameras=("moon",)), "Lift has no camera 'moon'; it has frontview"),
    ],
)
def test_what_robosuite_does_not_know(config: RobosuiteConfig, message: str) -> None:
    with pytest.raises(SimulatorError, match=re.escape(message)):
        config.make(1, split="train")


def test_bad_configurations_are_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    with pytest.raises(ValueError, match="split 'exam' is unknown"):
        RobosuiteConfig().make(1, split="exam")
    with pytest.raises(ValueError, match="reward 'kind' is unknown"):
        RobosuiteConfig(reward="kind").make(1, split="train")
    monkeypatch.setenv("VLA_RL_ENVS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="vla-rl env install robosuite"):
        RobosuiteConfig().make(1, split="train")
