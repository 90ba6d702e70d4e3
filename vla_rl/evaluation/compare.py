"""Compare two evaluations on the same episodes: every number here is paired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vla_rl.evaluation.result import CRITERIA, Episode, EvalResult
from vla_rl.evaluation.statistics import (
    Difference,
    Rate,
    mcnemar_exact,
    paired_bootstrap,
    paired_rate_difference,
    wilson,
)

_LISTED = 8


class EpisodesDifferError(ValueError):
    """Two evaluations were not made on the same episodes."""


@dataclass(frozen=True)
class PairedRates:
    """Two success rates on the same episodes.

    `only_first`, `only_second`: episodes that only one of them solved. `difference`: second minus first, Newcombe's
    interval. `p_value`: exact McNemar test that they succeed equally often.
    """

    first: Rate
    second: Rate
    both: int
    only_first: int
    only_second: int
    neither: int
    difference: Difference
    p_value: float

    @staticmethod
    def of(outcomes: list[tuple[bool, bool]], confidence: float) -> PairedRates:
        """From (first succeeded, second succeeded) of each episode."""
        n = len(outcomes)
        both, neither = outcomes.count((True, True)), outcomes.count((False, False))
        only_first, only_second = outcomes.count((True, False)), outcomes.count((False, True))
        return PairedRates(
            first=wilson(both + only_first, n, confidence),
            second=wilson(both + only_second, n, confidence),
            both=both,
            only_first=only_first,
            only_second=only_second,
            neither=neither,
            difference=paired_rate_difference(both, only_first, only_second, neither, confidence),
            p_value=mcnemar_exact(only_first, only_second),
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "first": self.first.as_dict(),
            "second": self.second.as_dict(),
            "both": self.both,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "neither": self.neither,
            **self.difference.as_dict(),
            "p_value": self.p_value,
        }


@dataclass(frozen=True)
class Comparison:
    """`second` against `first`. `notes`: settings in which the two evaluations differ."""

    names: tuple[str, str]
    criterion: str
    overall: PairedRates
    per_task: Mapping[str, PairedRates]
    length_difference: Difference
    return_difference: Difference
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "criterion": self.criterion,
            "overall": self.overall.as_dict(),
            "per_task": {task: rates.as_dict() for task, rates in self.per_task.items()},
            "length_difference": self.length_difference.as_dict(),
            "return_difference": self.return_difference.as_dict(),
            "notes": list(self.notes),
        }

    def format_table(self) -> str:
        """Text for a terminal."""
        first, second = self.names
        rows = [*self.per_task.items()] if len(self.per_task) > 1 else []
        rows.append(("all episodes", self.overall))
        width = max(len(name) for name, _ in rows)
        header = (
            f"{'':{width}}  {'n':>5}  {first[:20]:>20}  {second[:20]:>20}  {'difference (95% interval)':26}  {'p':>8}"
        )
        lines = [f"{self.criterion}, same episodes", header.replace("95%", f"{self.overall.first.confidence:.0%}")]
        for name, r in rows:
            a, b = f"{r.first.rate:.3f} ({r.first.successes})", f"{r.second.rate:.3f} ({r.second.successes})"
            lines.append(f"{name:{width}}  {r.first.n:5}  {a:>20}  {b:>20}  {r.difference!s:26}  {r.p_value:8.2g}")
        r = self.overall
        lines += [
            f"solved by both {r.both}, only by {first} {r.only_first}, only by {second} {r.only_second}, "
            f"by neither {r.neither}",
            f"episode length {self.length_difference} control steps, return {self.return_difference}",
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def compare(
    first: EvalResult,
    second: EvalResult,
    *,
    names: tuple[str, str] = ("first", "second"),
    criterion: str = "success_once",
    confidence: float = 0.95,
) -> Comparison:
    """Pair the episodes of two evaluations by task and seed.

    Raises EpisodesDifferError, listing what differs, where one of them has an episode that the other lacks or where a
    shared seed led to another instruction (then the environments were not the same).
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")
    pairs = _pairs(first, second, names)
    tasks: dict[str, list[tuple[bool, bool]]] = {}
    for a, b in pairs:
        tasks.setdefault(a.task, []).append((getattr(a, criterion), getattr(b, criterion)))
    return Comparison(
        names=names,
        criterion=criterion,
        overall=PairedRates.of([outcome for group in tasks.values() for outcome in group], confidence),
        per_task={task: PairedRates.of(group, confidence) for task, group in tasks.items()},
        length_difference=paired_bootstrap(
            [a.length for a, _ in pairs], [b.length for _, b in pairs], confidence=confidence
        ),
        return_difference=paired_bootstrap(
            [a.episode_return for a, _ in pairs], [b.episode_return for _, b in pairs], confidence=confidence
        ),
        notes=_differing_settings(first, second, names),
    )


def _pairs(first: EvalResult, second: EvalResult, names: tuple[str, str]) -> list[tuple[Episode, Episode]]:
    ours = {episode.key: episode for episode in first.episodes}
    theirs = {episode.key: episode for episode in second.episodes}
    problems = [
        f"only in {name}: {_listing(missing)}"
        for name, missing in zip(names, (ours.keys() - theirs.keys(), theirs.keys() - ours.keys()), strict=True)
        if missing
    ]
    changed = {key for key in ours.keys() & theirs.keys() if ours[key].instruction != theirs[key].instruction}
    if changed:
        problems.append(f"same seed but another instruction: {_listing(changed)}")
    if problems:
        raise EpisodesDifferError(
            "the evaluations are not of the same episodes; evaluate both with the same tasks and seeds. "
            + "; ".join(problems)
        )
    return [(ours[key], theirs[key]) for key in ours]


def _listing(keys: set[tuple[str, int]]) -> str:
    shown = ", ".join(f"{task} seed {seed}" for task, seed in sorted(keys)[:_LISTED])
    return shown + (f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else "")


def _differing_settings(first: EvalResult, second: EvalResult, names: tuple[str, str]) -> tuple[str, ...]:
    settings = sorted(first.config.keys() | second.config.keys())
    return tuple(
        f"{setting} is {first.config.get(setting)!r} in {names[0]} and {second.config.get(setting)!r} in {names[1]}"
        for setting in settings
        if first.config.get(setting) != second.config.get(setting)
    )
