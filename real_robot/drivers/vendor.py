"""What the drivers of vendors' libraries share: a clear message where one is missing, and a thread that polls."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

from vla_rl.real_robot.interfaces import ArmSpec, Command, HardwareError, Vector

ReadingT = TypeVar("ReadingT")


def import_vendor(module: str, install: str) -> Any:
    """The vendor's module. Raises HardwareError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HardwareError(f"cannot import {module} ({error}); {install}") from error


def checked_target(command: Command, spec: ArmSpec) -> Vector:
    """`command.position`, float64 [J]. Raises ValueError for another shape or a number that is not finite: the safety
    filter stands before a driver, so this is a mistake of the caller."""
    position = np.asarray(command.position, dtype=np.float64)
    if position.shape != (spec.num_joints,) or not np.isfinite(position).all() or not np.isfinite(command.gripper):
        raise ValueError(f"{spec.name}: expected {spec.num_joints} finite joint targets and a width, got {command}")
    return position


class Poller(Generic[ReadingT]):
    """Calls `read` at `rate_hz` in a thread, so that a bus or a socket that blocks does not block the control loop.

    `latest()` is the newest reading. An error of `read` is kept and raised by `latest` as HardwareError until a later
    reading succeeds; polling goes on.
    """

    def __init__(self, read: Callable[[], ReadingT], rate_hz: float, name: str) -> None:
        self._read, self._period, self._name = read, 1.0 / rate_hz, name
        self._latest: ReadingT | None = None
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"poll {name}", daemon=True)

    def start(self) -> None:
        """Read once, so that `latest` has something, then go on in the thread. Raises what `read` raises."""
        self._latest = self._read()
        self._thread.start()

    def latest(self) -> ReadingT:
        if self._latest is None or self._error is not None:
            raise HardwareError(f"{self._name} does not answer: {self._error or 'not connected; call connect()'}")
        return self._latest

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due = max(due + self._period, time.monotonic())
            try:
                self._latest, self._error = self._read(), None
            except Exception as error:  # a vendor's own kinds; whoever asks for the state is told
                self._error = error


__all__ = ["Poller", "checked_target", "import_vendor"]
