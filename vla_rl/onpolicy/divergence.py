"""The error of an update that met a number which is not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class DivergenceError(RuntimeError):
    """Raised before the step that would have spoilt the parameters. `minibatch`: what the loss was made of."""

    def __init__(self, message: str, minibatch: Mapping[str, Tensor]) -> None:
        super().__init__(message)
        self.minibatch = dict(minibatch)


def require_finite(name: str, value: Tensor, minibatch: Mapping[str, Tensor]) -> None:
    """Raise DivergenceError where `value` holds a NaN or an infinity."""
    if not bool(torch.isfinite(value).all()):
        raise DivergenceError(
            f"{name} is not finite; the parameters were not changed. Look at the dumped minibatch; "
            "usual causes are a learning rate that is too high or a reward that is not finite",
            {key: tensor.detach().clone() for key, tensor in minibatch.items()},
        )
