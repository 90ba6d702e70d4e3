"""Pre-norm transformer blocks: plain, and modulated by a condition such as the flow time (adaptive RMSNorm)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.policies.blocks.attention import Attention
from vla_rl.policies.blocks.time_embedding import over_steps


class RMSNorm(nn.Module):
    """`(1 + weight) * x / rms(x)` in float32 (Zhang and Sennrich 2019); `weight` starts at zero.

    Without `offset` it is `weight * x / rms(x)`, and `weight` starts at one (Llama).
    """

    def __init__(self, width: int, eps: float = 1e-6, *, offset: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if offset else torch.ones(width))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        weight = 1.0 + self.weight.float() if self.offset else self.weight.float()
        return functional.rms_norm(x.float(), x.shape[-1:], weight, self.eps).to(x.dtype)


class AdaptiveRMSNorm(nn.Module):
    """RMSNorm whose scale and shift, and a gate for the residual branch, are linear in a condition (adaRMS of pi0.5).

    The linear map starts at zero weight with bias (0, 0, `initial_gate`): the block begins unconditioned. A gate of 0
    begins with the identity, as DiT does; 1 begins with the plain block, which learns faster from few steps.
    """

    def __init__(self, width: int, condition_width: int, *, initial_gate: float = 1.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.dense = nn.Linear(condition_width, 3 * width)
        self.eps = eps
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)
        nn.init.constant_(self.dense.bias[2 * width :], initial_gate)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """`x [N, L, width]`, `condition [N, condition_width]` -> normed [N, L, width] and gate [N, 1, width]; with a
        condition of each token, [N, L, condition_width], the gate is [N, L, width]."""
        modulation = self.dense(condition.to(self.dense.weight.dtype)).float()
        scale, shift, gate = over_steps(modulation).chunk(3, dim=-1)
        normed = functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return torch.addcmul(shift, normed, 1.0 + scale).to(x.dtype), gate.to(x.dtype)


class FeedForward(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden_width)
        self.down = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.up(x)))


class TransformerBlock(nn.Module):
    """Pre-norm block: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, width: int, num_heads: int, hidden_width: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, num_heads)
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = FeedForward(width, hidden_width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x [N, L, width]`; `mask` as in `Attention.forward`."""
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class AdaptiveTransformerBlock(nn.Module):
    """The block of an action expert: looks at an immutable prefix, and is modulated by a condition."""

    def __init__(
        self, width: int, num_heads: int, hidden_width: int, *, condition_width: int, context_width: int
    ) -> None:
        super().__init__()
        self.attention_norm = AdaptiveRMSNorm(width, condition_width)
        self.attention = Attention(width, num_heads, context_width=context_width)
        self.feed_forward_norm = AdaptiveRMSNorm(width, condition_width)
        self.feed_forward = FeedForward(width, hidden_width)

    def forward(self, x: Tensor, context: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x [N, L, width]`, `context [N, T, context_width]`, `condition` as in `AdaptiveRMSNorm.forward`; `mask` as
        in `Attention.forward`."""
        prefix = self.attention.project_context(context)
        normed, gate = self.attention_norm(x, condition)
        x = torch.addcmul(x, gate, self.attention(normed, prefix, mask))
        normed, gate = self.feed_forward_norm(x, condition)
        return torch.addcmul(x, gate, self.feed_forward(normed))
