"""GAE over chunks against an O(T^2) reference that walks single control steps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_rl.core import chunk_discount, chunk_reward
from vla_rl.onpolicy.advantages import explained_variance, gae, normalize_advantages

GAMMA, LAMBDA = 0.97, 0.9


def reference(rewards, executed, terminated, ended, values, next_values, gamma, gae_lambda):
    """A_t = sum over later decisions of lambda^(j-t) gamma^(steps between) delta_j, up to the episode's end.

    Everything is written with single steps: rewards are discounted step by step, and gamma^k comes from counting.
    """
    t_max, n = values.shape
    advantages = torch.zeros(t_max, n, dtype=torch.float64)
    for i in range(n):
        for t in range(t_max):
            weight = 1.0
            for j in range(t, t_max):
                discount, total = 1.0, 0.0
                for reward, done in zip(rewards[j, i].tolist(), executed[j, i].tolist(), strict=True):
                    if done:
                        total += discount * reward
                        discount *= gamma
                bootstrap = 0.0 if terminated[j, i] else discount * float(next_values[j, i])
                advantages[t, i] += weight * (total + bootstrap - float(values[j, i]))
                if ended[j, i]:
                    break
                weight *= discount * gae_lambda
    return advantages


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 6), gae_lambda=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_against_the_quadratic_reference(seed, steps, gae_lambda):
    rng = torch.Generator().manual_seed(seed)
    t, n = 7, 3
    rewards = torch.randn(t, n, steps, generator=rng)
    terminated = torch.rand(t, n, generator=rng) < 0.2
    truncated = torch.rand(t, n, generator=rng) < 0.2
    ended = terminated | truncated
    length = torch.where(ended, torch.randint(1, steps + 1, (t, n), generator=rng), steps)
    executed = torch.arange(steps) < length[..., None]
    values, next_values = torch.randn(2, t, n, generator=rng)
    chunk_rewards = chunk_reward(rewards.flatten(0, 1), executed.flatten(0, 1), GAMMA).view(t, n)
    discounts = chunk_discount(executed.flatten(0, 1), terminated.flatten(), GAMMA).view(t, n)
    advantages, targets = gae(chunk_rewards, discounts, values, next_values, ended, gae_lambda)
    expected = reference(rewards, executed, terminated, ended, values, next_values, GAMMA, gae_lambda)
    torch.testing.assert_close(advantages.double(), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(targets, advantages + values)


def test_lambda_one_is_the_discounted_return_and_chunks_do_not_matter():
    """An episode in chunks of 2 has, at its decisions, the advantages of the same episode in chunks of 1."""
    rewards = torch.tensor([0.0, 1.0, -0.5, 2.0, 0.0, 3.0])
    found = {}
    for k in (1, 2, 3):
        chunks = rewards.view(-1, k)
        executed = torch.ones_like(chunks, dtype=torch.bool)
        terminated = torch.zeros(len(chunks), dtype=torch.bool)
        terminated[-1] = True
        values = torch.zeros(len(chunks), 1)
        found[k], _ = gae(
            chunk_reward(chunks, executed, GAMMA)[:, None],
            chunk_discount(executed, terminated, GAMMA)[:, None],
            values,
            values,
            terminated[:, None],
            1.0,
        )
    expected = sum(r * GAMMA**i for i, r in enumerate(rewards.tolist()))
    assert found[1][0].item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(found[2], found[1][::2])
    torch.testing.assert_close(found[3], found[1][::3])


def test_truncation_bootstraps_and_termination_does_not():
    one = torch.ones(1, 1)
    for terminated, expected in ((False, 1.0 + GAMMA**3 * 5.0 - 2.0), (True, 1.0 - 2.0)):
        executed, flag = torch.tensor([[True, True, True, False]]), torch.tensor([terminated])
        discount = chunk_discount(executed, flag, GAMMA)[:, None]
        advantage, _ = gae(one, discount, 2 * one, 5 * one, torch.tensor([[True]]), LAMBDA)
        assert advantage.item() == pytest.approx(expected, abs=1e-6)


def test_normalisation_ignores_invalid_entries():
    advantages = torch.tensor([[1.0, 2.0, 100.0], [3.0, 4.0, -100.0]])
    valid = torch.tensor([[True, True, False], [True, True, False]])
    scaled = normalize_advantages(advantages, valid)
    assert scaled[valid].mean().abs() < 1e-6
    assert scaled[valid].std().item() == pytest.approx(1.0, abs=1e-5)
    assert (scaled[~valid] == 0).all()


def test_explained_variance():
    target = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(target, target) == 1.0
    assert explained_variance(torch.zeros(3), target) == pytest.approx(0.0)
    assert math.isnan(explained_variance(target, torch.ones(3)))
