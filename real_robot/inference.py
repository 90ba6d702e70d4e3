"""Inference beside the control loop: one request at a time, never waited for.

The loop's thread only puts observations in and takes replies out. A policy of another process answers through
`PolicyProcess`, so that packing pictures and waiting for a socket cost the loop nothing.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vla_rl.real_robot.loop_config import HEARTBEAT_S
from vla_rl.serving.client import PolicyClient, PolicyServerError
from vla_rl.serving.messages import pack, unpack

Infer = Callable[[Mapping[str, Any]], NDArray[np.floating]]
"""An observation message, {"images", "state", "prompt"}, to actions [H, A]; may raise."""


class Reply(NamedTuple):
    """`actions` [H, A], None where inference failed with `error`. `observed_at`: of its observation. `latency_s`: from
    the request to the reply."""

    sequence: int
    observed_at: float
    actions: NDArray[np.floating] | None
    latency_s: float
    error: str = ""


class Inference:
    """Runs `infer` in a thread. Close it at the end; a call that hangs is left behind."""

    def __init__(self, infer: Infer) -> None:
        self._infer = infer
        self._request: tuple[int, float, Mapping[str, Any]] | None = None
        self._reply: Reply | None = None
        self._wake = threading.Event()
        self._closing = False
        self._sequence = 0
        threading.Thread(target=self._run, daemon=True, name="inference").start()

    @property
    def busy(self) -> bool:
        return self._request is not None

    def submit(self, observation: Mapping[str, Any], observed_at: float) -> bool:
        """False where the request before has not been answered and taken."""
        if self._request is not None or self._reply is not None:
            return False
        self._request = (self._sequence, observed_at, observation)
        self._sequence += 1
        self._wake.set()
        return True

    def poll(self) -> Reply | None:
        """The reply, once, if it has come."""
        reply, self._reply = self._reply, None
        return reply

    def close(self) -> None:
        self._closing = True
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._closing:
                return
            if (request := self._request) is None:
                continue
            sequence, observed_at, observation = request
            start = time.monotonic()
            try:
                actions, error = np.asarray(self._infer(observation)), ""
            except Exception as raised:
                actions, error = None, f"{type(raised).__name__}: {raised}"
            self._reply = Reply(sequence, observed_at, actions, time.monotonic() - start, error)
            self._request = None


@dataclass(frozen=True)
class ServerConfig:
    """A policy server. `heartbeat_s`: see `PolicyClient`; pings queue behind pictures, so a slow link needs more.
    `retry_s`: between tries to connect again."""

    url: str
    api_key: str | None = None
    connect_timeout_s: float = 5.0
    timeout_s: float = 1.0
    heartbeat_s: float | None = HEARTBEAT_S
    retry_s: float = 0.2


class ServedActions:
    """`Infer` by a policy server. What is asked first of a session that has ended raises PolicyServerError, so that no
    plan outlives it; then it connects again, and raises PolicyServerError where there is no server."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._client = PolicyClient(
            config.url,
            api_key=config.api_key,
            connect_timeout_s=config.connect_timeout_s,
            timeout_s=config.timeout_s,
            heartbeat_s=config.heartbeat_s,
        )
        self._said = False  # that the session has ended

    @property
    def metadata(self) -> dict[str, Any]:
        """What the server said of itself when it was connected to."""
        return self._client.metadata

    def problem(self) -> str:
        """What is wrong with the server, whether or not it was asked something; "" for nothing. For any thread."""
        return "" if self._client.connected else "the policy server does not answer"

    def begin(self, session: int) -> None:
        """An episode begins, with the noise of `session`; not while a request is on its way."""
        self._client.reset(session)

    def close(self) -> None:
        self._client.close()

    def __call__(self, observation: Mapping[str, Any]) -> NDArray[np.floating]:
        if not self._client.connected and self._said:
            time.sleep(self.config.retry_s)
            self._client.connect()
        self._said = True
        actions = self._client.infer(observation)["actions"]
        self._said = False
        return actions


class PolicyProcess:
    """`Infer` in a process of its own, where `make` builds it: a `ServedActions`, or a policy itself.

    Raises RuntimeError where it does not start, TimeoutError without an answer within `timeout_s`.
    """

    def __init__(self, make: Callable[[], Infer], *, start_timeout_s: float = 60.0, timeout_s: float = 2.0) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(make, theirs), daemon=True, name="policy")
        self._process.start()
        theirs.close()
        self.timeout_s = timeout_s
        self._owed = 0  # replies to requests that nobody waits for any more
        if not self._connection.poll(start_timeout_s):
            self.close()
            raise RuntimeError(f"the policy's process does not start within {start_timeout_s} s")
        if error := self._read().get("error"):
            self.close()
            raise RuntimeError(f"the policy's process does not start: {error}")

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def __call__(self, observation: Mapping[str, Any]) -> NDArray[np.floating]:
        end = time.monotonic() + self.timeout_s
        while self._owed and self._connection.poll(max(0.0, end - time.monotonic())):
            self._read()
            self._owed -= 1
        if self._owed:
            raise TimeoutError("the policy's process does not answer")
        self._connection.send_bytes(pack(observation))
        if not self._connection.poll(max(0.0, end - time.monotonic())):
            self._owed = 1
            raise TimeoutError(f"no actions within {self.timeout_s} s")
        reply = self._read()
        if error := reply.get("error"):
            raise RuntimeError(error)
        return reply["actions"]

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _read(self) -> dict[str, Any]:
        try:
            return unpack(self._connection.recv_bytes())
        except EOFError:
            self._process.join(1.0)
            raise RuntimeError(f"the policy's process ended with {self._process.exitcode}") from None


def _answer(make: Callable[[], Infer], connection: Any) -> None:
    with suppress(KeyboardInterrupt, EOFError, BrokenPipeError):
        try:
            infer = make()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            connection.send_bytes(pack({"error": f"{type(error).__name__}: {error}"}))
            return
        connection.send_bytes(pack({}))
        while True:
            observation = unpack(connection.recv_bytes())
            try:
                reply = {"actions": np.asarray(infer(observation), np.float32)}
            except (PolicyServerError, RuntimeError, ValueError) as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            connection.send_bytes(pack(reply))


__all__ = ["Infer", "Inference", "PolicyProcess", "Reply", "ServedActions", "ServerConfig"]
