"""Exponential moving average of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vla_rl.train.sharding import divide_like, local_part


class Ema:
    """`average <- d * average + (1 - d) * parameter` after every update, with d = min(decay, (1 + n) / (10 + n)) at
    update n, so that a short run does not average over its own random start."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema decay must lie in [0, 1), got {decay}")
        self._parameters = list(parameters)
        self.decay = decay
        self.num_updates = 0
        self.average = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = [local_part(p.detach()) for p in self._parameters]
        torch._foreach_lerp_([local_part(a) for a in self.average], parameters, 1.0 - decay)
        self.num_updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the parameters hold the averages; afterwards what they held before."""
        kept = [p.detach().clone() for p in self._parameters]
        self.copy_to_parameters()
        try:
            yield
        finally:
            _copy(kept, self._parameters)

    def copy_to_parameters(self) -> None:
        _copy(self.average, self._parameters)

    def state_dict(self) -> dict[str, object]:
        return {"num_updates": self.num_updates, "average": [a.clone() for a in self.average]}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        average, num_updates = state["average"], state["num_updates"]
        assert isinstance(average, list)
        assert isinstance(num_updates, int)
        if len(average) != len(self.average):
            raise ValueError(f"the stored average has {len(average)} tensors, this policy trains {len(self.average)}")
        _copy([divide_like(a, own) for a, own in zip(average, self.average, strict=True)], self.average)
        self.num_updates = num_updates


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for s, t in zip(source, target, strict=True):
        t.copy_(s)
