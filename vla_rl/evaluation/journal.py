"""The journal of an evaluation: every episode is on the disk before the next one counts.

`journal.jsonl` begins with a line that says what is being evaluated, and each finished episode adds one, flushed to
the disk. A process that is killed at any moment leaves at most one torn line at the end, which is dropped when the
evaluation goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from vla_rl.evaluation.evaluate import Finished
from vla_rl.evaluation.result import SUMMARY_FILE, Episode

JOURNAL_FILE = "journal.jsonl"
_FORMAT = 1


class JournalError(ValueError):
    """The folder holds another evaluation, or one that was not to be touched."""


class Journal:
    """The journal in `folder`, opened to add to it; a context manager that closes it.

    `config`: JSON values that decide the episodes. `finished`: (case, index) -> episode of earlier processes, in the
    order in which they ended; `wall_s`: seconds that those took.

    Raises JournalError where the folder holds an evaluation and `resume` is not set, where it is of another `config`
    (saying what differs), where a line but the last is damaged, and where another process writes to it.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, resume: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / JOURNAL_FILE
        self.finished: dict[tuple[int, int], Finished] = {}
        self.wall_s = 0.0
        self._file: IO[bytes] = self.path.open("a+b")
        try:
            self._lock()
            self._begin(json.loads(json.dumps(dict(config))), resume)
        except BaseException:
            self._file.close()
            raise

    def add(self, case: int, one: Finished, wall_s: float) -> None:
        """Keep an episode; it is on the disk when this returns. `wall_s`: of the evaluation so far, all processes."""
        row = {
            "case": case,
            "index": one.index,
            "seed": one.seed,
            "episode": None if one.episode is None else asdict(one.episode),
            "policy_ms": [round(ms, 4) for ms in one.policy_ms],
            "env_ms": [round(ms, 4) for ms in one.env_ms],
            "measured": dict(one.measured),
            "wall_s": round(wall_s, 3),
        }
        self._write(row)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise JournalError(f"another process evaluates into {self.path.parent}; wait for it, or stop it") from error

    def _begin(self, config: dict[str, Any], resume: bool) -> None:
        header = {"journal": _FORMAT, "config_hash": config_hash(config), "config": config}
        rows = self._complete_rows()
        if len(rows) < 2:  # what failed before its first episode is nothing to go on with
            if not rows and (self.path.parent / SUMMARY_FILE).exists():
                raise JournalError(f"{self.path.parent} holds a result without a journal; choose another --out")
            self._file.truncate(0)
            self._write(header)
            _sync_folder(self.path.parent)
            return
        first, *episodes = rows
        if first.get("journal") != _FORMAT:
            raise JournalError(f"{self.path} is not a journal of this version; choose another --out")
        if not resume:
            raise JournalError(
                f"{self.path.parent} holds {len(episodes)} episodes of an evaluation already; add --resume to go on "
                "with it, or choose another --out"
            )
        if first["config_hash"] != header["config_hash"]:
            changed = "; ".join(_changes("", first["config"], config)[:8])
            raise JournalError(
                f"{self.path.parent} holds an evaluation with another configuration: {changed}. Go on with its own, or "
                "choose another --out"
            )
        for row in episodes:
            one = _finished(row)
            self.finished[row["case"], one.index] = one
            self.wall_s = row["wall_s"]

    def _complete_rows(self) -> list[dict[str, Any]]:
        """All lines that are whole, and the file ends behind them."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        rows = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise JournalError(f"{self.path}, line {number} is damaged ({error}); choose another --out") from error
        return rows

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def config_hash(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _finished(row: Mapping[str, Any]) -> Finished:
    episode = None if row["episode"] is None else Episode(**row["episode"])
    times = tuple(row["policy_ms"]), tuple(row["env_ms"])
    return Finished(row["index"], row["seed"], episode, *times, row["measured"])


def _changes(where: str, stored: Any, here: Any) -> list[str]:
    if isinstance(stored, dict) and isinstance(here, dict):
        names = dict.fromkeys([*stored, *here])
        return [c for n in names for c in _changes(f"{where}.{n}".lstrip("."), stored.get(n), here.get(n))]
    return [] if stored == here else [f"{where} was {stored!r} and is {here!r}"]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["JOURNAL_FILE", "Journal", "JournalError", "config_hash"]
