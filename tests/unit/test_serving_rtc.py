"""Real-time chunking against hand-computed numbers, and that the prefix is followed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vla_rl.data.normalization import Normalizer
from vla_rl.flow.sampling import ode
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.protocols import Prefix, VelocityOutput
from vla_rl.serving.rtc import RTCConfig, continue_chunks, guidance_factor, guided_ode, prefix_weights

NO_PREFIX = Prefix(torch.zeros(1, 0, 0), torch.zeros(1, 0, dtype=torch.bool), torch.zeros(1, 0))


class LinearVelocity(nn.Module):
    """v = M x + b for a chunk [1, 2, 1]: everything can be computed by hand."""

    matrix = torch.tensor([[0.5, 0.25], [-0.5, 1.0]])
    offset = torch.tensor([0.1, -0.2])

    def velocity(self, prefix: Prefix, x_t: Tensor, flow_time: Tensor) -> VelocityOutput:
        return VelocityOutput((x_t[..., 0] @ self.matrix.T + self.offset)[..., None], x_t)


class GaussianActions(nn.Module):
    """The exact velocity of actions ~ N(mean, std^2), each step correlated with none: what a fitted policy would be."""

    mean, std = 0.3, 0.5

    def velocity(self, prefix: Prefix, x_t: Tensor, flow_time: Tensor) -> VelocityOutput:
        t = flow_time[:, None, None]
        variance = (1 - t) ** 2 * self.std**2 + t**2
        x0 = self.mean + (1 - t) * self.std**2 / variance * (x_t - (1 - t) * self.mean)
        noise = t / variance * (x_t - (1 - t) * self.mean)
        return VelocityOutput(noise - x0, x_t)


def test_weights_by_hand() -> None:
    # d = 2, e = 5: i = 2, 3, 4 have (d-1-i)/(e-d+1) + 1 = 3/4, 2/4, 1/4
    linear = [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    np.testing.assert_allclose(prefix_weights(7, 2, 5, "linear"), linear, rtol=1e-6)
    exponential = [w * (math.exp(w) - 1) / (math.e - 1) for w in linear]
    np.testing.assert_allclose(prefix_weights(7, 2, 5, "exponential"), exponential, rtol=1e-6)
    assert prefix_weights(7, 2, 5, "ones").tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert prefix_weights(7, 2, 5, "zeros").tolist() == [1, 1, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="delay 3, end 2"):
        prefix_weights(7, 3, 2)


def test_guidance_factor_by_hand() -> None:
    assert guidance_factor(1.0, 5.0) == 5.0
    assert guidance_factor(0.5, 5.0) == pytest.approx(2.0)  # (1/4 + 1/4) / (1/4)
    assert guidance_factor(0.2, 5.0) == pytest.approx(4.25)  # (0.04 + 0.64) / 0.16
    assert guidance_factor(0.2, 4.0) == 4.0
    tau = 0.7  # the paper's form, with tau = 1 - t
    paper = (1 - tau) / tau * (tau**2 + (1 - tau) ** 2) / (1 - tau) ** 2
    assert guidance_factor(1 - tau, 10.0) == pytest.approx(paper)


@pytest.mark.parametrize("jacobian", [True, False])
def test_two_steps_by_hand(jacobian: bool) -> None:
    policy, config = LinearVelocity(), RTCConfig(max_guidance=3.0, jacobian=jacobian)
    x = torch.tensor([0.4, -1.0])
    weights, target = torch.tensor([1.0, 0.5]), torch.tensor([2.0, -3.0])
    expected = x.clone()
    for t, factor in ((1.0, 3.0), (0.5, 2.0)):
        v = policy.matrix @ expected + policy.offset
        error = weights * (target - (expected - t * v))
        jac = torch.eye(2) - t * policy.matrix  # of D(x) = x - t v(x)
        guidance = jac.T @ error if jacobian else error
        expected = expected - (v - factor * guidance) / 2
    got = guided_ode(
        policy, NO_PREFIX, x.view(1, 2, 1), target.view(1, 2, 1), weights.view(1, 2, 1), config, num_steps=2
    )
    torch.testing.assert_close(got.flatten(), expected)


@pytest.mark.parametrize("jacobian", [True, False])
def test_the_prefix_is_followed_and_the_rest_is_free(jacobian: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x_1 = torch.randn(64, 8, 2, generator=generator)
    target = 0.3 + 0.5 * torch.randn(64, 8, 2, generator=generator)
    weights = prefix_weights(8, 3, 6, "exponential")[None, :, None]
    policy, prefix = GaussianActions(), NO_PREFIX
    got = guided_ode(policy, prefix, x_1, target, weights, RTCConfig(jacobian=jacobian), num_steps=10)
    plain = ode(policy, prefix, x_1, 10)
    error = (got - target).abs().mean(dim=(0, 2))
    before = (plain - target).abs().mean(dim=(0, 2))
    assert (error[:3] < 0.2 * before[:3]).all()  # frozen
    assert (error[3:6] < before[3:6]).all()
    assert (error[3:6].diff() > 0).all()  # softer and softer
    torch.testing.assert_close(got[:, 6:], plain[:, 6:])


def flow_mlp() -> FlowMLP:
    torch.manual_seed(0)
    policy = FlowMLP(FlowMLPConfig(state_dim=3, action_dim=2, action_horizon=6, width=16))
    policy.set_normalization(
        Normalizer("mean_std", torch.zeros(3), torch.ones(3)),
        Normalizer("mean_std", torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])),
    )
    return policy


def test_rows_with_and_without_a_prefix() -> None:
    policy = flow_mlp()
    generator = torch.Generator().manual_seed(1)
    x_1 = torch.randn(2, 6, 2, generator=generator)
    state = torch.randn(2, 3, generator=generator)
    prefix = Prefix(state[:, None], torch.ones(2, 1, dtype=torch.bool), state)
    planned = torch.randn(2, 6, 2, generator=generator)
    lengths, delays = torch.tensor([4, 0]), torch.tensor([2, 0])
    got = continue_chunks(policy, prefix, x_1, planned, lengths, delays, RTCConfig(), num_steps=5)
    plain = policy.unnormalize_actions(ode(policy, prefix, x_1, 5))
    assert torch.equal(got[0, :2], planned[0, :2])  # they will be executed, so they are returned as they were
    assert not torch.allclose(got[0, 2:4], plain[0, 2:4])
    torch.testing.assert_close(got[1], plain[1])
    assert all(p.grad is None for p in policy.parameters())
    assert not got.requires_grad


def test_config_is_checked() -> None:
    with pytest.raises(ValueError, match="schedule"):
        RTCConfig(schedule="cosine")
    with pytest.raises(ValueError, match="max_guidance"):
        RTCConfig(max_guidance=0.0)
