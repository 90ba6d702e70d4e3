"""A curriculum over tasks: episodes are of those tasks most often that succeed about half of the time.

What always fails gives no signal and what always succeeds no more of it (VLA-RL, arXiv 2505.18719, whose rule weighs by
the inverse distance of the success rate from 1/2; ours is a softmax of it, which is bounded where they meet).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_STREAM = 0x7A5C  # the choice of a task is none of the draws of its episode


@dataclass(frozen=True)
class CurriculumConfig:
    """`tasks`: their names in the recipe's environment. A task's share of the episodes is proportional to
    exp(-|success rate - 1/2| / `temperature`), with its last `window` episodes and one success and one failure before
    them, so that an unknown task counts as one at the frontier. `uniform_share`: of the episodes, dealt out evenly, so
    that what was mastered is not forgotten."""

    tasks: tuple[str, ...]
    temperature: float = 0.1
    window: int = 32
    uniform_share: float = 0.2

    def __post_init__(self) -> None:
        if len(self.tasks) < 2 or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks are {list(self.tasks)}, expected at least 2 different ones")
        if self.temperature <= 0.0 or self.window < 1 or not 0.0 <= self.uniform_share <= 1.0:
            raise ValueError(
                "expected temperature > 0, window >= 1 and 0 <= uniform_share <= 1, got "
                f"{self.temperature}, {self.window}, {self.uniform_share}"
            )


class TaskCurriculum:
    """Success rates of tasks, and the choice between them. It has no generator: the choice is a function of the
    episode's seed and of the episodes recorded so far."""

    def __init__(self, config: CurriculumConfig) -> None:
        self.config = config
        self._recent: list[deque[bool]] = [deque(maxlen=config.window) for _ in config.tasks]

    @property
    def success_rates(self) -> np.ndarray:
        """float64 [tasks]: (successes + 1) / (episodes + 2) of the recent episodes."""
        return np.array([(sum(recent) + 1) / (len(recent) + 2) for recent in self._recent])

    @property
    def probabilities(self) -> np.ndarray:
        """float64 [tasks]."""
        weights = np.exp(-np.abs(self.success_rates - 0.5) / self.config.temperature)
        share = self.config.uniform_share
        return (1.0 - share) * weights / weights.sum() + share / len(weights)

    def choose(self, seed: int) -> int:
        """The task of the episode with this seed."""
        uniform = np.random.default_rng([_STREAM, seed]).random()
        below = int(np.searchsorted(np.cumsum(self.probabilities), uniform, side="right"))
        return min(below, len(self._recent) - 1)  # the sum may round to less than 1

    def record(self, task: int, success: bool) -> None:
        """An episode of `task` is over."""
        self._recent[task].append(bool(success))

    def metrics(self) -> dict[str, float]:
        """Recent success rate of each task (none before its first episode), and its share of the episodes."""
        found = {}
        for task, recent, share in zip(self.config.tasks, self._recent, self.probabilities, strict=True):
            found |= {f"task_success/{task}": sum(recent) / len(recent)} if recent else {}
            found[f"task_share/{task}"] = float(share)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"recent": [list(recent) for recent in self._recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for the state of another number of tasks."""
        if len(state["recent"]) != len(self._recent):
            raise ValueError(f"this state is of {len(state['recent'])} tasks, here are {len(self._recent)}")
        self._recent = [deque(recent, maxlen=self.config.window) for recent in state["recent"]]


__all__ = ["CurriculumConfig", "TaskCurriculum"]
