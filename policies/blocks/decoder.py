"""The decoder-only language model that every VLA family is built on: Gemma, Llama and SmolLM are its settings.

An action expert is the same decoder without a vocabulary, reading a prefix of keys and values that another decoder
has left. Modules and parameters have the names of the public checkpoints, so a checkpoint is read by renaming prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.policies.blocks.transformer import AdaptiveRMSNorm, RMSNorm
from vla_rl.protocols import PrefixKV


@dataclass(frozen=True)
class DecoderConfig:
    """`vocab_size` 0: no embedding of tokens. `mlp_width`: of the gated feed-forward.

    `norm_offset`: norms scale by `1 + weight` (Gemma) instead of `weight` (Llama). `activation`: of the gate.
    `embedding_scale`: what embedded tokens are multiplied by (Gemma: sqrt(width)). `condition_width`: of adaptive norms
    (0: plain ones). `cross_attention_every`: see `is_cross`.
    """

    width: int
    depth: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int = 0
    norm_offset: bool = True
    norm_eps: float = 1e-6
    activation: Literal["gelu_tanh", "silu"] = "gelu_tanh"
    rope_base: float = 10_000.0
    embedding_scale: float = 1.0
    condition_width: int = 0
    cross_attention_every: int = 0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs")

    def is_cross(self, layer: int) -> bool:
        """Whether `layer` attends to the prefix alone: all but every `cross_attention_every`-th (0: none does)."""
        return self.cross_attention_every > 0 and layer % self.cross_attention_every != 0


Rotation = tuple[Tensor, Tensor]


def rotation(positions: Tensor, head_dim: int, base: float) -> Rotation:
    """Cosines and sines [N, 1, L, head_dim / 2] of rotary positions (Su et al. 2021); `positions` int [N, L]."""
    half = head_dim // 2
    frequency = base ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angle = positions[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """`x [N, heads, L, head_dim]`, whose first half pairs with its second, as in all public checkpoints."""
    cos, sin = by
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, *, cross: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        source = kv_width if cross else config.width
        self.q_proj = nn.Linear(config.width, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(source, kv_width, bias=False)
        self.v_proj = nn.Linear(source, kv_width, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.width, bias=False)

    def keys_values(self, x: Tensor, by: Rotation) -> PrefixKV:
        """Keys, turned, and values of `x [N, L, width]`."""
        return PrefixKV(rotate(self._heads(self.k_proj(x)), by), self._heads(self.v_proj(x)))

    def project_again(self, kv: PrefixKV) -> PrefixKV:
        """Keys and values of another decoder, through this layer's own projections (SmolVLA)."""
        keys, values = (x.transpose(1, 2).flatten(2).to(self.k_proj.weight.dtype) for x in kv)
        return PrefixKV(self._heads(self.k_proj(keys)), self._heads(self.v_proj(values)))

    def forward(self, x: Tensor, by: Rotation, kv: PrefixKV, mask: Tensor | None) -> Tensor:
        """`x [N, L, width]` looks at `kv` of T tokens where `mask` (bool [N, L, T]) is True."""
        queries = rotate(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2), by)
        y = functional.scaled_dot_product_attention(
            queries,
            kv.keys,
            kv.values,
            attn_mask=None if mask is None else mask[:, None],
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)


class GatedFeedForward(nn.Module):
    """`down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)
        self._tanh = config.activation == "gelu_tanh"

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = functional.gelu(gate, approximate="tanh") if self._tanh else functional.silu(gate)
        return self.down_proj(gate * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm: attention, then feed-forward; with a condition, both norms are adaptive and gate their branch."""

    def __init__(self, config: DecoderConfig, *, cross: bool = False) -> None:
        super().__init__()
        self.cross = cross
        self.self_attn = DecoderAttention(config, cross=cross)
        self.mlp = GatedFeedForward(config)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)

    def forward(
        self,
        x: Tensor,
        turns: tuple[Rotation, Rotation],
        mask: Tensor | None,
        prefix: PrefixKV | None,
        condition: Tensor | None,
        kv_only: bool = False,
    ) -> tuple[Tensor, PrefixKV | None]:
        """-> new `x` and this layer's own keys and values (None for a cross-attention layer).

        `turns`: of the tokens' positions after the prefix, and of their positions among themselves, which
        cross-attention has. `kv_only`: `x` is not needed any more."""
        normed, gate = _apply(self.input_layernorm, x, condition)
        attention = self.self_attn
        if self.cross:
            assert prefix is not None
            own, by, seen = None, turns[1], attention.project_again(prefix)
            if mask is not None:
                mask = mask[:, :, : prefix.keys.shape[2]]
        else:
            by = turns[0]
            own = seen = attention.keys_values(normed, by)
            if kv_only:
                return x, own
            if prefix is not None:
                seen = append_kv(prefix, own)
        x = _add(x, gate, attention(normed, by, seen, mask))
        normed, gate = _apply(self.post_attention_layernorm, x, condition)
        return _add(x, gate, self.mlp(normed)), own


class Decoder(nn.Module):
    """`config.depth` layers and a last norm; with `vocab_size`, an embedding of tokens."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        if config.vocab_size:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
            nn.init.normal_(self.embed_tokens.weight, std=config.width**-0.5)
        self.layers = nn.ModuleList(DecoderLayer(config, cross=config.is_cross(i)) for i in range(config.depth))
        self.norm = _norm(config)

    @property
    def dtype(self) -> torch.dtype:
        """Of its matrices; norms may have another one."""
        return cast(DecoderLayer, self.layers[0]).mlp.down_proj.weight.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [N, T] -> [N, T, width], scaled."""
        return self.embed_tokens(tokens) * self.config.embedding_scale

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        *,
        prefix: Sequence[PrefixKV] | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, tuple[PrefixKV, ...]]:
        """`x [N, L, width]` -> normed hidden states [N, L, width], and the keys and values of each layer.

        `positions`: int64 [N, L]. `mask`: bool [N, L, T + L], prefix first, True where a query may look (None: all).
        `prefix`: one for each layer, never changed. `condition`: [N, condition_width] of adaptive norms.
        """
        x, kept = self._run(x, positions, mask, prefix, condition, kv_only=False)
        return _apply(self.norm, x, condition)[0], kept

    def prefill(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> tuple[Tensor, tuple[PrefixKV, ...]]:
        """Keys and values of each layer, after the hidden states [N, L, width] that enter the last one (not normed):
        its attention and feed-forward, which no other layer would read, are not computed and get no gradient."""
        return self._run(x, positions, mask, None, None, kv_only=True)

    def freeze_unread(self) -> None:
        """Where `prefill` alone is used, these never get a gradient, and whoever waits for one would wait for ever."""
        last = cast(DecoderLayer, self.layers[-1])
        attention = last.self_attn
        for module in (attention.q_proj, attention.o_proj, last.post_attention_layernorm, last.mlp, self.norm):
            module.requires_grad_(False)

    def _run(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        prefix: Sequence[PrefixKV] | None,
        condition: Tensor | None,
        kv_only: bool,
    ) -> tuple[Tensor, tuple[PrefixKV, ...]]:
        config = self.config
        own = torch.arange(x.shape[1], device=x.device)[None] if config.cross_attention_every else positions
        turns = (
            rotation(positions, config.head_dim, config.rope_base),
            rotation(own, config.head_dim, config.rope_base),
        )
        kept: list[PrefixKV] = []
        for i, module in enumerate(self.layers):
            layer = cast(DecoderLayer, module)
            seen = None if prefix is None else prefix[i]
            last = kv_only and i + 1 == config.depth
            x, kv = layer(x, turns, mask, seen, condition, last)
            if kv is not None:
                kept.append(kv)
        return x, tuple(kept)


def _norm(config: DecoderConfig) -> nn.Module:
    if config.condition_width:
        return AdaptiveRMSNorm(config.width, config.condition_width, initial_gate=0.0, eps=config.norm_eps)
    return RMSNorm(config.width, config.norm_eps, offset=config.norm_offset)


def _apply(norm: nn.Module, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return norm(x, condition) if isinstance(norm, AdaptiveRMSNorm) else (norm(x), None)


def _add(x: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
    return x + branch if gate is None else torch.addcmul(x, gate, branch)


def append_kv(prefix: PrefixKV, own: PrefixKV) -> PrefixKV:
    """Both, along the tokens, in the dtype of `own`."""
    keys, values = (torch.cat([a.to(b.dtype), b], dim=2) for a, b in zip(prefix, own, strict=True))
    return PrefixKV(keys, values)


def block_mask(counts: Tensor, starts_block: Tensor) -> Tensor:
    """bool [N, L, L]: a token looks at those of its own block and of blocks before it that count.

    `counts`: bool [N, L]. `starts_block`: bool [L] or [N, L]; True where a token begins a block (all True: causal).
    """
    block = starts_block.long().cumsum(dim=-1)
    allowed = block[..., None, :] <= block[..., :, None]
    return allowed & counts[:, None, :]


def positions_of(counts: Tensor) -> Tensor:
    """int64 [N, L]: the number of counting tokens before each one; those that do not count take no position."""
    return (counts.long().cumsum(dim=1) - 1).clamp_min(0)


__all__ = ["Decoder", "DecoderConfig", "DecoderLayer", "append_kv", "block_mask", "positions_of", "rotate", "rotation"]
