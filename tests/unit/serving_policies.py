"""Small policies in folders, and servers of them, for the tests of serving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_rl.policies.checkpoints.native import save_policy
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig
from vla_rl.serving.config import ServerConfig
from vla_rl.serving.server import PolicyServer

STATE_DIM, ACTION_DIM, HORIZON = 5, 3, 4


def save_flow_mlp(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Sees the state alone."""
    torch.manual_seed(seed)
    sizes = {"state_dim": STATE_DIM, "action_dim": ACTION_DIM, "action_horizon": HORIZON, "width": 16, **config}
    save_policy(FlowMLP(FlowMLPConfig(**sizes)), folder)
    return folder


def save_tiny_vla(folder: Path) -> Path:
    """Sees two cameras and a sentence."""
    torch.manual_seed(0)
    config = TinyVLAConfig(
        state_dim=STATE_DIM, action_dim=ACTION_DIM, cameras=("base", "wrist"), image_size=32, action_horizon=HORIZON
    )
    save_policy(TinyVLA(config), folder)
    return folder


@contextmanager
def serving(folder: Path, *, api_key: str | None = None, **config: Any) -> Iterator[tuple[PolicyServer, str]]:
    """A server in a thread, and its address."""
    server = PolicyServer(folder, ServerConfig(port=0, **config), api_key=api_key)
    url = server.start()
    try:
        yield server, url
    finally:
        server.stop()


def state(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(STATE_DIM).astype(np.float32)


def observation(seed: int = 0, size: int = 32) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    images = {c: random.integers(0, 256, (size, size, 3), dtype=np.uint8) for c in ("base", "wrist")}
    return {"images": images, "state": state(seed), "prompt": "pick up the red block"}
