"""DSRL: steering a frozen flow policy through its noise (arXiv 2506.15799), with and without a critic of actions.

The agent's action is the noise chunk w that the frozen policy starts from; the policy's `act(obs, noise)` makes the
chunk that is executed, deterministically. Noise stays within [-b, b], where the policy knows what to do with it.

`DSRL` (DSRL-SAC) is SAC on w / b. `DSRLNA` (noise aliasing) learns Q_A of executed chunks by TD, which any data can
teach it, and distils it into Q_W of noise at w ~ N(0, I); the actor climbs Q_W. The chunks a = ODE(o, w) are given.
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
    reduced_values,
    successors,
)
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec, Network, Params
from vla_rl.offpolicy.sac import SAC, ActorCritic, SACConfig, apply_critic_gradient, init_sac, sac_actor_step
from vla_rl.offpolicy.train_state import Optimizers, TrainState, split_key
from vla_rl.offpolicy.update import Metrics, make_update


def _dsrl_sac() -> SACConfig:
    """The reference code's for robomimic's can: two wide critics, target entropy 0, entropy in the target."""
    return SACConfig(
        actor=ActorNetConfig((2048, 2048, 2048)),
        critic=MLPCriticConfig(2, (2048, 2048, 2048)),
        actor_learning_rate=3e-4,
        critic_learning_rate=3e-4,
        temperature_learning_rate=3e-4,
        target_reduction=EnsembleReduction("min", None),
        backup_entropy=True,
        target_entropy_per_dim=0.0,
        entropy_on_next_obs=False,
        actor_batch="last",
    )


@dataclass(frozen=True)
class DSRLConfig:
    """`noise_bound` b. `sac.backup_entropy` is DSRL-SAC's alone; DSRLNA's target has no entropy term.

    `distill_reduction`: members of Q_A whose value Q_W learns (ours: the least of all).
    """

    noise_bound: float = 1.5
    sac: SACConfig = field(default_factory=_dsrl_sac)
    distill_reduction: EnsembleReduction = field(default_factory=lambda: EnsembleReduction("min", None))

    def __post_init__(self) -> None:
        if self.noise_bound <= 0.0:
            raise ValueError(f"DSRLConfig.noise_bound is {self.noise_bound}, expected more than 0")
        if self.sac.bc_weight:
            raise ValueError("DSRL acts in noise space, where there is no data to imitate: sac.bc_weight must be 0")


class DSRL:
    """An `OffPolicyAgent` whose chunks [N, H, A] are noise in [-b, b], and whose batches have noise as `actions`.

    A noise chunk belongs to a decision: sample rows at decisions only, with the reward of all that was executed.
    """

    def __init__(self, spec: AgentSpec, config: DSRLConfig) -> None:
        self.spec, self.config = spec, config
        self._sac = SAC(spec, config.sac)
        self.num_prefixes = self._sac.num_prefixes

    def init(self, seed: int) -> TrainState:
        return self._sac.init(seed)

    def update(self, state: TrainState, batches: ReplayBatch) -> tuple[TrainState, Metrics]:
        """`batches.actions` [U, B, H, A]: the noise of each decision. Raises ValueError where it is out of bounds."""
        largest = float(jnp.abs(jnp.asarray(batches.actions)).max())
        if largest > self.config.noise_bound * (1.0 + 1e-5):
            raise ValueError(
                f"noise of {largest:.3f} in the batch, the bound is {self.config.noise_bound}; are these actions?"
            )
        return self._sac.update(state, batches._replace(actions=batches.actions / self.config.noise_bound))

    def act(self, state: TrainState, obs: Array, noise: Array, *, explore: bool) -> Array:
        """Noise [N, H, A] for the frozen policy: a sample (`noise` is the agent's own, standard normal) with `explore`,
        else b * tanh of the mean."""
        return self.config.noise_bound * self._sac.act(state, obs, noise, explore=explore)


class NoiseDistillation(NamedTuple):
    """What Q_W learns from: `noise` ~ N(0, I) and `actions` = ODE(obs, noise), [V, B, H, A]; `obs` [V, B, O]."""

    obs: Array
    noise: Array
    actions: Array


class DSRLNA:
    """Noise actor, temperature, Q_A with its target, and Q_W."""

    def __init__(self, spec: AgentSpec, config: DSRLConfig) -> None:
        self.spec, self.config = spec, config
        self.nets = ActorCritic.build(spec, config.sac)
        self.num_prefixes = self.nets.num_prefixes
        rates = {"actor": config.sac.actor_learning_rate, "temperature": config.sac.temperature_learning_rate}
        rates |= dict.fromkeys(("critic", "noise_critic"), config.sac.critic_learning_rate)
        self._optimizers = Optimizers(rates)
        self._td = make_update(self._critic_step, None)
        self._distill = make_update(self._distill_step, None)
        self._actor = jax.jit(self._actor_step, donate_argnums=0)
        self._propose = jax.jit(self._propose_pure)

    def init(self, seed: int) -> TrainState:
        state = init_sac(self.spec, self.config.sac, seed)
        noise_critic = Network(self.config.sac.critic.build(self.spec, nnx.Rngs(seed + 1))).initial
        params = state.params | {"noise_critic": noise_critic}
        return state._replace(params=params, moments=self._optimizers.init(params))

    def update(
        self, state: TrainState, batches: ReplayBatch, next_actions: Array, distillation: NoiseDistillation
    ) -> tuple[TrainState, Metrics]:
        """U steps of Q_A, V of Q_W, one of the actor on the last minibatch's observations.

        `batches.actions`: executed chunks. `next_actions` [U, N, B * P, H, A]: ODE(o', w') for w' of `propose` at
        `successors(batch, P)`. Raises ValueError on other shapes.
        """
        u, b, h, a = batches.actions.shape
        rows = b * self.num_prefixes
        if next_actions.ndim != 5 or (next_actions.shape[0], *next_actions.shape[2:]) != (u, rows, h, a):
            raise ValueError(f"next_actions must be [{u}, N, {rows}, {h}, {a}], got {list(next_actions.shape)}")
        if distillation.noise.shape != distillation.actions.shape:
            raise ValueError(
                f"distillation: noise {distillation.noise.shape} and actions {distillation.actions.shape} differ"
            )
        state, metrics = self._td(state, (batches, next_actions))
        state, more = self._distill(state, distillation)
        state, of_actor = self._actor(state, jax.tree.map(lambda x: x[-1], batches))
        return state, metrics | more | of_actor

    def propose(self, state: TrainState, obs: Array, noise: Array) -> Array:
        """obs [B, O], standard normal [N, B, H, A] -> noise of the actor like it, for the frozen policy to make chunks
        of."""
        return self._propose(state.params["actor"], obs, noise)

    def act(self, state: TrainState, obs: Array, noise: Array, *, explore: bool) -> Array:
        """Noise [N, H, A] in [-b, b], as `DSRL.act`."""
        return self._propose(state.params["actor"], obs, noise[None] if explore else jnp.zeros_like(noise)[None])[0]

    # ---------------------------------------------------------------------------------------------------- pure parts
    def _propose_pure(self, actor: Params, obs: Array, noise: Array) -> Array:
        mean, std = self.nets.actor(actor, obs)
        return self.config.noise_bound * jnp.tanh(mean + std * noise)

    def _critic_step(self, state: TrainState, inputs: tuple[ReplayBatch, Array]) -> tuple[TrainState, Metrics]:
        """(Q_A(o, a) - r - gamma^k Q_A'(o', ODE(o', w')))^2."""
        batch, next_actions = inputs
        state, keys = split_key(state, 1)
        head, obs = self.config.sac.critic.head, successors(batch, self.num_prefixes)
        target, reduction = state.params["target_critic"], self.config.sac.target_reduction
        values = reduced_values(self.nets.critic, head, reduction, target, obs, next_actions, keys[0])
        following = values[..., -1].mean(axis=0)
        gradient, metrics = jax.grad(
            lambda critic: bootstrap_loss(self.nets.critic, head, critic, batch, following, self.num_prefixes),
            has_aux=True,
        )(state.params["critic"])
        return apply_critic_gradient(self._optimizers, self.config.sac.tau, state, {"critic": gradient}), metrics

    def _distill_step(self, state: TrainState, rows: NoiseDistillation) -> tuple[TrainState, Metrics]:
        """E over w ~ N(0, I) of (Q_W(o, w) - Q_A(o, ODE(o, w)))^2."""
        state, keys = split_key(state, 1)
        head = self.config.sac.critic.head
        values = head.value(self.nets.critic(state.params["critic"], rows.obs, rows.actions))
        targets = self.config.distill_reduction(values, keys[0])

        def loss(noise_critic: Params) -> Array:
            return head.loss(
                self.nets.critic(noise_critic, rows.obs, rows.noise / self.config.noise_bound), targets
            ).mean()

        value, gradient = jax.value_and_grad(loss)(state.params["noise_critic"])
        return self._optimizers.apply(state, {"noise_critic": gradient}), {"distillation": value}

    def _actor_step(self, state: TrainState, batch: ReplayBatch) -> tuple[TrainState, Metrics]:
        """SAC's actor step with Q_W for its critic."""
        by_noise = state._replace(params={**state.params, "critic": state.params["noise_critic"]})
        after, metrics = sac_actor_step(self.nets, self.config.sac, by_noise, batch)
        return after._replace(params={**after.params, "critic": state.params["critic"]}), metrics


__all__ = ["DSRL", "DSRLNA", "DSRLConfig", "NoiseDistillation"]
