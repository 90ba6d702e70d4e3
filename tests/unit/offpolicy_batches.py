"""Batches and helpers that the tests of off-policy agents share."""

from typing import Any

import jax
import numpy as np

from vla_rl.data.replay import ReplayBatch

OBS_DIM, HORIZON, ACTION_DIM = 3, 2, 2


def random_batch(num_rows: int = 5, seed: int = 0, **fields: Any) -> ReplayBatch:
    """A batch of numbers, not of an environment; `fields` replace its own."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    rows = np.arange(num_rows)
    batch = ReplayBatch(
        obs=normal(num_rows, OBS_DIM),
        actions=np.tanh(normal(num_rows, HORIZON, ACTION_DIM)),
        mask=np.ones((num_rows, HORIZON), bool),
        reward=normal(num_rows),
        discount=np.where(rng.random(num_rows) < 0.3, 0.0, 0.98).astype(np.float32),
        next_obs=normal(num_rows, OBS_DIM),
        mc_return=normal(num_rows),
        weight=np.ones(num_rows, np.float32),
        rows=rows,
        next_rows=rows + HORIZON,
    )
    return batch._replace(**fields)


def minibatches(num_updates: int, num_rows: int = 5) -> ReplayBatch:
    """[U, B, ...]."""
    return random_batch(num_updates * num_rows).fold(num_updates)


def host(tree: Any) -> list[np.ndarray]:
    """Leaves as numpy arrays of their own; keys as their numbers."""

    def leaf(x: Any) -> np.ndarray:
        return np.array(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    return [leaf(x) for x in jax.tree.leaves(tree)]


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit."""
    for x, y in zip(host(a), host(b), strict=True):
        np.testing.assert_array_equal(x, y)


def differs(a: Any, b: Any) -> bool:
    return any(not np.array_equal(x, y) for x, y in zip(host(a), host(b), strict=True))
