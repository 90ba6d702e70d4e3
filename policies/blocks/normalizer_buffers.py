"""Normalisation inside a policy: buffers, so that it is saved, loaded and moved with the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla_rl.data.normalization import Normalizer


class NormalizerBuffers(nn.Module):
    """A `Normalizer` as buffers: `normalize(x) = (x - offset) / scale` per dimension. Starts as the identity."""

    offset: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.kind = "identity"
        self.register_buffer("offset", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    @property
    def normalizer(self) -> Normalizer:
        return Normalizer(self.kind, self.offset.detach().clone(), self.scale.detach().clone())

    def set(self, normalizer: Normalizer) -> None:
        """Take over `normalizer`. Raises ValueError where its dimension is another one."""
        if normalizer.dim != self.offset.shape[0]:
            raise ValueError(f"the policy has {self.offset.shape[0]} dimensions here, the normalizer {normalizer.dim}")
        self.kind = normalizer.kind
        self.offset.copy_(normalizer.offset)
        self.scale.copy_(normalizer.scale)

    def normalize(self, x: Tensor) -> Tensor:
        return (x - self.offset) / self.scale

    def unnormalize(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset
