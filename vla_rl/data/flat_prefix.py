"""A policy's prefix as one row of numbers, so that replay keeps what a frozen encoder has made and nothing is encoded
twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vla_rl.core import Observation
from vla_rl.protocols import Prefix, PrefixKV

_ANY_SIZE = 8  # of the dummy's pictures: a policy resizes them


class FlatPrefix:
    """`flatten` and its exact inverse for the prefixes of `policy`, whose sizes do not depend on the observation.

    A row begins with the `pooled` features, all that a critic sees. Where a policy says that they are the whole prefix
    (it has `prefix_of`), a row is no longer; else mask, tokens and the keys and values of all layers follow.
    """

    def __init__(self, policy: Any) -> None:
        self._prefix_of: Callable[[Tensor], Prefix] | None = getattr(policy, "prefix_of", None)
        self.width: int = policy.feature_dim
        self._like: Prefix | None = None
        if self._prefix_of is None:
            self._like = _dummy(policy)
            self.width = self.flatten(self._like).shape[1]

    def flatten(self, prefix: Prefix) -> Tensor:
        """float32 [N, width]."""
        if self._prefix_of is not None:
            return prefix.pooled.float()
        parts = [prefix.pooled, prefix.mask, prefix.tokens, *(x for kv in prefix.layers for x in kv)]
        return torch.cat([x.flatten(1).float() for x in parts], dim=1)

    def unflatten(self, rows: Tensor) -> Prefix:
        """[N, width] -> the prefix. Raises ValueError for another width."""
        if rows.shape[1] != self.width:
            raise ValueError(f"rows of features must be [N, {self.width}], got {tuple(rows.shape)}")
        if self._prefix_of is not None:
            return self._prefix_of(rows)
        assert self._like is not None
        at = 0

        def take(like: Tensor) -> Tensor:
            nonlocal at
            size = like[0].numel()
            at += size
            return rows[:, at - size : at].view(len(rows), *like.shape[1:]).to(like.dtype)

        pooled, mask, tokens = take(self._like.pooled), take(self._like.mask), take(self._like.tokens)
        return Prefix(tokens, mask, pooled, tuple(PrefixKV(take(kv.keys), take(kv.values)) for kv in self._like.layers))


@torch.no_grad()
def _dummy(policy: Any) -> Prefix:
    pictures = {camera: torch.zeros(1, _ANY_SIZE, _ANY_SIZE, 3, dtype=torch.uint8) for camera in policy.config.cameras}
    obs = Observation(pictures, torch.zeros(1, policy.config.state_dim), ("",))
    return policy.encode(policy.preprocess(obs))


__all__ = ["FlatPrefix"]
