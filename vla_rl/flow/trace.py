"""What is kept of a sampled denoising chain, so that it can be scored again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlowTrace:
    """Denoising chains of N samples, in the policy's normalised action space, never clamped.

    `states`: float32 [N, K+1, H, A], noise first, where every step was stochastic (`step_index` is -1 then); or
    [N, 2, H, A], the states before and after the one stochastic step.
    `step_index`: int64 [N].
    `values`: float32 [N, E], the log-probabilities in the configured reduction, one a PPO ratio.
    `log_prob`: float32 [N], the joint log-probability of the stochastic transitions, given the start of the chain.
    """

    states: Tensor
    step_index: Tensor
    values: Tensor
    log_prob: Tensor

    def __len__(self) -> int:
        return self.states.shape[0]

    def select(self, rows: Tensor) -> FlowTrace:
        return FlowTrace(self.states[rows], self.step_index[rows], self.values[rows], self.log_prob[rows])

    def to(self, device: torch.device | str) -> FlowTrace:
        return FlowTrace(
            self.states.to(device), self.step_index.to(device), self.values.to(device), self.log_prob.to(device)
        )

    @staticmethod
    def concatenate(parts: Sequence[FlowTrace]) -> FlowTrace:
        """Rows of all `parts`, in order; their chains must be of one kind."""
        return FlowTrace(
            torch.cat([p.states for p in parts]),
            torch.cat([p.step_index for p in parts]),
            torch.cat([p.values for p in parts]),
            torch.cat([p.log_prob for p in parts]),
        )
