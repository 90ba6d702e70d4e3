"""Aggregates over runs and tasks against scipy, hand computations and simulated studies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vla_rl.evaluation.aggregate import (
    hierarchical_bootstrap,
    hierarchical_difference,
    interquartile_mean,
    mean_scores,
    outcomes_of,
    performance_profile,
    stratified_bootstrap,
)
from vla_rl.evaluation.result import Episode, EvalResult


def _result(successes: dict[str, list[bool]]) -> EvalResult:
    episodes = tuple(
        Episode(task, seed, "go", success_once=s, success_at_end=False, length=5, episode_return=0.0, terminated=s)
        for task, outcomes in successes.items()
        for seed, s in enumerate(outcomes)
    )
    return EvalResult(episodes, {})


# ------------------------------------------------------------------------------------------------- interquartile mean
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (4, 1), (5, 7), (10, 26)])
def test_interquartile_mean_equals_scipys_trimmed_mean(shape):
    scores = np.random.default_rng(0).normal(size=shape)
    assert interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25, axis=None), abs=1e-12)


def test_interquartile_mean_by_hand_ignores_the_ends():
    assert interquartile_mean(np.arange(1, 9)) == 4.5  # of 3 4 5 6
    assert interquartile_mean(np.array([0.0, 0.2, 0.4, 99.0])) == pytest.approx(0.3)


def test_stratified_bootstrap_agrees_with_scipy_on_one_task():
    scores = np.random.default_rng(1).beta(5, 2, size=(24, 1))
    ours = stratified_bootstrap(scores, num_resamples=8000)
    theirs = stats.bootstrap(
        (scores[:, 0],), interquartile_mean, vectorized=False, method="percentile", n_resamples=8000,
        rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=0.006), pytest.approx(theirs.high, abs=0.006))
    assert ours.value == interquartile_mean(scores)
    assert (ours.num_runs, ours.num_tasks) == (24, 1)


def test_stratified_bootstrap_never_mixes_tasks():
    scores = np.stack([np.zeros(6), np.ones(6)], axis=1)  # tasks differ, runs do not
    fixed = stratified_bootstrap(scores, lambda s: float(s.mean()), num_resamples=200)
    assert (fixed.low, fixed.value, fixed.high) == (0.5, 0.5, 0.5)


def test_stratified_bootstrap_covers_the_truth():
    rng, hits = np.random.default_rng(3), 0
    tasks = rng.normal(size=8)
    for trial in range(300):
        scores = tasks + rng.normal(size=(10, 8))
        interval = stratified_bootstrap(scores, lambda s: float(s.mean()), num_resamples=300, seed=trial)
        hits += interval.low <= tasks.mean() <= interval.high
    assert 0.89 <= hits / 300 <= 0.98, hits / 300  # sqrt(1 - 1/10) of the width: percentile intervals of 10 runs


# ------------------------------------------------------------------------------------------------------------ profile
def test_performance_profile_by_hand():
    scores = np.array([[0.1, 0.9], [0.5, 0.9]])
    profile = performance_profile(scores, [0.0, 0.1, 0.5, 0.89, 1.0], num_resamples=4000)
    assert profile.fraction == (1.0, 0.75, 0.5, 0.5, 0.0)  # strictly above
    # Between .1 and .5 the first task's two runs give 0, 1 or 2 of 4 above, with chances 1/4, 1/2, 1/4.
    assert (profile.low[1], profile.high[1]) == (0.5, 1.0)
    assert (profile.low[3], profile.high[3]) == (0.5, 0.5)
    middle = performance_profile(scores, [0.3], num_resamples=4000, confidence=0.4)
    assert (middle.low[0], middle.high[0]) == (0.75, 0.75)


# -------------------------------------------------------------------------------------------- hierarchical bootstrap
def test_hierarchical_bootstrap_weighs_runs_and_tasks_alike():
    outcomes = [[[1, 1, 1, 1], [0, 0]], [[1], [0, 1]]]  # cells 1, 0 and 1, .5, whatever their sizes
    result = hierarchical_bootstrap(outcomes, num_resamples=50)
    assert result.value == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert (result.num_runs, result.num_tasks) == (2, 2)
    with pytest.raises(ValueError, match="the same tasks"):
        hierarchical_bootstrap([[[1.0]], [[1.0], [0.0]]])
    with pytest.raises(ValueError, match="at least one episode"):
        hierarchical_bootstrap([[[]]])


def test_hierarchical_bootstrap_of_one_run_and_task_is_the_plain_one():
    sample = np.random.default_rng(4).normal(size=60)
    ours = hierarchical_bootstrap([[sample]], num_resamples=6000)
    theirs = stats.bootstrap(
        (sample,), np.mean, method="percentile", n_resamples=6000, rng=np.random.default_rng(5)
    ).confidence_interval
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=0.015), pytest.approx(theirs.high, abs=0.015))


def test_hierarchical_bootstrap_has_the_variance_of_its_levels():
    # Cells without spread inside: only the level that differs gives width, and that of R draws of R values.
    runs = np.array([0.0, 0.2, 0.4, 0.9])
    by_run = hierarchical_bootstrap([[[r] * 5] * 3 for r in runs], num_resamples=4000)
    expected = 1.96 * runs.std() / math.sqrt(4)
    assert (by_run.high - by_run.low) / 2 == pytest.approx(expected, rel=0.1)
    tasks = [[[0.0] * 5, [1.0] * 5]] * 4
    assert hierarchical_bootstrap(tasks, num_resamples=200).low == 0.5
    sampled = hierarchical_bootstrap(tasks, tasks_are_sampled=True, num_resamples=200)
    assert (sampled.low, sampled.high) == (0.0, 1.0)  # either task may be drawn twice


def _coverage(num_runs: int, num_tasks: int, num_studies: int, *, tasks_are_sampled: bool) -> float:
    """Studies of `num_runs` runs whose success rates differ by run, task and both (standard deviations in logits)."""
    rng, hits = np.random.default_rng(6), 0

    def rates(runs: int, tasks: np.ndarray) -> np.ndarray:
        logit = 0.5 + 0.3 * rng.normal(size=(runs, 1)) + tasks + 0.3 * rng.normal(size=(runs, len(tasks)))
        return 1 / (1 + np.exp(-logit))

    anywhere = rates(2000, 0.8 * rng.normal(size=2000)).mean()
    for study in range(num_studies):
        tasks = 0.8 * rng.normal(size=num_tasks)
        truth = anywhere if tasks_are_sampled else rates(2000, tasks).mean()
        episodes = rng.random((20, num_runs, num_tasks)) < rates(num_runs, tasks)
        interval = hierarchical_bootstrap(
            episodes.transpose(1, 2, 0).astype(float),
            tasks_are_sampled=tasks_are_sampled,
            num_resamples=200,
            seed=study,
        )
        hits += interval.low <= truth <= interval.high
    return hits / num_studies


def test_hierarchical_bootstrap_covers_the_truth_with_ten_runs():
    assert 0.88 <= _coverage(10, 6, 100, tasks_are_sampled=False) <= 0.99


def test_hierarchical_difference_draws_the_same_episodes_for_both_methods():
    """Episodes that all runs solve or fail alike take no part in the difference, however much they differ."""
    hard = [[[0.0, 1.0] * 20, [1.0, 0.0, 0.0, 0.0]]] * 3
    found = hierarchical_difference(hard, hard, num_resamples=200)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    better = [[[1.0] * 40, [1.0] * 4]] * 2
    found = hierarchical_difference(hard, better, num_resamples=200)
    assert found.value == pytest.approx((0.5 + 0.75) / 2)
    assert (found.num_runs, found.num_tasks) == (2, 2)
    assert 0.3 < found.low < found.value < found.high < 0.95
    with pytest.raises(ValueError, match="the same episodes"):
        hierarchical_difference(hard, [[[1.0] * 40, [1.0] * 5]])
    with pytest.raises(ValueError, match="runs of both"):
        hierarchical_difference(hard, [])


def test_hierarchical_difference_has_the_variance_of_its_levels():
    first, second = np.array([0.0, 0.2, 0.4, 0.9]), np.array([0.1, 0.3, 0.8])
    of = [[[[r] * 5] for r in runs] for runs in (first, second)]
    found = hierarchical_difference(of[0], of[1], num_resamples=6000)
    expected = 1.96 * math.sqrt(first.var() / 4 + second.var() / 3)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)
    outcomes = np.random.default_rng(7).random((2, 80)) < [[0.3], [0.6]]  # one run each: episodes in pairs alone
    paired = hierarchical_difference([[outcomes[0]]], [[outcomes[1]]], num_resamples=6000)
    theirs = stats.bootstrap(
        (outcomes[1].astype(float) - outcomes[0],), np.mean, method="percentile", n_resamples=6000,
        rng=np.random.default_rng(8),
    ).confidence_interval  # fmt: skip
    assert (paired.low, paired.high) == (pytest.approx(theirs.low, abs=0.02), pytest.approx(theirs.high, abs=0.02))


def test_hierarchical_difference_covers_the_truth_with_ten_runs():
    rng, hits = np.random.default_rng(9), 0
    for study in range(100):
        hardness = rng.normal(size=(1, 25))  # of episodes that both methods play
        runs = [shift + 0.5 * rng.normal(size=(10, 1)) + hardness for shift in (0.0, 0.7)]
        outcomes = [(rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)[:, None] for logits in runs]
        many = [shift + 0.5 * rng.normal(size=(1000, 1)) + rng.normal(size=(1, 1000)) for shift in (0.0, 0.7)]
        truth = np.mean(1 / (1 + np.exp(-many[1]))) - np.mean(1 / (1 + np.exp(-many[0])))
        found = hierarchical_difference(outcomes[0], outcomes[1], num_resamples=200, seed=study)
        hits += found.low <= truth <= found.high
    assert 0.87 <= hits / 100 <= 0.99, hits / 100


@pytest.mark.slow
@pytest.mark.parametrize(("num_runs", "tasks_are_sampled", "low", "high"), [
    (3, False, 0.78, 0.93), (5, False, 0.87, 0.97), (10, False, 0.91, 0.98), (10, True, 0.87, 0.97),
])  # fmt: skip
def test_coverage_of_the_hierarchical_bootstrap_that_the_documents_state(num_runs, tasks_are_sampled, low, high):
    covered = _coverage(num_runs, 10, 600, tasks_are_sampled=tasks_are_sampled)
    assert low <= covered <= high, covered


# ------------------------------------------------------------------------------------------------------- evaluations
def test_outcomes_of_evaluations():
    first = _result({"reach": [True, False, True, True], "press": [False, False]})
    second = _result({"press": [True, False], "reach": [False, False, False, True]})
    names, outcomes = outcomes_of([first, second])
    assert names == ("reach", "press")
    np.testing.assert_array_equal(mean_scores(outcomes), [[0.75, 0.0], [0.25, 0.5]])
    np.testing.assert_array_equal(mean_scores(outcomes_of([first], "success_at_end")[1]), [[0.0, 0.0]])
    with pytest.raises(ValueError, match="the same tasks"):
        outcomes_of([first, _result({"reach": [True]})])
    with pytest.raises(ValueError, match="criterion"):
        outcomes_of([first], "success")
    with pytest.raises(ValueError, match="finite scores"):
        stratified_bootstrap(np.zeros(3))
