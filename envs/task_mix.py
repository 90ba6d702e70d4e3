"""Several tasks in one batch of environments: an episode's task is chosen by its seed and a curriculum.

    make_task_mix(lambda task: env_config.make(64, split="train", auto_reset=True, task=task), curriculum_config)

Each task keeps environments of its own for every row, since its scene is its own; only those of the running tasks
move. So memory grows with the number of tasks, and time does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vla_rl.core import EnvSpec, Observation
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.protocols import RunsAhead, StepEnv, StepOutcome
from vla_rl.train.curriculum import CurriculumConfig, TaskCurriculum


class TaskMixEnv:
    """A `StepEnv` over one `StepEnv` a task, all of the same number of environments.

    A task's own time limit holds for its episodes. Episodes with one seed that start in one `reset` are of one task, as
    groups of GRPO need. Where rollout workers have environments of their own, each has a curriculum of its own.
    """

    def __init__(self, envs: Sequence[StepEnv], curriculum: TaskCurriculum) -> None:
        self.spec, self.num_envs = _common_spec(envs), envs[0].num_envs
        self.curriculum = curriculum
        self._envs = list(envs)
        self._task = torch.zeros(self.num_envs, dtype=torch.int64)
        self._steps = torch.zeros(self.num_envs, dtype=torch.int64)
        self._success = torch.zeros(self.num_envs, dtype=torch.bool)
        limits = [env.spec.max_episode_steps for env in envs]
        self._limits = torch.tensor([torch.iinfo(torch.int64).max if limit is None else limit for limit in limits])

    def reset(self, env_ids: Tensor, seeds: Tensor) -> None:
        """Start episodes; see `StepEnv`. An episode is decided by its seed and the curriculum as it is now."""
        self._task[env_ids] = torch.tensor([self.curriculum.choose(seed) for seed in seeds.tolist()])
        self._steps[env_ids] = 0
        self._success[env_ids] = False
        for env, rows in self._running(env_ids):
            env.reset(env_ids[rows], seeds[rows])

    def begin_chunk(self, actions: Tensor, num_steps: Tensor, images: bool) -> None:
        """See `RunsAhead`; a task's own limit may end an episode before the mixture's."""
        certain = num_steps.minimum(self._limits[self._task] - self._steps)
        for env, mine in self._running(num_steps.nonzero().flatten(), of_all=True):
            if isinstance(env, RunsAhead):
                env.begin_chunk(actions, torch.where(mine, certain, 0), images)

    def step(self, actions: Tensor, active: Tensor) -> StepOutcome:
        """One control step; see `StepEnv`."""
        device = actions.device
        reward = torch.zeros(self.num_envs, device=device)
        terminated, truncated, success, lost = (torch.zeros_like(reward, dtype=torch.bool) for _ in range(4))
        for env, rows in self._running(active.nonzero().flatten().cpu(), of_all=True):
            mine = rows.to(device)
            outcome = env.step(actions, active & mine)
            reward = torch.where(mine, outcome.reward, reward)
            terminated = torch.where(mine, outcome.terminated, terminated)
            truncated = torch.where(mine, outcome.truncated, truncated)
            success = torch.where(mine, outcome.success, success)
            if outcome.lost is not None:
                lost = torch.where(mine, outcome.lost, lost)
        self._steps += active.cpu()
        truncated = truncated | (self._steps >= self._limits[self._task]).to(device)
        self._success |= (active & success).cpu()
        for i in (active & (terminated | truncated) & ~lost).nonzero().flatten().tolist():
            self.curriculum.record(int(self._task[i]), bool(self._success[i]))
        return StepOutcome(reward, terminated, truncated, success, lost)

    def observe(self, env_ids: Tensor, images: bool) -> Observation:
        """Observations; see `StepEnv`."""
        rows, order = self._grouped(env_ids)
        return Observation.concatenate([env.observe(env_ids[r], images) for env, r in rows]).select(order)

    def render(self, env_ids: Tensor) -> Tensor:
        rows, order = self._grouped(env_ids)
        return torch.cat([env.render(env_ids[r]) for env, r in rows])[order]

    def state_dict(self) -> dict[str, Any]:
        return {
            "envs": [env.state_dict() for env in self._envs],
            "curriculum": self.curriculum.state_dict(),
            "task": self._task.clone(),
            "steps": self._steps.clone(),
            "success": self._success.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, with nothing changed, for the state of another number of tasks."""
        self.curriculum.load_state_dict(state["curriculum"])
        for env, own in zip(self._envs, state["envs"], strict=True):
            env.load_state_dict(own)
        self._task, self._steps = state["task"].clone(), state["steps"].clone()
        self._success = state["success"].clone()

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def _running(self, env_ids: Tensor, of_all: bool = False) -> list[tuple[StepEnv, Tensor]]:
        """The tasks that any of `env_ids` (int64 [M]) is at, each with which of them (bool [M], or `of_all` [N])."""
        present = self._task[env_ids]
        where = self._task if of_all else present
        return [(self._envs[t], where == t) for t in present.unique().tolist()]

    def _grouped(self, env_ids: Tensor) -> tuple[list[tuple[StepEnv, Tensor]], Tensor]:
        """`env_ids` by task, and the order int64 [M] that brings the concatenated rows back."""
        running = self._running(env_ids)
        if not running:  # no row: any task's answer has the right shape
            running = [(self._envs[0], torch.zeros(0, dtype=torch.bool))]
        return running, torch.cat([rows.nonzero().flatten() for _, rows in running]).argsort()


def _common_spec(envs: Sequence[StepEnv]) -> EnvSpec:
    """One specification for all. Raises ValueError where they differ in what a policy sees or does."""
    first = envs[0].spec
    for env in envs[1:]:
        for name in ("cameras", "state_names", "action", "control_hz"):
            ours, other = getattr(first, name), getattr(env.spec, name)
            if ours != other:
                raise ValueError(f"{first.name} and {env.spec.name} have other {name}: {ours} and {other}")
        if env.num_envs != envs[0].num_envs:
            raise ValueError(f"{first.name} and {env.spec.name} are {envs[0].num_envs} and {env.num_envs} environments")
    limits = [env.spec.max_episode_steps for env in envs]
    longest = None if None in limits else max(limit for limit in limits if limit is not None)
    return replace(first, name="+".join(env.spec.name for env in envs), max_episode_steps=longest)


def make_task_mix(make: Callable[[str], ChunkedEnv], config: CurriculumConfig) -> ChunkedEnv:
    """Environments of all tasks of `config`, from a function that makes those of one."""
    parts = [make(task) for task in config.tasks]
    first = parts[0]
    mix = TaskMixEnv([part.step_env for part in parts], TaskCurriculum(config))
    return ChunkedEnv(mix, images=first.images, final_images=first.final_images, auto_reset=first.auto_reset)
