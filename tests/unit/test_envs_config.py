"""What a recipe does with its environment's config, and the noise that its experts share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vla_rl.envs.config import EnvConfig, PointMazeConfig, demo_env, without_cameras
from vla_rl.envs.expert_noise import add_noise
from vla_rl.envs.gym import GymConfig
from vla_rl.envs.libero import LiberoConfig
from vla_rl.envs.maniskill import ManiSkillConfig
from vla_rl.envs.metaworld import MetaworldConfig
from vla_rl.envs.robosuite import RobosuiteConfig
from vla_rl.envs.tabletop import make_tabletop
from vla_rl.envs.vector import split_stream


@pytest.mark.parametrize(
    "config", [EnvConfig(), ManiSkillConfig(), RobosuiteConfig(), LiberoConfig(), MetaworldConfig()]
)
def test_any_config_goes_without_cameras(config):
    blind = without_cameras(config)
    assert blind.cameras == ()
    assert blind == type(config)(cameras=())


def test_demonstrations_come_from_the_environment_itself_but_where_it_says_otherwise():
    for config in (EnvConfig(), RobosuiteConfig(), GymConfig("CartPole-v1")):
        assert demo_env(config) is config
    assert demo_env(PointMazeConfig(start="far", demo_start="broad")).start == "broad"
    assert demo_env(ManiSkillConfig(backend="gpu")).backend == "cpu"
    assert without_cameras(PointMazeConfig()) == PointMazeConfig()


def test_splits_are_streams():
    assert split_stream("train", "here") != split_stream("test", "here")
    with pytest.raises(ValueError, match="here: split 'exam' is unknown; use one of train, test"):
        split_stream("exam", "here")


def test_noise_is_a_share_of_the_range_and_spares_the_gripper_and_the_ended():
    env = make_tabletop("reach", 2, split="train", cameras={}, max_episode_steps=2, auto_reset=False)
    env.reset([5, 6])
    zeros = torch.zeros(2, 1, env.spec.action.dim)
    assert torch.equal(add_noise(zeros.clone(), env, 0.0), zeros)
    noisy = add_noise(zeros.clone(), env, 0.5)
    draws = np.stack([np.random.default_rng([seed, 0]).standard_normal(env.spec.action.dim) for seed in (5, 6)])
    half = (np.array(env.spec.action.high) - np.array(env.spec.action.low)) / 2
    half[["gripper" in name for name in env.spec.action.names]] = 0.0
    torch.testing.assert_close(noisy[:, 0], torch.tensor(0.5 * half * draws, dtype=torch.float32))
    assert (noisy == 0).sum() == 2 * (half == 0).sum() == 2
    assert env.step(torch.zeros(2, 2, env.spec.action.dim)).ended.all()
    assert torch.equal(add_noise(zeros.clone(), env, 0.5), zeros)
    env.close()
