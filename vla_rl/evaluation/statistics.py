"""Intervals and tests for success rates. Pure functions of counts and arrays, no random state but a stated seed.

Sources: Wilson (1927) for one rate; McNemar (1947) in its exact binomial form for two policies on the same episodes;
Newcombe (1998, Statistics in Medicine 17:2635, method 10) for the difference of two paired rates; Efron's percentile
bootstrap over pairs for the difference of two means; Holm (1979) for several tests at once. What a planned number of
episodes can tell apart comes from the power of the very test that is used: exact McNemar for paired episodes, the
two-sided z test of two independent rates (Fleiss, Levin and Paik, Statistical Methods for Rates and Proportions, ch. 4,
without continuity correction) for unpaired ones.
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


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given: those at most alpha are significant together.

    The chance of one false finding or more among all tests is then at most alpha, whatever their dependence.
    Raises ValueError for a p-value outside [0, 1].
    """
    if not all(0.0 <= p <= 1.0 for p in p_values):
        raise ValueError(f"holm: p-values must lie in [0, 1], got {[p for p in p_values if not 0.0 <= p <= 1.0][:5]}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


# ----------------------------------------------------------------------------------------------- planning a comparison
def detection_power(
    n: int,
    difference: float,
    *,
    base_rate: float = 0.5,
    discordance: float | None = None,
    paired: bool = True,
    confidence: float = 0.95,
) -> float:
    """Chance that a comparison of two policies on `n` episodes (each) finds a true `difference` with its right sign.

    One rate is `base_rate`, the other lies `difference` from it towards 1/2, which is the harder direction to see.
    `discordance`: fraction of paired episodes that only one of the two solves; it is `difference` at least. None: what
    independent outcomes give, the most that shared initial states leave; similar policies have less, and need fewer
    episodes. With `paired=False` the episodes are of different initial states.

    Raises ValueError for n < 1, a rate outside [0, 1], or a difference that leaves no such other rate.
    """
    p, room = _room(base_rate)
    if n < 1:
        raise ValueError(f"detection_power: n must be at least 1, got {n}")
    if not 0 < difference <= room + 1e-12:
        raise ValueError(f"a difference of {difference} from a rate of {base_rate}: expected (0, {room}]")
    alpha = 1 - _checked(confidence)
    q = min(1.0, p + difference)
    if not paired:
        if discordance is not None:
            raise ValueError("discordance is of paired episodes; leave it out where paired=False")
        return _unpaired_power(n, p, q, confidence)
    if discordance is None:
        discordance = p * (1 - q) + q * (1 - p)
    elif not 0 <= discordance <= 1:
        raise ValueError(f"discordance must lie in [0, 1], got {discordance}")
    return _mcnemar_power(n, difference, max(discordance, difference), alpha)


def minimum_detectable_difference(
    n: int,
    *,
    base_rate: float = 0.5,
    discordance: float | None = None,
    paired: bool = True,
    power: float = 0.8,
    confidence: float = 0.95,
) -> float | None:
    """The smallest true difference of two success rates that `n` episodes (each) find with probability `power`.

    Arguments and errors as those of `detection_power`. None where so few episodes find no difference at all.
    """
    _check_power(power)
    room = _room(base_rate)[1]

    def found(difference: float) -> bool:
        given = detection_power(
            n, difference, base_rate=base_rate, discordance=discordance, paired=paired, confidence=confidence
        )
        return given >= power

    if not found(room):
        return None
    low, high = 0.0, room
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def episodes_needed(
    difference: float,
    *,
    base_rate: float = 0.5,
    discordance: float | None = None,
    paired: bool = True,
    power: float = 0.8,
    confidence: float = 0.95,
) -> int:
    """The number of episodes (of each policy) with which a true `difference` is found with probability `power`.

    The inverse of `minimum_detectable_difference`; arguments and errors as those of `detection_power`.
    """
    _check_power(power)

    def found(n: int) -> bool:
        given = detection_power(
            n, difference, base_rate=base_rate, discordance=discordance, paired=paired, confidence=confidence
        )
        return given >= power

    high = 1
    while not found(high):
        if high >= _MOST_EPISODES:
            raise ValueError(f"a difference of {difference} needs more than {_MOST_EPISODES} episodes")
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


_MOST_EPISODES = 2**16


def _mcnemar_power(n: int, difference: float, discordance: float, alpha: float) -> float:
    """Over the number of discordant pairs, the chance that the exact test rejects in favour of the better policy."""
    better = min(1.0, 0.5 * (1.0 + difference / discordance))
    spread = 7.0 * math.sqrt(n * discordance * (1.0 - discordance)) + 1.0  # beyond it lie less than 1e-11
    first, last = max(0, int(n * discordance - spread)), min(n, math.ceil(n * discordance + spread))
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    weights = _binomial(n, np.arange(first, last + 1), discordance, log_factorial)
    total = 0.0
    for pairs, weight in zip(range(first, last + 1), weights.tolist(), strict=True):
        losses = np.arange(pairs // 2 + 1)  # pairs that the worse policy wins
        rejected = 2.0 * np.cumsum(_binomial(pairs, losses, 0.5, log_factorial)) <= alpha
        total += weight * float(_binomial(pairs, losses[rejected], 1.0 - better, log_factorial).sum())
    return min(1.0, total)


def _binomial(n: int, k: np.ndarray, p: float, log_factorial: np.ndarray) -> np.ndarray:
    """Probabilities of `k` successes of `n`."""
    if p in (0.0, 1.0):
        return (k == n * p).astype(np.float64)
    ways = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    return np.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))


def _unpaired_power(n: int, p: float, q: float, confidence: float) -> float:
    pooled, own = (p + q) / 2, p * (1 - p) + q * (1 - q)
    distance = (q - p) * math.sqrt(n) - _normal_quantile(confidence) * math.sqrt(2 * pooled * (1 - pooled))
    if own == 0:
        return float(distance > 0)
    return NormalDist().cdf(distance / math.sqrt(own))


def _room(base_rate: float) -> tuple[float, float]:
    """The base rate mirrored to at most 1/2, and how far above it the other rate can lie."""
    if not 0 <= base_rate <= 1:
        raise ValueError(f"base_rate must lie in [0, 1], got {base_rate}")
    p = min(base_rate, 1 - base_rate)
    return p, 1 - p


def _check_power(power: float) -> None:
    if not 0 < power < 1:
        raise ValueError(f"power must lie in (0, 1), got {power}; 0.8 is customary")


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
