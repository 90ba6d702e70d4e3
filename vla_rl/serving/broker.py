"""From action chunks that come late to one action for every control tick. numpy, no torch.

A chunk's action i belongs to the time `observed_at + i * period` at which its observation was captured, and not to the
time at which the reply came: what is past is skipped. But if the arm has held since then, as it does before its first
chunk, it still stands where it was seen, and the chunk begins with action 0.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Actions = NDArray[np.floating]
_EPSILON = 1e-6  # of a period: a tick that is due now is not the one before because of rounding


@dataclass(frozen=True)
class BrokerConfig:
    """`control_hz`: of the actions in a chunk.

    `mode`: "sync" plays `execution_horizon` actions of a chunk from its first one on, whenever they come (the arm waits
    for the policy); "async" follows the newest chunk; "ensemble" averages all chunks that reach the tick with ACT's
    weights exp(-`ensemble_decay` i), i = 0 for the oldest; "rtc" follows the newest, which was made to continue the
    one before (`ChunkBroker.prefix`). `num_delays`: of the newest replies, for the p95 of the delay.
    """

    control_hz: float
    mode: Literal["sync", "async", "ensemble", "rtc"] = "async"
    execution_horizon: int = 8
    ensemble_decay: float = 0.01
    num_delays: int = 100

    def __post_init__(self) -> None:
        if self.mode not in ("sync", "async", "ensemble", "rtc"):
            raise ValueError(f"mode must be sync, async, ensemble or rtc, got {self.mode!r}")
        if not self.control_hz > 0 or self.execution_horizon < 1 or self.num_delays < 1:
            raise ValueError("control_hz, execution_horizon and num_delays must be positive")


@dataclass
class BrokerCounts:
    """`accepted` chunks; `late`: nothing of the chunk was left; `duplicated`, `reordered`: its sequence was there, or a
    newer one; `dropped`: sequences that never came; `starved`: ticks without an action."""

    accepted: int = 0
    late: int = 0
    duplicated: int = 0
    reordered: int = 0
    dropped: int = 0
    starved: int = 0


@dataclass
class _Chunk:
    """`start`: time of action 0; None: that of the next tick."""

    actions: Actions
    start: float | None


class ChunkBroker:
    """Not thread-safe: one thread, that of the control loop, calls it. Times are seconds of one monotonic clock."""

    def __init__(self, config: BrokerConfig) -> None:
        self.config = config
        self.counts = BrokerCounts()
        self._chunks: list[_Chunk] = []  # oldest first
        self._first = self._newest = -1
        self._seen: deque[int] = deque(maxlen=256)
        self._delays: deque[float] = deque(maxlen=config.num_delays)
        self._not_before = self._last_tick = -math.inf
        self._holding_since: float | None = -math.inf  # None: the last tick had an action

    def offer(self, chunk: Actions, observed_at: float, sequence: int, now: float | None = None) -> bool:
        """Take a reply: actions [H, A] for the observation captured at `observed_at`, request number `sequence`, 0 or
        more and rising.

        `now`: when it came, which measures the delay; None: not measured. Returns whether the chunk is used. Raises
        ValueError for a chunk of another shape.
        """
        actions = np.asarray(chunk)
        if actions.ndim != 2 or not len(actions):
            raise ValueError(f"a chunk must be [H, A], got {actions.shape}")
        if self._chunks and self._chunks[-1].actions.shape[1] != actions.shape[1]:
            raise ValueError(f"a chunk of {actions.shape[1]} actions after one of {self._chunks[-1].actions.shape[1]}")
        if not self._in_order(sequence):
            return False
        if now is not None:
            self._delays.append(now - observed_at)
        sync, since = self.config.mode == "sync", self._holding_since
        waited = sync or (since is not None and observed_at >= since - _EPSILON / self.config.control_hz)
        new = _Chunk(actions[: self.config.execution_horizon] if sync else actions, None if waited else observed_at)
        aged = _Chunk(actions, None if sync else observed_at)  # too old to act on, though the arm may not have moved
        newest_tick = self._last_tick if now is None else now
        if observed_at < self._not_before or self._index(aged, newest_tick) >= len(actions):
            self.counts.late += 1
            return False
        self.counts.accepted += 1
        self._chunks = [*self._chunks, new] if self.config.mode == "ensemble" else [new]
        return True

    def action_at(self, now: float) -> Actions | None:
        """The action [A] for the tick at `now`; None where no chunk reaches it (starvation: the arm must hold)."""
        self._last_tick = now
        due = []
        for chunk in self._chunks:
            if chunk.start is None:
                chunk.start = now
            i = self._index(chunk, now)
            if 0 <= i < len(chunk.actions):
                due.append(chunk.actions[i])
        self._chunks = [c for c in self._chunks if self._index(c, now) < len(c.actions)]
        if not due:
            self.counts.starved += 1
            self._holding_since = now if self._holding_since is None else self._holding_since
            return None
        self._holding_since = None
        if self.config.mode != "ensemble":
            return due[-1].copy()
        weight = np.exp(-self.config.ensemble_decay * np.arange(len(due)))
        return (weight / weight.sum()) @ np.stack(due)

    def prefix(self, observed_at: float) -> Actions | None:
        """What is planned from the capture of the next observation on, [P, A], for `PolicyClient.infer(prefix=...)`;
        None where nothing is."""
        if not self._chunks:
            return None
        chunk = self._chunks[-1]
        left = chunk.actions[max(0, self._index(chunk, observed_at)) :]
        return left.copy() if len(left) else None

    def continuation(self, observed_at: float) -> dict[str, Any]:
        """What mode "rtc" adds to the observation captured at `observed_at`: "prefix" and "delay"; else nothing."""
        prefix = self.prefix(observed_at) if self.config.mode == "rtc" else None
        return {} if prefix is None else {"prefix": prefix, "delay": min(self.delay_steps(), len(prefix))}

    def delay_steps(self) -> int:
        """Control steps from an observation to the use of its chunk: the measured p95, rounded up. Not the greatest,
        which a cold start would set for good."""
        if not self._delays:
            return 0
        steps = float(np.percentile(self._delays, 95)) * self.config.control_hz
        return int(np.ceil(steps - _EPSILON))

    def remaining(self, now: float) -> int:
        """Actions of the newest chunk from the tick at `now` on."""
        if not self._chunks:
            return 0
        chunk = self._chunks[-1]
        return max(0, len(chunk.actions) - max(0, self._index(chunk, now)))

    def flush(self, now: float) -> None:
        """Forget what is planned (a human took over, an episode began), and count as late every reply to an observation
        captured before `now`."""
        self._chunks = []
        self._not_before = self._holding_since = now

    def _index(self, chunk: _Chunk, now: float) -> int:
        """Of the chunk's action for the tick at `now`; negative before its start."""
        if chunk.start is None or now == -math.inf:
            return 0
        return math.floor((now - chunk.start) * self.config.control_hz + _EPSILON)

    def _in_order(self, sequence: int) -> bool:
        """Count and refuse what was there or is older than what is used."""
        if sequence in self._seen:
            self.counts.duplicated += 1
            return False
        self._seen.append(sequence)
        if sequence < self._newest:
            self.counts.reordered += 1
            self.counts.dropped -= sequence > self._first  # counted when its successor came
            return False
        if self._newest < 0:
            self._first = sequence
        else:
            self.counts.dropped += sequence - self._newest - 1
        self._newest = sequence
        return True


__all__ = ["BrokerConfig", "BrokerCounts", "ChunkBroker"]
