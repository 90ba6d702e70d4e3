"""A flow policy that sees the state only: a small MLP velocity field. The plainest member of the family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_rl.core import ActionChunk, Observation
from vla_rl.flow.sampling import ode
from vla_rl.protocols import PolicyInputs, Prefix, VelocityOutput


@dataclass(frozen=True)
class FlowMLPConfig:
    """`num_steps`: Euler steps of the deployed policy. `time_dim`: size of the flow time's embedding, even."""

    state_dim: int
    action_dim: int
    action_horizon: int = 4
    width: int = 128
    num_layers: int = 3
    time_dim: int = 16
    num_steps: int = 4

    def __post_init__(self) -> None:
        if self.time_dim % 2:
            raise ValueError(f"time_dim is {self.time_dim}, expected an even number (sines and cosines)")


class FlowMLP(nn.Module):
    """Velocity field of an action chunk given the state: residual SiLU layers over (chunk, flow time, state).

    It has no encoder: the prefix is the normalised state itself, which is also what critics see.
    """

    encoder_is_frozen = True

    def __init__(self, config: FlowMLPConfig) -> None:
        super().__init__()
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
        for name, size in (("state", config.state_dim), ("action", config.action_dim)):
            self.register_buffer(f"{name}_shift", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))

    def set_normalization(self, statistics: Mapping[str, Tensor]) -> None:
        """Store `state_shift`, `state_scale`, `action_shift`, `action_scale`: normalised = (value - shift) / scale."""
        for name, value in statistics.items():
            buffer = self.get_buffer(name)
            if value.shape != buffer.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(buffer.shape)}")
            if name.endswith("scale") and not bool((value > 0).all()):
                raise ValueError(f"{name} must be positive; use 1 for a value that never changes")
            buffer.copy_(value)

    def preprocess(self, obs: Observation) -> PolicyInputs:
        state = obs.state.to(self.state_shift)
        tokens = torch.zeros(len(obs), 0, dtype=torch.int64, device=state.device)
        return PolicyInputs({}, tokens, (state - self.state_shift) / self.state_scale)

    def encode(self, inputs: PolicyInputs) -> Prefix:
        mask = torch.ones(len(inputs), 1, dtype=torch.bool, device=inputs.state.device)
        return Prefix(inputs.state[:, None], mask, inputs.state)

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
        return (actions - self.action_shift) / self.action_scale

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        return actions * self.action_scale + self.action_shift

    @torch.no_grad()
    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        """The ODE from `noise [N, H, A]` (standard normal)."""
        prefix = self.encode(self.preprocess(obs))
        return ActionChunk(self.unnormalize_actions(ode(self, prefix, noise, self.config.num_steps)))

    def supervised_loss(
        self, inputs: PolicyInputs, actions: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Flow matching, [N]: E ||v(x_t, t) - (noise - action)||^2, t uniform, mean over real steps and dimensions."""
        t = torch.rand(len(actions), generator=generator, device=actions.device, dtype=actions.dtype)
        noise = torch.randn(actions.shape, generator=generator, device=actions.device, dtype=actions.dtype)
        time = t[:, None, None]
        velocity = self.velocity(self.encode(inputs), time * noise + (1.0 - time) * actions, t).velocity
        error = ((velocity - (noise - actions)) ** 2).mean(dim=2)
        weight = mask.to(error.dtype)
        return (error * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
