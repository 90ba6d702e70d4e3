"""Re-rank, ascend and select against values that can be worked out by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from vla_rl.offpolicy.improvement import ImprovementConfig, ascend, improve, rerank, select

KEY = jax.random.key(0)
OBS = jnp.zeros((2, 1))


def chunks(values: list[list[float]]) -> Array:
    """Numbers [N, B] as chunks [N, B, 1, 1]."""
    return jnp.asarray(values)[:, :, None, None]


def first_action(obs: Array, candidates: Array) -> Array:
    """Q(s, a) = s + a."""
    return obs[:, 0] + candidates[:, :, 0, 0]


def test_rerank_keeps_the_top_of_each_row_best_first() -> None:
    candidates = chunks([[0.1, 0.9], [0.5, -0.2], [0.3, 0.4], [-0.7, 0.8]])
    kept, values = rerank(first_action, jnp.asarray([[10.0], [20.0]]), candidates, 2)
    np.testing.assert_allclose(kept[..., 0, 0], [[0.5, 0.9], [0.3, 0.8]])
    np.testing.assert_allclose(values, [[10.5, 20.9], [10.3, 20.8]], rtol=1e-6)


def test_rerank_refuses_to_keep_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="cannot keep 3 of 2"):
        rerank(first_action, OBS, chunks([[0.0, 0.0], [0.0, 0.0]]), 3)


def test_ascent_on_a_parabola_is_the_closed_form() -> None:
    """Q = -(a - 0.5)^2: a step of size e maps the distance d to (1 - 2e) d."""

    def q(obs: Array, candidates: Array) -> Array:
        return -jnp.square(candidates - 0.5).sum(axis=(2, 3)) + 0.0 * obs[:, 0]

    best, values = ascend(q, OBS, chunks([[0.0, 1.0]]), num_steps=3, step_size=0.1)
    distance = 0.5 * 0.8**3
    np.testing.assert_allclose(best[0, :, 0, 0], [0.5 - distance, 0.5 + distance], rtol=1e-6)
    np.testing.assert_allclose(values[0], [-(distance**2)] * 2, rtol=1e-5)


def test_ascent_keeps_the_best_iterate_where_the_last_is_worse() -> None:
    """Q = cos(8a) from 0.2: one step of 0.05 crosses the peak at 0 to -0.2, then oscillates; 0.3 is thrown further."""

    def q(obs: Array, candidates: Array) -> Array:
        return jnp.cos(8.0 * candidates).sum(axis=(2, 3)) + 0.0 * obs[:, 0]

    step, start = 0.05, np.asarray([0.2, 0.3])
    iterates = [start]
    for _ in range(5):
        iterates.append(np.clip(iterates[-1] - step * 8.0 * np.sin(8.0 * iterates[-1]), -1.0, 1.0))
    by_hand = np.cos(8.0 * np.stack(iterates))
    assert (by_hand.max(axis=0) > by_hand[-1] + 0.05).any()  # else this test could not tell the two apart
    best, values = ascend(q, OBS, chunks([start.tolist()]), num_steps=5, step_size=step)
    np.testing.assert_allclose(values[0], by_hand.max(axis=0), atol=1e-5)
    np.testing.assert_allclose(jnp.cos(8.0 * best[0, :, 0, 0]), by_hand.max(axis=0), atol=1e-5)


def test_ascent_stays_within_bounds() -> None:
    best, values = ascend(first_action, OBS, chunks([[0.9, -3.0]]), num_steps=10, step_size=0.05)
    np.testing.assert_allclose(best[0, :, 0, 0], [1.0, -0.5], atol=1e-6)
    np.testing.assert_allclose(values[0], [1.0, -0.5], atol=1e-6)


def test_softmax_selection_draws_with_the_probabilities_of_q() -> None:
    candidates = jnp.broadcast_to(chunks([[0.0], [1.0]]), (2, 4000, 1, 1))
    values = jnp.broadcast_to(jnp.asarray([[0.0], [0.5 * np.log(3.0)]]), (2, 4000))
    chosen, of_chosen = select(candidates, values, KEY, "softmax", temperature=0.5)
    assert float(chosen.mean()) == pytest.approx(0.75, abs=0.03)  # e^(ln 3) : 1
    np.testing.assert_array_equal(np.asarray(of_chosen) > 0, np.asarray(chosen[:, 0, 0]) > 0.5)


def test_improve_is_rerank_then_ascent_then_argmax() -> None:
    config = ImprovementConfig(num_candidates=3, num_kept=1, num_steps=4, step_size=0.01)
    best, values = improve(first_action, OBS, chunks([[0.0, 0.3], [0.2, -2.0], [-5.0, 0.1]]), config, KEY)
    np.testing.assert_allclose(best[:, 0, 0], [0.24, 0.34], atol=1e-6)
    np.testing.assert_allclose(values, [0.24, 0.34], atol=1e-6)
    without = dataclasses.replace(config, num_steps=0)
    np.testing.assert_allclose(improve(first_action, OBS, chunks([[0.0, 0.3]]), without, KEY)[1], [0.0, 0.3], atol=1e-7)


def test_config_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="num_kept <= num_candidates"):
        ImprovementConfig(num_candidates=4, num_kept=5)
    with pytest.raises(ValueError, match="temperature > 0"):
        ImprovementConfig(temperature=0.0)
