"""DPPO's treatment of denoising steps (arXiv 2409.00588), as an option of the clipped update.

Each denoising step is an action of its own: early steps, which the following ones partly undo, get a discounted
advantage (Eq 6) and a tighter clip. Use it with a full chain and the reduction `per_step`, or with a hybrid chain.

    PPO(sampler, config, step_weighting=DenoisingDiscount(num_steps=4))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenoisingDiscount:
    """Step k of K weighs `gamma_denoise^(K-1-k)`; the last step, which makes the action, weighs 1.

    `clip_first`: the clip of step 0, as a share of the configured one; it grows to 1 at the last step by an exponential
    of rate `clip_rate`. 1: the same clip everywhere.
    """

    num_steps: int
    gamma_denoise: float = 0.99
    clip_first: float = 1.0
    clip_rate: float = 3.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}, expected at least 1")
        if not 0.0 < self.gamma_denoise <= 1.0:
            raise ValueError(f"gamma_denoise is {self.gamma_denoise}, expected 0 < gamma_denoise <= 1")
        if not 0.0 < self.clip_first <= 1.0 or self.clip_rate <= 0.0:
            raise ValueError(f"expected 0 < clip_first <= 1 and clip_rate > 0, got {self.clip_first}, {self.clip_rate}")

    def advantage_weight(self, step: Tensor) -> Tensor:
        """Factor of the advantage at denoising step `step`, int64 [M, E] -> float32 [M, E]."""
        self._check(step)
        return torch.pow(self.gamma_denoise, (self.num_steps - 1 - step).float())

    def clip(self, step: Tensor, clip: float) -> Tensor | float:
        """The ratio's clip at denoising step `step`."""
        if self.clip_first == 1.0 or self.num_steps == 1:
            return clip
        share = torch.expm1(self.clip_rate * step.float() / (self.num_steps - 1)) / math.expm1(self.clip_rate)
        return clip * (self.clip_first + (1.0 - self.clip_first) * share)

    def _check(self, step: Tensor) -> None:
        low, high = int(step.min()), int(step.max())
        if low < 0:
            raise ValueError(
                "a ratio that covers several denoising steps has no step to discount by; "
                "use FlowSamplerConfig(reduction='per_step') or mode='hybrid'"
            )
        if high >= self.num_steps:
            raise ValueError(f"a trace has denoising step {high}, num_steps is {self.num_steps}")
