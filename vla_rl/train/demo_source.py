"""Demonstrations for the behaviour-cloning term of an on-policy update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vla_rl.data.chunks import ChunkDataset
from vla_rl.protocols import PolicyInputs


class DatasetDemos:
    """A `DemoSource` over a dataset: random chunks, as inputs of `policy` and its normalised actions."""

    def __init__(self, dataset: ChunkDataset, policy: Any, seed: int) -> None:
        if dataset.action_horizon != policy.action_horizon:
            raise ValueError(
                f"the dataset gives chunks of {dataset.action_horizon} steps, the policy has {policy.action_horizon}"
            )
        self._dataset, self._policy = dataset, policy
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch_size: int) -> tuple[PolicyInputs, Tensor, Tensor]:
        rows = torch.randint(len(self._dataset), (batch_size,), generator=self._generator)
        chunk = self._dataset.batch(rows)
        inputs = self._policy.preprocess(chunk.obs)
        device = inputs.state.device
        return inputs, self._policy.normalize_actions(chunk.actions.to(device)), chunk.mask.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(state["generator"])
