"""Advantage estimation over chunks, with the contract's reward and discount."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_rl.train.distributed import num_learners, sum_over_learners


def gae(
    rewards: Tensor, discounts: Tensor, values: Tensor, next_values: Tensor, ended: Tensor, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438), one chunk a step. All arguments [T, N].

    `rewards`, `discounts`: `core.chunk_reward` and `core.chunk_discount`, so a chunk of k executed steps discounts by
    gamma^k, and a termination by 0. `next_values`: V of the true successor; at a truncation that of the last frame.
    `ended`: bool, terminated or truncated; the sum of later residuals stops there.

        delta_t = r_t + d_t V(s_{t+1}) - V(s_t),   A_t = delta_t + d_t lambda (1 - ended_t) A_{t+1}

    Lambda counts chunks. Returns advantages and value targets A + V, both [T, N].
    """
    residual = rewards + discounts * next_values - values
    carry = discounts * gae_lambda * (~ended).to(discounts.dtype)
    advantages = torch.empty_like(residual)
    following = torch.zeros_like(residual[0])
    for t in range(len(residual) - 1, -1, -1):
        following = residual[t] + carry[t] * following
        advantages[t] = following
    return advantages, advantages + values


def _moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean, standard deviation and number of the entries of `x [M]` of all learners."""
    if num_learners() == 1:
        return x.mean(), x.std() if len(x) > 1 else x.new_zeros(()), len(x)
    count, total = sum_over_learners(torch.stack([x.new_tensor(len(x)).double(), x.double().sum()]))
    mean = total / count
    variance = sum_over_learners(((x.double() - mean) ** 2).sum()) / (count - 1)
    return mean.to(x), variance.sqrt().to(x), int(count)


def normalize_advantages(advantages: Tensor, valid: Tensor) -> Tensor:
    """Zero mean and unit standard deviation over all `valid` entries (bool, same shape) of all learners; zero
    elsewhere."""
    chosen = advantages[valid]
    mean, std, count = _moments(chosen)
    if count < 2:
        return torch.where(valid, advantages, torch.zeros_like(advantages))
    scaled = (advantages - mean) / (std + 1e-8)
    return torch.where(valid, scaled, torch.zeros_like(scaled))


def explained_variance(predicted: Tensor, target: Tensor) -> float:
    """1 - Var(target - predicted) / Var(target); 1 is perfect, 0 as good as a constant. NaN for a constant target."""
    variance = target.var()
    return float(1.0 - (target - predicted).var() / variance) if float(variance) > 0.0 else float("nan")
