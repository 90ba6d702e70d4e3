"""Keeps an arm's stream of commands alive while nobody commands it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from vla_rl.real_robot.interfaces import ArmState, Command, HardwareError
from vla_rl.real_robot.modes import Event, Mode
from vla_rl.real_robot.supervisor import Applied, GuardedArm


class KeptAlive:
    """A `GuardedArm` that repeats the last target at the arm's rate while its user is silent.

    For a synchronous environment, whose policy thinks while the arm stands, on an arm with a watchdog (UR, a controller
    with `cmd_timeout`) or behind a supervisor: both take silence for a dead program. A program that dies or is stopped
    takes this thread with it, so that they still see it. It numbers the commands.
    """

    def __init__(self, arm: GuardedArm) -> None:
        self.spec = arm.spec
        self.num_repeated = 0
        self._arm = arm
        self._lock = threading.Lock()
        self._last: Command | None = None
        self._at = time.monotonic()
        self._sequence = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"hold {arm.spec.name}", daemon=True)
        self._thread.start()

    def read(self) -> tuple[ArmState, Mode, str]:
        with self._lock:
            return self._arm.read()

    def fire(self, event: Event, reason: str = "") -> Mode:
        with self._lock:
            if event in (Event.START, Event.RESET, Event.FINISH):
                self._last = None  # after a start nothing stands yet
            return self._arm.fire(event, reason)

    def apply(self, command: Command) -> Applied:
        """A command right after a repetition waits: the filter takes one a period, and drops what comes early."""
        with self._lock:
            time.sleep(max(0.0, self._at + 0.75 / self.spec.rate_hz - time.monotonic()))
            return self._apply(command)

    def stop(self, reason: str) -> None:
        self._last = None
        self._arm.stop(reason)

    def close(self) -> None:
        """Ends the thread; the arm is closed by who made it."""
        self._ended.set()
        self._thread.join(2.0)

    def _apply(self, command: Command) -> Applied:
        self._sequence += 1
        applied = self._arm.apply(replace(command, sequence=self._sequence))
        self._last, self._at = applied.command, time.monotonic()
        return applied

    def _run(self) -> None:
        period = 1.0 / self.spec.rate_hz
        while not self._ended.wait(max(0.0, self._at + 1.5 * period - time.monotonic()) or period / 4):
            with self._lock:
                if time.monotonic() - self._at < 1.4 * period:
                    continue
                try:
                    if self._last is not None:
                        self._apply(self._last)
                        self.num_repeated += 1
                    else:
                        self._arm.read()  # a supervisor hears of us
                        self._at = time.monotonic()
                except (HardwareError, OSError):
                    self._last = None  # whoever commands next is told


__all__ = ["KeptAlive"]
