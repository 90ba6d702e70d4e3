"""Actions as tokens: 256 bins of [-1, 1], written with the last ids of a language model's vocabulary (OpenVLA).

The edges are `linspace(-1, 1, 256)`, so there are 255 intervals; 1.0 itself is a 256th bin, and shares the centre of
the last interval. (Kim et al. 2024, section 3.2; Brohan et al. 2023.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vla_rl.flow.noise import bins_of_noise

NUM_BINS = 256


def bins_of_actions(actions: Tensor) -> Tensor:
    """Normalised actions, clamped to [-1, 1] -> int64 bins of the same shape, 0 at -1 and 255 at exactly 1."""
    edges = torch.linspace(-1.0, 1.0, NUM_BINS, dtype=torch.float64, device=actions.device)
    return torch.bucketize(actions.double().clamp(-1.0, 1.0), edges, right=True) - 1


def actions_of_bins(bins: Tensor) -> Tensor:
    """int64 bins -> centres of their intervals, float32 of the same shape."""
    edges = torch.linspace(-1.0, 1.0, NUM_BINS, dtype=torch.float64, device=bins.device)
    centers = (edges[:-1] + edges[1:]) / 2.0
    return centers[bins.clamp(0, NUM_BINS - 2)].float()


def pick_bins(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """`logits [N, V]`, `noise` standard normal [N] -> int64 [N].

    `temperature` 0: the most probable bin. Otherwise the bin at which the distribution function passes `Phi(noise)`:
    a sample of softmax(logits / temperature) whose only randomness is `noise`.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    return bins_of_noise(logits.float() / temperature, noise)


def token_loss(logits: Tensor, bins: Tensor) -> Tensor:
    """Cross entropy [N, H, D] of `logits [N, H * D, V]` for `bins` int64 [N, H, D]."""
    return functional.cross_entropy(logits.transpose(1, 2), bins.flatten(1), reduction="none").view_as(bins)


__all__ = ["NUM_BINS", "actions_of_bins", "bins_of_actions", "pick_bins", "token_loss"]
