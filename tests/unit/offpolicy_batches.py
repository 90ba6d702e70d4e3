"""Replay batches of random numbers for tests of off-policy agents."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla_rl.data.replay import ReplayBatch

O, H, A = 3, 2, 2  # sizes that tests share, so that shapes in them can be read


def random_batch(b: int, *, h: int = H, seed: int = 0, **fields: Any) -> ReplayBatch:
    """B chunks [B, H, A]; `fields` replace what is random or plain."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    batch = ReplayBatch(
        obs=normal(b, O),
        actions=np.tanh(normal(b, h, A)),
        mask=np.ones((b, h), bool),
        reward=normal(b),
        discount=np.full(b, 0.9, np.float32),
        next_obs=normal(b, O),
        mc_return=np.full(b, -np.inf, np.float32),
        weight=np.ones(b, np.float32),
        rows=np.arange(b),
        next_rows=np.arange(b) + h,
        prefix_reward=normal(b, h),
        prefix_discount=np.full((b, h), 0.9, np.float32),
        prefix_next_obs=normal(b, h, O),
        prefix_mask=np.ones((b, h), bool),
        prefix_next_rows=np.zeros((b, h), np.int64),
    )
    return batch._replace(**fields)


def minibatches(*batches: ReplayBatch) -> ReplayBatch:
    """Stack to [U, B, ...]."""
    return ReplayBatch(*(np.stack(parts) for parts in zip(*batches, strict=True)))
