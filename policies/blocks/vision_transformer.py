"""The vision transformer of the public VLAs: SigLIP (pi0, SmolVLA, OpenVLA) and DINOv2 with registers (OpenVLA).

Names of modules are those of transformers' SigLIP; a checkpoint that holds queries, keys and values in one matrix is
split when it is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class VisionTransformerConfig:
    """`num_registers`, `class_token`: extra tokens before the patches, which are not returned. `layer_scale`: branches
    are scaled by learned factors (DINOv2). `num_unused_layers`: layers at the end that are not built, as where a
    checkpoint's features are those of the second-to-last block. `final_norm`: a LayerNorm after the last one.
    `film_width`: of a sentence that scales and shifts the tokens between attention and feed-forward (0: none)."""

    width: int
    depth: int
    mlp_width: int
    num_heads: int
    image_size: int
    patch_size: int
    activation: Literal["gelu", "gelu_tanh"] = "gelu_tanh"
    num_registers: int = 0
    class_token: bool = False
    layer_scale: bool = False
    num_unused_layers: int = 0
    final_norm: bool = True
    film_width: int = 0

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class VisionNorm(nn.LayerNorm):
    """LayerNorm in the precision of its own weights, which may be higher than that of `input`."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


class VisionAttention(nn.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionFeedForward(nn.Module):
    def __init__(self, width: int, hidden_width: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)
        self._approximate = "tanh" if activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate=self._approximate))


class VisionLayer(nn.Module):
    """Pre-norm block; FiLM (Perez et al. 2018) between attention and feed-forward, as OpenVLA-OFT has it."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.layer_norm1 = VisionNorm(config.width)
        self.self_attn = VisionAttention(config.width, config.num_heads)
        self.layer_norm2 = VisionNorm(config.width)
        self.mlp = VisionFeedForward(config.width, config.mlp_width, config.activation)
        if config.layer_scale:
            self.scale1 = nn.Parameter(torch.full((config.width,), 1e-5))
            self.scale2 = nn.Parameter(torch.full((config.width,), 1e-5))
        if config.film_width:
            self.film_scale = nn.Linear(config.film_width, config.width)
            self.film_shift = nn.Linear(config.film_width, config.width)
        self._scaled, self._film = config.layer_scale, config.film_width > 0

    def forward(self, x: Tensor, sentence: Tensor | None = None) -> Tensor:
        y = self.self_attn(self.layer_norm1(x))
        x = x + (self.scale1 * y if self._scaled else y)
        if self._film:
            assert sentence is not None
            x = x * (1.0 + self.film_scale(sentence)[:, None]) + self.film_shift(sentence)[:, None]
        y = self.mlp(self.layer_norm2(x))
        return x + (self.scale2 * y if self._scaled else y)


class VisionTransformer(nn.Module):
    """float [N, 3, image_size, image_size] -> patch features [N, num_patches, width]."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(config.num_patches, config.width))
        num_extra = config.num_registers + int(config.class_token)
        self.num_extra = num_extra
        if num_extra:
            self.extra_tokens = nn.Parameter(torch.zeros(num_extra, config.width))  # class token first
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.depth - config.num_unused_layers))
        if config.final_norm:
            self.post_layernorm = VisionNorm(config.width)

    def forward(self, images: Tensor, sentence: Tensor | None = None) -> Tensor:
        """`sentence`: [N, film_width], where the tower has FiLM. Raises ValueError for pictures of another size."""
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"the vision tower takes [N, 3, {size}, {size}], got {tuple(images.shape)}")
        x = self.patch_embedding(images.to(self.patch_embedding.weight.dtype)).flatten(2).mT + self.position_embedding
        if self.num_extra:
            x = torch.cat([self.extra_tokens.expand(len(x), -1, -1), x], dim=1)
        x = x.to(cast(VisionLayer, self.layers[0]).mlp.fc1.weight.dtype)
        for layer in cast(Iterable[VisionLayer], self.layers):
            x = layer(x, sentence)
        x = x[:, self.num_extra :]
        return self.post_layernorm(x) if self.config.final_norm else x


__all__ = ["VisionTransformer", "VisionTransformerConfig"]
