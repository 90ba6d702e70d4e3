"""Q-chunking (QC and QC-FQL, arXiv 2507.07969), flow Q-learning (FQL, arXiv 2502.02538), and their biased control.

A flow policy is fitted to the data by flow matching alone, and a critic of whole chunks improves on it: QC takes the
best of N of its samples; QC-FQL distils it into a one-step policy that also climbs Q. With one-step chunks the two are
the paper's BFN (N = 4) and FQL (alpha = 10).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.bc_flow import (
    FlowNetConfig,
    OneStepMLP,
    VelocityMLP,
    candidate_noise,
    flow_matching_loss,
    integrate_flow,
)
from vla_rl.offpolicy.critics import (
    CriticConfig,
    EnsembleReduction,
    MLPCriticConfig,
    bootstrap_loss,
    candidate_values,
    successors,
    weighted_mean,
)
from vla_rl.offpolicy.improvement import rerank
from vla_rl.offpolicy.networks import AgentSpec, Network, Params
from vla_rl.offpolicy.sac import apply_critic_gradient
from vla_rl.offpolicy.train_state import Optimizers, TrainState, split_key
from vla_rl.offpolicy.update import Metrics, make_update


@dataclass(frozen=True)
class QCConfig:
    """Defaults are the paper's.

    `policy`: "best_of_n" (QC) draws `num_samples` and takes the one of the highest online Q, to act and in the target,
    where the target critic values it; "distilled" (QC-FQL) acts with the one-step policy, and `alpha` weighs its
    distance to the flow against Q; `normalize_q` divides that Q by the batch's mean |Q|.
    `biased_n_step`: THE CONTROL. Critic and policy see the chunk's first action only, while reward and discount stay
    those of the whole chunk: FQL-n and BFN-n, the n-step target without the chunk that earned it. It is biased wherever
    the data's later actions are not the policy's.
    `reduction`: over members, wherever Q is one number.
    """

    policy: Literal["best_of_n", "distilled"] = "best_of_n"
    num_samples: int = 32
    alpha: float = 100.0
    normalize_q: bool = False
    biased_n_step: bool = False
    flow: FlowNetConfig = field(default_factory=FlowNetConfig)
    critic: CriticConfig = field(
        default_factory=lambda: MLPCriticConfig(2, (512, 512, 512, 512), layer_norm=True, activation="gelu")
    )
    learning_rate: float = 3e-4
    tau: float = 0.005
    reduction: EnsembleReduction = field(default_factory=lambda: EnsembleReduction("mean", None))

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.alpha < 0.0 or not 0.0 < self.tau <= 1.0:
            raise ValueError(f"QCConfig needs num_samples >= 1, alpha >= 0 and 0 < tau <= 1, got {self}")


class QC:
    """An `OffPolicyAgent`. `spec.action_horizon` is that of the batches; `action_horizon` is what `act` returns."""

    def __init__(self, spec: AgentSpec, config: QCConfig) -> None:
        self.config = config
        self.spec = AgentSpec(spec.obs_dim, 1, spec.action_dim) if config.biased_n_step else spec
        self.action_horizon = self.spec.action_horizon
        self.num_prefixes = config.critic.num_prefixes(self.spec)
        if config.biased_n_step and self.num_prefixes > 1:
            raise ValueError("biased_n_step values the first action alone: use a critic without prefixes")
        self.nets = self._build(0)
        trained = ("critic", "flow", "one_step") if config.policy == "distilled" else ("critic", "flow")
        self._optimizers = Optimizers(dict.fromkeys(trained, config.learning_rate))
        self._trained = trained
        self.deployed_parts = ("one_step",) if config.policy == "distilled" else ("flow", "critic")
        self.update = make_update(self._step, None)
        self._act = jax.jit(self._act_pure)

    def init(self, seed: int) -> TrainState:
        """A new train state; the target starts as a copy of the critic."""
        nets = self._build(seed)
        params = {name: nets[name].initial for name in self._trained}
        params["target_critic"] = jax.tree.map(jnp.copy, params["critic"])
        return TrainState(params, self._optimizers.init(params), jax.random.key(seed), jnp.zeros((), jnp.int32))

    def act(self, state: TrainState, obs: Array, noise: Array, *, explore: bool) -> Array:
        """Chunks [N, H, A]; the deployed policy is the exploring one, a sample of the flow that Q has improved.

        `noise` [N, H, A]: see `candidate_noise`. Members of a `reduction` over a subset are always the same here."""
        del explore
        return self._act(state.params, obs, noise)

    # ---------------------------------------------------------------------------------------------------- pure parts
    def _build(self, seed: int) -> dict[str, Network]:
        rngs = nnx.Rngs(seed)
        return {
            "critic": Network(self.config.critic.build(self.spec, rngs)),
            "flow": Network(VelocityMLP(self.spec, self.config.flow, rngs)),
            "one_step": Network(OneStepMLP(self.spec, self.config.flow, rngs)),
        }

    def _values(self, params: Params, obs: Array, chunks: Array, key: Array) -> Array:
        """[N, B, H, A] -> [N, B], the value of a chunk's longest prefix."""
        values = candidate_values(self.nets["critic"], self.config.critic.head, params, obs, chunks)[..., -1]
        return self.config.reduction(values, key)

    def _noise(self, key: Array, num: int, rows: int) -> Array:
        return jax.random.normal(key, (num, rows, self.spec.action_horizon, self.spec.action_dim))

    def _act_pure(self, params: dict[str, Params], obs: Array, noise: Array) -> Array:
        return self._chunks(params, obs, candidate_noise(noise, self._num_candidates), jax.random.key(0))

    @property
    def _num_candidates(self) -> int:
        return 1 if self.config.policy == "distilled" else self.config.num_samples

    def _chunks(self, params: dict[str, Params], obs: Array, noise: Array, member_key: Array) -> Array:
        """The policy's chunks [B, H, A] of candidates' noise [N, B, H, A], by the online networks."""
        if self.config.policy == "distilled":
            return jnp.clip(self.nets["one_step"](params["one_step"], obs, noise[0]), -1.0, 1.0)
        samples = integrate_flow(self.nets["flow"], params["flow"], obs, noise, self.config.flow.num_steps)

        def q(rows: Array, chunks: Array) -> Array:
            return self._values(params["critic"], rows, chunks, member_key)

        return rerank(q, obs, samples, 1)[0][0]

    def _distillation(
        self, one_step: Params, params: dict[str, Params], batch: ReplayBatch, keys: Array
    ) -> tuple[Array, Metrics]:
        """alpha * |mu(s, z) - flow(s, z)|^2 - Q(s, mu(s, z)), the same z in both (arXiv 2502.02538)."""
        noise, obs = self._noise(keys[0], 1, batch.obs.shape[0]), jnp.asarray(batch.obs)
        flow = integrate_flow(self.nets["flow"], params["flow"], obs, noise, self.config.flow.num_steps)
        chunks = self.nets["one_step"](one_step, obs, noise[0])
        distance = weighted_mean(jnp.square(chunks - flow[0]).mean(axis=(1, 2)), batch.weight)
        values = self._values(params["critic"], obs, jnp.clip(chunks, -1.0, 1.0)[None], keys[1])[0]
        q = weighted_mean(values, batch.weight)
        scale = 1.0 / jax.lax.stop_gradient(jnp.abs(values).mean()) if self.config.normalize_q else 1.0
        return self.config.alpha * distance - scale * q, {"distillation": distance, "q_policy": q}

    def _loss(
        self, trained: dict[str, Params], params: dict[str, Params], batch: ReplayBatch, keys: Array
    ) -> tuple[Array, Metrics]:
        """Each part's own loss; what one part reads of another comes from `params`, so no gradient crosses."""
        following_obs = successors(batch, self.num_prefixes)
        noise = self._noise(keys[0], self._num_candidates, following_obs.shape[0])
        chunks = self._chunks(params, following_obs, noise, keys[1])
        following = self._values(params["target_critic"], following_obs, chunks[None], keys[2])[0]
        head = self.config.critic.head
        loss, metrics = bootstrap_loss(
            self.nets["critic"], head, trained["critic"], batch, following, self.num_prefixes
        )
        noise = self._noise(keys[3], 1, batch.obs.shape[0])[0]
        flow_time = jax.random.uniform(keys[4], (batch.obs.shape[0],))
        metrics["flow_loss"] = flow_matching_loss(self.nets["flow"], trained["flow"], batch, noise, flow_time)
        loss = loss + metrics["flow_loss"]
        if self.config.policy == "distilled":
            distillation, more = self._distillation(trained["one_step"], params, batch, keys[5:])
            loss, metrics = loss + distillation, metrics | more
        return loss, metrics

    def _step(self, state: TrainState, batch: ReplayBatch) -> tuple[TrainState, Metrics]:
        """All parts from the same parameters, then the target: the paper's single update, at any UTD."""
        state, keys = split_key(state, 7)
        if self.config.biased_n_step:
            batch = batch._replace(actions=batch.actions[:, :1], mask=batch.mask[:, :1])
        trained = {name: state.params[name] for name in self._trained}
        gradients, metrics = jax.grad(self._loss, has_aux=True)(trained, state.params, batch, keys)
        return apply_critic_gradient(self._optimizers, self.config.tau, state, gradients), metrics


__all__ = ["QC", "QCConfig"]
