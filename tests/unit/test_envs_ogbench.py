"""OGBench's tasks as chunked environments: what the spec says, success and its end, seeds, errors."""

import pytest
import torch

from vla_rl.envs.config import demo_env
from vla_rl.envs.experts import make_expert
from vla_rl.envs.ogbench import OGBenchConfig, make_ogbench
from vla_rl.envs.ogbench_expert import CubeOracle, CubeOracleConfig
from vla_rl.envs.remote_expert import RemoteExpertConfig


@pytest.fixture(scope="module")
def single():
    env = make_ogbench("cube-single-singletask-task1-v0", max_episode_steps=20, auto_reset=False)
    yield env
    env.close()


def actions(seed: int, steps: int) -> torch.Tensor:
    return 2.0 * torch.rand(1, steps, 5, generator=torch.Generator().manual_seed(seed)) - 1.0


def test_spec_and_rewards(single):
    obs = single.reset([0])
    assert single.spec.name == "cube-single-singletask-task1-v0"
    assert obs.state.shape == (1, 28)
    assert single.spec.action.low == (-1.0,) * 5
    assert single.spec.action.high == (1.0,) * 5
    assert single.spec.control_hz == 20.0
    step = single.step(actions(0, 25))
    assert step.rewards[0].tolist() == [-1.0] * 20 + [0.0] * 5  # the cube is not at its place; then time is over
    assert step.truncated.item()
    assert not step.terminated.item()
    assert step.end_step.item() == 19


def test_seeds_decide_the_episode(single):
    states = []
    for seed in (3, 4, 3):
        single.reset([seed])
        states.append(single.step(actions(1, 15)).obs.state)
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])


def test_the_step_after_success_terminates_with_it(single):
    """As in OGBench's relabelled data: reward 0 and the end belong to the state in which the task is solved."""
    single.reset([0])
    inner = single.step_env._env.envs[0].unwrapped
    inner.data.joint("object_joint_0").qpos[:3] = inner.cur_task_info["goal_xyzs"][0] + [0.0, 0.0, 0.2]
    step = single.step(torch.zeros(1, 10, 5))  # it falls to its place
    rewards = step.rewards[0].tolist()
    end = int(step.end_step)
    assert 1 < end < 9
    assert rewards == [-1.0] * end + [0.0] * (10 - end)
    assert step.executed[0].tolist() == [True] * (end + 1) + [False] * (9 - end)
    assert step.terminated.item()
    assert step.success.item()


def test_picture(single):
    single.reset([0])
    picture = single.render([0])
    assert picture.shape == (1, 200, 200, 3)
    red = (picture[0, ..., 0] > 150) & (picture[0, ..., 1] < 110) & (picture[0, ..., 2] < 130)
    assert 20 < red.sum() < 2000  # the cube


@pytest.mark.parametrize(
    "name", ["cube-single-v0", "visual-cube-single-singletask-task1-v0", "antmaze-medium-singletask-v0", "cube"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="is not one of OGBench's single tasks"):
        make_ogbench(name)


def test_the_oracle_solves_the_task_and_play_follows_from_the_episodes_seed():
    env = OGBenchConfig().make(2, split="train")
    env.reset([7, 8])
    oracle, success = CubeOracle(env, CubeOracleConfig()), torch.zeros(2, dtype=torch.bool)
    while not env.ended.all():
        success |= env.step(oracle()).success
    assert success.all()
    assert 40 < env.episode_steps.max() < 100
    played = []
    for seeds in ([8, 7], [7, 9]):
        env.reset(seeds)
        player = CubeOracle(env, CubeOracleConfig(play=True, noise=0.1))
        moves = []
        for _ in range(4):
            moves.append(player())
            env.step(moves[-1])
        played.append(torch.cat(moves, dim=1)[seeds.index(7)])
    assert torch.equal(*played)
    env.close()


def test_a_recipe_has_splits_and_longer_episodes_for_play():
    config = OGBenchConfig(max_episode_steps=30, demo_episode_steps=90)
    starts = []
    for split in ("train", "test"):
        env = demo_env(config).make(1, split=split)
        assert env.spec.max_episode_steps == 90
        starts.append(env.reset([0]).state)
        with pytest.raises(TypeError, match="no host process"):
            make_expert(env, RemoteExpertConfig())
        assert isinstance(make_expert(env, CubeOracleConfig()), CubeOracle)
        env.close()
    assert not torch.equal(*starts)
    with pytest.raises(ValueError, match="OGBench: split 'exam' is unknown"):
        config.make(1, split="exam")
