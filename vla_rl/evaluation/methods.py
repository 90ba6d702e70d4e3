"""Compare methods by several training runs of each: what to expect of the next run, not which policy is better.

A comparison of two policies (`compare.py`) asks about these policies; another training seed gives others. Here the runs
of a method are its sample. All runs play the same episodes, and the intervals are those of `aggregate.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vla_rl.evaluation.aggregate import (
    Aggregate,
    Outcomes,
    hierarchical_bootstrap,
    hierarchical_difference,
    mean_scores,
    stratified_bootstrap,
)
from vla_rl.evaluation.compare import EpisodesDifferError, paired_episodes
from vla_rl.evaluation.result import CRITERIA, Episode, EvalResult


@dataclass(frozen=True)
class Method:
    """`outcomes`: of its runs, tasks and episodes, 0 or 1. `mean`: over runs of the mean over tasks of the success;
    `iqm`: interquartile mean over runs and tasks."""

    name: str
    outcomes: Outcomes
    mean: Aggregate
    iqm: Aggregate

    @property
    def runs(self) -> tuple[float, ...]:
        """Success of each run, a mean over tasks."""
        return tuple(mean_scores(self.outcomes).mean(axis=1).tolist())

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "runs": list(self.runs), "mean": self.mean.as_dict(), "iqm": self.iqm.as_dict()}


@dataclass(frozen=True)
class MethodDifference:
    """Success of `second` minus that of `first`. The intervals of all differences of a report hold together at its
    confidence (Bonferroni), so each of them is at a higher one."""

    first: str
    second: str
    difference: Aggregate

    @property
    def claim(self) -> Literal["better", "worse", "not told apart"]:
        """What may be said of the second one. Of a single run nothing: there is no sample of runs."""
        if self.difference.num_runs < 2 or self.difference.low <= 0 <= self.difference.high:
            return "not told apart"
        return "better" if self.difference.low > 0 else "worse"

    def as_dict(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second, "claim": self.claim, **self.difference.as_dict()}


@dataclass(frozen=True)
class MethodsComparison:
    """Several methods on the same tasks and episodes, each against the first. `num_episodes`: of each run, all tasks
    together. `notes`: what has to be said of the episodes that were compared."""

    criterion: str
    confidence: float
    tasks: tuple[str, ...]
    num_episodes: int
    methods: tuple[Method, ...]
    against_first: tuple[MethodDifference, ...]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(method.name for method in self.methods)

    def as_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "criterion": self.criterion,
            "confidence": self.confidence,
            "correction": "bonferroni",
            "tasks": list(self.tasks),
            "num_episodes": self.num_episodes,
            "methods": [method.as_dict() for method in self.methods],
            "against_first": [difference.as_dict() for difference in self.against_first],
            "notes": list(self.notes),
        }

    def format_table(self) -> str:
        """Text for a terminal."""
        width = max(len(name) for name in self.names)
        lines = [f"{self.criterion}, training runs of each method, the same {self.num_episodes} episodes"]
        lines += [f"{m.name:{width}}  mean {m.mean}  IQM {m.iqm.value:.3f}" for m in self.methods]
        for one in self.against_first:
            d = one.difference
            lines.append(f"{one.second} - {one.first}: {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]  {one.claim}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def under(self, share: float, end: Literal["low", "rate"] = "low") -> tuple[str, ...]:
        """Names of those after the first whose mean (`end="low"`: the lower end of its interval) is below `share`.
        Raises ValueError for a share outside [0, 1]."""
        if not 0 <= share <= 1:
            raise ValueError(f"the rate to reach must lie in [0, 1], got {share}; 80% is 0.8")
        return tuple(m.name for m in self.methods[1:] if (m.mean.low if end == "low" else m.mean.value) < share)


def compare_methods(
    results: Mapping[str, Sequence[EvalResult]],
    *,
    criterion: str = "success_once",
    confidence: float = 0.95,
    across_suites: bool = False,
) -> MethodsComparison:
    """`results`: name of a method -> one evaluation for each of its training runs; at least two methods.

    Raises as `compare`: every run must have played the episodes of the first one, except `across_suites`, where those
    that all runs share decide.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")
    if len(results) < 2 or not all(results.values()):
        raise ValueError(f"expected two methods or more with a run of each, got {[*results]}")
    keys, notes = _shared_episodes(results, across_suites)
    tasks = tuple(dict.fromkeys(task for task, _, _ in keys))
    methods = []
    for name, runs in results.items():
        outcomes = [_outcomes(run, keys, tasks, criterion) for run in runs]
        mean = hierarchical_bootstrap(outcomes, confidence=confidence)
        iqm = stratified_bootstrap(mean_scores(outcomes), confidence=confidence)
        methods.append(Method(name, outcomes, mean, iqm))
    together = 1 - (1 - confidence) / (len(methods) - 1)
    first = methods[0]
    differences = tuple(
        MethodDifference(
            first.name,
            m.name,
            hierarchical_difference(first.outcomes, m.outcomes, confidence=together, num_resamples=4000),
        )
        for m in methods[1:]
    )
    return MethodsComparison(criterion, confidence, tasks, len(keys), tuple(methods), differences, notes)


Key = tuple[str, str, int]


def _shared_episodes(
    results: Mapping[str, Sequence[EvalResult]], across_suites: bool
) -> tuple[list[Key], tuple[str, ...]]:
    """The episodes that decide, in the order of the first run, and what has to be said about them."""
    named = [(f"run {i} of {name}", run) for name, runs in results.items() for i, run in enumerate(runs)]
    (first_name, first), *others = named
    nominal: list[Episode] = [e for e in first.episodes if not e.condition] or list(first.episodes)
    keys, notes = [episode.key for episode in nominal], []
    for name, run in others:
        try:
            pairs, said = paired_episodes(first, run, names=(first_name, name), across_suites=across_suites)
        except EpisodesDifferError as error:
            error.add_note(f"{name} was compared with {first_name}")
            raise
        shared = {a.key for a, _ in pairs}
        keys = [key for key in keys if key in shared]
        notes += said
    if not keys:
        raise ValueError("the runs share no episode; evaluate all of them on one suite")
    return keys, tuple(notes)


def _outcomes(run: EvalResult, keys: Sequence[Key], tasks: Sequence[str], criterion: str) -> list[list[float]]:
    """[tasks][episodes] in the order of `keys`."""
    solved = {episode.key: float(getattr(episode, criterion)) for episode in run.episodes}
    return [[solved[key] for key in keys if key[0] == task] for task in tasks]
