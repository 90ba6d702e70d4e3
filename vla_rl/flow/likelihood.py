"""Log-probabilities of denoising chains and of chunks: densities, their reductions, and divergences between them.

All of it is computed in float32 at least, whatever the autocast: a mean that is off by one bfloat16 rounding moves the
log-probability of a chunk by half a nat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.flow.kernels import config_table, transition_mean
from vla_rl.flow.trace import FlowTrace
from vla_rl.protocols import FlowPolicy, Prefix, VelocityOutput

VelocityFunction = Callable[[Prefix | None, Tensor, Tensor], VelocityOutput | Tensor]
Family = Literal["gaussian", "laplace"]
"""Densities of one number with a mean and a standard deviation."""


@dataclass(frozen=True)
class LogProb:
    """A batch of chains, or of chunks that were drawn at once, scored.

    `values`: [N, E], log-probabilities in the configured reduction, one for each PPO ratio.
    `step`: int64 [N, E], the denoising step that each of `values` belongs to, -1 where it covers several.
    `joint`: [N], the sum over all scored transitions: the true log-likelihood given the chain's start. The start itself
    is standard normal whatever the policy, and is left out: it has no gradient and cancels in every ratio.
    `entropy`: [N], mean over scored numbers of the transition's entropy, 0.5 ln(2 pi e std^2); None where std is fixed.
    `mean`, `std`: [N, S, h, d], the scored part of the S scored transitions, densities of `family`.
    `token_log_probs`: [N, E, V], where a chunk is E tokens of V bins each; `mean` and `std` are empty then.
    """

    values: Tensor
    step: Tensor
    joint: Tensor
    entropy: Tensor | None
    mean: Tensor
    std: Tensor
    family: Family = "gaussian"
    token_log_probs: Tensor | None = None

    def _map(self, function: Callable[[Tensor], Tensor]) -> LogProb:
        mapped: dict[str, Any] = {name: function(x) if isinstance(x, Tensor) else x for name, x in vars(self).items()}
        return LogProb(**mapped)

    def select(self, rows: Tensor) -> LogProb:
        """The chains at `rows`, int64 [M]."""
        return self._map(lambda x: x[rows])

    @staticmethod
    def concatenate(parts: Sequence[LogProb]) -> LogProb:
        columns: dict[str, Any] = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
        joined: dict[str, Any] = {
            name: torch.cat(c) if isinstance(c[0], Tensor) else c[0] for name, c in columns.items()
        }
        return LogProb(**joined)


def velocity_of(policy: FlowPolicy | VelocityFunction) -> Callable[[Prefix | None, Tensor, Tensor], VelocityOutput]:
    """The velocity function of a policy; a plain function that returns a velocity tensor serves as well."""
    function: Any = getattr(policy, "velocity", policy)

    def velocity(prefix: Prefix | None, x: Tensor, flow_time: Tensor) -> VelocityOutput:
        out = function(prefix, x, flow_time)
        if isinstance(out, Tensor):
            out = VelocityOutput(out, x)
        return VelocityOutput(out.velocity.to(x.dtype), out.hidden)

    return velocity


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of each number, shape of `x`."""
    return -0.5 * ((x - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2.0 * math.pi)


def gaussian_entropy(std: Tensor) -> Tensor:
    """0.5 ln(2 pi e std^2)."""
    return torch.log(std) + 0.5 * math.log(2.0 * math.pi * math.e)


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(other_mean, other_std^2)) of each number."""
    return torch.log(other_std / std) + (std**2 + (mean - other_mean) ** 2) / (2.0 * other_std**2) - 0.5


def laplace_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of each number, shape of `x`: -|x - mean| / b - ln 2b with the scale b = std / sqrt(2)."""
    scale = std * math.sqrt(0.5)
    return -(x - mean).abs() / scale - torch.log(2.0 * scale)


def laplace_entropy(std: Tensor) -> Tensor:
    """1 + ln 2b."""
    return 1.0 + torch.log(math.sqrt(2.0) * std)


def laplace_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """KL of each number: ln(b'/b) + (b exp(-|mean - mean'| / b) + |mean - mean'|) / b' - 1."""
    scale, other_scale, distance = std * math.sqrt(0.5), other_std * math.sqrt(0.5), (mean - other_mean).abs()
    return torch.log(other_scale / scale) + (scale * torch.exp(-distance / scale) + distance) / other_scale - 1.0


def categorical_entropy(log_probs: Tensor) -> Tensor:
    """Entropy [...] of `log_probs` [..., V]; bins of probability 0 (-inf) count for nothing."""
    return -(log_probs.exp() * torch.where(log_probs > -math.inf, log_probs, 0.0)).sum(dim=-1)


def categorical_kl(log_probs: Tensor, other: Tensor) -> Tensor:
    """KL [...] between distributions given as log-probabilities [..., V]; infinite where `other` excludes a bin that
    the first does not."""
    difference = torch.where(log_probs > -math.inf, log_probs - other, 0.0)
    return (log_probs.exp() * difference).sum(dim=-1)


LOG_DENSITY = {"gaussian": gaussian_log_prob, "laplace": laplace_log_prob}
ENTROPY = {"gaussian": gaussian_entropy, "laplace": laplace_entropy}
_KL = {"gaussian": gaussian_kl, "laplace": laplace_kl}


def require_family(family: str) -> None:
    """Raise ValueError for a density that there is not."""
    if family not in get_args(Family):
        raise ValueError(f"family is {family!r}, expected one of {', '.join(get_args(Family))}")


def chain_kl(ours: LogProb, other: LogProb) -> Tensor:
    """Closed-form KL of the scored transitions at the states of one chain, or at the tokens of one chunk, summed: [N].

    Over chains sampled from `ours` its mean is the KL between the two chain distributions (chain rule), which bounds
    that between the action distributions. For hybrid chains it is the KL at the one sampled step.
    """
    if ours.token_log_probs is not None and other.token_log_probs is not None:
        return categorical_kl(ours.token_log_probs, other.token_log_probs).sum(dim=1)
    return _KL[ours.family](ours.mean, ours.std, other.mean, other.std).sum(dim=(1, 2, 3))


def k3_divergence(log_ratio: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(old || new) from `log_ratio` = log new - log old, drawn from old; >= 0."""
    return torch.expm1(log_ratio) - log_ratio


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def reduce_log_prob(
    config: FlowSamplerConfig, x_next: Tensor, mean: Tensor, std: Tensor, step: Tensor, start: Tensor | None
) -> LogProb:
    """Score transitions. `x_next`, `mean`, `std`: [N, S, h, d], scored part only; `step`: int64 [N, S].

    `start`: the scored part of the chain's noise, [N, h, d]; only the reduction `rlinf` of a full chain reads it.
    """
    elements = gaussian_log_prob(x_next, mean, std)
    n, s = step.shape
    per_step = elements.sum(dim=(2, 3))
    joint = per_step.sum(dim=1)
    several = torch.full((n, 1), -1, dtype=torch.int64, device=step.device)
    if s == 1:
        several = step
    if config.reduction == "per_step":
        values, entry_step = per_step, step
    elif config.reduction == "per_dim":
        values = elements.flatten(1)
        entry_step = step.repeat_interleave(values.shape[1] // s, dim=1)
    elif config.reduction == "rlinf" and config.mode == "full":
        if start is None:
            raise ValueError("the reduction rlinf of a full chain needs the chain's start")
        prior = gaussian_log_prob(start, torch.zeros_like(start), torch.ones_like(start)).sum(dim=(1, 2))
        values, entry_step = ((prior + joint) / (config.num_steps + 1))[:, None], several
    else:
        values, entry_step = joint[:, None], several
    entropy = gaussian_entropy(std).mean(dim=(1, 2, 3)) if config.kernel == "flow_noise" else None
    return LogProb(values, entry_step, joint, entropy, mean, std)


def transition_std(
    config: FlowSamplerConfig,
    table_std: Tensor,
    step: Tensor,
    hidden: Tensor,
    noise_head: nn.Module | None,
    like: Tensor,
) -> Tensor:
    """Standard deviation [M, H, A] of the transitions of `like [M, H, A]` at `step` (int64 [M])."""
    if config.kernel != "flow_noise":
        return table_std[step][:, None, None].expand_as(like)
    if noise_head is None:
        raise ValueError(
            "flow_noise needs a noise_head; build vla_rl.flow.NoiseHead(policy.hidden_dim, action_dim, ...)"
        )
    return at_least_float32(noise_head(hidden)).to(like.dtype)


def log_prob(
    policy: FlowPolicy | VelocityFunction,
    prefix: Prefix | None,
    trace: FlowTrace,
    config: FlowSamplerConfig,
    noise_head: nn.Module | None = None,
) -> LogProb:
    """Score stored chains under a policy; differentiable in its parameters and the noise head's.

    One batched velocity call: the S scored steps of a full chain are folded into the batch.
    Raises ValueError where the trace does not fit the configuration.
    """
    before, after, step = scored_transitions(trace, config)
    n, s = step.shape
    flat_before, flat_step = before.flatten(0, 1), step.flatten()
    if prefix is not None and s > 1:
        prefix = prefix.select(torch.arange(n, device=before.device).repeat_interleave(s))
    table = config_table(config, flat_before)
    out = velocity_of(policy)(prefix, flat_before, table.flow_time[flat_step])
    with torch.autocast(flat_before.device.type, enabled=False):
        scored = config.scored_shape(before.shape[2], before.shape[3])
        mean = transition_mean(table, flat_step, flat_before, at_least_float32(out.velocity), scored)
        std = transition_std(config, table.std, flat_step, out.hidden, noise_head, flat_before)
        h, d = scored
        return reduce_log_prob(
            config,
            after[:, :, :h, :d],
            mean.unflatten(0, (n, s))[:, :, :h, :d],
            std.unflatten(0, (n, s))[:, :, :h, :d],
            step,
            trace.states[:, 0, :h, :d],
        )


def scored_transitions(trace: FlowTrace, config: FlowSamplerConfig) -> tuple[Tensor, Tensor, Tensor]:
    """States before and after each scored transition, [N, S, H, A] each, and its step, int64 [N, S]."""
    if config.mode == "hybrid":
        if trace.states.shape[1] != 2:
            raise ValueError(f"a hybrid trace holds 2 states a sample, this one {trace.states.shape[1]}; see `mode`")
        return trace.states[:, :1], trace.states[:, 1:], trace.step_index[:, None]
    if trace.states.shape[1] != config.num_steps + 1:
        raise ValueError(
            f"a full trace of {config.num_steps} steps holds {config.num_steps + 1} states a sample, "
            f"this one {trace.states.shape[1]}; see `mode` and `num_steps`"
        )
    # stochastic steps are always the first ones, so slices (views) do
    s = len(config.stochastic_steps)
    step = torch.arange(s, device=trace.states.device).expand(len(trace), s)
    return trace.states[:, :s], trace.states[:, 1 : s + 1], step
