"""The causal transformer critic: what a prefix's value may depend on, and what members share."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vla_rl.offpolicy.networks import AgentSpec, Network
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.value_heads import HLGaussHead

CONFIG = PrefixCriticConfig(num_members=3, width=16, num_layers=2)
HORIZON = 5
LONG = AgentSpec(obs_dim=3, action_horizon=HORIZON, action_dim=2)


@pytest.fixture(scope="module")
def critic():
    network = Network(CONFIG.build(LONG, nnx.Rngs(0)))
    return jax.jit(network.__call__), network.initial


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (4, 3)), jax.random.uniform(keys[1], (4, HORIZON, 2), minval=-1.0)


def test_one_pass_values_every_prefix_with_any_head(inputs):
    config = replace(CONFIG, head=HLGaussHead(-1.0, 1.0, 7))
    network = Network(config.build(LONG, nnx.Rngs(0)))

    out = jax.eval_shape(network.__call__, network.initial, *inputs)

    assert config.num_prefixes(LONG) == HORIZON
    assert out.shape == (3, 4, HORIZON, 7)


@pytest.mark.parametrize("changed", range(HORIZON))
def test_an_action_changes_no_shorter_prefix(critic, inputs, changed):
    call, params = critic
    obs, actions = inputs

    before = call(params, obs, actions)
    after = call(params, obs, actions.at[:, changed].add(0.5))

    np.testing.assert_array_equal(after[:, :, :changed], before[:, :, :changed])
    assert (np.abs(after[:, :, changed:] - before[:, :, changed:]) > 1e-5).all()


def test_every_prefix_depends_on_the_observation_and_on_the_order_of_actions(critic, inputs):
    call, params = critic
    obs, actions = inputs
    before = call(params, obs, actions)

    assert (np.abs(call(params, obs + 0.5, actions) - before) > 1e-5).all()
    swapped = call(params, obs, actions[:, jnp.asarray([1, 0, 2, 3, 4])])
    assert (np.abs(swapped - before)[:, :, 1:] > 1e-6).all()


def test_members_share_nothing(critic, inputs):
    call, params = critic
    out = call(params, *inputs)
    assert 0.2 < float(out.std()) < 3.0  # of order one in the beginning

    def member_1(params):
        return jnp.square(call(params, *inputs)[1]).sum()

    for gradient in jax.tree.leaves(jax.jit(jax.grad(member_1))(params)):
        assert (gradient[0] == 0).all()
        assert (gradient[2] == 0).all()
        assert (gradient[1] != 0).any()
    assert not np.allclose(out[0], out[1])


def test_a_member_alone_has_the_same_values(critic, inputs):
    call, params = critic
    single = jax.jit(Network(replace(CONFIG, num_members=1).build(LONG, nnx.Rngs(7))).__call__)

    alone = single(jax.tree.map(lambda leaf: leaf[2:3], params), *inputs)

    np.testing.assert_allclose(alone[0], call(params, *inputs)[2], rtol=1e-5, atol=1e-6)


def test_it_learns_sums_over_prefixes():
    """Q of i steps = sum of the first i actions times the observation: attention must gather, and only from before."""
    network = Network(replace(CONFIG, num_members=1).build(LONG, nnx.Rngs(0)))
    optimizer = optax.adam(1e-2)

    def data(key):
        keys = jax.random.split(key)
        obs = jax.random.normal(keys[0], (64, 3))
        actions = jax.random.uniform(keys[1], (64, HORIZON, 2), minval=-1.0)
        return obs, actions, actions.sum(axis=-1).cumsum(axis=1) * jnp.tanh(obs[:, :1])

    def loss(params, key):
        obs, actions, target = data(key)
        return jnp.square(network(params, obs, actions)[0, :, :, 0] - target).mean()

    def step(carry, key):
        params, moments = carry
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    start = (network.initial, optimizer.init(network.initial))
    (params, _), losses = jax.jit(lambda s, k: jax.lax.scan(step, s, k))(
        start, jax.random.split(jax.random.key(0), 200)
    )

    assert losses[0] > 0.5
    assert loss(params, jax.random.key(99)) < 0.1 * losses[0]


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        PrefixCriticConfig(width=10, num_heads=4)
    with pytest.raises(ValueError, match="at least 1"):
        PrefixCriticConfig(num_layers=0)
