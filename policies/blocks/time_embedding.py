"""Sine and cosine features of the flow time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def time_embedding(flow_time: Tensor, width: int, *, min_period: float = 4e-3, max_period: float = 4.0) -> Tensor:
    """`flow_time [...]` in [0, 1] -> float32 [..., width]: sines, then cosines, of geometrically spaced periods.

    The spacing is that of pi0 (periods 4e-3 to 4), computed in float64, because the shortest period makes angles of
    more than 1500 rad.
    """
    if width % 2:
        raise ValueError(f"time_embedding: width must be even, got {width}")
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=flow_time.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = 2.0 * math.pi * flow_time.double().unsqueeze(-1) / period
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def over_steps(x: Tensor) -> Tensor:
    """What was made of flow times, to go with a chunk [N, H, A]: `x [N, D]` of a time for all of it as [N, 1, D], and
    [N, H, D] of a time for each step as it is."""
    return x if x.ndim == 3 else x.unsqueeze(1)
