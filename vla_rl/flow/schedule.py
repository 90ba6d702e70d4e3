"""Flow times and the standard deviations that each stochastic sampler adds at each denoising step.

Convention of the whole project: `flow_time` t is 1 at the noise and 0 at the action, x_t = t*noise + (1-t)*action,
velocity = noise - action. K denoising steps visit t_k = 1 - k/K, k = 0..K; the model is evaluated at t_0..t_{K-1}.

Everything here is float64 on the CPU: K numbers that are computed once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def flow_times(num_steps: int) -> Tensor:
    """t_k = 1 - k/K, float64 [K+1]."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1 denoising step")
    return torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps


def flow_sde_variance_rate(num_steps: int, noise_level: float) -> Tensor:
    """sigma_k^2 = a^2 t/(1-t), float64 [K].

    The rate is singular at the noise end; there 1 - t is replaced by 1 - t_1 = 1/K, so that the first step adds a
    standard deviation of exactly `noise_level` whatever K.
    """
    t = flow_times(num_steps)[:-1]
    one_minus_t = torch.clamp(1.0 - t, min=1.0 / num_steps)
    return noise_level**2 * t / one_minus_t


def flow_sde_std(num_steps: int, noise_level: float) -> Tensor:
    """Standard deviation of one Euler-Maruyama step, sigma_k sqrt(1/K), float64 [K]: a, then a sqrt((1 - k/K)/k)."""
    return torch.sqrt(flow_sde_variance_rate(num_steps, noise_level) / num_steps)


def ou_correlation(num_steps: int, noise_level: float) -> Tensor:
    """rho_k, how much of the noise estimate survives step k of the Ornstein-Uhlenbeck solution, float64 [K].

    With the data estimate frozen, z = (x - (1-t) x0_hat)/t is an OU process under the Flow-SDE, and the integral of its
    rate gives rho^2 = [odds(t') / odds(t)]^(a^2), odds(t) = t/(1-t) (arXiv 2605.23522). rho = 0 at t = 1, where the
    odds are infinite, and at t' = 0.
    """
    t = flow_times(num_steps)
    current, following = t[:-1], t[1:]
    # odds(t')/odds(t) written without a division by zero at t = 1
    ratio = following * (1.0 - current) / ((1.0 - following) * current)
    return torch.sqrt(ratio ** (noise_level**2)) * (current < 1.0)


def ou_std(num_steps: int, noise_level: float) -> Tensor:
    """t' sqrt(1 - rho^2), float64 [K]; zero at the last step."""
    return flow_times(num_steps)[1:] * torch.sqrt(1.0 - ou_correlation(num_steps, noise_level) ** 2)


def cps_std(num_steps: int, noise_level: float) -> Tensor:
    """t' sin(pi a / 2), float64 [K]: coefficient-preserving sampling, zero at the last step."""
    return flow_times(num_steps)[1:] * math.sin(math.pi * noise_level / 2.0)
