"""How action tokens meet a cached prefix: their mask, their positions, and what a critic reads of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.protocols import Prefix, PrefixKV


def make_prefix(hidden: Tensor, layers: tuple[PrefixKV, ...], mask: Tensor, state: Tensor) -> Prefix:
    """A prefix whose `pooled` is [mean over the tokens that count of `hidden [N, T, D]`, normalised `state [N, S]`].

    Hidden states of language models have a few tokens and dimensions that are hundreds of times the others: each token
    is scaled to a root mean square of 1 before the mean.
    """
    scaled = functional.rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)
    weight = mask.float() / mask.sum(dim=1, keepdim=True).clamp_min(1)
    pooled = torch.cat([torch.einsum("nt,ntd->nd", weight, scaled), state.float()], dim=1)
    return Prefix(pooled.new_empty(*mask.shape, 0), mask, pooled, layers)


def suffix_mask(prefix_mask: Tensor, among: Tensor) -> Tensor:
    """bool [N, L, T + L]: each of L tokens after a prefix looks at what counts of it (`prefix_mask [N, T]`) and at
    those of its own kind that `among` (bool [L, L]) says."""
    n, length = prefix_mask.shape[0], among.shape[0]
    return torch.cat([prefix_mask[:, None].expand(n, length, -1), among.expand(n, length, length)], dim=2)


def suffix_positions(prefix_mask: Tensor, length: int) -> Tensor:
    """int64 [N, L]: they go on where the tokens that count end."""
    return prefix_mask.sum(dim=1, keepdim=True) + torch.arange(length, device=prefix_mask.device)


def repeat_prefix(prefix: Prefix, draws: int) -> Prefix:
    """Row `d * N + i` is row i: as `flow_matching_loss` folds its draws into the batch."""
    if draws == 1:
        return prefix
    return prefix.select(torch.arange(len(prefix), device=prefix.mask.device).repeat(draws))


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` in the layer's own precision, whatever that of `x`."""
    return layer(x.to(layer.weight.dtype))


__all__ = ["make_prefix", "project", "repeat_prefix", "suffix_mask", "suffix_positions"]
