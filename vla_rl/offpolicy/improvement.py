"""Better action chunks out of candidates, by any critic and for any policy: re-rank, ascend, select.

The operators of policy-agnostic RL (PA-RL, arXiv 2412.06685): candidates come as arrays [N, B, H, A] from anywhere, a
torch VLA too; the critic is a function `q(obs [B, O], candidates [N, B, H, A]) -> [N, B]`. No gradient ever goes
through the policy: it learns the improved chunks by its own supervised loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

QFunction = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class ImprovementConfig:
    """Defaults are PA-RL's.

    `num_candidates`: chunks that the policy is asked for. `num_kept`: best of them that go on (global step).
    `num_steps`, `step_size`: gradient ascent on Q with respect to the chunk (local step); 0 steps only re-ranks.
    `selection`: the best one, or one drawn with probability softmax(Q / temperature).
    """

    num_candidates: int = 32
    num_kept: int = 10
    num_steps: int = 10
    step_size: float = 3e-4
    selection: Literal["argmax", "softmax"] = "argmax"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_kept <= self.num_candidates:
            raise ValueError(f"ImprovementConfig needs 1 <= num_kept <= num_candidates, got {self}")
        if self.num_steps < 0 or self.step_size < 0.0 or self.temperature <= 0.0:
            raise ValueError(f"ImprovementConfig needs num_steps >= 0, step_size >= 0 and temperature > 0, got {self}")


def rerank(q: QFunction, obs: Array, candidates: Array, num_kept: int) -> tuple[Array, Array]:
    """The `num_kept` candidates of the highest Q in each row, best first: [M, B, H, A] and their values [M, B].

    Raises ValueError where there are fewer candidates than that.
    """
    if num_kept > candidates.shape[0]:
        raise ValueError(f"cannot keep {num_kept} of {candidates.shape[0]} candidates; sample more from the policy")
    values, index = jax.lax.top_k(q(obs, candidates).T, num_kept)
    return jnp.take_along_axis(candidates, index.T[:, :, None, None], axis=0), values.T


def ascend(
    q: QFunction,
    obs: Array,
    candidates: Array,
    num_steps: int,
    step_size: float,
    low: float = -1.0,
    high: float = 1.0,
) -> tuple[Array, Array]:
    """Gradient ascent on Q from every candidate, within [low, high]: the best iterate of each, and its value [N, B].

    The best one, not the last: where Q is not concave, a step may end lower than it started.
    """

    def value_and_sum(chunks: Array) -> tuple[Array, Array]:
        values = q(obs, chunks)
        return values.sum(), values  # a chunk's value depends on no other chunk, so the sum's gradient is each one's

    def keep_better(best: tuple[Array, Array], chunks: Array, values: Array) -> tuple[Array, Array]:
        better = values > best[1]
        return jnp.where(better[:, :, None, None], chunks, best[0]), jnp.where(better, values, best[1])

    def step(carry: tuple[Array, tuple[Array, Array]], _: None) -> tuple[tuple[Array, tuple[Array, Array]], None]:
        chunks, best = carry
        gradient, values = jax.grad(value_and_sum, has_aux=True)(chunks)
        return (jnp.clip(chunks + step_size * gradient, low, high), keep_better(best, chunks, values)), None

    chunks = jnp.clip(candidates, low, high)
    best = (chunks, jnp.full(chunks.shape[:2], -jnp.inf))
    (chunks, best), _ = jax.lax.scan(step, (chunks, best), None, length=num_steps)
    return keep_better(best, chunks, q(obs, chunks))


def select(
    candidates: Array, values: Array, key: Array, selection: Literal["argmax", "softmax"], temperature: float = 1.0
) -> tuple[Array, Array]:
    """One candidate a row: [B, H, A] and its value [B]."""
    if selection == "argmax":
        index = values.argmax(axis=0)
    else:
        index = jax.random.categorical(key, values / temperature, axis=0)
    chosen = jnp.take_along_axis(candidates, index[None, :, None, None], axis=0)[0]
    return chosen, jnp.take_along_axis(values, index[None], axis=0)[0]


def improve(q: QFunction, obs: Array, candidates: Array, config: ImprovementConfig, key: Array) -> tuple[Array, Array]:
    """Re-rank, ascend, select: improved chunks [B, H, A] in [-1, 1] and their values [B]."""
    kept, values = rerank(q, obs, jnp.clip(candidates, -1.0, 1.0), config.num_kept)
    if config.num_steps:
        kept, values = ascend(q, obs, kept, config.num_steps, config.step_size)
    return select(kept, values, key, config.selection, config.temperature)


__all__ = ["ImprovementConfig", "QFunction", "ascend", "improve", "rerank", "select"]
