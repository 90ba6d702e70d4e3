"""Online and offline data in one batch, as RLPD mixes them (Ball et al. 2023): every minibatch has the ratio.

Laying [online; offline] end to end and then cutting it into minibatches gives some that are purely online and some
that are purely offline; here the rows of a minibatch alternate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vla_rl.core import Observation
from vla_rl.data.replay import ReplayBatch, ReplayBuffer


def offline_positions(batch_size: int, offline_ratio: float) -> np.ndarray:
    """bool [B]: which rows of a minibatch are offline, spread evenly. Raises ValueError unless the count is whole."""
    count = round(batch_size * offline_ratio)
    if not 0 <= offline_ratio <= 1 or abs(count - batch_size * offline_ratio) > 1e-6:
        raise ValueError(f"{offline_ratio} of a minibatch of {batch_size} is no whole number of rows from 0 to all")
    filled = np.arange(batch_size + 1) * count // batch_size
    return np.diff(filled) > 0


def mix(
    online: ReplayBuffer,
    offline: ReplayBuffer,
    batch_size: int,
    offline_ratio: float,
    rng: np.random.Generator,
    num_minibatches: int,
    *,
    horizon: int,
    prefixes: bool = False,
) -> ReplayBatch:
    """U minibatches [U, B, ...], each with exactly `offline_ratio` of offline rows, interleaved.

    `rows` of the offline buffer are numbered after the online one's: row + online.num_rows (see `MixedReplay`).
    Raises ValueError where the two do not learn the same reward: another gamma, scale or bias.
    """
    for name in ("gamma", "reward_scale", "reward_bias"):
        a, b = getattr(online.config, name), getattr(offline.config, name)
        if a != b:
            raise ValueError(f"online and offline data must have one {name}, got {a} and {b}")
    is_offline = offline_positions(batch_size, offline_ratio)
    sides: list[tuple[np.ndarray, ReplayBatch]] = []
    for buffer, where, shift in ((online, ~is_offline, 0), (offline, is_offline, online.num_rows)):
        if where.any():
            part = buffer.sample(
                int(where.sum()), rng, horizon=horizon, prefixes=prefixes, num_minibatches=num_minibatches
            )
            sides.append((where, _shift_rows(part, shift)))
    return ReplayBatch(*(_interleave([where for where, _ in sides], parts) for parts in zip(*(p for _, p in sides))))  # noqa: B905


def _shift_rows(batch: ReplayBatch, shift: int) -> ReplayBatch:
    more = batch.prefix_next_rows
    return batch._replace(
        rows=batch.rows + shift,
        next_rows=batch.next_rows + shift,
        prefix_next_rows=None if more is None else more + shift,
    )


def _interleave(where: list[np.ndarray], parts: tuple[np.ndarray | None, ...]) -> np.ndarray:
    """[U, B, ...] of [U, n, ...] parts, part j at the positions where[j]."""
    first = parts[0]
    if first is None:
        return None  # pyright: ignore[reportReturnType]  # no prefixes
    out = np.empty((first.shape[0], len(where[0]), *first.shape[2:]), first.dtype)
    for positions, part in zip(where, parts, strict=True):
        out[:, positions] = part
    return out


@dataclass(frozen=True)
class MixedReplay:
    """Two buffers that are sampled as one, for a learner that asks for `sample`, `observations` and `proposals`."""

    online: ReplayBuffer
    offline: ReplayBuffer
    offline_ratio: float

    def sample(
        self,
        batch_size: int,
        rng: np.random.Generator,
        *,
        horizon: int,
        prefixes: bool = False,
        num_minibatches: int | None = None,
    ) -> ReplayBatch:
        """As `ReplayBuffer.sample`; `batch_size` is of one minibatch."""
        u = num_minibatches or 1
        batch = mix(
            self.online, self.offline, batch_size, self.offline_ratio, rng, u, horizon=horizon, prefixes=prefixes
        )
        if num_minibatches is not None:
            return batch
        return ReplayBatch(*(x if x is None else x[0] for x in batch))  # pyright: ignore[reportArgumentType]

    def observations(self, rows: np.ndarray) -> Observation:
        """What a policy saw at `rows [M]` of a mixed batch."""
        rows = np.asarray(rows, np.int64)
        order = np.argsort(rows >= self.online.num_rows, kind="stable")
        parts = [b.observations(r) for b, r in self._sides(rows[order]) if len(r)]
        return Observation.concatenate(parts).select(_inverse(order))

    def proposals(self, rows: np.ndarray, horizon: int) -> np.ndarray:
        """What the policy proposed for the chunks at `rows [M]`, [M, H, A]."""
        rows = np.asarray(rows, np.int64)
        order = np.argsort(rows >= self.online.num_rows, kind="stable")
        parts = [b.proposals(r, horizon) for b, r in self._sides(rows[order])]
        return np.concatenate(parts)[_inverse(order).numpy()]

    def _sides(self, rows: np.ndarray) -> list[tuple[ReplayBuffer, np.ndarray]]:
        edge = int((rows < self.online.num_rows).sum())
        return [(self.online, rows[:edge]), (self.offline, rows[edge:] - self.online.num_rows)]


def _inverse(order: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.argsort(order))


__all__ = ["MixedReplay", "mix", "offline_positions"]
