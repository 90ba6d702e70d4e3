"""Real-time chunking: a new chunk that continues the one which is being executed.

While the policy thinks, the arm goes on with the old chunk. Its first `delay` actions after the observation will have
been executed when the new chunk comes, and those up to the old chunk's end say where the motion was going.

"guided" (arXiv 2506.07339), for any flow policy: the ODE is guided towards them as in inpainting, with a weight that
falls from 1 at the frozen actions to 0. "trained" (arXiv 2512.05964), for a policy whose fine-tuning had a
`max_prefix_delay`: it gets the frozen actions as they are, at flow time 0, and was taught to go on from them; what was
planned after them is not read, and a step costs what it costs without.

In this project's direction of time (1 is noise): D(x) = x - t v(x, t) is the predicted clean chunk and
v' = v - min(max_guidance, (t^2 + (1-t)^2) / (t (1-t))) J_D^T [W (y - D(x))].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vla_rl.flow.schedule import flow_times
from vla_rl.protocols import FlowPolicy, Prefix

Schedule = Literal["exponential", "linear", "ones", "zeros"]
Method = Literal["auto", "guided", "trained"]


@dataclass(frozen=True)
class RTCConfig:
    """`method`: "auto" is "trained" for a policy that was trained so, and "guided" for all others.

    Of "guided": `schedule`: how the weight falls between the frozen actions and the end of the prefix; "ones" holds on
    to all of it, "zeros" to the frozen ones alone. `max_guidance`: the bound on the guidance's factor. `jacobian`: the
    guidance goes through the network's derivative as in the paper; without it a step costs half, and follows the prefix
    less smoothly."""

    method: Method = "auto"
    schedule: Schedule = "exponential"
    max_guidance: float = 5.0
    jacobian: bool = True

    def __post_init__(self) -> None:
        if self.method not in ("auto", "guided", "trained"):
            raise ValueError(f"method must be auto, guided or trained, got {self.method!r}")
        if self.schedule not in ("exponential", "linear", "ones", "zeros"):
            raise ValueError(f"schedule must be exponential, linear, ones or zeros, got {self.schedule!r}")
        if not self.max_guidance > 0:
            raise ValueError(f"max_guidance must be positive, got {self.max_guidance}")


def prefix_weights(horizon: int, delay: int, end: int, schedule: Schedule = "exponential") -> Tensor:
    """W, float32 [H]: 1 for the `delay` frozen actions, 0 from `end` on; between them w_i = (d-1-i)/(e-d+1) + 1, and
    for "exponential" w (e^w - 1)/(e - 1) (equation 5 of the paper). Raises ValueError unless 0 <= delay <= end <= H."""
    if not 0 <= delay <= end <= horizon:
        raise ValueError(f"expected 0 <= delay <= end <= {horizon}, got delay {delay}, end {end}")
    i = torch.arange(horizon, dtype=torch.float64)
    if schedule == "ones":
        w = torch.ones(horizon, dtype=torch.float64)
    elif schedule == "zeros":
        w = (i < delay).double()
    else:
        w = ((delay - 1 - i) / (end - delay + 1) + 1).clamp(0.0, 1.0)
        if schedule == "exponential":
            w = w * torch.expm1(w) / (math.e - 1.0)
    return torch.where(i < end, w, 0.0).float()


def guidance_factor(flow_time: float, max_guidance: float) -> float:
    """min(max_guidance, (t^2 + (1-t)^2) / (t (1-t))), which is the bound at the noise end."""
    t = flow_time
    return max_guidance if t >= 1.0 else min(max_guidance, (t * t + (1.0 - t) ** 2) / (t * (1.0 - t)))


def guided_ode(
    policy: FlowPolicy, prefix: Prefix, x_1: Tensor, target: Tensor, weights: Tensor, config: RTCConfig, num_steps: int
) -> Tensor:
    """Normalised chunks [N, H, D] from the noise `x_1`, guided to `target` [N, H, D] with `weights`, broadcast to it.

    A row whose weights are zero is that of the plain ODE.
    """
    x = x_1
    for t in flow_times(num_steps)[:-1].tolist():
        time = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        with torch.set_grad_enabled(config.jacobian):
            x = x.detach().requires_grad_(config.jacobian)
            velocity = policy.velocity(prefix, x, time).velocity
            clean = x - t * velocity
            error = (weights * (target - clean)).detach()
            guidance = torch.autograd.grad(clean, x, error)[0] if config.jacobian else error
        step = velocity.detach() - guidance_factor(t, config.max_guidance) * guidance
        x = x.detach() - step / num_steps
    return x


def trained_delay(policy: object) -> int:
    """The longest delay, in control steps, that training-time real-time chunking has taught `policy`; 0: none."""
    return getattr(getattr(getattr(policy, "config", None), "flow_matching", None), "max_prefix_delay", 0)


def trained_ode(
    policy: FlowPolicy, prefix: Prefix, x_1: Tensor, target: Tensor, frozen: Tensor, num_steps: int
) -> Tensor:
    """Normalised chunks [N, H, D] from the noise `x_1` that begin with the steps of `target` [N, H, D] where `frozen`
    (bool [N, H]): these are at flow time 0 all the while."""
    x = torch.where(frozen[..., None], target, x_1)
    for t in flow_times(num_steps)[:-1].tolist():
        time = torch.where(frozen, 0.0, t).to(x)
        step = policy.velocity(prefix, x, time).velocity / num_steps
        x = torch.where(frozen[..., None], target, x - step)
    return x


def continue_chunks(
    policy: FlowPolicy,
    prefix: Prefix,
    x_1: Tensor,
    planned: Tensor,
    lengths: Tensor,
    delays: Tensor,
    config: RTCConfig,
    num_steps: int,
) -> Tensor:
    """Chunks [N, H, A] in the environment's units that continue `planned` [N, H, A].

    `lengths` int64 [N]: how many actions of `planned` there are, 0 for a row that continues nothing. `delays` int64
    [N], at most `lengths`: how many of them will be executed in any case; these are returned as they were. Raises
    TypeError where `config.method` is "trained" and the policy was not.
    """
    step = torch.arange(planned.shape[1], device=x_1.device)[None]
    frozen = step < delays[:, None]
    target = policy.normalize_actions(torch.where((step < lengths[:, None])[..., None], planned, 0.0))
    taught = trained_delay(policy)
    if config.method == "trained" and not taught:
        raise TypeError(f"{type(policy).__name__} was not fine-tuned with a max_prefix_delay; use another rtc.method")
    if taught and config.method != "guided":
        chunk = trained_ode(policy, prefix, x_1, target, frozen, num_steps)
    else:
        weights = _weights(delays, lengths, x_1, policy.action_dim, config.schedule)
        chunk = guided_ode(policy, prefix, x_1, target, weights, config, num_steps)
    return torch.where(frozen[..., None], planned, policy.unnormalize_actions(chunk))


def _weights(delays: Tensor, lengths: Tensor, like: Tensor, action_dim: int, schedule: Schedule) -> Tensor:
    """Of each row, shaped as the noise `like` [N, H, D]."""
    horizon = like.shape[1]
    rows = [
        prefix_weights(horizon, d, e, schedule) if e else torch.zeros(horizon)
        for d, e in zip(delays.tolist(), lengths.tolist(), strict=True)
    ]
    weights = torch.stack(rows).to(like)[..., None].repeat(1, 1, like.shape[2])
    weights[..., action_dim:] = 0.0  # padding reaches no arm, and what it was is not known
    return weights


__all__ = [
    "Method", "RTCConfig", "Schedule", "continue_chunks", "guidance_factor", "guided_ode", "prefix_weights",
    "trained_delay", "trained_ode",
]  # fmt: skip
