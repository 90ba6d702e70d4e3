"""Evaluate a policy on fixed episodes, so that the result depends on nothing but the policy and the episodes.

Three things could make a result depend on how many environments run side by side, and each is taken away:

* the episode: each environment is seeded for the one episode that it runs, and takes the next pending one when it ends;
* the noise: the policy's noise for decision d of episode e is a counter-based stream addressed by (noise_seed, e, d);
* arithmetic: the same row of a matrix product can round differently in a batch of another shape, or at another place
  in it. So the policy always gets `policy_batch_size` rows, and episode i always sits in row i mod policy_batch_size.
  A policy that answers each row by itself, such as one behind a server, says `rows_are_independent` and gets no more
  rows than there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
class Labels:
    """What the rows of a result say beside what happened. `initial_state`: that of a seed. `folder`: videos are named
    by their path from it."""

    condition: str = ""
    initial_state: Callable[[int], str] = str
    folder: Path | None = None


OnFinish = Callable[[Finished], bool]
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
    labels: Labels | None = None,
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
    resets itself, or one that could run forever, and RuntimeError where every episode was lost.
    """
    start = time.monotonic()
    finished = play(
        policy,
        make_env,
        episode_seeds,
        execution_horizon=execution_horizon,
        num_envs=num_envs,
        policy_batch_size=policy_batch_size,
        noise_seed=noise_seed,
        task=task,
        labels=labels,
        max_episode_steps=max_episode_steps,
        record=record,
        on_finish=_progress_line(len(episode_seeds), task) if progress else None,
    )
    return _result_of_one(finished, config, start)


def evaluate_controller(
    make_env: Callable[[int], EnvT],
    make_controller: Callable[[EnvT], Callable[[], Tensor]],
    episode_seeds: Sequence[int],
    *,
    num_envs: int = 32,
    task: str | None = None,
    labels: Labels | None = None,
    max_episode_steps: int | None = None,
    record: EpisodeRecorder | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> EvalResult:
    """The same for whoever acts from the environment itself, such as a scripted expert: the upper end of a report.

    `make_controller(env)` returns a callable that gives actions [N, K, A] for the environments as they are now, each
    row independent of the others. The other arguments are those of `evaluate`.
    """
    start = time.monotonic()
    finished = play_controller(
        make_env,
        make_controller,
        episode_seeds,
        num_envs=num_envs,
        task=task,
        labels=labels,
        max_episode_steps=max_episode_steps,
        record=record,
        on_finish=_progress_line(len(episode_seeds), task) if progress else None,
    )
    return _result_of_one(finished, config, start)


def play(
    policy: Policy,
    make_env: Callable[[int], ChunkedVectorEnv],
    episode_seeds: Sequence[int],
    *,
    execution_horizon: int,
    num_envs: int = 32,
    policy_batch_size: int = 32,
    noise_seed: int = 0,
    task: str | None = None,
    labels: Labels | None = None,
    max_episode_steps: int | None = None,
    record: EpisodeRecorder | None = None,
    todo: Sequence[int] | None = None,
    on_finish: OnFinish | None = None,
) -> tuple[Finished, ...]:
    """The episodes of `evaluate`, in their declared order, lost ones too.

    `todo`: indices of the seeds to run, None for all; an episode is the same whatever else is run. `on_finish` hears of
    each episode as it ends, and True ends all of it. The other arguments and errors are those of `evaluate`.
    """
    seeds = _checked_seeds(episode_seeds, noise_seed)
    if not 1 <= execution_horizon <= policy.action_horizon:
        raise ValueError(
            f"evaluate: execution_horizon is {execution_horizon}, the policy predicts {policy.action_horizon} steps; "
            f"choose from 1 to {policy.action_horizon}"
        )
    if num_envs < 1 or policy_batch_size < 1:
        raise ValueError(f"evaluate: num_envs and policy_batch_size must be >= 1, got {num_envs}, {policy_batch_size}")
    pending = _checked_todo(todo, seeds)
    env = make_env(min(num_envs, len(pending)))
    with _closing(env, record):
        _check_action_dim(env, policy)
        limit = _time_limit(env, max_episode_steps)
        run = _Run(env, seeds, pending, task or env.spec.name, limit, policy_batch_size, labels or Labels())
        run.measured |= {
            "execution_horizon": execution_horizon,
            "policy_batch_size": policy_batch_size,
            "noise_seed": noise_seed,
        }
        caller = _PolicyCaller(policy, env.num_envs, policy_batch_size, noise_seed)
        with _evaluation_mode(policy):
            return run.play(caller.act, record, on_finish, execution_horizon)


def play_controller(
    make_env: Callable[[int], EnvT],
    make_controller: Callable[[EnvT], Callable[[], Tensor]],
    episode_seeds: Sequence[int],
    *,
    num_envs: int = 32,
    task: str | None = None,
    labels: Labels | None = None,
    max_episode_steps: int | None = None,
    record: EpisodeRecorder | None = None,
    todo: Sequence[int] | None = None,
    on_finish: OnFinish | None = None,
) -> tuple[Finished, ...]:
    """The episodes of `evaluate_controller`; the other arguments are those of `play`."""
    seeds = _checked_seeds(episode_seeds, noise_seed=0)
    if num_envs < 1:
        raise ValueError(f"evaluate_controller: num_envs must be >= 1, got {num_envs}")
    pending = _checked_todo(todo, seeds)
    env = make_env(min(num_envs, len(pending)))
    with _closing(env, record):
        limit = _time_limit(env, max_episode_steps)
        controller = make_controller(env)

        def act(_obs: Observation, slots: Mapping[int, _Slot]) -> Tensor:
            start = time.perf_counter()
            actions = controller()
            _add_ms(slots.values(), start)
            return actions

        run = _Run(env, seeds, pending, task or env.spec.name, limit, 1, labels or Labels())
        return run.play(act, record, on_finish)


def _result_of_one(finished: Sequence[Finished], config: Mapping[str, Any] | None, start: float) -> EvalResult:
    """Of episodes of one environment."""
    settings = {**(config or {}), **finished[0].measured}
    if lost := [one.seed for one in finished if one.episode is None]:
        settings["lost_seeds"] = lost
    return result_of(finished, settings, time.monotonic() - start)


def _progress_line(num_episodes: int, task: str | None) -> OnFinish:
    line = Progress(num_episodes, f"evaluation of {task}" if task else "evaluation", unit="ep")
    finished: list[Finished] = []

    def on_finish(one: Finished) -> bool:
        finished.append(one)
        rate = sum(f.episode is not None and f.episode.success_once for f in finished) / len(finished)
        line.update(len(finished), success=f"{rate:.2f}")
        return False

    return on_finish


def result_of(finished: Sequence[Finished], config: Mapping[str, Any], wall_s: float) -> EvalResult:
    """The result of episodes that are over, in the order in which they are given. Raises RuntimeError where every one
    of them was lost."""
    there = [one for one in finished if one.episode is not None]
    if not there:
        raise RuntimeError("every episode was lost to a simulator that died; nothing was evaluated")
    timing = Timing.of(
        [ms for one in there for ms in one.policy_ms],
        [ms for one in there for ms in one.env_ms],
        [e.length / one.measured["control_hz"] for one in there if (e := one.episode) is not None and e.success_once],
        wall_s,
    )
    return EvalResult(tuple(one.episode for one in there if one.episode is not None), config, wall_s, timing)


class _PolicyCaller:
    """Calls a policy with a fixed number of rows, each episode always in the same one."""

    def __init__(self, policy: Policy, num_envs: int, batch_size: int, noise_seed: int) -> None:
        self.policy, self.num_envs, self.batch_size = policy, num_envs, batch_size
        self.noise_seed = noise_seed

    @torch.no_grad()
    def act(self, obs: Observation, slots: Mapping[int, _Slot]) -> Tensor:
        """Chunks [N, H, A]; environments without an episode get zeros, which do not move them."""
        device = obs.state.device
        shape, returned = chunk_shape(self.policy), (self.policy.action_horizon, self.policy.action_dim)
        actions = torch.zeros(self.num_envs, *returned, device=device)
        for size, rows in self._batches(slots):
            start = time.perf_counter()
            filler = next(iter(rows.values()))
            source = torch.tensor([rows.get(r, filler) for r in range(size)], device=device)
            noise = torch.zeros(size, *shape)
            for row, i in rows.items():
                noise[row] = policy_noise(self.noise_seed, slots[i].seed, slots[i].decision, *shape)
            chunk = self.policy.act(obs.select(source), noise.to(device)).actions
            if tuple(chunk.shape) != (size, *returned):
                raise ValueError(f"the policy returned actions {tuple(chunk.shape)}, expected {(size, *returned)}")
            for row, i in rows.items():
                actions[i] = chunk[row].to(actions)
            if chunk.device.type == "cuda":
                torch.cuda.synchronize(chunk.device)  # or the clock would stop before the policy has answered
            _add_ms([slots[i] for i in rows.values()], start)
        return actions

    def _batches(self, slots: Mapping[int, _Slot]) -> list[tuple[int, dict[int, int]]]:
        """Rows of a call, and row -> environment, in as few calls as the fixed rows allow."""
        if getattr(self.policy, "rows_are_independent", False):
            return [(len(slots), dict(enumerate(slots)))]
        batches: list[dict[int, int]] = []
        for i, slot in slots.items():
            row = slot.episode % self.batch_size
            free = next((batch for batch in batches if row not in batch), None)
            if free is None:
                free = {}
                batches.append(free)
            free[row] = i
        return [(self.batch_size, batch) for batch in batches]


class _Run:
    """The state of one evaluation: which environment runs which episode, and what is still to do.

    `pending`: indices of `seeds`. `rows`: how many rows the policy's batch has; episode i will sit in row i mod rows.
    """

    def __init__(
        self,
        env: ChunkedVectorEnv,
        seeds: Sequence[int],
        pending: Sequence[int],
        task: str,
        limit: int,
        rows: int,
        labels: Labels,
    ) -> None:
        self.env, self.seeds, self.task, self.limit, self.rows = env, seeds, task, limit, rows
        self.pending, self.labels = list(pending), labels
        self.slots: dict[int, _Slot] = {}
        self.finished: list[Finished] = []
        self.recorder: EpisodeRecorder | None = None
        self._inner: Any = getattr(env, "step_env", env)
        spec = env.spec
        self.measured: dict[str, Any] = {
            "task": task,
            "env": spec.name,
            "control_hz": spec.control_hz,
            "max_episode_steps": limit,
        }
        if names := getattr(self._inner, "stage_names", ()):
            self.measured["stage_names"] = list(names)

    def play(
        self,
        act: _Act,
        recorder: EpisodeRecorder | None,
        on_finish: OnFinish | None,
        execution_horizon: int | None = None,
    ) -> tuple[Finished, ...]:
        """`act` gives chunks, of which `execution_horizon` steps (None: all) are executed."""
        self.recorder = recorder
        told = 0
        obs = self._fill(range(self.env.num_envs))
        while self.slots:
            chunks = act(obs, self.slots)
            wanted = [i for i, slot in self.slots.items() if recorder is not None and recorder.wants(slot.seed)]
            start = time.perf_counter()
            step = self.env.step(chunks[:, :execution_horizon], record=wanted)
            _add_ms(self.slots.values(), start, of_env=True)
            if recorder is not None:
                for i, frames in step.frames.items():
                    recorder.add(self.slots[i].seed, frames, chunks[i])
            ended = self._account(step)
            news, told = self.finished[told:], len(self.finished)
            if on_finish is not None and any([on_finish(one) for one in news]):  # all of them are told
                break
            obs = self._fill(ended) if ended and self.pending else step.obs
        return tuple(sorted(self.finished, key=lambda one: one.index))

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

    def _account(self, step: ChunkStep) -> list[int]:
        """Add the chunk to the running episodes; returns the environments whose episode ended."""
        lengths = step.executed.sum(dim=1).tolist()
        returns = torch.where(step.executed, step.rewards.double(), 0.0).sum(dim=1).tolist()
        success, ended, lost = step.success.tolist(), step.ended.tolist(), step.lost.tolist()
        done: list[int] = []
        for i, slot in self.slots.items():
            if lost[i]:
                done.append(i)  # its video is dropped at the end, as those of an interrupted evaluation
                continue
            slot.decision += 1
            slot.length += lengths[i]
            slot.episode_return += returns[i]
            slot.success_once |= success[i]
            if ended[i] or slot.length >= self.limit:
                done.append(i)
            elif not lengths[i]:
                raise RuntimeError(f"environment {i} executed nothing although episode {slot.seed} goes on")
        stages, clamped = self._furthest_stages(done), self._clamped_steps(done)
        for i in done:
            slot = self.slots.pop(i)
            episode = None if lost[i] else self._episode(i, slot, step, stages[i], clamped[i])
            times = tuple(slot.policy_ms), tuple(slot.env_ms)
            self.finished.append(Finished(slot.episode, slot.seed, episode, *times, self.measured))
        return sorted(done)

    def _episode(self, i: int, slot: _Slot, step: ChunkStep, stage: str, num_clamped: int) -> Episode:
        return Episode(
            task=self.task,
            seed=slot.seed,
            instruction=slot.instruction,
            success_once=slot.success_once,
            success_at_end=bool(step.success_at_end[i]),
            length=slot.length,
            episode_return=slot.episode_return,
            terminated=bool(step.terminated[i]),
            condition=self.labels.condition,
            initial_state=self.labels.initial_state(slot.seed),
            stage=stage,
            num_clamped=num_clamped,
            latency_ms=sum(slot.policy_ms) / len(slot.policy_ms),
            video=self._video(slot),
        )

    def _video(self, slot: _Slot) -> str:
        if self.recorder is None:
            return ""
        names = self.env.spec.action.names
        self.recorder.finish(slot.seed, instruction=slot.instruction, success=slot.success_once, action_names=names)
        recording = self.recorder.recordings.get(slot.seed)
        if recording is None:
            return ""
        folder = self.labels.folder
        return (recording.path if folder is None else recording.path.relative_to(folder)).as_posix()

    def _furthest_stages(self, ended: Sequence[int]) -> dict[int, str]:
        """Name of the furthest stage that each of `ended` has reached, "" for none."""
        names: tuple[str, ...] = tuple(getattr(self._inner, "stage_names", ()))
        if not names or not ended:
            return dict.fromkeys(ended, "")
        reached = self._inner.furthest_stage()
        return {i: names[reached[i]] if reached[i] >= 0 else "" for i in ended}

    def _clamped_steps(self, ended: Sequence[int]) -> dict[int, int]:
        """Control steps of each of `ended` in which a safety filter changed the action."""
        count = getattr(self._inner, "clamped_steps", None)
        if count is None or not ended:
            return dict.fromkeys(ended, 0)
        steps = count()
        return {i: int(steps[i]) for i in ended}


def _add_ms(slots: Iterable[_Slot], start: float, *, of_env: bool = False) -> None:
    elapsed = 1000 * (time.perf_counter() - start)
    for slot in slots:
        (slot.env_ms if of_env else slot.policy_ms).append(elapsed)


def _checked_todo(todo: Sequence[int] | None, seeds: Sequence[int]) -> list[int]:
    indices = list(range(len(seeds))) if todo is None else sorted({int(i) for i in todo})
    if not indices or indices[0] < 0 or indices[-1] >= len(seeds):
        raise ValueError(f"evaluate: todo must name some of the {len(seeds)} episodes, got {indices[:5]}")
    return indices


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
