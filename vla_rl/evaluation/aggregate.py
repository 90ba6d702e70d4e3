"""Numbers over several training runs (seeds) and tasks: what to expect of a method, not of one of its policies.

Interquartile mean and performance profile with stratified bootstrap intervals: Agarwal et al. (2021), Deep
Reinforcement Learning at the Edge of the Statistical Precipice, arXiv 2108.13264. The hierarchical bootstrap resamples
runs, then episodes within runs and tasks, and tasks too where the claim is about others than these.

Few runs are few: a 95% interval of the hierarchical bootstrap covered the truth in 85% of simulated studies of 3 runs,
in 89% of those of 5 and in 93% of those of 10 (ten tasks; docs/statistics.md). No resampling makes up for runs that
were not made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vla_rl.evaluation.result import CRITERIA, EvalResult

Outcomes = Sequence[Sequence[Sequence[float] | np.ndarray]]
"""[runs][tasks] -> the numbers of that run's episodes of that task, as many as there are."""


@dataclass(frozen=True)
class Aggregate:
    """A number over `num_runs` runs and `num_tasks` tasks, with a bootstrap interval at `confidence`."""

    value: float
    low: float
    high: float
    num_runs: int
    num_tasks: int
    confidence: float = 0.95

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] runs={self.num_runs} tasks={self.num_tasks}"


@dataclass(frozen=True)
class Profile:
    """Performance profile: `fraction[i]` of all (run, task) scores lie above `thresholds[i]`; pointwise intervals."""

    thresholds: tuple[float, ...]
    fraction: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    confidence: float = 0.95

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def outcomes_of(results: Sequence[EvalResult], criterion: str = "success_once") -> tuple[tuple[str, ...], Outcomes]:
    """Task names, and the episodes' outcomes (0 or 1) of each run and task; `results`: one evaluation a run.

    Raises ValueError where the runs were evaluated on different tasks.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")
    groups: list[dict[str, list[float]]] = []
    for result in results:
        tasks: dict[str, list[float]] = {}
        for episode in result.episodes:
            tasks.setdefault(episode.task, []).append(float(getattr(episode, criterion)))
        groups.append(tasks)
    names = tuple(groups[0]) if groups else ()
    for i, tasks in enumerate(groups):
        if set(tasks) != set(names):
            raise ValueError(f"run {i} was evaluated on {sorted(tasks)}, run 0 on {sorted(names)}; use the same tasks")
    return names, [[tasks[name] for name in names] for tasks in groups]


def mean_scores(outcomes: Outcomes) -> np.ndarray:
    """Mean of each run and task: float64 [R, T]. Raises ValueError where one is missing or not finite."""
    counts = {len(run) for run in outcomes}
    if len(counts) != 1 or 0 in counts or any(len(cell) == 0 for run in outcomes for cell in run):
        raise ValueError("expected at least one run, the same tasks in each, and at least one episode of each task")
    scores = np.array([[np.mean(cell) for cell in run] for run in outcomes], dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite; look for NaN or infinite returns in the episodes")
    return scores


def interquartile_mean(scores: np.ndarray) -> float:
    """Mean of the middle half of all `scores` (any shape): floor(n/4) are left out at either end."""
    ordered = np.sort(np.asarray(scores, dtype=np.float64), axis=None)
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def stratified_bootstrap(
    scores: np.ndarray,
    statistic: Callable[[np.ndarray], float] = interquartile_mean,
    *,
    num_resamples: int = 5000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Aggregate:
    """`statistic` of `scores [R, T]` (runs, tasks), with a percentile interval that resamples runs within each task.

    The tasks are taken as given. Raises ValueError for scores of another shape or not finite.
    """
    scores = _checked_scores(scores)
    values = np.array([statistic(sample) for sample in _stratified(scores, num_resamples, seed)])
    low, high = _ends(values, confidence)
    return Aggregate(statistic(scores), float(low), float(high), len(scores), scores.shape[1], confidence)


def performance_profile(
    scores: np.ndarray,
    thresholds: Sequence[float],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Profile:
    """How many of the scores [R, T] exceed each threshold, with the intervals of `stratified_bootstrap`."""
    scores, levels = _checked_scores(scores), np.asarray(thresholds, dtype=np.float64)
    values = np.stack([_above(sample, levels) for sample in _stratified(scores, num_resamples, seed)])
    low, high = _ends(values, confidence)
    levels, fraction, low, high = (tuple(x.tolist()) for x in (levels, _above(scores, levels), low, high))
    return Profile(levels, fraction, low, high, confidence)


def hierarchical_bootstrap(
    outcomes: Outcomes,
    *,
    tasks_are_sampled: bool = False,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Aggregate:
    """Mean over runs of the mean over tasks of the mean over episodes, with a percentile interval of all that varies.

    Runs are resampled, and the episodes of every run and task within it. `tasks_are_sampled`: the claim is about tasks
    like these, not about these, so tasks are resampled too, the same ones for all runs since all runs share them.
    Raises ValueError where a run lacks a task or an episode.
    """
    scores = mean_scores(outcomes)
    num_runs, num_tasks = scores.shape
    sizes = np.array([[len(cell) for cell in run] for run in outcomes])
    padded = np.zeros((num_runs, num_tasks, sizes.max()))
    for r, run in enumerate(outcomes):
        for t, cell in enumerate(run):
            padded[r, t, : len(cell)] = cell
    rng, values = np.random.default_rng(seed), np.empty(num_resamples)
    position = np.arange(sizes.max())
    for i in range(num_resamples):
        runs = rng.integers(num_runs, size=(num_runs, 1))
        tasks = rng.integers(num_tasks, size=(1, num_tasks)) if tasks_are_sampled else np.arange(num_tasks)[None]
        size = sizes[runs, tasks][..., None]
        drawn = (rng.random((num_runs, num_tasks, sizes.max())) * size).astype(np.int64)
        sums = np.where(position < size, padded[runs[..., None], tasks[..., None], drawn], 0.0).sum(axis=2)
        values[i] = (sums / size[..., 0]).mean()
    low, high = _ends(values, confidence)
    return Aggregate(float(scores.mean()), float(low), float(high), num_runs, num_tasks, confidence)


def hierarchical_difference(
    first: Outcomes,
    second: Outcomes,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Aggregate:
    """Mean of `second` minus mean of `first`, two methods whose runs all played the same episodes of the same tasks.

    Means and interval as in `hierarchical_bootstrap`, except that the episodes are drawn once for all runs of both: how
    hard an episode is takes part in neither side alone. `num_runs` of the result is that of the method with fewer.
    Raises ValueError where a run lacks a task or an episode of it.
    """
    runs = (*first, *second)
    shape = [len(cell) for cell in runs[0]] if runs else []
    same = all([len(cell) for cell in run] == shape for run in runs)
    if not len(first) or not len(second) or not same or 0 in (len(shape), *shape):
        raise ValueError("expected runs of both methods, with the same tasks and the same episodes of each task")
    rng = np.random.default_rng(seed)
    cells = [np.array([run[task] for run in runs], dtype=np.float64) for task in range(len(shape))]  # [R, E] of each
    means = np.empty((num_resamples, len(runs)))
    for i in range(num_resamples):
        means[i] = np.mean([cell[:, rng.integers(cell.shape[1], size=cell.shape[1])].mean(1) for cell in cells], axis=0)
    sides = []
    for rows, size in ((means[:, : len(first)], len(first)), (means[:, len(first) :], len(second))):
        sides.append(np.take_along_axis(rows, rng.integers(size, size=rows.shape), axis=1).mean(axis=1))
    low, high = _ends(sides[1] - sides[0], confidence)
    value = mean_scores(second).mean() - mean_scores(first).mean()
    fewer = min(len(first), len(second))
    return Aggregate(float(value), float(low), float(high), fewer, len(shape), confidence)


def _stratified(scores: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """[num_resamples, R, T]: each task's runs drawn again, independently of the other tasks."""
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    runs = np.random.default_rng(seed).integers(scores.shape[0], size=(num_resamples, *scores.shape))
    return scores[runs, np.arange(scores.shape[1])]


def _above(scores: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return (scores[..., None] > levels).mean(axis=(0, 1))


def _ends(values: np.ndarray, confidence: float) -> np.ndarray:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}; 0.95 is customary")
    return np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)


def _checked_scores(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(f"expected finite scores [runs, tasks], got an array {scores.shape}")
    return scores
