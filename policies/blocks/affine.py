"""Normalisation inside a policy: buffers, so that it is saved, loaded and moved with the weights."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Normalization(Protocol):
    """What a policy asks of a normaliser: an affine map of each dimension (mean/std, quantiles, min/max, identity)."""

    def normalize(self, x: Tensor) -> Tensor: ...

    def unnormalize(self, x: Tensor) -> Tensor: ...


class AffineNormalizer(nn.Module):
    """`normalize(x) = (x - offset) / scale` per dimension, and its inverse. Starts as the identity."""

    offset: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def set(self, offset: Tensor, scale: Tensor) -> None:
        """Both [dim], in the units of x. Raises ValueError where `scale` is not positive and finite."""
        if offset.shape != self.offset.shape or scale.shape != self.scale.shape:
            raise ValueError(
                f"normaliser of {self.offset.shape[0]} dimensions got offset {tuple(offset.shape)} "
                f"and scale {tuple(scale.shape)}"
            )
        if not bool((torch.isfinite(scale) & (scale > 0) & torch.isfinite(offset)).all()):
            raise ValueError(f"normaliser: offset must be finite and scale positive, got {offset} and {scale}")
        with torch.no_grad():
            self.offset.copy_(offset)
            self.scale.copy_(scale)

    def set_from(self, normalization: Normalization) -> None:
        """Take over an affine `normalization`: its value at normalised 0 is the offset, the step to 1 the scale."""
        zero, one = torch.zeros(1, self.offset.shape[0]), torch.ones(1, self.offset.shape[0])
        offset = normalization.unnormalize(zero)[0]
        self.set(offset, normalization.unnormalize(one)[0] - offset)

    def normalize(self, x: Tensor) -> Tensor:
        return (x - self.offset) / self.scale

    def unnormalize(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset
