"""Conservative and calibrated Q-learning on chunks: CQL (arXiv 2006.04779), Cal-QL (arXiv 2303.05479).

    loss = TD + alpha * (push down on the policy's and on random chunks - push up on the data's)

Cal-QL pushes no value of the policy below the Monte-Carlo return of the data's behaviour from that state, so the
critic keeps the scale of true returns, and nothing has to be unlearned when the agent goes online.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from vla_rl.data.replay import ReplayBatch
from vla_rl.offpolicy.critics import EnsembleReduction, weighted_mean
from vla_rl.offpolicy.networks import AgentSpec, Params, tanh_gaussian
from vla_rl.offpolicy.sac import (
    ActorCritic,
    SACConfig,
    apply_critic_gradient,
    chunk_values,
    init_sac,
    inverse_softplus,
    sac_actor_step,
    sample_chunk,
    td_loss,
    temperature_of,
)
from vla_rl.offpolicy.train_state import Optimizers, TrainState, split_key
from vla_rl.offpolicy.update import Metrics, make_update


@dataclass(frozen=True)
class ConservativeConfig:
    """The term beside TD.

    `form`: "importance" (log-sum-exp of Q minus the log-density of each sample), "logsumexp" (without densities, the
    data's chunk among the samples), "expectation" (mean over the policy's chunks only, CO-RFT's equation 8). The
    importance form is for single steps: a uniform chunk has density 0.5^(H * A), which drowns all else above ~20.
    `calibrate`: Cal-QL; off it is CQL. `bound_random_actions`: apply the bound to random chunks too, as ConRFT does.
    `lagrange_gap`: alpha times a multiplier that is raised while the gap is larger; None keeps alpha fixed. WSRL's
    antmaze has alpha=1, gap 0.8 and a multiplier from 1; the authors' code of the same setting alpha=5 and one from e.
    `members`: draws those that the term counts in, each by itself (never reduced); None: all.
    """

    alpha: float = 5.0
    num_actions: int = 10
    form: Literal["importance", "logsumexp", "expectation"] = "importance"
    calibrate: bool = True
    bound_random_actions: bool = False
    lagrange_gap: float | None = None
    initial_multiplier: float = 1.0
    multiplier_learning_rate: float = 3e-4
    members: EnsembleReduction | None = None

    def __post_init__(self) -> None:
        if self.alpha < 0.0 or self.num_actions < 1 or self.initial_multiplier <= 0.0:
            raise ValueError(f"ConservativeConfig needs alpha >= 0, num_actions >= 1, initial_multiplier > 0: {self}")
        if self.bound_random_actions and (not self.calibrate or self.form == "expectation"):
            raise ValueError(
                "bound_random_actions bounds random chunks by the calibration: it needs calibrate=True and a form that "
                f"has random chunks, got calibrate={self.calibrate}, form={self.form!r}"
            )


@dataclass(frozen=True)
class CalQLConfig:
    """`sac`: everything but the conservative term. Defaults are WSRL's pre-training: ten critics, two drawn for the
    target, which takes the best of ten chunks, and two drawn anew for the conservative term."""

    sac: SACConfig = field(default_factory=lambda: SACConfig(num_target_actions=10))
    conservative: ConservativeConfig = field(
        default_factory=lambda: ConservativeConfig(members=EnsembleReduction("min", 2, True))
    )


def conservative_gap(
    config: ConservativeConfig,
    q_data: Array,
    q_random: Array,
    q_policy: Array,
    mc_return: Array,
    log_prob: Array,
    chunk_dim: int,
) -> tuple[Array, Array]:
    """What the term pushes down minus what it pushes up, [E, B, P], and the share of bounded values.

    `q_data` [E, B, P]; `q_random`, `q_policy` [E, M, B, P]; `mc_return` [B], -inf where no bound is known;
    `log_prob` [M, B] of the policy's samples (arXiv 2303.05479, equation 4.1; arXiv 2006.04779, equation 4).
    """
    bound = mc_return[None, None, :, None]
    bounded = (q_policy < bound).mean()
    if config.calibrate:
        q_policy = jnp.maximum(q_policy, bound)
        if config.bound_random_actions:
            q_random = jnp.maximum(q_random, bound)
    if config.form == "expectation":
        return q_policy.mean(axis=1) - q_data, bounded
    if config.form == "importance":
        samples = jnp.concatenate([q_random - chunk_dim * math.log(0.5), q_policy - log_prob[None, :, :, None]], axis=1)
        return jax.nn.logsumexp(samples, axis=1) - q_data, bounded
    samples = jnp.concatenate([q_random, q_policy, q_data[:, None]], axis=1)
    return jax.nn.logsumexp(samples, axis=1) - math.log(samples.shape[1]) - q_data, bounded


def conservative_loss(
    nets: ActorCritic, config: CalQLConfig, critic: Params, params: dict[str, Params], batch: ReplayBatch, key: Array
) -> tuple[Array, Metrics]:
    """`conservative_loss_of` uniform chunks and chunks drawn from the policy."""
    random_key, noise_key, member_key = jax.random.split(key, 3)
    shape, expectation = batch.actions.shape, config.conservative.form == "expectation"
    num_random = 0 if expectation else config.conservative.num_actions
    random = jax.random.uniform(random_key, (num_random, *shape), minval=-1.0, maxval=1.0)
    noise = jax.random.normal(noise_key, (1 if expectation else 2, config.conservative.num_actions, *shape))
    return conservative_loss_of(nets, config, critic, params, batch, random, noise, member_key)


def conservative_loss_of(
    nets: ActorCritic,
    config: CalQLConfig,
    critic: Params,
    params: dict[str, Params],
    batch: ReplayBatch,
    random: Array,
    noise: Array,
    member_key: Array,
) -> tuple[Array, Metrics]:
    """Mean gap of the chunks `random` [N, B, H, A] and of the policy's that `noise` [1 or 2, M, B, H, A] makes: at s,
    and with 2 also at s'. All are valued at s."""
    chunks, log_probs = [random], []
    for noise_there, obs in zip(noise, (batch.obs, batch.next_obs), strict=False):
        mean, std = nets.actor(params["actor"], obs)
        actions, log_prob = tanh_gaussian(mean, std, noise_there)
        chunks.append(actions)
        log_probs.append(log_prob)
    values = chunk_values(nets, config.sac, critic, jnp.asarray(batch.obs), jnp.concatenate(chunks))
    q_data = config.sac.critic.head.value(nets.critic(critic, batch.obs, batch.actions))
    if config.conservative.members is not None:
        members = config.conservative.members.members(member_key, values.shape[0])
        values, q_data = (values, q_data) if members is None else (values[members], q_data[members])
    q_random, q_policy = values[:, : len(random)], values[:, len(random) :]
    gap, bounded = conservative_gap(
        config.conservative,
        q_data,
        q_random,
        q_policy,
        jnp.asarray(batch.mc_return),
        jnp.concatenate(log_probs),
        nets.spec.chunk_dim,
    )
    weights = batch.weight[:, None]
    if nets.num_prefixes > 1:
        weights = weights * batch.prefix_mask  # what TD does not teach is not pushed either
    loss = weighted_mean(gap, weights)
    return loss, {"conservative_gap": loss, "calibrated_share": bounded, "q_policy_data": q_policy.mean()}


def lagrange_term(config: ConservativeConfig, parameter: Params, gap: Array) -> Array:
    """multiplier * alpha * (gap - lagrange_gap): the critic goes down it and the multiplier up it, so it is zero as a
    number, and only its gradients are of use."""
    assert config.lagrange_gap is not None
    multiplier, excess = temperature_of(parameter), config.alpha * (gap - config.lagrange_gap)
    return jax.lax.stop_gradient(multiplier) * excess - multiplier * jax.lax.stop_gradient(excess)


def calql_optimizers(config: CalQLConfig) -> Optimizers:
    rates = {
        "actor": config.sac.actor_learning_rate,
        "critic": config.sac.critic_learning_rate,
        "temperature": config.sac.temperature_learning_rate,
    }
    if config.conservative.lagrange_gap is not None:
        rates["cql_multiplier"] = config.conservative.multiplier_learning_rate
    return Optimizers(rates)


class CalQL:
    """An `OffPolicyAgent`; CQL with `calibrate=False`."""

    def __init__(self, spec: AgentSpec, config: CalQLConfig) -> None:
        self.spec, self.config = spec, config
        self.nets = ActorCritic.build(spec, config.sac)
        self.num_prefixes = self.nets.num_prefixes
        self._optimizers = calql_optimizers(config)
        self.update = make_update(
            self._critic_step, lambda s, b: sac_actor_step(self.nets, config.sac, s, b), config.sac.actor_batch
        )
        self._act = jax.jit(sample_chunk, static_argnums=0, static_argnames="explore")

    def init(self, seed: int) -> TrainState:
        state = init_sac(self.spec, self.config.sac, seed)
        if self.config.conservative.lagrange_gap is None:
            return state
        params = state.params | {"cql_multiplier": inverse_softplus(self.config.conservative.initial_multiplier)}
        return state._replace(params=params, moments=self._optimizers.init(params))

    def act(self, state: TrainState, obs: Array, noise: Array, *, explore: bool) -> Array:
        """A sample with `explore`, else tanh of the mean."""
        return self._act(self.nets.actor, state.params["actor"], obs, noise, explore=explore)

    def _loss(
        self, trained: dict[str, Params], params: dict[str, Params], batch: ReplayBatch, keys: Array
    ) -> tuple[Array, Metrics]:
        config, critic = self.config.conservative, trained["critic"]
        td, metrics = td_loss(self.nets, self.config.sac, critic, params, batch, keys[0])
        gap, more = conservative_loss(self.nets, self.config, critic, params, batch, keys[1])
        metrics |= more
        if config.lagrange_gap is None:
            return td + config.alpha * gap, metrics
        metrics["cql_multiplier"] = temperature_of(trained["cql_multiplier"])
        return td + lagrange_term(config, trained["cql_multiplier"], gap), metrics

    def _critic_step(self, state: TrainState, batch: ReplayBatch) -> tuple[TrainState, Metrics]:
        state, keys = split_key(state, 2)
        trained = {name: state.params[name] for name in ("critic", "cql_multiplier") if name in state.params}
        gradients, metrics = jax.grad(self._loss, has_aux=True)(trained, state.params, batch, keys)
        return apply_critic_gradient(self._optimizers, self.config.sac.tau, state, gradients), metrics


__all__ = ["CalQL", "CalQLConfig", "ConservativeConfig", "conservative_gap"]
