"""Acts for a learner from replay with Ray workers, each of which has a slice of the environments.

A window is an iteration of the learner, and so is a version of the policy that acts. With `max_staleness` 0 acting and
learning take turns; with s, s windows are under way while the learner learns, by the policy as it was when they were
handed out. What a worker explores with is drawn from (seed, its first environment, window).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
import ray
import torch
from torch import Tensor

from vla_rl.core import EnvSpec, Observation
from vla_rl.envs.vector import episode_seed
from vla_rl.rollout.ray_batches import map_tensors
from vla_rl.rollout.ray_collector import FRESH_EPISODES, start_ray
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.rollout.ray_simulators import MakeEnv, join_steps
from vla_rl.rollout.ray_windows import RayWindows
from vla_rl.rollout.ray_worker import Weights, from_bytes, to_bytes
from vla_rl.rollout.replay_actor import Explorer, Pace, ReplayActor, ReplayWindow, Round


class RemoteExplorer(Explorer, Protocol):
    """A learner whose copies act elsewhere."""

    def acting_copy(self) -> RemoteExplorer:
        """A copy on the CPU, to act with and not to learn."""
        ...

    def acting_weights(self) -> Sequence[Tensor]:
        """What acting depends on and learning changes."""
        ...

    def act_with(self, weights: Sequence[Tensor]) -> None:
        """Act with the `acting_weights` of another."""
        ...

    def seed_exploration(self, seed: int) -> None: ...


def join_windows(parts: Sequence[ReplayWindow]) -> ReplayWindow:
    """The window of all environments from those of slices, in their order."""
    sizes = [len(part.lost) for part in parts]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return ReplayWindow(
        obs=Observation.concatenate([part.obs for part in parts]),
        actions=tuple(torch.cat(column) for column in zip(*(part.actions for part in parts), strict=True)),
        steps=tuple(join_steps(column, starts) for column in zip(*(part.steps for part in parts), strict=True)),
        policy_version=parts[0].policy_version,
        lost=torch.cat([part.lost for part in parts]),
    )


@dataclass(frozen=True)
class ReplayWorkerOptions:
    """`on_gpu`: the policy runs on the GPU that Ray gave the worker. `fresh`: one that died before took the running
    episodes of these environments along."""

    pace: Pace
    env_seeds: Sequence[int]
    seed: int
    first_env: int
    num_threads: int
    on_gpu: bool
    fresh: bool


class ReplayWorker:
    """The Ray actor."""

    def __init__(self, make_env: MakeEnv, learner: RemoteExplorer, options: ReplayWorkerOptions) -> None:
        torch.set_num_threads(options.num_threads)
        if options.on_gpu:
            learner.policy.to("cuda")
        else:
            jax.config.update("jax_platforms", "cpu")
        self._learner, self._options, self._version = learner, options, -1
        self._actor = ReplayActor(make_env(len(options.env_seeds)), learner, options.pace, options.env_seeds)

    def pid(self) -> int:
        """Process id, once the worker is ready."""
        return os.getpid()

    def spec(self) -> EnvSpec:
        return self._actor.env.spec

    def collect(
        self, weights: Weights, version: int, request: tuple[int, int], restore: Mapping[str, Any] | None
    ) -> tuple[ReplayWindow, dict[str, Any], int]:
        """The window of `request` (number, rounds), the state after it, and 0, as no simulator dies alone here."""
        learner, actor = self._learner, self._actor
        if version != self._version:
            learner.act_with(from_bytes(weights, learner.acting_weights()))
            self._version = version
        if restore is not None:
            actor.load_state_dict(restore)
        number, num_rounds = request
        actor.num_env_steps = number * num_rounds * actor.pace.num_envs * actor.pace.steps_per_round
        numbers = np.random.SeedSequence([self._options.seed, self._options.first_env, number])
        learner.seed_exploration(int(numbers.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        lost = torch.full((actor.env.num_envs,), self._options.fresh and not actor.has_begun)
        rounds = [actor.act(version) for _ in range(num_rounds)]
        window = ReplayWindow(
            rounds[0].obs, tuple(r.actions for r in rounds), tuple(r.step for r in rounds), version, lost
        )
        return map_tensors(window, lambda x: x.cpu()), actor.state_dict(), 0


class RayReplayCollector:
    """A `ReplayCollector`. `make_env(n)` builds n environments in a worker; `env_seeds`: one an environment.

    Raises ValueError where slices come out empty or the cluster has no room for the workers.
    """

    def __init__(
        self,
        make_env: MakeEnv,
        learner: RemoteExplorer,
        pace: Pace,
        *,
        env_seeds: Sequence[int],
        seed: int,
        config: RolloutConfig,
    ) -> None:
        self.num_envs, self._config, self._pace = len(env_seeds), config, pace
        self._slices, self._env_seeds, self._seed = config.slices(self.num_envs), list(env_seeds), seed
        self._has_learned, self._num_windows = False, 0
        self._staleness: list[int] = []  # of the windows since `metrics` was asked
        self._owns_ray = start_ray(config)
        self._make_env, self._learner = ray.put(make_env), ray.put(learner.acting_copy())
        sizes = [len(s) for s in self._slices]

        def weights() -> Weights:
            return [to_bytes(x) for x in learner.acting_weights()]

        self.windows = RayWindows(self._spawn, weights, join_windows, sizes, config)
        self.spec: EnvSpec = self.windows.ask("spec")[0]

    @property
    def policy_version(self) -> int:
        """Windows that the policy has learned from."""
        return self.windows.policy_version + self._has_learned

    def rounds(self, num_rounds: int) -> Iterator[Round]:
        """The rounds of one window."""
        self._end_version()

        def request() -> list[tuple[int, int]]:
            self._num_windows += 1
            return [(self._num_windows - 1, num_rounds)] * len(self._slices)

        window: ReplayWindow = self.windows.collect(request)
        self._staleness.append(self.windows.policy_version - window.policy_version)
        return window.rounds()

    def learned(self) -> None:
        """The policy has changed: with the next window begins another version."""
        self._has_learned = True

    def metrics(self) -> dict[str, float]:
        """See `RayWindows.metrics`, and how many versions the windows since the last call are behind."""
        behind, self._staleness = self._staleness or [0], []
        found = {"staleness": float(max(behind)), "staleness_mean": sum(behind) / len(behind)}
        return self.windows.metrics() | {f"rollout/{name}": value for name, value in found.items()}

    def worker_pids(self) -> list[int]:
        """Process ids of the workers, each on its machine."""
        return self.windows.ask("pid")

    def state_dict(self) -> dict[str, Any]:
        self._end_version()
        return self.windows.state_dict() | {"num_windows": self._num_windows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for the state of another number of workers."""
        self.windows.load_state_dict(state)
        self._num_windows, self._has_learned = state["num_windows"], False

    def close(self) -> None:
        """End the workers, and Ray where it was started here."""
        self.windows.close()
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False

    def _end_version(self) -> None:
        self.windows.policy_version += self._has_learned
        self._has_learned = False

    def _spawn(self, i: int, fresh: int) -> Any:
        config, seed = self._config, self._seed
        seeds = self._env_seeds[self._slices[i].start : self._slices[i].stop]
        if fresh:
            seed, *seeds = (episode_seed(s, FRESH_EPISODES + fresh) for s in (seed, *seeds))
        threads = max(1, int(config.cpus_per_worker))
        options = ReplayWorkerOptions(
            self._pace, seeds, seed, self._slices[i].start, threads, config.gpus_per_worker > 0, fresh > 0
        )
        actor = ray.remote(ReplayWorker).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=config.gpus_per_worker,
            resources={config.worker_resource: 1.0} if config.worker_resource else None,
        )
        return actor.remote(self._make_env, self._learner, options)


__all__ = ["RayReplayCollector", "RemoteExplorer", "join_windows"]
