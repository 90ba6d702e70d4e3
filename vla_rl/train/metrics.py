"""Metrics of a run: JSON lines for machines, TensorBoard for eyes.

`metrics.jsonl` has one flat object a line: `{"iteration": 3, "time_s": 41.2, "train/success_rate": 0.55, ...}`. It is
appended to and flushed line by line, so a killed process loses at most the line it was writing; a resumed run cuts off
what came after its checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

METRICS_FILE = "metrics.jsonl"
Metrics = dict[str, float]


class MetricsLogger:
    """Writes `run_dir/metrics.jsonl` and TensorBoard events under `run_dir/tensorboard`.

    `resume_after`: the last iteration that the checkpoint contains. Lines of later iterations are removed, so that the
    file of a resumed run equals that of an uninterrupted one. None starts an empty file and raises FileExistsError
    where one with content exists, because it would be lost.
    """

    def __init__(self, run_dir: str | Path, *, resume_after: int | None = None, tensorboard: bool = True) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._time_offset_s = 0.0
        if resume_after is None:
            if self.path.exists() and self.path.stat().st_size:
                raise FileExistsError(
                    f"{self.path} already holds metrics; resume that run, or choose another run folder"
                )
        else:
            self._time_offset_s = _truncate(self.path, resume_after)
        self._file = self.path.open("a", encoding="utf-8")
        self._writer = _tensorboard_writer(self.path.parent, resume_after) if tensorboard else None
        self._last_iteration = -1 if resume_after is None else resume_after
        self._start = time.monotonic()

    def log(self, iteration: int, metrics: Mapping[str, float | int | torch.Tensor]) -> None:
        """Append one line. Iterations must increase; keys "iteration" and "time_s" are the logger's own."""
        if iteration <= self._last_iteration:
            raise ValueError(f"metrics of iteration {iteration} after those of {self._last_iteration}; must increase")
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        time_s = self._time_offset_s + time.monotonic() - self._start
        row = {"iteration": iteration, "time_s": round(time_s, 3)}
        clash = row.keys() & values.keys()
        if clash:
            raise ValueError(f"metrics {sorted(clash)} are written by the logger itself; rename yours")
        row |= {name: _encode(value) for name, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self._last_iteration = iteration
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[Metrics]:
    """Rows of a `metrics.jsonl` (or of the one in a run folder), oldest first.

    A last line that a kill cut short is left out. Raises FileNotFoundError, and ValueError with the line's number for a
    broken line elsewhere.
    """
    file = Path(path) / METRICS_FILE if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no metrics here; expected a run folder or its {METRICS_FILE}")
    lines = file.read_text(encoding="utf-8").split("\n")
    rows: list[Metrics] = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines):
            break  # whatever follows the last newline was never finished
        try:
            row = json.loads(line)
            rows.append({name: float(value) for name, value in row.items()})
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number}: expected one flat JSON object of numbers, got {line!r}"
            ) from error
    return rows


def _truncate(path: Path, last_iteration: int) -> float:
    """Drop the lines of later iterations and a broken last line, atomically. Returns the time of the last line kept."""
    if not path.exists():
        return 0.0
    kept = [row for row in read_metrics(path) if row["iteration"] <= last_iteration]
    partial = path.with_suffix(".jsonl.partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in kept:
            fields: dict[str, Any] = {name: _encode(value) for name, value in row.items()}
            fields["iteration"] = int(row["iteration"])
            file.write(json.dumps(fields, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return kept[-1]["time_s"] if kept else 0.0


def _tensorboard_writer(run_dir: Path, resume_after: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import, so only when a run needs it

    purge_step = None if resume_after is None else resume_after + 1
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)


def _scalar(name: str, value: float | int | torch.Tensor) -> float:
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise ValueError(f"metric {name!r} must be one number, got a tensor of shape {tuple(value.shape)}")
    return float(value)


def _encode(value: float) -> float | str:
    """JSON has no NaN and no infinity; as words they survive, and `float()` reads them back."""
    return value if math.isfinite(value) else str(value)
