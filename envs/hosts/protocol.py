"""What a simulator that runs in a process of its own must offer, and the bytes that carry it.

The modules of this folder run in the simulator's own Python: they import numpy, the standard library and the simulator,
never vla_rl, whose pins may not live there. A host module `NAME_host.py` has one function,

    def build(options: dict) -> HostedEnv

`serve.py` serves several of these over a socket, as modules of one package; `vla_rl.envs.remote` is the other end.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

_HEADER = struct.Struct("<Q")


class HostedEnv(Protocol):
    """One environment. Only `reset` draws random numbers, from its seed alone; the rest is deterministic.

    A step after an episode's end does not happen: whoever calls resets first.
    """

    def spec(self) -> dict[str, Any]:
        """{"name", "cameras": {name: [h, w]}, "state_names", "action_low", "action_high", "action_names",
        "max_episode_steps": int or None, "control_hz"}: plain JSON values."""
        ...

    def reset(self, seed: int) -> None:
        """Start the episode of `seed` (0 <= seed < 2^63), settle steps included."""
        ...

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool]:
        """One control step of `action`, float64 [A] within the bounds: reward, terminated, truncated, success."""
        ...

    def observe(self, images: bool) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
        """State float32 [S] in SI units, pictures uint8 [h, w, 3] (rendered only if asked for, else {}), the
        instruction."""
        ...

    def render(self) -> np.ndarray:
        """A picture for people, uint8 [h, w, 3]."""
        ...

    def expert_action(self) -> np.ndarray:
        """What a scripted expert does now, float64 [A]. Raises NotImplementedError where there is none."""
        ...

    def close(self) -> None: ...


def send(channel: socket.socket, message: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """One message: JSON values, then arrays as raw bytes. Nothing is pickled."""
    parts = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    layout = {name: [array.dtype.str, list(array.shape)] for name, array in parts.items()}
    head = json.dumps({**message, "arrays": layout}).encode()
    channel.sendall(b"".join([_HEADER.pack(len(head)), head, *(array.tobytes() for array in parts.values())]))


def receive(channel: socket.socket) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The next message. Raises ConnectionError where the other end is gone, TimeoutError after the socket's timeout."""
    message = json.loads(_read(channel, _HEADER.unpack(_read(channel, _HEADER.size))[0]))
    arrays = {}
    for name, (dtype, shape) in message.pop("arrays").items():
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(bytearray(_read(channel, size)), dtype).reshape(shape)
    return message, arrays


def _read(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = channel.recv(min(size - len(data), 1 << 20))
        if not part:
            raise ConnectionError("the other end of the socket is gone")
        data += part
    return bytes(data)
