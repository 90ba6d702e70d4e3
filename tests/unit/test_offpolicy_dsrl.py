"""DSRL: noise within its bound, SAC on scaled noise, and noise aliasing with a known noise-to-action map."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unit.offpolicy_batches import ACTION_DIM, HORIZON, OBS_DIM, random_batch
from tests.unit.offpolicy_chunks import stacked, uniform_chunks
from vla_rl.offpolicy.critics import MLPCriticConfig
from vla_rl.offpolicy.dsrl import DSRL, DSRLNA, DSRLConfig, NoiseDistillation
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec
from vla_rl.offpolicy.sac import SAC

SPEC = AgentSpec(OBS_DIM, HORIZON, ACTION_DIM)
NOISE = jax.random.normal(jax.random.key(4), (3, 400, HORIZON, ACTION_DIM))
DEFAULT = DSRLConfig()
SMALL = dataclasses.replace(
    DEFAULT,
    sac=dataclasses.replace(
        DEFAULT.sac,
        actor=ActorNetConfig((16,)),
        critic=MLPCriticConfig(2, (32,), activation="gelu"),
        actor_learning_rate=1e-2,
        critic_learning_rate=1e-2,
        initial_temperature=0.01,
    ),
)
dsrl = functools.lru_cache(functools.partial(DSRL, SPEC, SMALL))
dsrl_na = functools.lru_cache(functools.partial(DSRLNA, SPEC, SMALL))


def decode(noise: np.ndarray) -> np.ndarray:
    """A frozen policy's noise-to-action map: each action is half of its noise, within the bounds."""
    return np.clip(0.5 * np.asarray(noise), -1.0, 1.0)


def test_noise_stays_within_its_bound_and_fills_it() -> None:
    for agent in (dsrl(), dsrl_na()):
        noise = agent.act(agent.init(0), random_batch(400).obs, NOISE[0], explore=True)
        assert noise.shape == (400, HORIZON, ACTION_DIM)
        assert 1.4 < float(jnp.abs(noise).max()) <= 1.5
    proposed = dsrl_na().propose(dsrl_na().init(0), random_batch(400).obs, NOISE)
    assert proposed.shape == (3, 400, HORIZON, ACTION_DIM)
    assert float(jnp.abs(proposed).max()) <= 1.5


def test_dsrl_is_sac_on_noise_over_its_bound() -> None:
    agent, sac, batch = dsrl(), SAC(SPEC, SMALL.sac), random_batch(4)
    noise = 1.5 * uniform_chunks(4)
    steered, _ = agent.update(agent.init(0), stacked(batch._replace(actions=noise)))
    plain, _ = sac.update(sac.init(0), stacked(batch._replace(actions=noise / 1.5)))
    for a, b in zip(*map(jax.tree.leaves, (steered.params, plain.params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dsrl_refuses_noise_beyond_the_bound() -> None:
    with pytest.raises(ValueError, match=r"noise of 1\.600 in the batch, the bound is 1\.5"):
        dsrl().update(dsrl().init(0), stacked(random_batch(4, actions=np.full((4, HORIZON, ACTION_DIM), 1.6))))
    with pytest.raises(ValueError, match="bc_weight must be 0"):
        DSRLConfig(sac=dataclasses.replace(DEFAULT.sac, bc_weight=0.1))


def test_noise_aliasing_by_hand() -> None:
    """Q_A's target is the target critic's value of the decoded noise; Q_W's is Q_A of the decoded noise."""
    agent, batch = dsrl_na(), random_batch(4)
    state = agent.init(0)
    next_actions, noise = uniform_chunks(4, seed=1), np.random.default_rng(2).normal(size=(4, HORIZON, ACTION_DIM))
    q = functools.partial(agent.nets.critic, state.params["critic"])
    next_value = np.asarray(q(batch.next_obs, next_actions))[..., 0, 0].min(axis=0)
    expected = float((batch.reward + batch.discount * next_value).mean())
    rows = NoiseDistillation(batch.obs, noise.astype(np.float32), decode(noise).astype(np.float32))
    by_action = np.asarray(q(batch.obs, rows.actions))[..., 0, 0].min(axis=0)
    by_noise = np.asarray(agent.nets.critic(state.params["noise_critic"], batch.obs, rows.noise / 1.5))[..., 0, 0]
    _, of_distillation = jax.jit(agent._distill_step)(state, rows)
    expected_distillation = float(np.square(by_noise - by_action).mean())
    assert float(of_distillation["distillation"]) == pytest.approx(expected_distillation, rel=1e-4)
    _, metrics = agent.update(state, stacked(batch), next_actions[None, None], jax.tree.map(lambda x: x[None], rows))
    assert float(metrics["td_target"]) == pytest.approx(expected, rel=1e-4)


def test_actor_step_leaves_the_action_critic_alone_and_climbs_the_noise_critic() -> None:
    agent, batch = dsrl_na(), random_batch(4)
    state = agent.init(0)
    other = state._replace(params={**state.params, "critic": agent.init(5).params["critic"]})
    step = jax.jit(agent._actor_step)
    after, metrics = step(state, batch)
    after_other, metrics_other = step(other, batch)
    assert float(metrics["q_policy"]) == float(metrics_other["q_policy"])  # Q_A plays no part
    for name in ("critic", "noise_critic", "target_critic"):
        for a, b in zip(*map(jax.tree.leaves, (after.params[name], state.params[name])), strict=True):
            np.testing.assert_array_equal(a, b)
    assert set(after.params) == set(after_other.params) == set(state.params)


def test_noise_aliasing_learns_to_steer_from_data_of_actions_alone() -> None:
    """Reward: the mean of the executed actions, which came from no noise at all; the best noise is the largest."""
    agent, rng = dsrl_na(), np.random.default_rng(0)
    state = agent.init(0)
    for step in range(60):
        batches = []
        for i in range(4):
            actions = rng.uniform(-1, 1, (32, HORIZON, ACTION_DIM)).astype(np.float32)
            fields = {"actions": actions, "reward": actions.mean(axis=(1, 2)), "discount": np.zeros(32, np.float32)}
            batches.append(random_batch(32, seed=step * 4 + i, **fields))
        minibatches = stacked(*batches)
        noise = rng.normal(size=minibatches.actions.shape).astype(np.float32)
        distillation = NoiseDistillation(minibatches.obs, noise, decode(noise))
        state, _ = agent.update(state, minibatches, np.zeros((4, 1, 32, HORIZON, ACTION_DIM), np.float32), distillation)
    noise = np.asarray(agent.act(state, random_batch(50).obs, NOISE[0, :50], explore=False))
    assert decode(noise).mean() > 0.4  # 0.75 is the most that the bound allows; the base policy has 0
