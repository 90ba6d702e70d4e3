"""An episode of plain arrays: what scripted behaviour without pictures hands over, whoever stores it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StateEpisode:
    """T steps of one environment. `states`: float32 [T + 1, S], the last one where it ended. `actions`: float32 [T, A],
    as executed, in the environment's units. `rewards`: float32 [T]. Exactly one of `terminated` (the task ended it) and
    `truncated` (time or the end of the record did) is True."""

    states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool


__all__ = ["StateEpisode"]
