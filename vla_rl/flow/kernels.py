"""One transition kernel for all samplers: x' = A*x0_hat + B*noise_hat + s*xi.

With the estimates x0_hat = x - t*v and noise_hat = x + (1-t)*v that a velocity implies, t' the next flow time,
delta = 1/K and a the noise level:

    sampler     A       B                          s
    ODE         1-t'    t'                         0
    Flow-SDE    1-t'    t' - sigma^2 delta/(2t)    sigma sqrt(delta),  sigma^2 = a^2 t/(1-t)     (Euler-Maruyama)
    OU          1-t'    t' rho                     t' sqrt(1-rho^2)                              ("Precise")
    CPS         1-t'    t' cos(pi a/2)             t' sin(pi a/2)
    Flow-Noise  1-t'    t'                         learned, see `noise_head.py`

The drift of Flow-SDE is that of reverse time, dx = [v + sigma^2/(2t) (x + (1-t)v)]dt + sigma dW with dt < 0, which
keeps the marginals of the ODE to first order (Flow-GRPO, arXiv 2505.05470; pi_RL, arXiv 2510.25889).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.flow.schedule import cps_std, flow_sde_std, flow_sde_variance_rate, flow_times, ou_correlation, ou_std


@dataclass(frozen=True)
class KernelTable:
    """The kernel's coefficients for each of K denoising steps.

    `flow_time`: [K+1]. `data_weight` A, `noise_weight` B, `std` s: [K]; `std` is zero where it is learned.
    `state_weight`, `velocity_weight`: [K], the same mean written as state_weight*x + velocity_weight*v.
    """

    flow_time: Tensor
    data_weight: Tensor
    noise_weight: Tensor
    std: Tensor
    state_weight: Tensor
    velocity_weight: Tensor

    def to(self, like: Tensor) -> KernelTable:
        """On the device and in the dtype of `like`."""
        return KernelTable(
            self.flow_time.to(like), self.data_weight.to(like), self.noise_weight.to(like), self.std.to(like),
            self.state_weight.to(like), self.velocity_weight.to(like),
        )  # fmt: skip


def data_estimate(x: Tensor, velocity: Tensor, flow_time: Tensor | float) -> Tensor:
    """E[action | x_t] = x - t*v."""
    return x - flow_time * velocity


def noise_estimate(x: Tensor, velocity: Tensor, flow_time: Tensor | float) -> Tensor:
    """E[noise | x_t] = x + (1-t)*v."""
    return x + (1.0 - flow_time) * velocity


def _noise_weight_and_std(kernel: str, num_steps: int, noise_level: float) -> tuple[Tensor, Tensor]:
    t = flow_times(num_steps)
    following = t[1:]
    if kernel == "flow_sde":
        correction = flow_sde_variance_rate(num_steps, noise_level) / (2.0 * t[:-1] * num_steps)
        return following - correction, flow_sde_std(num_steps, noise_level)
    if kernel == "ou":
        return following * ou_correlation(num_steps, noise_level), ou_std(num_steps, noise_level)
    if kernel == "cps":
        std = cps_std(num_steps, noise_level)
        return torch.sqrt(following**2 - std**2), std
    if kernel in ("ode", "flow_noise"):
        return following, torch.zeros_like(following)
    raise ValueError(f"kernel is {kernel!r}, expected ode, flow_sde, ou, cps or flow_noise")


@lru_cache(maxsize=64)
def kernel_table(kernel: str, num_steps: int, noise_level: float = 0.0) -> KernelTable:
    """Coefficients in float64 on the CPU. `kernel` is one of `config.Kernel` or "ode"."""
    t = flow_times(num_steps)
    current, following = t[:-1], t[1:]
    data_weight = 1.0 - following
    noise_weight, std = _noise_weight_and_std(kernel, num_steps, noise_level)
    if kernel in ("ode", "flow_noise"):
        # exactly x - v/K: the deployed Euler step to the last bit, not its rounding through the two estimates
        state_weight, velocity_weight = torch.ones_like(current), torch.full_like(current, -1.0 / num_steps)
    else:
        state_weight = data_weight + noise_weight
        velocity_weight = noise_weight * (1.0 - current) - data_weight * current
    return KernelTable(t, data_weight, noise_weight, std, state_weight, velocity_weight)


def config_table(config: FlowSamplerConfig, like: Tensor) -> KernelTable:
    """The table of a sampler's configuration, on the device and in the dtype of `like`."""
    level = 0.0 if config.kernel == "flow_noise" else config.level
    return kernel_table(config.kernel, config.num_steps, level).to(like)


def transition_mean(table: KernelTable, step: Tensor, x: Tensor, velocity: Tensor, scored: tuple[int, int]) -> Tensor:
    """Mean of the stochastic transition of `x [N, H, A]` at denoising step `step` (int64 [N]).

    Numbers outside of the first `scored` (action steps, dimensions) carry no noise and follow the ODE.
    """
    num_steps = table.std.shape[0]
    mean = table.state_weight[step][:, None, None] * x + table.velocity_weight[step][:, None, None] * velocity
    horizon, dims = scored
    if (horizon, dims) == tuple(x.shape[1:]):
        return mean
    ode = x - velocity / num_steps
    ode[:, :horizon, :dims] = mean[:, :horizon, :dims]
    return ode
