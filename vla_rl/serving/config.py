"""Options of the server, and of evaluating a policy behind one. Needs neither msgpack nor websockets."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vla_rl.serving.rtc import RTCConfig


@dataclass(frozen=True)
class ServerConfig:
    """`port`: 0 takes a free one. `keys`: flat keys that are understood besides our own. `batch_window_ms`: how long a
    request waits for those of other clients. `max_requests_per_s`: of one client; it is read no faster, with a second's
    worth at once. `write_timeout_s`: a client that does not read its answer is cut off. `noise_seed`: with a client's
    session and decision it addresses the policy's noise."""

    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "cpu"
    keys: Literal["none", "libero", "droid"] = "none"
    batch_window_ms: float = 2.0
    max_batch_size: int = 16
    max_clients: int = 64
    max_requests_per_s: float = 200.0
    max_message_bytes: int = 16 * 2**20
    write_timeout_s: float = 2.0
    noise_seed: int = 0
    rtc: RTCConfig = field(default_factory=RTCConfig)

    def __post_init__(self) -> None:
        positive = (self.max_batch_size, self.max_clients, self.max_requests_per_s, self.max_message_bytes)
        if min(positive) <= 0 or self.write_timeout_s <= 0 or self.batch_window_ms < 0 or self.noise_seed < 0:
            raise ValueError("ServerConfig: limits and timeouts must be positive, batch_window_ms and noise_seed >= 0")


@dataclass(frozen=True)
class RemoteConfig:
    """`keys`: how observations are written; "none" is ours. `num_sessions`: requests at the same time. `timeout_s`: for
    one inference, `first_timeout_s` for the first, in which a server may compile."""

    keys: Literal["none", "libero", "droid"] = "none"
    api_key_file: Path | None = None
    num_sessions: int = 4
    timeout_s: float = 30.0
    first_timeout_s: float = 120.0


def read_api_key(file: Path) -> str:
    """The key in a file's only line. Raises ValueError for an empty one."""
    key = file.read_text(encoding="utf-8").strip()
    if not key or "\n" in key:
        raise ValueError(f"{file} must hold one line, the API key")
    return key


def require_serving() -> None:
    """Raise RuntimeError where the packages of the optional extra are missing."""
    missing = [name for name in ("msgpack", "websockets") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"{' and '.join(missing)} not found; serving needs pip install 'vla-rl[serving]'")


__all__ = ["RemoteConfig", "ServerConfig", "read_api_key", "require_serving"]
