"""Compare two evaluations on the same episodes: every number here is paired."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vla_rl.evaluation.result import CRITERIA, Episode, EvalResult
from vla_rl.evaluation.statistics import (
    Difference,
    Rate,
    holm,
    mcnemar_exact,
    paired_bootstrap,
    paired_rate_difference,
    wilson,
)

NOMINAL = "nominal"
_LISTED = 8
_NOT_SETTINGS = {"suite", "provenance", "command"}  # the suite has an error of its own


class EpisodesDifferError(ValueError):
    """Two evaluations were not made on the same episodes."""


class SuitesDifferError(EpisodesDifferError):
    """Two evaluations were made on suites that are not the same."""


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
    """`second` against `first`.

    `overall` and `per_task` are over the episodes that decide: those without a condition where there are any, else all.
    `per_condition` has the others too, "" being none; it is in the order of first appearance. `length_difference`
    (control steps) and `return_difference` are over the episodes that decide. `notes`: what differs besides the policy.
    """

    names: tuple[str, str]
    criterion: str
    overall: PairedRates
    per_task: Mapping[str, PairedRates]
    per_condition: Mapping[str, PairedRates]
    length_difference: Difference
    return_difference: Difference
    notes: tuple[str, ...]

    @property
    def decided_by(self) -> str:
        """Which episodes `overall` is over."""
        return "all nominal" if "" in self.per_condition and len(self.per_condition) > 1 else "all episodes"

    def as_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "criterion": self.criterion,
            "overall": self.overall.as_dict(),
            "per_task": {task: rates.as_dict() for task, rates in self.per_task.items()},
            "per_condition": {condition: rates.as_dict() for condition, rates in self.per_condition.items()},
            "length_difference": self.length_difference.as_dict(),
            "return_difference": self.return_difference.as_dict(),
            "notes": list(self.notes),
        }

    def format_table(self) -> str:
        """Text for a terminal."""
        first, second = self.names
        rows = [*self.per_task.items()] if len(self.per_task) > 1 else []
        rows += [*self.per_condition.items()] if len(self.per_condition) > 1 else []
        rows = [(name or NOMINAL, rates) for name, rates in rows] + [(self.decided_by, self.overall)]
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


@dataclass(frozen=True)
class PairTest:
    """Two of several evaluations. `p_holm`: the p-value of `rates` after Holm's correction over all pairs."""

    first: str
    second: str
    rates: PairedRates
    p_holm: float

    def as_dict(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second, **self.rates.as_dict(), "p_holm": self.p_holm}


@dataclass(frozen=True)
class Comparisons:
    """Several evaluations of the same episodes: each against the first, and every pair with its corrected test."""

    names: tuple[str, ...]
    criterion: str
    confidence: float
    against_first: tuple[Comparison, ...]
    pairs: tuple[PairTest, ...]
    across_suites: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "criterion": self.criterion,
            "confidence": self.confidence,
            "correction": "holm",
            "across_suites": self.across_suites,
            "against_first": [comparison.as_dict() for comparison in self.against_first],
            "pairs": [pair.as_dict() for pair in self.pairs],
        }

    def format_table(self) -> str:
        """Text for a terminal."""
        parts = [comparison.format_table() for comparison in self.against_first]
        if len(self.pairs) > 1:
            width = max(len(f"{pair.second} - {pair.first}") for pair in self.pairs)
            parts.append(f"exact McNemar tests, Holm's correction over {len(self.pairs)}")
            parts[-1] += "".join(
                f"\n{f'{pair.second} - {pair.first}':{width}}  {pair.rates.difference!s:26}  "
                f"p {pair.rates.p_value:8.2g}  corrected {pair.p_holm:8.2g}"
                for pair in self.pairs
            )
        return "\n\n".join(parts)

    def under(self, share: float, end: Literal["low", "rate"] = "low") -> tuple[str, ...]:
        """Names of those after the first whose success rate (`end="low"`: the lower end of its interval) is below
        `share`. Raises ValueError for a share outside [0, 1]."""
        if not 0 <= share <= 1:
            raise ValueError(f"the rate to reach must lie in [0, 1], got {share}; 80% is 0.8")
        seconds = [(comparison.names[1], comparison.overall.second) for comparison in self.against_first]
        return tuple(name for name, rate in seconds if getattr(rate, end) < share)


def compare(
    first: EvalResult,
    second: EvalResult,
    *,
    names: tuple[str, str] = ("first", "second"),
    criterion: str = "success_once",
    confidence: float = 0.95,
    across_suites: bool = False,
) -> Comparison:
    """Pair the episodes of two evaluations by task, condition and seed.

    `across_suites`: pair what two different suites share, and say so in `notes`.

    Raises SuitesDifferError for suites of different hashes, and EpisodesDifferError, listing what differs, where one of
    them has an episode that the other lacks or where a shared seed led to another instruction (then the environments
    were not the same).
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")
    pairs, notes = paired_episodes(first, second, names=names, across_suites=across_suites)
    deciding = [pair for pair in pairs if not pair[0].condition] or pairs
    return Comparison(
        names=names,
        criterion=criterion,
        overall=_rates(deciding, criterion, confidence),
        per_task={task: _rates(p, criterion, confidence) for task, p in _groups(deciding, "task").items()},
        per_condition={c: _rates(p, criterion, confidence) for c, p in _groups(pairs, "condition").items()},
        length_difference=paired_bootstrap(
            [a.length for a, _ in deciding], [b.length for _, b in deciding], confidence=confidence
        ),
        return_difference=paired_bootstrap(
            [a.episode_return for a, _ in deciding], [b.episode_return for _, b in deciding], confidence=confidence
        ),
        notes=(*notes, *_differing_settings(first, second, names)),
    )


def compare_all(
    results: Mapping[str, EvalResult],
    *,
    criterion: str = "success_once",
    confidence: float = 0.95,
    across_suites: bool = False,
) -> Comparisons:
    """Each of `results` (name -> evaluation, at least two) against the first, and all pairs with Holm's correction."""
    if len(results) < 2:
        raise ValueError(f"a comparison needs at least two evaluations, got {len(results)}")
    done = {
        (a, b): compare(
            results[a],
            results[b],
            names=(a, b),
            criterion=criterion,
            confidence=confidence,
            across_suites=across_suites,
        )
        for a, b in itertools.combinations(results, 2)
    }
    corrected = holm([comparison.overall.p_value for comparison in done.values()])
    first = next(iter(results))
    return Comparisons(
        names=tuple(results),
        criterion=criterion,
        confidence=confidence,
        against_first=tuple(comparison for (a, _), comparison in done.items() if a == first),
        pairs=tuple(
            PairTest(a, b, comparison.overall, p)
            for ((a, b), comparison), p in zip(done.items(), corrected, strict=True)
        ),
        across_suites=across_suites,
    )


Pairs = list[tuple[Episode, Episode]]


def paired_episodes(
    first: EvalResult, second: EvalResult, *, names: tuple[str, str], across_suites: bool = False
) -> tuple[Pairs, tuple[str, ...]]:
    """The episodes that both evaluations have, in the order of the first, and what has to be said about them.

    Raises as `compare`.
    """
    ours = {episode.key: episode for episode in first.episodes}
    theirs = {episode.key: episode for episode in second.episodes}
    missing = (ours.keys() - theirs.keys(), theirs.keys() - ours.keys())
    problems = [f"only in {name}: {_listing(keys)}" for name, keys in zip(names, missing, strict=True) if keys]
    changed = {key for key in ours.keys() & theirs.keys() if ours[key].instruction != theirs[key].instruction}
    if changed:
        problems.append(f"same seed but another instruction: {_listing(changed)}")
    suites = tuple(_suite(result) for result in (first, second))
    if suites[0] == suites[1] and problems:
        raise EpisodesDifferError(
            "the evaluations are not of the same episodes; evaluate both with the same tasks and seeds. "
            + "; ".join(problems)
        )
    if suites[0] != suites[1] and not across_suites:
        raise SuitesDifferError(
            f"{names[0]} was evaluated on {suites[0]} and {names[1]} on {suites[1]}: other episodes or other rules. "
            "Evaluate both on one suite; --across-suites compares the episodes they share, and labels it"
        )
    pairs = [(ours[key], theirs[key]) for key in ours if key in theirs and key not in changed]
    if not pairs:
        raise EpisodesDifferError("the evaluations share no episode. " + "; ".join(problems))
    if suites[0] == suites[1]:
        return pairs, ()
    left_out = len(ours.keys() | theirs.keys()) - len(pairs)
    return pairs, (
        f"ACROSS SUITES: {names[0]} was evaluated on {suites[0]} and {names[1]} on {suites[1]}; {len(pairs)} episodes "
        f"are shared, {left_out} others are left out",
    )


def _suite(result: EvalResult) -> str:
    suite = result.config.get("suite")
    return f"suite {suite['name']} v{suite['version']} ({suite['hash'][:12]})" if suite else "no declared suite"


def _groups(pairs: Pairs, column: str) -> dict[str, Pairs]:
    groups: dict[str, Pairs] = {}
    for pair in pairs:
        groups.setdefault(getattr(pair[0], column), []).append(pair)
    return groups


def _rates(pairs: Pairs, criterion: str, confidence: float) -> PairedRates:
    return PairedRates.of([(getattr(a, criterion), getattr(b, criterion)) for a, b in pairs], confidence)


def _listing(keys: set[tuple[str, str, int]]) -> str:
    shown = ", ".join(f"{task}{f' {c}' if c else ''} seed {seed}" for task, c, seed in sorted(keys)[:_LISTED])
    return shown + (f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else "")


def _differing_settings(first: EvalResult, second: EvalResult, names: tuple[str, str]) -> tuple[str, ...]:
    settings = sorted((first.config.keys() | second.config.keys()) - _NOT_SETTINGS)
    return tuple(
        f"{setting} is {first.config.get(setting)!r} in {names[0]} and {second.config.get(setting)!r} in {names[1]}"
        for setting in settings
        if first.config.get(setting) != second.config.get(setting)
    )
