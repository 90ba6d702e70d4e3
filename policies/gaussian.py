"""A state-only policy whose chunk is a diagonal Gaussian: the plain baseline beside the flow policies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vla_rl.core import ActionChunk, Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.policies.blocks.flow_matching import masked_mean
from vla_rl.policies.blocks.heads import mlp
from vla_rl.policies.blocks.normalizer_buffers import NormalizerBuffers
from vla_rl.policies.blocks.sizes import require_sizes
from vla_rl.policies.blocks.state_only import state_inputs, state_prefix
from vla_rl.protocols import PolicyInputs, Prefix


@dataclass(frozen=True)
class GaussianMLPConfig:
    """`state_dim`, `action_dim`: 0 in a recipe, where `build_policy` takes them from the environment.
    `std_min`, `std_max`: bounds of the learned standard deviation, in normalised actions.

    `supervised_loss`: "nll" fits mean and deviation to demonstrations, "mse" the mean alone.
    """

    state_dim: int = 0
    action_dim: int = 0
    action_horizon: int = 8
    hidden_widths: tuple[int, ...] = (128, 128)
    initial_std: float = 0.3
    std_min: float = 0.03
    std_max: float = 1.0
    supervised_loss: Literal["nll", "mse"] = "nll"

    def __post_init__(self) -> None:
        if not 0.0 < self.std_min < self.initial_std < self.std_max:
            raise ValueError(
                f"GaussianMLPConfig: need 0 < std_min < initial_std < std_max, got "
                f"{self.std_min}, {self.initial_std}, {self.std_max}"
            )
        if self.supervised_loss not in ("nll", "mse"):
            raise ValueError(f"GaussianMLPConfig: supervised_loss must be 'nll' or 'mse', got {self.supervised_loss!r}")


class GaussianMLP(nn.Module):
    """Implements `GaussianPolicy` and `HasSupervisedLoss` of `vla_rl.protocols`. Ignores pictures and sentences.

    The standard deviation [H, A] does not depend on the state; its logarithm moves within the bounds along a sigmoid.
    """

    encoder_is_frozen = True  # the features are the normalised state itself

    def __init__(self, config: GaussianMLPConfig) -> None:
        super().__init__()
        require_sizes(config)
        self.config = config
        self.action_horizon, self.action_dim = config.action_horizon, config.action_dim
        self.feature_dim = config.state_dim
        self.state_normalizer = NormalizerBuffers(config.state_dim)
        self.action_normalizer = NormalizerBuffers(config.action_dim)
        self.mean = mlp(config.state_dim, config.hidden_widths, config.action_horizon * config.action_dim)
        self._log_std_low, self._log_std_high = math.log(config.std_min), math.log(config.std_max)
        share = (math.log(config.initial_std) - self._log_std_low) / (self._log_std_high - self._log_std_low)
        logit = math.log(share / (1.0 - share))
        self.std_logit = nn.Parameter(torch.full((config.action_horizon, config.action_dim), logit))

    def set_normalization(self, state: Normalizer, action: Normalizer) -> None:
        """Normalisers of the state [S] and of one control step's action [A], from the demonstrations' statistics."""
        self.state_normalizer.set(state)
        self.action_normalizer.set(action)

    def preprocess(self, obs: Observation) -> PolicyInputs:
        """Normalise the state. Raises ValueError where its size is another one."""
        return state_inputs(obs, self.state_normalizer)

    def encode(self, inputs: PolicyInputs) -> Prefix:
        return state_prefix(inputs)

    def distribution(self, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the normalised chunk, each float32 [N, H, A]."""
        mean = self.mean(prefix.pooled).unflatten(1, (self.action_horizon, self.action_dim))
        log_std = self._log_std_low + (self._log_std_high - self._log_std_low) * self.std_logit.sigmoid()
        return mean.float(), log_std.exp().expand_as(mean)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        return self.action_normalizer.normalize(actions)

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        return self.action_normalizer.unnormalize(actions)

    @torch.no_grad()
    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """`mean + std * noise`; zero noise is the mode."""
        return ActionChunk(self.unnormalize_actions(self.chunks(self.encode(self.preprocess(obs)), noise)))

    def chunks(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """Normalised chunks [N, H, A]: `mean + std * noise`."""
        mean, std = self.distribution(prefix)
        return mean + std * noise.to(mean)

    def supervised_loss(
        self, inputs: PolicyInputs, actions: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Mean over unpadded steps and dimensions of the negative log-density, or of the squared error: [N]."""
        return self.prefix_loss(self.encode(inputs), actions, mask, generator)

    def prefix_of(self, features: Tensor) -> Prefix:
        """The features are the normalised state [N, S], which is the prefix."""
        return state_prefix(PolicyInputs({}, torch.zeros(len(features), 0, dtype=torch.int64), features))

    def prefix_loss(self, prefix: Prefix, actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """`supervised_loss` of what is encoded already."""
        del generator  # nothing is drawn; the argument belongs to the protocol
        mean, std = self.distribution(prefix)
        actions = torch.where(mask.unsqueeze(-1), actions, mean.detach())
        if self.config.supervised_loss == "mse":
            return masked_mean((mean - actions).square(), mask)
        error = 0.5 * ((actions - mean) / std).square() + std.log() + 0.5 * math.log(2.0 * math.pi)
        return masked_mean(error, mask)
