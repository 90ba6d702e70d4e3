"""Requests of several clients in one call of the policy, in a thread of its own: the event loop never waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
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
    """

    def __init__(
        self, policy: ServedPolicy, *, window_s: float, max_batch_size: int, num_clients: Callable[[], int]
    ) -> None:
        self.policy = policy  # may be replaced at any time; a batch is answered by the one that it began with
        self._window_s, self._max_batch_size, self._num_clients = window_s, max_batch_size, num_clients
        self._waiting: list[_Waiting] = []
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    async def infer(self, request: Request, noise: NDArray[np.float32], deadline: float | None) -> Answer:
        """`deadline`: of `time.monotonic()`. Raises RequestError: "deadline_exceeded", "bad_observation" where the
        policy refuses, "inference_failed"."""
        waiting = _Waiting(request, noise, deadline, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._wake.set()
        return await waiting.answer

    async def run(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._wake.clear()
                if not self._waiting:
                    await self._wake.wait()
                await self._gather()
                if batch := self._take():
                    await loop.run_in_executor(self._thread, _work, loop, self.policy, batch)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _gather(self) -> None:
        """Wait for other clients, for as long as the window is open."""
        end = self._waiting[0].since + self._window_s
        while len(self._waiting) < min(self._max_batch_size, self._num_clients()):
            left = end - time.monotonic()
            if left <= 0:
                return
            self._wake.clear()
            try:
                async with asyncio.timeout(left):
                    await self._wake.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """The oldest request that still has time, and those that go with it."""
        now, batch, rest = time.monotonic(), [], []
        for waiting in self._waiting:
            if waiting.answer.done():
                continue  # its client has gone
            if waiting.deadline is not None and now > waiting.deadline:
                late = RequestError("deadline_exceeded", f"not computed: {1000 * (now - waiting.since):.0f} ms waited")
                waiting.answer.set_exception(late)
            elif len(batch) < self._max_batch_size and (not batch or waiting.key() == batch[0].key()):
                batch.append(waiting)
            else:
                rest.append(waiting)
        self._waiting = rest
        return batch


def _work(loop: asyncio.AbstractEventLoop, policy: ServedPolicy, batch: list[_Waiting]) -> None:
    """In the policy's thread. Answers go to the event loop from here: by way of the executor's future they would come
    two rounds of the loop later."""
    results = _answer(policy, batch)
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(_settle, batch, results)


def _settle(batch: list[_Waiting], results: list[Answer | RequestError]) -> None:
    for waiting, result in zip(batch, results, strict=True):
        if waiting.answer.done():
            continue
        if isinstance(result, RequestError):
            waiting.answer.set_exception(result)
        else:
            waiting.answer.set_result(result)


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
