"""Ctrl-C between two updates instead of inside one."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopOnInterrupt:
    """Context in which the first Ctrl-C only sets `requested`, so that a loop can save and leave; the second one raises
    KeyboardInterrupt at once. Outside the main thread signals cannot be caught, and `requested` stays False."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> StopOnInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _on_interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        del signal_number, frame  # what signal.signal passes
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
