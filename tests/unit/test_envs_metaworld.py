"""Metaworld behind the contract: needs `vla-rl env install metaworld` (found through VLA_RL_ENVS), else skipped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from vla_rl.envs import install
from vla_rl.envs.metaworld import MetaworldConfig
from vla_rl.envs.remote import SimulatorError
from vla_rl.envs.vector import ChunkedEnv

needs_metaworld = pytest.mark.skipif(
    not install.is_installed("metaworld"), reason="metaworld is not installed: vla-rl env install metaworld"
)
DRAWER = MetaworldConfig(
    task="drawer-open-v3", cameras=("corner2",), image_size=48, privileged_state=True, fast_pictures=True
)


@pytest.fixture(scope="module")
def drawer() -> Iterator[ChunkedEnv]:
    env = replace(DRAWER, cameras=()).make(2, split="train")
    yield env
    env.close()


def _expert_episode(env: ChunkedEnv, seeds: list[int]) -> tuple[list[bool], int]:
    """Successes, and the control steps until all have ended."""
    env.reset(seeds)
    success = torch.zeros(env.num_envs, dtype=torch.bool)
    for step in range(1, 501):
        out = env.step(env.step_env.expert_actions(torch.arange(env.num_envs))[:, None])
        success |= out.success
        assert torch.equal(out.rewards[:, 0], out.success.float())
        if env.ended.all():
            return success.tolist(), step
    raise AssertionError("the episodes have no end")


@needs_metaworld
def test_spec_and_expert(drawer: ChunkedEnv) -> None:
    spec = drawer.spec
    assert (spec.name, spec.max_episode_steps, spec.control_hz) == ("metaworld/drawer-open-v3", 500, 80.0)
    assert spec.action.names == ("dx", "dy", "dz", "gripper")
    assert len(spec.state_names) == 39
    assert spec.state_names[:5] == ("hand_x", "hand_y", "hand_z", "gripper_opening", "object_1_x")
    successes, steps = _expert_episode(drawer, [0, 1])
    assert successes == [True, True]
    assert steps < 150


@needs_metaworld
def test_the_goal_is_observed() -> None:
    """Metaworld hides it, and clips it to zero, unless told otherwise; reaching cannot succeed without it."""
    env = MetaworldConfig(cameras=(), privileged_state=True).make(2, split="train")
    try:
        goals = env.reset([0, 1]).state[:, -3:]
        assert (goals.abs().sum(1) > 0.5).all()
        assert not torch.equal(goals[0], goals[1])
        hand = env.step(torch.zeros(2, 1, 4)).obs.state[:, :3]
        assert (goals - hand).norm(dim=1).min() > 0.05
        assert _expert_episode(env, [0, 1])[0] == [True, True]
    finally:
        env.close()


@needs_metaworld
def test_a_seed_is_an_episode_whatever_ran_before(drawer: ChunkedEnv) -> None:
    actions = torch.rand(1, 6, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first = drawer.reset([4, 4])
    moved = drawer.step(actions.expand(2, -1, -1))
    assert torch.equal(first.state[0], first.state[1])
    assert torch.equal(moved.obs.state[0], moved.obs.state[1])
    _expert_episode(drawer, [7, 8])
    again = drawer.reset([4, 9])
    assert torch.equal(again.state[0], first.state[0])
    assert torch.equal(drawer.step(actions.expand(2, -1, -1)).obs.state[0], moved.obs.state[0])
    assert not torch.equal(again.state[1], first.state[1])


@needs_metaworld
def test_pictures_are_upright_and_follow_from_the_seed() -> None:
    """The corner camera sees the table's wood below and the grey of no scene above."""
    env = DRAWER.make(1, split="train")
    try:
        picture = env.reset([0]).images["corner2"]
        brown = picture[0, ..., 0].float() - picture[0, ..., 2]
        assert brown[24:].mean() > brown[:16].mean()
        assert env.render([0]).shape == (1, 256, 256, 3)
        assert not torch.equal(env.step(torch.ones(1, 8, 4)).obs.images["corner2"], picture)
        assert torch.equal(env.reset([0]).images["corner2"], picture)
    finally:
        env.close()


@needs_metaworld
def test_splits_differ_and_dense_reward_is_metaworlds() -> None:
    config = MetaworldConfig(cameras=(), reward="dense", max_episode_steps=5)
    train, test = (
        config.make(1, split="train"),
        MetaworldConfig(cameras=(), privileged_state=True).make(1, split="test"),
    )
    try:
        assert train.spec.state_names == ("hand_x", "hand_y", "hand_z", "gripper_opening")
        train.reset([0])
        out = train.step(torch.zeros(1, 8, 4))
        assert out.truncated.all()
        assert out.executed.sum() == 5
        assert ((out.rewards[0, :5] > 0) & (out.rewards[0, :5] < 10)).all()
        whole = MetaworldConfig(cameras=(), privileged_state=True).make(1, split="train")
        assert not torch.isclose(whole.reset([0]).state[0, -3:], test.reset([0]).state[0, -3:]).all()
        whole.close()
    finally:
        train.close()
        test.close()


@needs_metaworld
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MetaworldConfig(task="juggle-v3"), "task 'juggle-v3' is unknown; use one of assembly-v3"),
        (MetaworldConfig(cameras=("moon",)), "there is no camera 'moon'; there are topview"),
    ],
)
def test_what_metaworld_does_not_know(config: MetaworldConfig, message: str) -> None:
    with pytest.raises(SimulatorError, match=re.escape(message)):
        config.make(1, split="train")


def test_bad_configurations_are_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    with pytest.raises(ValueError, match="split 'exam' is unknown"):
        MetaworldConfig().make(1, split="exam")
    with pytest.raises(ValueError, match="reward 'kind' is unknown"):
        MetaworldConfig(reward="kind").make(1, split="train")
    monkeypatch.setenv("VLA_RL_ENVS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="vla-rl env install metaworld"):
        MetaworldConfig().make(1, split="train")
