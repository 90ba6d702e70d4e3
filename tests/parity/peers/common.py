"""What the peers' scripts share: inputs, given noise, and files in our layout of weights."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)


def load_inputs() -> dict[str, Tensor]:
    with np.load(GOLDEN / "inputs.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


class GivenNoise:
    """Stands in for torch's sources of random numbers: each call gets the next array that was put in."""

    def __init__(self) -> None:
        self._normal: list[Tensor] = []
        self._uniform: list[Tensor] = []

    def install(self) -> None:
        torch.distributions.normal._standard_normal = lambda shape, dtype, device: self._next(self._normal, shape)
        drawn = torch.Tensor.uniform_

        def uniform(tensor: Tensor, low: float = 0.0, high: float = 1.0, generator: object = None) -> Tensor:
            if not self._uniform:  # a layer's initial weights, which are replaced
                return drawn(tensor, low, high)
            return tensor.copy_(self._next(self._uniform, tensor.shape))

        torch.Tensor.uniform_ = uniform

    def give(self, normal: list[Tensor], uniform: list[Tensor] | None = None) -> None:
        assert not self._normal, "the peer did not use all of the last noise"
        assert not self._uniform, "the peer did not use all of the last uniform numbers"
        self._normal, self._uniform = list(normal), list(uniform or [])

    @staticmethod
    def _next(queue: list[Tensor], shape: torch.Size) -> Tensor:
        given = queue.pop(0)
        assert given.shape == shape, f"the peer wants {tuple(shape)}, given {tuple(given.shape)}"
        return given.clone()


def rows_first(samples: Tensor) -> Tensor:
    """[N, B, D] -> [B * N, D], where the peer has a row's samples on end."""
    return samples.transpose(0, 1).reshape(-1, samples.shape[-1])


class Results:
    """Losses and gradients by name; `save` writes them beside the options and versions that made them."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.gradients: dict[str, np.ndarray] = {}

    def loss(self, name: str, value: Tensor) -> None:
        self.losses[name] = float(value)

    def gradient(self, name: str, value: Tensor) -> None:
        self.gradients[name] = value.detach().numpy().copy()

    def save(self, peer: str, options: dict[str, object]) -> None:
        versions = {package: importlib.metadata.version(package) for package in (peer, "torch", "numpy")}
        report = {"versions": versions, "options": options, "losses": self.losses}
        (GOLDEN / f"{peer}.json").write_text(json.dumps(report, indent=1) + "\n")
        np.savez_compressed(GOLDEN / f"{peer}.npz", **self.gradients)
        print(f"{peer}: {len(self.losses)} losses, {len(self.gradients)} gradients")
