"""Small multilayer perceptrons that end or begin a network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(in_width: int, hidden_widths: Sequence[int], out_width: int, *, zero_output: bool = False) -> nn.Sequential:
    """Linear layers with SiLU between them. `zero_output`: the last layer starts at zero, so the output does too."""
    widths = [in_width, *hidden_widths]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.SiLU()]
    last = nn.Linear(widths[-1], out_width)
    if zero_output:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
