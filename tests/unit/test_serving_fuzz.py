"""A hundred thousand broken messages: each is answered or its session closed with a structured error, none does harm.

Most go through the decoder and the request's checks in this process; thousands through a socket to a server, whole, cut
and as frames or handshakes that are none.
"""

from __future__ import annotations

import json
import os
import random
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.unit.serving_policies import observation, save_tiny_vla, serving
from vla_rl.serving.client import PolicyClient
from vla_rl.serving.messages import MessageError, pack, unpack
from vla_rl.serving.requests import FLAT_KEYS, RequestError, RequestShapes, read_request

IN_PROCESS, OVER_SOCKET, RAW = 112_000, 2_600, 400
SHAPES = RequestShapes(("base", "wrist"), 5, (4, 3), 3)
DTYPES = [
    "<f4",
    ">f8",
    "|u1",
    "|O8",
    "<c8",
    "|V4",
    "f4,f4",
    "<f3",
    "|S0",
    "<U9999",
    "",
    "{'a':1}",
    "<M8[s]",
    "<f4\n",
    7,
    None,
]


def random_value(r: random.Random, depth: int = 0) -> Any:
    """A value of any kind that msgpack can write, and arrays as no client would write them."""
    kind = r.randrange(13 if depth < 4 else 9)
    if kind == 0:
        return r.choice([None, True, False, 0, -1, 2**63, -(2**63), 1e308, float("nan"), float("inf")])
    if kind <= 2:
        return "".join(chr(r.randrange(1, 0x3000)) for _ in range(r.randrange(8)))
    if kind == 3:
        return r.randbytes(r.randrange(24))
    if kind == 4:
        return msgpack.ExtType(r.randrange(128), r.randbytes(r.randrange(9)))
    if kind <= 6:
        shape = r.choice([[2], [1, 2], [-1], [2**40, 2**40], [0], [2.0], "2", None, [[2]], [1] * 40, []])
        return {b"__ndarray__": True, b"data": r.randbytes(8), b"dtype": r.choice(DTYPES), b"shape": shape}
    if kind == 7:
        data = r.choice([1, 1.5, "x", b"x", None, [], 2**60])
        return {b"__npgeneric__": True, b"data": data, b"dtype": r.choice(DTYPES)}
    if kind == 8:
        return r.randrange(-(2**31), 2**31)
    if kind <= 10:
        return [random_value(r, depth + 1) for _ in range(r.randrange(5))]
    return {
        r.choice(["a", b"b", "images", "state", b"__ndarray__", "id"]): random_value(r, depth + 1) for _ in range(4)
    }


def broken(r: random.Random, valid: bytes) -> bytes:
    """One of: noise, a valid message cut, with flipped bytes or repeated, one with a wrong value, or any value."""
    kind = r.randrange(8)
    if kind == 0:
        return r.randbytes(r.randrange(64))
    if kind == 1:
        return valid[: r.randrange(len(valid))]
    if kind == 2:
        return valid + r.randbytes(1 + r.randrange(4))
    if kind == 3:
        data = bytearray(valid)
        for _ in range(1 + r.randrange(4)):
            data[r.randrange(min(200, len(data)))] = r.randrange(256)
        return bytes(data)
    if kind <= 6:
        message: dict[Any, Any] = observation(size=4)
        message["vla_rl"] = {"id": 1, "deadline_ms": 500.0, "session": 2, "decision": 0, "delay": 1}
        place = r.choice([message, message, message["images"], message["vla_rl"]])
        place[r.choice([*place, "prefix", "noise", "id"])] = random_value(r)
        return msgpack.packb(message, default=unpacked)  # pyright: ignore[reportReturnType]
    return msgpack.packb(random_value(r))  # pyright: ignore[reportReturnType]


def unpacked(array: np.ndarray) -> dict[bytes, Any]:
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def test_the_decoder_and_the_checks() -> None:
    r, valid, outcomes, longest = random.Random(0), pack(observation(size=4)), Counter(), 0
    for i in range(IN_PROCESS):
        data = broken(r, valid)
        try:
            request = read_request(unpack(data), SHAPES, FLAT_KEYS["libero"] if i % 2 else None)
        except (MessageError, RequestError) as error:
            outcomes[getattr(error, "code", "bad_message")] += 1
            longest = max(longest, len(str(error)))
        else:  # harmless: what a policy is given is of the right kind whatever was sent
            outcomes["taken"] += 1
            assert request.state.shape == (5,)
            assert np.isfinite(request.state).all()
            assert {c: (x.dtype, x.shape[2]) for c, x in request.images.items()} == dict.fromkeys(
                SHAPES.cameras, (np.dtype(np.uint8), 3)
            )
    assert sum(outcomes.values()) == IN_PROCESS
    assert sum(outcomes.values()) - outcomes["taken"] > 100_000
    assert longest < 2000
    assert min(outcomes[k] for k in ("bad_message", "bad_observation", "bad_request", "taken")) > 1000, outcomes


def ask(ws: Any, data: bytes | str) -> str:
    """How the server took it: "answered", the code of an error to the request, or "closed: ..." with its code."""
    ws.send(data)
    reply = ws.recv(timeout=10)
    if isinstance(reply, bytes):
        message = unpack(reply)
        return message["error"]["code"] if "error" in message else "answered"
    code = json.loads(reply)["error"]["code"]
    with pytest.raises(ConnectionClosed) as closed:
        ws.recv(timeout=10)
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1011, code)
    return f"closed: {code}"


def test_a_server_survives_broken_messages_and_frames(tmp_path: Path) -> None:
    r, valid, outcomes = random.Random(1), pack(observation(size=4)), Counter()
    limits = {"max_requests_per_s": 1e6, "max_clients": 8, "batch_window_ms": 0.0}
    folder = save_tiny_vla(tmp_path / "policy")
    with serving(folder, **limits) as (server, url), PolicyClient(url, timeout_s=20) as bystander:
        ws = None
        for i in range(OVER_SOCKET):
            if ws is None:
                ws = connect(url, compression=None, proxy=None, legacy=True)
                ws.recv()
            outcome = ask(ws, "text" if i % 100 == 99 else broken(r, valid))
            outcomes[outcome] += 1
            if outcome.startswith("closed"):
                ws = None
        if ws is not None:
            ws.close()
        for i in range(RAW):
            outcomes[raw_bytes(url, r, handshake=i % 2 == 0)] += 1
        reply = bystander.infer(observation(size=4))  # on the session that was there all the time
        assert reply["actions"].shape == (4, 3)
        assert len(server._clients) <= 2
    assert sum(outcomes.values()) == OVER_SOCKET + RAW
    wanted = ("answered", "bad_observation", "bad_request", "closed: bad_message", "closed: bad_observation", "ended")
    assert all(outcomes[k] > 50 for k in wanted), outcomes


def raw_bytes(url: str, r: random.Random, *, handshake: bool) -> str:
    """Bytes that are no websocket frames, or no HTTP; the server hangs up by itself or at our end of the stream."""
    address = urlparse(url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as sock:
        if handshake:
            sock.sendall(
                f"GET / HTTP/1.1\r\nHost: {address.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            assert sock.recv(12) == b"HTTP/1.1 101"
        read_until_end(sock, lambda: sock.sendall(os.urandom(1) + r.randbytes(1 + r.randrange(200))))
    return "ended"


def read_until_end(sock: socket.socket, send: Callable[[], None]) -> None:
    try:
        send()
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    except (ConnectionResetError, BrokenPipeError):
        pass
