"""Run a suite: every episode once, in any number of processes, through any number of kills, with one result.

    run_suite(suite, StoredPolicy(folder), out, HarnessConfig(num_envs=16, workers=2), resume=True)

An episode is decided by its case and its seed (see `evaluate.py`), so it does not matter who runs it and when. The
process that was started keeps the journal and decides when to stop: by the longest finished beginning of each case, in
declared order, so that stopping does not depend on who was faster either.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_rl.evaluation.evaluate import Finished, result_of
from vla_rl.evaluation.journal import Journal
from vla_rl.evaluation.policies import Actor, ReadyPolicy
from vla_rl.evaluation.result import EvalResult, all_stages
from vla_rl.evaluation.statistics import minimum_detectable_difference
from vla_rl.evaluation.stopping import StopRule
from vla_rl.evaluation.suite import Suite, SuiteCase
from vla_rl.evaluation.workers import HarnessConfig, Job, run_job
from vla_rl.progress import Progress


def run_suite(
    suite: Suite,
    actor: Actor,
    out: Path | None,
    config: HarnessConfig,
    *,
    resume: bool = False,
    progress: bool = True,
) -> EvalResult:
    """Evaluate `actor` on `suite`, and save the result, its videos and its journal in `out` (None: nowhere).

    `resume`: go on with what a killed evaluation left in `out`. Raises JournalError where `out` holds another
    evaluation, RuntimeError where every episode was lost, and as `evaluate` and the environments do.
    """
    if config.workers > 1 and isinstance(actor, ReadyPolicy):
        raise ValueError("a policy that lives in this process cannot be asked by other workers; give its folder")
    journal = None
    if out is not None:
        identity = {**actor.identity, "suite": suite.describe(), **config.protocol()}
        journal = Journal(out, identity, resume=resume)
    collected = _Collected(suite, config.stop, journal, progress)
    try:
        todo = collected.todo()
        if any(todo.values()):
            run_job(Job(suite, actor, out, config), todo, collected.add)
        result = collected.result({**actor.identity, "suite": suite.describe(), **suite.settings()})
    finally:
        if journal is not None:
            journal.close()
    if out is not None:
        result.save(out)
    return result


def describe_precision(suite: Suite) -> str:
    """What so many episodes can show, before any is run."""

    def find(n: int) -> str:
        least = minimum_detectable_difference(n)
        return "no difference" if least is None else f"{least:.1%}"

    sizes = sorted({case.num_episodes for case in suite.cases})
    total = suite.num_episodes
    parts = [f"{find(n)} with the {n} episodes of one case" for n in sizes] if len(suite.cases) > 1 else []
    parts.append(f"{find(total)} with all {total} episodes")
    return (
        f"suite {suite.name} v{suite.version} ({suite.describe()['hash'][:12]}, {suite.protocol}): {len(suite.cases)} "
        f"case{'s' if len(suite.cases) > 1 else ''}. The smallest true difference in success between two policies that "
        f"these episodes find with 80% power: {', '.join(parts)}"
    )


# ------------------------------------------------------------------------------------------------- what has been found
class _Case:
    """The finished episodes of a case. `end`: how many count, from the first one; None as long as that is open."""

    def __init__(self, case: SuiteCase, stop: StopRule | None, criterion: str) -> None:
        self.case, self.criterion = case, criterion
        self.finished: dict[int, Finished] = {}
        self.end: int | None = None
        self.reason = ""
        self._stop = stop
        self._prefix = self._counted = self._successes = 0

    def add(self, one: Finished) -> bool:
        """True where no more episodes are needed."""
        self.finished[one.index] = one
        while self.end is None and (next_one := self.finished.get(self._prefix)) is not None:
            self._prefix += 1
            if next_one.episode is not None:
                self._counted += 1
                self._successes += bool(getattr(next_one.episode, self.criterion))
            reason = None
            if self._stop is not None and next_one.episode is not None:
                reason = self._stop.should_stop(self._successes, self._counted)
            if reason is not None:
                self.end, self.reason = self._prefix, reason
        if self._prefix == self.case.num_episodes and self.end is None:
            self.end = self._prefix
        return self.end is not None

    @property
    def rate(self) -> float:
        """Of the episodes so far, in whatever order they ended."""
        there = [one.episode for one in self.finished.values() if one.episode is not None]
        return sum(getattr(episode, self.criterion) for episode in there) / max(1, len(there))

    @property
    def name(self) -> str:
        """Task, as its rows have it, and condition."""
        return f"{self.finished[0].measured['task']} {self.case.condition}".strip()

    def counted(self) -> list[Finished]:
        return [self.finished[i] for i in range(self.end or 0)]


class _Collected:
    """All finished episodes, in the journal as soon as they are told of."""

    def __init__(self, suite: Suite, stop: StopRule | None, journal: Journal | None, progress: bool) -> None:
        self._suite, self._journal, self._start = suite, journal, time.monotonic()
        self._before_s = journal.wall_s if journal is not None else 0.0
        self.cases = [_Case(case, stop, suite.criterion) for case in suite.cases]
        stored = journal.finished if journal is not None else {}
        for (case, _), one in stored.items():
            self.cases[case].add(one)
        self._total = suite.num_episodes
        self._line = Progress(self._total, suite.name, unit="ep", initial=self._done()) if progress else None

    @property
    def wall_s(self) -> float:
        return self._before_s + time.monotonic() - self._start

    def todo(self) -> dict[int, list[int]]:
        """Case -> indices of its episodes that are still to be run."""
        return {
            c: [i for i in range(part.case.num_episodes) if i not in part.finished] if part.end is None else []
            for c, part in enumerate(self.cases)
        }

    def add(self, case: int, one: Finished) -> bool:
        """True where the case needs no more episodes."""
        if self._journal is not None:
            self._journal.add(case, one, self.wall_s)
        enough = self.cases[case].add(one)
        if self._line is not None:
            part = self.cases[case]
            self._line.update(self._done(), case=part.case.name, success=f"{part.rate:.2f}")
        return enough

    def _done(self) -> int:
        """Of the declared episodes; those that are no longer needed are done too."""
        return sum(part.case.num_episodes if part.end is not None else len(part.finished) for part in self.cases)

    def result(self, config: Mapping[str, Any]) -> EvalResult:
        counted = [one for part in self.cases for one in part.counted()]
        measured = [part.counted()[0].measured for part in self.cases]
        settings: dict[str, Any] = {**config, **_merged(measured)}
        settings |= {"unsupported_conditions": dict(self._suite.unsupported)} if self._suite.unsupported else {}
        lost = {p.name: [one.seed for one in p.counted() if one.episode is None] for p in self.cases}
        stopped = {p.name: {"n": p.end, "reason": p.reason} for p in self.cases if p.reason}
        settings |= {"lost_seeds": {name: seeds for name, seeds in lost.items() if seeds}} if any(lost.values()) else {}
        settings |= {"stopped": stopped} if stopped else {}
        return result_of(counted, settings, self.wall_s)


def _merged(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One value where all cases have the same, else the list of all; stages of all tasks are one list."""
    values = {
        name: first if all(m.get(name) == first for m in measured) else [m.get(name) for m in measured]
        for name, first in measured[0].items()
    }
    return values | all_stages(measured)


__all__ = ["HarnessConfig", "describe_precision", "run_suite"]
