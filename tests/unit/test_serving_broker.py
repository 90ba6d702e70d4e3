"""Which action a tick gets, from chunks that come late, twice, in another order, or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from vla_rl.serving.broker import BrokerConfig, ChunkBroker

HZ = 10.0


def chunk(first: float, length: int = 8) -> np.ndarray:
    """Action i is (first + i, -(first + i))."""
    steps = first + np.arange(length, dtype=np.float32)
    return np.stack([steps, -steps], axis=1)


def broker(mode: str, **options: object) -> ChunkBroker:
    return ChunkBroker(BrokerConfig(control_hz=HZ, mode=mode, **options))


def first_of(actions: list[np.ndarray | None]) -> list[float | None]:
    return [None if a is None else float(a[0]) for a in actions]


def test_async_skips_what_is_past_and_starves_at_the_end() -> None:
    b = broker("async")
    assert b.action_at(4.9) is None
    b.offer(chunk(0), observed_at=5.0, sequence=0, now=5.0)
    assert first_of([b.action_at(5.0 + k / HZ) for k in range(3)]) == [0, 1, 2]
    assert b.offer(chunk(100), observed_at=5.0, sequence=1, now=5.3)
    assert first_of([b.action_at(5.0 + k / HZ) for k in range(3, 9)]) == [103, 104, 105, 106, 107, None]
    assert b.counts.starved == 2
    assert b.remaining(5.9) == 0


@pytest.mark.parametrize("mode", ["async", "ensemble", "rtc"])
def test_an_arm_that_has_held_begins_with_the_first_action(mode: str) -> None:
    b = broker(mode)
    assert b.action_at(5.0) is None
    b.offer(chunk(0), observed_at=5.0, sequence=0, now=5.3)  # it still stands where it was seen
    assert first_of([b.action_at(5.3 + k / HZ) for k in range(9)]) == [0, 1, 2, 3, 4, 5, 6, 7, None]
    b.offer(chunk(10), observed_at=6.0, sequence=1, now=6.2)  # captured while it moved: the plan ended at 6.1
    assert first_of([b.action_at(6.2), *(b.action_at(6.3 + k / HZ) for k in range(6))]) == [12, *range(13, 18), None]
    b.offer(chunk(20), observed_at=6.8, sequence=2, now=7.0)
    assert first_of([b.action_at(7.0), b.action_at(7.1)]) == [20, 21]
    b.flush(7.2)
    b.offer(chunk(30), observed_at=7.25, sequence=3, now=7.4)
    assert first_of([b.action_at(7.4)]) == [30]
    b.flush(7.5)
    assert not b.offer(chunk(40), observed_at=7.5, sequence=4, now=8.4)  # too old to act on, whatever the arm did


def test_rounding_of_the_clock_repeats_no_action() -> None:
    b = broker("async")
    b.offer(chunk(0, 50), observed_at=0.0, sequence=0, now=0.0)
    assert first_of([b.action_at(k * 0.1) for k in range(50)]) == list(range(50))


def test_async_follows_the_newest_chunk_at_its_own_time() -> None:
    b = broker("async")
    b.offer(chunk(0), 0.1, 0, now=0.1)
    assert first_of([b.action_at(0.1), b.action_at(0.2)]) == [0, 1]
    b.offer(chunk(100), 0.1, 1, now=0.3)
    assert b.action_at(0.3)[0] == 102


def test_sync_begins_where_the_arm_stands_and_plays_the_execution_horizon() -> None:
    b = broker("sync", execution_horizon=3)
    b.offer(chunk(0), observed_at=0.0, sequence=0, now=0.55)
    assert first_of([b.action_at(0.6 + k / HZ) for k in range(4)]) == [0, 1, 2, None]


def test_ensemble_weighs_by_age_oldest_most() -> None:
    b = broker("ensemble", ensemble_decay=0.5)
    b.offer(chunk(0), 0.0, 0, now=0.0)
    b.action_at(0.0)
    b.offer(chunk(10), 0.1, 1, now=0.1)
    b.offer(chunk(20), 0.2, 2, now=0.2)
    w = np.exp(-0.5 * np.arange(3))
    expected = (w * [3, 12, 21]).sum() / w.sum()
    np.testing.assert_allclose(b.action_at(0.3), [expected, -expected], rtol=1e-6)
    expected = (w[:2] * [17, 26]).sum() / w[:2].sum()  # the oldest has ended: the next one is i = 0 now
    np.testing.assert_allclose(b.action_at(0.85), [expected, -expected], rtol=1e-6)


def test_late_duplicated_reordered_and_dropped_are_counted() -> None:
    b = broker("async")
    assert b.offer(chunk(0), 0.0, 3, now=0.1)
    assert b.action_at(0.1)[0] == 0
    assert not b.offer(chunk(0), 0.0, 3, now=0.1)
    assert b.offer(chunk(0), 0.4, 6, now=0.5)  # 4 and 5 are missing
    assert b.counts.dropped == 2
    assert not b.offer(chunk(50), 0.3, 5, now=0.5)  # there it is, too late to be used
    assert not b.offer(chunk(50), -0.3, 1, now=0.5)
    assert not b.offer(chunk(70), 0.6, 7, now=0.6 + 8 / HZ)
    c = b.counts
    assert (c.accepted, c.duplicated, c.reordered, c.dropped, c.late) == (2, 1, 2, 1, 1)
    assert b.action_at(0.6)[0] == 2


def test_late_without_a_time_of_arrival_is_told_by_the_last_tick() -> None:
    b = broker("async")
    b.action_at(10.0)
    assert not b.offer(chunk(0), 9.0, 0)
    assert b.offer(chunk(0), 9.5, 1)
    assert b.counts.late == 1


def test_a_flush_forgets_the_plan_and_the_replies_under_way() -> None:
    b = broker("rtc")
    b.offer(chunk(0), 0.0, 0, now=0.1)
    b.flush(now=0.2)
    assert b.action_at(0.2) is None
    assert not b.offer(chunk(0), 0.1, 1, now=0.3)
    assert b.offer(chunk(0), 0.3, 2, now=0.4)
    assert b.action_at(0.4)[0] == 0


def test_prefix_and_delay_for_real_time_chunking() -> None:
    b = broker("rtc", num_delays=20)
    assert b.prefix(0.0) is None
    assert b.delay_steps() == 0
    b.offer(chunk(0), 0.0, 0, now=0.12)
    b.action_at(0.0)
    np.testing.assert_array_equal(b.prefix(0.5), chunk(5, 3))
    assert b.prefix(0.8) is None
    assert b.continuation(0.5)["delay"] == 2
    np.testing.assert_array_equal(b.continuation(0.5)["prefix"], chunk(5, 3))
    assert b.continuation(0.7)["delay"] == 1  # no more than there is
    assert b.continuation(0.8) == {}
    assert broker("async").continuation(0.5) == {}
    for k in range(1, 21):  # nineteen of 0.22 s and one of 0.7 s, which alone would be 7 steps
        b.offer(chunk(0), float(k), k, now=k + (0.22 if k != 7 else 0.7))
    assert b.delay_steps() == 3


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="sync, async"):
        BrokerConfig(10.0, mode="fast")
    b = broker("async")
    with pytest.raises(ValueError, match=r"\[H, A\]"):
        b.offer(np.zeros(3), 0.0, 0)
    b.offer(chunk(0), 0.0, 0)
    with pytest.raises(ValueError, match="3 actions after one of 2"):
        b.offer(np.zeros((4, 3)), 0.1, 1)
