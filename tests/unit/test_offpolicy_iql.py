"""IQL: the expectile, the clipped weights, both losses by hand, and what each part is taught by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.unit.offpolicy_batches import ACTION_DIM, HORIZON, OBS_DIM, host, minibatches, random_batch
from vla_rl.offpolicy import iql
from vla_rl.offpolicy.critics import MLPCriticConfig
from vla_rl.offpolicy.iql import IQL, IQLConfig, advantage_weights, expectile_loss
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec

SPEC = AgentSpec(OBS_DIM, HORIZON, ACTION_DIM)
CONFIG = IQLConfig(
    actor=ActorNetConfig((8,), layer_norm=False, std="shared", out_scale=1.0),
    critic=MLPCriticConfig(2, (8,), layer_norm=False),
    value_hidden_sizes=(8,),
    expectile=0.8,
)
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def agent():
    return IQL(SPEC, CONFIG)


@pytest.fixture(scope="module")
def params(agent):
    new = agent.init(0).params
    return new | {"target_critic": jax.tree.map(lambda x: x + 0.05, new["critic"])}


def _q(agent, params, name, batch):
    return np.asarray(agent.nets.critic(params[name], batch.obs, batch.actions))[..., 0, 0]


def _v(agent, params, obs):
    return np.asarray(agent.nets.value(params["value"], obs))[:, 0]


def test_minimum_of_the_expectile_loss_is_the_expectile():
    """Of 0 and 1 with equal weight it is `expectile` itself; 0.5 is the mean."""
    grid = jnp.linspace(0.0, 1.0, 1001)
    for expectile in (0.5, 0.7, 0.9):
        loss = expectile_loss(0.0 - grid, expectile) + expectile_loss(1.0 - grid, expectile)
        assert float(grid[loss.argmin()]) == pytest.approx(expectile, abs=1e-3)


def test_weights_are_exponential_up_to_the_clip():
    weights = advantage_weights(jnp.array([-1.0, 0.0, 1.0, 1e6]), 3.0, 100.0)
    np.testing.assert_allclose(weights, [np.exp(-3), 1.0, np.exp(3), 100.0], rtol=1e-5)


def test_value_and_critic_losses_by_hand(agent, params):
    batch = random_batch()
    q = _q(agent, params, "target_critic", batch).min(0)
    difference = q - _v(agent, params, batch.obs)
    expected = (np.where(difference < 0, 0.2, 0.8) * difference**2).mean()
    q_data = iql.data_values(agent.nets, CONFIG, params, batch, KEY)
    np.testing.assert_allclose(q_data, q, rtol=1e-5)
    np.testing.assert_allclose(
        iql.value_loss(agent.nets, CONFIG, params["value"], batch, q_data)[0], expected, rtol=1e-5
    )
    target = batch.reward + batch.discount * _v(agent, params, batch.next_obs)
    loss, _ = iql.critic_loss(agent.nets, CONFIG, params["critic"], params, batch)
    np.testing.assert_allclose(loss, np.square(_q(agent, params, "critic", batch) - target).mean(), rtol=1e-5)


def test_actor_loss_by_hand_counts_executed_steps(agent, params):
    batch = random_batch(mask=np.array([[1, 1], [1, 0], [1, 1], [1, 0], [1, 1]], bool))
    q = jnp.array([0.1, -0.2, 0.3, 9.0, 0.0])
    mean, std = (np.asarray(x) for x in agent.nets.actor(params["actor"], batch.obs))
    assert (std == std[:1]).all()  # whatever the observation
    log_prob = (stats.norm.logpdf(batch.actions, np.tanh(mean), std).sum(-1) * batch.mask).sum(-1)
    weights = np.minimum(np.exp(3.0 * (np.asarray(q) - _v(agent, params, batch.obs))), 100.0)
    loss, metrics = iql.actor_loss(agent.nets, CONFIG, params["actor"], params, batch, q)
    np.testing.assert_allclose(loss, -(weights * log_prob).mean(), rtol=1e-5)
    assert float(metrics["clipped_share"]) == pytest.approx(0.2)
    moved = batch._replace(actions=np.where(batch.mask[..., None], batch.actions, 0.9).astype(np.float32))
    assert float(iql.actor_loss(agent.nets, CONFIG, params["actor"], params, moved, q)[0]) == float(loss)


def test_rows_of_weight_zero_do_not_count(agent, params):
    batch = random_batch(weight=np.array([1, 1, 0, 3, 0], np.float32))
    spoiled = batch._replace(obs=np.where(batch.weight[:, None] > 0, batch.obs, 9.0).astype(np.float32))
    q = jnp.arange(5.0) / 5
    for loss in (
        lambda b: iql.value_loss(agent.nets, CONFIG, params["value"], b, q)[0],
        lambda b: iql.critic_loss(agent.nets, CONFIG, params["critic"], params, b)[0],
        lambda b: iql.actor_loss(agent.nets, CONFIG, params["actor"], params, b, q)[0],
    ):
        np.testing.assert_allclose(loss(spoiled), loss(batch), rtol=1e-6)


def test_update_teaches_each_part_by_what_the_paper_says(agent):
    """Critic by V alone and V by the target critic alone: other target values leave the critic's step as it is."""
    step = jax.jit(agent._critic_step)
    state = agent.init(0)
    shifted = state._replace(
        params=state.params | {"target_critic": jax.tree.map(lambda x: x + 0.3, state.params["critic"])}
    )
    one, other = step(state, random_batch())[0], step(shifted, random_batch())[0]
    for x, y in zip(host(one.params["critic"]), host(other.params["critic"]), strict=True):
        np.testing.assert_array_equal(x, y)
    moments = [host(s.moments["value"]) for s in (one, other)]  # Adam's first step has one size; its moments do not
    assert any((x != y).any() for x, y in zip(*moments, strict=True))


def test_update_acts_and_asks_the_host_for_nothing(agent):
    state, batches = agent.init(0), jax.device_put(minibatches(2))
    before = jax.tree.map(np.array, state.params)
    agent.update(agent.init(1), batches)
    with jax.transfer_guard("disallow"):
        state, metrics = agent.update(state, batches)
    for name in ("actor", "critic", "target_critic", "value"):
        assert any((x != y).any() for x, y in zip(host(state.params[name]), host(before[name]), strict=True)), name
    assert all(np.isfinite(float(v)) for v in metrics.values())
    noise = np.full((4, HORIZON, ACTION_DIM), 9.0, np.float32)
    obs = random_batch(4).obs
    assert (np.asarray(agent.act(state, obs, noise, explore=True)) == 1.0).all()  # clipped
    mean = np.tanh(np.asarray(agent.nets.actor(state.params["actor"], obs)[0]))
    np.testing.assert_allclose(agent.act(state, obs, noise, explore=False), mean, rtol=1e-5)


def test_bad_settings_are_refused():
    for bad in ({"expectile": 1.0}, {"tau": 0.0}, {"inverse_temperature": -1.0}, {"max_weight": 0.0}):
        with pytest.raises(ValueError, match="IQLConfig"):
            IQLConfig(**bad)
