"""Requests of several clients in one call of the policy, in a thread of its own: the event loop never waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_rl.serving.inference import ServedPolicy
from vla_rl.serving.requests import Request, RequestError

_LOG = logging.getLogger("vla_rl.serving")


@dataclass(frozen=True)
class Answer:
    """`actions`: float32 [H, A]. `infer_ms`: of the call of the policy. `num_batched`: requests in that call."""

    actions: NDArray[np.float32]
    policy_version: int
    infer_ms: float
    num_batched: int


@dataclass
class _Waiting:
    request: Request
    noise: NDArray[np.float32]
    deadline: float | None
    answer: asyncio.Future[Answer]
    since: float = field(default_factory=time.monotonic)

    def key(self) -> tuple[Any, ...]:
        """Requests of one call have pictures of the same sizes. Guidance is dear: only who asked for it pays."""
        shapes = tuple((c, image.shape) for c, image in sorted(self.request.images.items()))
        return shapes, self.request.state.shape, self.request.prefix is not None


class Batcher:
    """First come, first served; each client has at most one request here, so that none can crowd out another.

    `window_s`: how long the first of a batch waits for others; it does not where all of `num_clients()` are there.
    The policy's thread takes requests from a queue itself and hands answers straight to `loop`: with a task of the loop
    and an executor in between, each way would be two rounds of the loop longer.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        loop: asyncio.AbstractEventLoop,
        *,
        window_s: float,
        max_batch_size: int,
        num_clients: Callable[[], int],
    ) -> None:
        self.policy = policy  # may be replaced at any time; a batch is answered by the one that it began with
        self._loop, self._window_s = loop, window_s
        self._max_batch_size, self._num_clients = max_batch_size, num_clients
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()  # None: the end
        self._thread = Thread(target=self._run, name="policy", daemon=True)
        self._thread.start()

    async def infer(self, request: Request, noise: NDArray[np.float32], deadline: float | None) -> Answer:
        """`deadline`: of `time.monotonic()`. Raises RequestError: "deadline_exceeded", "bad_observation" where the
        policy refuses, "inference_failed"."""
        waiting = _Waiting(request, noise, deadline, self._loop.create_future())
        self._queue.put(waiting)
        return await waiting.answer

    def close(self) -> None:
        """After the batch that is computed now."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        waiting: list[_Waiting] = []
        while self._gather(waiting):
            batch, late, waiting = self._split(waiting)
            self._settle(late, [_too_late(w) for w in late])
            self._settle(batch, _answer(self.policy, batch) if batch else [])

    def _gather(self, waiting: list[_Waiting]) -> bool:
        """Fill `waiting` with at least one request, and with those of others for as long as the window is open. False:
        the end."""
        while not waiting or len(waiting) < min(self._max_batch_size, self._num_clients()):
            left = waiting[0].since + self._window_s - time.monotonic() if waiting else None
            try:
                new = self._queue.get_nowait() if left is not None and left <= 0 else self._queue.get(timeout=left)
            except Empty:
                break
            if new is None:
                return False
            waiting.append(new)
        return True

    def _split(self, waiting: list[_Waiting]) -> tuple[list[_Waiting], list[_Waiting], list[_Waiting]]:
        """The oldest request that still has time and those that go with it; those too late; those of the next batch."""
        now, batch, late, rest = time.monotonic(), [], [], []
        for w in waiting:
            if w.answer.done():
                continue  # its client has gone
            if w.deadline is not None and now > w.deadline:
                late.append(w)
            elif len(batch) < self._max_batch_size and (not batch or w.key() == batch[0].key()):
                batch.append(w)
            else:
                rest.append(w)
        return batch, late, rest

    def _settle(self, batch: list[_Waiting], results: Sequence[Answer | RequestError]) -> None:
        if batch:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_settle, batch, results)


def _settle(batch: list[_Waiting], results: Sequence[Answer | RequestError]) -> None:
    for waiting, result in zip(batch, results, strict=True):
        if waiting.answer.done():
            continue
        if isinstance(result, RequestError):
            waiting.answer.set_exception(result)
        else:
            waiting.answer.set_result(result)


def _too_late(waiting: _Waiting) -> RequestError:
    waited = 1000 * (time.monotonic() - waiting.since)
    return RequestError("deadline_exceeded", f"not computed: {waited:.0f} ms waited")


def _answer(policy: ServedPolicy, batch: list[_Waiting]) -> list[Answer | RequestError]:
    """In the policy's thread. Where a batch fails each of its requests is asked alone: one client's mistake is not the
    others'."""
    start = time.perf_counter()
    try:
        actions = policy.act([w.request for w in batch], np.stack([w.noise for w in batch]))
        if len(actions) != len(batch):
            raise RuntimeError(f"{policy.name} returned {len(actions)} chunks for {len(batch)} requests")
    except Exception as error:
        if len(batch) > 1:
            return [result for w in batch for result in _answer(policy, [w])]
        return [_error(error)]
    took = 1000.0 * (time.perf_counter() - start)
    return [Answer(row, policy.version, took, len(batch)) for row in actions]


def _error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ValueError):
        return RequestError("bad_observation", str(error)[:1000])
    _LOG.error("the policy failed", exc_info=error)  # for who runs the server; clients see no traceback
    return RequestError("inference_failed", f"the policy failed with {type(error).__name__}")


__all__ = ["Answer", "Batcher"]
