"""The policy server: openpi's websocket protocol, and what its metadata say that ours can do beyond it.

One event loop reads and writes; the policy runs in a thread of its own. A client has one request at a time in the
server: its next one is read when the last is answered, so the socket's buffer is its queue.
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import itertools
import json
import logging
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HTTPRequest
from websockets.http11 import Response

from vla_rl.evaluation.evaluate import policy_noise
from vla_rl.serving.batching import Answer, Batcher
from vla_rl.serving.client import ENVELOPE
from vla_rl.serving.config import ServerConfig
from vla_rl.serving.inference import ServedPolicy, read_policy
from vla_rl.serving.messages import MessageError, pack, unpack
from vla_rl.serving.requests import FLAT_KEYS, Request, RequestError, envelope_of, read_request

_LOG = logging.getLogger("vla_rl.serving")
_SOCKET_LOG = logging.getLogger("vla_rl.serving.websockets")
_SOCKET_LOG.setLevel(logging.CRITICAL)  # a stranger's broken handshake is no traceback in our log


class _Client:
    """What the server keeps of a connection."""

    def __init__(self, session: int, rate: float) -> None:
        self.session, self.decision, self.prev_total_ms = session, 0, None
        self.noise: tuple[tuple[int, int], np.ndarray] | None = None  # of (session, decision), drawn before it is asked
        self._rate, self._tokens, self._at = rate, max(1.0, rate), time.monotonic()
        self.prev_total_ms: float | None

    def wait_s(self) -> float:
        """Takes a token from the bucket; how long until it is there."""
        now = time.monotonic()
        self._tokens = min(max(1.0, self._rate), self._tokens + self._rate * (now - self._at)) - 1.0
        self._at = now
        return max(0.0, -self._tokens / self._rate)


class PolicyServer:
    """Serves the policy of a folder, which is read when the server is made, or one that is there. `api_key`: what
    clients must send, as openpi's do, in the header "Authorization: Api-Key ..."; None: none.

    `run` blocks; `start` and `stop` are for a server in the background of a process.
    """

    def __init__(
        self, policy: str | Path | ServedPolicy, config: ServerConfig | None = None, *, api_key: str | None = None
    ) -> None:
        self.config = config or ServerConfig()
        self.port = self.config.port
        self._api_key = None if api_key is None else f"Api-Key {api_key}".encode()
        self._folder = None if isinstance(policy, ServedPolicy) else Path(policy)
        self._policy = policy if isinstance(policy, ServedPolicy) else self._read(Path(policy), 1)
        self._clients: set[_Client] = set()
        self._sessions = itertools.count()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="policy-loader")
        self._batcher: Batcher | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------------ lifecycle
    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM; SIGHUP reads the policy's folder again."""
        gc.freeze()  # what is imported and loaded stays: no collection in between, or at the end, goes through it
        asyncio.run(self._main(Future(), signals=True))

    def start(self) -> str:
        """Serve from a thread; returns the address for clients, "ws://host:port"."""
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(ready)), name="policy-server", daemon=True
        )
        self._thread.start()
        ready.result()
        return f"ws://{self.config.host}:{self.port}"

    def stop(self) -> None:
        """Close all sessions and end `start`'s thread."""
        if self._loop is not None and self._stopped is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()
            self._thread = None

    def reload(self, folder: str | Path | None = None) -> int:
        """Serve the policy of `folder` (None: the same one, which was written again) from the next batch on; returns
        its version. Clients notice nothing but the version. Raises as `load_any`, and ValueError for a policy that
        takes or returns something else than this one, or that has no folder; then this one goes on."""
        return self._loader.submit(self._swap, self._folder if folder is None else Path(folder)).result()

    def _read(self, folder: Path, version: int) -> ServedPolicy:
        return read_policy(folder, version, device=self.config.device, rtc=self.config.rtc)

    def _swap(self, folder: Path | None) -> int:
        """In the loader's thread, one at a time."""
        if folder is None:
            raise ValueError(f"{self._policy.name} was not read from a folder; name one")
        new = self._read(folder, self._policy.version + 1)
        if _contract(new) != _contract(self._policy):
            raise ValueError(
                f"{folder}: its horizon, actions, cameras or state are {_contract(new)}, "
                f"clients were told {_contract(self._policy)}; start another server"
            )
        self._folder, self._policy = folder, new
        if self._batcher is not None:
            self._batcher.policy = new
        _LOG.warning("serving version %d of %s", new.version, folder)
        return new.version

    def _swap_on_signal(self) -> None:
        def report(done: Future[int]) -> None:
            if error := done.exception():
                _LOG.error("the policy was not read again, the old one goes on: %s", error)

        self._loader.submit(self._swap, self._folder).add_done_callback(report)

    async def _main(self, ready: Future[None], *, signals: bool = False) -> None:
        c = self.config
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        if signals:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._loop.add_signal_handler(number, self._stopped.set)
            self._loop.add_signal_handler(signal.SIGHUP, self._swap_on_signal)
        self._batcher = Batcher(
            self._policy,
            self._loop,
            window_s=c.batch_window_ms / 1000.0,
            max_batch_size=c.max_batch_size,
            num_clients=lambda: len(self._clients),
        )
        try:
            async with self._listen() as server:
                self.port = next(iter(server.sockets)).getsockname()[1]
                ready.set_result(None)
                _LOG.warning("serving %s on ws://%s:%d", self._folder or self._policy.name, c.host, self.port)
                await self._stopped.wait()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
                if not signals:
                    return
            raise
        finally:
            self._batcher.close()
            self._loader.shutdown(wait=False)

    def _listen(self) -> Any:
        c = self.config
        return serve(
            self._serve_client,
            c.host,
            c.port,
            process_request=self._admit,
            compression=None,
            max_size=c.max_message_bytes,
            max_queue=1,
            open_timeout=5.0,
            close_timeout=1.0,
            logger=_SOCKET_LOG,
        )

    # -------------------------------------------------------------------------------------------------------- clients
    def _admit(self, connection: ServerConnection, request: HTTPRequest) -> Response | None:
        """Before the websocket's handshake: health, the API key, room for one more."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self._api_key is not None:
            sent = request.headers.get_all("Authorization")
            if len(sent) != 1 or not hmac.compare_digest(sent[0].encode(errors="replace"), self._api_key):
                return connection.respond(HTTPStatus.UNAUTHORIZED, "Authorization: Api-Key ... is missing or wrong\n")
        if len(self._clients) >= self.config.max_clients:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{self.config.max_clients} clients are served\n")
        return None

    async def _serve_client(self, ws: ServerConnection) -> None:
        client = _Client(next(self._sessions), self.config.max_requests_per_s)
        if len(self._clients) >= self.config.max_clients:  # several were admitted at once
            await ws.close(1013, "overloaded")
            return
        self._clients.add(client)
        try:
            await self._send(ws, pack({ENVELOPE: self._metadata(client)}))
            while True:
                data = await ws.recv()
                answer = await self._answer(client, data)
                await self._send(ws, answer)
                if isinstance(answer, str):
                    await ws.close(1011, json.loads(answer)["error"]["code"])
                    return
                if client.noise is not None:  # while nobody waits
                    (session, decision), _ = client.noise
                    self._noise(client, session, decision + 1)
        except ConnectionClosed:
            return
        finally:
            self._clients.discard(client)

    def _metadata(self, client: _Client) -> dict[str, Any]:
        c = self.config
        return {
            "protocol": 1,
            "session": client.session,
            "flat_keys": c.keys,
            "max_message_bytes": c.max_message_bytes,
            "max_requests_per_s": c.max_requests_per_s,
            **self._policy.metadata(),
        }

    async def _answer(self, client: _Client, data: str | bytes) -> bytes | str:
        """Bytes are a reply, or an error to one request; text is an error after which the session is closed, which is
        how openpi's clients are told."""
        received, start = time.monotonic(), time.perf_counter()
        envelope = None
        try:
            if (wait := client.wait_s()) > 0:
                await asyncio.sleep(wait)
            if isinstance(data, str):
                raise RequestError("bad_message", "requests are binary messages, this one is text")
            message = unpack(data, max_bytes=self.config.max_message_bytes)
            envelope = envelope_of(message)
            request = read_request(message, self._policy.shapes, FLAT_KEYS.get(self.config.keys))
            answer = await self._infer(client, request, received)
        except MessageError as error:
            return _error_text("bad_message", str(error))
        except RequestError as error:
            if envelope is None:
                return _error_text(error.code, str(error))
            said = {"code": error.code, "message": str(error)}
            return pack({"error": said, ENVELOPE: {"id": envelope["id"]}})
        total_ms = 1000.0 * (time.perf_counter() - start)
        reply = _reply(answer, total_ms, client.prev_total_ms)
        if envelope is not None:
            reply[ENVELOPE] = {"id": envelope["id"], "num_batched": answer.num_batched}
        client.prev_total_ms = total_ms
        return pack(reply)

    async def _infer(self, client: _Client, request: Request, received: float) -> Answer:
        assert self._batcher is not None
        noise = request.noise
        if noise is None:
            session = client.session if request.session is None else request.session
            decision = client.decision if request.decision is None else request.decision
            noise = self._noise(client, session, decision)
        deadline = None if request.deadline_ms is None else received + request.deadline_ms / 1000.0
        answer = await self._batcher.infer(request, noise, deadline)
        client.decision += 1
        return answer

    def _noise(self, client: _Client, session: int, decision: int) -> np.ndarray:
        if client.noise is None or client.noise[0] != (session, decision):
            noise = policy_noise(self.config.noise_seed, session, decision, *self._policy.shapes.noise).numpy()
            client.noise = (session, decision), noise
        return client.noise[1]

    async def _send(self, ws: ServerConnection, data: bytes | str) -> None:
        """A client that does not read is cut off, which `send` then raises ConnectionClosed for."""
        timer = asyncio.get_running_loop().call_later(self.config.write_timeout_s, ws.transport.abort)
        try:
            await ws.send(data)
        finally:
            timer.cancel()


def _reply(answer: Answer, total_ms: float, prev_total_ms: float | None) -> dict[str, Any]:
    server_timing = {"infer_ms": total_ms}
    if prev_total_ms is not None:
        server_timing["prev_total_ms"] = prev_total_ms
    return {
        "actions": np.ascontiguousarray(answer.actions),
        "policy_version": answer.policy_version,
        "policy_timing": {"infer_ms": answer.infer_ms},
        "server_timing": server_timing,
    }


def _error_text(code: str, message: str) -> str:
    return json.dumps({"error": {"code": code, "message": message}})


def _contract(policy: ServedPolicy) -> tuple[Any, ...]:
    return policy.policy.action_horizon, policy.policy.action_dim, policy.shapes


__all__ = ["PolicyServer"]
