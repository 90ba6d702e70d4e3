"""Record demonstrations: a closed-loop expert drives a vectorised environment, whole episodes become a dataset.

Which episodes a dataset has, and their order, follow from the list of seeds alone: not from the number of environments
and not from which episode ended first. So a recording that was killed goes on without losing or repeating one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

import torch
from torch import Tensor

from vla_rl.core import Observation
from vla_rl.data.lerobot_format import DatasetError, DatasetSpec, ImageFormat
from vla_rl.data.lerobot_writer import LeRobotWriter
from vla_rl.progress import Progress
from vla_rl.protocols import ChunkedVectorEnv

Keep = Literal["all", "success"]


@dataclass(frozen=True)
class DemoSummary:
    """`num_episodes`, `num_frames`: of the whole dataset. `num_attempts`, `num_successes`: episodes run in this call.
    `wall_s`: of this call."""

    path: Path
    num_episodes: int
    num_frames: int
    num_attempts: int
    num_successes: int
    wall_s: float


@dataclass
class _Recording:
    """The episode that one environment is in; `position` is its seed's place in the list of seeds."""

    position: int
    seed: int
    instruction: str
    states: list[Tensor] = field(default_factory=list)
    actions: list[Tensor] = field(default_factory=list)
    images: dict[str, list[Tensor]] = field(default_factory=dict)
    rewards: list[Tensor] = field(default_factory=list)
    successes: list[Tensor] = field(default_factory=list)
    truncated: bool = False
    lost: bool = False

    @property
    def success(self) -> bool:
        return not self.lost and bool(torch.stack(self.successes).any())

    def append(self, i: int, obs: Observation, actions: Tensor, rewards: Tensor, success: Tensor) -> None:
        """Frame of environment `i`: what was seen, the action as executed, what came of it; all rows are copied."""
        self.states.append(obs.state[i].clone())
        self.actions.append(actions[i].clone())
        for camera, image in obs.images.items():
            self.images.setdefault(camera, []).append(image[i].clone())
        self.rewards.append(rewards[i].clone())
        self.successes.append(success[i].clone())


def _on_cpu(obs: Observation) -> Observation:
    return Observation({camera: image.cpu() for camera, image in obs.images.items()}, obs.state.cpu(), obs.instruction)


class _DemoCollector:
    """Runs episodes in whatever environment is idle and writes them in the order of their seeds."""

    def __init__(
        self,
        env: ChunkedVectorEnv,
        expert: Callable[[], Tensor],
        writer: LeRobotWriter,
        num_episodes: int,
        seeds: Sequence[int],
        keep: Keep,
        on_reset: Callable[[Tensor, Tensor], None] | None,
    ) -> None:
        self.env, self.expert, self.writer = env, expert, writer
        self.num_episodes, self.seeds, self.keep, self.on_reset = num_episodes, seeds, keep, on_reset
        self.next_start = self.next_write = _resume_position(writer, seeds)
        self.running: dict[int, _Recording] = {}
        self.finished: dict[int, _Recording] = {}  # by position, until all before them are written
        self.num_attempts = self.num_successes = 0
        self.obs: Observation | None = None

    @property
    def num_written(self) -> int:
        return self.writer.num_episodes + self.writer.num_pending

    def run(self, progress: Progress | None) -> None:
        while self.num_written < self.num_episodes:
            self.start_episodes()
            if not self.running:
                self.writer.commit()
                raise DatasetError(
                    f"the {len(self.seeds)} seeds are used up with {self.writer.num_episodes} of {self.num_episodes} "
                    f"episodes recorded (keep={self.keep!r}); give more seeds and call again"
                )
            self.step()
            self.write_finished()
            if progress is not None:
                progress.update(self.num_written, succeeded=f"{self.num_successes}/{self.num_attempts}")
        self.writer.commit()

    def start_episodes(self) -> None:
        """Start the next seeds in idle environments, no more than can still be needed."""
        waiting = sum(r.success or (self.keep == "all" and not r.lost) for r in self.finished.values())
        wanted = self.num_episodes - self.num_written - waiting - len(self.running)
        idle = [i for i in range(self.env.num_envs) if i not in self.running]
        count = min(wanted, len(idle), len(self.seeds) - self.next_start)
        if count <= 0:
            return
        ids = idle[:count]
        seeds = [int(self.seeds[self.next_start + j]) for j in range(count)]
        if self.obs is None:  # an environment moves only once it was reset: the spare ones get the first seed too
            spare = idle[count:]
            self.obs = self.env.reset([*seeds, *[seeds[0]] * len(spare)], [*ids, *spare])
        else:
            self.obs = self.env.reset(seeds, ids)
        for j, i in enumerate(ids):
            self.running[i] = _Recording(self.next_start + j, seeds[j], self.obs.instruction[i])
        self.next_start += count
        if self.on_reset is not None:
            self.on_reset(torch.tensor(ids), torch.tensor(seeds))

    def step(self) -> None:
        assert self.obs is not None
        actions = self.expert()
        if tuple(actions.shape) != (self.env.num_envs, 1, self.env.spec.action.dim):
            raise ValueError(
                f"the expert must return actions [N={self.env.num_envs}, 1, A={self.env.spec.action.dim}], "
                f"got {tuple(actions.shape)}"
            )
        obs = _on_cpu(self.obs)
        step = self.env.step(actions)
        actions = self.env.spec.action.clamp(actions[:, 0].detach()).cpu()
        executed, rewards, success = step.executed[:, 0].cpu(), step.rewards[:, 0].cpu(), step.success.cpu()
        ended, terminated = step.ended.tolist(), step.terminated.tolist()
        for i, recording in list(self.running.items()):
            if step.lost[i]:
                recording.lost = True
                self.finished[recording.position] = self.running.pop(i)
                continue
            if not executed[i]:
                raise RuntimeError(f"environment {i} did not move in the episode of seed {recording.seed}")
            recording.append(i, obs, actions, rewards, success)
            if ended[i]:
                recording.truncated = not terminated[i]
                self.finished[recording.position] = self.running.pop(i)
        self.obs = step.obs

    def write_finished(self) -> None:
        """Write, in the order of seeds, the finished episodes that no unfinished one stands before."""
        while self.next_write in self.finished and self.num_written < self.num_episodes:
            r = self.finished.pop(self.next_write)
            self.next_write += 1
            self.num_attempts += 1
            self.num_successes += r.success
            if r.lost or (self.keep == "success" and not r.success):
                continue
            self.writer.add_episode(
                state=torch.stack(r.states),
                action=torch.stack(r.actions),
                images={camera: torch.stack(frames) for camera, frames in r.images.items()},
                reward=torch.stack(r.rewards),
                success=torch.stack(r.successes),
                instruction=r.instruction,
                truncated=r.truncated,
                extra={"seed": r.seed},
            )


def _resume_position(writer: LeRobotWriter, seeds: Sequence[int]) -> int:
    """Place in `seeds` after the last episode of the dataset. Raises DatasetError where it has other seeds."""
    position = 0
    for episode, extra in enumerate(writer.extras):
        seed = extra.get("seed")
        while position < len(seeds) and int(seeds[position]) != seed:
            position += 1  # a failure that was dropped, or an episode whose simulator died
        if position >= len(seeds) or int(seeds[position]) != seed:
            raise DatasetError(
                f"{writer.path}: episode {episode} has seed {seed}, which does not follow in the given seeds; "
                "resume with the seeds that the recording began with, or write to another folder"
            )
        position += 1
    return position


def collect_demos(
    env: ChunkedVectorEnv,
    expert: Callable[[], Tensor],
    path: str | Path,
    num_episodes: int,
    seeds: Sequence[int],
    *,
    keep: Keep = "all",
    image_format: ImageFormat = "png",
    on_reset: Callable[[Tensor, Tensor], None] | None = None,
    episodes_per_commit: int = 8,
    progress: TextIO | None = sys.stderr,
) -> DemoSummary:
    """Record `num_episodes` episodes at `path`, one a seed, in the order of `seeds`; goes on where a killed call ended.

    `env` should not reset itself (`auto_reset=False`): this function does, with the next seed; nor does it need
    `final_images`. Pictures are taken at
    every control step, so it is stepped with chunks of one action. `expert()` returns actions [N, 1, A] for the
    environments' present state; `on_reset(env_ids, seeds)` tells a stochastic one which episodes begin, so that its
    noise can depend on the seed alone. `keep="success"` drops failures and takes the first `num_episodes` successes in
    the order of seeds. A kill loses at most `episodes_per_commit` finished episodes, which are recorded again.

    Raises DatasetError where the dataset at `path` was recorded with other seeds or features, or where the seeds run
    out (what was recorded stays); ValueError for repeated seeds.
    """
    if keep not in ("all", "success"):
        raise ValueError(f'keep must be "all" or "success", got {keep!r}')
    if len(set(seeds)) != len(seeds):
        raise ValueError("seeds has repetitions; give each episode a seed of its own")
    start = time.monotonic()
    with LeRobotWriter.open(
        path, DatasetSpec.from_env(env.spec, image_format), episodes_per_commit=episodes_per_commit
    ) as writer:
        collector = _DemoCollector(env, expert, writer, num_episodes, seeds, keep, on_reset)
        line = None
        if progress is not None:
            line = Progress(num_episodes, "demos", unit="episodes", initial=writer.num_episodes, stream=progress)
        collector.run(line)
        return DemoSummary(
            path=Path(path),
            num_episodes=writer.num_episodes,
            num_frames=writer.num_frames,
            num_attempts=collector.num_attempts,
            num_successes=collector.num_successes,
            wall_s=time.monotonic() - start,
        )
