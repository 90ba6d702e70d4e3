"""Demonstrations as labels of progress, and a recipe with a process reward and a curriculum from end to end."""

import json
from dataclasses import replace

import pytest
import torch

from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.envs.config import EnvConfig
from vla_rl.onpolicy import ActorConfig, PPOConfig
from vla_rl.onpolicy.build import GaussianSamplerConfig
from vla_rl.onpolicy.process_reward import ProcessRewardConfig, gripper_milestones
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.native import save_policy
from vla_rl.policies.gaussian import GaussianMLPConfig
from vla_rl.train.check import check_recipe
from vla_rl.train.curriculum import CurriculumConfig
from vla_rl.train.loop import TrainConfig
from vla_rl.train.progress_demos import label_demos
from vla_rl.train.recipe import DemosConfig, Recipe
from vla_rl.train.stages import record_demos, reinforce

RECIPE = Recipe(
    env=EnvConfig(task="pick", cameras=(), num_threads=1),
    demos=DemosConfig(num_episodes=3, num_envs=3),
    policy=GaussianMLPConfig(action_horizon=4),
    train=TrainConfig(
        num_iterations=2,
        num_envs=4,
        algorithm=PPOConfig(
            num_decisions=6,
            critic_warmup_iterations=0,
            actor=ActorConfig(num_epochs=1),
            process_reward=ProcessRewardConfig(num_updates=4),
        ),
        sampler=GaussianSamplerConfig(),
        curriculum=CurriculumConfig(("pick", "reach"), uniform_share=1.0),
    ),
    device="cpu",
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    path = tmp_path_factory.mktemp("demos") / "pick"
    record_demos(RECIPE, path)
    return path


@pytest.fixture(scope="module")
def policy():
    env = RECIPE.env.make(1, split="train")
    env.close()
    return build_policy(RECIPE.policy, env.spec, seed=0), env.spec


def test_the_gripper_divides_demonstrations(demos, policy):
    dataset = LeRobotDataset(demos)
    labels = label_demos(dataset, policy[0], stride=1)
    assert len(labels) == dataset.num_frames
    assert labels.features.shape == (dataset.num_frames, policy[0].feature_dim)
    start = 0
    for index in range(3):
        episode = dataset.episode(index)
        own = labels.progress[start : start + len(episode)]
        milestones = gripper_milestones(episode.action[:, -1])
        assert len(milestones) == 1  # a pick closes the gripper once
        assert own[0].item() == 0.0
        assert own[milestones[0]].item() == pytest.approx(0.5)
        assert (own.diff() > 0).all()
        assert 0.9 < own[-1].item() < 1.0
        start += len(episode)
    coarse = label_demos(dataset, policy[0], stride=4, batch_size=3)
    assert torch.equal(coarse.progress[:3], labels.progress[:12:4])


def test_a_recipe_with_process_reward_and_curriculum(demos, policy, tmp_path):
    check_recipe(RECIPE)
    save_policy(policy[0], tmp_path / "sft", spec=policy[1])
    result = reinforce(RECIPE, tmp_path / "sft", tmp_path / "rl", resume=False, dataset_path=demos)
    assert result.finished
    rows = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["update/progress_loss"] > 0.0
    assert rows[-1]["rollout/task_share/pick"] == pytest.approx(0.5)
    unlike = replace(RECIPE, env=replace(RECIPE.env, privileged_state=True))
    with pytest.raises(ValueError, match="other state_names"):
        check_recipe(unlike)
