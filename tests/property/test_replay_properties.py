"""Chunk sampling for whatever episodes, horizons and capacities: against a reference that walks the episodes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.replay_reference import differs, record, reference, store
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.data.replay_mixing import offline_positions
from vla_rl.data.returns import monte_carlo_returns

QUICK = settings(max_examples=60, deadline=None)
ends = st.sampled_from([(True, False), (False, True), (True, True)])
episode_lists = st.lists(st.tuples(st.integers(1, 12), ends), min_size=1, max_size=14)


def build(lengths_and_ends, capacity, gamma=0.9, **config):
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(ReplayConfig(capacity, gamma, **config), state_dim=2, action_dim=2)
    episodes = [record(i, length, end[0], end[1], rng) for i, (length, end) in enumerate(lengths_and_ends)]
    for episode in episodes:
        store(buffer, episode)
    return buffer, episodes


@QUICK
@given(episodes=episode_lists, capacity=st.integers(13, 80), horizon=st.integers(1, 15), gamma=st.floats(0.1, 0.99))
def test_samples_never_cross_an_episode_or_the_seam_and_every_stored_step_is_a_start(
    episodes, capacity, horizon, gamma
):
    buffer, recorded = build(episodes, capacity, gamma, reward_scale=2.0, reward_bias=-0.5)
    starts = buffer.starts(horizon)
    batch = buffer.batch(starts, horizon, prefixes=True)
    prefix = batch._asdict()
    kept = sorted({int(e) for e in batch.obs[:, 0]})
    assert kept == list(range(len(recorded) - len(kept), len(recorded)))  # the newest, without a gap
    found = sorted((int(e), int(t)) for e, t in batch.obs)
    assert found == [(e, t) for e in kept for t in range(len(recorded[e]))]
    for row, (e, t) in enumerate(batch.obs.astype(int)):
        episode = recorded[e]
        assert differs(batch, row, reference(episode, recorded[-1], t, horizon, buffer.config)) == []
        k = min(horizon, len(episode) - t)
        for i in range(horizon):
            shorter = reference(episode, recorded[-1], t, min(i + 1, k), buffer.config)
            got = prefix["prefix_reward"][row, i], prefix["prefix_discount"][row, i]
            assert np.allclose(got, (shorter["reward"], shorter["discount"]), atol=1e-5)
            assert prefix["prefix_next_obs"][row, i].tolist() == shorter["next_obs"].tolist()


@QUICK
@given(episodes=episode_lists, capacity=st.integers(13, 60))
def test_what_is_kept_is_as_much_as_whole_episodes_allow(episodes, capacity):
    """Only an episode's room at the end of the ring, and what one overwritten in part leaves, may stay unused."""
    buffer, recorded = build(episodes, capacity)
    rows = [len(e) + 1 for e in recorded]
    used = sum(rows[len(rows) - buffer.num_episodes :])
    assert used <= capacity
    if buffer.num_episodes < len(recorded):
        assert used >= capacity - 2 * max(rows) + 2
    assert len(buffer) == used - buffer.num_episodes


@QUICK
@given(episodes=episode_lists, horizon=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_draws_are_starts_and_every_start_is_reached(episodes, horizon, seed):
    buffer, _ = build(episodes, 200)
    starts = buffer.starts(horizon)
    drawn = buffer.sample(30 * len(starts), np.random.default_rng(seed), horizon=horizon).rows
    assert set(drawn) == set(starts.tolist()) or len(set(drawn)) > 0.99 * len(starts)


@QUICK
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    low=st.floats(-10, -0.1),
    gamma=st.floats(0.5, 0.99),
    policy=st.randoms(use_true_random=False),
)
def test_the_bound_of_a_cut_episode_is_never_above_the_return_of_the_whole(lengths, low, gamma, policy):
    """Cut an episode anywhere: the bound from what is left is at most the return that it had."""
    for length in lengths:
        rewards = np.array([policy.uniform(low, 1.0) for _ in range(length)])
        whole = monte_carlo_returns(rewards, terminated=False, gamma=gamma, reward_low=low)
        for cut in range(1, length + 1):
            bound = monte_carlo_returns(rewards[:cut], terminated=False, gamma=gamma, reward_low=low)
            assert (bound <= whole[:cut] + 1e-9).all()


@QUICK
@given(count=st.integers(0, 64), size=st.integers(1, 64))
def test_offline_rows_are_spread_evenly(count, size):
    count = min(count, size)
    where = offline_positions(size, count / size)
    assert where.sum() == count
    before = np.concatenate([[0], np.cumsum(where)])
    assert np.abs(before - np.arange(size + 1) * count / size).max() < 1  # so is any stretch of the minibatch
