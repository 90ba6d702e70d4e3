"""What an evaluation found: one row an episode, rates with their intervals, and the files that keep them.

`episodes.parquet` has a row an episode and a column a field of `Episode`; `eval.json` has what follows from them, with
the configuration that decided them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla_rl.evaluation.statistics import Rate, wilson

SUMMARY_FILE = "eval.json"
EPISODES_FILE = "episodes.parquet"
SCHEMA_VERSION = 2  # of eval.json and the columns; 1 was before conditions, and had its episodes in JSON
CRITERIA = ("success_once", "success_at_end")


@dataclass(frozen=True)
class Episode:
    """One evaluated episode.

    `success_once`: the task's predicate held at some step; `success_at_end`: at the last one. `length`: control steps.
    `episode_return`: undiscounted sum of rewards. `terminated`: False where the time limit cut it off. `condition`: ""
    where nothing is changed, else "AXIS@LEVEL" or several joined by "+". `initial_state`: number of the initial state
    where a benchmark has some, else the seed. `stage`: the furthest stage of the task that was reached, "" where the
    environment has none. `num_clamped`: control steps in which a safety filter changed the action. `latency_ms`: mean
    wall time of the policy's answers, the one column that a clock decides: it does not count when episodes are
    compared. `video`: path from the folder of the result, "" without one.
    """

    task: str
    seed: int
    instruction: str
    success_once: bool
    success_at_end: bool
    length: int
    episode_return: float
    terminated: bool
    condition: str = ""
    initial_state: str = ""
    stage: str = ""
    num_clamped: int = 0
    latency_ms: float = field(default=0.0, compare=False)
    video: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """(task, condition, seed): what two evaluations of the same episode share."""
        return (self.task, self.condition, self.seed)


_COLUMN_TYPES = {"str": pa.string(), "int": pa.int64(), "bool": pa.bool_(), "float": pa.float64()}
_SCHEMA = pa.schema([pa.field(f.name, _COLUMN_TYPES[str(f.type)], nullable=False) for f in fields(Episode)])


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
class Timing:
    """What a clock said. Percentiles are {"p50", "p95", "p99", "max"}.

    `policy_ms`: wall time of the policy's call behind each decision, of all rows in its batch. `env_ms`: wall time of
    the environments' chunk behind each decision. `decisions_per_s`: decisions by the wall time of the evaluation.
    `cycle_time_s`: length of the successful episodes by the control rate, simulated seconds in a simulator; None
    without a success.
    """

    num_decisions: int
    policy_ms: Mapping[str, float]
    env_ms: Mapping[str, float]
    decisions_per_s: float
    cycle_time_s: Mapping[str, float] | None

    @staticmethod
    def of(
        policy_ms: Sequence[float], env_ms: Sequence[float], cycle_times_s: Sequence[float], wall_s: float
    ) -> Timing:
        """From one number a decision, and one a successful episode."""
        return Timing(
            num_decisions=len(policy_ms),
            policy_ms=_percentiles(policy_ms),
            env_ms=_percentiles(env_ms),
            decisions_per_s=round(len(policy_ms) / wall_s, 3) if wall_s > 0 else 0.0,
            cycle_time_s=_percentiles(cycle_times_s) if len(cycle_times_s) else None,
        )


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    numbers = np.percentile(values, [50, 95, 99, 100]) if len(values) else np.zeros(4)
    return {name: round(float(x), 4) for name, x in zip(("p50", "p95", "p99", "max"), numbers, strict=True)}


@dataclass(frozen=True)
class EvalResult:
    """Episodes in their declared order, and `config`: plain values that decide what was measured.

    `config["suite"]`, where there is one: {"name", "version", "hash", "protocol"}. `wall_s` and `timing` depend on the
    machine, and are not part of the comparison of two results. `timing` is None for results that were merged.
    """

    episodes: tuple[Episode, ...]
    config: Mapping[str, Any]
    wall_s: float = field(default=0.0, compare=False)
    timing: Timing | None = field(default=None, compare=False)

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
        return self._by("task")

    @property
    def per_condition(self) -> dict[str, Summary]:
        """Condition ("" is the nominal one) -> summary, in order of first appearance."""
        return self._by("condition")

    def _by(self, column: str) -> dict[str, Summary]:
        groups: dict[str, list[Episode]] = {}
        for episode in self.episodes:
            groups.setdefault(getattr(episode, column), []).append(episode)
        return {name: Summary.of(group) for name, group in groups.items()}

    def rate(self, criterion: str = "success_once") -> Rate:
        """The overall rate by `criterion`, one of `CRITERIA`."""
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")
        return getattr(self.summary, criterion)

    def save(self, directory: str | Path) -> Path:
        """Write `episodes.parquet`, then `eval.json` (so the summary implies the episodes), into `directory`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist([asdict(episode) for episode in self.episodes], schema=_SCHEMA)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        _write_atomically(folder / EPISODES_FILE, buffer.getvalue().to_pybytes())
        summary = {
            "schema_version": SCHEMA_VERSION,
            "n": len(self.episodes),
            **self.summary.as_dict(),
            "suite": self.config.get("suite"),
            "per_task": {task: part.as_dict() for task, part in self.per_task.items()},
            "per_condition": {name: part.as_dict() for name, part in self.per_condition.items()},
            "timing": None if self.timing is None else asdict(self.timing),
            "config": dict(self.config),
            "wall_s": round(self.wall_s, 3),
        }
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        _write_atomically(folder / SUMMARY_FILE, text.encode())
        return folder

    @staticmethod
    def load(directory: str | Path) -> EvalResult:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for files that do not belong together."""
        folder = Path(directory)
        for name in (SUMMARY_FILE, EPISODES_FILE):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder} holds no {name}; expected the folder that an evaluation wrote")
        summary = _parse(folder / SUMMARY_FILE)
        if summary.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{folder / SUMMARY_FILE} has schema version {summary.get('schema_version')}, this program reads "
                f"{SCHEMA_VERSION}; evaluate again"
            )
        episodes = _read_episodes(folder / EPISODES_FILE)
        if summary.get("n") != len(episodes):
            raise ValueError(
                f"{folder}: {SUMMARY_FILE} tells of {summary.get('n')} episodes, {EPISODES_FILE} has {len(episodes)}; "
                "evaluate again"
            )
        timing = summary.get("timing")
        return EvalResult(
            episodes, summary["config"], float(summary["wall_s"]), None if timing is None else Timing(**timing)
        )

    @staticmethod
    def merge(results: Sequence[EvalResult]) -> EvalResult:
        """One result over several tasks, evaluated in the same way."""
        first, *others = results
        varying = ("task", "env", "max_episode_steps", "control_hz", "stage_names")
        common = {name: value for name, value in first.config.items() if name not in varying}
        for other in others:
            theirs = {name: value for name, value in other.config.items() if name not in varying}
            if theirs != common:
                different = sorted(n for n in common.keys() | theirs.keys() if common.get(n) != theirs.get(n))
                raise ValueError(f"cannot merge evaluations that differ in {', '.join(different)}")
        episodes = tuple(episode for result in results for episode in result.episodes)
        parts: dict[str, Any] = {name: [result.config.get(name) for result in results] for name in varying[:-1]}
        parts |= all_stages([result.config for result in results])
        return EvalResult(episodes, {**common, **parts}, sum(result.wall_s for result in results))

    def format_table(self) -> str:
        """A text table: one line a task and condition, and one for all."""
        groups: dict[str, list[Episode]] = {}
        for e in self.episodes:
            groups.setdefault(f"{e.task} {e.condition}".strip(), []).append(e)
        rows = [(name, Summary.of(group)) for name, group in groups.items()]
        rows += [("all", self.summary)] if len(rows) > 1 else []
        width = max(len("task"), *(len(task) for task, _ in rows))
        lines = [
            f"{'task':{width}}  {'n':>5}  {'success once':22}  {'success at end':22}  {'length':>7}  {'return':>8}"
        ]
        for task, part in rows:
            once, end = _interval(part.success_once), _interval(part.success_at_end)
            numbers = f"{part.mean_length:7.1f}  {part.mean_return:8.3f}"
            lines.append(f"{task:{width}}  {part.success_once.n:5}  {once:22}  {end:22}  {numbers}")
        return "\n".join(lines)


def all_stages(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`stage_names` of several evaluations in one list, in order of first appearance; nothing where none has stages."""
    stages = dict.fromkeys(name for config in configs for name in config.get("stage_names", ()))
    return {"stage_names": list(stages)} if stages else {}


def _interval(rate: Rate) -> str:
    return f"{rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}]"


def _read_episodes(file: Path) -> tuple[Episode, ...]:
    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); evaluate again") from error
    if not table.schema.equals(_SCHEMA):
        found = ", ".join(f"{column.name} {column.type}" for column in table.schema)
        wanted = ", ".join(f"{column.name} {column.type}" for column in _SCHEMA)
        raise ValueError(f"{file}: an episode must have the columns {wanted}; got {found}")
    return tuple(Episode(**row) for row in table.to_pylist())


def _parse(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); evaluate again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {str(value)[:60]!r}; evaluate again")
    return value


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
