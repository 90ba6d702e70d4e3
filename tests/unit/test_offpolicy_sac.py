"""SAC on chunks: hand-computed targets and losses, the temperature's direction, and what one update is made of."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.unit.offpolicy_batches import (
    ACTION_DIM,
    HORIZON,
    OBS_DIM,
    assert_same,
    differs,
    host,
    minibatches,
    random_batch,
)
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.sac import (
    SAC,
    SACConfig,
    actor_loss,
    actor_loss_of,
    chunk_values,
    inverse_softplus,
    next_values,
    next_values_of,
    sac_actor_step,
    td_loss,
    temperature_loss,
    temperature_of,
)
from vla_rl.offpolicy.update import make_update

SPEC = AgentSpec(OBS_DIM, HORIZON, ACTION_DIM)
CONFIG = SACConfig(
    actor=ActorNetConfig((8,), out_scale=1.0),
    critic=MLPCriticConfig(3, (8,)),
    initial_temperature=0.5,
)
KEY = jax.random.key(1)
TD_LOSS, ACTOR_LOSS, ACTOR_LOSS_OF, NEXT_VALUES, NEXT_VALUES_OF, ACTOR_STEP = (
    jax.jit(f, static_argnums=(0, 1))
    for f in (td_loss, actor_loss, actor_loss_of, next_values, next_values_of, sac_actor_step)
)


@pytest.fixture(scope="module")
def agent():
    return SAC(SPEC, CONFIG)


@pytest.fixture(scope="module")
def critic_step(agent):
    return jax.jit(agent._critic_step)


@pytest.fixture(scope="module")
def params(agent):
    """With a target critic that is not the critic."""
    new = agent.init(0).params
    return new | {"target_critic": jax.tree.map(lambda x: x + 0.05, new["critic"])}


def _policy(agent, params, obs, noise):
    """Chunks [M, B, H, A] and log-densities [M, B] in numpy, the density by the change of variables as written."""
    mean, std = (np.asarray(x, np.float64) for x in agent.nets.actor(params["actor"], obs))
    before = mean + std * noise
    density = stats.norm.logpdf(before, mean, std) - np.log(1.0 - np.tanh(before) ** 2)
    return np.tanh(before), density.sum((-2, -1))


# ----------------------------------------------------------------------------------------------------------- targets
def _backup(agent, params, config, noise, batch):
    return np.asarray(
        NEXT_VALUES_OF(agent.nets, replace(agent.config, **config), params, batch.next_obs, jnp.asarray(noise), KEY)
    )


def test_backup_is_the_least_of_the_target_critics_and_the_best_of_the_chunks(agent, params):
    batch, noise = random_batch(), np.random.default_rng(2).normal(size=(4, 5, HORIZON, ACTION_DIM)).astype(np.float32)
    actions, log_prob = _policy(agent, params, batch.next_obs, noise)
    values = np.stack(
        [np.asarray(agent.nets.critic(params["target_critic"], batch.next_obs, a)[..., 0, 0]) for a in actions], 1
    )
    all_members = {"target_reduction": EnsembleReduction("min", None), "num_target_actions": 4}
    plain = _backup(agent, params, all_members, noise, batch)
    np.testing.assert_allclose(plain, values.min(0).max(0), rtol=1e-5)
    soft = _backup(agent, params, all_members | {"backup_entropy": True}, noise, batch)
    np.testing.assert_allclose(soft, (values.min(0) - 0.5 * log_prob).max(0), rtol=1e-4)
    mean = _backup(agent, params, all_members | {"target_reduction": EnsembleReduction("mean", None)}, noise, batch)
    np.testing.assert_allclose(mean, values.mean(0).max(0), rtol=1e-5)


def test_discount_gates_the_entropy_term_and_the_value(agent, params):
    """A terminated chunk's target is its reward alone; elsewhere the entropy term is discounted with the value."""
    batch = random_batch(discount=np.array([0.0, 0.0, 0.9, 0.5, 1.0], np.float32))
    config = replace(CONFIG, backup_entropy=True, target_reduction=EnsembleReduction("min", None))
    value = NEXT_VALUES(agent.nets, config, params, batch.next_obs, KEY)
    loss, metrics = TD_LOSS(agent.nets, config, params["critic"], params, batch, KEY)
    target = batch.reward + batch.discount * np.asarray(value)
    np.testing.assert_array_equal(target[:2], batch.reward[:2])
    q = np.asarray(agent.nets.critic(params["critic"], batch.obs, batch.actions))[..., 0, 0]
    np.testing.assert_allclose(loss, np.square(q - target).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["td_target"], target.mean(), rtol=1e-5)


def test_subsets_with_and_without_replacement():
    """Two of three without replacement are never one member; with it they are with probability 1/3."""
    values = jnp.array([[0.0], [1.0], [2.0]])
    keys = jax.random.split(KEY, 600)
    for replacement, expected in ((False, {0.0: 2 / 3, 1.0: 1 / 3}), (True, {0.0: 5 / 9, 1.0: 3 / 9, 2.0: 1 / 9})):
        reduction = EnsembleReduction("min", 2, replacement)
        least = np.asarray(jax.jit(jax.vmap(lambda key, r=reduction: r(values, key)))(keys))[:, 0]
        shares = {v: float((least == v).mean()) for v in set(least.tolist())}
        assert shares.keys() == expected.keys()
        for value, share in expected.items():
            assert shares[value] == pytest.approx(share, abs=0.06)
    with pytest.raises(ValueError, match="subset of 4 cannot be drawn from 3"):
        EnsembleReduction("min", 4)(values, KEY)


def test_all_members_learn_the_one_target_and_it_has_no_gradient(agent, params):
    batch = random_batch()

    def loss(critic, target_critic):
        return TD_LOSS(agent.nets, CONFIG, critic, params | {"target_critic": target_critic}, batch, KEY)[0]

    of_critic, of_target = jax.grad(loss, argnums=(0, 1))(params["critic"], params["target_critic"])
    assert all(not leaf.any() for leaf in host(of_target))
    per_member = [np.abs(leaf).reshape(3, -1).sum(1) for leaf in host(of_critic)]
    assert (np.sum(per_member, 0) > 0).all()


def test_rows_of_weight_zero_do_not_count(agent, params):
    batch = random_batch(weight=np.array([1, 2, 1, 0, 0], np.float32))
    spoiled = batch._replace(
        obs=np.where(batch.weight[:, None] > 0, batch.obs, 50.0).astype(np.float32),
        reward=np.where(batch.weight > 0, batch.reward, 1e3).astype(np.float32),
    )
    config = replace(CONFIG, bc_weight=0.1)
    for loss in (
        lambda b: TD_LOSS(agent.nets, config, params["critic"], params, b, KEY)[0],
        lambda b: ACTOR_LOSS(agent.nets, config, params["actor"], params, b, KEY)[0],
        lambda b: ACTOR_LOSS(agent.nets, config, params["actor"], params, b, KEY)[1]["entropy"],
    ):
        np.testing.assert_allclose(loss(spoiled), loss(batch), rtol=1e-6)
    ones = batch._replace(weight=np.ones(5, np.float32))
    assert TD_LOSS(agent.nets, config, params["critic"], params, ones, KEY)[0] != pytest.approx(
        float(TD_LOSS(agent.nets, config, params["critic"], params, batch, KEY)[0]), rel=1e-3
    )


# ------------------------------------------------------------------------------------------------------------- actor
@pytest.mark.parametrize("reduce", ["min", "mean"])
def test_actor_loss_by_hand(agent, params, reduce):
    batch = random_batch(mask=np.array([[1, 1], [1, 1], [1, 0], [1, 0], [1, 1]], bool))
    noise = np.random.default_rng(3).normal(size=(5, HORIZON, ACTION_DIM)).astype(np.float32)
    actions, log_prob = _policy(agent, params, batch.obs, noise)
    q = getattr(np, reduce)(np.asarray(agent.nets.critic(params["critic"], batch.obs, actions))[..., 0, 0], axis=0)
    mean, std = (np.asarray(x, np.float64) for x in agent.nets.actor(params["actor"], batch.obs))
    before = np.arctanh(batch.actions.astype(np.float64))
    data = stats.norm.logpdf(before, mean, std) - np.log(1.0 - batch.actions.astype(np.float64) ** 2)
    likelihood = (data.sum(-1) * batch.mask).sum(-1)
    config = replace(CONFIG, actor_reduction=EnsembleReduction(reduce, None), bc_weight=0.25)
    loss, metrics = ACTOR_LOSS_OF(agent.nets, config, params["actor"], params, batch, jnp.asarray(noise), KEY)
    np.testing.assert_allclose(loss, (0.5 * log_prob - q - 0.25 * likelihood).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], -log_prob.mean(), rtol=1e-4)


def test_data_at_the_edge_keeps_the_likelihood_finite(agent, params):
    batch = random_batch(actions=np.ones((5, HORIZON, ACTION_DIM), np.float32))
    config = replace(CONFIG, bc_weight=0.01)
    gradient = jax.grad(lambda p: ACTOR_LOSS(agent.nets, config, p, params, batch, KEY)[0])(params["actor"])
    assert all(np.isfinite(leaf).all() for leaf in host(gradient))


def test_actor_of_a_prefix_critic_climbs_the_mean_over_prefixes():
    config = replace(CONFIG, critic=PrefixCriticConfig(2, width=8, num_layers=1), initial_temperature=1e-6)
    agent = SAC(SPEC, config)
    assert agent.num_prefixes == HORIZON
    params, batch = agent.init(0).params, random_batch()
    noise = np.zeros((5, HORIZON, ACTION_DIM), np.float32)
    actions = agent.act(agent.init(0), batch.obs, noise, explore=False)
    chunk_values_jit = jax.jit(chunk_values, static_argnums=(0, 1))
    values = np.asarray(chunk_values_jit(agent.nets, config, params["critic"], batch.obs, actions[None]))
    loss, _ = ACTOR_LOSS_OF(agent.nets, config, params["actor"], params, batch, jnp.asarray(noise), KEY)
    np.testing.assert_allclose(loss, -values[:, 0].mean(-1).min(0).mean(), rtol=1e-4)
    last = NEXT_VALUES_OF(agent.nets, config, params, batch.obs, jnp.asarray(noise[None]), KEY)
    member = np.asarray(values[:, 0, :, -1])
    assert all(np.isclose(v, member[:, i], rtol=1e-5).any() for i, v in enumerate(np.asarray(last)))


# ------------------------------------------------------------------------------------------------------- temperature
def test_temperature_moves_towards_the_target_entropy():
    """alpha rises while the entropy is below its target; its gradient is (entropy - target) * sigmoid(parameter)."""
    parameter = inverse_softplus(0.5)
    assert float(temperature_of(parameter)) == pytest.approx(0.5, rel=1e-6)
    sigmoid = 1.0 / (1.0 + math.exp(-float(parameter)))
    for entropy in (-6.0, 1.0):
        gradient = jax.grad(temperature_loss)(parameter, jnp.array(entropy), -4.0)
        assert float(gradient) == pytest.approx((entropy + 4.0) * sigmoid, rel=1e-5)


@pytest.mark.parametrize(("per_dim", "on_next"), [(1.0, True), (0.5, False)])
def test_target_entropy_is_of_the_whole_chunk(agent, per_dim, on_next):
    """-c * H * A, found from an actor step: Adam's first one has the sign of entropy - target."""
    std_of_no_entropy = math.exp(-0.5) / math.sqrt(2.0 * math.pi)  # of a narrow Gaussian, which tanh hardly squashes
    config = replace(CONFIG, target_entropy_per_dim=per_dim, entropy_on_next_obs=on_next)
    for excess in (-0.3, 0.3):  # of each dimension's entropy, around -c
        state = agent.init(0)
        actor = jax.tree.map(jnp.zeros_like, state.params["actor"])
        log_std = math.log(std_of_no_entropy) - per_dim + excess
        actor["mlp"]["out"]["bias"] = actor["mlp"]["out"]["bias"].replace(jnp.repeat(jnp.array([0.0, log_std]), 4))
        state = state._replace(params=state.params | {"actor": actor})
        stepped, _ = ACTOR_STEP(agent.nets, config, state, random_batch(200))
        moved = float(stepped.params["temperature"]) - float(state.params["temperature"])
        assert np.sign(moved) == -np.sign(excess)


# ------------------------------------------------------------------------------------------------------------ update
def test_update_is_u_critic_updates_and_then_one_actor_step(agent, critic_step):
    """The scan equals U calls with one minibatch each of the critic's step, then the actor's on all rows."""
    batches = minibatches(3)
    together, _ = agent.update(agent.init(0), batches)
    one_by_one = agent.init(0)
    for i in range(3):
        one_by_one, _ = critic_step(one_by_one, jax.tree.map(lambda x, i=i: x[i], batches))
    one_by_one, _ = ACTOR_STEP(agent.nets, CONFIG, one_by_one, random_batch(15))
    assert int(together.num_updates) == 3
    for x, y in zip(host(together), host(one_by_one), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7)
    again, _ = agent.update(agent.init(0), batches)
    assert_same(again, together)


@pytest.mark.parametrize(("rows", "seen"), [("all", list(range(15))), ("last", list(range(10, 15)))])
def test_rows_that_the_actor_sees(rows, seen):
    update = make_update(lambda s, b: (s, {}), lambda s, b: (s, {"rows": b.rows}), rows)
    assert update(jnp.zeros(()), minibatches(3))[1]["rows"].tolist() == seen


def test_a_part_without_a_gradient_keeps_parameters_and_moments(agent, critic_step):
    """Also when its moments are not zero: a single Adam fed with zeros would go on moving along them. And Polyak."""
    state, _ = agent.update(agent.init(0), minibatches(3))
    before = jax.tree.map(np.array, (state.params, state.moments))
    assert any(leaf.any() for leaf in host(before[1]["actor"]))
    state, _ = critic_step(state, random_batch())
    for name in ("actor", "temperature"):
        assert_same(state.params[name], before[0][name])
        assert_same(state.moments[name], before[1][name])
    assert differs(state.params["critic"], before[0]["critic"])
    networks = (state.params["target_critic"], state.params["critic"], before[0]["target_critic"])
    for target, critic, old in zip(*map(host, networks), strict=True):
        np.testing.assert_allclose(target, 0.005 * critic + 0.995 * old, rtol=1e-5, atol=1e-7)


def test_update_asks_the_host_for_nothing(agent):
    """No transfer with arrays on the device, and no callback in the program; the guard does catch a host array."""
    state, batches = agent.init(0), jax.device_put(minibatches(3))
    agent.update(agent.init(1), batches)  # compiled: constants are on the device
    with jax.transfer_guard("disallow"):
        state, _ = agent.update(state, batches)
        with pytest.raises(Exception, match="Disallowed"):
            agent.update(state, minibatches(3))
    assert "callback" not in str(jax.make_jaxpr(agent.update)(agent.init(0), batches))


def test_act_is_the_callers_noise(agent):
    state, obs = agent.init(0), random_batch(4).obs
    noise = np.random.default_rng(0).normal(size=(4, HORIZON, ACTION_DIM)).astype(np.float32)
    mean, std = (np.asarray(x) for x in agent.nets.actor(state.params["actor"], obs))
    np.testing.assert_allclose(agent.act(state, obs, noise, explore=True), np.tanh(mean + std * noise), rtol=1e-5)
    np.testing.assert_allclose(agent.act(state, obs, noise, explore=False), np.tanh(mean), rtol=1e-5)


def test_bad_settings_are_refused():
    for bad in ({"tau": 0.0}, {"num_target_actions": 0}, {"initial_temperature": 0.0}, {"bc_weight": -1.0}):
        with pytest.raises(ValueError, match="SACConfig"):
            SACConfig(**bad)
