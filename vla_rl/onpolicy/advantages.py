"""Advantage estimation over chunks, with the contract's reward and discount."""

from __future__ import annotations

import torch
from torch import Tensor


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


def normalize_advantages(advantages: Tensor, valid: Tensor) -> Tensor:
    """Zero mean and unit standard deviation over all `valid` entries (bool, same shape); zero elsewhere."""
    chosen = advantages[valid]
    if chosen.numel() < 2:
        return torch.where(valid, advantages, torch.zeros_like(advantages))
    scaled = (advantages - chosen.mean()) / (chosen.std() + 1e-8)
    return torch.where(valid, scaled, torch.zeros_like(scaled))


def explained_variance(predicted: Tensor, target: Tensor) -> float:
    """1 - Var(target - predicted) / Var(target); 1 is perfect, 0 as good as a constant. NaN for a constant target."""
    variance = target.var()
    return float(1.0 - (target - predicted).var() / variance) if float(variance) > 0.0 else float("nan")
