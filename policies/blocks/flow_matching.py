"""The flow-matching loss. `flow_time` 1 is noise, 0 is the action; velocity = noise - action."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vla_rl.flow.noise import draw_integers, rows_to_draw
from vla_rl.policies.blocks.time_embedding import over_steps
from vla_rl.protocols import Prefix, VelocityOutput

VelocityFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FlowMatchingConfig:
    """How flow times are drawn.

    `time_distribution`: "beta" is Beta(1.5, 1) as in pi0, more often near the noise; "uniform" is uniform.
    `num_draws`: pairs of noise and flow time for each sample. The observation is encoded once, so for a policy whose
    encoder is dear, more draws are a better gradient at little cost.
    `max_prefix_delay`: training-time real-time chunking, see `flow_matching_loss`; 0 is none.
    """

    time_distribution: Literal["beta", "uniform"] = "beta"
    num_draws: int = 4
    max_prefix_delay: int = 0

    def __post_init__(self) -> None:
        if self.time_distribution not in ("beta", "uniform"):
            raise ValueError(f"time_distribution must be 'beta' or 'uniform', got {self.time_distribution!r}")
        if self.num_draws < 1:
            raise ValueError(f"num_draws must be at least 1, got {self.num_draws}")
        if self.max_prefix_delay < 0:
            raise ValueError(f"max_prefix_delay must be 0 or more control steps, got {self.max_prefix_delay}")


def draw_flow_time(num: int, config: FlowMatchingConfig, generator: torch.Generator) -> Tensor:
    """float32 [num] in [0.001, 1], on the generator's device.

    Beta(1.5, 1) has the distribution function t^1.5, so a uniform number to the power 2/3 has that law.
    """
    uniform = torch.rand(num, generator=generator, device=generator.device)
    t = uniform.pow(2.0 / 3.0) if config.time_distribution == "beta" else uniform
    return 0.001 + 0.999 * t


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean of `error [N, H, A]` over A and over the steps where `mask [N, H]`; [N], zero for a row with no step."""
    weight = mask.to(error.dtype)
    total = torch.where(mask, error.mean(dim=2), 0.0).sum(dim=1)
    return total / weight.sum(dim=1).clamp_min(1.0)


def hold_last(actions: Tensor, mask: Tensor) -> Tensor:
    """`actions [N, H, A]` with the last real action before it at each step where `mask [N, H]` is False (the first real
    one where there is none before; zero in a row without any)."""
    steps = torch.arange(actions.shape[1], device=actions.device)
    last = torch.where(mask, steps, -1).cummax(dim=1).values
    first = mask.to(torch.int8).argmax(dim=1, keepdim=True)
    source = torch.where(last < 0, first, last)
    held = actions.gather(1, source.unsqueeze(-1).expand_as(actions))
    return torch.where(mask.any(dim=1)[:, None, None], held, 0.0)


def flow_matching_loss(
    velocity: VelocityFunction,
    actions: Tensor,
    mask: Tensor,
    config: FlowMatchingConfig,
    generator: torch.Generator,
    *,
    num_scored: int | None = None,
) -> Tensor:
    """Per-sample loss [N]: mean of (velocity - (noise - action))^2 over unpadded steps, dimensions and draws.

    `velocity(x_t, flow_time)` gets the draws folded into the batch: row `d * N + i` is draw d of sample i.
    `actions` normalised [N, H, A], `mask` bool [N, H]. (Lipman et al. 2023, equation 23, in this project's direction of
    time.) Padded actions are not read: the last real action stands in their place in x_t, and bears no loss. They are
    not hidden from the other steps either, because a deployed policy always sees a whole chunk: one that was trained to
    see fewer steps near the end of an episode takes a whole chunk as a sign that the episode has just begun.
    `num_scored`: the loss covers the first so many dimensions (None: all).

    With `config.max_prefix_delay` D, training-time real-time chunking (arXiv 2512.05964): each draw has a delay d,
    uniform over 0..D. Its first d steps are the actions themselves at flow time 0, as those that a robot has committed
    itself to, and bear no loss; `velocity` then gets flow times [N, H]. Raises ValueError where D leaves no step.
    """
    n, draws = actions.shape[0], config.num_draws
    drawn, rows = rows_to_draw(n, generator)
    flow_time = draw_flow_time(draws * drawn, config, generator).view(draws, drawn)[:, rows].flatten()
    noise = torch.randn(draws, drawn, *actions.shape[1:], generator=generator, device=generator.device)
    flow_time, noise = flow_time.to(actions.device), noise[:, rows].flatten(0, 1).to(actions.device)
    actions, mask = hold_last(actions, mask).repeat(draws, 1, 1), mask.repeat(draws, 1)
    if config.max_prefix_delay:
        delays = _draw_delays(draws * drawn, actions.shape[1], config, generator).view(draws, drawn)[:, rows].flatten()
        given = torch.arange(actions.shape[1], device=actions.device) < delays.to(actions.device)[:, None]
        flow_time, mask = torch.where(given, 0.0, flow_time[:, None]), mask & ~given
    t = over_steps(flow_time[..., None])
    predicted = velocity(t * noise + (1.0 - t) * actions, flow_time)
    error = (predicted.float() - (noise - actions)).square()
    return masked_mean(error[..., :num_scored], mask).view(draws, n).mean(dim=0)


def _draw_delays(num: int, horizon: int, config: FlowMatchingConfig, generator: torch.Generator) -> Tensor:
    """int64 [num], uniform over 0..max_prefix_delay."""
    if config.max_prefix_delay >= horizon:
        raise ValueError(
            f"max_prefix_delay is {config.max_prefix_delay} and the chunk has {horizon} steps: none is left to learn; "
            f"choose at most {horizon - 1}, or a longer action_horizon"
        )
    return draw_integers(config.max_prefix_delay + 1, (num,), generator)


def prefix_flow_loss(
    velocity: Callable[[Prefix, Tensor, Tensor], VelocityOutput],
    prefix: Prefix,
    actions: Tensor,
    mask: Tensor,
    config: FlowMatchingConfig,
    generator: torch.Generator,
    *,
    num_scored: int | None = None,
) -> Tensor:
    """`flow_matching_loss` of a policy's `velocity`, whose prefix is encoded once for all draws."""
    repeated = prefix.repeat(config.num_draws)
    return flow_matching_loss(
        lambda x_t, flow_time: velocity(repeated, x_t, flow_time).velocity,
        actions,
        mask,
        config,
        generator,
        num_scored=num_scored,
    )
