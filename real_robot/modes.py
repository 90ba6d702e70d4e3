"""Who may move the arm: the modes and every way between them, in one table."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Mode(Enum):
    """IDLE: armed by nobody, nothing is sent. SHADOW: everything runs, nothing is sent. RUN: the policy moves the arm.
    HUMAN: a person moves it. HOLD: it stays at the last target sent. ESTOP: stopped and latched until a reset."""

    IDLE = "idle"
    SHADOW = "shadow"
    RUN = "run"
    HUMAN = "human"
    HOLD = "hold"
    ESTOP = "estop"

    @property
    def sends(self) -> bool:
        """Whether commands reach the hardware in this mode."""
        return self in (Mode.RUN, Mode.HUMAN, Mode.HOLD)


class Event(Enum):
    """Why the mode changes."""

    START = "start"  # every check of a start has passed: this arms
    SHADOW = "shadow"
    HOLD = "hold"  # no action is left, a stream is stale, a pause
    RESUME = "resume"
    TAKEOVER = "takeover"
    RELEASE = "release"
    FINISH = "finish"
    STOP = "stop"  # a fault or a person: latches
    RESET = "reset"  # a person says that the cause is gone


TRANSITIONS: dict[tuple[Mode, Event], Mode] = {
    (Mode.IDLE, Event.START): Mode.RUN,
    (Mode.IDLE, Event.SHADOW): Mode.SHADOW,
    (Mode.SHADOW, Event.FINISH): Mode.IDLE,
    (Mode.RUN, Event.HOLD): Mode.HOLD,
    (Mode.RUN, Event.TAKEOVER): Mode.HUMAN,
    (Mode.RUN, Event.FINISH): Mode.IDLE,
    (Mode.HUMAN, Event.RELEASE): Mode.HOLD,  # the policy decides anew before it moves
    (Mode.HUMAN, Event.FINISH): Mode.IDLE,
    (Mode.HOLD, Event.RESUME): Mode.RUN,
    (Mode.HOLD, Event.TAKEOVER): Mode.HUMAN,
    (Mode.HOLD, Event.FINISH): Mode.IDLE,
    **{(mode, Event.STOP): Mode.ESTOP for mode in Mode},
    (Mode.ESTOP, Event.RESET): Mode.IDLE,  # and START again: a reset alone moves nothing
}


class ModeError(RuntimeError):
    """This change of mode is not allowed."""


class Change(NamedTuple):
    """One change of mode. `at`: seconds of `time.monotonic()`."""

    at: float
    before: Mode
    event: Event
    after: Mode
    reason: str


class ModeMachine:
    """The mode, and how it came to be. `stop_reason`: why ESTOP was entered first, "" outside of it."""

    def __init__(self) -> None:
        self.mode = Mode.IDLE
        self.stop_reason = ""
        self.changes: list[Change] = []

    def fire(self, event: Event, now: float, reason: str = "") -> Mode:
        """Change the mode by `event`. Raises ModeError where the table has no such change."""
        after = TRANSITIONS.get((self.mode, event))
        if after is None:
            able = ", ".join(e.value for m, e in TRANSITIONS if m is self.mode)
            why = f" (stopped: {self.stop_reason})" if self.mode is Mode.ESTOP else ""
            raise ModeError(f"{event.value} is not possible in mode {self.mode.value}{why}; possible: {able}")
        if self.mode is Mode.ESTOP and event is Event.STOP:
            return self.mode  # the first reason is the one to know
        self.changes.append(Change(now, self.mode, event, after, reason))
        self.stop_reason = reason if event is Event.STOP else ""
        self.mode = after
        return after
