"""TD3 on action chunks (arXiv 1802.09477), with the actor's objectives of TD3+BC (arXiv 2106.06860) and of CO-RFT.

The actor is deterministic: all noise is added to its chunk. The policy delay is the update-to-data ratio U: an update
is U critic steps with the target critic behind them, then one step of the actor and of its target.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.critics import (
    CriticConfig,
    EnsembleReduction,
    MLPCriticConfig,
    candidate_values,
    successors,
    take_prefixes,
    td_targets,
    weighted_mean,
)
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec, DeterministicActor, Network, Params
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.sac import ActorCritic, apply_critic_gradient
from vla_rl.offpolicy.train_state import Optimizers, TrainState, polyak, split_key
from vla_rl.offpolicy.update import ActorBatch, Metrics, make_update


@dataclass(frozen=True)
class TD3Config:
    """Noise is in units of the action, which is in [-1, 1]; `target_noise` is clipped to +-`target_noise_clip`.

    The actor's loss is `-q_weight * Q + bc_weight * |pi(s) - a|^2`; with `normalize_q`, Q is divided by its mean
    absolute value. TD3+BC: `q_weight=2.5, normalize_q=True, bc_weight=1`. Where TD3's actor follows the first critic,
    this one follows all, by `actor_reduction`.

    With a prefix critic, `prefix_targets` is "own", where a prefix of i steps has the i-step target, or "chunk", where
    all have the whole chunk's: another reading of arXiv 2508.02219, equation 6, in which short prefixes have the bias
    of n-step returns. `trained_prefixes`: a critic step draws so many of the H prefixes (at least 2), and costs less.
    """

    actor: ActorNetConfig = field(default_factory=ActorNetConfig)
    critic: CriticConfig = field(default_factory=lambda: MLPCriticConfig(num_members=2))
    actor_learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4
    tau: float = 0.005
    target_reduction: EnsembleReduction = field(default_factory=lambda: EnsembleReduction("min", None))
    actor_reduction: EnsembleReduction = field(default_factory=lambda: EnsembleReduction("mean", None))
    target_noise: float = 0.2
    target_noise_clip: float = 0.5
    exploration_noise: float = 0.1
    q_weight: float = 1.0
    normalize_q: bool = False
    bc_weight: float = 0.0
    actor_batch: ActorBatch = "all"
    prefix_targets: Literal["own", "chunk"] = "own"
    trained_prefixes: int | None = None

    def __post_init__(self) -> None:
        positive = min(self.actor_learning_rate, self.critic_learning_rate, self.tau)
        if positive <= 0.0 or self.tau > 1.0:
            raise ValueError(f"TD3Config needs learning rates > 0 and 0 < tau <= 1, got {self}")
        weights = (self.target_noise, self.target_noise_clip, self.exploration_noise, self.q_weight, self.bc_weight)
        if min(weights) < 0.0 or self.q_weight == self.bc_weight == 0.0:
            raise ValueError(f"TD3Config: noise and weights must not be negative, nor both weights zero, got {weights}")
        self._check_prefixes()

    def _check_prefixes(self) -> None:
        if self.prefix_targets == "own" and self.trained_prefixes is None:
            return
        if not isinstance(self.critic, PrefixCriticConfig):
            raise ValueError("prefix_targets and trained_prefixes need a PrefixCriticConfig: an MLP has no prefixes")
        if self.trained_prefixes is not None and (self.trained_prefixes < 2 or self.prefix_targets == "chunk"):
            raise ValueError(
                f'trained_prefixes must be at least 2, with prefix_targets="own"; got {self.trained_prefixes} and '
                f'"{self.prefix_targets}"'
            )


def build_td3_networks(spec: AgentSpec, config: TD3Config, seed: int = 0) -> ActorCritic:
    rngs = nnx.Rngs(seed)
    return ActorCritic(
        spec,
        Network(DeterministicActor(spec, config.actor, rngs)),
        Network(config.critic.build(spec, rngs)),
        config.critic.num_prefixes(spec),
    )


def init_td3(spec: AgentSpec, config: TD3Config, seed: int) -> TrainState:
    """A new train state; both targets start as copies."""
    nets = build_td3_networks(spec, config, seed)
    params = {"actor": nets.actor.initial, "critic": nets.critic.initial}
    params |= {f"target_{name}": jax.tree.map(jnp.copy, part) for name, part in params.items()}
    return TrainState(params, td3_optimizers(config).init(params), jax.random.key(seed), jnp.zeros((), jnp.int32))


def td3_optimizers(config: TD3Config) -> Optimizers:
    return Optimizers({"actor": config.actor_learning_rate, "critic": config.critic_learning_rate})


# ------------------------------------------------------------------------------------------------------- pure losses
def smoothed_actions(config: TD3Config, chunks: Array, key: Array) -> Array:
    """`chunks` [B, H, A] with clipped noise, clipped to [-1, 1] (arXiv 1802.09477, equation 14)."""
    noise = config.target_noise * jax.random.normal(key, chunks.shape)
    return jnp.clip(chunks + jnp.clip(noise, -config.target_noise_clip, config.target_noise_clip), -1.0, 1.0)


def td3_next_values(
    nets: ActorCritic, config: TD3Config, params: dict[str, Params], next_obs: Array, key: Array
) -> Array:
    """V(next_obs) [M] by both targets; the value of a chunk is that of its longest prefix."""
    noise_key, member_key = jax.random.split(key)
    actions = smoothed_actions(config, nets.actor(params["target_actor"], next_obs), noise_key)
    values = config.critic.head.value(nets.critic(params["target_critic"], next_obs, actions))[..., -1]
    return config.target_reduction(values, member_key)


def td3_td_loss(
    nets: ActorCritic, config: TD3Config, critic: Params, params: dict[str, Params], batch: ReplayBatch, key: Array
) -> tuple[Array, Metrics]:
    """Mean over members, rows and prefixes of the critic's loss (arXiv 2508.02219, equations 5 and 6)."""
    key, prefix_key = jax.random.split(key)
    out = nets.critic(critic, batch.obs, batch.actions)
    num_targets = nets.num_prefixes if config.prefix_targets == "own" else 1
    if config.trained_prefixes is not None and config.trained_prefixes < nets.num_prefixes:
        num_targets = config.trained_prefixes
        drawn = jax.random.choice(prefix_key, nets.num_prefixes, (num_targets,), replace=False)
        batch, out = take_prefixes(batch, drawn), out[:, :, drawn]
    following = td3_next_values(nets, config, params, successors(batch, num_targets), key)
    targets, weights = td_targets(batch, jax.lax.stop_gradient(following), num_targets)
    loss = weighted_mean(config.critic.head.loss(out, targets), weights)
    return loss, {"td_loss": loss, "q_data": config.critic.head.value(out).mean(), "td_target": targets.mean()}


def chunk_bc_loss(chunks: Array, batch: ReplayBatch) -> Array:
    """Mean squared difference of `chunks` [B, H, A] to the data's; steps past an episode's end do not count."""
    error = jnp.square(chunks - batch.actions).mean(axis=-1)
    return weighted_mean(error, batch.weight[:, None] * batch.mask)


def td3_actor_loss(
    nets: ActorCritic, config: TD3Config, actor: Params, params: dict[str, Params], batch: ReplayBatch, key: Array
) -> tuple[Array, Metrics]:
    """-Q(s, pi(s)), Q the mean over prefixes (arXiv 2508.02219, equation 9), and the distance to the data."""
    chunks = nets.actor(actor, batch.obs)
    values = candidate_values(nets.critic, config.critic.head, params["critic"], batch.obs, chunks[None])
    q = config.actor_reduction(values[:, 0].mean(axis=-1), key)
    scale = jax.lax.stop_gradient(jnp.abs(q).mean()) + 1e-8 if config.normalize_q else 1.0
    bc = chunk_bc_loss(chunks, batch)
    loss = config.bc_weight * bc - config.q_weight * weighted_mean(q[:, None], batch.weight[:, None]) / scale
    return loss, {"actor_loss": loss, "q_policy": q.mean(), "bc_loss": bc}


def noisy_chunk(actor: Network, params: Params, obs: Array, noise: Array, scale: float, explore: bool) -> Array:
    """obs [N, O], noise [N, H, A] -> chunks [N, H, A]: pi(s), with `explore` plus `scale` times the noise, clipped."""
    chunks = actor(params, obs)
    return jnp.clip(chunks + scale * noise, -1.0, 1.0) if explore else chunks


# ------------------------------------------------------------------------------------------------------------- steps
def td3_actor_step(
    nets: ActorCritic, config: TD3Config, state: TrainState, batch: ReplayBatch
) -> tuple[TrainState, Metrics]:
    """One step of the actor, then its target by Polyak."""
    state, keys = split_key(state, 1)
    gradient, metrics = jax.grad(
        lambda actor: td3_actor_loss(nets, config, actor, state.params, batch, keys[0]), has_aux=True
    )(state.params["actor"])
    state = td3_optimizers(config).apply(state, {"actor": gradient})
    return polyak(state, "actor", "target_actor", config.tau), metrics


class TD3:
    """An `OffPolicyAgent`."""

    def __init__(self, spec: AgentSpec, config: TD3Config) -> None:
        self.spec, self.config = spec, config
        self.nets = build_td3_networks(spec, config)
        self.num_prefixes = self.nets.num_prefixes
        self.update = make_update(
            self._critic_step, lambda s, b: td3_actor_step(self.nets, config, s, b), config.actor_batch
        )
        self._act = jax.jit(noisy_chunk, static_argnums=0, static_argnames="explore")

    def init(self, seed: int) -> TrainState:
        return init_td3(self.spec, self.config, seed)

    def act(self, state: TrainState, obs: Array, noise: Array, *, explore: bool) -> Array:
        """pi(obs), with Gaussian noise of `exploration_noise` to explore."""
        scale = self.config.exploration_noise
        return self._act(self.nets.actor, state.params["actor"], obs, noise, scale, explore=explore)

    def _critic_step(self, state: TrainState, batch: ReplayBatch) -> tuple[TrainState, Metrics]:
        state, keys = split_key(state, 1)
        gradient, metrics = jax.grad(
            lambda critic: td3_td_loss(self.nets, self.config, critic, state.params, batch, keys[0]), has_aux=True
        )(state.params["critic"])
        optimizers = td3_optimizers(self.config)
        return apply_critic_gradient(optimizers, self.config.tau, state, {"critic": gradient}), metrics


__all__ = ["TD3", "TD3Config"]
