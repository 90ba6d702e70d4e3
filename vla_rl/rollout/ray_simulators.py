"""Simulators in Ray actors that are one chunked environment to whoever infers: batched inference shared by them.

A simulator that dies or hangs is started again from its state at the last `state_dict` and is told once more what it
was told since: nothing is lost. If it dies again before the next `state_dict`, its environments begin new episodes, and
the lost ones are `ChunkStep.lost`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, WorkerCrashedError
from torch import Tensor

from vla_rl.core import ChunkStep, EnvSpec, Observation
from vla_rl.envs.vector import ChunkedEnv, episode_seed
from vla_rl.rollout.ray_batches import map_tensors
from vla_rl.rollout.ray_config import RolloutConfig

MakeEnv = Callable[[int], ChunkedEnv]
DIED = (RayActorError, ObjectLostError, WorkerCrashedError)
MAX_DEATHS = 4  # of an actor in one window
_Call = tuple[str, tuple[Any, ...]]


class _Simulator:
    """The Ray actor: the environments of one slice. What it returns is on the CPU."""

    def __init__(self, make_env: MakeEnv, num_envs: int, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._env = make_env(num_envs)

    def about(self) -> tuple[EnvSpec, bool, bool]:
        return self._env.spec, self._env.auto_reset, self._env.final_images

    def reset(self, seeds: Sequence[int]) -> Observation:
        return map_tensors(self._env.reset(seeds), _to_cpu)

    def observe(self) -> Observation:
        return map_tensors(self._env.observe(), _to_cpu)

    def step(self, actions: Tensor) -> ChunkStep:
        return map_tensors(self._env.step(actions), _to_cpu)

    def state_dict(self) -> dict[str, Any]:
        return self._env.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._env.load_state_dict(state)


class RaySimulators:
    """A `CollectorEnv` of `num_envs` environments in `config.workers` actors. Observations are on the CPU.

    A simulator has half of `config.timeout_s` for an answer: who waits for the whole rollout waits longer.
    `num_restarts`: simulators that were started again so far. Raises RuntimeError for one that dies again and again.
    """

    def __init__(self, make_env: MakeEnv, num_envs: int, config: RolloutConfig) -> None:
        self.num_envs, self.num_restarts, self._num_fresh_starts = num_envs, 0, 0
        self._slices = config.slices(num_envs)
        self._limit, self._threads = config.timeout_s / 2, max(1, int(config.cpus_per_worker))
        self._make_env = ray.put(make_env)
        self._actor_class = ray.remote(_Simulator).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=config.gpus_per_worker,
            resources={config.worker_resource: 1.0} if config.worker_resource else None,
        )
        n = len(self._slices)
        self._states: list[Mapping[str, Any] | None] = [None] * n
        self._told: list[list[_Call]] = [[] for _ in range(n)]  # since that state
        self._seen: list[Observation | None] = [None] * n
        self._deaths = [0] * n
        self._actors = [self._spawn(i) for i in range(n)]
        self._started = [actor.about.remote() for actor in self._actors]
        self.spec, self.auto_reset, self._final_images = ray.get(self._started)[0]

    def reset(self, seeds: Sequence[int]) -> Observation:
        """Start an episode in every environment."""
        n = len(self._slices)
        self._states = [None] * n
        self._told, self._deaths = [[] for _ in range(n)], [0] * n
        self._seen = self._tell("reset", [(list(seeds[s.start : s.stop]),) for s in self._slices])
        return self.observe()

    def observe(self) -> Observation:
        """The current observation of every environment."""
        return Observation.concatenate([seen for seen in self._seen if seen is not None])

    def step(self, actions: Tensor) -> ChunkStep:
        """See `ChunkedEnv.step`."""
        actions = actions.cpu()
        parts: list[ChunkStep] = self._tell("step", [(actions[s.start : s.stop].clone(),) for s in self._slices])
        self._seen = [part.obs for part in parts]
        return join_steps(parts, [s.start for s in self._slices])

    def state_dict(self) -> dict[str, Any]:
        self._states = self._tell("state_dict", [()] * len(self._slices))
        self._told, self._deaths = [[] for _ in self._slices], [0] * len(self._slices)
        return {"simulators": list(self._states), "num_fresh_starts": self._num_fresh_starts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for the state of another number of simulators, or of none."""
        if len(state.get("simulators", ())) != len(self._slices):
            raise ValueError(
                f"this state is not of {len(self._slices)} simulators with shared inference; "
                "set rollout.workers and rollout.inference as they were"
            )
        self._states, self._num_fresh_starts = list(state["simulators"]), state["num_fresh_starts"]
        self._told, self._deaths = [[] for _ in self._slices], [0] * len(self._slices)
        self._tell("load_state_dict", [(s,) for s in self._states])
        self._seen = self._tell("observe", [()] * len(self._slices))

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    # --------------------------------------------------------------------------------------------------------- actors
    def _spawn(self, i: int) -> Any:
        return self._actor_class.remote(self._make_env, len(self._slices[i]), self._threads)

    def _tell(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers of all simulators, which work at the same time."""
        answers = []
        for i, own in enumerate(arguments):
            self._told[i].append((method, own))
            answers.append(getattr(self._actors[i], method).remote(*own))
        return [self._answer(i, answer) for i, answer in enumerate(answers)]

    def _answer(self, i: int, answer: Any) -> Any:
        while True:
            try:
                ray.get(self._started[i])
                return ray.get(answer, timeout=self._limit)
            except GetTimeoutError:
                error: Exception = TimeoutError(f"no answer in {self._limit:g} s (half of rollout.timeout_s)")
            except DIED as died:
                error = died
            self._deaths[i] += 1
            self.num_restarts += 1
            if self._deaths[i] > MAX_DEATHS:
                raise RuntimeError(f"simulator {i} died {self._deaths[i]} times in one window: {error}") from error
            ray.kill(self._actors[i])
            self._actors[i] = self._spawn(i)
            self._started[i] = self._actors[i].about.remote()
            if self._deaths[i] > 1 and self._told[i][-1][0] == "step":
                return self._lost(i)
            answer = self._tell_again(i)

    def _tell_again(self, i: int) -> Any:
        """The last answer, of a new process in the place of the dead one."""
        answer, actor = None, self._actors[i]
        if self._states[i] is not None:
            actor.load_state_dict.remote(self._states[i])
        for method, own in self._told[i]:
            answer = getattr(actor, method).remote(*own)
        return answer

    def _lost(self, i: int) -> ChunkStep:
        """New episodes, with seeds that no environment has had, and a step that says that the old ones are lost."""
        (actions,), seen = self._told[i][-1][1], self._seen[i]
        assert seen is not None
        self._num_fresh_starts += 1
        n, k = actions.shape[:2]
        start = 2**32 + self._num_fresh_starts
        seeds = [episode_seed(start, j) for j in self._slices[i]]
        self._states[i], self._told[i] = None, [("reset", (seeds,))]
        no = torch.zeros(n, dtype=torch.bool)
        return ChunkStep(
            obs=self._answer(i, self._tell_again(i)),
            final_obs=Observation(seen.images if self._final_images else {}, seen.state, seen.instruction),
            final_ids=torch.arange(n),
            rewards=torch.zeros(n, k),
            executed=torch.zeros(n, k, dtype=torch.bool),
            terminated=no,
            truncated=~no,
            success=no,
            success_at_end=no,
            end_step=torch.zeros(n, dtype=torch.int64),
            lost=~no,
        )


def _to_cpu(x: Tensor) -> Tensor:
    return x.cpu()


def join_steps(parts: Sequence[ChunkStep], starts: Sequence[int]) -> ChunkStep:
    """The step of all environments from those of slices that begin at `starts`."""
    final_obs = [part.final_obs for part in parts if part.final_obs is not None]
    if any(part.taken is not None for part in parts):
        raise ValueError("a person can take over in one environment alone, not in several side by side")

    def rows(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return ChunkStep(
        obs=Observation.concatenate([part.obs for part in parts]),
        final_obs=Observation.concatenate(final_obs) if final_obs else None,
        final_ids=torch.cat([part.final_ids + start for part, start in zip(parts, starts, strict=True)]),
        rewards=rows("rewards"),
        executed=rows("executed"),
        terminated=rows("terminated"),
        truncated=rows("truncated"),
        success=rows("success"),
        success_at_end=rows("success_at_end"),
        end_step=rows("end_step"),
        lost=rows("lost"),
    )


__all__ = ["DIED", "MAX_DEATHS", "MakeEnv", "RaySimulators", "join_steps"]
