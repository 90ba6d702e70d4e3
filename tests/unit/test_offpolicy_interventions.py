"""A person's interventions: what is executed, what is learned from, in both buffers."""

from __future__ import annotations

import numpy as np
import pytest

from vla_rl.core import Source
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.offpolicy.interventions import copy_interventions


def buffer() -> ReplayBuffer:
    return ReplayBuffer(ReplayConfig(capacity=100, gamma=0.9), state_dim=1, action_dim=1)


def add(online: ReplayBuffer, by_human: list[int], *, terminated: bool, observed: list[bool] | None = None) -> None:
    """Six steps; step t has state t, executed action 10 + t, proposal 20 + t, reward t."""
    t = np.arange(6.0)
    online.add_episode(
        state=np.arange(7.0)[:, None], actions=10 + t[:, None], proposals=20 + t[:, None], rewards=t,
        terminated=terminated, truncated=not terminated, success=terminated, instruction="push", observed=observed,
        source=np.where(np.isin(t, by_human), Source.HUMAN, Source.POLICY),
    )  # fmt: skip


def test_stretches_of_a_person_become_demonstrations_and_stay_online() -> None:
    online, demos = buffer(), buffer()
    add(online, [], terminated=True)
    add(online, [2, 3, 5], terminated=True)
    assert copy_interventions(online, demos) == 2
    assert len(online) == 12
    assert (demos.num_episodes, len(demos)) == (2, 3)
    (first, rows), (last, _) = demos.finished_episodes()
    assert rows == 3
    np.testing.assert_array_equal(demos.rows.obs[first : first + 3, 0], [2, 3, 4])
    np.testing.assert_array_equal(demos.rows.actions[first : first + 2, 0], [12, 13])
    np.testing.assert_array_equal(demos.rows.proposals[first : first + 2, 0], [22, 23])
    assert (demos.rows.source[first : first + 2] == Source.HUMAN).all()
    assert (demos.rows.truncated[first + 1], demos.rows.terminated[first + 1]) == (True, False)
    assert (demos.rows.truncated[last], demos.rows.terminated[last]) == (False, True)
    assert demos.instruction(first) == "push"


def test_a_chunk_of_an_intervention_ends_where_the_policy_takes_over_again() -> None:
    online, demos = buffer(), buffer()
    add(online, [2, 3], terminated=False)
    copy_interventions(online, demos)
    batch = demos.sample(64, np.random.default_rng(0), horizon=4)
    from_two = np.flatnonzero(batch.obs[:, 0] == 2)[0]
    assert batch.reward[from_two] == pytest.approx(2 + 0.9 * 3)
    assert batch.discount[from_two] == pytest.approx(0.81)
    assert batch.next_obs[from_two, 0] == 4
    assert batch.mask[from_two].tolist() == [True, True, False, False]
    assert set(batch.actions.ravel().tolist()) <= {12.0, 13.0}


def test_each_episode_is_copied_once() -> None:
    online, demos = buffer(), buffer()
    add(online, [0], terminated=False)
    since = copy_interventions(online, demos)
    add(online, [1, 2], terminated=False)
    assert copy_interventions(online, demos, since=since) == 2
    assert [count for _, count in demos.finished_episodes()] == [2, 3]


def test_stretches_begin_and_end_at_observed_rows() -> None:
    online, demos = buffer(), buffer()
    observed = [True, False, True, False, True, False, True]  # decisions every second step
    add(online, [1, 2, 3, 4], terminated=False, observed=observed)
    add(online, [3], terminated=False, observed=observed)
    copy_interventions(online, demos)
    assert demos.num_episodes == 1
    np.testing.assert_array_equal(demos.rows.actions[:2, 0], [12, 13])
