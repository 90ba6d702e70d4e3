"""Monte-Carlo returns of stored episodes, the calibration bound of Cal-QL (Nakamoto et al. 2023, section 4).

They are of the transformed reward r' = reward_scale * r + reward_bias, the one that the critic learns, and with the
same per-step gamma; a chunk does not change them, for the return is the state's.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

TruncatedReturn = Literal["lower_bound", "none", "finite"]


def monte_carlo_returns(
    rewards: np.ndarray,
    *,
    terminated: bool,
    gamma: float,
    reward_low: float | None = None,
    truncated: TruncatedReturn = "lower_bound",
) -> np.ndarray:
    """Discounted return from each step on: float64 [T] from transformed `rewards [T]`.

    After a termination nothing follows. After a truncation the episode would have gone on, and what it would have
    earned is unknown, so the tail is by `truncated`:

    * "lower_bound": `reward_low / (1 - gamma)`, the worst reward for ever. -inf where `reward_low` is None. For a
      trajectory whose every reward is the worst one this is Cal-QL's rule for sparse tasks, r_neg / (1 - gamma).
    * "none": -inf, no bound.
    * "finite": 0. Wrong with negative rewards: the sum over what is left is then far above the true value. A control.

    `reward_low` is transformed too. Raises ValueError for rewards that are not finite or below `reward_low`.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 1 or not len(rewards):
        raise ValueError(f"rewards must be [T] with T >= 1, got {rewards.shape}")
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        raise ValueError(f"the reward of step {bad[0]} is {rewards[bad[0]]}; look for a broken reward or a wrong scale")
    if not 0 < gamma < 1:
        raise ValueError(f"gamma must be in (0, 1), got {gamma}")
    if reward_low is not None and rewards.min() < reward_low - 1e-6 * max(1.0, abs(reward_low)):
        raise ValueError(
            f"step {rewards.argmin()} has the reward {rewards.min():g}, below reward_low {reward_low:g} (transformed): "
            "reward_low must be the lowest reward that the task can give"
        )
    following = _tail(terminated, gamma, reward_low, truncated)
    out = np.empty_like(rewards)
    for t in range(len(rewards) - 1, -1, -1):
        out[t] = following = rewards[t] + gamma * following
    return out


def _tail(terminated: bool, gamma: float, reward_low: float | None, truncated: TruncatedReturn) -> float:
    if truncated not in ("lower_bound", "none", "finite"):
        raise ValueError(f'truncated must be "lower_bound", "none" or "finite", got {truncated!r}')
    if terminated or truncated == "finite":
        return 0.0
    if truncated == "none" or reward_low is None:
        return -np.inf
    return reward_low / (1 - gamma)


__all__ = ["TruncatedReturn", "monte_carlo_returns"]
