"""Critics of chunks: shapes, reductions of an ensemble, targets by hand, and what value heads mean."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.unit.offpolicy_episodes import SPEC, episode_batch
from vla_rl.offpolicy.critics import (
    EnsembleReduction,
    MLPCriticConfig,
    bootstrap_loss,
    candidate_values,
    successors,
    take_prefixes,
    td_targets,
    weighted_mean,
)
from vla_rl.offpolicy.networks import Network
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.value_heads import HLGaussHead, ScalarHead

PREFIX = PrefixCriticConfig(width=8, num_layers=1)


@pytest.mark.parametrize("head", [ScalarHead(), HLGaussHead(-2.0, 2.0, 11)])
def test_an_mlp_values_the_whole_chunk(head):
    config = MLPCriticConfig(num_members=3, hidden_sizes=(8,), head=head)
    critic = Network(config.build(SPEC, nnx.Rngs(0)))
    batch = episode_batch()

    out = critic(critic.initial, batch.obs, batch.actions)

    assert config.num_prefixes(SPEC) == 1
    assert out.shape == (3, 8, 1, head.out_dim)
    for a, b in itertools.combinations(range(3), 2):
        assert not np.allclose(out[a], out[b])


@pytest.mark.parametrize("config", [MLPCriticConfig(2, (8,)), PREFIX])
def test_candidates_are_valued_one_by_one(config):
    critic = Network(config.build(SPEC, nnx.Rngs(0)))
    call = jax.jit(critic.__call__)
    batch = episode_batch()
    candidates = np.random.default_rng(0).uniform(-1, 1, (4, 8, 3, 2)).astype(np.float32)

    values = jax.jit(lambda params: candidate_values(critic, config.head, params, batch.obs, jnp.asarray(candidates)))(
        critic.initial
    )

    assert values.shape == (2, 4, 8, config.num_prefixes(SPEC))
    for n in range(4):
        alone = call(critic.initial, batch.obs, candidates[n])[..., 0]
        np.testing.assert_allclose(values[:, n], alone, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- reductions
VALUES = jnp.asarray([[1.0, 40.0], [2.0, 30.0], [3.0, 20.0], [4.0, 10.0]])


def test_reductions_of_all_members():
    key = jax.random.key(0)

    np.testing.assert_array_equal(EnsembleReduction("min", None)(VALUES, key), [1.0, 10.0])
    np.testing.assert_array_equal(EnsembleReduction("mean", None)(VALUES, key), [2.5, 25.0])


@pytest.mark.parametrize("with_replacement", [False, True])
def test_a_subset_is_drawn_anew_and_with_replacement_only_where_asked_for(with_replacement):
    reduction = EnsembleReduction("min", 2, with_replacement)

    drawn = np.stack([reduction.members(jax.random.key(i), 4) for i in range(200)])

    doubles = (drawn[:, 0] == drawn[:, 1]).mean()
    assert 0.15 < doubles < 0.35 if with_replacement else doubles == 0.0  # 1 / 4 by chance
    assert set(drawn.flatten().tolist()) == {0, 1, 2, 3}
    one = int(np.flatnonzero(drawn[:, 0] != drawn[:, 1])[0])
    np.testing.assert_array_equal(reduction(VALUES, jax.random.key(one)), VALUES[drawn[one]].min(axis=0))


def test_a_subset_larger_than_the_ensemble_is_refused():
    with pytest.raises(ValueError, match="a subset of 5 cannot be drawn from 4 critics"):
        EnsembleReduction("min", 5)(VALUES, jax.random.key(0))


# ------------------------------------------------------------------------------------------------------------ targets
def test_targets_of_prefixes_are_those_of_shorter_chunks():
    batch = episode_batch()
    following = successors(batch, 3)
    targets, weights = td_targets(batch, following[:, 0], 3)  # V(s) = first number of s

    for i in (1, 2, 3):
        shorter = episode_batch(horizon=i)
        by_chunk, _ = td_targets(shorter, successors(shorter, 1)[:, 0], 1)
        # rows of the two batches start at the same steps: every step of an episode is a start, whatever the horizon
        np.testing.assert_array_equal(shorter.rows, batch.rows)
        np.testing.assert_allclose(targets[:, i - 1], by_chunk[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(weights, np.ones((8, 3)))  # the last prefixes of the last starts too


def test_some_prefixes_have_the_targets_that_they_have_among_all():
    batch = episode_batch()
    values = successors(batch, 3)[:, 1]

    some = take_prefixes(batch, jnp.asarray([2, 0]))

    targets = td_targets(some, successors(some, 2)[:, 1], 2)[0]
    np.testing.assert_array_equal(targets, td_targets(batch, values, 3)[0][:, jnp.asarray([2, 0])])


def test_a_prefix_critic_needs_the_targets_of_prefixes():
    batch = episode_batch(prefixes=False)

    with pytest.raises(ValueError, match="prefixes=True"):
        successors(batch, 3)
    with pytest.raises(ValueError, match="prefixes=True"):
        td_targets(batch, jnp.zeros(24), 3)


def test_rows_without_weight_do_not_dilute_the_mean():
    losses = jnp.asarray([[[1.0], [5.0]], [[3.0], [7.0]]])  # [E, B, P]

    assert weighted_mean(losses, jnp.asarray([[1.0], [0.0]])) == pytest.approx(2.0)
    assert weighted_mean(losses, jnp.asarray([[1.0], [3.0]])) == pytest.approx((1 + 3 + 15 + 21) / 8)
    assert weighted_mean(losses, jnp.zeros((2, 1))) == 0.0


def test_the_loss_by_hand_and_successors_that_nobody_saw_do_not_count():
    critic = Network(PREFIX.build(SPEC, nnx.Rngs(0)))
    batch = episode_batch()
    seen = np.array(batch.prefix_mask)
    seen[0, 1] = False
    batch = batch._replace(prefix_mask=seen, weight=np.arange(8, dtype=np.float32))
    next_values = np.linspace(-1, 1, 24).astype(np.float32)

    loss, metrics = bootstrap_loss(critic, ScalarHead(), critic.initial, batch, jnp.asarray(next_values), 3)

    q = np.asarray(critic(critic.initial, batch.obs, batch.actions))[..., 0]
    target = batch.prefix_reward + batch.prefix_discount * next_values.reshape(8, 3)
    weight = np.broadcast_to(np.arange(8)[:, None] * seen, q.shape)
    assert loss == pytest.approx(((q - target) ** 2 * weight).sum() / weight.sum(), rel=1e-5)
    assert metrics["q_data"] == pytest.approx(q.mean(), rel=1e-4)


# -------------------------------------------------------------------------------------------------------- value heads
HEAD = HLGaussHead(low=-10.0, high=10.0, num_bins=40)  # bins are 0.5 wide


def test_a_histogram_has_the_mean_of_its_target():
    targets = jnp.asarray([-8.0, -0.3, 0.0, 4.44, 8.0])

    probabilities = HEAD.probabilities(targets)

    np.testing.assert_allclose(probabilities.sum(axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(HEAD.value(jnp.log(probabilities + 1e-20)), targets, atol=0.01)


def test_the_mass_of_a_bin_is_that_of_the_gaussian():
    # sigma = 0.75 bins; the target is an edge, so the two bins beside it have Phi(1 / 0.75) - 1/2 each
    mass = HEAD.probabilities(jnp.asarray(0.0))

    np.testing.assert_allclose(mass[19:21], 0.40879, atol=1e-4)


def test_targets_out_of_range_are_clipped_to_it():
    np.testing.assert_array_equal(HEAD.probabilities(jnp.asarray(25.0)), HEAD.probabilities(jnp.asarray(10.0)))


def test_the_cross_entropy_is_least_at_the_targets_histogram():
    target = jnp.asarray(1.3)
    logits = jnp.log(HEAD.probabilities(target) + 1e-12)

    gradient = jax.grad(lambda out: HEAD.loss(out, target))(logits)

    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)
    assert HEAD.loss(logits + jax.random.normal(jax.random.key(0), (40,)), target) > HEAD.loss(logits, target)


def test_one_target_for_all_members_and_prefixes():
    out = jax.random.normal(jax.random.key(0), (2, 5, 3, 40))

    losses = HEAD.loss(out, jnp.arange(5.0)[:, None])

    assert losses.shape == (2, 5, 3)
    assert losses[1, 4, 2] == pytest.approx(float(HEAD.loss(out[1, 4, 2], jnp.asarray(4.0))), rel=1e-5)


def test_a_head_without_a_range_is_refused():
    with pytest.raises(ValueError, match="low < high"):
        HLGaussHead(1.0, 1.0)
