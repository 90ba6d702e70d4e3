"""A client of policy servers that speak openpi's protocol; ours or another. numpy, msgpack and websockets, no torch.

A reply that did not come in time is never used: the session is closed, and connecting again is the caller's decision.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from vla_rl.serving.messages import MAX_BYTES, MessageError, pack, unpack

ENVELOPE = "vla_rl"  # key of what only our server understands, in the metadata, in requests and in replies


class PolicyServerError(RuntimeError):
    """The server answered with an error, or cannot be reached. `code`: "closed", "refused", "unauthorized", ..., or the
    server's own (see docs/serving.md)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class PolicyTimeoutError(PolicyServerError):
    """No answer in time. The session is closed."""

    def __init__(self, message: str) -> None:
        super().__init__("timeout", message)


class _Heartbeat:
    """Pings a session from a thread of its own. `lost`: no answer came within `within_s`, or the session has ended; it
    is cut then, which wakes whoever waits for a reply."""

    def __init__(self, ws: ClientConnection, within_s: float) -> None:
        self.lost = False
        self._ws, self._within_s = ws, within_s
        threading.Thread(target=self._run, daemon=True, name="policy-heartbeat").start()

    def _run(self) -> None:
        with suppress(ConnectionClosed, OSError):
            while self._ws.ping().wait(self._within_s):
                time.sleep(self._within_s / 4)
        self.lost = True
        with suppress(OSError):  # gone already
            self._ws.socket.shutdown(socket.SHUT_RDWR)


class PolicyClient:
    """One session with the policy server at `url`, "ws://host:port"; connected when it is made.

    `timeout_s`: for one inference, from sending to the whole reply. `heartbeat_s`: the session is closed once our
    server leaves a ping unanswered for so long, which it does not do because it computes: so a server that was stopped,
    or whose machine or network is gone, is found out long before `timeout_s`; None: no pings. `session`: number that
    addresses the noise at our server, so that the same session gets the same actions for the same observations; None:
    the server takes the next.

    Raises PolicyTimeoutError after `connect_timeout_s`, PolicyServerError where there is no policy server.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        connect_timeout_s: float = 5.0,
        timeout_s: float = 1.0,
        heartbeat_s: float | None = None,
        session: int | None = None,
    ) -> None:
        self.heartbeat_s = heartbeat_s
        self.url, self.timeout_s, self.connect_timeout_s = url, timeout_s, connect_timeout_s
        self.metadata: dict[str, Any] = {}
        self._headers = {} if api_key is None else {"Authorization": f"Api-Key {api_key}"}
        self._session, self._decision, self._request = session, 0, 0
        self._stack = ExitStack()
        self._ws: ClientConnection | None = None
        self._heartbeat: _Heartbeat | None = None
        self.connect()

    def connect(self) -> None:
        """Connect again after an error; does nothing where the session lives."""
        if self.connected:
            return
        self._abort()
        end = time.monotonic() + self.connect_timeout_s
        try:
            context = connect(
                self.url,
                compression=None,
                proxy=None,
                max_size=MAX_BYTES,
                open_timeout=self.connect_timeout_s,
                close_timeout=0.5,
                additional_headers=self._headers,
            )
            self._ws = self._stack.enter_context(context)
            self.metadata = _map(self._ws.recv(timeout=max(0.0, end - time.monotonic())), "metadata")
            if self.heartbeat_s is not None and self.has_envelope:  # others' servers compute on their event loop
                self._heartbeat = _Heartbeat(self._ws, self.heartbeat_s)
        except InvalidStatus as error:
            status = error.response.status_code
            if status == 401:
                raise PolicyServerError("unauthorized", f"{self.url} wants another API key") from error
            raise PolicyServerError("refused", f"{self.url} answered with HTTP {status}") from error
        except TimeoutError as error:
            self._abort()
            raise PolicyTimeoutError(f"{self.url} did not answer within {self.connect_timeout_s:g} s") from error
        except (OSError, WebSocketException, MessageError, PolicyServerError) as error:
            self._abort()
            raise PolicyServerError("refused", f"there is no policy server at {self.url}: {error}") from error

    @property
    def connected(self) -> bool:
        return self._ws is not None and not self._silent

    @property
    def _silent(self) -> bool:
        return self._heartbeat is not None and self._heartbeat.lost

    @property
    def has_envelope(self) -> bool:
        """The server is one of ours: it takes sessions, deadlines, noise and prefixes, and says versions."""
        return isinstance(self.metadata.get(ENVELOPE), Mapping)

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        noise: np.ndarray | None = None,
        prefix: np.ndarray | None = None,
        delay: int = 0,
    ) -> dict[str, Any]:
        """The server's reply: "actions" float32 [H, A], timings, and our server's version and request id in "vla_rl".

        `observation`: {"images": {camera: uint8 [h, w, 3]}, "state": float32 [S], "prompt": str}, or flat keys that
        the server knows. For our server alone: `noise` float32 [H, D] instead of the session's; `prefix` float32
        [P, A], actions that are still to be executed from the time of the observation on, and `delay`, how many of them
        will be when the reply comes (real-time chunking); both may stand in the observation, where
        `ChunkBroker.continuation` puts them.

        Raises PolicyTimeoutError after `timeout_s`, and PolicyServerError with the server's code. The session is closed
        then, except for errors that our server gives a request.
        """
        if not self.connected:
            why = f"left a ping unanswered for {self.heartbeat_s} s, or has ended" if self._silent else "is closed"
            raise PolicyServerError("closed", f"the session with {self.url} {why}; call connect()")
        message = dict(observation)
        prefix, delay = message.pop("prefix", prefix), message.pop("delay", delay)
        if self.has_envelope:
            message[ENVELOPE] = self._envelope(noise, prefix, delay)
        elif noise is not None or prefix is not None:
            raise ValueError(f"{self.url} is not one of our servers: it takes neither noise nor prefix")
        reply = self._exchange(pack(message))
        if self.has_envelope:
            self._check_reply(reply)
        try:
            actions = np.asarray(reply["actions"], np.float32)
        except (KeyError, TypeError, ValueError) as error:
            self._abort()
            raise PolicyServerError("bad_reply", f"the reply has no actions, but {sorted(map(str, reply))}") from error
        if actions.ndim != 2:
            self._abort()
            raise PolicyServerError("bad_reply", f"the reply's actions are {actions.shape}, expected [H, A]")
        self._decision += 1
        return {**reply, "actions": actions}

    def reset(self, session: int | None = None) -> None:
        """Begin an episode: the session's noise starts again, in another `session` where one is given."""
        self._decision = 0
        self._session = self._session if session is None else session

    def close(self) -> None:
        """Say goodbye and close; may be called at any time and again."""
        self._ws = self._heartbeat = None
        self._stack.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------- exchange
    def _envelope(self, noise: np.ndarray | None, prefix: np.ndarray | None, delay: int) -> dict[str, Any]:
        self._request += 1
        envelope: dict[str, Any] = {
            "id": self._request,
            "decision": self._decision,
            "deadline_ms": 1000.0 * self.timeout_s,
        }
        if self._session is not None:
            envelope["session"] = self._session
        if noise is not None:
            envelope["noise"] = np.asarray(noise, np.float32)
        if prefix is not None:
            envelope |= {"prefix": np.asarray(prefix, np.float32), "delay": int(delay)}
        return envelope

    def _exchange(self, message: bytes) -> dict[str, Any]:
        assert self._ws is not None
        start = time.monotonic()
        try:
            _limit_send(self._ws.socket, min(self.timeout_s, self.heartbeat_s or self.timeout_s))
            self._ws.send(message)
            data = self._ws.recv(timeout=max(0.0, start + self.timeout_s - time.monotonic()))
            return _map(data, "reply")
        except (OSError, ConnectionClosed) as error:
            silent = self._silent
            self._abort()
            if silent:
                why = f"no answer to a ping for {self.heartbeat_s} s, or the server has ended; the session is closed"
                raise PolicyServerError("closed", why) from error
            if isinstance(error, TimeoutError) or time.monotonic() - start >= self.timeout_s:
                raise PolicyTimeoutError(f"no reply within {self.timeout_s:g} s; the session is closed") from error
            raise PolicyServerError("closed", f"the server has closed the session: {error}") from error
        except BaseException:  # of whatever kind, Ctrl-C too: the reply may still come, and must not be the next one's
            self._abort()
            raise

    def _check_reply(self, reply: Mapping[str, Any]) -> None:
        said = reply.get(ENVELOPE)
        if not isinstance(said, Mapping) or said.get("id") != self._request:
            self._abort()
            raise PolicyServerError("bad_reply", f"the reply is not to request {self._request}; the session is closed")
        error = reply.get("error")
        if error is not None:
            raise PolicyServerError(str(error["code"]), str(error["message"]))

    def _abort(self) -> None:
        """Close without waiting for the other side."""
        ws, self._ws, self._heartbeat = self._ws, None, None
        if ws is not None:
            with suppress(OSError):  # gone already
                ws.socket.shutdown(socket.SHUT_RDWR)
        self._stack.close()


def _limit_send(sock: socket.socket, seconds: float) -> None:
    """A server that no longer reads fills the socket's buffer, and sending would block for good."""
    whole = int(seconds)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", whole, int(1e6 * (seconds - whole))))


def _map(data: str | bytes, what: str) -> dict[str, Any]:
    """Raises PolicyServerError for text, which is how openpi's servers say an error."""
    if isinstance(data, str):
        with suppress(ValueError, TypeError, KeyError):
            error = json.loads(data)["error"]
            raise PolicyServerError(str(error["code"]), str(error["message"])[:2000])
        raise PolicyServerError("server", data[:2000])
    values = unpack(data)
    if not isinstance(values, dict):
        raise MessageError(f"the {what} is a {type(values).__name__}, expected a map")
    return values


__all__ = ["ENVELOPE", "PolicyClient", "PolicyServerError", "PolicyTimeoutError"]
