"""A small actor that edits the chunk of a base policy: a = clip(a_base + scale * tanh(u)), u given (o, a_base).

Base chunks come as arrays from any policy, and nothing is differentiated through it. EXPO and the residual policy share
this file; they differ in the scale, in who picks the chunk, and in what the critic sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.critics import weighted_mean
from vla_rl.offpolicy.improvement import QFunction
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec, Network, Params, TanhGaussianActor, tanh_gaussian
from vla_rl.offpolicy.sac import inverse_softplus, temperature_loss, temperature_of
from vla_rl.offpolicy.train_state import Optimizers, TrainState, split_key
from vla_rl.offpolicy.update import Metrics


@dataclass(frozen=True)
class EditConfig:
    """`scale`: the largest edit of an action in [-1, 1]. `initial_std`: of u. `net.out_scale` near 0 starts at a_base.

    `target_entropy_per_dim` c: see `target_entropy`.
    """

    scale: float = 0.05
    net: ActorNetConfig = field(default_factory=lambda: ActorNetConfig((256, 256, 256), layer_norm=False))
    initial_std: float = 1.0
    learning_rate: float = 3e-4
    temperature_learning_rate: float = 3e-4
    initial_temperature: float = 1.0
    target_entropy_per_dim: float = 1.0

    def __post_init__(self) -> None:
        for name in ("scale", "initial_std", "initial_temperature"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"EditConfig.{name} is {getattr(self, name)}, expected more than 0")

    def build(self, spec: AgentSpec, rngs: nnx.Rngs) -> Network:
        """(obs, a_base) -> mean and standard deviation of u."""
        inputs = AgentSpec(spec.obs_dim + spec.chunk_dim, spec.action_horizon, spec.action_dim)
        actor = TanhGaussianActor(inputs, self.net, rngs)
        log_std = jnp.full(spec.chunk_dim, math.log(self.initial_std))
        if actor.log_std is not None:
            actor.log_std[...] = log_std
        else:  # the second half of the outputs
            bias = jnp.concatenate([jnp.zeros(spec.chunk_dim), log_std])
            actor.mlp.out.bias = nnx.Param(bias)
        return Network(actor)

    def target_entropy(self, spec: AgentSpec) -> float:
        """H * A * (log(2 * scale) - c): edits live in a box of side 2 * scale, whose uniform density has the entropy
        log(2 * scale) a dimension; the usual -H * A would be out of reach for a small scale."""
        return spec.chunk_dim * (math.log(2.0 * self.scale) - self.target_entropy_per_dim)

    @property
    def learning_rates(self) -> dict[str, float]:
        return {"actor": self.learning_rate, "temperature": self.temperature_learning_rate}

    def initial_params(self, actor: Network) -> dict[str, Params]:
        return {"actor": actor.initial, "temperature": inverse_softplus(self.initial_temperature)}


def with_base(obs: Array, base: Array) -> Array:
    """obs [B, O], base [B, H, A] -> [B, O + H * A]."""
    return jnp.concatenate([obs, base.reshape(base.shape[0], -1)], axis=-1)


def sample_edits(
    actor: Network, config: EditConfig, params: Params, obs: Array, base: Array, noise: Array
) -> tuple[Array, Array]:
    """obs [B, O], base chunks [N, B, H, A] -> edited chunks [N, B, H, A] in [-1, 1], and the log-density [N, B] of the
    edits in action units. `noise`: standard normal like `base`; zeros give the edit of u's mean."""
    n, b = base.shape[:2]
    flat = base.reshape(n * b, *base.shape[2:])
    mean, std = actor(params, with_base(jnp.broadcast_to(obs, (n, *obs.shape)).reshape(n * b, -1), flat))
    unit, log_prob = tanh_gaussian(mean, std, noise.reshape(1, *flat.shape))
    chunks = jnp.clip(flat + config.scale * unit[0], -1.0, 1.0)
    log_prob = log_prob[0] - math.prod(flat.shape[1:]) * math.log(config.scale)
    return chunks.reshape(base.shape), log_prob.reshape(n, b)


def edit_loss(
    actor: Network,
    config: EditConfig,
    params: Params,
    temperature: Params,
    q: QFunction,
    batch: ReplayBatch,
    base: Array,
    noise: Array,
) -> tuple[Array, Metrics]:
    """E[alpha * log pi(edit | s, a_base) - Q(s, a_base + edit)] for base chunks and noise, each [B, H, A]."""
    obs = jnp.asarray(batch.obs)
    chunks, log_prob = sample_edits(actor, config, params, obs, base[None], noise[None])
    values = q(obs, chunks)[0]
    alpha = jax.lax.stop_gradient(temperature_of(temperature))
    loss = weighted_mean(alpha * log_prob[0] - values, batch.weight)
    metrics = {
        "actor_loss": loss,
        "q_policy": weighted_mean(values, batch.weight),
        "entropy": -weighted_mean(log_prob[0], batch.weight),
        "edit": jnp.abs(chunks[0] - base).mean(),
    }
    return loss, metrics


def edit_step(
    actor: Network,
    config: EditConfig,
    spec: AgentSpec,
    optimizers: Optimizers,
    state: TrainState,
    q: QFunction,
    batch: ReplayBatch,
    base: Array,
) -> tuple[TrainState, Metrics]:
    """One step of the edit actor and its temperature."""
    state, keys = split_key(state, 1)
    temperature, noise = state.params["temperature"], jax.random.normal(keys[0], base.shape)
    gradient, metrics = jax.grad(
        lambda params: edit_loss(actor, config, params, temperature, q, batch, base, noise), has_aux=True
    )(state.params["actor"])
    towards = jax.grad(temperature_loss)(temperature, metrics["entropy"], config.target_entropy(spec))
    metrics["temperature"] = temperature_of(temperature)
    return optimizers.apply(state, {"actor": gradient, "temperature": towards}), metrics


__all__ = ["EditConfig", "edit_loss", "edit_step", "sample_edits", "with_base"]
