"""Intervals and tests for success rates. Pure functions of counts and arrays, no random state but a stated seed.

Sources: Wilson (1927) for one rate; McNemar (1947) in its exact binomial form for two policies on the same episodes;
Newcombe (1998, Statistics in Medicine 17:2635, method 10) for the difference of two paired rates; Efron's percentile
bootstrap over pairs for the difference of two means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Rate:
    """A rate that never travels without its sample size and interval.

    `low`, `high`: ends of the Wilson score interval at `confidence`.
    """

    successes: int
    n: int
    low: float
    high: float
    confidence: float = 0.95

    @property
    def rate(self) -> float:
        return self.successes / self.n

    def as_dict(self) -> dict[str, float | int]:
        return {
            "success_rate": self.rate,
            "successes": self.successes,
            "n": self.n,
            "low": self.low,
            "high": self.high,
            "confidence": self.confidence,
        }

    def __str__(self) -> str:
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.n}"


@dataclass(frozen=True)
class Difference:
    """`second - first`, with an interval at `confidence`."""

    value: float
    low: float
    high: float
    confidence: float = 0.95

    def as_dict(self) -> dict[str, float]:
        return {"difference": self.value, "low": self.low, "high": self.high, "confidence": self.confidence}

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def wilson(successes: int, n: int, confidence: float = 0.95) -> Rate:
    """Wilson score interval of `successes` out of `n` independent episodes, without continuity correction.

    Raises ValueError for n < 1, successes outside [0, n], or a confidence outside (0, 1).
    """
    if n < 1:
        raise ValueError(f"wilson: n must be at least 1, got {n}; a rate of no episodes does not exist")
    if not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes out of {n} episodes; expected 0 <= successes <= n")
    z = _normal_quantile(confidence)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Rate(int(successes), int(n), low, high, confidence)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two policies succeed equally often, from the discordant pairs alone.

    `only_first`: episodes that only the first policy solved; `only_second`: only the second. Under the hypothesis,
    only_first ~ Binomial(only_first + only_second, 1/2). No discordant pair: 1.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"mcnemar_exact: counts must be >= 0, got {only_first} and {only_second}")
    total = only_first + only_second
    tail = sum(math.comb(total, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**total)  # exact integers until the one division


def paired_rate_difference(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95
) -> Difference:
    """`rate(second) - rate(first)` on the same episodes, with Newcombe's hybrid score interval (method 10).

    Unlike a bootstrap it stays honest at the edges: with no discordant pair the interval still has a width.
    """
    counts = {"both": both, "only_first": only_first, "only_second": only_second, "neither": neither}
    if min(counts.values()) < 0 or sum(counts.values()) < 1:
        raise ValueError(f"paired_rate_difference: counts must be >= 0 with at least one episode, got {counts}")
    n = sum(counts.values())
    second = wilson(both + only_second, n, confidence)
    first = wilson(both + only_first, n, confidence)
    correlation = _paired_correlation(both, only_first, only_second, neither)
    value = (only_second - only_first) / n

    def combine(from_second: float, from_first: float) -> float:
        squared = from_second**2 - 2 * correlation * from_second * from_first + from_first**2
        return math.sqrt(max(0.0, squared))

    low = value - combine(second.rate - second.low, first.high - first.rate)
    high = value + combine(second.high - second.rate, first.rate - first.low)
    return Difference(value, max(-1.0, low), min(1.0, high), confidence)


def paired_bootstrap(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Mean of `second - first` over pairs, with a percentile bootstrap interval that resamples whole pairs.

    Element i of both is the same episode. Raises ValueError for different lengths, no pair, or values not finite.
    """
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or x.size == 0:
        raise ValueError(f"paired_bootstrap: expected two vectors of one length >= 1, got {x.shape} and {y.shape}")
    if num_resamples < 1:
        raise ValueError(f"paired_bootstrap: num_resamples must be at least 1, got {num_resamples}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("paired_bootstrap: values must be finite; look for NaN or infinite returns in the episodes")
    tail = (1 - _checked(confidence)) / 2
    difference = y - x
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    block = max(1, 4_000_000 // x.size)  # at most 32 MB of indices at a time
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        means[start : start + rows] = difference[rng.integers(0, x.size, size=(rows, x.size))].mean(axis=1)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(float(difference.mean()), float(low), float(high), confidence)


def _paired_correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Phi coefficient of the 2x2 table less Newcombe's correction where positive; 0 at an empty margin."""
    n = both + only_first + only_second + neither
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    covariance = float(both * neither - only_first * only_second)
    if covariance > 0:
        covariance = max(0.0, covariance - n / 2)
    return covariance / math.sqrt(margins)


def _normal_quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}; 0.95 is customary")
    return confidence
