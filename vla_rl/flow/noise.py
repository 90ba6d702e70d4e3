"""Where samplers draw from: a torch generator for a whole batch, or numbers addressed row by row.

With `RowNoise` the noise of a decision is a function of (seed, environment, window, decision) and of nothing else: it
is the same whoever collects, beside whichever other environments, and a decision can be drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_BLOCK_BITS = 24  # of the first counter word; the other eight count the draws of a decision


def philox(key: tuple[int, int], counter: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four random 32-bit words from four counter words, as int64 tensors.

    Products of two words wrap in int64, and their halves are those of the unsigned product all the same.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


class RowNoise:
    """Randomness of one decision of N environments. Row i of every draw depends on `seed`, `streams[i]`, `window`,
    `decision` and the number of the draw alone.

    `streams`: int64 [N], the environments' numbers in the whole run; its device is that of the draws. `window`: number
    of the call that collects. `decision`: number within it.
    """

    def __init__(self, seed: int, streams: Tensor, window: int, decision: int) -> None:
        self.streams = streams
        self._key = (seed & _WORD, seed >> 32 & _WORD)
        self._window, self._decision = window & _WORD, decision
        self._num_draws = 0

    @property
    def device(self) -> torch.device:
        return self.streams.device

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal float32 [N, ...], by Box and Muller in float64."""
        size = math.prod(shape[1:])
        words = self._words(shape[0], size).double()
        radius = torch.sqrt(-2.0 * torch.log((words[..., :2] + 0.5) * 2.0**-32))
        angle = words[..., 2:] * (2.0 * math.pi * 2.0**-32)
        draws = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
        return draws.flatten(1)[:, :size].float().reshape(tuple(shape))

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """Uniform int64 [N, ...] in [0, high)."""
        size = math.prod(shape[1:])
        words = self._words(shape[0], size)
        return (words.flatten(1)[:, :size] * high >> 32).reshape(tuple(shape))

    def _words(self, num_rows: int, size: int) -> Tensor:
        """int64 [N, B, 4] with 4 B >= size."""
        if num_rows != len(self.streams):
            raise ValueError(f"a draw of {num_rows} rows from the noise of {len(self.streams)} environments")
        num_blocks = -(-size // 4)
        if num_blocks >= 2**_BLOCK_BITS or self._num_draws >= 2 ** (32 - _BLOCK_BITS):
            raise ValueError(
                f"draw {self._num_draws} of {size} numbers a row: more than a decision's noise can address"
            )
        block = torch.arange(num_blocks, device=self.device) + (self._num_draws << _BLOCK_BITS)
        self._num_draws += 1
        shape = (num_rows, num_blocks)
        constant = [torch.full(shape, value, device=self.device) for value in (self._window, self._decision)]
        counter = [block.expand(shape), self.streams[:, None].expand(shape), *constant]
        return torch.stack(philox(self._key, counter), dim=-1)


NoiseSource = torch.Generator | RowNoise


class ShareGenerator(torch.Generator):
    """Of one of several learners that have a batch together: each goes through the numbers for all `num_rows` of it and
    keeps those of its own `rows`, so a sample's numbers do not depend on how many learners there are."""

    num_rows: int
    rows: slice


def rows_to_draw(num_rows: int, generator: torch.Generator) -> tuple[int, slice]:
    """How many rows to draw for `num_rows` that are here, and which of them are theirs. Raises ValueError where these
    are not the share that `generator` is for."""
    if not isinstance(generator, ShareGenerator):
        return num_rows, slice(None)
    mine = generator.rows.stop - generator.rows.start
    if num_rows != mine:
        raise ValueError(f"a draw for {num_rows} rows, this learner's share of a batch has {mine}")
    return generator.num_rows, generator.rows


def draw_normal(
    shape: Sequence[int],
    source: NoiseSource,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal [N, ...] from `source`, which lives on `device`."""
    if isinstance(source, RowNoise):
        return source.normal(shape).to(dtype)
    return torch.randn(tuple(shape), generator=source, device=device or source.device, dtype=dtype)


def draw_integers(high: int, shape: Sequence[int], source: NoiseSource) -> Tensor:
    """Uniform int64 [N, ...] in [0, high) from `source`."""
    if isinstance(source, RowNoise):
        return source.integers(high, shape)
    return torch.randint(high, tuple(shape), generator=source, device=source.device)


def bins_of_noise(logits: Tensor, noise: Tensor) -> Tensor:
    """Samples of softmax(logits) whose only randomness is `noise`: the bins at which the distribution functions pass
    Phi(noise), and never one of probability 0.

    `logits` [..., V], `noise` standard normal [...] -> int64 [...].
    """
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    level = torch.special.ndtr(noise.double()).clamp(max=1.0 - 2.0**-40) * cumulative[..., -1]
    return torch.searchsorted(cumulative, level.unsqueeze(-1), right=True).squeeze(-1)


__all__ = [
    "NoiseSource",
    "RowNoise",
    "ShareGenerator",
    "bins_of_noise",
    "draw_integers",
    "draw_normal",
    "philox",
    "rows_to_draw",
]
