"""The learned, bounded standard deviation of Flow-Noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class NoiseHead(nn.Module):
    """Standard deviation of each number of a chunk from the action expert's hidden state.

    `std = std_min^(1-u) * std_max^u`, `u = (tanh(z) + 1)/2`: bounds are those of the standard deviation (not of a
    log-variance), and it stays within them for any input. The last layer starts at zero, so the first std is the
    geometric mean of the bounds. The head is not used when the policy is deployed: the ODE is.
    """

    def __init__(self, hidden_dim: int, action_dim: int, std_min: float, std_max: float, width: int = 64) -> None:
        super().__init__()
        if not 0.0 < std_min < std_max:
            raise ValueError(f"expected 0 < std_min < std_max, got {std_min}, {std_max}")
        self.std_min, self.std_max = std_min, std_max
        self.hidden = nn.Linear(hidden_dim, width)
        self.out = nn.Linear(width, action_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` [N, H, D] -> std [N, H, A], float32 (or float64) whatever the autocast."""
        z = self.out(torch.tanh(self.hidden(hidden)))
        z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        low, high = math.log(self.std_min), math.log(self.std_max)
        std = torch.exp(low + (high - low) * 0.5 * (torch.tanh(z) + 1.0))
        return std.clamp(self.std_min, self.std_max)  # exp(log(x)) may miss the bound by one rounding
