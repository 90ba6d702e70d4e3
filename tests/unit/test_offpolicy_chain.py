"""Chunked TD against closed forms: a deterministic chain, and a two-state MDP with behaviour of mixed quality.

The critics are tables, so nothing is approximated: batches are the replay buffer's, targets are `td_targets`, the
target table follows by `polyak`. What is left to be wrong is the arithmetic of chunks.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_rl.data.replay import ReplayBatch, ReplayBuffer, ReplayConfig
from vla_rl.offpolicy.critics import successors, td_targets
from vla_rl.offpolicy.train_state import TrainState, polyak

GAMMA, LENGTH, TAU = 0.99, 100, 0.005
Ending = Literal["terminated", "truncated", "both"]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# ---------------------------------------------------------------------------------------------------------- the chain
def _chain(horizon: int, ending: Ending, prefixes: bool = False) -> ReplayBatch:
    """A chunk from every start of a chain of 100 steps with reward -1; a state's observation is its index.

    Where the 100 steps are a truncation, a second episode shows what follows: 50 more steps and a termination.
    """
    buffer = ReplayBuffer(ReplayConfig(capacity=400, gamma=GAMMA), state_dim=1, action_dim=1)
    pieces = [(0, LENGTH, ending != "truncated", ending != "terminated")]
    if ending == "truncated":
        pieces.append((LENGTH, LENGTH + 50, True, False))
    for first, last, terminated, truncated in pieces:
        steps = last - first
        buffer.add_episode(
            state=np.arange(first, last + 1)[:, None],
            actions=np.zeros((steps, 1)),
            rewards=-np.ones(steps),
            terminated=terminated,
            truncated=truncated,
        )
    return buffer.batch(buffer.starts(horizon), horizon, prefixes)


def _analytic(ending: Ending) -> np.ndarray:
    """V of every state with an action to take: -(1 - gamma^n) / (1 - gamma) with n steps to the termination."""
    total = LENGTH + (50 if ending == "truncated" else 0)
    return -(1.0 - GAMMA ** (total - np.arange(total))) / (1.0 - GAMMA)


def _sweep(batch: ReplayBatch, num_sweeps: int, tau: float, num_prefixes: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The table of Q [S, P] after sweeps over all starts, and V(s_0) after each sweep.

    A start of weight 0 is never trained. S is one more than the states that have an action, for the final one.
    """
    starts = jnp.asarray(batch.obs[:, 0], int)
    following = successors(batch, num_prefixes)[:, 0].astype(int)
    weights = td_targets(batch, jnp.zeros(following.shape), num_prefixes)[1]

    def sweep(state: TrainState, _: object) -> tuple[TrainState, jax.Array]:
        next_values = state.params["target_critic"][following, -1]
        targets, _ = td_targets(batch, next_values, num_prefixes)
        table = state.params["critic"]
        table = table.at[starts].set(jnp.where(weights > 0, targets, table[starts]))
        state = state._replace(params={**state.params, "critic": table})
        return polyak(state, "critic", "target_critic", tau), table[0, -1]

    zeros = jnp.zeros((len(np.unique(batch.obs)) + 1, num_prefixes))
    state = TrainState({"critic": zeros, "target_critic": zeros}, {}, jax.random.key(0), jnp.zeros((), int))
    state, values = jax.lax.scan(sweep, state, None, length=num_sweeps)
    return np.asarray(state.params["critic"]), np.asarray(values)


def _sweeps_to_ten_percent(horizon: int) -> int:
    values = _sweep(_chain(horizon, "terminated"), 20_000, TAU)[1]
    true = _analytic("terminated")[0]
    return int(np.argmax(np.abs(values - true) <= 0.1 * abs(true))) + 1


def test_a_chunk_of_h_steps_learns_h_times_faster():
    sweeps = {h: _sweeps_to_ten_percent(h) for h in (1, 5, 10)}

    assert 16_700 < sweeps[1] < 16_900
    assert 4.9 < sweeps[1] / sweeps[5] < 5.1
    assert 9.7 < sweeps[1] / sweeps[10] < 9.9


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both"])
@pytest.mark.parametrize("horizon", [1, 5, 10])
def test_the_fixed_point_is_the_analytic_value_from_every_start(horizon: int, ending: Ending):
    table, _ = _sweep(_chain(horizon, ending), 200, tau=1.0)

    np.testing.assert_allclose(table[:-1, 0], _analytic(ending), rtol=1e-6)


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both"])
def test_the_fixed_point_of_every_prefix_is_the_analytic_value_too(ending: Ending):
    table, _ = _sweep(_chain(5, ending, prefixes=True), 200, tau=1.0, num_prefixes=5)

    np.testing.assert_allclose(table[:-1], np.repeat(_analytic(ending)[:, None], 5, axis=1), rtol=1e-6)


# ---------------------------------------------------------------------------- the same with the field's bugs: they fail
@pytest.mark.parametrize(("horizon", "worst"), [(5, 3.75), (10, 7.81)])
def test_dropping_partial_chunks_leaves_the_last_starts_untrained(horizon: int, worst: float):
    batch = _chain(horizon, "terminated")
    buggy = batch._replace(weight=batch.weight * batch.mask.all(axis=1))

    error = np.abs(_sweep(buggy, 200, tau=1.0)[0][:-1, 0] - _analytic("terminated"))

    dead = slice(LENGTH - horizon + 1, LENGTH)
    np.testing.assert_allclose(error[dead], np.abs(_analytic("terminated")[dead]), rtol=1e-6)
    # they are bootstrapped from, so the error spreads to starts that are trained
    assert error[: LENGTH - horizon].max() == pytest.approx(worst, abs=0.02)


def test_dropping_the_prefixes_past_the_end_leaves_the_longest_untrained():
    batch = _chain(5, "terminated", prefixes=True)
    buggy = batch._replace(prefix_mask=batch.prefix_mask & batch.mask)

    error = np.abs(_sweep(buggy, 200, tau=1.0, num_prefixes=5)[0][:-1] - _analytic("terminated")[:, None])

    assert error[:, -1].max() > 3.5
    assert error[: LENGTH - 5].max() > 1.0


def test_gamma_to_the_h_for_a_partial_chunk_moves_the_fixed_point():
    batch = _chain(10, "truncated")
    buggy = batch._replace(discount=np.where(batch.discount > 0, GAMMA**10, 0.0))

    error = np.abs(_sweep(buggy, 200, tau=1.0)[0][:-1, 0] - _analytic("truncated"))

    # one step before the truncation: (gamma - gamma^10) * |V(s_100)| with V(s_100) = -39.5
    assert error[LENGTH - 1] == pytest.approx((GAMMA - GAMMA**10) * 39.4994, abs=1e-3)


def test_a_truncation_taken_for_a_termination_moves_the_fixed_point():
    batch = _chain(5, "truncated")
    buggy = batch._replace(discount=batch.discount * batch.mask.all(axis=1))

    error = np.abs(_sweep(buggy, 200, tau=1.0)[0][:-1, 0] - _analytic("truncated"))

    assert error[LENGTH - 1] == pytest.approx(GAMMA * 39.4994, abs=1e-3)


# ------------------------------------------------------------------------ n-step returns and behaviour of mixed quality
# State 0 leads to state 1 whatever is done, for nothing; state 1 leads back, and its good action (+1) earns 1. The
# behaviour takes the good one a quarter of the time. The best policy always does: V(0) = gamma / (1 - gamma^2).
GOOD_SHARE, DISCOUNT = 0.25, 0.9


def _two_state_values(key_steps: int) -> np.ndarray:
    """Greedy V of both states at the fixed point of tabular Q(s, first `key_steps` actions) with two-step targets.

    `key_steps` 2 is chunked Q-learning, 1 is n-step Q-learning. Only whole chunks are in the data.
    """
    buffer = ReplayBuffer(ReplayConfig(capacity=200, gamma=DISCOUNT), state_dim=1, action_dim=1)
    steps = 80
    states = np.arange(steps + 1) % 2
    good_at_1 = np.arange(steps) // 2 % 4 == 0  # every fourth visit of state 1
    first_half = np.arange(steps) // 8 % 2 == 0  # state 0: both actions, equally often before good and bad ones
    actions = np.where(states[:-1] == 1, np.where(good_at_1, 1.0, -1.0), np.where(first_half, 1.0, -1.0))
    buffer.add_episode(
        state=states[:, None],
        actions=actions[:, None],
        rewards=(states[:-1] == 1) & (actions > 0),
        terminated=False,
        truncated=True,
    )
    batch = buffer.batch(buffer.starts(2)[:-1], 2)
    assert batch.mask.all()
    state, following = (jnp.asarray(obs[:, 0], int) for obs in (batch.obs, batch.next_obs))
    bits = (batch.actions[:, :key_steps, 0] > 0).astype(int)
    key = jnp.asarray(bits @ 2 ** np.arange(key_steps))
    counts = jnp.zeros((2, 2**key_steps)).at[state, key].add(1.0)
    assert (counts > 0).all()

    def sweep(values: jax.Array, _: None) -> tuple[jax.Array, None]:
        targets = td_targets(batch, values[following], 1)[0][:, 0]
        q = jnp.zeros_like(counts).at[state, key].add(targets) / counts
        return q.max(axis=1), None

    return np.asarray(jax.lax.scan(sweep, jnp.zeros(2), None, length=300)[0])


def test_a_chunked_critic_has_no_bias_under_mixed_behaviour():
    loop = 1.0 / (1.0 - DISCOUNT**2)

    np.testing.assert_allclose(_two_state_values(key_steps=2), [DISCOUNT * loop, loop], rtol=1e-6)


def test_an_n_step_critic_has_exactly_the_bias_of_the_behaviour():
    loop = 1.0 / (1.0 - DISCOUNT**2)

    values = _two_state_values(key_steps=1)

    # from state 0 the second reward is the behaviour's, not the best policy's
    assert values[0] == pytest.approx(GOOD_SHARE * DISCOUNT * loop, rel=1e-6)
    assert values[0] - DISCOUNT * loop == pytest.approx(-0.75 * DISCOUNT * loop, rel=1e-6)
    # from state 1 the second reward is 0 whatever is done: no bias
    assert values[1] == pytest.approx(loop, rel=1e-6)
