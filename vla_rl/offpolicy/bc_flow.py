"""A flow policy of action chunks in JAX, fitted to data by flow matching: small policies of state, not VLAs.

Time as everywhere in the project: flow_time 1 is noise, 0 is the action, velocity = noise - action.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.critics import weighted_mean
from vla_rl.offpolicy.networks import MLP, AgentSpec, Network, Params


@dataclass(frozen=True)
class FlowNetConfig:
    """Defaults are those of Q-chunking (arXiv 2507.07969): GELU, no LayerNorm, 10 Euler steps."""

    hidden_sizes: tuple[int, ...] = (512, 512, 512, 512)
    num_steps: int = 10

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"FlowNetConfig.num_steps is {self.num_steps}, expected at least 1")


class VelocityMLP(nnx.Module):
    """obs [B, O], x_t [B, H, A], flow_time [B] -> velocity [B, H, A]."""

    def __init__(self, spec: AgentSpec, config: FlowNetConfig, rngs: nnx.Rngs) -> None:
        in_dim = spec.obs_dim + spec.chunk_dim + 1
        self.mlp = MLP(in_dim, config.hidden_sizes, spec.chunk_dim, layer_norm=False, activation=nnx.gelu, rngs=rngs)

    def __call__(self, obs: Array, x_t: Array, flow_time: Array) -> Array:
        flat = x_t.reshape(x_t.shape[0], -1)
        return self.mlp(jnp.concatenate([obs, flat, flow_time[:, None]], axis=-1)).reshape(x_t.shape)


class OneStepMLP(nnx.Module):
    """obs [B, O], noise [B, H, A] -> chunk [B, H, A]: a flow's result in one pass."""

    def __init__(self, spec: AgentSpec, config: FlowNetConfig, rngs: nnx.Rngs) -> None:
        in_dim = spec.obs_dim + spec.chunk_dim
        self.mlp = MLP(in_dim, config.hidden_sizes, spec.chunk_dim, layer_norm=False, activation=nnx.gelu, rngs=rngs)

    def __call__(self, obs: Array, noise: Array) -> Array:
        flat = noise.reshape(noise.shape[0], -1)
        return self.mlp(jnp.concatenate([obs, flat], axis=-1)).reshape(noise.shape)


def flow_matching_loss(flow: Network, params: Params, batch: ReplayBatch, noise: Array, flow_time: Array) -> Array:
    """Mean of |v(x_t, t) - (noise - actions)|^2 over executed steps, x_t = t * noise + (1 - t) * actions.

    `noise` [B, H, A], `flow_time` [B]. Padded steps count neither in the sum nor in its divisor.
    """
    t = flow_time[:, None, None]
    error = flow(params, batch.obs, t * noise + (1.0 - t) * batch.actions, flow_time) - (noise - batch.actions)
    return weighted_mean(jnp.square(error).mean(axis=-1), jnp.asarray(batch.weight)[:, None] * batch.mask)


def integrate_flow(flow: Network, params: Params, obs: Array, noise: Array, num_steps: int) -> Array:
    """Euler from flow_time 1 to 0: obs [B, O], noise [N, B, H, A] -> chunks [N, B, H, A] in [-1, 1]."""
    n, b = noise.shape[:2]
    tiled = jnp.broadcast_to(obs, (n, *obs.shape)).reshape(n * b, -1)

    def step(x_t: Array, flow_time: Array) -> tuple[Array, None]:
        velocity = flow(params, tiled, x_t, jnp.full(n * b, flow_time))
        return x_t - velocity / num_steps, None

    times = 1.0 - jnp.arange(num_steps) / num_steps
    chunks, _ = jax.lax.scan(step, noise.reshape(n * b, *noise.shape[2:]), times)
    return jnp.clip(chunks, -1.0, 1.0).reshape(noise.shape)


def candidate_noise(noise: Array, num: int) -> Array:
    """Noise [N, H, A] of a decision -> [num, N, H, A] for as many candidates.

    The first is `noise` itself; the others are drawn by a generator which the bits of the row's noise seed, so that a
    row's candidates depend on nothing but its noise.
    """

    def more(own: Array) -> Array:
        first, last = jax.lax.bitcast_convert_type(own, jnp.uint32).reshape(-1)[jnp.asarray([0, -1])]
        key = jax.random.fold_in(jax.random.key(first), last)
        return jnp.concatenate([own[None], jax.random.normal(key, (num - 1, *own.shape))])

    return jax.vmap(more, out_axes=1)(noise)


__all__ = [
    "FlowNetConfig", "OneStepMLP", "VelocityMLP", "candidate_noise", "flow_matching_loss", "integrate_flow",
]  # fmt: skip
