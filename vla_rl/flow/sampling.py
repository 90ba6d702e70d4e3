"""Drawing action chunks from a flow policy: the deployed ODE, and the stochastic chains that reinforcement needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.flow.kernels import config_table, kernel_table, transition_mean
from vla_rl.flow.likelihood import VelocityFunction, reduce_log_prob, transition_std, velocity_of
from vla_rl.flow.noise import NoiseSource, draw_integers, draw_normal
from vla_rl.flow.trace import FlowTrace
from vla_rl.protocols import FlowPolicy, Prefix


def ode(policy: FlowPolicy | VelocityFunction, prefix: Prefix | None, x_1: Tensor, num_steps: int) -> Tensor:
    """Euler integration of x' = x - v/K from the noise `x_1 [N, H, A]` to the action. Uses no randomness."""
    velocity = velocity_of(policy)
    times = kernel_table("ode", num_steps).to(x_1).flow_time
    x = x_1
    for k in range(num_steps):
        x = x - velocity(prefix, x, times[k].expand(x.shape[0])).velocity / num_steps
    return x


def draw_step_index(config: FlowSamplerConfig, num_samples: int, generator: NoiseSource) -> Tensor:
    """The stochastic step of each sample of a hybrid chain: int64 [N], uniform over `config.stochastic_steps`."""
    return draw_integers(len(config.stochastic_steps), (num_samples,), generator)


def _noise(like: Tensor, generator: NoiseSource) -> Tensor:
    return draw_normal(like.shape, generator, like.device, like.dtype)


@torch.no_grad()
def sample_chain(
    policy: FlowPolicy | VelocityFunction,
    prefix: Prefix | None,
    x_1: Tensor,
    config: FlowSamplerConfig,
    generator: NoiseSource,
    noise_head: nn.Module | None = None,
) -> tuple[Tensor, FlowTrace]:
    """Normalised actions [N, H, A] from the noise `x_1`, and the trace that `likelihood.log_prob` scores.

    `generator` must live on the device of `x_1`; it is the only source of randomness.
    """
    if config.mode == "hybrid":
        return _sample_hybrid(policy, prefix, x_1, config, generator, noise_head)
    return _sample_full(policy, prefix, x_1, config, generator, noise_head)


def _sample_full(
    policy: FlowPolicy | VelocityFunction,
    prefix: Prefix | None,
    x_1: Tensor,
    config: FlowSamplerConfig,
    generator: NoiseSource,
    noise_head: nn.Module | None,
) -> tuple[Tensor, FlowTrace]:
    velocity, table = velocity_of(policy), config_table(config, x_1)
    n = x_1.shape[0]
    h, d = config.scored_shape(x_1.shape[1], x_1.shape[2])
    states, means, stds = [x_1], [], []
    for k in range(config.num_steps):
        x = states[-1]
        out = velocity(prefix, x, table.flow_time[k].expand(n))
        if k not in config.stochastic_steps:
            states.append(x - out.velocity / config.num_steps)
            continue
        step = torch.full((n,), k, dtype=torch.int64, device=x.device)
        mean = transition_mean(table, step, x, out.velocity, (h, d))
        std = transition_std(config, table.std, step, out.hidden, noise_head, x)
        x_next = mean.clone()
        x_next[:, :h, :d] += std[:, :h, :d] * _noise(x[:, :h, :d], generator)
        states.append(x_next)
        means.append(mean[:, :h, :d])
        stds.append(std[:, :h, :d])
    chain = torch.stack(states, dim=1)
    s = len(means)
    steps = torch.arange(s, device=x_1.device).expand(n, s)
    scored = reduce_log_prob(
        config, chain[:, 1 : s + 1, :h, :d], torch.stack(means, 1), torch.stack(stds, 1), steps, x_1[:, :h, :d]
    )
    none = torch.full((n,), -1, dtype=torch.int64, device=x_1.device)
    return states[-1], FlowTrace(chain, none, scored.values, scored.joint)


def _sample_hybrid(
    policy: FlowPolicy | VelocityFunction,
    prefix: Prefix | None,
    x_1: Tensor,
    config: FlowSamplerConfig,
    generator: NoiseSource,
    noise_head: nn.Module | None,
) -> tuple[Tensor, FlowTrace]:
    velocity, table = velocity_of(policy), config_table(config, x_1)
    n = x_1.shape[0]
    h, d = config.scored_shape(x_1.shape[1], x_1.shape[2])
    step_index = draw_step_index(config, n, generator)
    noise = torch.zeros_like(x_1)
    noise[:, :h, :d] = _noise(x_1[:, :h, :d], generator)
    x, before, after = x_1, torch.empty_like(x_1), torch.empty_like(x_1)
    mean, std = torch.empty_like(x_1), torch.empty_like(x_1)
    for k in range(config.num_steps):
        out = velocity(prefix, x, table.flow_time[k].expand(n))
        chosen = (step_index == k)[:, None, None]
        step_mean = transition_mean(table, torch.full_like(step_index, k), x, out.velocity, (h, d))
        step_std = transition_std(config, table.std, torch.full_like(step_index, k), out.hidden, noise_head, x)
        x_next = torch.where(chosen, step_mean + step_std * noise, x - out.velocity / config.num_steps)
        before, after = torch.where(chosen, x, before), torch.where(chosen, x_next, after)
        mean, std = torch.where(chosen, step_mean, mean), torch.where(chosen, step_std, std)
        x = x_next
    scored = reduce_log_prob(
        config, after[:, None, :h, :d], mean[:, None, :h, :d], std[:, None, :h, :d], step_index[:, None], None
    )
    return x, FlowTrace(torch.stack([before, after], dim=1), step_index, scored.values, scored.joint)
