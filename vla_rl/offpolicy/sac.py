"""Soft actor-critic on action chunks (arXiv 1801.01290) with REDQ's ensembles (arXiv 2101.05982).

The chunk is the action: the actor draws all H steps at once, the critic values them together, and a target is
`reward + discount * V(next_obs)` with the chunk's own discount gamma^k. WSRL's online phase is this agent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.critics import (
    EnsembleReduction,
    MLPCriticConfig,
    bootstrap_loss,
    candidate_values,
    reduced_values,
    successors,
    weighted_mean,
)
from vla_rl.offpolicy.networks import (
    ACTION_LIMIT,
    ActorNetConfig,
    AgentSpec,
    Network,
    Params,
    TanhGaussianActor,
    sample_tanh_gaussian,
    tanh_gaussian,
    tanh_gaussian_log_prob,
)
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.train_state import Optimizers, TrainState, polyak, split_key
from vla_rl.offpolicy.update import ActorBatch, Metrics, make_update


@dataclass(frozen=True)
class SACConfig:
    """Defaults are WSRL's (arXiv 2412.07762).

    `target_entropy_per_dim` c: the target entropy is `-c * H * A`. `backup_entropy`: the target has the entropy term.
    `num_target_actions` above 1: the target takes the best of so many (after the ensemble's reduction).
    `entropy_on_next_obs`: the temperature's loss reads the entropy there, as WSRL's code does.
    `bc_weight`: of the log-likelihood of the data's chunks in the actor's loss, executed steps only (QC-RLPD).

    WSRL's code steps Adam with zero gradients for parts that are not updated, which at a UTD of 4 makes the actor's
    rate 2.2 to 2.4 times the nominal one (the critic's 1.1). Here a part that is not updated keeps still.
    """

    actor: ActorNetConfig = field(default_factory=ActorNetConfig)
    critic: MLPCriticConfig | PrefixCriticConfig = field(default_factory=MLPCriticConfig)
    actor_learning_rate: float = 1e-4
    critic_learning_rate: float = 3e-4
    temperature_learning_rate: float = 1e-4
    tau: float = 0.005
    target_reduction: EnsembleReduction = field(default_factory=lambda: EnsembleReduction("min", 2, True))
    actor_reduction: EnsembleReduction = field(default_factory=lambda: EnsembleReduction("min", None))
    num_target_actions: int = 1
    backup_entropy: bool = False
    initial_temperature: float = 1.0
    target_entropy_per_dim: float = 1.0
    entropy_on_next_obs: bool = True
    bc_weight: float = 0.0
    actor_batch: ActorBatch = "all"

    def __post_init__(self) -> None:
        if not 0.0 < self.tau <= 1.0 or self.num_target_actions < 1 or self.initial_temperature <= 0.0:
            raise ValueError(
                "SACConfig needs 0 < tau <= 1, num_target_actions >= 1 and initial_temperature > 0, got "
                f"{self.tau}, {self.num_target_actions}, {self.initial_temperature}"
            )
        if self.bc_weight < 0.0:
            raise ValueError(f"SACConfig.bc_weight must not be negative, got {self.bc_weight}")


class ActorCritic(NamedTuple):
    """The networks of an agent as pure functions, and how many prefixes of a chunk its critic values."""

    spec: AgentSpec
    actor: Network
    critic: Network
    num_prefixes: int

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """(H, A)."""
        return self.spec.action_horizon, self.spec.action_dim

    @staticmethod
    def build(spec: AgentSpec, config: SACConfig, seed: int = 0) -> ActorCritic:
        rngs = nnx.Rngs(seed)
        return ActorCritic(
            spec,
            Network(TanhGaussianActor(spec, config.actor, rngs)),
            Network(config.critic.build(spec, rngs)),
            config.critic.num_prefixes(spec),
        )


def temperature_of(params: Params) -> Array:
    """A Lagrange multiplier is positive: softplus of its parameter."""
    return jax.nn.softplus(params)


def inverse_softplus(value: float) -> Array:
    return jnp.log(jnp.expm1(jnp.asarray(value, jnp.float32)))


def init_sac(spec: AgentSpec, config: SACConfig, seed: int) -> TrainState:
    """A new train state; the target starts as a copy of the critic."""
    nets = ActorCritic.build(spec, config, seed)
    params = {
        "actor": nets.actor.initial,
        "critic": nets.critic.initial,
        "target_critic": jax.tree.map(jnp.copy, nets.critic.initial),
        "temperature": inverse_softplus(config.initial_temperature),
    }
    return TrainState(params, sac_optimizers(config).init(params), jax.random.key(seed), jnp.zeros((), jnp.int32))


def sac_optimizers(config: SACConfig) -> Optimizers:
    return Optimizers(
        {
            "actor": config.actor_learning_rate,
            "critic": config.critic_learning_rate,
            "temperature": config.temperature_learning_rate,
        }
    )


# ------------------------------------------------------------------------------------------------------- pure losses
def chunk_values(nets: ActorCritic, config: SACConfig, critic: Params, obs: Array, actions: Array) -> Array:
    """obs [B, O], actions [M, B, H, A] -> values [E, M, B, P]."""
    return candidate_values(nets.critic, config.critic.head, critic, obs, actions)


def next_values(nets: ActorCritic, config: SACConfig, params: dict[str, Params], next_obs: Array, key: Array) -> Array:
    """V(next_obs) [M] under the policy, by the target critic."""
    noise_key, member_key = jax.random.split(key)
    shape = (config.num_target_actions, next_obs.shape[0], *nets.chunk_shape)
    return next_values_of(nets, config, params, next_obs, jax.random.normal(noise_key, shape), member_key)


def next_values_of(
    nets: ActorCritic, config: SACConfig, params: dict[str, Params], next_obs: Array, noise: Array, member_key: Array
) -> Array:
    """`next_values` of the chunks that `noise` [num_target_actions, M, H, A] makes.

    The entropy term is inside of V, so that the discount ends it with the episode. A chunk's value is that of its
    longest prefix.
    """
    mean, std = nets.actor(params["actor"], next_obs)
    actions, log_prob = tanh_gaussian(mean, std, noise)
    reduced = reduced_values(
        nets.critic, config.critic.head, config.target_reduction, params["target_critic"], next_obs, actions, member_key
    )[..., -1]
    if config.backup_entropy:
        reduced = reduced - temperature_of(params["temperature"]) * log_prob
    return reduced.max(axis=0)


def td_loss(
    nets: ActorCritic, config: SACConfig, critic: Params, params: dict[str, Params], batch: ReplayBatch, key: Array
) -> tuple[Array, Metrics]:
    """Mean over members, rows and prefixes of the critic's loss against the one target that all members share."""
    following = next_values(nets, config, params, successors(batch, nets.num_prefixes), key)
    return bootstrap_loss(nets.critic, config.critic.head, critic, batch, following, nets.num_prefixes)


def actor_loss(
    nets: ActorCritic, config: SACConfig, actor: Params, params: dict[str, Params], batch: ReplayBatch, key: Array
) -> tuple[Array, Metrics]:
    """`actor_loss_of` chunks drawn from the policy."""
    noise_key, member_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (batch.obs.shape[0], *nets.chunk_shape))
    return actor_loss_of(nets, config, actor, params, batch, noise, member_key)


def actor_loss_of(
    nets: ActorCritic,
    config: SACConfig,
    actor: Params,
    params: dict[str, Params],
    batch: ReplayBatch,
    noise: Array,
    member_key: Array,
) -> tuple[Array, Metrics]:
    """E[alpha log pi - Q(s, a)] for the chunks that `noise` [B, H, A] makes, Q the mean over prefixes of the reduced
    ensemble; with `bc_weight` minus that times log pi of the data's chunk."""
    mean, std = nets.actor(actor, batch.obs)
    actions, log_prob = tanh_gaussian(mean, std, noise[None])
    values = chunk_values(nets, config, params["critic"], jnp.asarray(batch.obs), actions)[:, 0].mean(axis=-1)
    q = config.actor_reduction(values, member_key)
    alpha = jax.lax.stop_gradient(temperature_of(params["temperature"]))
    losses = alpha * log_prob[0] - q
    if config.bc_weight:
        data = jnp.arctanh(jnp.clip(batch.actions, -ACTION_LIMIT, ACTION_LIMIT))
        losses = losses - config.bc_weight * tanh_gaussian_log_prob(data, mean, std, jnp.asarray(batch.mask))
    loss = weighted_mean(losses, batch.weight)
    entropy = -weighted_mean(log_prob[0], batch.weight)
    return loss, {"actor_loss": loss, "q_policy": weighted_mean(q, batch.weight), "entropy": entropy}


def temperature_loss(temperature: Params, entropy: Array, target_entropy: float) -> Array:
    """alpha * (entropy - target): alpha grows while the entropy is below its target."""
    return temperature_of(temperature) * (jax.lax.stop_gradient(entropy) - target_entropy)


def sample_chunk(actor: Network, params: Params, obs: Array, noise: Array, explore: bool) -> Array:
    """obs [N, O], noise [N, H, A] -> chunks [N, H, A]: a sample with `explore`, else tanh of the mean."""
    mean, std = actor(params, obs)
    return jnp.tanh(mean + std * noise) if explore else jnp.tanh(mean)


# ------------------------------------------------------------------------------------------------------------- steps
def sac_actor_step(
    nets: ActorCritic, config: SACConfig, state: TrainState, batch: ReplayBatch
) -> tuple[TrainState, Metrics]:
    """One step of actor and temperature."""
    state, keys = split_key(state, 2)
    gradient, metrics = jax.grad(
        lambda actor: actor_loss(nets, config, actor, state.params, batch, keys[0]), has_aux=True
    )(state.params["actor"])
    entropy = metrics["entropy"]
    if config.entropy_on_next_obs:
        mean, std = nets.actor(state.params["actor"], batch.next_obs)
        entropy = -weighted_mean(sample_tanh_gaussian(mean, std, keys[1], 1)[1][0], batch.weight)
    target_entropy = -config.target_entropy_per_dim * nets.spec.chunk_dim
    temperature_gradient = jax.grad(temperature_loss)(state.params["temperature"], entropy, target_entropy)
    metrics["temperature"] = temperature_of(state.params["temperature"])
    gradients = {"actor": gradient, "temperature": temperature_gradient}
    return sac_optimizers(config).apply(state, gradients), metrics


def apply_critic_gradient(
    optimizers: Optimizers, tau: float, state: TrainState, gradients: dict[str, Params]
) -> TrainState:
    """One step of the critic (and what is trained with it), then the target by Polyak."""
    state = polyak(optimizers.apply(state, gradients), "critic", "target_critic", tau)
    return state._replace(num_updates=state.num_updates + 1)


class SAC:
    """An `OffPolicyAgent`."""

    def __init__(self, spec: AgentSpec, config: SACConfig) -> None:
        self.spec, self.config = spec, config
        self.nets = ActorCritic.build(spec, config)
        self.num_prefixes = self.nets.num_prefixes
        self.update = make_update(
            self._critic_step, lambda s, b: sac_actor_step(self.nets, config, s, b), config.actor_batch
        )
        self._act = jax.jit(sample_chunk, static_argnums=0, static_argnames="explore")

    def init(self, seed: int) -> TrainState:
        return init_sac(self.spec, self.config, seed)

    def act(self, state: TrainState, obs: Array, noise: Array, *, explore: bool) -> Array:
        """A sample with `explore`, else tanh of the mean."""
        return self._act(self.nets.actor, state.params["actor"], obs, noise, explore=explore)

    def _critic_step(self, state: TrainState, batch: ReplayBatch) -> tuple[TrainState, Metrics]:
        state, keys = split_key(state, 1)
        gradient, metrics = jax.grad(
            lambda critic: td_loss(self.nets, self.config, critic, state.params, batch, keys[0]), has_aux=True
        )(state.params["critic"])
        optimizers = sac_optimizers(self.config)
        return apply_critic_gradient(optimizers, self.config.tau, state, {"critic": gradient}), metrics


__all__ = ["SAC", "SACConfig"]
