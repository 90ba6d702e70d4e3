"""Collects with Ray workers, each of which owns a slice of the environments; to a learner it is one collector.

Windows (one call of `collect` each) are handed to all workers at once. With `max_staleness` s, the s windows after the
one that the learner updates with are collected meanwhile, by the policy as it was when they were handed out; so a
window's staleness is min(s, updates so far), and nothing depends on who is faster. The object store never holds more
than max(1, s) windows, in one part a worker, and the weights of those and of the newest policy.

The driver keeps each worker's state after its last delivered window. A worker that dies is started again, on whichever
machine has room, from that state, and collects what it had not delivered once more: with noise addressed by decision,
the very same decisions. Only where it dies there again (a state that kills its simulator) it begins new episodes, and
the lost ones are counted. A worker that hangs is killed after `timeout_s`, and then it is one that died.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError

from vla_rl.envs.vector import episode_seed
from vla_rl.flow.sampler import ChunkSampler
from vla_rl.rollout.collector import DEFAULT_PREFIX_CACHE_GIB, RolloutBatch, make_env_seeds
from vla_rl.rollout.ray_batches import from_plain, join_envs, map_tensors, to_plain
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.rollout.ray_simulators import DIED, MAX_DEATHS, MakeEnv
from vla_rl.rollout.ray_start import connect
from vla_rl.rollout.ray_worker import Request, RolloutWorker, WorkerOptions, weights_of
from vla_rl.train.distributed import is_divided


@dataclass
class _Window:
    """A window that was handed out. `parts`: one a worker, on its way or, after `_receive`, here."""

    request: Sequence[Request]
    weights: Any
    version: int
    parts: list[Any] = field(default_factory=list)
    batch: RolloutBatch | None = None


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
        self.num_envs, self.config, self.policy_version = num_envs, config, 0
        self._sampler, self._device = sampler, device
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
        self._states: list[dict[str, Any] | None] = [None] * len(self._slices)
        self._must_restore = [False] * len(self._slices)
        self._deaths = [0] * len(self._slices)
        self._windows: deque[_Window] = deque()
        self._published: tuple[int, Any] | None = None
        self._num_restarts = self._num_lost_episodes = self._num_fresh_starts = 0
        self._wait_s = self._staleness = 0.0
        self._owns_ray = start_ray(config)
        self._actor_class = ray.remote(RolloutWorker)
        self._make_env, self._policy = ray.put(make_env), ray.put(_on_cpu(sampler))
        self._workers = [self._spawn(i) for i in range(len(self._slices))]
        self._started = [worker.pid.remote() for worker in self._workers]
        try:
            self.spec = ray.get([worker.spec.remote() for worker in self._workers])[0]
        except RayActorError as error:
            raise ValueError(f"a rollout worker cannot start: {error}") from error

    def collect(self, num_decisions: int) -> RolloutBatch:
        """See `RolloutCollector.collect`. With `max_staleness` the decisions may be of an older policy, whose number is
        their `policy_version`."""
        request = [Request(num_decisions)] * len(self._slices)
        if not self._windows:
            self._hand_out(request)
        batch = self._next()
        while len(self._windows) < self.config.max_staleness:
            self._hand_out(request)
        return batch

    def collect_episodes(self, seeds: Sequence[int]) -> RolloutBatch:
        """See `RolloutCollector.collect_episodes`."""
        if self.config.max_staleness:
            raise ValueError("max_staleness is for windows of decisions (PPO); whole episodes (GRPO) need 0")
        self._hand_out([Request(seeds=list(seeds[s.start : s.stop])) for s in self._slices])
        return self._next()

    def metrics(self) -> dict[str, float]:
        """Of the last collection: seconds waited, versions behind. Since the start: deaths of workers, and episodes
        that they took along."""
        return {
            "rollout/wait_s": self._wait_s,
            "rollout/staleness": self._staleness,
            "rollout/worker_restarts": float(self._num_restarts),
            "rollout/worker_lost_episodes": float(self._num_lost_episodes),
        }

    @property
    def num_in_flight(self) -> int:
        """Windows that were handed out and not yet given to the learner."""
        return len(self._windows)

    def worker_pids(self) -> list[int]:
        """Process ids of the workers, each on its machine."""
        return ray.get([worker.pid.remote() for worker in self._workers])

    def state_dict(self) -> dict[str, Any]:
        """What decides the future rollouts; windows that were handed out are waited for, and are in it."""
        for window in self._windows:
            self._receive(window)
        return {
            "workers": list(self._states),
            "windows": [to_plain(window.batch) for window in self._windows],
            "policy_version": self.policy_version,
            "counts": [self._num_restarts, self._num_lost_episodes, self._num_fresh_starts],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for the state of another number of workers."""
        if "workers" not in state or len(state["workers"]) != len(self._workers):
            there = f"{len(state['workers'])} workers" if "workers" in state else "one process"
            raise ValueError(
                f"this state is of rollouts by {there}, here are {len(self._workers)} workers; "
                "set rollout.workers as it was"
            )
        self._states = list(state["workers"])
        self._must_restore = [s is not None for s in self._states]
        self._windows = deque(_Window([], None, 0, batch=from_plain(b)) for b in state["windows"])
        self.policy_version = state["policy_version"]
        self._num_restarts, self._num_lost_episodes, self._num_fresh_starts = state["counts"]
        self._published = None

    def close(self) -> None:
        """End the workers, and Ray where it was started here."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers, self._windows = [], deque()
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False

    # -------------------------------------------------------------------------------------------------------- windows
    def _hand_out(self, request: Sequence[Request]) -> None:
        version, weights = self._publish()
        window = _Window(request, weights, version)
        self._windows.append(window)
        window.parts = [self._submit(i, window) for i in range(len(self._workers))]

    def _publish(self) -> tuple[int, Any]:
        """The weights as they are now, put into the object store once for all workers."""
        if self._published is None or self._published[0] != self.policy_version:
            self._published = (self.policy_version, ray.put(weights_of(self._sampler)))
        return self._published

    def _submit(self, i: int, window: _Window) -> Any:
        restore = self._states[i] if self._must_restore[i] else None
        self._must_restore[i] = False
        return self._workers[i].collect.remote(window.weights, window.version, window.request[i], restore)

    def _next(self) -> RolloutBatch:
        start = time.monotonic()
        batch = self._receive(self._windows[0])
        self._windows.popleft()
        self._wait_s = time.monotonic() - start
        self._staleness = float(self.policy_version - batch.policy_version.min())
        return map_tensors(batch, lambda x: x.to(self._device))

    def _receive(self, window: _Window) -> RolloutBatch:
        """Wait for all parts, whatever dies meanwhile."""
        if window.batch is None:
            parts = [self._receive_part(i, window) for i in range(len(self._workers))]
            window.batch, window.parts = join_envs(parts), []
        return window.batch

    def _receive_part(self, i: int, window: _Window) -> RolloutBatch:
        limit = self.config.timeout_s
        while True:
            try:
                ray.get(self._started[i])  # room for it may take long to come: not limited
                part, self._states[i], restarts = ray.get(window.parts[i], timeout=limit)
            except GetTimeoutError:
                self._start_again(i, TimeoutError(f"no rollout in {limit:g} s (rollout.timeout_s)"))
            except DIED as error:
                self._start_again(i, error)
            else:
                self._deaths[i] = 0
                self._num_restarts += restarts
                return part

    # -------------------------------------------------------------------------------------------------------- workers
    def _spawn(self, i: int, options: WorkerOptions | None = None) -> Any:
        config = self.config
        shared, resource = config.is_shared, config.worker_resource
        actor = self._actor_class.options(
            num_cpus=config.cpus_for_inference if shared else config.cpus_per_worker,
            num_gpus=config.gpus_for_inference if shared else config.gpus_per_worker,
            resources={resource: 1.0} if resource and not shared else None,
        )
        return actor.remote(self._make_env, self._policy, options or self._options[i])

    def _start_again(self, i: int, error: Exception) -> None:
        """A new process for worker `i`, with everything that it has not delivered handed out again."""
        self._deaths[i] += 1
        self._num_restarts += 1
        if self._deaths[i] > MAX_DEATHS:
            raise RuntimeError(f"rollout worker {i} died {self._deaths[i]} times in one window: {error}") from error
        ray.kill(self._workers[i])  # where only its machine's memory was lost
        options = self._options[i]
        self._must_restore[i] = self._states[i] is not None
        if self._deaths[i] > 1:
            options, self._must_restore[i] = self._with_new_episodes(i), False
        self._workers[i] = self._spawn(i, options)
        self._started[i] = self._workers[i].pid.remote()
        for window in self._windows:
            if window.batch is None:
                window.parts[i] = self._submit(i, window)

    def _with_new_episodes(self, i: int) -> WorkerOptions:
        """Seeds that no worker has had; what it was doing is lost."""
        self._num_lost_episodes += len(self._slices[i])
        self._num_fresh_starts += 1
        options, start = self._options[i], 2**32 + self._num_fresh_starts  # no environment lives through so many
        return dataclasses.replace(
            options,
            seed=episode_seed(options.seed, start),
            env_seeds=[episode_seed(seed, start) for seed in options.env_seeds],
        )


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


__all__ = ["RayRolloutCollector", "start_ray"]
