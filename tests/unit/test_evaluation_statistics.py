"""Intervals and tests against scipy, published worked examples, and simulated coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vla_rl.evaluation.statistics import (
    detection_power,
    episodes_needed,
    holm,
    mcnemar_exact,
    minimum_detectable_difference,
    paired_bootstrap,
    paired_rate_difference,
    wilson,
)


# --------------------------------------------------------------------------------------------------------- Wilson
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 31), (123, 128), (490, 500)])
def test_wilson_equals_scipy(successes, n, confidence):
    ours = wilson(successes, n, confidence)
    theirs = stats.binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # the four examples of Newcombe (1998), Statistics in Medicine 17:857, table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_newcombes_worked_examples(successes, n, low, high):
    rate = wilson(successes, n)
    assert (rate.low, rate.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_ends_are_exact_at_the_edges():
    assert wilson(0, 50).low == 0.0
    assert wilson(50, 50).high == 1.0
    assert wilson(50, 50).low < 1.0
    assert wilson(0, 50).high > 0.0


@given(st.integers(1, 400), st.data())
@settings(deadline=None, max_examples=60)
def test_wilson_contains_the_rate_mirrors_and_shrinks(n, data):
    k = data.draw(st.integers(0, n))
    rate, mirrored, larger = wilson(k, n), wilson(n - k, n), wilson(4 * k, 4 * n)
    assert 0 <= rate.low <= rate.rate <= rate.high <= 1
    assert mirrored.low == pytest.approx(1 - rate.high, abs=1e-12)
    assert larger.high - larger.low < rate.high - rate.low


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9, 0.98])
def test_wilson_covers_the_truth(p):
    n, rng = 200, np.random.default_rng(0)
    counts = rng.binomial(n, p, size=4000)
    intervals = {int(k): wilson(int(k), n) for k in np.unique(counts)}
    covered = np.mean([intervals[int(k)].low <= p <= intervals[int(k)].high for k in counts])
    assert 0.93 <= covered <= 0.98, covered


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="wilson"):
        wilson(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_must_be_a_fraction(confidence):
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, confidence)


def test_a_rate_prints_with_its_n_and_interval():
    assert str(wilson(81, 263)) == "0.308 [0.255, 0.366] n=263"
    assert wilson(3, 4).as_dict()["success_rate"] == 0.75


# -------------------------------------------------------------------------------------------------------- McNemar
@given(st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None, max_examples=80)
def test_mcnemar_equals_the_binomial_test(only_first, only_second):
    expected = 1.0
    if only_first + only_second:
        expected = stats.binomtest(only_first, only_first + only_second, 0.5).pvalue
    assert mcnemar_exact(only_first, only_second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(only_first, only_second) == mcnemar_exact(only_second, only_first)


def test_mcnemar_by_hand():
    assert mcnemar_exact(0, 5) == 2 / 32
    assert mcnemar_exact(1, 5) == 2 * (1 + 6) / 64
    assert mcnemar_exact(4, 4) == 1.0
    assert mcnemar_exact(0, 0) == 1.0
    assert 0 < mcnemar_exact(0, 900) < 1e-200  # no overflow far out
    with pytest.raises(ValueError, match=">= 0"):
        mcnemar_exact(-1, 2)


def test_mcnemar_keeps_its_level():
    rng = np.random.default_rng(1)
    discordant = rng.binomial(100, 0.3, size=3000)
    only_first = rng.binomial(discordant, 0.5)
    p = np.array([mcnemar_exact(int(b), int(d - b)) for b, d in zip(only_first, discordant, strict=True)])
    assert np.mean(p <= 0.05) <= 0.055  # an exact test is conservative


# ----------------------------------------------------------------------------------------------- paired difference
@pytest.mark.parametrize("cells", [(0.5, 0.02, 0.4, 0.08), (0.9, 0.03, 0.05, 0.02), (0.3, 0.2, 0.2, 0.3)])
def test_paired_rate_difference_covers_the_truth(cells):
    truth = cells[2] - cells[1]
    tables = np.random.default_rng(2).multinomial(150, cells, size=3000)
    hits = 0
    for both, only_first, only_second, neither in tables.tolist():
        interval = paired_rate_difference(both, only_first, only_second, neither)
        hits += interval.low <= truth <= interval.high
    assert 0.935 <= hits / len(tables) <= 0.985, hits / len(tables)


def test_paired_rate_difference_by_hand():
    # n=20, 10 of 20 against 16 of 20. Wilson: [.2993, .7007] and [.5840, .9193].
    # Covariance 10*4 - 0*6 = 40, less n/2 = 30; phi = 30 / sqrt(10*10*16*4) = .375.
    result = paired_rate_difference(both=10, only_first=0, only_second=6, neither=4)
    first, second, phi = wilson(10, 20), wilson(16, 20), 0.375
    a, b = second.rate - second.low, first.high - first.rate
    c, d = second.high - second.rate, first.rate - first.low
    assert result.value == 0.3
    assert result.low == pytest.approx(0.3 - math.sqrt(a * a - 2 * phi * a * b + b * b), abs=1e-12)
    assert result.high == pytest.approx(0.3 + math.sqrt(c * c - 2 * phi * c * d + d * d), abs=1e-12)
    assert (first.low, second.high) == (pytest.approx(0.2993, abs=1e-4), pytest.approx(0.9193, abs=1e-4))


def test_paired_rate_difference_equals_newcombes_worked_example():
    # Newcombe (1998), Statistics in Medicine 17:2635, cells 36, 12, 2, 0: method 10 gives .0569 to .3404.
    result = paired_rate_difference(both=36, only_first=2, only_second=12, neither=0)
    assert (result.value, result.low, result.high) == (
        0.2,
        pytest.approx(0.0569, abs=5e-5),
        pytest.approx(0.3404, abs=5e-5),
    )


def test_paired_rate_difference_has_width_without_discordant_pairs():
    same = paired_rate_difference(both=40, only_first=0, only_second=0, neither=10)
    assert same.value == 0
    assert same.low < 0 < same.high
    perfect = paired_rate_difference(both=50, only_first=0, only_second=0, neither=0)
    assert -0.12 < perfect.low < 0 < perfect.high < 0.12


@given(*[st.integers(0, 40)] * 4)
@settings(deadline=None, max_examples=60)
def test_paired_rate_difference_changes_sign_when_swapped(both, only_first, only_second, neither):
    if both + only_first + only_second + neither == 0:
        return
    one = paired_rate_difference(both, only_first, only_second, neither)
    other = paired_rate_difference(both, only_second, only_first, neither)
    assert -1 <= one.low <= one.value <= one.high <= 1
    assert (one.low, one.high) == (pytest.approx(-other.high, abs=1e-12), pytest.approx(-other.low, abs=1e-12))


# ------------------------------------------------------------------------------------------------------- bootstrap
def test_paired_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(3)
    first = rng.normal(10, 3, size=80)
    second = first + rng.normal(1.0, 0.5, size=80)
    ours = paired_bootstrap(first, second, num_resamples=20_000)
    theirs = stats.bootstrap(
        (second - first,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(9)
    ).confidence_interval
    assert ours.value == pytest.approx(float(np.mean(second - first)))
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=0.01), pytest.approx(theirs.high, abs=0.01))
    assert ours.high - ours.low < 0.4  # pairing removes the spread of 3 between episodes


def test_paired_bootstrap_is_repeatable_and_blockwise_equal():
    x, y = np.arange(50.0), np.arange(50.0) ** 1.1
    assert paired_bootstrap(x, y, seed=4) == paired_bootstrap(x, y, seed=4)
    assert paired_bootstrap(x, y, seed=4) != paired_bootstrap(x, y, seed=5)


def test_paired_bootstrap_covers_the_truth():
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(400):
        first = rng.exponential(2.0, size=60)
        second = first + rng.exponential(1.0, size=60)
        interval = paired_bootstrap(first, second, num_resamples=400, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.90 <= hits / 400 <= 0.98, hits / 400


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [([1.0], [1.0, 2.0], "one length"), ([], [], "one length"), ([1.0, math.nan], [1.0, 2.0], "finite")],
)
def test_paired_bootstrap_refuses_bad_input(first, second, match):
    with pytest.raises(ValueError, match=match):
        paired_bootstrap(first, second)


# ------------------------------------------------------------------------------------------------ several tests at once
def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])  # R: p.adjust
    assert holm([0.4, 0.9]) == [0.8, 0.9]
    assert holm([0.7, 0.8, 0.9]) == [1.0, 1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.2, 1.5])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_holm_is_the_closed_test_of_bonferroni(p_values):
    # Marcus, Peritz and Gabriel (1976): reject a hypothesis where every set that contains it is rejected.
    sets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(range(len(p_values)), size)]
    for i, adjusted in enumerate(holm(p_values)):
        closed = max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s)
        assert adjusted == pytest.approx(closed)


def test_holm_keeps_the_level_of_the_family_where_single_tests_do_not():
    rng = np.random.default_rng(7)
    p = stats.norm.sf(rng.normal(size=(4000, 10)) + 2.5 * (np.arange(10) < 3))  # three real effects, seven none
    false_single = np.mean((p[:, 3:] <= 0.05).any(axis=1))
    false_holm = np.mean([min(holm(row.tolist())[3:]) <= 0.05 for row in p])
    assert false_single > 0.25
    assert false_holm <= 0.055


# --------------------------------------------------------------------------------------------- planning a comparison
@pytest.mark.parametrize(("base", "other", "needed"), [(0.6, 0.7, 356), (0.1, 0.2, 199), (0.5, 0.6, 388)])
def test_unpaired_episodes_needed_equals_the_published_sizes(base, other, needed):
    # n per group without continuity correction, 80% power at 5%: the standard table of Fleiss, Levin and Paik.
    assert episodes_needed(other - base, base_rate=other if base > 0.5 else base, paired=False) == needed


def test_paired_power_by_hand():
    # Six episodes, all discordant, all for the better policy: p = 2/64, and with five p = 2/32 is not significant.
    assert detection_power(6, 1.0, base_rate=0.0) == pytest.approx(1.0)
    assert detection_power(5, 1.0, base_rate=0.0) == 0.0
    assert detection_power(6, 0.5, discordance=0.5) == pytest.approx(0.5**6)  # each episode is discordant or not


@pytest.mark.parametrize(("n", "base", "difference", "discordance"), [(60, 0.5, 0.3, None), (150, 0.4, 0.1, 0.15)])
def test_paired_power_equals_a_simulation_of_the_test(n, base, difference, discordance):
    other = base + difference
    psi = base * (1 - other) + other * (1 - base) if discordance is None else discordance
    only_second, only_first = (psi + difference) / 2, (psi - difference) / 2
    counts = np.random.default_rng(8).multinomial(n, [only_first, only_second, 1 - psi], size=4000)
    found = np.mean([b < c and mcnemar_exact(int(b), int(c)) <= 0.05 for b, c, _ in counts])
    power = detection_power(n, difference, base_rate=base, discordance=discordance)
    assert power == pytest.approx(found, abs=3 * math.sqrt(0.25 / 4000))


def test_unpaired_power_equals_a_simulation_of_the_test():
    n, p, q = 200, 0.5, 0.65
    counts = np.random.default_rng(9).binomial(n, [p, q], size=(4000, 2))
    pooled = counts.sum(axis=1) / (2 * n)
    z = (counts[:, 1] - counts[:, 0]) / n / np.sqrt(2 * pooled * (1 - pooled) / n)
    power = detection_power(n, q - p, base_rate=p, paired=False)
    assert power == pytest.approx(np.mean(z > stats.norm.ppf(0.975)), abs=0.025)


def test_minimum_detectable_difference_and_its_inverse():
    for n in (60, 256):
        for discordance in (None, 0.2):
            difference = minimum_detectable_difference(n, discordance=discordance)
            assert difference is not None
            assert detection_power(n, difference, discordance=discordance) == pytest.approx(0.8, abs=1e-3)
            assert abs(episodes_needed(difference, discordance=discordance) - n) <= 3  # the exact test moves in steps
    # pairing and similar policies both make a difference easier to see
    assert minimum_detectable_difference(256) == pytest.approx(0.1266, abs=5e-4)
    assert minimum_detectable_difference(256, discordance=0.1) == pytest.approx(0.0572, abs=5e-4)
    assert minimum_detectable_difference(256, paired=False) == pytest.approx(0.1226, abs=5e-4)
    assert minimum_detectable_difference(5) is None
    # a loss from .9 and a gain from .1 are the same thing
    assert minimum_detectable_difference(100, base_rate=0.9) == minimum_detectable_difference(100, base_rate=0.1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: detection_power(0, 0.1), "n must"),
        (lambda: detection_power(50, 0.6), "expected"),
        (lambda: detection_power(50, 0.1, base_rate=1.2), "base_rate"),
        (lambda: detection_power(50, 0.1, discordance=1.2), "discordance"),
        (lambda: detection_power(50, 0.1, discordance=0.2, paired=False), "discordance"),
        (lambda: minimum_detectable_difference(50, power=1.0), "power"),
        (lambda: episodes_needed(1e-4, paired=False), "more than"),
    ],
)
def test_planning_refuses_what_cannot_be_meant(call, match):
    with pytest.raises(ValueError, match=match):
        call()
