"""One progress line for whoever waits."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO


class Progress:
    """One line with a bar, the rate and the time left.

    On a terminal the line is rewritten in place; elsewhere (a log file, a pipe) a full line comes every
    `log_interval_s` seconds and at the end. `initial`: what was already done when this process began, so that the time
    left after a resume is estimated from work that this process did.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        unit: str = "it",
        initial: int = 0,
        stream: TextIO | None = None,
        log_interval_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if total < 1:
            raise ValueError(f"Progress: total must be at least 1, got {total}")
        self.total, self.label, self.unit, self.initial = total, label, unit, initial
        self._stream = stream if stream is not None else sys.stderr
        self._is_tty = self._stream.isatty()
        self._interval_s = 0.1 if self._is_tty else log_interval_s
        self._clock = clock
        self._start = self._last_shown = clock()
        self._width = 0

    def update(self, done: int, **info: float | str) -> None:
        """Show that `done` of `total` are done; `info` is appended as `name value`."""
        now = self._clock()
        finished = done >= self.total
        if not finished and now - self._last_shown < self._interval_s:
            return
        self._last_shown = now
        line = self._line(done, now - self._start, info)
        if self._is_tty:
            self._stream.write("\r" + line.ljust(self._width) + ("\n" if finished else ""))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _line(self, done: int, elapsed_s: float, info: Mapping[str, float | str]) -> str:
        rate = (done - self.initial) / elapsed_s if elapsed_s > 0 else 0.0
        remaining = format_duration((self.total - done) / rate) if rate > 0 else "?"
        when = f"in {format_duration(elapsed_s)}" if done >= self.total else f"{remaining} left"
        parts = [f"{self.label}: {done}/{self.total} {self.unit}", when, f"{rate:.3g} {self.unit}/s"]
        parts += [f"{name} {value if isinstance(value, str) else format(value, '.3g')}" for name, value in info.items()]
        return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """`42s`, `3m05s`, `2h07m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
