"""EXPO's edits and the residual policy: where they start, their entropy's scale, who picks, and that they learn."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.unit.offpolicy_batches import ACTION_DIM, HORIZON, OBS_DIM, random_batch
from tests.unit.offpolicy_chunks import stacked, uniform_chunks
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.edits import EditConfig, sample_edits, with_base
from vla_rl.offpolicy.expo import Expo, ExpoConfig
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec
from vla_rl.offpolicy.residual import Residual, ResidualConfig

SPEC = AgentSpec(OBS_DIM, HORIZON, ACTION_DIM)
NOISE = jax.random.normal(jax.random.key(2), (3, 200, HORIZON, ACTION_DIM))
CRITIC = MLPCriticConfig(2, (16,), activation="gelu")
MIN = EnsembleReduction("min", None)
NET = ActorNetConfig((16,), layer_norm=False, out_scale=0.01)
expo_of = functools.lru_cache(functools.partial(Expo, SPEC))
residual_of = functools.lru_cache(functools.partial(Residual, SPEC))


def small_expo(**edit: Any) -> ExpoConfig:
    return ExpoConfig(
        num_base=3, edit=EditConfig(net=NET, learning_rate=1e-2, **edit), critic=CRITIC, critic_learning_rate=1e-2,
        target_reduction=MIN,
    )  # fmt: skip


def small_residual(**edit: Any) -> ResidualConfig:
    config = ResidualConfig(critic=CRITIC, critic_learning_rate=1e-2, target_reduction=MIN)
    return dataclasses.replace(config, edit=dataclasses.replace(config.edit, net=NET, learning_rate=1e-2, **edit))


# ------------------------------------------------------------------------------------------------------------- edits
def test_target_entropy_is_that_of_the_uniform_edit_less_c_a_dimension() -> None:
    """A uniform density on a box of side 2 * scale has the entropy d * log(2 * scale)."""
    config = EditConfig(scale=0.05, target_entropy_per_dim=1.0)
    box = np.random.default_rng(0).uniform(-0.05, 0.05, (10, HORIZON * ACTION_DIM))
    uniform_entropy = -np.log(np.full(len(box), (1.0 / (2 * 0.05)) ** box.shape[1])).mean()
    assert config.target_entropy(SPEC) == pytest.approx(uniform_entropy - 4.0)
    assert config.target_entropy(SPEC) < -4.0 * 3.3  # SAC's -4 would lie above what any edit can have
    assert EditConfig(scale=0.5, target_entropy_per_dim=1.0).target_entropy(SPEC) == pytest.approx(-4.0)


def test_log_density_of_edits_is_in_action_units() -> None:
    """Halving the scale doubles the density of each of the H * A dimensions."""
    config = EditConfig(scale=0.1, net=NET)
    actor = config.build(SPEC, nnx.Rngs(0))
    obs, base = random_batch(4).obs, 0.5 * uniform_chunks(1, 4)
    half, noise = dataclasses.replace(config, scale=0.05), NOISE[:1, :4]
    wide, log_wide = sample_edits(actor, config, actor.initial, obs, base, noise)
    narrow, log_narrow = sample_edits(actor, half, actor.initial, obs, base, noise)
    np.testing.assert_allclose(wide - base, 2.0 * (narrow - base), atol=1e-6)
    np.testing.assert_allclose(log_narrow - log_wide, np.full((1, 4), 4 * math.log(2.0)), atol=1e-5)
    mean, std = actor(actor.initial, with_base(obs, base[0]))
    u = np.arctanh(np.clip((np.asarray(wide[0]) - base[0]) / 0.1, -0.999999, 0.999999))
    by_hand = -0.5 * ((u - mean) / std) ** 2 - np.log(std * math.sqrt(2 * math.pi))
    by_hand = by_hand - np.log(0.1 * (1 - np.tanh(u) ** 2))
    np.testing.assert_allclose(log_wide[0], by_hand.sum(axis=(1, 2)), atol=2e-3)


def test_edits_are_bounded_by_the_scale_and_by_the_action_space() -> None:
    config = EditConfig(scale=0.05, net=NET, initial_std=10.0)
    actor = config.build(SPEC, nnx.Rngs(0))
    base = uniform_chunks(3, 50)
    base[0] = 1.0
    chunks, _ = sample_edits(actor, config, actor.initial, random_batch(50).obs, base, NOISE[:, :50])
    assert float(jnp.abs(chunks - base).max()) <= 0.05 + 1e-6
    assert float(jnp.abs(chunks).max()) <= 1.0
    assert float(jnp.abs(chunks[1:] - base[1:]).max()) > 0.049  # the bound is reached


# -------------------------------------------------------------------------------------------------------------- EXPO
def on_the_fly(agent: Expo, params: dict[str, Any], obs: Any, base: Any, noise: Any) -> np.ndarray:
    """The best by the online mean of {base, edited}, one candidate after another."""
    edits, _ = sample_edits(agent.actor, agent.config.edit, params["actor"], obs, base, noise)
    candidates = np.concatenate([base, np.asarray(edits)])
    q = np.stack([np.asarray(agent.critic(params["critic"], obs, c)).mean(axis=(0, 2, 3)) for c in candidates])
    return candidates[q.argmax(axis=0), np.arange(len(obs))]


def test_expo_acts_with_the_best_of_base_and_edited_chunks() -> None:
    agent, base, obs = expo_of(small_expo()), uniform_chunks(3, 20), random_batch(20).obs
    state = agent.init(0)
    chosen = np.asarray(agent.act(state, obs, base, NOISE[:, :20], explore=True))
    np.testing.assert_allclose(chosen, on_the_fly(agent, state.params, obs, base, NOISE[:, :20]), atol=1e-6)
    from_base = (np.abs(chosen[None] - base).max(axis=(2, 3)) < 1e-7).any(axis=0)
    assert 0 < from_base.sum() < 20  # both kinds win somewhere
    distance = np.abs(chosen[None] - base).max(axis=(2, 3)).min(axis=0)
    assert distance.max() <= 0.05 + 1e-6


def test_expo_target_is_the_target_critics_value_of_the_on_the_fly_chunk() -> None:
    agent, batch, next_base = expo_of(small_expo()), random_batch(4), uniform_chunks(3, 4)
    state = agent.init(0)
    target = agent.init(1).params["critic"]
    state = state._replace(params={**state.params, "target_critic": target})
    noise = jax.random.normal(jax.random.split(state.key, 4)[1], next_base.shape)
    chunk = on_the_fly(agent, state.params, batch.next_obs, next_base, noise)
    value = np.asarray(agent.critic(target, batch.next_obs, chunk))[:, :, 0, 0].min(axis=0)
    expected = float((batch.reward + batch.discount * value).mean())
    _, metrics = agent.update(state, stacked(batch), uniform_chunks(1, 4), next_base[None])
    assert float(metrics["td_target"]) == pytest.approx(expected, rel=1e-4)


def test_expo_refuses_chunks_of_another_shape() -> None:
    agent = expo_of(small_expo())
    with pytest.raises(ValueError, match=r"next_base_actions must be \[1, 3, 4, 2, 2\], got \[1, 2, 4, 2, 2\]"):
        agent.update(agent.init(0), stacked(random_batch(4)), uniform_chunks(1, 4), uniform_chunks(1, 2, 4))


def rewarded_for_going_up(batch: Any, base: np.ndarray, rng: np.random.Generator, scale: float) -> Any:
    """Executed chunks near `base`, and ten times their excess over it for reward."""
    edit = rng.uniform(-scale, scale, base.shape).astype(np.float32)
    reward = 10.0 * edit.mean(axis=(1, 2))
    return batch._replace(actions=base + edit, reward=reward, discount=np.zeros_like(reward))


def test_expo_learns_to_edit_upwards() -> None:
    agent, rng = expo_of(small_expo(initial_temperature=0.01)), np.random.default_rng(0)
    state, base = agent.init(0), np.full((32, HORIZON, ACTION_DIM), 0.2, np.float32)
    for _ in range(80):
        batches = stacked(*(rewarded_for_going_up(random_batch(32, seed=i), base, rng, 0.05) for i in range(4)))
        repeated = np.broadcast_to(base, (4, *base.shape))
        state, _ = agent.update(state, batches, repeated, np.broadcast_to(base, (4, 3, *base.shape)))
    obs = random_batch(32).obs
    chosen = agent.act(state, obs, np.broadcast_to(base, (3, *base.shape)), NOISE[:, :32], explore=False)
    assert float((chosen - base).mean()) > 0.02  # of at most 0.05


# ---------------------------------------------------------------------------------------------------------- residual
def test_residual_starts_at_the_base_policy() -> None:
    agent = residual_of(small_residual())
    state, obs, base = agent.init(0), random_batch(200).obs, 0.5 * uniform_chunks(200)
    assert float(jnp.abs(agent.act(state, obs, base, NOISE[0], explore=False) - base).max()) < 0.1 * 0.05
    sampled = np.asarray(agent.act(state, obs, base, NOISE[0], explore=True)) - base
    tanh_of_gaussian = np.tanh(np.random.default_rng(0).normal(0, math.exp(-1.0), 100_000)).std()
    assert sampled.std() == pytest.approx(0.1 * tanh_of_gaussian, rel=0.1)
    exactly = residual_of(dataclasses.replace(small_residual(), edit=dataclasses.replace(
        small_residual().edit, net=dataclasses.replace(NET, out_scale=0.0))))  # fmt: skip
    np.testing.assert_array_equal(exactly.act(exactly.init(0), obs, base, NOISE[0], explore=False), base)


def test_residual_target_is_the_corrected_chunk_at_the_next_base() -> None:
    """The critic sees (o, a_base); with the mean's correction the sample's noise is known, so the target is."""
    agent, batch = residual_of(small_residual(initial_std=1e-4)), random_batch(4)
    state, base, next_base = agent.init(0), uniform_chunks(4), uniform_chunks(4, seed=9)
    chunk = agent.act(state, batch.next_obs, next_base, NOISE[0, :4], explore=False)
    seen = with_base(batch.next_obs, next_base)
    value = np.asarray(agent.critic(state.params["target_critic"], seen, chunk))[:, :, 0, 0].min(axis=0)
    expected = float((batch.reward + batch.discount * value).mean())
    _, metrics = agent.update(state, stacked(batch), base[None], next_base[None])
    assert float(metrics["td_target"]) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match="next_base_actions must be"):
        agent.update(agent.init(0), stacked(batch), base[None], next_base)


def test_residual_learns_from_what_was_executed() -> None:
    agent, rng = residual_of(small_residual()), np.random.default_rng(0)
    state, base = agent.init(0), 0.5 * uniform_chunks(32)
    repeated = np.broadcast_to(base, (4, *base.shape))
    for _ in range(80):
        batches = stacked(*(rewarded_for_going_up(random_batch(32, seed=i), base, rng, 0.1) for i in range(4)))
        state, _ = agent.update(state, batches, repeated, repeated)
    moved = agent.act(state, random_batch(32).obs, base, NOISE[0, :32], explore=False) - base
    assert float(moved.mean()) > 0.05  # of at most 0.1
