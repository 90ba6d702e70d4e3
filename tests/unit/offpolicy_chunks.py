"""Stacked batches and uniform chunks for tests of agents that are given a policy's chunks."""

import numpy as np

from tests.unit.offpolicy_batches import ACTION_DIM, HORIZON
from vla_rl.data.replay import ReplayBatch


def stacked(*batches: ReplayBatch) -> ReplayBatch:
    """Minibatches as `update` wants them, [U, B, ...]."""
    return ReplayBatch(*(None if parts[0] is None else np.stack(parts) for parts in zip(*batches, strict=True)))


def uniform_chunks(*shape: int, seed: int = 5, horizon: int = HORIZON) -> np.ndarray:
    """[*shape, H, A] in [-1, 1]."""
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, horizon, ACTION_DIM)).astype(np.float32)
