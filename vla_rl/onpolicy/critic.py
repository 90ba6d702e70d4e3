"""The value function: an MLP on the policy's features, and its update."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vla_rl.train.distributed import average_gradients, num_minibatches
from vla_rl.train.divergence import require_finite


@dataclass(frozen=True)
class CriticConfig:
    """`value_clip`: how far a value may move from the old one before its gradient stops (None: no limit).
    `huber_delta`: where the squared error becomes linear (None: never)."""

    hidden: tuple[int, ...] = (128, 128)
    learning_rate: float = 1e-3
    num_epochs: int = 4
    minibatch_size: int = 512
    max_grad_norm: float = 1.0
    value_clip: float | None = None
    huber_delta: float | None = None

    def __post_init__(self) -> None:
        if min(self.num_epochs, self.minibatch_size) < 1 or min(self.learning_rate, self.max_grad_norm) <= 0.0:
            raise ValueError(f"num_epochs, minibatch_size, learning_rate and max_grad_norm must be positive: {self}")


class Critic(nn.Module):
    """V(s) from detached features `[M, F]` -> `[M]`, float32."""

    def __init__(self, feature_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        sizes = [feature_dim, *hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.detach().float()).squeeze(-1)


def value_loss(
    values: Tensor, old_values: Tensor, targets: Tensor, value_clip: float | None, huber_delta: float | None
) -> Tensor:
    """Mean of half the squared error (or Huber), the larger of the clipped and the unclipped one. All arguments [M]."""

    def error(prediction: Tensor) -> Tensor:
        if huber_delta is None:
            return 0.5 * (prediction - targets) ** 2
        return nn.functional.huber_loss(prediction, targets, reduction="none", delta=huber_delta)

    loss = error(values)
    if value_clip is not None:
        loss = torch.maximum(loss, error(old_values + (values - old_values).clamp(-value_clip, value_clip)))
    return loss.mean()


class CriticUpdate:
    """Owns a critic and its optimiser."""

    def __init__(self, feature_dim: int, config: CriticConfig, device: torch.device | str) -> None:
        self.config = config
        self.critic = Critic(feature_dim, config.hidden).to(device)
        self._optimizer = torch.optim.Adam(self.critic.parameters(), lr=config.learning_rate, fused=True)

    def update(
        self, features: Tensor, old_values: Tensor, targets: Tensor, generator: torch.Generator
    ) -> dict[str, float]:
        """Minibatch epochs of value regression on M samples."""
        config, parameters = self.config, list(self.critic.parameters())
        splits = num_minibatches(len(features), config.minibatch_size)
        loss_sum, norm_sum, count = 0.0, 0.0, 0
        for _ in range(config.num_epochs):
            order = torch.randperm(len(features), generator=generator, device=features.device)
            for rows in order.tensor_split(splits):
                values = self.critic(features[rows])
                loss = value_loss(values, old_values[rows], targets[rows], config.value_clip, config.huber_delta)
                minibatch = {"features": features[rows], "targets": targets[rows], "values": values}
                require_finite("the critic's loss", loss, minibatch)
                self._optimizer.zero_grad()
                loss.backward()
                average_gradients(parameters, len(rows))
                grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                require_finite("the critic's gradient", grad_norm, minibatch)
                self._optimizer.step()
                loss_sum, norm_sum, count = loss_sum + float(loss.detach()), norm_sum + float(grad_norm), count + 1
        return {"value_loss": loss_sum / count, "critic_grad_norm": norm_sum / count}

    def state_dict(self) -> dict[str, Any]:
        return {"critic": self.critic.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.critic.load_state_dict(state["critic"])
        self._optimizer.load_state_dict(state["optimizer"])
