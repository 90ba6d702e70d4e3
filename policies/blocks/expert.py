"""The action expert: a transformer over the steps of a chunk that reads the prefix and returns a velocity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from vla_rl.policies.blocks.attention import attention_mask
from vla_rl.policies.blocks.heads import mlp
from vla_rl.policies.blocks.time_embedding import over_steps, time_embedding
from vla_rl.policies.blocks.transformer import AdaptiveRMSNorm, AdaptiveTransformerBlock
from vla_rl.protocols import Prefix, VelocityOutput


@dataclass(frozen=True)
class ActionExpertConfig:
    """Size of the expert. The velocity is most of the cost of on-policy updates, so it is narrow by default."""

    width: int = 96
    num_layers: int = 2
    num_heads: int = 4
    feed_forward_ratio: int = 2


class ActionExpert(nn.Module):
    """Velocity of a noisy chunk. Steps attend to each other and to the prefix; the flow time and the pooled prefix
    modulate every norm (adaRMS).

    The network is preconditioned as in Karras et al. 2022, for this path: velocity = skip(t) x_t + scale(t) F, where
    skip = (2t - 1) / (t^2 + (1-t)^2) and scale = (t^2 + (1-t)^2)^(-1/2). With F = 0, as it starts, that is the exact
    velocity for standard normal actions, so that the first gradient already teaches what the observation says about the
    action; the target of F is ((1-t) noise - t action) * scale, of unit variance.
    """

    def __init__(
        self, config: ActionExpertConfig, *, action_dim: int, action_horizon: int, prefix_width: int, pooled_dim: int
    ) -> None:
        super().__init__()
        width = config.width
        self.time_width = width
        self.action_in = nn.Linear(action_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(action_horizon, width))
        self.time_mlp = mlp(width, [width], width)
        self.pooled_in = nn.Linear(pooled_dim, 2 * width)
        self.blocks = nn.ModuleList(
            AdaptiveTransformerBlock(
                width,
                config.num_heads,
                config.feed_forward_ratio * width,
                condition_width=width,
                context_width=prefix_width,
            )
            for _ in range(config.num_layers)
        )
        self.norm = AdaptiveRMSNorm(width, width)
        self.action_out = nn.Linear(width, action_dim)
        nn.init.zeros_(self.action_out.weight)
        nn.init.zeros_(self.action_out.bias)

    def forward(self, prefix: Prefix, x_t: Tensor, flow_time: Tensor) -> VelocityOutput:
        """`x_t [N, H, A]`, `flow_time [N]`, or [N, H] of each step."""
        pooled_condition, pooled_shift = self.pooled_in(prefix.pooled).chunk(2, dim=-1)
        if flow_time.ndim == 2:
            pooled_condition = pooled_condition.unsqueeze(1)
        condition = silu(self.time_mlp(time_embedding(flow_time, self.time_width)) + pooled_condition)
        prefix_mask = None if _all_true(prefix.mask) else prefix.mask
        mask = attention_mask(prefix_mask, None, prefix.tokens.shape[1], x_t.shape[1])
        scale = over_steps((flow_time.square() + (1.0 - flow_time).square()).rsqrt()[..., None])
        x = self.action_in(x_t * scale) + self.position + pooled_shift.unsqueeze(1)
        for block in cast(Iterable[AdaptiveTransformerBlock], self.blocks):
            x = block(x, prefix.tokens, condition, mask)
        hidden, _ = self.norm(x, condition)
        skip = over_steps((2.0 * flow_time - 1.0)[..., None]) * scale.square()
        return VelocityOutput(skip * x_t + scale * self.action_out(hidden).float(), hidden.float())


def _all_true(mask: Tensor) -> bool:
    """On a GPU the answer would cost a synchronisation, and a mask costs little there: say no."""
    return mask.device.type == "cpu" and bool(mask.all())
