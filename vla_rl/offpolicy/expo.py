"""EXPO: a base policy that only imitates, an edit policy that climbs Q, and the better of both at every decision.

The on-the-fly policy is the argmax of Q over N base chunks and their N edits, to act and in the TD target. The base
policy is never asked for a gradient: its chunks are arrays, of a torch policy or of `bc_flow.integrate_flow`.
Details that the sources do not give are marked "ours".
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.critics import (
    CriticConfig,
    EnsembleReduction,
    MLPCriticConfig,
    bootstrap_loss,
    candidate_values,
    reduced_values,
    successors,
)
from vla_rl.offpolicy.edits import EditConfig, edit_step, sample_edits
from vla_rl.offpolicy.improvement import QFunction, rerank
from vla_rl.offpolicy.networks import AgentSpec, Network, Params
from vla_rl.offpolicy.sac import apply_critic_gradient
from vla_rl.offpolicy.train_state import Optimizers, TrainState, split_key
from vla_rl.offpolicy.update import ActorBatch, Metrics, make_update

# What update scans over: minibatch, a base chunk at obs [B, H, A], base chunks at the successors [N, B * P, H, A].
ExpoInputs = tuple[ReplayBatch, Array, Array]


@dataclass(frozen=True)
class ExpoConfig:
    """Defaults are EXPO's: 8 base chunks, edits of at most 0.05, ten critics, RLPD's learning rates.

    `num_base`: N, chunks that the base policy is asked for. `target_reduction`: of the target's members.
    `pick_reduction`: of the online members, to pick among candidates and to train edits (ours: the mean, as RLPD's
    actor has it). `actor_batch`: what the edit step sees; RLPD's last minibatch. `num_stored`: base chunks that are
    drawn once for each stored observation, of which every update takes N at random (ours, for base policies that are
    slow to sample: an update asks them for nothing); 0 draws them anew in every update, as EXPO does.
    """

    num_base: int = 8
    edit: EditConfig = field(default_factory=EditConfig)
    critic: CriticConfig = field(default_factory=lambda: MLPCriticConfig(10, (256, 256, 256)))
    critic_learning_rate: float = 3e-4
    tau: float = 0.005
    target_reduction: EnsembleReduction = field(default_factory=lambda: EnsembleReduction("min", 2))
    pick_reduction: EnsembleReduction = field(default_factory=lambda: EnsembleReduction("mean", None))
    actor_batch: ActorBatch = "last"
    num_stored: int = 0

    def __post_init__(self) -> None:
        if self.num_stored and self.num_stored < self.num_base:
            raise ValueError(
                f"ExpoConfig.num_stored is {self.num_stored}: give 0, or at least num_base {self.num_base}"
            )
        if self.num_base < 1 or not 0.0 < self.tau <= 1.0:
            raise ValueError(f"ExpoConfig needs num_base >= 1 and 0 < tau <= 1, got {self.num_base}, {self.tau}")


class Expo:
    """Edit actor, temperature, critic and target critic beside a base policy that lives elsewhere."""

    deployed_parts = ("actor", "critic")

    def __init__(self, spec: AgentSpec, config: ExpoConfig) -> None:
        self.spec, self.config = spec, config
        self.num_prefixes = config.critic.num_prefixes(spec)
        self.actor, self.critic = self._build(0)
        self._optimizers = Optimizers({"critic": config.critic_learning_rate, **config.edit.learning_rates})
        self._update = make_update(self._critic_step, self._actor_step, config.actor_batch)
        self._act = jax.jit(self._on_the_fly)
        self._members = jax.random.key(0)

    def init(self, seed: int) -> TrainState:
        actor, critic = self._build(seed)
        params = self.config.edit.initial_params(actor) | {"critic": critic.initial}
        params["target_critic"] = jax.tree.map(jnp.copy, critic.initial)
        return TrainState(params, self._optimizers.init(params), jax.random.key(seed), jnp.zeros((), jnp.int32))

    def update(
        self, state: TrainState, batches: ReplayBatch, base_actions: Array, next_base_actions: Array
    ) -> tuple[TrainState, Metrics]:
        """U critic steps, then one of the edit actor; the memory of `state` is reused.

        `batches`: every field [U, B, ...]. `base_actions` [U, B, H, A]: a base chunk at `batch.obs`.
        `next_base_actions` [U, N, B * P, H, A]: N of them at `successors(batch, P)`. Raises ValueError on other shapes.
        """
        u, b, h, a = batches.actions.shape
        expected = {
            "base_actions": (base_actions, (u, b, h, a)),
            "next_base_actions": (next_base_actions, (u, self.config.num_base, b * self.num_prefixes, h, a)),
        }
        for name, (array, shape) in expected.items():
            if array.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(array.shape)}")
        return self._update(state, (batches, base_actions, next_base_actions))

    def act(self, state: TrainState, obs: Array, base_actions: Array, noise: Array, *, explore: bool) -> Array:
        """obs [B, O], base chunks and standard normal noise [N, B, H, A] -> the on-the-fly policy's chunks [B, H, A].

        Edits are samples with `explore`, else those of the mean. Members of a `pick_reduction` over a subset are
        always the same here."""
        return self._act(state.params, obs, base_actions, noise if explore else jnp.zeros_like(noise), self._members)

    # ---------------------------------------------------------------------------------------------------- pure parts
    def _build(self, seed: int) -> tuple[Network, Network]:
        rngs = nnx.Rngs(seed)
        return self.config.edit.build(self.spec, rngs), Network(self.config.critic.build(self.spec, rngs))

    def _q(self, params: Params, key: Array) -> QFunction:
        def q(obs: Array, chunks: Array) -> Array:
            values = candidate_values(self.critic, self.config.critic.head, params, obs, chunks)
            return self.config.pick_reduction(values.mean(axis=-1), key)

        return q

    def _on_the_fly(self, params: dict[str, Params], obs: Array, base: Array, noise: Array, member_key: Array) -> Array:
        """argmax of the online Q over {N base, N edited}."""
        base = jnp.clip(base, -1.0, 1.0)
        edited, _ = sample_edits(self.actor, self.config.edit, params["actor"], obs, base, noise)
        return rerank(self._q(params["critic"], member_key), obs, jnp.concatenate([base, edited]), 1)[0][0]

    def _critic_step(self, state: TrainState, inputs: ExpoInputs) -> tuple[TrainState, Metrics]:
        batch, _, next_base = inputs
        state, keys = split_key(state, 3)
        obs, head = successors(batch, self.num_prefixes), self.config.critic.head
        chunks = self._on_the_fly(state.params, obs, next_base, jax.random.normal(keys[0], next_base.shape), keys[1])
        target, reduction = state.params["target_critic"], self.config.target_reduction
        following = reduced_values(self.critic, head, reduction, target, obs, chunks[None], keys[2])[0, :, -1]
        gradient, metrics = jax.grad(
            lambda critic: bootstrap_loss(self.critic, head, critic, batch, following, self.num_prefixes), has_aux=True
        )(state.params["critic"])
        return apply_critic_gradient(self._optimizers, self.config.tau, state, {"critic": gradient}), metrics

    def _actor_step(self, state: TrainState, inputs: ExpoInputs) -> tuple[TrainState, Metrics]:
        batch, base, _ = inputs
        state, keys = split_key(state, 1)
        q = self._q(state.params["critic"], keys[0])
        return edit_step(self.actor, self.config.edit, self.spec, self._optimizers, state, q, batch, base)


__all__ = ["Expo", "ExpoConfig"]
