"""Implicit Q-learning on chunks (arXiv 2110.06169): no chunk that is not in the data is ever valued.

V is an upper expectile of Q over the data's chunks, Q is taught by V alone, and the actor clones the data's chunks
weighted by how much better than V they are. It learns online with the same losses.
"""

from __future__ import annotations

import math
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
    successors,
    weighted_mean,
)
from vla_rl.offpolicy.networks import (
    MLP,
    ActorNetConfig,
    AgentSpec,
    Network,
    Params,
    TanhGaussianActor,
    gaussian_log_density,
)
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.sac import apply_critic_gradient
from vla_rl.offpolicy.train_state import Optimizers, TrainState, split_key
from vla_rl.offpolicy.update import ActorBatch, Metrics, make_update


@dataclass(frozen=True)
class IQLConfig:
    """Defaults are the paper's for locomotion; its antmaze has expectile 0.9 and inverse_temperature 10.

    `expectile`: of Q that V is, 0.5 is its mean. `inverse_temperature` beta: the data's chunks weigh
    exp(beta * (Q - V)), at most `max_weight`. `value_hidden_sizes`: of V's network, which has no LayerNorm.
    """

    actor: ActorNetConfig = field(default_factory=lambda: ActorNetConfig(layer_norm=False, std="shared"))
    critic: MLPCriticConfig | PrefixCriticConfig = field(
        default_factory=lambda: MLPCriticConfig(num_members=2, layer_norm=False)
    )
    value_hidden_sizes: tuple[int, ...] = (256, 256)
    expectile: float = 0.7
    inverse_temperature: float = 3.0
    max_weight: float = 100.0
    learning_rate: float = 3e-4
    tau: float = 0.005
    reduction: EnsembleReduction = field(default_factory=lambda: EnsembleReduction("min", None))
    actor_batch: ActorBatch = "all"

    def __post_init__(self) -> None:
        if not 0.0 < self.expectile < 1.0 or not 0.0 < self.tau <= 1.0:
            raise ValueError(f"IQLConfig needs 0 < expectile < 1 and 0 < tau <= 1, got {self.expectile}, {self.tau}")
        if self.inverse_temperature < 0.0 or self.max_weight <= 0.0:
            raise ValueError(
                "IQLConfig needs inverse_temperature >= 0 and max_weight > 0, got "
                f"{self.inverse_temperature}, {self.max_weight}"
            )


class IQLNetworks(NamedTuple):
    """`value`: obs [B, O] -> [B, 1]. The actor's mean is before its tanh, its noise is not squashed."""

    actor: Network
    critic: Network
    value: Network
    num_prefixes: int

    @staticmethod
    def build(spec: AgentSpec, config: IQLConfig, seed: int = 0) -> IQLNetworks:
        rngs = nnx.Rngs(seed)
        return IQLNetworks(
            Network(TanhGaussianActor(spec, config.actor, rngs)),
            Network(config.critic.build(spec, rngs)),
            Network(MLP(spec.obs_dim, config.value_hidden_sizes, 1, layer_norm=False, rngs=rngs)),
            config.critic.num_prefixes(spec),
        )


# ------------------------------------------------------------------------------------------------------- pure losses
def expectile_loss(difference: Array, expectile: float) -> Array:
    """|tau - 1(difference < 0)| * difference^2, element by element (equation 5)."""
    return jnp.abs(expectile - (difference < 0.0)) * jnp.square(difference)


def advantage_weights(advantage: Array, inverse_temperature: float, max_weight: float) -> Array:
    """exp(beta * advantage), at most `max_weight` (equation 7). The clip is inside, where it cannot overflow."""
    return jnp.exp(jnp.minimum(inverse_temperature * advantage, math.log(max_weight)))


def data_values(
    nets: IQLNetworks, config: IQLConfig, params: dict[str, Params], batch: ReplayBatch, key: Array
) -> Array:
    """Q(s, a) [B] of the data's chunks by the target critics, that of the longest prefix."""
    values = candidate_values(
        nets.critic,
        config.critic.head,
        params["target_critic"],
        jnp.asarray(batch.obs),
        jnp.asarray(batch.actions)[None],
    )
    return config.reduction(values[:, 0, :, -1], key)


def value_loss(
    nets: IQLNetworks, config: IQLConfig, value: Params, batch: ReplayBatch, q_data: Array
) -> tuple[Array, Metrics]:
    """Expectile regression of V(s) to `q_data` [B]."""
    v = nets.value(value, batch.obs)[:, 0]
    loss = weighted_mean(expectile_loss(jax.lax.stop_gradient(q_data) - v, config.expectile), batch.weight)
    return loss, {"value_loss": loss, "value": weighted_mean(v, batch.weight)}


def critic_loss(
    nets: IQLNetworks, config: IQLConfig, critic: Params, params: dict[str, Params], batch: ReplayBatch
) -> tuple[Array, Metrics]:
    """(reward + discount * V(next_obs) - Q(s, a))^2 (equation 6)."""
    following = nets.value(params["value"], successors(batch, nets.num_prefixes))[:, 0]
    return bootstrap_loss(nets.critic, config.critic.head, critic, batch, following, nets.num_prefixes)


def actor_loss(
    nets: IQLNetworks, config: IQLConfig, actor: Params, params: dict[str, Params], batch: ReplayBatch, q_data: Array
) -> tuple[Array, Metrics]:
    """-min(exp(beta (Q - V)), max_weight) * log pi(a | s), over executed steps only (equation 7)."""
    mean, std = nets.actor(actor, batch.obs)
    steps = gaussian_log_density(jnp.asarray(batch.actions), jnp.tanh(mean), std).sum(axis=-1)
    log_prob = steps.sum(axis=-1, where=batch.mask)
    advantage = q_data - nets.value(params["value"], batch.obs)[:, 0]
    weights = advantage_weights(advantage, config.inverse_temperature, config.max_weight)
    loss = weighted_mean(-jax.lax.stop_gradient(weights) * log_prob, batch.weight)
    return loss, {
        "actor_loss": loss,
        "advantage": weighted_mean(advantage, batch.weight),
        "clipped_share": (weights >= 0.999 * config.max_weight).mean(),
    }


def act_gaussian(actor: Network, params: Params, obs: Array, noise: Array, explore: bool) -> Array:
    """obs [N, O], standard normal noise [N, H, A] -> chunks [N, H, A]: a sample with `explore`, else the mean."""
    mean, std = actor(params, obs)
    return jnp.clip(jnp.tanh(mean) + std * noise, -1.0, 1.0) if explore else jnp.tanh(mean)


# ------------------------------------------------------------------------------------------------------------- agent
class IQL:
    """An `OffPolicyAgent`."""

    def __init__(self, spec: AgentSpec, config: IQLConfig) -> None:
        self.spec, self.config = spec, config
        self.nets = IQLNetworks.build(spec, config)
        self.num_prefixes = self.nets.num_prefixes
        self._optimizers = Optimizers(dict.fromkeys(("actor", "critic", "value"), config.learning_rate))
        self.update = make_update(self._critic_step, self._actor_step, config.actor_batch)
        self._act = jax.jit(act_gaussian, static_argnums=0, static_argnames="explore")

    def init(self, seed: int) -> TrainState:
        nets = IQLNetworks.build(self.spec, self.config, seed)
        params = {
            "actor": nets.actor.initial,
            "critic": nets.critic.initial,
            "target_critic": jax.tree.map(jnp.copy, nets.critic.initial),
            "value": nets.value.initial,
        }
        return TrainState(params, self._optimizers.init(params), jax.random.key(seed), jnp.zeros((), jnp.int32))

    def act(self, state: TrainState, obs: Array, noise: Array, *, explore: bool) -> Array:
        """A sample with `explore`, clipped to [-1, 1], else the mean."""
        return self._act(self.nets.actor, state.params["actor"], obs, noise, explore=explore)

    def _critic_step(self, state: TrainState, batch: ReplayBatch) -> tuple[TrainState, Metrics]:
        """Critic and V by one gradient at the same parameters; what each is taught by is held still."""
        state, keys = split_key(state, 1)
        q_data = data_values(self.nets, self.config, state.params, batch, keys[0])

        def loss(trained: dict[str, Params]) -> tuple[Array, Metrics]:
            of_critic, metrics = critic_loss(self.nets, self.config, trained["critic"], state.params, batch)
            of_value, more = value_loss(self.nets, self.config, trained["value"], batch, q_data)
            return of_critic + of_value, metrics | more

        trained = {name: state.params[name] for name in ("critic", "value")}
        gradients, metrics = jax.grad(loss, has_aux=True)(trained)
        return apply_critic_gradient(self._optimizers, self.config.tau, state, gradients), metrics

    def _actor_step(self, state: TrainState, batch: ReplayBatch) -> tuple[TrainState, Metrics]:
        state, keys = split_key(state, 1)
        q_data = data_values(self.nets, self.config, state.params, batch, keys[0])
        gradient, metrics = jax.grad(
            lambda actor: actor_loss(self.nets, self.config, actor, state.params, batch, q_data), has_aux=True
        )(state.params["actor"])
        return self._optimizers.apply(state, {"actor": gradient}), metrics


__all__ = ["IQL", "IQLConfig"]
