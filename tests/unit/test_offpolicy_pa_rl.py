"""The critic-only agent: its targets and its conservative term by hand, one state offline and online, and learning."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from tests.unit.offpolicy_batches import ACTION_DIM, HORIZON, OBS_DIM, random_batch
from tests.unit.offpolicy_chunks import stacked, uniform_chunks
from vla_rl.offpolicy.calql import ConservativeConfig
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.improvement import ImprovementConfig
from vla_rl.offpolicy.networks import AgentSpec
from vla_rl.offpolicy.pa_rl import CriticAgent, CriticAgentConfig, pa_rl_config
from vla_rl.offpolicy.train_state import TrainState
from vla_rl.offpolicy.value_heads import HLGaussHead, ScalarHead
from vla_rl.offpolicy.wsrl import CarryOver, carry_over

SPEC = AgentSpec(OBS_DIM, HORIZON, ACTION_DIM)
KEY = jax.random.key(3)
MIN, MEAN = EnsembleReduction("min", None), EnsembleReduction("mean", None)


def small(**changes: Any) -> CriticAgentConfig:
    critic = MLPCriticConfig(num_members=2, hidden_sizes=(16,))
    config = CriticAgentConfig(
        critic=critic, learning_rate=1e-2, target_reduction=MIN, improvement=ImprovementConfig(4, 2, 2, 1e-2)
    )
    return dataclasses.replace(config, **changes)


agent_of = functools.lru_cache(functools.partial(CriticAgent, SPEC))  # an update is compiled once for all tests


def state_with_another_target(agent: CriticAgent) -> TrainState:
    state = agent.init(0)
    return state._replace(params={**state.params, "target_critic": agent.init(1).params["critic"]})


def member_values(agent: CriticAgent, params: Any, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Q of each member and candidate, [E, N, B], one candidate after another."""
    return np.stack([np.asarray(agent.network(params, obs, chunk)[:, :, -1, 0]) for chunk in actions], axis=1)


def reported_target(agent: CriticAgent, batch: Any, next_actions: np.ndarray) -> float:
    _, metrics = agent.update(state_with_another_target(agent), stacked(batch), next_actions[None])
    return float(metrics["td_target"])


@pytest.mark.parametrize("backup", ["mean", "max", "pick"])
def test_target_is_reward_plus_discount_times_value_of_the_given_chunks(backup: Any) -> None:
    agent, batch, next_actions = agent_of(small(backup=backup)), random_batch(4), uniform_chunks(3, 4)
    state = state_with_another_target(agent)
    target = member_values(agent, state.params["target_critic"], batch.next_obs, next_actions).min(axis=0)
    online = member_values(agent, state.params["critic"], batch.next_obs, next_actions).mean(axis=0)
    picked = np.take_along_axis(target, online.argmax(axis=0)[None], axis=0)[0]
    assert not np.allclose(picked, target.max(axis=0))  # the two critics disagree somewhere
    following = {"mean": target.mean(axis=0), "max": target.max(axis=0), "pick": picked}[backup]
    expected = (batch.reward + batch.discount * following).mean()
    assert reported_target(agent, batch, next_actions) == pytest.approx(float(expected), rel=1e-4)


def test_improve_backup_values_the_online_critics_improved_chunk_with_the_target_critic() -> None:
    agent, batch, next_actions = agent_of(small(backup="improve")), random_batch(4), uniform_chunks(4, 4)
    state = state_with_another_target(agent)
    improved, values = agent.improve(state, batch.next_obs, next_actions, KEY)
    assert (np.asarray(values) > np.asarray(agent.values(state, batch.next_obs, next_actions, KEY)).max(axis=0)).all()
    target = member_values(agent, state.params["target_critic"], batch.next_obs, np.asarray(improved)[None]).min(axis=0)
    expected = (batch.reward + batch.discount * target[0]).mean()
    assert reported_target(agent, batch, next_actions) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("form", ["expectation", "logsumexp"])
def test_conservative_term_is_calibrated_on_the_given_chunks(form: Any) -> None:
    """Exact for "expectation"; the log-sum-exp has random chunks beside, so only a bound of it is known."""
    agent = agent_of(small(conservative=ConservativeConfig(alpha=2.0, num_actions=3, form=form)))
    bound = np.asarray([5.0, -5.0, 5.0, -np.inf], np.float32)
    batch, policy_actions = random_batch(4, mc_return=bound), uniform_chunks(2, 4, seed=8)
    state = agent.init(0)
    values = member_values(agent, state.params["critic"], batch.obs, policy_actions)
    q_data = member_values(agent, state.params["critic"], batch.obs, batch.actions[None])[:, 0]
    bounded = np.maximum(values, bound)
    _, metrics = agent.update(state, stacked(batch), uniform_chunks(1, 1, 4), policy_actions[None])
    assert float(metrics["calibrated_share"]) == pytest.approx((values < bound).mean())
    if form == "expectation":
        assert float(metrics["conservative_gap"]) == pytest.approx((bounded.mean(axis=1) - q_data).mean(), rel=1e-4)
    else:  # three random chunks, two of the policy, the data's: at least log((e^bounded + e^data) / 6)
        least = np.log(np.exp(bounded).sum(axis=1) + np.exp(q_data)) - np.log(6) - q_data
        assert float(metrics["conservative_gap"]) > least.mean()


def test_calibration_stops_the_push_below_the_return() -> None:
    """Where all of the policy's values lie below the return, only the data's chunk still has a gradient."""
    batch, policy_actions = random_batch(4, mc_return=np.full(4, 50.0, np.float32)), uniform_chunks(2, 4)
    after = []
    for calibrate in (True, False):
        agent = agent_of(small(conservative=ConservativeConfig(2.0, 3, "expectation", calibrate)))
        state = agent.init(0)
        for _ in range(30):
            state, _ = agent.update(state, stacked(batch), uniform_chunks(1, 1, 4), policy_actions[None])
        after.append(float(agent.values(state, batch.obs, policy_actions, KEY).mean()))
    assert after[0] > after[1] + 0.5


def test_offline_and_online_share_one_state_and_only_the_term_is_dropped() -> None:
    offline, online = agent_of(small(conservative=ConservativeConfig(2.0, 3, "expectation"))), agent_of(small())
    batch, next_actions, policy_actions = (
        stacked(random_batch(4)),
        uniform_chunks(1, 1, 4),
        uniform_chunks(1, 2, 4, seed=9),
    )
    state, metrics = offline.update(offline.init(0), batch, next_actions, policy_actions)
    assert "conservative_gap" in metrics
    crossed = carry_over(state, online, CarryOver(), seed=7)
    assert all(
        bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (crossed.moments, state.moments)), strict=True)
    )
    state, metrics = online.update(crossed, batch, next_actions)
    assert "conservative_gap" not in metrics
    assert int(state.num_updates) == 2


def test_conservative_chunks_are_given_with_the_term_and_only_with_it() -> None:
    batch = stacked(random_batch(4))
    with pytest.raises(ValueError, match="only with it"):
        agent_of(small()).update(agent_of(small()).init(0), batch, uniform_chunks(1, 1, 4), uniform_chunks(1, 1, 4))
    agent = agent_of(small(conservative=ConservativeConfig(2.0, 3, "expectation")))
    with pytest.raises(ValueError, match="only with it"):
        agent.update(agent.init(0), batch, uniform_chunks(1, 1, 4))
    with pytest.raises(ValueError, match=r"next_actions must be \[1, N, 4, 2, 2\]"):
        agent.update(agent.init(0), batch, uniform_chunks(1, 1, 3), uniform_chunks(1, 1, 4))
    with pytest.raises(ValueError, match="without densities"):
        small(conservative=ConservativeConfig(form="importance"))


class PrefixSums(nnx.Module):
    """Q of a prefix is w times the sum of its actions: a prefix critic whose values are known."""

    def __init__(self) -> None:
        self.w = nnx.Param(jnp.asarray(2.0))

    def __call__(self, obs: Array, actions: Array) -> Array:
        return self.w[...] * actions.sum(axis=-1).cumsum(axis=-1)[None, :, :, None] + 0.0 * obs.sum()


@dataclasses.dataclass(frozen=True)
class PrefixSumsConfig:
    head: ScalarHead = dataclasses.field(default_factory=ScalarHead)

    def num_prefixes(self, spec: AgentSpec) -> int:
        return spec.action_horizon

    def build(self, spec: AgentSpec, rngs: nnx.Rngs) -> nnx.Module:
        return PrefixSums()


def test_a_prefix_critic_bootstraps_every_prefix_from_its_own_chunk() -> None:
    agent, rng = agent_of(small(critic=PrefixSumsConfig())), np.random.default_rng(1)
    batch = random_batch(
        3,
        prefix_reward=rng.normal(size=(3, HORIZON)).astype(np.float32),
        prefix_discount=np.full((3, HORIZON), 0.9, np.float32),
        prefix_next_obs=rng.normal(size=(3, HORIZON, OBS_DIM)).astype(np.float32),
        prefix_mask=np.ones((3, HORIZON), bool),
    )
    next_actions = uniform_chunks(2, 3 * HORIZON)
    _, metrics = agent.update(agent.init(0), stacked(batch), next_actions[None])
    v = 2.0 * next_actions.sum(axis=(2, 3)).mean(axis=0).reshape(3, HORIZON)  # the longest prefix, mean over two chunks
    targets = batch.prefix_reward + batch.prefix_discount * v
    assert float(metrics["td_target"]) == pytest.approx(float(targets.mean()), rel=1e-4)
    q_data = 2.0 * batch.actions.sum(axis=-1).cumsum(axis=-1)
    assert float(metrics["td_loss"]) == pytest.approx(float(np.square(q_data - targets).mean()), rel=1e-4)


def test_action_gradient_is_that_of_finite_differences() -> None:
    agent, batch = agent_of(small(critic=MLPCriticConfig(2, (16,), activation="gelu"))), random_batch(3)
    state, actions = agent.init(0), uniform_chunks(3)
    values, gradient = agent.action_gradient(state, batch.obs, actions, KEY)
    moved = np.stack([actions, actions])
    moved[0, :, 1, 0] += 1e-2
    moved[1, :, 1, 0] -= 1e-2
    up, down = np.asarray(agent.values(state, batch.obs, moved, KEY))
    np.testing.assert_allclose((up - down) / 2e-2, gradient[:, 1, 0], atol=1e-3)
    np.testing.assert_allclose(values, agent.values(state, batch.obs, actions[None], KEY)[0], rtol=1e-6)


def test_several_updates_in_one_scan_equal_one_after_another() -> None:
    agent, batches = agent_of(small()), [random_batch(4, seed=i) for i in range(3)]
    next_actions = uniform_chunks(3, 1, 4)
    at_once, _ = agent.update(agent.init(0), stacked(*batches), next_actions)
    state = agent.init(0)
    for batch, actions in zip(batches, next_actions, strict=True):
        state, _ = agent.update(state, stacked(batch), actions[None])
    for a, b in zip(*map(jax.tree.leaves, (at_once.params, state.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_learned_critic_improves_candidates_towards_the_best_action() -> None:
    """One step, reward -|a - a*(s)|^2 with a* = tanh(s): improved chunks are closer to a* than the best candidate."""
    config = small(
        critic=MLPCriticConfig(2, (64, 64), activation="gelu"),
        learning_rate=3e-3,
        improvement=ImprovementConfig(8, 4, 20, 0.05),
    )
    agent = agent_of(config)
    state, rng = agent.init(0), np.random.default_rng(0)

    def batch_of(b: int) -> Any:
        batch, actions = (
            random_batch(b, seed=int(rng.integers(1 << 30))),
            uniform_chunks(b, seed=int(rng.integers(1 << 30))),
        )
        best = np.tanh(batch.obs[:, None, :ACTION_DIM])
        reward = -np.square(actions - best).sum(axis=(1, 2))
        return batch._replace(actions=actions, reward=reward, discount=np.zeros(b, np.float32)), best

    for _ in range(30):
        batches = stacked(*(batch_of(128)[0] for _ in range(10)))
        state, _ = agent.update(state, batches, np.zeros((10, 1, 128, HORIZON, ACTION_DIM), np.float32))
    batch, best = batch_of(200)
    candidates = uniform_chunks(8, 200, seed=99)

    def error(actions: Any) -> Any:
        return np.square(np.asarray(actions) - best).sum(axis=(-2, -1))

    improved, _ = agent.improve(state, batch.obs, candidates, KEY)
    assert error(improved).mean() < 0.5 * error(candidates).min(axis=0).mean()  # better than the oracle's pick


def test_pa_rl_defaults() -> None:
    config = pa_rl_config()
    assert config.critic.head == HLGaussHead(-100.0, 0.0, 128)
    assert (config.critic.num_members, config.target_reduction.subset_size) == (10, 2)
    assert config.improvement == ImprovementConfig(32, 10, 10, 3e-4)
    assert config.conservative == ConservativeConfig(alpha=0.005, num_actions=10, form="logsumexp")
    agent = agent_of(dataclasses.replace(config, critic=dataclasses.replace(config.critic, hidden_sizes=(8,))))
    _, metrics = agent.update(
        agent.init(0), stacked(random_batch(4)), uniform_chunks(1, 32, 4), uniform_chunks(1, 20, 4)
    )
    assert all(bool(jnp.isfinite(value)) for value in metrics.values())
