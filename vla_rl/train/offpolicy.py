"""Off-policy training: from stored episodes (offline), from its own (online), or from the first to the second.

A trainer's iteration is `updates_per_iteration` critic updates offline and `env_steps_per_iteration` control steps
online; `run_iterations` logs, evaluates and saves after it. Everything that decides the future is in a state file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vla_rl.core import EnvSpec, Source
from vla_rl.data.replay import ReplayBatch, ReplayBuffer, ReplayConfig
from vla_rl.data.replay_mixing import MixedReplay
from vla_rl.data.replay_writer import EpisodeWriter
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.offpolicy.build import AgentConfig, SteeringConfig
from vla_rl.offpolicy.co_rft import CoRFTConfig
from vla_rl.offpolicy.interventions import copy_interventions
from vla_rl.offpolicy.policy_learner import PolicyLearnerConfig
from vla_rl.offpolicy.wsrl import CarryOver
from vla_rl.policies.checkpoints.config_json import config_to_dict
from vla_rl.policies.checkpoints.native import save_policy
from vla_rl.rollout.replay_actor import (
    Explorer,
    LocalReplayCollector,
    Pace,
    ReplayActor,
    ReplayCollector,
    Round,
)
from vla_rl.train.checkpoint import load_state, require_same_config, save_state
from vla_rl.train.loop import POLICY_FOLDER, STATE_FILE
from vla_rl.train.metrics import Metrics

MAY_CHANGE = ("num_updates", "num_env_steps", "eval_interval", "checkpoint_interval")  # across a resume


class ReplayLearner(Explorer, Protocol):
    """What the trainers ask of a learner: an agent of its own (`AgentLearner`), one that steers a frozen torch policy
    (`SteeredLearner`), or a torch policy that learns itself (`PolicyLearner`)."""

    needs_prefixes: bool

    def prepare(self, buffer: ReplayBuffer) -> None:
        """Called before sampling from `buffer`: features that are missing."""
        ...

    def update(self, batches: ReplayBatch) -> Mapping[str, Any]:
        """Minibatches [U, B, ...]; metrics may still be on a device."""
        ...

    def publish(self) -> None:
        """`policy` is from now on what was learned until now."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class OfflineConfig:
    """`num_updates` of the critic, `updates_per_call` of them before each of the actor."""

    num_updates: int = 20_000
    batch_size: int = 256
    updates_per_call: int = 1
    updates_per_iteration: int = 250
    eval_interval: int = 0
    checkpoint_interval: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least_one(
            self, "num_updates", "batch_size", "updates_per_call", "updates_per_iteration", "checkpoint_interval"
        )
        _not_negative(self, "eval_interval")
        if self.updates_per_iteration % self.updates_per_call or self.num_updates % self.updates_per_iteration:
            raise ValueError(
                f"num_updates {self.num_updates} must be whole iterations of {self.updates_per_iteration} updates, "
                f"and these whole calls of {self.updates_per_call}"
            )

    @property
    def num_iterations(self) -> int:
        return self.num_updates // self.updates_per_iteration


@dataclass(frozen=True)
class OnlineConfig:
    """Learning from one's own episodes.

    `execution_horizon` steps of each chunk are executed before the next decision. `warmup_env_steps`: steps of the
    frozen policy before the first update (WSRL's K), and never fewer than the first update draws rows;
    `random_env_steps`: the first so many are uniform (RLPD).
    `utd_ratio`: critic updates a control step, `updates_per_call` of them before each of the actor. `offline_ratio`:
    share of offline rows in each minibatch, 0 keeps no offline data; `offline_in_buffer`: the buffer begins with them
    instead, and they give way to new ones (Q-chunking). `intervention_rows`: room beside the offline data for what a
    person did in their place, copied there when an episode has finished (HIL-SERL, arXiv 2410.21845); when it is full
    the oldest offline rows give way. 0 leaves it among the online data alone. `observe_every_step`: every control step
    is a start to learn from, and pictures are rendered there; else only decisions are. Intervals count iterations of
    `env_steps_per_iteration`.
    """

    num_env_steps: int = 50_000
    num_envs: int = 1
    execution_horizon: int = 1
    warmup_env_steps: int = 5_000
    random_env_steps: int = 0
    utd_ratio: float = 4.0
    updates_per_call: int = 4
    batch_size: int = 256
    offline_ratio: float = 0.0
    offline_in_buffer: bool = False
    intervention_rows: int = 0
    observe_every_step: bool = True
    carried: CarryOver = field(default_factory=CarryOver)
    env_steps_per_iteration: int = 250
    eval_interval: int = 0
    checkpoint_interval: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least_one(
            self, "num_env_steps", "num_envs", "execution_horizon", "updates_per_call", "batch_size",
            "env_steps_per_iteration", "checkpoint_interval",
        )  # fmt: skip
        _not_negative(self, "eval_interval", "warmup_env_steps", "random_env_steps", "intervention_rows")
        if self.intervention_rows and not self.offline_ratio:
            raise ValueError("OnlineConfig.intervention_rows is room beside offline data: set offline_ratio above 0")
        if self.utd_ratio <= 0.0 or not 0.0 <= self.offline_ratio <= 1.0:
            raise ValueError(
                f"expected utd_ratio > 0 and offline_ratio in [0, 1], got {self.utd_ratio}, {self.offline_ratio}"
            )
        step = self.num_envs * (1 if self.observe_every_step else self.execution_horizon)
        if self.env_steps_per_iteration % step or self.num_env_steps % self.env_steps_per_iteration:
            raise ValueError(
                f"num_env_steps {self.num_env_steps} must be whole iterations of {self.env_steps_per_iteration} "
                f"control steps, and these whole rounds of {step} (num_envs times the steps of a round)"
            )

    @property
    def num_iterations(self) -> int:
        return self.num_env_steps // self.env_steps_per_iteration

    @property
    def pace(self) -> Pace:
        """How whoever acts does."""
        steps = 1 if self.observe_every_step else self.execution_horizon
        return Pace(self.execution_horizon, steps, self.random_env_steps, self.num_envs)

    @property
    def env_seeds(self) -> list[int]:
        """One an environment."""
        return [self.seed * 10**6 + i for i in range(self.num_envs)]

    @property
    def needs_offline_data(self) -> bool:
        return self.offline_ratio > 0.0 or self.offline_in_buffer

    def require_horizon(self, horizon: int) -> None:
        """Raise ValueError where chunks of `horizon` steps do not fit how they are executed and observed."""
        if not 1 <= self.execution_horizon <= horizon:
            raise ValueError(f"execution_horizon is {self.execution_horizon}, a chunk has {horizon} steps")
        if not self.observe_every_step and self.execution_horizon != horizon:
            raise ValueError(
                "where only decisions are observed the critic's chunk must be the executed one: set execution_horizon "
                f"to {horizon}, or observe_every_step"
            )


@dataclass(frozen=True)
class OffPolicyConfig:
    """Reinforcement learning from replay: `offline` from demonstrations, then `online`; None leaves a stage out.

    `agent`: what learns; one of its own that sees the state alone, a `PolicyLearnerConfig`, which improves the policy
    of supervised fine-tuning, or a `SteeringConfig`, which steers that policy and leaves it as it is. `online_agent`:
    after the switch (None: the same). `horizon`: steps of a chunk.
    `cloning`: behaviour cloning of the actor before `offline`, stage 1 of CO-RFT.
    All stages read the same `replay`; its reward scale and bias must be one, as the values are.
    """

    agent: AgentConfig | PolicyLearnerConfig | SteeringConfig = field(default_factory=PolicyLearnerConfig)
    online_agent: AgentConfig | PolicyLearnerConfig | SteeringConfig | None = None
    replay: ReplayConfig = field(default_factory=lambda: ReplayConfig(capacity=100_000, gamma=0.99))
    horizon: int = 4
    cloning: OfflineConfig | None = None
    offline: OfflineConfig | None = None
    online: OnlineConfig | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "horizon")
        if self.offline is None and self.online is None:
            raise ValueError("OffPolicyConfig needs offline, online or both")
        if self.cloning is not None and (not isinstance(self.agent, CoRFTConfig) or self.offline is None):
            raise ValueError("OffPolicyConfig.cloning is for a CoRFTConfig and an offline stage after it")
        if self.online_agent is not None and self.online is None:
            raise ValueError("OffPolicyConfig.online_agent has no effect without online")
        if self.online_agent is not None and _role(self.agent) != _role(self.online_agent):
            raise ValueError(
                "agent and online_agent must both improve a policy, both steer one, or both act by themselves"
            )
        if self.online_agent is not None and self.offline is None:
            raise ValueError("OffPolicyConfig.online_agent is that after the switch: without offline there is none")
        stored = {getattr(agent, "num_stored", 0) for agent in (self.agent, self.online_agent or self.agent)}
        if len(stored) > 1:
            raise ValueError(
                "agent and online_agent read the same demonstrations: give both the same num_stored, not "
                f"{' and '.join(map(str, sorted(stored)))}"
            )
        if self.online is not None:
            self.online.require_horizon(self.horizon)
            if self.offline is None and self.online.carried != CarryOver():
                raise ValueError("OnlineConfig.carried has no effect without offline: nothing crosses")

    @property
    def improves_policy(self) -> bool:
        """Whether it starts from a fine-tuned policy, instead of an agent of its own."""
        return _role(self.agent) != "acts"

    @property
    def execution_horizon(self) -> int:
        """Steps of a chunk that are executed, in training and in evaluation."""
        return self.horizon if self.online is None else self.online.execution_horizon

    def with_seed(self, seed: int) -> OffPolicyConfig:
        """The same with another seed in every stage."""
        stages = {name: getattr(self, name) for name in ("cloning", "offline", "online")}
        return replace(self, **{name: replace(stage, seed=seed) for name, stage in stages.items() if stage is not None})


def _role(agent: Any) -> str:
    if isinstance(agent, SteeringConfig):
        return "steers"
    return "improves" if isinstance(agent, PolicyLearnerConfig) else "acts"


def _at_least_one(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{type(config).__name__}.{name} is {getattr(config, name)}, expected at least 1")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{type(config).__name__}.{name} is {getattr(config, name)}, expected at least 0")


def online_buffer(config: ReplayConfig, spec: EnvSpec, num_envs: int, feature_dim: int = 0) -> ReplayBuffer:
    """An empty buffer for the episodes of `num_envs` environments of `spec`, in memory."""
    limit = spec.max_episode_steps
    if limit is None:
        raise ValueError(f"{spec.name} has no time limit; replay needs max_episode_steps to make room for an episode")
    return ReplayBuffer(
        config,
        state_dim=spec.state_dim,
        action_dim=spec.action.dim,
        cameras={name: (camera.height, camera.width) for name, camera in spec.cameras.items()},
        feature_dim=feature_dim,
        num_envs=num_envs,
        max_episode_steps=limit,
    )


class OfflineTrainer:
    """Updates of a learner from a buffer that does not change."""

    def __init__(self, learner: ReplayLearner, buffer: ReplayBuffer, config: OfflineConfig, spec: EnvSpec) -> None:
        self.learner, self.config, self.spec = learner, config, spec
        self._buffer = buffer
        self._rng = np.random.default_rng(config.seed)
        self.num_iterations = 0
        learner.prepare(buffer)

    def iterate(self) -> Metrics:
        """`updates_per_iteration` critic updates; metrics are those of the last call."""
        config, metrics = self.config, {}
        for _ in range(config.updates_per_iteration // config.updates_per_call):
            batches = self._buffer.sample(
                config.batch_size,
                self._rng,
                horizon=self.learner.horizon,
                prefixes=self.learner.needs_prefixes,
                num_minibatches=config.updates_per_call,
            )
            metrics = self.learner.update(batches)
        self.learner.publish()
        self.num_iterations += 1
        return _numbers("update", metrics) | {
            "update/num_updates": float(self.num_iterations * config.updates_per_iteration)
        }

    def save(self, run_dir: Path) -> None:
        """The policy for whoever uses it, then the state to go on from."""
        _save(self, run_dir, {})

    def load(self, run_dir: Path) -> None:
        """Go on from `run_dir`. Raises CheckpointError where the stored run has another configuration."""
        _load(self, run_dir)


class OnlineTrainer:
    """A learner that learns from what was done with it and stored in `buffer`.

    `env` (with auto-reset): it acts there itself; or who acts for it. `offline`: data to mix in, where `offline_ratio`
    is above 0.
    """

    def __init__(
        self,
        learner: ReplayLearner,
        env: ChunkedEnv | ReplayCollector,
        buffer: ReplayBuffer,
        config: OnlineConfig,
        offline: ReplayBuffer | None = None,
    ) -> None:
        config.require_horizon(learner.horizon)
        if (offline is not None) != (config.offline_ratio > 0.0):
            raise ValueError(
                f"offline_ratio is {config.offline_ratio}: give offline data where it is above 0, only then"
            )
        self.learner, self.config, self.spec = learner, config, env.spec
        if isinstance(env, ReplayCollector):
            self._collector: ReplayCollector = env
        else:
            self._collector = LocalReplayCollector(ReplayActor(env, learner, config.pace, config.env_seeds))
        self._buffer, self._offline = buffer, offline
        self._replay = buffer if offline is None else MixedReplay(buffer, offline, config.offline_ratio)
        self._writer = EpisodeWriter(buffer, env.spec.action)
        self._rng = np.random.default_rng(config.seed)
        self._episodes: list[tuple[bool, float, int]] = []  # success, return, length of those of this iteration
        self._num_steps_by = {Source.POLICY: 0, Source.HUMAN: 0}  # of this iteration
        self._copied_until = 0  # the episode from which on a person's steps are to be copied
        self._update_credit = 0.0
        self.num_env_steps = self.num_iterations = 0
        if offline is not None:
            learner.prepare(offline)

    def iterate(self) -> Metrics:
        """`env_steps_per_iteration` control steps, with the updates that belong to them."""
        self._episodes, self._num_steps_by = [], dict.fromkeys(self._num_steps_by, 0)
        metrics: Mapping[str, Any] = {}
        steps_of_round = self.config.num_envs * self.config.pace.steps_per_round
        for done in self._collector.rounds(self.config.env_steps_per_iteration // steps_of_round):
            self._store(done)
            self.num_env_steps += steps_of_round
            metrics = self._learn(steps_of_round) or metrics
        self.learner.publish()
        self.num_iterations += 1
        return self._rollout_metrics() | self._collector.metrics() | _numbers("update", metrics)

    def _store(self, done: Round) -> None:
        if done.lost is not None:
            self._writer.cut(done.lost.nonzero().flatten().tolist())
        moved = self._writer.add(done.obs, done.actions, done.step, policy_version=done.policy_version)
        self._episodes += self._buffer.last_episodes(len(moved))
        if done.step.taken is not None:
            for who in self._num_steps_by:
                self._num_steps_by[who] += int((done.step.executed & (done.step.taken.source == who)).sum())
        if len(moved) and self._offline is not None and self.config.intervention_rows:
            self._copied_until = copy_interventions(self._buffer, self._offline, since=self._copied_until)
            self.learner.prepare(self._offline)

    def _learn(self, new_env_steps: int) -> Mapping[str, Any] | None:
        """The updates that `new_env_steps` pay for; none during the warm-up, which pays for none later either."""
        config = self.config
        minibatches = config.batch_size * config.updates_per_call * (1.0 - config.offline_ratio)
        if self.num_env_steps <= max(config.warmup_env_steps, minibatches):
            return None
        self._update_credit += new_env_steps * config.utd_ratio / config.updates_per_call
        metrics = None
        while self._update_credit >= 1.0:
            self.learner.prepare(self._buffer)
            batches = self._replay.sample(
                config.batch_size,
                self._rng,
                horizon=self.learner.horizon,
                prefixes=self.learner.needs_prefixes,
                num_minibatches=config.updates_per_call,
            )
            metrics = self.learner.update(batches)
            self._update_credit -= 1.0
        if metrics is not None:
            self.learner.publish()
            self._collector.learned()
        return metrics

    def _rollout_metrics(self) -> Metrics:
        metrics = {"rollout/env_steps": float(self.num_env_steps), "rollout/stored_steps": float(len(self._buffer))}
        if num_steps := sum(self._num_steps_by.values()):
            metrics["rollout/intervention_rate"] = self._num_steps_by[Source.HUMAN] / num_steps
        if self._episodes:
            success, returns, lengths = (np.mean(column) for column in zip(*self._episodes, strict=True))
            metrics |= {
                "rollout/success_rate": float(success),
                "rollout/return": float(returns),
                "rollout/episode_length": float(lengths),
                "rollout/num_episodes": float(len(self._episodes)),
            }
        return metrics

    def save(self, run_dir: Path) -> None:
        """The policy for whoever uses it, then the state to go on from, replay included."""
        _save(
            self,
            run_dir,
            {
                **self._collector.state_dict(),
                "buffer": self._buffer.state_dict(),
                **self._offline_state(),
                "update_credit": self._update_credit,
                "num_env_steps": self.num_env_steps,
            },
        )

    def _offline_state(self) -> dict[str, Any]:
        """Of the offline data, where they change."""
        if self._offline is None or not self.config.intervention_rows:
            return {}
        return {"offline": self._offline.state_dict(), "copied_until": self._copied_until}

    def load(self, run_dir: Path) -> None:
        """Go on from `run_dir`. Raises CheckpointError where the stored run has another configuration."""
        state = _load(self, run_dir)
        self._collector.load_state_dict(state)
        self._buffer.load_state_dict(state["buffer"])
        if self._offline is not None and self.config.intervention_rows:
            self._offline.load_state_dict(state["offline"])
            self._copied_until = state["copied_until"]
        self._update_credit, self.num_env_steps = state["update_credit"], state["num_env_steps"]


# -------------------------------------------------------------------------------------------------------------- state
def _save(trainer: OfflineTrainer | OnlineTrainer, run_dir: Path, more: Mapping[str, Any]) -> None:
    metadata = {"iterations": trainer.num_iterations}
    save_policy(trainer.learner.policy, run_dir / POLICY_FOLDER, spec=trainer.spec, metadata=metadata)
    state = {
        "config": config_to_dict(trainer.config),
        "num_iterations": trainer.num_iterations,
        "learner": trainer.learner.state_dict(),
        "rng": trainer._rng.bit_generator.state,
    }
    save_state(run_dir / STATE_FILE, state | dict(more))


def _load(trainer: OfflineTrainer | OnlineTrainer, run_dir: Path) -> dict[str, Any]:
    path = run_dir / STATE_FILE
    state = load_state(path)
    require_same_config(state["config"], trainer.config, MAY_CHANGE, path)
    trainer.learner.load_state_dict(state["learner"])
    trainer._rng.bit_generator.state = state["rng"]
    trainer.num_iterations = int(state["num_iterations"])
    return state


def _numbers(group: str, metrics: Mapping[str, Any]) -> Metrics:
    """Metrics as numbers under a group's name. Raises FloatingPointError for one that is not finite."""
    values = {name: float(value) for name, value in metrics.items()}
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"{', '.join(bad)} is not finite: lower the learning rate or the reward's scale, and resume from the last "
            "checkpoint"
        )
    return {f"{group}/{name}": value for name, value in values.items()}
