"""Whether the parts of a recipe fit, before anything runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vla_rl.core import EnvSpec
from vla_rl.envs.config import EnvConfig, PointMazeConfig
from vla_rl.envs.gym import FunctionExpertConfig, GymConfig
from vla_rl.envs.ogbench import OGBenchConfig
from vla_rl.envs.ogbench_expert import CubeOracleConfig
from vla_rl.envs.point_maze import WaypointConfig
from vla_rl.envs.remote_expert import RemoteExpertConfig
from vla_rl.envs.task_mix import make_task_mix
from vla_rl.envs.twin import TwinEnvConfig
from vla_rl.onpolicy.build import build_learner, build_sampler
from vla_rl.onpolicy.grpo import GRPOConfig
from vla_rl.policies.adaptation import apply_adaptation
from vla_rl.policies.build import build_policy
from vla_rl.rollout.collector import check_policy_batch_size
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.sim.experts import ExpertConfig
from vla_rl.sim.tasks import get_task
from vla_rl.train.offpolicy import OffPolicyConfig
from vla_rl.train.offpolicy_stages import check_stages
from vla_rl.train.recipe import Recipe


def device_of(recipe: Recipe) -> torch.device:
    """Raises ValueError where the recipe wants a GPU and there is none."""
    return device_named(recipe.device)


def device_named(name: str) -> torch.device:
    """ "auto" is a GPU where there is one. Raises ValueError where a GPU is wanted and there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, and torch sees no GPU; use --device auto")
    return device


def check_recipe(recipe: Recipe, *, stored_policy: bool = False) -> None:
    """Raise ValueError or TypeError where the parts of a recipe do not fit: at once, not after an hour's training.

    `stored_policy`: a policy is read instead of the recipe's being built; `check_policy` is for it, once it is there.
    """
    experts = {
        EnvConfig: ExpertConfig,
        TwinEnvConfig: ExpertConfig,
        PointMazeConfig: WaypointConfig,
        GymConfig: FunctionExpertConfig,
        OGBenchConfig: CubeOracleConfig,
    }
    if type(recipe.demos.expert) is not experts.get(type(recipe.env), RemoteExpertConfig):
        raise TypeError(
            f"demos.expert is a {type(recipe.demos.expert).__name__} and env a {type(recipe.env).__name__}: "
            "a maze has a WaypointConfig, a table an ExpertConfig, a Gymnasium environment a FunctionExpertConfig, "
            "OGBench a CubeOracleConfig, any other simulator a RemoteExpertConfig"
        )
    if isinstance(recipe.env, EnvConfig):
        for task in recipe.evaluation.tasks:
            get_task(task)
    env = recipe.env.make(1, split="train")
    env.close()
    device_of(recipe)
    train = recipe.train
    if recipe.fine_tunes and not stored_policy:
        policy: Any = build_policy(recipe.policy, env.spec, seed=0)
        apply_adaptation(policy, recipe.adaptation)
        check_policy(recipe, policy, env.spec)
    elif not recipe.fine_tunes and not recipe.adaptation.is_off:
        raise ValueError("adaptation is for a policy that is fine-tuned, this recipe trains an agent of its own")
    if isinstance(recipe.env, TwinEnvConfig) and recipe.rollout.workers:
        raise ValueError("rollout.workers: there is one arm, and this process has it; set it to 0")
    if isinstance(train, OffPolicyConfig):
        check_replay_rollout(recipe.rollout, train)
        if not recipe.fine_tunes:
            check_stages(train, env.spec, None)
        return
    if train.curriculum is not None:
        make_task_mix(lambda task: recipe.env.make(1, split="train", task=task), train.curriculum).close()
    check_policy_batch_size(recipe.rollout.policy_batch_size, train.num_envs)
    if recipe.rollout.workers:
        recipe.rollout.slices(train.num_envs)
    if recipe.rollout.max_staleness and isinstance(train.algorithm, GRPOConfig):
        raise ValueError("rollout.max_staleness is for PPO: GRPO collects whole episodes for each update; set it to 0")


def check_replay_rollout(rollout: RolloutConfig, train: OffPolicyConfig) -> None:
    """Raise ValueError where learning from replay has no use for `rollout`."""
    if rollout == RolloutConfig():
        return
    if train.online is None:
        raise ValueError("rollout.*: this recipe learns offline alone, nobody collects; leave it out")
    if rollout.policy_batch_size is not None or rollout.is_shared:
        raise ValueError(
            "rollout.policy_batch_size and rollout.inference are for on-policy learning, and this recipe learns from "
            "replay; leave them out"
        )
    rollout.slices(train.online.num_envs)


def check_policy(recipe: Recipe, policy: Any, spec: EnvSpec) -> None:
    """Raise ValueError or TypeError where `policy` cannot do what the recipe's training asks of it."""
    train = recipe.train
    if train.execution_horizon > policy.action_horizon:
        raise ValueError(
            f"train.execution_horizon is {train.execution_horizon}, the policy predicts {policy.action_horizon} steps"
        )
    if isinstance(train, OffPolicyConfig):
        check_stages(train, spec, policy)
        return
    deployed, explored = (getattr(c, "num_steps", None) for c in (policy.config, train.sampler))
    if deployed != explored and None not in (deployed, explored):
        raise ValueError(
            f"policy.num_steps is {deployed} and train.sampler.num_steps {explored}: another chain would be deployed "
            "than was trained; make them equal"
        )
    without_demos = replace(train.algorithm, actor=replace(train.algorithm.actor, bc_coef=0.0))
    sampler = build_sampler(policy, train.sampler, seed=0)
    build_learner(sampler, without_demos, step_weighting=train.step_weighting)


__all__ = ["check_policy", "check_recipe", "check_replay_rollout", "device_named", "device_of"]
