"""Features of a frozen policy, computed once and kept beside the rows of a replay buffer; never silently stale."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.data.flat_prefix import FlatPrefix
from vla_rl.data.replay import ReplayBuffer
from vla_rl.protocols import HasFeatures, Prefix, require


class Rows(Protocol):
    """Prefixes of M observations as rows, float32 [M, width]."""

    width: int

    def flatten(self, prefix: Prefix) -> Tensor: ...


class FeatureCache:
    """Fills a buffer's features with what `policy` makes of its observations: rows of `FlatPrefix`, which begin with
    what critics get.

    Call `refresh` after data came in or parameters may have changed, before sampling; sampling rows without features is
    an error. `batch_size` is of the encoder's calls. `flat`: other rows than `FlatPrefix`'s.
    """

    def __init__(self, policy: Any, batch_size: int = 256, flat: Rows | None = None) -> None:
        require(policy, HasFeatures, by="FeatureCache")
        if not isinstance(policy, nn.Module):
            raise TypeError(f"FeatureCache needs a torch module to tell when it changes, got {type(policy).__name__}")
        self.policy: Any = policy
        self.batch_size = batch_size
        self.flat: Rows = flat or FlatPrefix(policy)

    def fingerprint(self) -> str:
        """Hash of everything that does not learn in the policy, which a frozen encoder is part of.

        Values are hashed, not counted changes: a copy into `parameter.data` or a loaded checkpoint is noticed too.
        Raises ValueError where the encoder learns: its features would be stale after every update.
        """
        if not self.policy.encoder_is_frozen:
            raise ValueError("the policy's encoder learns, so its features cannot be kept; freeze it first")
        digest = hashlib.sha256()
        learns = {name for name, p in self.policy.named_parameters() if p.requires_grad}
        tensors = [*self.policy.named_parameters(), *self.policy.named_buffers()]
        for name, tensor in sorted(tensors, key=lambda item: item[0]):
            if name not in learns:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def refresh(self, buffer: ReplayBuffer) -> int:
        """Compute what is missing, all of it after the encoder changed. Returns the number of rows encoded."""
        version = self.fingerprint()
        if buffer.encoder_version != version:
            buffer.set_features(np.zeros(0, np.int64), np.zeros((0, buffer.feature_dim), np.float32), version)
        rows = buffer.rows_without_features()
        training = self.policy.training
        self.policy.eval()
        try:
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                buffer.set_features(part, self._encode(buffer, part), version)
        finally:
            self.policy.train(training)
        return len(rows)

    @torch.no_grad()
    def _encode(self, buffer: ReplayBuffer, rows: np.ndarray) -> np.ndarray:
        prefix = self.policy.encode(self.policy.preprocess(buffer.observations(rows)))
        return self.flat.flatten(prefix).cpu().numpy()


__all__ = ["FeatureCache"]
