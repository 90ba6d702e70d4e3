"""Collects with Ray workers, each of which owns a slice of the environments; to a learner it is one collector.

Windows (one call of `collect` each) are handed to all workers at once; see `ray_windows`. What a worker that died does
once more are the very same decisions, as their noise is addressed by decision.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch

from vla_rl.envs.vector import episode_seed
from vla_rl.flow.sampler import ChunkSampler
from vla_rl.rollout.collector import DEFAULT_PREFIX_CACHE_GIB, RolloutBatch, make_env_seeds
from vla_rl.rollout.ray_batches import join_envs, map_tensors
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.rollout.ray_simulators import MakeEnv
from vla_rl.rollout.ray_start import connect
from vla_rl.rollout.ray_windows import RayWindows
from vla_rl.rollout.ray_worker import Request, RolloutWorker, WorkerOptions, weights_of
from vla_rl.train.distributed import is_divided

FRESH_EPISODES = 2**32  # no environment lives through so many: after that, seeds that no worker has had


class RayRolloutCollector:
    """`make_env(n)` builds n environments in a worker. The other arguments are those of `RolloutCollector`.

    Raises ValueError where slices come out empty or the cluster has no room for the workers.
    """

    def __init__(
        self,
        make_env: MakeEnv,
        sampler: ChunkSampler,
        *,
        num_envs: int,
        execution_horizon: int,
        seed: int,
        config: RolloutConfig,
        env_seeds: Sequence[int] | None = None,
        first_env: int = 0,
        prefix_cache_gib: float = DEFAULT_PREFIX_CACHE_GIB,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_envs, self._config, self._sampler, self._device = num_envs, config, sampler, device
        self._slices = [range(num_envs)] if config.is_shared else config.slices(num_envs)
        self._env_seeds = list(env_seeds) if env_seeds is not None else make_env_seeds(seed, num_envs, first_env)
        self._options = [
            WorkerOptions(
                num_envs=len(s),
                first_env=first_env + s.start,
                execution_horizon=execution_horizon,
                seed=seed,
                env_seeds=self._env_seeds[s.start : s.stop],
                policy_batch_size=config.policy_batch_size,
                prefix_cache_gib=prefix_cache_gib * len(s) / num_envs,
                num_threads=max(1, int(config.cpus_for_inference if config.is_shared else config.cpus_per_worker)),
                on_gpu=(config.gpus_for_inference if config.is_shared else config.gpus_per_worker) > 0,
                simulators=config if config.is_shared else None,
            )
            for s in self._slices
        ]
        self._staleness = 0.0
        self._owns_ray = start_ray(config)
        self._actor_class = ray.remote(RolloutWorker)
        self._make_env, self._policy = ray.put(make_env), ray.put(_on_cpu(sampler))
        sizes = [len(s) for s in self._slices]
        self.windows = RayWindows(self._spawn, lambda: weights_of(sampler), join_envs, sizes, config)
        self.spec = self.windows.ask("spec")[0]

    @property
    def policy_version(self) -> int:
        """How many updates the policy has seen; the learner sets it."""
        return self.windows.policy_version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        self.windows.policy_version = version

    def collect(self, num_decisions: int) -> RolloutBatch:
        """See `RolloutCollector.collect`. With `max_staleness` the decisions may be of an older policy, whose number is
        their `policy_version`."""
        return self._collect([Request(num_decisions)] * len(self._slices))

    def collect_episodes(self, seeds: Sequence[int]) -> RolloutBatch:
        """See `RolloutCollector.collect_episodes`."""
        if self.windows.config.max_staleness:
            raise ValueError("max_staleness is for windows of decisions (PPO); whole episodes (GRPO) need 0")
        return self._collect([Request(seeds=list(seeds[s.start : s.stop])) for s in self._slices])

    def _collect(self, request: Sequence[Request]) -> RolloutBatch:
        batch: RolloutBatch = self.windows.collect(lambda: request)
        self._staleness = float(self.policy_version - batch.policy_version.min())
        return map_tensors(batch, lambda x: x.to(self._device))

    def metrics(self) -> dict[str, float]:
        """See `RayWindows.metrics`, and how many versions the last window is behind."""
        return self.windows.metrics() | {"rollout/staleness": self._staleness}

    def worker_pids(self) -> list[int]:
        """Process ids of the workers, each on its machine."""
        return self.windows.ask("pid")

    def state_dict(self) -> dict[str, Any]:
        return self.windows.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for the state of another number of workers."""
        self.windows.load_state_dict(state)

    def close(self) -> None:
        """End the workers, and Ray where it was started here."""
        self.windows.close()
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False

    def _spawn(self, i: int, fresh: int) -> Any:
        config, options = self._config, self._options[i]
        if fresh:
            start = FRESH_EPISODES + fresh
            seeds = [episode_seed(seed, start) for seed in options.env_seeds]
            options = dataclasses.replace(options, seed=episode_seed(options.seed, start), env_seeds=seeds)
        shared, resource = config.is_shared, config.worker_resource
        actor = self._actor_class.options(
            num_cpus=config.cpus_for_inference if shared else config.cpus_per_worker,
            num_gpus=config.gpus_for_inference if shared else config.gpus_per_worker,
            resources={resource: 1.0} if resource and not shared else None,
        )
        return actor.remote(self._make_env, self._policy, options)


def start_ray(config: RolloutConfig) -> bool:
    """See `connect`: for the workers of `config`, and the inference that they share."""
    return connect(
        config.ray_address,
        config.needs(),
        who=f"{config.workers} rollout workers",
        option="rollout.ray_address",
        advice="Lower rollout.workers, or what each takes (rollout.cpus_per_worker, rollout.gpus_per_worker)",
    )


def _on_cpu(sampler: ChunkSampler) -> ChunkSampler:
    """A copy that a machine without a GPU can load. Raises ValueError where learners divide the policy's layers."""
    if any(is_divided(p) for p in sampler.policy.parameters()):
        raise ValueError(
            "workers take copies of the policy, and its layers are divided already; give one that is whole"
        )
    there: Any = copy.deepcopy(sampler)
    there.policy.to("cpu")
    if getattr(there, "noise_head", None) is not None:
        there.noise_head.to("cpu")
    return there


__all__ = ["FRESH_EPISODES", "RayRolloutCollector", "start_ray"]
