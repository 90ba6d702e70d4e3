"""What goes wrong at a robot, on request, and the record of what the twin was told: both for tests of the bridge."""

from __future__ import annotations

import dataclasses
import heapq
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Faults:
    """What is wrong from now on; the next request replaces all of it, an empty one ends it.

    `drop`: topic -> share of its messages that are lost, published ones and commands alike. `delay_s`: topic -> how
    much later they pass. `freeze`: cameras that repeat their last picture with its stamp. `fault`: what the robot
    reports; while it does, it holds and takes no commands. `clock_step_s`: stamps are this much off. `exit_code`: the
    process ends at once with it, without a word.
    """

    drop: Mapping[str, float] = field(default_factory=dict)
    delay_s: Mapping[str, float] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    fault: str = ""
    clock_step_s: float = 0.0
    exit_code: int | None = None

    @staticmethod
    def from_json(text: str) -> Faults:
        """Raises ValueError for what is no JSON object of these fields."""
        values: Any = json.loads(text)
        known = [f.name for f in dataclasses.fields(Faults)]
        if not isinstance(values, dict) or not values.keys() <= set(known):
            raise ValueError(f"faults are a JSON object with some of {', '.join(known)}; got {text[:100]}")
        return dataclasses.replace(Faults(**values), freeze=tuple(values.get("freeze", ())))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


class FaultyWire:
    """Messages on their way, any of which may be lost or late. `pass_on` may be called from any thread; what is due
    happens in `deliver`, in order of time. Losses are drawn from a fixed seed."""

    def __init__(self) -> None:
        self.faults = Faults()
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._rng = np.random.default_rng(0)
        self._lock = threading.Lock()

    def pass_on(self, topic: str, action: Callable[[], None]) -> None:
        """`action()` is what happens to a message of `topic` when it gets through."""
        with self._lock:
            share = self.faults.drop.get(topic, 0.0)
            if share and self._rng.random() < share:
                return
            self._count += 1
            due = time.monotonic() + self.faults.delay_s.get(topic, 0.0)
            heapq.heappush(self._waiting, (due, self._count, action))

    def deliver(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._waiting[0][0] > time.monotonic():
                    return
                action = heapq.heappop(self._waiting)[2]
            action()


class Recorder:
    """One JSON line an event, on disk as soon as it is known. `stamp` is `time.monotonic()`, one clock for all
    processes of a machine. May be used from any thread."""

    def __init__(self, path: str) -> None:
        """An empty `path`: nothing is recorded."""
        self._file = Path(path).open("w") if path else None  # noqa: SIM115 (until close)
        self._lock = threading.Lock()

    def write(self, event: str, stamp: float, values: Mapping[str, Any]) -> None:
        with self._lock:
            if self._file is not None:
                self._file.write(json.dumps({"event": event, "stamp": stamp, **values}) + "\n")
                self._file.flush()

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def read_record(path: Path | str, event: str = "") -> list[dict[str, Any]]:
    """The events of a record, of one kind where `event` says which; a line that is being written is left out."""
    lines = Path(path).read_text().split("\n")[:-1]
    events = [json.loads(line) for line in lines]
    return [e for e in events if event in ("", e["event"])]


__all__ = ["Faults", "FaultyWire", "Recorder", "read_record"]
