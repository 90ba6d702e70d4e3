"""Multi-head and grouped-query attention, with an optional prefix of keys and values that never changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.protocols import PrefixKV


class Attention(nn.Module):
    """Self-attention of L tokens which may also look at T prefix tokens; keys and values of both share one softmax.

    With `num_kv_heads < num_heads`, groups of query heads share a key and value head (grouped-query attention,
    Ainslie et al. 2023). With `context_width`, `project_context` turns context tokens of that width into a `PrefixKV`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_width: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None and width % num_heads:
            raise ValueError(f"Attention: width {width} is not a multiple of num_heads {num_heads}; give head_dim")
        if num_heads % self.num_kv_heads:
            raise ValueError(f"Attention: num_heads {num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        self.head_dim = width // num_heads if head_dim is None else head_dim
        kv_width = self.num_kv_heads * self.head_dim
        self._split = [num_heads * self.head_dim, kv_width, kv_width]
        self.qkv = nn.Linear(width, sum(self._split), bias=False)
        self.out = nn.Linear(num_heads * self.head_dim, width, bias=False)
        self.context_kv = None if context_width is None else nn.Linear(context_width, 2 * kv_width, bias=False)

    def project_context(self, context: Tensor) -> PrefixKV:
        """`context [N, T, context_width]` -> its keys and values."""
        if self.context_kv is None:
            raise ValueError("Attention: built without context_width, so it has no projection for a context")
        keys, values = self.context_kv(context).chunk(2, dim=-1)
        return PrefixKV(self._heads(keys, self.num_kv_heads), self._heads(values, self.num_kv_heads))

    def forward(self, x: Tensor, prefix: PrefixKV | None = None, mask: Tensor | None = None) -> Tensor:
        """`x [N, L, width]` -> [N, L, width].

        `mask`: bool, broadcastable to [N, heads, L, T + L] (prefix first), True where a query may look; None: all may.
        """
        queries, keys, values = self.qkv(x).split(self._split, dim=-1)
        queries = self._heads(queries, self.num_heads)
        keys, values = self._heads(keys, self.num_kv_heads), self._heads(values, self.num_kv_heads)
        if prefix is not None:
            keys, values = torch.cat([prefix.keys, keys], dim=2), torch.cat([prefix.values, values], dim=2)
        y = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=self.num_kv_heads != self.num_heads
        )
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        return x.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)


def attention_mask(
    prefix_mask: Tensor | None, token_mask: Tensor | None, num_prefix: int, num_tokens: int
) -> Tensor | None:
    """Mask for `Attention` from which prefix tokens count (`prefix_mask` bool [N, T]) and which tokens count
    (`token_mask` bool [N, L]); None stands for all. Returns bool [N, 1, 1, T + L], or None when everything counts.
    """
    if prefix_mask is None and token_mask is None:
        return None
    known = prefix_mask if prefix_mask is not None else token_mask
    assert known is not None
    n = known.shape[0]
    if prefix_mask is None:
        prefix_mask = known.new_ones(n, num_prefix)
    if token_mask is None:
        token_mask = known.new_ones(n, num_tokens)
    return torch.cat([prefix_mask, token_mask], dim=1)[:, None, None, :]
