"""CQL and Cal-QL: the three forms by hand, what the calibration bounds, Lagrange, and whose gradient it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from tests.unit.offpolicy_batches import ACTION_DIM, HORIZON, OBS_DIM, host, minibatches, random_batch
from vla_rl.offpolicy.calql import (
    CalQL,
    CalQLConfig,
    ConservativeConfig,
    conservative_gap,
    conservative_loss,
    conservative_loss_of,
    lagrange_term,
)
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.networks import ActorNetConfig, AgentSpec
from vla_rl.offpolicy.sac import SACConfig, inverse_softplus

SPEC = AgentSpec(OBS_DIM, HORIZON, ACTION_DIM)
SAC_PART = SACConfig(
    actor=ActorNetConfig((8,), out_scale=1.0), critic=MLPCriticConfig(3, (8,)), initial_temperature=0.5
)
KEY = jax.random.key(1)
LOSS = jax.jit(conservative_loss, static_argnums=(0, 1))
LOSS_OF = jax.jit(conservative_loss_of, static_argnums=(0, 1))


def _config(**conservative) -> CalQLConfig:
    return CalQLConfig(SAC_PART, ConservativeConfig(num_actions=3, **conservative))


@pytest.fixture(scope="module")
def agent():
    return CalQL(SPEC, _config(lagrange_gap=0.4, alpha=2.0))


@pytest.fixture(scope="module")
def params(agent):
    return agent.init(0).params


# ------------------------------------------------------------------------------------------------------------- forms
# One member, one row, one prefix; two random and two policy chunks. The return 1.5 lies between the values.
Q_DATA, Q_RANDOM, Q_POLICY = np.array([0.5]), np.array([1.0, -1.0]), np.array([2.0, 1.0])
LOG_PROB, RETURN, DIM = np.array([-3.0, 0.5]), 1.5, 4


def _gap(bound=RETURN, **config):
    gap, share = conservative_gap(
        ConservativeConfig(**config),
        jnp.asarray(Q_DATA).reshape(1, 1, 1),
        jnp.asarray(Q_RANDOM).reshape(1, 2, 1, 1),
        jnp.asarray(Q_POLICY).reshape(1, 2, 1, 1),
        jnp.asarray([bound]),
        jnp.asarray(LOG_PROB).reshape(2, 1),
        DIM,
    )
    assert gap.shape == (1, 1, 1)
    return float(gap[0, 0, 0]), float(share)


@pytest.mark.parametrize(
    ("config", "random", "policy"),
    [
        ({"calibrate": False}, [1.0, -1.0], [2.0, 1.0]),
        ({}, [1.0, -1.0], [2.0, 1.5]),
        ({"bound_random_actions": True}, [1.5, 1.5], [2.0, 1.5]),
    ],
)
def test_log_sum_exp_forms_by_hand(config, random, policy):
    """The bound applies to the policy's values, before their density is taken off, and to random ones by option."""
    random, policy = np.array(random), np.array(policy)
    weighed = np.concatenate([random - DIM * np.log(0.5), policy - LOG_PROB])
    assert _gap(form="importance", **config)[0] == pytest.approx(float(logsumexp(weighed)) - 0.5, rel=1e-6)  # pyright: ignore[reportArgumentType]
    plain = np.concatenate([random, policy, Q_DATA])
    gap, share = _gap(form="logsumexp", **config)
    assert gap == pytest.approx(logsumexp(plain) - np.log(5) - 0.5, rel=1e-6)
    assert share == 0.5  # one of two policy values lies under the return


def test_expectation_form_is_of_the_policy_alone():
    assert _gap(form="expectation")[0] == pytest.approx((2.0 + 1.5) / 2 - 0.5)
    assert _gap(form="expectation", calibrate=False)[0] == pytest.approx(1.5 - 0.5)


@pytest.mark.parametrize("form", ["importance", "logsumexp", "expectation"])
def test_no_known_return_is_no_bound(form):
    """-inf is CQL, bit for bit, and leaves gradients finite."""
    assert _gap(-np.inf, form=form) == (_gap(form=form, calibrate=False)[0], 0.0)

    def gap(q):
        q_random, bound, log_prob = jnp.zeros((1, 2, 1, 1)), jnp.array([-jnp.inf]), jnp.zeros((2, 1))
        config = ConservativeConfig(form=form)
        return conservative_gap(config, jnp.zeros((1, 1, 1)), q_random, q, bound, log_prob, DIM)[0].sum()

    gradient = np.asarray(jax.grad(gap)(jnp.asarray(Q_POLICY).reshape(1, 2, 1, 1)))
    assert (gradient > 0).all()


def test_values_under_the_return_are_not_pushed():
    def gap(q):
        config, one = ConservativeConfig(form="expectation"), jnp.zeros((1, 1, 1))
        return conservative_gap(config, one, one[None], q, jnp.array([RETURN]), jnp.zeros((2, 1)), DIM)[0].sum()

    gradient = jax.grad(gap)(jnp.asarray(Q_POLICY).reshape(1, 2, 1, 1))
    np.testing.assert_allclose(gradient[0, :, 0, 0], [0.5, 0.0])


# -------------------------------------------------------------------------------------------------- the term as it is
@pytest.mark.parametrize("form", ["importance", "expectation"])
def test_term_by_hand_with_networks(agent, params, form):
    """Policy chunks at s and s', all valued at s; the expectation form has those at s alone."""
    batch, rng = random_batch(), np.random.default_rng(4)
    places = 1 if form == "expectation" else 2
    noise = rng.normal(size=(places, 3, 5, HORIZON, ACTION_DIM)).astype(np.float32)
    random = rng.uniform(-1, 1, size=(3 if places == 2 else 0, 5, HORIZON, ACTION_DIM)).astype(np.float32)
    samples = [
        np.asarray(agent.nets.critic(params["critic"], batch.obs, a))[:, :, 0, 0] - 4 * np.log(0.5) for a in random
    ]
    for where, obs in enumerate((batch.obs, batch.next_obs)[:places]):
        mean, std = (np.asarray(x) for x in agent.nets.actor(params["actor"], obs))
        for eps in noise[where]:
            chunk = np.tanh(mean + std * eps)
            log_prob = (-0.5 * eps**2 - np.log(std) - 0.5 * np.log(2 * np.pi) - np.log(1 - chunk**2)).sum((-2, -1))
            q = np.maximum(
                np.asarray(agent.nets.critic(params["critic"], batch.obs, chunk))[:, :, 0, 0], batch.mc_return
            )
            samples.append(q if form == "expectation" else q - log_prob)
    data = np.asarray(agent.nets.critic(params["critic"], batch.obs, batch.actions))[:, :, 0, 0]
    down = np.mean(samples, 0) if form == "expectation" else logsumexp(samples, axis=0)
    loss, _ = LOSS_OF(agent.nets, _config(form=form), params["critic"], params, batch, random, noise, KEY)
    np.testing.assert_allclose(loss, (down - data).mean(), rtol=1e-4)


def test_term_teaches_the_drawn_critics_alone(agent, params):
    """Two of three where two are drawn without replacement; the same ones for what is pushed down and up."""
    config = _config(members=EnsembleReduction("min", 2, False), calibrate=False)

    def loss(critic):
        return conservative_loss(agent.nets, config, critic, params, random_batch(), KEY)[0]

    gradient = jax.jit(jax.grad(loss))(params["critic"])
    per_member = np.sum([np.abs(leaf).reshape(3, -1).sum(1) for leaf in host(gradient)], 0)
    assert (per_member > 0).sum() == 2
    out_bias = host(gradient["mlp"]["out"]["bias"])[0]  # the same constant on both sides of the term cancels
    np.testing.assert_allclose(out_bias[per_member > 0], 0.0, atol=1e-6)


def test_policy_does_not_learn_from_the_conservative_term(agent):
    """In the program of a critic step, actor and temperature, moments too, go out as they came in."""
    state = agent.init(0)
    program = jax.make_jaxpr(agent._critic_step)(state, random_batch()).jaxpr
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    untouched = {
        path for path, before, after in zip(paths, program.invars, program.outvars, strict=False) if before is after
    }
    of_policy = {path for path in paths if "'actor'" in path or "'temperature'" in path}
    assert of_policy == untouched
    assert len(of_policy) > 10


def test_rows_of_weight_zero_do_not_count(agent, params):
    batch = random_batch(weight=np.array([1, 1, 0, 1, 0], np.float32))
    spoiled = batch._replace(obs=np.where(batch.weight[:, None] > 0, batch.obs, 70.0).astype(np.float32))
    losses = [LOSS(agent.nets, _config(), params["critic"], params, b, KEY)[0] for b in (batch, spoiled)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------- Lagrange
def test_multiplier_rises_while_the_gap_is_larger_than_wanted():
    """Critic: multiplier * alpha. Multiplier: -alpha * (gap - wanted) * sigmoid(parameter), which descent raises."""
    config, parameter = ConservativeConfig(alpha=2.0, lagrange_gap=0.4), inverse_softplus(1.5)
    sigmoid = 1.0 / (1.0 + np.exp(-float(parameter)))
    for gap in (-0.6, 1.4):
        of_parameter, of_gap = jax.grad(lagrange_term, argnums=(1, 2))(config, parameter, jnp.array(gap))
        assert float(of_parameter) == pytest.approx(-2.0 * (gap - 0.4) * sigmoid, rel=1e-5)
        assert float(of_gap) == pytest.approx(1.5 * 2.0, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- agent
def test_update_trains_every_part_and_asks_the_host_for_nothing(agent):
    state, batches = agent.init(0), jax.device_put(minibatches(2))
    before = jax.tree.map(np.array, state.params)
    agent.update(agent.init(1), batches)  # compiled: constants are on the device
    with jax.transfer_guard("disallow"):
        state, metrics = agent.update(state, batches)
    for name in ("actor", "critic", "target_critic", "temperature", "cql_multiplier"):
        assert any((x != y).any() for x, y in zip(host(state.params[name]), host(before[name]), strict=True)), name
    assert int(state.num_updates) == 2
    gap_is_larger = float(metrics["conservative_gap"]) > 0.4
    assert (state.params["cql_multiplier"] > before["cql_multiplier"]) == gap_is_larger
    assert all(np.isfinite(float(v)) for v in metrics.values())


def test_bad_settings_are_refused():
    for bad in ({"alpha": -1.0}, {"num_actions": 0}, {"initial_multiplier": 0.0}):
        with pytest.raises(ValueError, match="ConservativeConfig"):
            ConservativeConfig(**bad)
    for bad in ({"calibrate": False}, {"form": "expectation"}):
        with pytest.raises(ValueError, match="bound_random_actions"):
            ConservativeConfig(bound_random_actions=True, **bad)
