"""Confidence sequences cover the truth at all times at once, which a Wilson interval that is peeked at does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special

from vla_rl.evaluation.statistics import wilson
from vla_rl.evaluation.stopping import ConfidenceSequence, PairedStopRule, StopRule


def _ever_missed(p: float, horizon: int, num_runs: int, interval) -> float:
    """Fraction of simulated evaluations in which the interval misses the true rate at some n up to `horizon`."""
    ends = {}
    counts = np.cumsum(np.random.default_rng(0).random((num_runs, horizon)) < p, axis=1)
    missed = np.zeros(num_runs, dtype=bool)
    for n in range(1, horizon + 1):
        for s in np.unique(counts[:, n - 1]).tolist():
            ends[s] = interval(s, n)
        missed |= np.array([not ends[s].low <= p <= ends[s].high for s in counts[:, n - 1].tolist()])
    return float(missed.mean())


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_the_sequence_covers_at_all_times_and_wilson_does_not(p):
    sequence = _ever_missed(p, 150, 600, ConfidenceSequence(0.9).interval)
    peeked = _ever_missed(p, 150, 600, lambda s, n: wilson(s, n, 0.9))
    assert sequence <= 0.10, sequence
    assert peeked > 0.4, peeked  # the promise was 10%


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.95])
def test_the_sequence_covers_at_all_times_for_long(p):
    missed = _ever_missed(p, 2000, 2000, ConfidenceSequence(0.95).interval)
    assert missed <= 0.05, missed


def test_the_mixture_is_a_martingale_by_enumeration():
    # The expectation of M_n over all outcomes of n episodes is 1 for every p: the exact statement behind the coverage.
    for p in (0.1, 0.5, 0.8):
        for n in (1, 7, 40):
            s = np.arange(n + 1)
            ways = special.binom(n, s)
            mixture = np.exp(special.betaln(0.5 + s, 0.5 + n - s) - special.betaln(0.5, 0.5))
            assert np.sum(ways * mixture) == pytest.approx(1.0)  # M_n p^s (1-p)^(n-s), summed: p cancels
            ends = [ConfidenceSequence().interval(k, n) for k in s.tolist()]
            missed = sum(w * p**k * (1 - p) ** (n - k) for k, w, e in zip(s, ways, ends, strict=True)
                         if not e.low <= p <= e.high)  # fmt: skip
            assert missed <= 0.05


@pytest.mark.parametrize(("successes", "n"), [(0, 30), (30, 30), (13, 40), (490, 500)])
def test_the_ends_solve_the_equation(successes, n):
    rate = ConfidenceSequence(0.95).interval(successes, n)
    mixture = special.betaln(0.5 + successes, 0.5 + n - successes) - special.betaln(0.5, 0.5)
    for end in (rate.low, rate.high):
        if 0 < end < 1:
            likelihood = special.xlogy(successes, end) + special.xlog1py(n - successes, -end)
            assert mixture - likelihood == pytest.approx(math.log(20), abs=1e-6)
    assert (rate.low == 0, rate.high == 1) == (successes == 0, successes == n)
    narrow = wilson(successes, n)
    assert rate.low <= narrow.low <= narrow.high <= rate.high  # holding at every n costs width
    with pytest.raises(ValueError, match="expected n >= 1"):
        ConfidenceSequence().interval(3, 2)


def test_stop_rule_stops_for_the_stated_reason_at_the_first_n():
    narrow = StopRule(half_width=0.1)
    outcomes = [i % 2 == 0 for i in range(1000)]
    stop = narrow.first_stop(outcomes)
    assert stop is not None
    n, reason = stop
    assert n == 298
    assert "within +-0.1" in reason
    assert narrow.should_stop(sum(outcomes[: n - 1]), n - 1) is None
    assert StopRule(above=0.5).first_stop([True] * 50) == (7, "the rate is above 0.5: 1.000 [0.521, 1.000] n=7")
    assert StopRule(below=0.5).first_stop([False] * 50)[0] == 7
    assert StopRule(above=0.5, below=0.2).first_stop([True, False] * 20) is None
    assert StopRule(above=0.5).should_stop(0, 0) is None


@pytest.mark.parametrize(
    ("values", "match"),
    [({}, "never stops"), ({"half_width": 0.6}, "half_width"), ({"above": 1.5}, "above"),
     ({"above": 0.5, "confidence": 1.0}, "confidence")],
)  # fmt: skip
def test_stop_rule_refuses_what_cannot_be_meant(values, match):
    with pytest.raises(ValueError, match=match):
        StopRule(**values)


def test_equal_policies_are_rarely_told_apart_and_different_ones_soon():
    rule, rng = PairedStopRule(), np.random.default_rng(1)

    def stops(share: float) -> np.ndarray:
        """Discordant pairs until the rule stops, 0 where it never does within 150."""
        out = []
        for second_wins in rng.random((200, 150)) < share:
            wins = np.cumsum(second_wins).tolist()
            out.append(next((d for d, w in enumerate(wins, 1) if rule.should_stop(d - w, w)), 0))
        return np.array(out)

    assert np.mean(stops(0.5) > 0) <= 0.05
    found = stops(0.8)
    assert np.mean(found > 0) > 0.97
    assert np.median(found[found > 0]) < 40
    assert rule.should_stop(0, 0) is None
    assert rule.should_stop(0, 6) is None
    assert rule.should_stop(0, 7).startswith("the second policy is better")
    assert rule.should_stop(7, 0).startswith("the first policy is better")
