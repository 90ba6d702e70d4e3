"""What an evaluation found: one row an episode, rates with their intervals, and the files that keep them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vla_rl.evaluation.statistics import Rate, wilson

SUMMARY_FILE = "eval.json"
EPISODES_FILE = "episodes.jsonl"
CRITERIA = ("success_once", "success_at_end")


@dataclass(frozen=True)
class Episode:
    """One evaluated episode.

    `success_once`: the task's predicate held at some step; `success_at_end`: at the last one. `length`: control steps.
    `episode_return`: undiscounted sum of rewards. `terminated`: False where the time limit cut it off.
    """

    task: str
    seed: int
    instruction: str
    success_once: bool
    success_at_end: bool
    length: int
    episode_return: float
    terminated: bool

    @property
    def key(self) -> tuple[str, int]:
        """What two evaluations of the same episode share."""
        return (self.task, self.seed)


@dataclass(frozen=True)
class Summary:
    """Rates and means over some episodes. `mean_length` in control steps."""

    success_once: Rate
    success_at_end: Rate
    mean_length: float
    mean_return: float

    @staticmethod
    def of(episodes: Sequence[Episode], confidence: float = 0.95) -> Summary:
        n = len(episodes)
        return Summary(
            success_once=wilson(sum(e.success_once for e in episodes), n, confidence),
            success_at_end=wilson(sum(e.success_at_end for e in episodes), n, confidence),
            mean_length=sum(e.length for e in episodes) / n,
            mean_return=sum(e.episode_return for e in episodes) / n,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "success_once": self.success_once.as_dict(),
            "success_at_end": self.success_at_end.as_dict(),
            "mean_length": self.mean_length,
            "mean_return": self.mean_return,
        }


@dataclass(frozen=True)
class EvalResult:
    """Episodes in the order of their seeds, and `config`: plain values that decide what was measured.

    `wall_s` is not part of the comparison of two results: it is the only thing that depends on the machine.
    """

    episodes: tuple[Episode, ...]
    config: Mapping[str, Any]
    wall_s: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if not self.episodes:
            raise ValueError("EvalResult: no episodes; give at least one episode seed")
        keys = [episode.key for episode in self.episodes]
        if len(set(keys)) != len(keys):
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise ValueError(f"EvalResult: episodes {twice[:5]} are there twice; each must count once")

    @property
    def summary(self) -> Summary:
        return Summary.of(self.episodes)

    @property
    def success_once(self) -> Rate:
        return self.summary.success_once

    @property
    def success_at_end(self) -> Rate:
        return self.summary.success_at_end

    @property
    def per_task(self) -> dict[str, Summary]:
        """Task name -> summary, in order of first appearance."""
        groups: dict[str, list[Episode]] = {}
        for episode in self.episodes:
            groups.setdefault(episode.task, []).append(episode)
        return {task: Summary.of(group) for task, group in groups.items()}

    def rate(self, criterion: str = "success_once") -> Rate:
        """The overall rate by `criterion`, one of `CRITERIA`."""
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")
        return getattr(self.summary, criterion)

    def save(self, directory: str | Path) -> Path:
        """Write `episodes.jsonl`, then `eval.json` (so the summary implies the episodes), into `directory`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        rows = "".join(json.dumps(asdict(episode), ensure_ascii=False) + "\n" for episode in self.episodes)
        _write_atomically(folder / EPISODES_FILE, rows)
        summary = {
            "n": len(self.episodes),
            **self.summary.as_dict(),
            "per_task": {task: part.as_dict() for task, part in self.per_task.items()},
            "config": dict(self.config),
            "wall_s": round(self.wall_s, 3),
        }
        _write_atomically(folder / SUMMARY_FILE, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        return folder

    @staticmethod
    def load(directory: str | Path) -> EvalResult:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for files that do not belong together."""
        folder = Path(directory)
        for name in (SUMMARY_FILE, EPISODES_FILE):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder} holds no {name}; expected the folder that an evaluation wrote")
        summary = _parse(folder / SUMMARY_FILE, (folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        lines = (folder / EPISODES_FILE).read_text(encoding="utf-8").splitlines()
        episodes = tuple(_episode(folder / EPISODES_FILE, line) for line in lines)
        if summary.get("n") != len(episodes):
            raise ValueError(
                f"{folder}: {SUMMARY_FILE} tells of {summary.get('n')} episodes, {EPISODES_FILE} has {len(episodes)}; "
                "evaluate again"
            )
        return EvalResult(episodes, summary["config"], float(summary["wall_s"]))

    @staticmethod
    def merge(results: Sequence[EvalResult]) -> EvalResult:
        """One result over several tasks, evaluated in the same way."""
        first, *others = results
        varying = ("task", "env", "max_episode_steps", "control_hz")
        common = {name: value for name, value in first.config.items() if name not in varying}
        for other in others:
            theirs = {name: value for name, value in other.config.items() if name not in varying}
            if theirs != common:
                different = sorted(n for n in common.keys() | theirs.keys() if common.get(n) != theirs.get(n))
                raise ValueError(f"cannot merge evaluations that differ in {', '.join(different)}")
        episodes = tuple(episode for result in results for episode in result.episodes)
        parts = {name: [result.config.get(name) for result in results] for name in varying}
        return EvalResult(episodes, {**common, **parts}, sum(result.wall_s for result in results))

    def format_table(self) -> str:
        """A text table: one line a task and one for all."""
        rows = [*self.per_task.items(), ("all", self.summary)] if len(self.per_task) > 1 else [*self.per_task.items()]
        width = max(len("task"), *(len(task) for task, _ in rows))
        lines = [
            f"{'task':{width}}  {'n':>5}  {'success once':22}  {'success at end':22}  {'length':>7}  {'return':>8}"
        ]
        for task, part in rows:
            once, end = _interval(part.success_once), _interval(part.success_at_end)
            numbers = f"{part.mean_length:7.1f}  {part.mean_return:8.3f}"
            lines.append(f"{task:{width}}  {part.success_once.n:5}  {once:22}  {end:22}  {numbers}")
        return "\n".join(lines)


def _interval(rate: Rate) -> str:
    return f"{rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}]"


def _episode(file: Path, line: str) -> Episode:
    row = _parse(file, line)
    expected = {f.name for f in fields(Episode)}
    if set(row) != expected:
        raise ValueError(f"{file}: an episode must have the fields {sorted(expected)}, got {sorted(row)}")
    return Episode(**row)


def _parse(file: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); evaluate again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected JSON objects, got {text[:60]!r}; evaluate again")
    return value


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
