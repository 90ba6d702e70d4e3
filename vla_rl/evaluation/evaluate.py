"""Evaluate a policy on fixed episodes, so that the result depends on nothing but the policy and the episodes.

Three things could make a result depend on how many environments run side by side, and each is taken away:

* the episode: each environment is seeded for the one episode that it runs, and takes the next pending one when it ends;
* the noise: the policy's noise for decision d of episode e is a counter-based stream addressed by (noise_seed, e, d);
* arithmetic: the same row of a matrix product can round differently in a batch of another shape, or at another place
  in it. So the policy always gets `policy_batch_size` rows, and episode i always sits in row i mod policy_batch_size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.core import ChunkStep, Observation
from vla_rl.evaluation.result import Episode, EvalResult, Timing
from vla_rl.progress import Progress
from vla_rl.protocols import ChunkedVectorEnv, Policy, chunk_shape
from vla_rl.rollout.recorder import EpisodeRecorder

EnvT = TypeVar("EnvT", bound=ChunkedVectorEnv)


@dataclass
class _Slot:
    """The episode that one environment is running, and what it has gathered so far."""

    episode: int
    seed: int
    instruction: str
    decision: int = 0
    length: int = 0
    episode_return: float = 0.0
    success_once: bool = False
    policy_ms: list[float] = field(default_factory=list)
    env_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    """An episode that is over: the `index`-th of the declared ones.

    `episode` is None where its simulator died. `policy_ms`, `env_ms`: wall time of the policy's call and of the
    environments' chunk behind each of its decisions. `measured`: what the environment says of itself, for the
    configuration of the result.
    """

    index: int
    seed: int
    episode: Episode | None
    policy_ms: tuple[float, ...]
    env_ms: tuple[float, ...]
    measured: Mapping[str, Any]


@dataclass(frozen=True)
class Progression:
    """Which of the declared episodes to run, and who hears of them.

    `todo`: indices, None for all; an episode is the same whatever else is run. `on_finish`: called after each episode,
    in the order in which they end; True ends the evaluation there. `line`: a progress line on stderr.
    """

    todo: Sequence[int] | None = None
    on_finish: Callable[[Finished], bool] | None = None
    line: bool = True


@dataclass(frozen=True)
class Labels:
    """What the rows of a result say beside what happened. `task`: default is the environment's name. `initial_state`:
    of a seed. `folder`: videos are named by their path from it."""

    task: str | None = None
    condition: str = ""
    initial_state: Callable[[int], str] = str
    folder: Path | None = None


_Act = Callable[[Observation, Mapping[int, _Slot]], Tensor]


def policy_noise(noise_seed: int, episode_seed: int, decision: int, action_horizon: int, action_dim: int) -> Tensor:
    """Standard normal float32 [H, A] for one decision: Philox, keyed by the seeds, its counter at the decision.

    No two (noise_seed, episode_seed, decision) share a block of the generator, and no draw depends on another.
    """
    bits = np.random.Philox(key=[noise_seed, episode_seed], counter=[0, 0, decision, 0])
    draw = np.random.Generator(bits).standard_normal((action_horizon, action_dim), dtype=np.float32)
    return torch.from_numpy(draw)


def evaluate(
    policy: Policy,
    make_env: Callable[[int], ChunkedVectorEnv],
    episode_seeds: Sequence[int],
    *,
    execution_horizon: int,
    num_envs: int = 32,
    policy_batch_size: int = 32,
    noise_seed: int = 0,
    task: str | None = None,
    max_episode_steps: int | None = None,
    record: EpisodeRecorder | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> EvalResult:
    """Run one episode for each of `episode_seeds` with the deployed policy and return them in that order.

    `make_env(n)` builds n environments that do not reset themselves (`auto_reset=False`); it is closed afterwards.
    `execution_horizon`: how many steps of each chunk are executed. `num_envs` changes the speed and never the result;
    `policy_batch_size` and `noise_seed` are part of the protocol. `task` names the rows (default: the environment's
    name). `max_episode_steps` is for environments without a time limit of their own; such an episode ends
    with the chunk that reaches it. `config` is kept in the result.

    An episode whose simulator died is left out, and `config["lost_seeds"]` names it; it is not run again.

    Raises ValueError for bad seeds, an execution horizon that the policy's chunks do not have, an environment that
    resets itself, or one that could run forever.
    """
    seeds = _checked_seeds(episode_seeds, noise_seed)
    if not 1 <= execution_horizon <= policy.action_horizon:
        raise ValueError(
            f"evaluate: execution_horizon is {execution_horizon}, the policy predicts {policy.action_horizon} steps; "
            f"choose from 1 to {policy.action_horizon}"
        )
    if num_envs < 1 or policy_batch_size < 1:
        raise ValueError(f"evaluate: num_envs and policy_batch_size must be >= 1, got {num_envs}, {policy_batch_size}")
    env = make_env(min(num_envs, len(seeds)))
    with _closing(env, record):
        _check_action_dim(env, policy)
        limit = _time_limit(env, max_episode_steps)
        run = _Run(env, seeds, task or env.spec.name, limit, policy_batch_size)
        caller = _PolicyCaller(policy, env.num_envs, execution_horizon, policy_batch_size, noise_seed)
        protocol = {
            "execution_horizon": execution_horizon,
            "policy_batch_size": policy_batch_size,
            "noise_seed": noise_seed,
        }
        with _evaluation_mode(policy):
            return run.result(caller.act, record, progress, {**(config or {}), **protocol})


def evaluate_controller(
    make_env: Callable[[int], EnvT],
    make_controller: Callable[[EnvT], Callable[[], Tensor]],
    episode_seeds: Sequence[int],
    *,
    num_envs: int = 32,
    task: str | None = None,
    max_episode_steps: int | None = None,
    record: EpisodeRecorder | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> EvalResult:
    """The same for whoever acts from the environment itself, such as a scripted expert: the upper end of a report.

    `make_controller(env)` returns a callable that gives actions [N, K, A] for the environments as they are now, each
    row independent of the others. The other arguments are those of `evaluate`.
    """
    seeds = _checked_seeds(episode_seeds, noise_seed=0)
    if num_envs < 1:
        raise ValueError(f"evaluate_controller: num_envs must be >= 1, got {num_envs}")
    env = make_env(min(num_envs, len(seeds)))
    with _closing(env, record):
        limit = _time_limit(env, max_episode_steps)
        controller = make_controller(env)
        run = _Run(env, seeds, task or env.spec.name, limit, rows=1)
        return run.result(lambda _obs, _slots: controller(), record, progress, config or {})


class _PolicyCaller:
    """Calls a policy with a fixed number of rows, each episode always in the same one."""

    def __init__(self, policy: Policy, num_envs: int, execution_horizon: int, batch_size: int, noise_seed: int) -> None:
        self.policy, self.num_envs, self.batch_size = policy, num_envs, batch_size
        self.execution_horizon, self.noise_seed = execution_horizon, noise_seed

    @torch.no_grad()
    def act(self, obs: Observation, slots: Mapping[int, _Slot]) -> Tensor:
        """Actions [N, K, A]; environments without an episode get zeros, which do not move them."""
        device = obs.state.device
        shape, returned = chunk_shape(self.policy), (self.policy.action_horizon, self.policy.action_dim)
        actions = torch.zeros(self.num_envs, self.execution_horizon, self.policy.action_dim, device=device)
        for rows in self._batches(slots):
            filler = next(iter(rows.values()))
            source = torch.tensor([rows.get(r, filler) for r in range(self.batch_size)], device=device)
            noise = torch.zeros(self.batch_size, *shape)
            for row, i in rows.items():
                noise[row] = policy_noise(self.noise_seed, slots[i].seed, slots[i].decision, *shape)
            chunk = self.policy.act(obs.select(source), noise.to(device)).actions
            if tuple(chunk.shape) != (self.batch_size, *returned):
                raise ValueError(
                    f"the policy returned actions {tuple(chunk.shape)}, expected {(self.batch_size, *returned)}"
                )
            for row, i in rows.items():
                actions[i] = chunk[row, : self.execution_horizon].to(actions)
        return actions

    def _batches(self, slots: Mapping[int, _Slot]) -> list[dict[int, int]]:
        """Row of the policy's batch -> environment, in as few calls as the fixed rows allow."""
        batches: list[dict[int, int]] = []
        for i, slot in slots.items():
            row = slot.episode % self.batch_size
            free = next((batch for batch in batches if row not in batch), None)
            if free is None:
                free = {}
                batches.append(free)
            free[row] = i
        return batches


class _Run:
    """The state of one evaluation: which environment runs which episode, and what is still to do.

    `rows`: how many rows the policy's batch has; episode i will sit in row i mod rows.
    """

    def __init__(
        self,
        env: ChunkedVectorEnv,
        seeds: Sequence[int],
        task: str,
        limit: int,
        rows: int,
    ) -> None:
        self.env, self.seeds, self.task, self.limit, self.rows = env, seeds, task, limit, rows
        self.pending = list(range(len(seeds)))
        self.slots: dict[int, _Slot] = {}
        self.finished: dict[int, Episode] = {}
        self.lost_seeds: list[int] = []

    def result(
        self, act: _Act, recorder: EpisodeRecorder | None, progress: bool, config: Mapping[str, Any]
    ) -> EvalResult:
        start = time.monotonic()
        spec = self.env.spec
        measured: dict[str, Any] = {
            "task": self.task,
            "env": spec.name,
            "control_hz": spec.control_hz,
            "max_episode_steps": self.limit,
        }
        line = Progress(len(self.seeds), f"evaluation of {self.task}", unit="ep") if progress else None
        episodes = self._all_episodes(act, recorder, line)
        if self.lost_seeds:
            measured["lost_seeds"] = sorted(self.lost_seeds)
        return EvalResult(episodes, {**config, **measured}, time.monotonic() - start)

    def _all_episodes(
        self, act: _Act, recorder: EpisodeRecorder | None, progress: Progress | None
    ) -> tuple[Episode, ...]:
        obs = self._fill(range(self.env.num_envs))
        while self.slots:
            actions = act(obs, self.slots)
            wanted = [i for i, slot in self.slots.items() if recorder is not None and recorder.wants(slot.seed)]
            step = self.env.step(actions, record=wanted)
            if recorder is not None:
                for i, frames in step.frames.items():
                    recorder.add(self.slots[i].seed, frames)
            ended = self._account(step, recorder)
            obs = self._fill(ended) if ended and self.pending else step.obs
            if progress is not None:
                successes = sum(episode.success_once for episode in self.finished.values())
                rate = successes / max(1, len(self.finished))
                progress.update(len(self.finished), success=f"{rate:.2f}")
        if not self.finished:
            raise RuntimeError(f"{self.task}: every episode was lost to a simulator that died")
        return tuple(self.finished[i] for i in sorted(self.finished))

    def _fill(self, free: Sequence[int]) -> Observation:
        """Start pending episodes in the `free` environments; only one seeding call, so one observation."""
        ids = list(free)[: len(self.pending)]
        for i in ids:
            episode = self._next_episode()
            self.slots[i] = _Slot(episode, self.seeds[episode], instruction="")
        obs = self.env.reset([self.slots[i].seed for i in ids], env_ids=ids)
        for i in ids:
            self.slots[i].instruction = obs.instruction[i]
        return obs

    def _next_episode(self) -> int:
        """The first pending episode in the least crowded row of the policy's batch: a row taken twice costs a call."""
        crowd = [0] * self.rows
        for slot in self.slots.values():
            crowd[slot.episode % self.rows] += 1
        best = min(range(len(self.pending)), key=lambda j: (crowd[self.pending[j] % self.rows], j))
        return self.pending.pop(best)

    def _account(self, step: ChunkStep, recorder: EpisodeRecorder | None) -> list[int]:
        """Add the chunk to the running episodes; returns the environments whose episode ended."""
        lengths = step.executed.sum(dim=1).tolist()
        returns = torch.where(step.executed, step.rewards.double(), 0.0).sum(dim=1).tolist()
        success, at_end = step.success.tolist(), step.success_at_end.tolist()
        terminated, ended, lost = step.terminated.tolist(), step.ended.tolist(), step.lost.tolist()
        done: list[int] = []
        for i, slot in list(self.slots.items()):
            if lost[i]:
                self.lost_seeds.append(slot.seed)
                del self.slots[i]  # its video is dropped at the end, as those of an interrupted evaluation
                done.append(i)
                continue
            slot.decision += 1
            slot.length += lengths[i]
            slot.episode_return += returns[i]
            slot.success_once |= success[i]
            if not ended[i] and slot.length < self.limit:
                if not lengths[i]:
                    raise RuntimeError(f"environment {i} executed nothing although episode {slot.seed} goes on")
                continue
            self.finished[slot.episode] = Episode(
                task=self.task,
                seed=slot.seed,
                instruction=slot.instruction,
                success_once=slot.success_once,
                success_at_end=at_end[i],
                length=slot.length,
                episode_return=slot.episode_return,
                terminated=terminated[i],
            )
            if recorder is not None:
                recorder.finish(slot.seed, instruction=slot.instruction, success=slot.success_once)
            del self.slots[i]
            done.append(i)
        return sorted(done)


def _checked_seeds(episode_seeds: Sequence[int], noise_seed: int) -> list[int]:
    seeds = [int(seed) for seed in episode_seeds]
    if not seeds:
        raise ValueError("evaluate: no episode seeds; give at least one")
    if len(set(seeds)) != len(seeds):
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        raise ValueError(f"evaluate: episode seeds {twice[:5]} are there twice; the same episode must count once")
    if min(seeds) < 0 or noise_seed < 0:
        raise ValueError(f"evaluate: seeds must be >= 0, got {min(seeds)} and noise_seed {noise_seed}")
    return seeds


def _check_action_dim(env: ChunkedVectorEnv, policy: Policy) -> None:
    if env.spec.action.dim != policy.action_dim:
        raise ValueError(
            f"evaluate: the policy has {policy.action_dim} action dimensions, {env.spec.name} expects "
            f"{env.spec.action.dim} ({', '.join(env.spec.action.names)})"
        )


def _time_limit(env: ChunkedVectorEnv, max_episode_steps: int | None) -> int:
    """The longest episode in control steps. Raises ValueError for an environment that resets itself or never ends."""
    if getattr(env, "auto_reset", False):
        raise ValueError("evaluate: the environment resets itself; build it with auto_reset=False")
    own = env.spec.max_episode_steps
    if own is not None and max_episode_steps is not None:
        raise ValueError(
            f"evaluate: {env.spec.name} has its own limit of {own} steps; set max_episode_steps there, not here"
        )
    limit = own if own is not None else max_episode_steps
    if limit is None:
        raise ValueError(f"evaluate: {env.spec.name} has no time limit and might never end; give max_episode_steps")
    return limit


@contextmanager
def _closing(env: ChunkedVectorEnv, record: EpisodeRecorder | None) -> Iterator[None]:
    """Close the environment in any case, and drop videos of episodes that did not end."""
    try:
        yield
    finally:
        if record is not None:
            record.discard()
        env.close()


@contextmanager
def _evaluation_mode(policy: Policy) -> Iterator[None]:
    """Dropout and the like off, and back to what it was."""
    if not isinstance(policy, nn.Module):
        yield
        return
    was_training = {module: module.training for module in policy.modules()}  # a frozen part may be in another mode
    policy.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training
