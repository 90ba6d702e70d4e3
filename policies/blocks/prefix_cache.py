"""How action tokens meet a cached prefix: their mask, their positions, and what a critic reads of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.protocols import Prefix, PrefixKV


def make_prefix(hidden: Tensor, layers: tuple[PrefixKV, ...], mask: Tensor, state: Tensor) -> Prefix:
    """A prefix of `layers` alone; its features are those of `hidden [N, T, D]`, see `pooled_features`.

    Hidden states of language models have a few tokens and dimensions that are hundreds of times the others: each token
    is scaled to a root mean square of 1 before the mean.
    """
    scaled = functional.rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)
    pooled = pooled_features(scaled, mask, state)
    return Prefix(pooled.new_empty(*mask.shape, 0), mask, pooled, layers)


def pooled_features(x: Tensor, mask: Tensor, state: Tensor) -> Tensor:
    """Features for critics, float32 [N, D + S]: mean of `x [N, T, D]` over the tokens that count, and the normalised
    `state [N, S]`."""
    weight = mask.float() / mask.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.cat([torch.einsum("nt,ntd->nd", weight, x.float()), state.float()], dim=1)


def suffix_mask(prefix_mask: Tensor, among: Tensor) -> Tensor:
    """bool [N, L, T + K]: each of L tokens looks at what counts of a prefix (`prefix_mask [N, T]`), and at those of the
    K tokens after it that `among` (bool [L, K]) says."""
    n, length = prefix_mask.shape[0], among.shape[0]
    return torch.cat([prefix_mask[:, None].expand(n, length, -1), among.expand(n, -1, -1)], dim=2)


def suffix_positions(prefix_mask: Tensor, length: int) -> Tensor:
    """int64 [N, L]: they go on where the tokens that count end."""
    return prefix_mask.sum(dim=1, keepdim=True) + torch.arange(length, device=prefix_mask.device)


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` in the layer's own precision, whatever that of `x`."""
    return layer(x.to(layer.weight.dtype))


__all__ = ["make_prefix", "pooled_features", "project", "suffix_mask", "suffix_positions"]
