"""Reinforcement learning from replay as stages of a run: `cloning/`, `offline/`, `online/`; each resumes by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from torch import nn

from vla_rl.core import EnvSpec
from vla_rl.data.lerobot_format import DatasetError
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.data.normalization import Normalizer
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.data.replay_writer import add_lerobot
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.offpolicy.build import SteeringConfig, build_agent, build_steering
from vla_rl.offpolicy.co_rft import BehaviorCloningConfig, CoRFTConfig
from vla_rl.offpolicy.learner import AgentLearner
from vla_rl.offpolicy.networks import AgentSpec
from vla_rl.offpolicy.policy_learner import PolicyLearner, PolicyLearnerConfig
from vla_rl.offpolicy.steered_learner import SteeredLearner
from vla_rl.offpolicy.wsrl import carry_over
from vla_rl.policies.agent import AgentPolicy, AgentPolicyConfig
from vla_rl.policies.checkpoints.native import save_policy
from vla_rl.policies.steered import SteeredPolicy, SteeredPolicyConfig, require_steerable
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.train.checkpoint import load_state
from vla_rl.train.loop import POLICY_FOLDER, STATE_FILE, TrainResult, run_iterations
from vla_rl.train.offpolicy import OfflineTrainer, OffPolicyConfig, OnlineConfig, OnlineTrainer, online_buffer

CLONING_FOLDER, OFFLINE_FOLDER, ONLINE_FOLDER = "cloning", "offline", "online"
Evaluate = Callable[[nn.Module], Mapping[str, float]]


def build_learner(
    config: Any, spec: EnvSpec, horizon: int, *, policy: nn.Module | None, dataset: LeRobotDataset | None, seed: int
) -> AgentLearner | PolicyLearner | SteeredLearner:
    """A learner for the environment of `spec`. `policy`: what a `PolicyLearnerConfig` improves and a `SteeringConfig`
    steers. `dataset`: statistics of the state for an agent of its own (None: the state is taken as it is)."""
    if isinstance(config, PolicyLearnerConfig | SteeringConfig) and policy is None:
        raise ValueError("this recipe improves a fine-tuned policy; give it with --policy")
    if isinstance(config, SteeringConfig):
        base: Any = policy
        require_steerable(base, horizon, spec.action, config)
        return SteeredLearner(SteeredPolicy(SteeredPolicyConfig(base.config, config), base, spec.action), seed)
    if isinstance(config, PolicyLearnerConfig):
        assert policy is not None
        return PolicyLearner(policy, config, horizon=horizon, action_spec=spec.action, seed=seed)
    agent = AgentPolicy(AgentPolicyConfig(config, horizon, spec.state_dim, spec.action.dim))
    state = Normalizer.identity(spec.state_dim)
    if dataset is not None:
        state = Normalizer.from_stats(dataset.stats["observation.state"], "mean_std")
    agent.set_normalization(state, Normalizer.action_box(spec.action))
    return AgentLearner(agent, seed)


def check_stages(config: OffPolicyConfig, spec: EnvSpec, policy: nn.Module | None) -> None:
    """Raise ValueError or TypeError where what the stages learn with, or the switch between, does not fit.

    `policy`: a new one of the recipe's, where the recipe improves one. Shapes alone are followed: nothing is computed.
    """

    def agent_of(agent: Any) -> Any:
        if isinstance(agent, PolicyLearnerConfig):
            return build_learner(agent, spec, config.horizon, policy=policy, dataset=None, seed=0).agent
        if isinstance(agent, SteeringConfig):
            base: Any = policy
            return build_steering(agent, AgentSpec(base.feature_dim, config.horizon, spec.action.dim))
        return build_agent(agent, AgentSpec(spec.state_dim, config.horizon, spec.action.dim))

    def first_states() -> Any:
        first = agent_of(config.agent)
        last = first if config.online_agent is None else agent_of(config.online_agent)
        state = first.init(0)
        if config.offline is not None and config.online is not None:
            return carry_over(state, last, config.online.carried, 0)
        return state

    if isinstance(config.agent, SteeringConfig):
        require_steerable(policy, config.horizon, spec.action, config.agent)
    jax.eval_shape(first_states)


def demo_buffer(
    config: ReplayConfig, dataset: LeRobotDataset, spec: EnvSpec, feature_dim: int, *, more_rows: int = 0
) -> ReplayBuffer:
    """All episodes of `dataset`, with pictures where features are wanted, and room for `more_rows`."""
    if not dataset.num_episodes:
        raise DatasetError(f"{dataset.path}: no episode to learn from; record demonstrations first")
    rows = dataset.num_frames + dataset.num_episodes + more_rows
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
    policy: Callable[[EnvSpec], nn.Module] | None,
    dataset_path: Path | None,
    resume: bool,
    evaluate: Evaluate | None = None,
    rollout: RolloutConfig | None = None,
) -> TrainResult:
    """All stages of `config`; at the end the policy lies in `run_dir/policy`.

    `make_env(n)`: n environments with auto-reset. `policy(spec)`: a fresh copy of the one to improve, which must be for
    environments of `spec`. `dataset_path`: demonstrations, which the offline stage and `offline_ratio` need.
    `evaluate(policy)`: metrics for the curve. `rollout`: who acts online; its workers build environments of their own.

    After Ctrl-C in a stage the result is not finished where another follows, even if it came in the last iteration.
    """
    rollout = rollout or RolloutConfig()
    env = make_env(1 if config.online is None or rollout.workers else config.online.num_envs)
    try:
        stages = _Stages(config, env, run_dir, policy, dataset_path, resume, evaluate, make_env, rollout)
        result = stages.run()
    finally:
        env.close()
    if not result.finished:
        return result
    save_policy(stages.learner.policy, run_dir / POLICY_FOLDER, spec=env.spec)
    return replace(result, policy_folder=run_dir / POLICY_FOLDER)


def ray_collector(
    make_env: Callable[[int], ChunkedEnv], learner: Any, config: OnlineConfig, rollout: RolloutConfig
) -> Any:
    """A `RayReplayCollector` for `config`. Raises ValueError where Ray is not installed, or has no room."""
    try:
        from vla_rl.rollout.ray_replay import RayReplayCollector
    except ModuleNotFoundError as error:
        raise ValueError("rollout.workers needs Ray: pip install 'vla-rl[ray]'") from error
    return RayReplayCollector(
        make_env, learner, config.pace, env_seeds=config.env_seeds, seed=config.seed, config=rollout
    )


class _Stages:
    def __init__(
        self,
        config: OffPolicyConfig,
        env: ChunkedEnv,
        run_dir: Path,
        policy: Callable[[EnvSpec], nn.Module] | None,
        dataset_path: Path | None,
        resume: bool,
        evaluate: Evaluate | None,
        make_env: Callable[[int], ChunkedEnv],
        rollout: RolloutConfig,
    ) -> None:
        self.config, self.env, self.run_dir, self.resume = config, env, run_dir, resume
        self._make_env, self._rollout = make_env, rollout
        self._policy, self._evaluate = policy, evaluate
        needs_data = config.offline is not None or (config.online is not None and config.online.needs_offline_data)
        if needs_data and dataset_path is None:
            raise ValueError("this recipe learns from demonstrations; give them with --dataset")
        self._dataset = None if dataset_path is None else LeRobotDataset(dataset_path)
        self._demos: ReplayBuffer | None = None
        self.learner: Any = None

    def run(self) -> TrainResult:
        """What the recipe has, one after the other."""
        config, wall_s = self.config, 0.0
        parts = (
            (CLONING_FOLDER, config.cloning, self.cloning),
            (OFFLINE_FOLDER, config.offline, self.offline),
            (ONLINE_FOLDER, config.online, self.online),
        )
        todo = [(folder, schedule, stage) for folder, schedule, stage in parts if schedule is not None]
        for i, (folder, schedule, stage) in enumerate(todo):
            following = None if i + 1 == len(todo) else todo[i + 1][0]
            self._require_not_passed(folder, schedule, following)
            result = stage()
            wall_s += result.wall_s
            if following is not None and (result.interrupted or not result.finished):
                return replace(result, finished=False, wall_s=wall_s)
        return replace(result, wall_s=wall_s)  # pyright: ignore[reportPossiblyUnboundVariable]  # a stage there is

    def _require_not_passed(self, folder: str, schedule: Any, following: str | None) -> None:
        """A stage from which the next has already begun is over: it cannot be made longer any more."""
        state = self.run_dir / folder / STATE_FILE
        if following is None or not self.resume or not (self.run_dir / following / STATE_FILE).exists():
            return
        done = int(load_state(state)["num_iterations"])
        if done != schedule.num_iterations:
            raise ValueError(
                f"stage {following} in {self.run_dir} began after {done} iterations of stage {folder}, not "
                f"{schedule.num_iterations}; resume with as many as there were, or choose another --run-dir"
            )

    def _build(self, agent: Any, seed: int) -> Any:
        policy = self._policy(self.env.spec) if self._policy is not None and self.config.improves_policy else None
        return build_learner(agent, self.env.spec, self.config.horizon, policy=policy, dataset=self._dataset, seed=seed)

    def _demo_buffer(self) -> ReplayBuffer:
        if self._demos is None:
            assert self._dataset is not None
            feature_dim = getattr(self.learner, "feature_dim", 0)
            more = 0 if self.config.online is None else self.config.online.intervention_rows
            self._demos = demo_buffer(self.config.replay, self._dataset, self.env.spec, feature_dim, more_rows=more)
        return self._demos

    def _measure(self) -> Mapping[str, float]:
        assert self._evaluate is not None
        return self._evaluate(self.learner.policy)

    def cloning(self) -> TrainResult:
        config, agent = self.config.cloning, self.config.agent
        assert config is not None
        assert isinstance(agent, CoRFTConfig)
        self.learner = self._build(BehaviorCloningConfig(agent.td3.actor), config.seed)
        return self._run(
            OfflineTrainer(self.learner, self._demo_buffer(), config, self.env.spec), CLONING_FOLDER, config
        )

    def offline(self) -> TrainResult:
        config, cloned = self.config.offline, self.learner
        assert config is not None
        self.learner = self._build(self.config.agent, config.seed)
        if cloned is not None:
            self.learner.start_from_clone(cloned, config.seed)
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
        buffer = online_buffer(self.config.replay, self.env.spec, config.num_envs, feature_dim)
        if config.offline_in_buffer:
            assert self._dataset is not None
            add_lerobot(buffer, self._dataset)
        data = self._demo_buffer() if config.offline_ratio > 0.0 else None
        if not self._rollout.workers:
            return self._run(OnlineTrainer(self.learner, self.env, buffer, config, data), ONLINE_FOLDER, config)
        collector = ray_collector(self._make_env, self.learner, config, self._rollout)
        try:
            return self._run(OnlineTrainer(self.learner, collector, buffer, config, data), ONLINE_FOLDER, config)
        finally:
            collector.close()

    def _run(self, trainer: Any, folder: str, schedule: Any) -> TrainResult:
        return run_iterations(
            trainer,
            self.run_dir / folder,
            schedule,
            label=f"{folder} rl",
            resume=self.resume,
            evaluate=None if self._evaluate is None else self._measure,
        )


__all__ = [
    "CLONING_FOLDER",
    "OFFLINE_FOLDER",
    "ONLINE_FOLDER",
    "build_learner",
    "check_stages",
    "demo_buffer",
    "ray_collector",
    "reinforce_from_replay",
]
