"""A residual policy on a frozen base, learned off-policy: a = a_base + 0.1 * tanh(u), u given (o, a_base).

The form is ResiP's (arXiv 2407.16677): a small correction at every control step, so that a chunk which the base policy
has planned is executed in a closed loop. ResiP learns it by PPO; here it is SAC from replay, whose critic sees
(o, a_base) and the executed action, so that rows of demonstrations and of a human serve too.
For the closed loop use `action_horizon=1`: then a_base is the planned action of this very step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig, bootstrap_loss, reduced_values
from vla_rl.offpolicy.edits import EditConfig, edit_step, sample_edits, with_base
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec, Network, Params
from vla_rl.offpolicy.sac import apply_critic_gradient
from vla_rl.offpolicy.train_state import Optimizers, TrainState, split_key
from vla_rl.offpolicy.update import ActorBatch, Metrics, make_update

# What update scans over: minibatch, the base policy's chunk at obs and at next_obs, each [B, H, A].
ResidualInputs = tuple[ReplayBatch, Array, Array]


def _residual_edit() -> EditConfig:
    """ResiP's: a tenth of the range, last layer of gain 0.01, standard deviation e^-1 of u; it starts at the base."""
    return EditConfig(
        scale=0.1,
        net=ActorNetConfig((256, 256), layer_norm=False, out_scale=0.01),
        initial_std=math.exp(-1.0),
        initial_temperature=0.01,
    )


@dataclass(frozen=True)
class ResidualConfig:
    """`edit`: the correction. Critics are REDQ's: ten, targets from the least of two, the actor from the mean."""

    edit: EditConfig = field(default_factory=_residual_edit)
    critic: MLPCriticConfig = field(default_factory=MLPCriticConfig)
    critic_learning_rate: float = 3e-4
    tau: float = 0.005
    target_reduction: EnsembleReduction = field(default_factory=lambda: EnsembleReduction("min", 2))
    actor_reduction: EnsembleReduction = field(default_factory=lambda: EnsembleReduction("mean", None))
    actor_batch: ActorBatch = "last"


class Residual:
    """Residual actor, temperature, critic and target critic beside a base policy that lives elsewhere."""

    def __init__(self, spec: AgentSpec, config: ResidualConfig) -> None:
        self.spec, self.config = spec, config
        self.actor, self.critic = self._build(0)
        self._optimizers = Optimizers({"critic": config.critic_learning_rate, **config.edit.learning_rates})
        self._update = make_update(self._critic_step, self._actor_step, config.actor_batch)
        self._act = jax.jit(self._corrected)

    def init(self, seed: int) -> TrainState:
        actor, critic = self._build(seed)
        params = self.config.edit.initial_params(actor) | {"critic": critic.initial}
        params["target_critic"] = jax.tree.map(jnp.copy, critic.initial)
        return TrainState(params, self._optimizers.init(params), jax.random.key(seed), jnp.zeros((), jnp.int32))

    def update(
        self, state: TrainState, batches: ReplayBatch, base_actions: Array, next_base_actions: Array
    ) -> tuple[TrainState, Metrics]:
        """U critic steps, then one of the actor; the memory of `state` is reused.

        `batches`: every field [U, B, ...], `actions` as executed. `base_actions`, `next_base_actions` [U, B, H, A]:
        what the base policy proposed at `obs` and `next_obs`. Raises ValueError on other shapes.
        """
        for name, array in (("base_actions", base_actions), ("next_base_actions", next_base_actions)):
            if array.shape != batches.actions.shape:
                raise ValueError(f"{name} must be {list(batches.actions.shape)}, got {list(array.shape)}")
        return self._update(state, (batches, base_actions, next_base_actions))

    def act(self, state: TrainState, obs: Array, base_actions: Array, noise: Array, *, explore: bool) -> Array:
        """obs [N, O], base chunks and standard normal noise [N, H, A] -> corrected chunks [N, H, A]: a sample with
        `explore`, else the mean's."""
        return self._act(state.params["actor"], obs, base_actions, noise if explore else jnp.zeros_like(noise))

    # ---------------------------------------------------------------------------------------------------- pure parts
    def _build(self, seed: int) -> tuple[Network, Network]:
        rngs = nnx.Rngs(seed)
        seen = AgentSpec(self.spec.obs_dim + self.spec.chunk_dim, self.spec.action_horizon, self.spec.action_dim)
        return self.config.edit.build(self.spec, rngs), Network(self.config.critic.build(seen, rngs))

    def _corrected(self, actor: Params, obs: Array, base: Array, noise: Array) -> Array:
        return sample_edits(self.actor, self.config.edit, actor, obs, base[None], noise[None])[0][0]

    def _critic_step(self, state: TrainState, inputs: ResidualInputs) -> tuple[TrainState, Metrics]:
        batch, base, next_base = inputs
        state, keys = split_key(state, 2)
        head = self.config.critic.head
        next_obs, noise = jnp.asarray(batch.next_obs), jax.random.normal(keys[0], next_base.shape)
        chunks = self._corrected(state.params["actor"], next_obs, next_base, noise)
        seen_next = with_base(next_obs, next_base)
        target, reduction = state.params["target_critic"], self.config.target_reduction
        following = reduced_values(self.critic, head, reduction, target, seen_next, chunks[None], keys[1])[0, :, 0]
        seen = batch._replace(obs=with_base(jnp.asarray(batch.obs), base))
        gradient, metrics = jax.grad(
            lambda critic: bootstrap_loss(self.critic, head, critic, seen, following, 1), has_aux=True
        )(state.params["critic"])
        return apply_critic_gradient(self._optimizers, self.config.tau, state, {"critic": gradient}), metrics

    def _actor_step(self, state: TrainState, inputs: ResidualInputs) -> tuple[TrainState, Metrics]:
        batch, base, _ = inputs
        state, keys = split_key(state, 1)

        def q(obs: Array, chunks: Array) -> Array:
            seen = with_base(obs, base)
            head, reduction, critic = self.config.critic.head, self.config.actor_reduction, state.params["critic"]
            return reduced_values(self.critic, head, reduction, critic, seen, chunks, keys[0])[..., 0]

        return edit_step(self.actor, self.config.edit, self.spec, self._optimizers, state, q, batch, base)


__all__ = ["Residual", "ResidualConfig"]
