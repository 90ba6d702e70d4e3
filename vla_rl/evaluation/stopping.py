"""Stopping an evaluation early without spoiling it: intervals that hold at every number of episodes at once.

Who looks at a 95% Wilson interval after every episode and stops when it pleases is wrong far more often than in 5% of
the cases. A confidence sequence covers the true rate at all n simultaneously with the stated probability, so that any
rule may decide when to stop.

It is the beta-binomial mixture (Robbins 1970, Annals of Mathematical Statistics 41:1397): for the true rate p,

    M_n(p) = B(1/2 + s, 1/2 + n - s) / B(1/2, 1/2) / (p^s (1-p)^(n-s)),   s successes of n,

is a martingale that starts at 1, so by Ville's inequality it ever reaches 1/alpha with probability at most alpha. The
interval holds the p at which it stays below. The weights 1/2 (Krichevsky and Trofimov 1981) keep it short near 0 and 1,
where success rates often lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from vla_rl.evaluation.statistics import Rate


@dataclass(frozen=True)
class ConfidenceSequence:
    """Intervals for a success rate that hold at all n together with probability `confidence`, however one stops."""

    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie in (0, 1), got {self.confidence}; 0.95 is customary")

    def interval(self, successes: int, n: int) -> Rate:
        """The interval after `n` episodes. Raises ValueError for n < 1 or successes outside [0, n]."""
        if n < 1 or not 0 <= successes <= n:
            raise ValueError(f"{successes} successes of {n} episodes; expected n >= 1 and 0 <= successes <= n")
        bound = _log_mixture(successes, n) + math.log(1 - self.confidence)  # log-likelihood of the interval's ends
        rate = successes / n
        low = 0.0 if successes == 0 else _crossing(successes, n, bound, inside=rate, outside=0.0)
        high = 1.0 if successes == n else _crossing(successes, n, bound, inside=rate, outside=1.0)
        return Rate(int(successes), int(n), low, high, self.confidence)


@dataclass(frozen=True)
class StopRule:
    """When an evaluation may end before its last episode; each limit that is None is not asked for.

    `half_width`: the interval is no wider than plus or minus this. `above`: the rate is surely above it. `below`: it is
    surely below it. The interval is that of a `ConfidenceSequence`, and must be reported with the rate: a Wilson
    interval does not hold after such a stop.
    """

    half_width: float | None = None
    above: float | None = None
    below: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.half_width is None and self.above is None and self.below is None:
            raise ValueError("StopRule: give half_width, above or below; without one it never stops")
        if self.half_width is not None and not 0 < self.half_width < 0.5:
            raise ValueError(f"StopRule: half_width must lie in (0, 0.5), got {self.half_width}")
        for name, value in (("above", self.above), ("below", self.below)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"StopRule: {name} is a success rate in [0, 1], got {value}")
        ConfidenceSequence(self.confidence)  # refuses a confidence that cannot be meant

    def should_stop(self, successes: int, n: int) -> str | None:
        """The reason to stop after the first `n` episodes in their declared order, or None to go on.

        Ask at every n in turn: who skips some stops at another one, and then the result depends on how it was run.
        """
        if n == 0:
            return None
        rate = ConfidenceSequence(self.confidence).interval(successes, n)
        if self.above is not None and rate.low > self.above:
            return f"the rate is above {self.above:g}: {rate}"
        if self.below is not None and rate.high < self.below:
            return f"the rate is below {self.below:g}: {rate}"
        if self.half_width is not None and (rate.high - rate.low) / 2 <= self.half_width:
            return f"the interval is within +-{self.half_width:g}: {rate}"
        return None

    def first_stop(self, outcomes: Iterable[bool]) -> tuple[int, str] | None:
        """The first n at which to stop and the reason, going through the episodes' `outcomes` in order."""
        successes = 0
        for n, success in enumerate(outcomes, start=1):
            successes += bool(success)
            reason = self.should_stop(successes, n)
            if reason is not None:
                return n, reason
        return None


@dataclass(frozen=True)
class PairedStopRule:
    """Ends a comparison of two policies on the same episodes as soon as one of them is surely better.

    Only episodes that just one of the two solves tell them apart; if the policies are equally good, either wins such
    an episode with probability 1/2. Two equally good policies are told apart with probability at most 1 - `confidence`,
    however often one asks.
    """

    confidence: float = 0.95

    def should_stop(self, only_first: int, only_second: int) -> str | None:
        """The reason to stop, or None to go on. `only_first`, `only_second`: episodes that just this one solved."""
        if only_first + only_second == 0:
            return None
        share = ConfidenceSequence(self.confidence).interval(only_second, only_first + only_second)
        if share.low <= 0.5 <= share.high:
            return None
        better = "second" if share.low > 0.5 else "first"
        return (
            f"the {better} policy is better: solved by the first alone {only_first}, by the second alone {only_second}"
        )


def _log_mixture(successes: int, n: int) -> float:
    """log of B(1/2 + s, 1/2 + n - s) / B(1/2, 1/2)."""
    return math.lgamma(successes + 0.5) + math.lgamma(n - successes + 0.5) - math.lgamma(n + 1) - math.log(math.pi)


def _log_likelihood(p: float, successes: int, n: int) -> float:
    """log of p^s (1-p)^(n-s); 0 log 0 is 0."""
    won = successes * math.log(p) if successes else 0.0
    return won + ((n - successes) * math.log1p(-p) if n > successes else 0.0)


def _crossing(successes: int, n: int, bound: float, *, inside: float, outside: float) -> float:
    """Where the log-likelihood, concave in p, falls to `bound` on the way to the end `outside` of [0, 1]."""
    for _ in range(60):
        middle = (inside + outside) / 2
        if not 0 < middle < 1:
            break
        if _log_likelihood(middle, successes, n) > bound:
            inside = middle
        else:
            outside = middle
    return outside  # the outer side of the last bracket: never too short
