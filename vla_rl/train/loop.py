"""The training loop: iterate, log, evaluate, save; until done, or Ctrl-C. And what an on-policy run consists of.

A run that was killed at any moment and resumed ends, on a CPU, with the same parameters bit for bit as one that was
not: the simulator's state and every random generator are in the state file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from vla_rl.envs.vector import ChunkedEnv
from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.flow.sampler import ChunkSampler
from vla_rl.onpolicy.build import AlgorithmConfig, SamplerConfig, build_learner, build_sampler
from vla_rl.onpolicy.dppo import DenoisingDiscount
from vla_rl.onpolicy.ppo import PPOConfig
from vla_rl.onpolicy.process_reward import ProgressLabels
from vla_rl.policies.adaptation import plain_state_dict
from vla_rl.policies.checkpoints.config_json import config_to_dict
from vla_rl.policies.checkpoints.native import save_policy
from vla_rl.progress import Progress
from vla_rl.protocols import Learner
from vla_rl.rollout.collector import DEFAULT_PREFIX_CACHE_GIB, Collector, RolloutCollector
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.train.checkpoint import CheckpointError, load_state, require_same_config, save_state
from vla_rl.train.curriculum import CurriculumConfig
from vla_rl.train.demo_source import DatasetDemos
from vla_rl.train.distributed import (
    LEARNERS_FOLDER,
    any_learner,
    gather,
    join_metrics,
    learner,
    num_learners,
    same_start,
    slice_of_learner,
    wait_for_all,
)
from vla_rl.train.divergence import dumping
from vla_rl.train.interrupt import StopOnInterrupt
from vla_rl.train.metrics import Metrics, MetricsLogger
from vla_rl.train.sharding import shard_layers, whole_layers, whole_state

STATE_FILE, POLICY_FOLDER, DIVERGED_FILE = "train_state.pt", "policy", "diverged_batch.safetensors"
MAY_CHANGE = ("num_iterations", "eval_interval", "checkpoint_interval")  # across a resume


@dataclass(frozen=True)
class TrainConfig:
    """On-policy reinforcement learning of a policy.

    `num_envs` environments execute `execution_horizon` steps of each chunk. `algorithm`: PPO or GRPO; its seed decides
    the whole stage. `sampler`: how the policy explores. `freeze_encoder`: features are computed once a decision and
    kept through the update, if a window of them takes no more than `prefix_cache_gib`. `eval_interval`:
    iterations between evaluations (0: none), `checkpoint_interval` between saves; both also happen at the end.
    `curriculum`: episodes are of its tasks instead of the environment's one.
    """

    num_iterations: int = 100
    num_envs: int = 64
    execution_horizon: int = 4
    algorithm: AlgorithmConfig = field(default_factory=PPOConfig)
    sampler: SamplerConfig = field(default_factory=FlowSamplerConfig)
    step_weighting: DenoisingDiscount | None = None
    freeze_encoder: bool = True
    prefix_cache_gib: float = DEFAULT_PREFIX_CACHE_GIB
    eval_interval: int = 0
    checkpoint_interval: int = 10
    curriculum: CurriculumConfig | None = None

    def __post_init__(self) -> None:
        for name in ("num_iterations", "num_envs", "execution_horizon", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.eval_interval < 0:
            raise ValueError(f"TrainConfig.eval_interval is {self.eval_interval}, expected >= 0 (0: never)")

    def with_seed(self, seed: int) -> TrainConfig:
        """The same with another seed."""
        return replace(self, algorithm=replace(self.algorithm, seed=seed))


@dataclass(frozen=True)
class TrainResult:
    """`num_iterations` done so far, all of them where `finished`. `interrupted`: Ctrl-C came, perhaps in the last one.
    `policy_folder` loads with `load_policy`."""

    num_iterations: int
    finished: bool
    interrupted: bool
    policy_folder: Path
    wall_s: float


class Schedule(Protocol):
    """When a run ends, is evaluated (every so many iterations, 0: never) and saved."""

    @property
    def num_iterations(self) -> int: ...

    @property
    def eval_interval(self) -> int: ...

    @property
    def checkpoint_interval(self) -> int: ...


class IterativeTrainer(Protocol):
    """What `run_iterations` drives."""

    num_iterations: int

    def iterate(self) -> Metrics:
        """One iteration; counts it."""
        ...

    def save(self, run_dir: Path) -> None: ...

    def load(self, run_dir: Path) -> None: ...


MakeEnv = Callable[[int], ChunkedEnv]


class Trainer:
    """What one on-policy run consists of: the policy, who collects with it and who improves it.

    `shard`: several learners divide the policy's layers while they learn; to collect, each has all of it, or its
    workers have.
    """

    def __init__(
        self,
        policy: nn.Module,
        make_env: MakeEnv,
        config: TrainConfig,
        demos: DatasetDemos | None = None,
        rollout: RolloutConfig | None = None,
        progress_demos: ProgressLabels | None = None,
        *,
        shard: bool = False,
    ) -> None:
        self.policy: Any = policy
        self.config = config
        if config.freeze_encoder and hasattr(policy, "freeze_encoder"):
            self.policy.freeze_encoder()
        if num_learners() > 1:
            if not isinstance(config.algorithm, PPOConfig) or demos is not None:
                raise ValueError("several learners are for PPO without bc_coef; start this run without torchrun")
            same_start(policy)
        seed = config.algorithm.seed
        self._demos = demos
        sampler = build_sampler(policy, config.sampler, seed=seed)
        # workers copy the policy now, and can copy none whose layers are divided
        self._collector = make_collector(make_env, sampler, config, rollout or RolloutConfig())
        if shard:
            shard_layers(policy)
        self.learner: Learner = build_learner(
            sampler,
            config.algorithm,
            step_weighting=config.step_weighting,
            demos=demos,
            progress_demos=progress_demos,
        )
        self.spec = self._collector.spec
        self.num_iterations = 0

    def iterate(self) -> Metrics:
        """Collect and update once."""
        start = time.monotonic()
        metrics = join_metrics(self.learner.iterate(self._collector) | self._collector.metrics())
        self.num_iterations += 1
        return metrics | {"update/iteration_s": time.monotonic() - start}

    def save(self, run_dir: Path) -> None:
        """The policy for whoever uses it, then the state to go on from."""
        metadata = {"iterations": self.num_iterations}
        is_first = learner() == 0
        learner_state = whole_state(self.learner.state_dict(), keep=is_first)
        plain = whole_state(plain_state_dict(self.policy), keep=is_first)
        own = gather({"collector": self._collector.state_dict(), "generator": learner_state["generator"]})
        state = {
            "config": config_to_dict(self.config),
            "num_iterations": self.num_iterations,
            "learner": learner_state,
            "collector": own[0]["collector"],
            "demos": None if self._demos is None else self._demos.state_dict(),
            "other_learners": own[1:],
        }

        def write() -> None:
            save_policy(self.policy, run_dir / POLICY_FOLDER, spec=self.spec, metadata=metadata, state=plain)
            save_state(run_dir / STATE_FILE, state)

        wait_for_all(write)

    def load(self, run_dir: Path) -> None:
        """Go on from `run_dir`. Raises CheckpointError where the stored run has another configuration."""
        state = load_state(run_dir / STATE_FILE)
        require_same_config(state["config"], self.config, MAY_CHANGE, run_dir / STATE_FILE)
        others = state["other_learners"]
        if len(others) + 1 != num_learners():
            raise CheckpointError(
                f"{run_dir / STATE_FILE} is of {len(others) + 1} learners, here are {num_learners()}; start as many"
            )
        own = {"collector": state["collector"], "generator": state["learner"]["generator"]}
        own = own if learner() == 0 else others[learner() - 1]
        self.learner.load_state_dict(state["learner"] | {"generator": own["generator"]})
        self._collector.load_state_dict(own["collector"])
        if self._demos is not None:
            self._demos.load_state_dict(state["demos"])
        self.num_iterations = int(state["num_iterations"])

    def close(self) -> None:
        """End the environments, or the workers that have them."""
        self._collector.close()


def make_collector(make_env: MakeEnv, sampler: ChunkSampler, config: TrainConfig, rollout: RolloutConfig) -> Collector:
    """In this process, or with workers. Raises ValueError where Ray is needed and not installed."""
    seed, device = config.algorithm.seed, next(iter(sampler.policy.parameters())).device
    envs = slice_of_learner(config.num_envs)
    if rollout.workers == 0:
        return RolloutCollector(
            make_env(len(envs)),
            sampler,
            execution_horizon=config.execution_horizon,
            seed=seed,
            first_env=envs.start,
            policy_batch_size=rollout.policy_batch_size,
            prefix_cache_gib=config.prefix_cache_gib,
            device=device,
        )
    try:
        from vla_rl.rollout.ray_collector import RayRolloutCollector
    except ModuleNotFoundError as error:
        raise ValueError("rollout.workers needs Ray: pip install 'vla-rl[ray]'") from error
    return RayRolloutCollector(
        make_env,
        sampler,
        num_envs=len(envs),
        execution_horizon=config.execution_horizon,
        seed=seed,
        first_env=envs.start,
        config=rollout,
        prefix_cache_gib=config.prefix_cache_gib,
        device=device,
    )


def run_training(
    policy: nn.Module,
    env: ChunkedEnv | MakeEnv,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    resume: bool = False,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    demos: DatasetDemos | None = None,
    rollout: RolloutConfig | None = None,
    progress_demos: ProgressLabels | None = None,
    tensorboard: bool = True,
    shard: bool = False,
) -> TrainResult:
    """Improve `policy` in place in `env` (with auto-reset); at the end it is what lies in `run_dir/policy`.

    `env`: environments, or a function that builds so many of them, which `rollout.workers` need; those are closed.

    `evaluate()` gives metrics of the policy as it is, every `eval_interval` iterations; the first learner calls it.
    `shard`: see `Trainer`; the layers stay divided. Ctrl-C stops after the running
    iteration, saves, and returns with `finished` False. `resume=True` goes on from `run_dir`, or starts where nothing
    was saved. Raises FileExistsError where a run would be overwritten, CheckpointError where the stored run is another,
    DivergenceError for a loss that is not finite: its batch is then in `run_dir/diverged_batch.safetensors`, and the
    last checkpoint is untouched.
    """
    given = isinstance(env, ChunkedEnv)
    if given and rollout is not None and rollout.workers:
        raise ValueError("rollout.workers build environments of their own: give a function that does")
    make_env = (lambda _: env) if isinstance(env, ChunkedEnv) else env
    trainer = Trainer(policy, make_env, config, demos, rollout, progress_demos, shard=shard)

    def evaluate_alone() -> Mapping[str, float]:
        with whole_layers(policy):
            return evaluate() if evaluate is not None and learner() == 0 else {}

    try:
        return run_iterations(
            trainer, run_dir, config, label="rl", resume=resume, evaluate=evaluate_alone, tensorboard=tensorboard
        )
    finally:
        if not given:
            trainer.close()


def run_iterations(
    trainer: IterativeTrainer,
    run_dir: str | Path,
    schedule: Schedule,
    *,
    label: str,
    resume: bool = False,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    tensorboard: bool = True,
) -> TrainResult:
    """Iterate until `schedule.num_iterations`; see `run_training` for the rest. `label` stands in the progress."""
    run_dir, begin = Path(run_dir), time.monotonic()
    if (run_dir / STATE_FILE).exists():
        if not resume:
            raise FileExistsError(
                f"{run_dir / STATE_FILE} holds a run already; resume it, or choose another run folder"
            )
        trainer.load(run_dir)
    first, total = trainer.num_iterations, schedule.num_iterations
    progress = Progress(max(total, 1), label, unit="iterations", initial=first)
    resume_after, is_first = first if resume else None, learner() == 0
    log_dir = run_dir if is_first else run_dir / LEARNERS_FOLDER / str(learner())
    logger = MetricsLogger(log_dir, resume_after=resume_after, tensorboard=tensorboard and is_first)
    with StopOnInterrupt() as stop, logger as log:
        while trainer.num_iterations < total and not any_learner(stop.requested):
            with dumping(run_dir / DIVERGED_FILE, run_dir / STATE_FILE):
                metrics = trainer.iterate()
            done = trainer.num_iterations
            if evaluate is not None and _is_due(done, schedule.eval_interval, total):
                metrics |= evaluate()
            log.log(done, metrics)
            success = metrics.get("rollout/success_rate")
            if is_first:
                progress.update(done, **({} if success is None else {"success": success}))
            if done % schedule.checkpoint_interval == 0 and done < total:
                trainer.save(run_dir)
        trainer.save(run_dir)
    return TrainResult(
        trainer.num_iterations,
        trainer.num_iterations >= total,
        stop.requested,
        run_dir / POLICY_FOLDER,
        time.monotonic() - begin,
    )


def _is_due(done: int, interval: int, total: int) -> bool:
    return interval > 0 and (done % interval == 0 or done == total)


__all__ = ["TrainConfig", "TrainResult", "Trainer", "run_iterations", "run_training"]
