"""A flow policy that sees the state only: a small MLP velocity field. The plainest member of the family."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vla_rl.core import ActionChunk, Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.flow.sampling import ode
from vla_rl.policies.blocks.flow_matching import FlowMatchingConfig, prefix_flow_loss
from vla_rl.policies.blocks.normalizer_buffers import NormalizerBuffers
from vla_rl.policies.blocks.sizes import require_sizes
from vla_rl.policies.blocks.state_only import state_inputs, state_prefix
from vla_rl.protocols import PolicyInputs, Prefix, VelocityOutput


@dataclass(frozen=True)
class FlowMLPConfig:
    """`state_dim`, `action_dim`: 0 in a recipe, where `build_policy` takes them from the environment.
    `num_steps`: Euler steps of the deployed policy. `time_dim`: size of the flow time's embedding, even."""

    state_dim: int = 0
    action_dim: int = 0
    action_horizon: int = 4
    width: int = 128
    num_layers: int = 3
    time_dim: int = 16
    num_steps: int = 4
    flow_matching: FlowMatchingConfig = field(default_factory=lambda: FlowMatchingConfig("uniform", num_draws=1))

    def __post_init__(self) -> None:
        if self.time_dim % 2:
            raise ValueError(f"time_dim is {self.time_dim}, expected an even number (sines and cosines)")
        if self.flow_matching.max_prefix_delay:
            raise ValueError(
                "FlowMLPConfig: max_prefix_delay needs a flow time for each step, and this network has one for the "
                "whole chunk; take TinyVLAConfig, which may have no camera"
            )


class FlowMLP(nn.Module):
    """Velocity field of an action chunk given the state: residual SiLU layers over (chunk, flow time, state).

    It has no encoder: the prefix is the normalised state itself, which is also what critics see.
    """

    encoder_is_frozen = True
    _frequency: Tensor
    _position: Tensor

    def __init__(self, config: FlowMLPConfig) -> None:
        super().__init__()
        require_sizes(config)
        self.config = config
        self.action_horizon, self.action_dim = config.action_horizon, config.action_dim
        self.feature_dim = config.state_dim
        self.hidden_dim = config.width + config.action_horizon
        chunk = config.action_horizon * config.action_dim
        self.input = nn.Linear(chunk + config.time_dim + config.state_dim, config.width)
        self.layers = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.num_layers - 1))
        self.output = nn.Linear(config.width, chunk)
        frequency = torch.pi * 2.0 ** torch.linspace(0.0, 4.0, config.time_dim // 2)
        self.register_buffer("_frequency", frequency, persistent=False)
        self.register_buffer("_position", torch.eye(config.action_horizon), persistent=False)
        self.state_normalizer = NormalizerBuffers(config.state_dim)
        self.action_normalizer = NormalizerBuffers(config.action_dim)

    def set_normalization(self, state: Normalizer, action: Normalizer) -> None:
        """Normalisers of the state [S] and of one control step's action [A], from the demonstrations' statistics."""
        self.state_normalizer.set(state)
        self.action_normalizer.set(action)

    def preprocess(self, obs: Observation) -> PolicyInputs:
        """Normalise the state. Raises ValueError where its size is another one."""
        return state_inputs(obs, self.state_normalizer)

    def encode(self, inputs: PolicyInputs) -> Prefix:
        return state_prefix(inputs)

    def velocity(self, prefix: Prefix, x_t: Tensor, flow_time: Tensor) -> VelocityOutput:
        """`x_t` [N, H, A], `flow_time` [N] -> velocity [N, H, A]; hidden [N, H, width + H], the last H one-hot."""
        angle = flow_time[:, None] * self._frequency
        x = torch.cat([x_t.flatten(1), torch.sin(angle), torch.cos(angle), prefix.tokens[:, 0]], dim=1)
        hidden = nn.functional.silu(self.input(x))
        for layer in self.layers:
            hidden = hidden + nn.functional.silu(layer(hidden))
        velocity = self.output(hidden).unflatten(1, (self.action_horizon, self.action_dim))
        n = hidden.shape[0]
        step = self._position.to(hidden.dtype).expand(n, -1, -1)
        return VelocityOutput(velocity, torch.cat([hidden[:, None].expand(-1, self.action_horizon, -1), step], dim=2))

    def normalize_actions(self, actions: Tensor) -> Tensor:
        return self.action_normalizer.normalize(actions)

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        return self.action_normalizer.unnormalize(actions)

    @torch.no_grad()
    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """The ODE from `noise [N, H, A]` (standard normal)."""
        return ActionChunk(self.unnormalize_actions(self.chunks(self.encode(self.preprocess(obs)), noise)))

    def chunks(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """Normalised chunks [N, H, A]: the ODE from `noise`."""
        return ode(self, prefix, noise, self.config.num_steps)

    def supervised_loss(
        self, inputs: PolicyInputs, actions: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Flow matching: see `flow_matching_loss`. [N]."""
        return self.prefix_loss(self.encode(inputs), actions, mask, generator)

    def prefix_of(self, features: Tensor) -> Prefix:
        """The features are the normalised state [N, S], which is the prefix. Raises ValueError for another size."""
        if features.shape[1] != self.feature_dim:
            raise ValueError(f"features must be [N, {self.feature_dim}], got {tuple(features.shape)}")
        return state_prefix(PolicyInputs({}, torch.zeros(len(features), 0, dtype=torch.int64), features))

    def prefix_loss(self, prefix: Prefix, actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """`supervised_loss` of what is encoded already."""
        return prefix_flow_loss(self.velocity, prefix, actions, mask, self.config.flow_matching, generator)
