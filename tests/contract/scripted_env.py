"""A step environment whose every episode does what its seed says, to put an end at any place of a chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vla_rl.core import ActionSpec, CameraSpec, EnvSpec, Observation
from vla_rl.protocols import StepOutcome

SUCCESS, FAILURE, TIME, SUCCESS_AND_TIME, SUCCESS_GOES_ON = range(5)


def script(kind: int, end: int) -> int:
    """The seed of an episode that ends by `kind` at its step `end` (1 = its first step)."""
    return end * 10 + kind


class ScriptedEnv:
    """State: (seed, time, sum of actions). Reward of a step: 0.1 * time + the action's first entry.

    Later episodes get hashed seeds; they end by `hash % 4` at step `1 + hash % 7`. Counts what it is asked to render.
    """

    def __init__(self, num_envs: int, max_episode_steps: int | None = None) -> None:
        self.num_envs = num_envs
        self.spec = EnvSpec(
            name="scripted",
            cameras={"agent": CameraSpec(2, 2)},
            state_names=("seed", "time", "sum"),
            action=ActionSpec((-1.0, -1.0), (1.0, 1.0), ("x", "y")),
            max_episode_steps=max_episode_steps,
            control_hz=20.0,
        )
        self.seeds = torch.zeros(num_envs, dtype=torch.int64)
        self.time = torch.zeros(num_envs, dtype=torch.int64)
        self.sum = torch.zeros(num_envs)
        self.images_rendered = 0
        self.frames_rendered = 0

    def _kind(self) -> Tensor:
        return torch.where(self.seeds < 10_000, self.seeds % 10, self.seeds % 4)

    def _end(self) -> Tensor:
        return torch.where(self.seeds < 10_000, self.seeds // 10, 1 + self.seeds % 7)

    def reset(self, env_ids: Tensor, seeds: Tensor) -> None:
        self.seeds[env_ids] = seeds
        self.time[env_ids] = 0
        self.sum[env_ids] = 0.0

    def step(self, actions: Tensor, active: Tensor) -> StepOutcome:
        actions = self.spec.action.clamp(actions)
        self.time = self.time + active
        self.sum = torch.where(active, self.sum + actions.sum(dim=1), self.sum)
        kind, at_end = self._kind(), self.time == self._end()
        success = at_end & ((kind == SUCCESS) | (kind == SUCCESS_AND_TIME) | (kind == SUCCESS_GOES_ON))
        return StepOutcome(
            reward=0.1 * self.time + actions[:, 0],
            terminated=at_end & ((kind == SUCCESS) | (kind == FAILURE) | (kind == SUCCESS_AND_TIME)),
            truncated=at_end & ((kind == TIME) | (kind == SUCCESS_AND_TIME)),
            success=success,
        )

    def observe(self, env_ids: Tensor, images: bool) -> Observation:
        seeds = self.seeds[env_ids]
        state = torch.stack([(seeds % 10_000).float(), self.time[env_ids].float(), self.sum[env_ids]], dim=1)
        pictures = {}
        if images:
            self.images_rendered += len(env_ids)
            pictures = {"agent": self._picture(env_ids)}
        return Observation(pictures, state, tuple(f"episode {s}" for s in seeds.tolist()))

    def _picture(self, env_ids: Tensor) -> Tensor:
        value = (self.time[env_ids] * 16 + self.seeds[env_ids]) % 256
        return value.to(torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3).contiguous()

    def render(self, env_ids: Tensor) -> Tensor:
        self.frames_rendered += len(env_ids)
        return self._picture(env_ids)

    def state_dict(self) -> dict[str, Any]:
        return {"seeds": self.seeds.clone(), "time": self.time.clone(), "sum": self.sum.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seeds, self.time, self.sum = state["seeds"].clone(), state["time"].clone(), state["sum"].clone()

    def close(self) -> None:
        pass
