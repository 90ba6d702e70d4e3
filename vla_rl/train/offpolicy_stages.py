"""Reinforcement learning from replay as stages of a run: `offline/`, then `online/`; each resumes by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vla_rl.core import EnvSpec
from vla_rl.data.lerobot_format import DatasetError
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.data.normalization import Normalizer
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.data.replay_writer import add_lerobot
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.offpolicy.learner import AgentLearner
from vla_rl.offpolicy.policy_learner import PolicyLearner, PolicyLearnerConfig
from vla_rl.policies.agent import AgentPolicy, AgentPolicyConfig
from vla_rl.policies.checkpoints.native import save_policy
from vla_rl.train.loop import POLICY_FOLDER, TrainResult, run_iterations
from vla_rl.train.offpolicy import OfflineTrainer, OffPolicyConfig, OnlineTrainer, online_buffer

OFFLINE_FOLDER, ONLINE_FOLDER = "offline", "online"
Evaluate = Callable[[nn.Module], Mapping[str, float]]


def build_learner(
    config: Any, spec: EnvSpec, horizon: int, *, policy: nn.Module | None, dataset: LeRobotDataset | None, seed: int
) -> AgentLearner | PolicyLearner:
    """A learner for the environment of `spec`. `policy`: what a `PolicyLearnerConfig` improves. `dataset`: statistics
    of the state for an agent of its own (None: the state is taken as it is)."""
    if isinstance(config, PolicyLearnerConfig):
        if policy is None:
            raise ValueError("this recipe improves a fine-tuned policy; give it with --from")
        return PolicyLearner(policy, config, horizon=horizon, action_spec=spec.action, seed=seed)
    agent = AgentPolicy(AgentPolicyConfig(config, horizon, spec.state_dim, spec.action.dim))
    state = Normalizer.identity(spec.state_dim)
    if dataset is not None:
        state = Normalizer.from_stats(dataset.stats["observation.state"], "mean_std")
    low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
    agent.set_normalization(state, Normalizer.bounds(low, high, kind="min_max"))
    return AgentLearner(agent, seed)


def demo_buffer(config: ReplayConfig, dataset: LeRobotDataset, spec: EnvSpec, feature_dim: int) -> ReplayBuffer:
    """All episodes of `dataset`, with pictures where features are wanted."""
    if not dataset.num_episodes:
        raise DatasetError(f"{dataset.path}: no episode to learn from; record demonstrations first")
    rows = dataset.num_frames + dataset.num_episodes
    buffer = ReplayBuffer(
        replace(config, capacity=rows),
        state_dim=spec.state_dim,
        action_dim=spec.action.dim,
        cameras={n: (c.height, c.width) for n, c in dataset.cameras.items()} if feature_dim else {},
        feature_dim=feature_dim,
    )
    add_lerobot(buffer, dataset)
    return buffer


def reinforce_from_replay(
    config: OffPolicyConfig,
    make_env: Callable[[int], ChunkedEnv],
    run_dir: Path,
    *,
    policy: Callable[[], nn.Module] | None,
    dataset_path: Path | None,
    resume: bool,
    evaluate: Evaluate | None = None,
) -> TrainResult:
    """Both stages of `config`; at the end the policy lies in `run_dir/policy`.

    `make_env(n)`: n environments with auto-reset. `policy()`: a fresh copy of the one to improve. `dataset_path`:
    demonstrations, which the offline stage and `offline_ratio` need. `evaluate(policy)`: metrics for the curve.
    """
    env = make_env(1 if config.online is None else config.online.num_envs)
    try:
        stages = _Stages(config, env, run_dir, policy, dataset_path, resume, evaluate)
        result = stages.offline() if config.offline is not None else None
        if config.online is not None and (result is None or result.finished):
            result = stages.online()
    finally:
        env.close()
    assert result is not None
    if result.finished:
        save_policy(stages.learner.policy, run_dir / POLICY_FOLDER, spec=env.spec)
    return replace(result, policy_folder=run_dir / POLICY_FOLDER)


class _Stages:
    def __init__(
        self,
        config: OffPolicyConfig,
        env: ChunkedEnv,
        run_dir: Path,
        policy: Callable[[], nn.Module] | None,
        dataset_path: Path | None,
        resume: bool,
        evaluate: Evaluate | None,
    ) -> None:
        self.config, self.env, self.run_dir, self.resume = config, env, run_dir, resume
        self._policy, self._evaluate = policy, evaluate
        needs_data = config.offline is not None or (config.online is not None and config.online.offline_ratio > 0.0)
        if needs_data and dataset_path is None:
            raise ValueError("this recipe learns from demonstrations; give them with --dataset")
        self._dataset = None if dataset_path is None else LeRobotDataset(dataset_path)
        self._demos: ReplayBuffer | None = None
        self.learner: Any = None

    def _build(self, agent: Any, seed: int) -> Any:
        policy = self._policy() if self._policy is not None and self.config.improves_policy else None
        return build_learner(agent, self.env.spec, self.config.horizon, policy=policy, dataset=self._dataset, seed=seed)

    def _demo_buffer(self) -> ReplayBuffer:
        if self._demos is None:
            assert self._dataset is not None
            feature_dim = getattr(self.learner, "feature_dim", 0)
            self._demos = demo_buffer(self.config.replay, self._dataset, self.env.spec, feature_dim)
        return self._demos

    def _measure(self) -> Mapping[str, float]:
        assert self._evaluate is not None
        return self._evaluate(self.learner.policy)

    def offline(self) -> TrainResult:
        config = self.config.offline
        assert config is not None
        self.learner = self._build(self.config.agent, config.seed)
        trainer = OfflineTrainer(self.learner, self._demo_buffer(), config, self.env.spec)
        return self._run(trainer, OFFLINE_FOLDER, config)

    def online(self) -> TrainResult:
        config = self.config.online
        assert config is not None
        offline, agent = self.learner, self.config.online_agent or self.config.agent
        self.learner = self._build(agent, config.seed)
        if offline is not None:
            self.learner.switch_from(offline, config.carried, config.seed)
        feature_dim = getattr(self.learner, "feature_dim", 0)
        trainer = OnlineTrainer(
            self.learner,
            self.env,
            online_buffer(self.config.replay, self.env.spec, config.num_envs, feature_dim),
            config,
            self._demo_buffer() if config.offline_ratio > 0.0 else None,
        )
        return self._run(trainer, ONLINE_FOLDER, config)

    def _run(self, trainer: Any, folder: str, schedule: Any) -> TrainResult:
        return run_iterations(
            trainer,
            self.run_dir / folder,
            schedule,
            label=f"{folder} rl",
            resume=self.resume,
            evaluate=None if self._evaluate is None else self._measure,
        )


__all__ = ["OFFLINE_FOLDER", "ONLINE_FOLDER", "build_learner", "demo_buffer", "reinforce_from_replay"]
