"""CO-RFT (arXiv 2508.02219): offline RL on chunks from a few dozen demonstrations.

Stage 1, `BehaviorCloning`: the actor imitates the demonstrated chunks. Stage 2, `CoRFT`: calibrated Q-learning with a
critic of every prefix of a chunk, on the same demonstrations, from the actor of stage 1. Demonstrations whose reward is
sparse are drawn more often by the replay buffer's weights; nothing here repeats a step.

Ablations are options: `calibrate=False`; an MLP critic, which values the whole chunk only; a spec with
`action_horizon=1`, which is one-step Cal-QL; `alpha=0`, which is TD3.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.calql import ConservativeConfig, conservative_gap
from vla_rl.offpolicy.critics import candidate_values, weighted_mean
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec, DeterministicActor, Network, Params
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.sac import ActorCritic, apply_critic_gradient
from vla_rl.offpolicy.td3 import (
    TD3Config,
    build_td3_networks,
    chunk_bc_loss,
    init_td3,
    noisy_chunk,
    td3_actor_step,
    td3_optimizers,
    td3_td_loss,
)
from vla_rl.offpolicy.train_state import Optimizers, TrainState, split_key
from vla_rl.offpolicy.update import Metrics, make_update


# ----------------------------------------------------------------------------------------------------------- stage 1
@dataclass(frozen=True)
class BehaviorCloningConfig:
    """`actor` must be that of stage 2. `exploration_noise`: as in TD3, for a data collection with this policy."""

    actor: ActorNetConfig = field(default_factory=ActorNetConfig)
    learning_rate: float = 3e-4
    exploration_noise: float = 0.0


class BehaviorCloning:
    """An `OffPolicyAgent` without a critic: each of an update's U minibatches is a step on the squared error."""

    num_prefixes = 1

    def __init__(self, spec: AgentSpec, config: BehaviorCloningConfig) -> None:
        self.spec, self.config = spec, config
        self.actor = self._network(0)
        self._optimizers = Optimizers({"actor": config.learning_rate})
        self.update = make_update(self._step, None)
        self._act = jax.jit(noisy_chunk, static_argnums=0, static_argnames="explore")

    def init(self, seed: int) -> TrainState:
        params = {"actor": self._network(seed).initial}
        return TrainState(params, self._optimizers.init(params), jax.random.key(seed), jnp.zeros((), jnp.int32))

    def act(self, state: TrainState, obs: Array, noise: Array, *, explore: bool) -> Array:
        """pi(obs), with Gaussian noise of `exploration_noise` to explore."""
        scale = self.config.exploration_noise
        return self._act(self.actor, state.params["actor"], obs, noise, scale, explore=explore)

    def _network(self, seed: int) -> Network:
        return Network(DeterministicActor(self.spec, self.config.actor, nnx.Rngs(seed)))

    def _step(self, state: TrainState, batch: ReplayBatch) -> tuple[TrainState, Metrics]:
        loss, gradient = jax.value_and_grad(lambda actor: chunk_bc_loss(self.actor(actor, batch.obs), batch))(
            state.params["actor"]
        )
        state = self._optimizers.apply(state, {"actor": gradient})
        return state._replace(num_updates=state.num_updates + 1), {"bc_loss": loss}


# ----------------------------------------------------------------------------------------------------------- stage 2
@dataclass(frozen=True)
class CoRFTConfig:
    """`td3`: all but the conservative term. `alpha`: its weight; the paper's is not known, 0.1 is ConRFT's, whose
    returns are of order one as here. In the data, Q is raised by up to alpha / 2, so it must be small against returns.

    `num_actions`, `action_noise`: chunks a ~ pi of the term are pi(s) plus Gaussian noise; one chunk without noise is
    the deterministic policy's expectation. `calibrate`: never push a value below the data's Monte-Carlo return.
    """

    td3: TD3Config = field(default_factory=lambda: TD3Config(critic=PrefixCriticConfig()))
    alpha: float = 0.1
    num_actions: int = 1
    action_noise: float = 0.0
    calibrate: bool = True

    def __post_init__(self) -> None:
        if self.alpha < 0.0 or self.num_actions < 1 or self.action_noise < 0.0:
            raise ValueError(f"CoRFTConfig needs alpha >= 0, num_actions >= 1 and action_noise >= 0, got {self}")
        if self.num_actions > 1 and self.action_noise == 0.0:
            raise ValueError(f"{self.num_actions} chunks without action_noise are all the same; set it, or take one")

    @property
    def conservative(self) -> ConservativeConfig:
        return ConservativeConfig(
            alpha=self.alpha, num_actions=self.num_actions, form="expectation", calibrate=self.calibrate
        )


def expectation_gap(
    nets: ActorCritic, config: CoRFTConfig, critic: Params, params: dict[str, Params], batch: ReplayBatch, key: Array
) -> tuple[Array, Metrics]:
    """E_{a ~ pi} max(Q(s, a_{t:t+i}), V^mu(s)) - Q(s, data), mean over prefixes (arXiv 2508.02219, equation 8)."""
    chunks = nets.actor(params["actor"], batch.obs)
    noise = jax.random.normal(key, (config.num_actions, *chunks.shape))
    sampled = jnp.clip(chunks + config.action_noise * noise, -1.0, 1.0)
    head = config.td3.critic.head
    q_data, *q_policy = candidate_values(
        nets.critic, head, critic, batch.obs, jnp.concatenate([batch.actions[None], sampled])
    ).swapaxes(0, 1)
    policy = jnp.stack(q_policy, axis=1)
    none = policy[:, :0]
    log_prob = jnp.zeros(policy.shape[1:3])  # a deterministic policy has none, and this form asks for none
    gap, bounded = conservative_gap(
        config.conservative, q_data, none, policy, jnp.asarray(batch.mc_return), log_prob, nets.spec.chunk_dim
    )
    loss = weighted_mean(gap, batch.weight[:, None])
    return loss, {"conservative_gap": loss, "calibrated_share": bounded}


def co_rft_critic_loss(
    nets: ActorCritic, config: CoRFTConfig, critic: Params, params: dict[str, Params], batch: ReplayBatch, keys: Array
) -> tuple[Array, Metrics]:
    """TD + alpha * gap; `keys` [2]."""
    loss, metrics = td3_td_loss(nets, config.td3, critic, params, batch, keys[0])
    if config.alpha == 0.0:
        return loss, metrics
    gap, more = expectation_gap(nets, config, critic, params, batch, keys[1])
    return loss + config.alpha * gap, metrics | more


class CoRFT:
    """An `OffPolicyAgent`. Its train state has the parts of TD3's, which goes on with it online."""

    def __init__(self, spec: AgentSpec, config: CoRFTConfig) -> None:
        self.spec, self.config = spec, config
        self.nets = build_td3_networks(spec, config.td3)
        self.num_prefixes = self.nets.num_prefixes
        self.update = make_update(
            self._critic_step, lambda s, b: td3_actor_step(self.nets, config.td3, s, b), config.td3.actor_batch
        )
        self._act = jax.jit(noisy_chunk, static_argnums=0, static_argnames="explore")

    def init(self, seed: int) -> TrainState:
        return init_td3(self.spec, self.config.td3, seed)

    def init_from(self, cloned: TrainState, seed: int) -> TrainState:
        """A new state whose actor and target actor are the actor of stage 1; moments are new, for the loss is another.

        Raises ValueError where stage 1 had another actor network.
        """
        state, actor = self.init(seed), cloned.params["actor"]
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (actor, state.params["actor"])]
        if shapes[0] != shapes[1]:
            raise ValueError(f"stage 1 trained another actor: {shapes[0]}, stage 2 has {shapes[1]}; use one config")
        copies = {name: jax.tree.map(jnp.copy, actor) for name in ("actor", "target_actor")}
        return state._replace(params=state.params | copies)

    def act(self, state: TrainState, obs: Array, noise: Array, *, explore: bool) -> Array:
        """pi(obs), with Gaussian noise of `exploration_noise` to explore."""
        scale = self.config.td3.exploration_noise
        return self._act(self.nets.actor, state.params["actor"], obs, noise, scale, explore=explore)

    def _critic_step(self, state: TrainState, batch: ReplayBatch) -> tuple[TrainState, Metrics]:
        state, keys = split_key(state, 2)
        gradient, metrics = jax.grad(
            lambda critic: co_rft_critic_loss(self.nets, self.config, critic, state.params, batch, keys), has_aux=True
        )(state.params["critic"])
        optimizers = td3_optimizers(self.config.td3)
        return apply_critic_gradient(optimizers, self.config.td3.tau, state, {"critic": gradient}), metrics


__all__ = ["BehaviorCloning", "BehaviorCloningConfig", "CoRFT", "CoRFTConfig"]
