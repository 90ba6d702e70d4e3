"""A critic for a policy that lives elsewhere: policy-agnostic RL (PA-RL, arXiv 2412.06685).

The agent has no actor. Chunks of the policy, a torch VLA for instance, come as arrays: those at the next observation
make the TD target, those at the observation feed the conservative term (Cal-QL), and `improve` turns candidates into
better chunks that the policy learns by its own supervised loss. CO-RFT and WSRL with a VLA run on this agent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.calql import ConservativeConfig, conservative_gap
from vla_rl.offpolicy.critics import (
    CriticConfig,
    EnsembleReduction,
    MLPCriticConfig,
    bootstrap_loss,
    candidate_values,
    successors,
    weighted_mean,
)
from vla_rl.offpolicy.improvement import ImprovementConfig, QFunction, improve, rerank
from vla_rl.offpolicy.networks import AgentSpec, Network, Params
from vla_rl.offpolicy.sac import apply_critic_gradient
from vla_rl.offpolicy.train_state import Optimizers, TrainState, split_key
from vla_rl.offpolicy.update import Metrics, make_update
from vla_rl.offpolicy.value_heads import HLGaussHead

# What update scans over: minibatch, chunks at the successors [N, B * P, H, A], chunks at obs [M, B, H, A] or None.
CriticInputs = tuple[ReplayBatch, Array, Array | None]


@dataclass(frozen=True)
class CriticAgentConfig:
    """`backup`: what becomes of the N chunks given for a successor: "mean" of their target values (N = 1: a' ~ pi),
    "max" of them, "pick" (the online critic picks, the target critic values), or "improve" (PA-RL: re-ranked and
    ascended by the online critic, valued by the target critic).
    `target_reduction`: of the target's members. `improvement_reduction`: of the online members, wherever chunks are
    compared; over prefixes it is the mean (arXiv 2508.02219, equation 9).
    `conservative`: None is plain TD, what the online phase of WSRL and ConRFT has. Both share one train state.
    """

    critic: CriticConfig = field(default_factory=MLPCriticConfig)
    learning_rate: float = 3e-4
    grad_clip: float | None = None
    tau: float = 0.005
    backup: Literal["mean", "max", "pick", "improve"] = "mean"
    target_reduction: EnsembleReduction = field(default_factory=lambda: EnsembleReduction("min", 2))
    improvement: ImprovementConfig = field(default_factory=ImprovementConfig)
    improvement_reduction: EnsembleReduction = field(default_factory=lambda: EnsembleReduction("mean", None))
    conservative: ConservativeConfig | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.tau <= 1.0:
            raise ValueError(f"CriticAgentConfig.tau is {self.tau}, expected 0 < tau <= 1")
        if self.conservative is None:
            return
        if self.conservative.form == "importance":
            raise ValueError(
                "the policy's chunks come without densities: conservative.form must be 'logsumexp' or 'expectation'"
            )
        if self.conservative.lagrange_gap is not None:
            raise ValueError("a CriticAgent keeps alpha fixed: conservative.lagrange_gap must be None")


def pa_rl_config() -> CriticAgentConfig:
    """PA-RL's own: 10 critics with HL-Gauss heads for returns in [-100, 0], a weak Cal-QL term online and offline.

    The range suits rewards of -1 a step with gamma 0.99; choose another head for other rewards. PA-RL starts its
    optimiser anew at the switch: `wsrl.CarryOver(moments=False)`.
    """
    return CriticAgentConfig(
        critic=MLPCriticConfig(num_members=10, head=HLGaussHead(-100.0, 0.0, 128)),
        backup="improve",
        conservative=ConservativeConfig(alpha=0.005, num_actions=10, form="logsumexp"),
    )


class CriticAgent:
    """Critic, target critic and their optimiser; every method but `init` is jitted."""

    def __init__(self, spec: AgentSpec, config: CriticAgentConfig) -> None:
        self.spec, self.config = spec, config
        self.num_prefixes = config.critic.num_prefixes(spec)
        self.network = self._network(0)
        self._optimizers = Optimizers({"critic": config.learning_rate}, config.grad_clip)
        self._scan = make_update(self._critic_step, None)
        self._improve = jax.jit(self._improve_pure)
        self._values = jax.jit(lambda params, obs, chunks, key: self._q(params, key)(obs, chunks))
        self._gradient = jax.jit(self._gradient_pure)

    def init(self, seed: int) -> TrainState:
        """A new train state, the same with and without the conservative term; the target starts as a copy."""
        params = {"critic": self._network(seed).initial}
        params["target_critic"] = jax.tree.map(jnp.copy, params["critic"])
        return TrainState(params, self._optimizers.init(params), jax.random.key(seed), jnp.zeros((), jnp.int32))

    def update(
        self, state: TrainState, batches: ReplayBatch, next_actions: Array, policy_actions: Array | None = None
    ) -> tuple[TrainState, Metrics]:
        """U critic steps in one scan; the memory of `state` is reused.

        `batches`: every field [U, B, ...]. `next_actions` [U, N, B * P, H, A]: chunks of the policy at
        `successors(batch, P)`. `policy_actions` [U, M, B, H, A]: its chunks at `batch.obs` (PA-RL and Cal-QL add some
        that it has at `next_obs`); for the conservative term, and only with it. Raises ValueError on other shapes.
        """
        self._check(batches, next_actions, policy_actions)
        return self._scan(state, (batches, next_actions, policy_actions))

    def improve(self, state: TrainState, obs: Array, candidates: Array, key: Array) -> tuple[Array, Array]:
        """obs [B, O], candidates [N, B, H, A] -> improved chunks [B, H, A] in [-1, 1], for distillation or to act, and
        their values [B]. Raises ValueError for fewer than `improvement.num_kept` candidates."""
        return self._improve(state.params["critic"], obs, candidates, key)

    def values(self, state: TrainState, obs: Array, candidates: Array, key: Array) -> Array:
        """Reduced Q of the online critic, [N, B]; `key` draws members where the reduction is over a subset."""
        return self._values(state.params["critic"], obs, candidates, key)

    def action_gradient(self, state: TrainState, obs: Array, actions: Array, key: Array) -> tuple[Array, Array]:
        """Q [B] of chunks [B, H, A] and dQ/da [B, H, A]: what a torch policy that follows Q itself needs."""
        return self._gradient(state.params["critic"], obs, actions, key)

    # ---------------------------------------------------------------------------------------------------- pure parts
    def _network(self, seed: int) -> Network:
        return Network(self.config.critic.build(self.spec, nnx.Rngs(seed)))

    def _q(self, params: Params, key: Array) -> QFunction:
        """Q as the improvement operators want it; the same members in each of its calls."""

        def q(obs: Array, candidates: Array) -> Array:
            values = candidate_values(self.network, self.config.critic.head, params, obs, candidates)
            return self.config.improvement_reduction(values.mean(axis=-1), key)

        return q

    def _improve_pure(self, params: Params, obs: Array, candidates: Array, key: Array) -> tuple[Array, Array]:
        member_key, select_key = jax.random.split(key)
        return improve(self._q(params, member_key), obs, candidates, self.config.improvement, select_key)

    def _gradient_pure(self, params: Params, obs: Array, actions: Array, key: Array) -> tuple[Array, Array]:
        def total(chunks: Array) -> tuple[Array, Array]:
            values = self._q(params, key)(obs, chunks[None])[0]
            return values.sum(), values

        gradient, values = jax.grad(total, has_aux=True)(actions)
        return values, gradient

    def _next_values(self, params: dict[str, Params], obs: Array, candidates: Array, key: Array) -> Array:
        """V of the successors, [B * P]; a chunk's value is that of its longest prefix."""
        pick_key, member_key = jax.random.split(key)
        candidates = jnp.clip(candidates, -1.0, 1.0)
        if self.config.backup == "pick":
            candidates, _ = rerank(self._q(params["critic"], pick_key), obs, candidates, 1)
        elif self.config.backup == "improve":
            candidates = self._improve_pure(params["critic"], obs, candidates, pick_key)[0][None]
        head = self.config.critic.head
        values = candidate_values(self.network, head, params["target_critic"], obs, candidates)[..., -1]
        reduced = self.config.target_reduction(values, member_key)
        return reduced.max(axis=0) if self.config.backup == "max" else reduced.mean(axis=0)

    def _conservative_loss(
        self, config: ConservativeConfig, critic: Params, batch: ReplayBatch, policy_actions: Array, key: Array
    ) -> tuple[Array, Metrics]:
        """Cal-QL's term on the policy's chunks and, in the log-sum-exp, on uniform ones."""
        random_key, member_key = jax.random.split(key)
        num_random = config.num_actions if config.form == "logsumexp" else 0
        shape = (num_random, *batch.actions.shape)
        random = jax.random.uniform(random_key, shape, minval=-1.0, maxval=1.0)
        head = self.config.critic.head
        chunks = jnp.concatenate([random, jnp.clip(policy_actions, -1.0, 1.0)])
        values = candidate_values(self.network, head, critic, batch.obs, chunks)
        q_data = head.value(self.network(critic, batch.obs, batch.actions))
        if config.members is not None:
            members = config.members.members(member_key, values.shape[0])
            values, q_data = (values, q_data) if members is None else (values[members], q_data[members])
        no_density = jnp.zeros(policy_actions.shape[:2])  # only the importance form reads it
        q_random, q_policy = values[:, :num_random], values[:, num_random:]
        gap, bounded = conservative_gap(
            config, q_data, q_random, q_policy, jnp.asarray(batch.mc_return), no_density, self.spec.chunk_dim
        )
        loss = weighted_mean(gap, batch.weight[:, None])
        return loss, {"conservative_gap": loss, "calibrated_share": bounded, "q_policy": q_policy.mean()}

    def _critic_step(self, state: TrainState, inputs: CriticInputs) -> tuple[TrainState, Metrics]:
        batch, next_actions, policy_actions = inputs
        state, keys = split_key(state, 2)
        following = self._next_values(state.params, successors(batch, self.num_prefixes), next_actions, keys[0])
        conservative = self.config.conservative

        def loss(critic: Params) -> tuple[Array, Metrics]:
            head = self.config.critic.head
            td, metrics = bootstrap_loss(self.network, head, critic, batch, following, self.num_prefixes)
            if conservative is None or policy_actions is None:
                return td, metrics
            gap, more = self._conservative_loss(conservative, critic, batch, policy_actions, keys[1])
            return td + conservative.alpha * gap, metrics | more

        gradient, metrics = jax.grad(loss, has_aux=True)(state.params["critic"])
        return apply_critic_gradient(self._optimizers, self.config.tau, state, {"critic": gradient}), metrics

    def _check(self, batches: ReplayBatch, next_actions: Array, policy_actions: Array | None) -> None:
        u, b, h, a = batches.actions.shape
        rows = b * self.num_prefixes
        if next_actions.ndim != 5 or (next_actions.shape[0], *next_actions.shape[2:]) != (u, rows, h, a):
            raise ValueError(f"next_actions must be [{u}, N, {rows}, {h}, {a}], got {list(next_actions.shape)}")
        if (policy_actions is None) != (self.config.conservative is None):
            raise ValueError("policy_actions are for the conservative term: give them with it, and only with it")
        if policy_actions is None:
            return
        if policy_actions.ndim != 5 or (policy_actions.shape[0], *policy_actions.shape[2:]) != (u, b, h, a):
            raise ValueError(f"policy_actions must be [{u}, M, {b}, {h}, {a}], got {list(policy_actions.shape)}")


__all__ = ["CriticAgent", "CriticAgentConfig", "pa_rl_config"]
