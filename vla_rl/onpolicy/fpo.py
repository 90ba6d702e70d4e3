"""FPO (arXiv 2507.21053): PPO with the flow-matching loss in the place of the likelihood.

No stochastic sampler is needed: chunks come from the deployed ODE, and exploration from its random start. For each
chunk M pairs (flow time, noise) are drawn once and kept, and

    ratio = exp( mean_i loss_old(t_i, noise_i) - mean_i loss(t_i, noise_i) )

It is a surrogate from a lower bound, not a likelihood ratio: 1 at the first epoch only because the pairs are kept.

    PPO(FPOSampler(policy, FPOConfig()), PPOConfig(actor=ActorConfig(clip=0.05, target_kl=None)))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vla_rl.flow.kernels import noise_estimate
from vla_rl.flow.likelihood import LogProb, at_least_float32
from vla_rl.flow.noise import NoiseSource, draw_integers, draw_normal
from vla_rl.flow.sampling import ode
from vla_rl.protocols import FlowPolicy, Prefix, chunk_shape


@dataclass(frozen=True)
class FPOConfig:
    """`num_steps`: Euler steps of the rollout. `num_draws`: M. `loss`: squared error of the `noise` that the velocity
    implies, or of the `velocity` itself; mean over the scored numbers. `scored_horizon`: action steps that count, those
    executed (None: all). `time_grid`: flow times are drawn from 1/G, 2/G, ..., 1."""

    num_steps: int = 4
    num_draws: int = 8
    loss: Literal["noise", "velocity"] = "noise"
    scored_horizon: int | None = None
    time_grid: int = 10

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_draws < 1 or self.time_grid < 1:
            raise ValueError("num_steps, num_draws and time_grid must be at least 1")
        if self.loss not in ("noise", "velocity"):
            raise ValueError(f"loss is {self.loss!r}, expected noise or velocity")


@dataclass(frozen=True)
class FPOTrace:
    """`actions`: normalised [N, H, A]. `flow_time` [N, M] and `noise` [N, M, H, A]: the pairs.
    `values` [N, 1], `log_prob` [N]: minus the mean loss when the chunk was drawn."""

    actions: Tensor
    flow_time: Tensor
    noise: Tensor
    values: Tensor
    log_prob: Tensor

    def __len__(self) -> int:
        return self.actions.shape[0]

    def _map(self, function: Callable[[Tensor], Tensor]) -> FPOTrace:
        return FPOTrace(*(function(x) for x in vars(self).values()))

    def select(self, rows: Tensor) -> FPOTrace:
        return self._map(lambda x: x[rows])

    def to(self, device: torch.device | str) -> FPOTrace:
        return self._map(lambda x: x.to(device))

    @staticmethod
    def concatenate(parts: Sequence[FPOTrace]) -> FPOTrace:
        return FPOTrace(*(torch.cat(columns) for columns in zip(*(vars(p).values() for p in parts), strict=True)))


class FPOSampler:
    """Draws chunks by the ODE and scores them by the flow-matching loss. Its `joint` is minus that loss, so the
    joint KL that the update reports is of the surrogate."""

    has_transitions = has_entropy = False

    def __init__(self, policy: FlowPolicy, config: FPOConfig) -> None:
        horizon = policy.action_horizon if config.scored_horizon is None else config.scored_horizon
        if not 1 <= horizon <= policy.action_horizon:
            raise ValueError(f"scored_horizon is {horizon}, expected 1..{policy.action_horizon}")
        self.policy, self.config, self._horizon = policy, config, horizon

    @torch.no_grad()
    def sample(self, prefix: Prefix, generator: NoiseSource) -> tuple[Tensor, FPOTrace]:
        device, n, m = prefix.tokens.device, len(prefix), self.config.num_draws
        shape = chunk_shape(self.policy)
        actions = ode(self.policy, prefix, draw_normal((n, *shape), generator, device), self.config.num_steps)
        grid = self.config.time_grid
        flow_time = (draw_integers(grid, (n, m), generator) + 1.0) / grid
        noise = draw_normal((n, m, *shape), generator, device)
        values = -self._loss(prefix, actions, flow_time, noise)
        return actions, FPOTrace(actions, flow_time, noise, values[:, None], values)

    def score(self, prefix: Prefix, trace: FPOTrace) -> LogProb:
        values = -self._loss(prefix, trace.actions, trace.flow_time, trace.noise)
        no_step = torch.full((len(trace), 1), -1, dtype=torch.int64, device=values.device)
        nothing = values.new_zeros(len(trace), 0, 0, 0)
        return LogProb(values[:, None], no_step, values, None, nothing, nothing)

    def joint_clip(self, clip: float) -> float:
        return clip

    def _loss(self, prefix: Prefix, actions: Tensor, flow_time: Tensor, noise: Tensor) -> Tensor:
        """Mean over the M pairs, [N]."""
        n, m = flow_time.shape
        prefix = prefix.select(torch.arange(n, device=actions.device).repeat_interleave(m))
        t = flow_time.flatten()
        time, flat_noise = t[:, None, None], noise.flatten(0, 1)
        target = actions.repeat_interleave(m, dim=0)
        x_t = time * flat_noise + (1.0 - time) * target
        velocity = at_least_float32(self.policy.velocity(prefix, x_t, t).velocity)
        if self.config.loss == "noise":
            error = noise_estimate(x_t, velocity, time) - flat_noise
        else:
            error = velocity - (flat_noise - target)
        return (error[:, : self._horizon] ** 2).mean(dim=(1, 2)).unflatten(0, (n, m)).mean(dim=1)
