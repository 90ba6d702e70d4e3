"""TD3 on chunks: smoothed targets, both readings of a prefix's target, the actor's objectives, what an update is."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unit.offpolicy_batches import differs, host
from tests.unit.offpolicy_episodes import SPEC, episode_batch
from vla_rl.offpolicy.critics import MLPCriticConfig
from vla_rl.offpolicy.networks import ActorNetConfig
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.td3 import (
    TD3,
    TD3Config,
    chunk_bc_loss,
    smoothed_actions,
    td3_actor_loss,
    td3_next_values,
    td3_td_loss,
)

CONFIG = TD3Config(
    actor=ActorNetConfig((16,), out_scale=1.0),
    critic=PrefixCriticConfig(num_members=2, width=16, num_layers=1),
    target_noise=0.0,
)
MLP = replace(CONFIG, critic=MLPCriticConfig(2, (16,)))
KEY = jax.random.key(3)
BATCH = episode_batch()


@pytest.fixture(scope="module")
def agent():
    return TD3(SPEC, CONFIG)


@pytest.fixture(scope="module")
def params(agent):
    """With targets that are not the online networks."""
    new = agent.init(0).params
    return new | {f"target_{name}": jax.tree.map(lambda x: x + 0.1, new[name]) for name in ("actor", "critic")}


@pytest.fixture(scope="module")
def values(agent, params):
    """Q of the data by the critic [E, B, P], and V of all P successors by both targets [B, P], member by member."""
    nets, following = agent.nets, BATCH.prefix_next_obs.reshape(24, 3)

    @jax.jit
    def compute(params):
        q = nets.critic(params["critic"], BATCH.obs, BATCH.actions)[..., 0]
        chunks = nets.actor(params["target_actor"], following)
        whole = nets.critic(params["target_critic"], following, chunks)[:, :, -1, 0]
        return q, jnp.minimum(whole[0], whole[1]).reshape(8, 3)

    return tuple(np.asarray(x) for x in compute(params))


def _td_loss(agent, config, params):
    return jax.jit(lambda p: td3_td_loss(agent.nets, config, p["critic"], p, BATCH, KEY)[0])(params)


# ------------------------------------------------------------------------------------------------------------- targets
def test_target_noise_is_clipped_and_so_is_the_action():
    chunks = jnp.asarray(np.linspace(-1, 1, 6000).reshape(1000, 3, 2))
    config = replace(CONFIG, target_noise=0.2, target_noise_clip=0.3)

    moved = smoothed_actions(config, chunks, KEY)

    assert jnp.abs(moved).max() <= 1.0
    inner = (jnp.abs(chunks) < 0.7) * (moved - chunks)
    assert jnp.abs(inner).max() == pytest.approx(0.3, abs=1e-6)
    noise = np.clip(0.2 * np.random.default_rng(0).normal(size=100_000), -0.3, 0.3)
    assert np.asarray(moved - chunks)[np.abs(chunks) < 0.7].std() == pytest.approx(noise.std(), rel=0.05)
    np.testing.assert_array_equal(smoothed_actions(CONFIG, chunks, KEY), chunks)


def test_a_successor_has_the_value_of_the_target_actors_whole_chunk(agent, params, values):
    next_obs = BATCH.prefix_next_obs.reshape(24, 3)

    following = jax.jit(lambda p: td3_next_values(agent.nets, CONFIG, p, next_obs, KEY))(params)

    np.testing.assert_allclose(following, values[1].flatten(), rtol=1e-5, atol=1e-6)


def test_each_prefix_learns_its_own_target(agent, params, values):
    q, following = values
    targets = BATCH.prefix_reward + BATCH.prefix_discount * following

    assert _td_loss(agent, CONFIG, params) == pytest.approx(np.square(q - targets).mean(), rel=1e-4)


def test_the_other_reading_gives_all_prefixes_the_target_of_the_chunk(agent, params, values):
    q, following = values
    targets = BATCH.reward + BATCH.discount * following[:, -1]

    loss = _td_loss(agent, replace(CONFIG, prefix_targets="chunk"), params)

    assert loss == pytest.approx(np.square(q - targets[:, None]).mean(), rel=1e-4)


def test_drawn_prefixes_have_the_mean_of_all(agent, params):
    config = replace(CONFIG, trained_prefixes=2)

    def loss(key):
        return td3_td_loss(agent.nets, config, params["critic"], params, BATCH, key)[0]

    losses = np.unique(np.round(jax.jit(jax.vmap(loss))(jax.random.split(KEY, 12)), 5))

    assert len(losses) == 3  # pairs of three
    assert losses.mean() == pytest.approx(float(_td_loss(agent, CONFIG, params)), abs=1e-4)


# --------------------------------------------------------------------------------------------------------------- actor
def test_cloning_counts_executed_steps_only():
    chunks = jnp.zeros((8, 3, 2))
    batch = BATCH._replace(weight=np.arange(8, dtype=np.float32))

    weight = np.arange(8)[:, None] * BATCH.mask
    expected = (np.square(BATCH.actions).mean(axis=-1) * weight).sum() / weight.sum()
    assert not BATCH.mask.all()
    assert chunk_bc_loss(chunks, batch) == pytest.approx(expected, rel=1e-5)


def test_the_actor_maximises_the_mean_over_prefixes(agent, params):
    chunks = agent.nets.actor(params["actor"], BATCH.obs)
    q = agent.nets.critic(params["critic"], BATCH.obs, chunks)[..., 0]

    loss, metrics = td3_actor_loss(agent.nets, CONFIG, params["actor"], params, BATCH, KEY)

    assert loss == pytest.approx(-float(q.mean()), rel=1e-4)
    config = replace(CONFIG, q_weight=2.5, normalize_q=True, bc_weight=1.0)
    per_row = q.mean(axis=(0, 2))
    loss, _ = td3_actor_loss(agent.nets, config, params["actor"], params, BATCH, KEY)
    expected = float(metrics["bc_loss"]) - 2.5 * float(per_row.mean() / jnp.abs(per_row).mean())
    assert loss == pytest.approx(expected, rel=1e-4)


# -------------------------------------------------------------------------------------------------------------- update
@pytest.fixture(scope="module")
def updated(agent):
    """State before and after an update of two minibatches."""
    before = agent.init(1)
    kept = jax.tree.map(jnp.copy, before)
    return kept, agent.update(before, BATCH.fold(2))[0]


def test_an_update_is_u_critic_steps_and_one_actor_step(updated):
    _, after = updated

    assert after.num_updates == 2
    assert after.moments["critic"][0].count == 2
    assert after.moments["actor"][0].count == 1


def test_the_target_actor_follows_once_an_update(updated):
    before, after = updated

    for old, online, target in zip(
        *(host(part) for part in (before.params["actor"], after.params["actor"], after.params["target_actor"])),
        strict=True,
    ):
        np.testing.assert_allclose(target, 0.995 * old + 0.005 * online, rtol=1e-5, atol=1e-7)
    assert differs(before.params["target_critic"], after.params["target_critic"])


def test_exploration_adds_the_callers_noise_within_the_bounds(agent, updated):
    state = updated[1]
    noise = np.random.default_rng(0).normal(size=(8, 3, 2)).astype(np.float32)

    deployed = agent.act(state, BATCH.obs, noise, explore=False)
    explored = agent.act(state, BATCH.obs, noise * 5, explore=True)

    np.testing.assert_allclose(deployed, agent.nets.actor(state.params["actor"], BATCH.obs), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(explored, np.clip(deployed + 0.5 * noise, -1, 1), rtol=1e-5, atol=1e-6)


def test_an_mlp_critic_needs_no_prefixes():
    agent = TD3(SPEC, MLP)
    state, metrics = agent.update(agent.init(0), episode_batch(prefixes=False).fold(2))

    assert agent.num_prefixes == 1
    assert state.num_updates == 2
    assert np.isfinite(float(metrics["td_loss"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 0.0}, "0 < tau <= 1"),
        ({"q_weight": 0.0}, "nor both weights zero"),
        ({"target_noise": -0.1}, "must not be negative"),
        ({"trained_prefixes": 1}, "at least 2"),
        ({"trained_prefixes": 2, "prefix_targets": "chunk"}, 'prefix_targets="own"'),
        ({"critic": MLPCriticConfig(), "prefix_targets": "chunk"}, "an MLP has no prefixes"),
    ],
)
def test_options_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
