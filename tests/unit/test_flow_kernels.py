"""Schedules and transition kernels against closed forms: identities, step stds, point mass, Gaussian, mixture."""

import itertools
import math

import pytest
import torch

from vla_rl.flow import FlowSamplerConfig, data_estimate, kernel_table, noise_estimate, ode, sample_chain
from vla_rl.flow.sampling import draw_step_index

KERNELS = ("ode", "flow_sde", "ou", "cps")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------ coefficients
def test_grid_and_first_step_std():
    table = kernel_table("flow_sde", 4, 0.5)
    assert table.flow_time.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    torch.testing.assert_close(
        table.std, torch.tensor([0.5, 0.433013, 0.25, 0.144338], dtype=torch.float64), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10, 100])
def test_flow_sde_std_is_a_then_a_sqrt_of_what_is_left(num_steps):
    a, std = 0.7, kernel_table("flow_sde", num_steps, 0.7).std
    assert std[0].item() == pytest.approx(a, abs=1e-15)  # for every K
    for k in range(1, num_steps):
        assert std[k].item() == pytest.approx(a * math.sqrt((1 - k / num_steps) / k), rel=1e-12)


@pytest.mark.parametrize("num_steps", [2, 4, 9])
@pytest.mark.parametrize("kernel", ["ou", "cps"])
def test_last_step_of_ou_and_cps_is_deterministic_and_all_is_finite(kernel, num_steps):
    table = kernel_table(kernel, num_steps, 0.5)
    assert table.std[-1] == 0.0
    assert (table.std[:-1] > 0).all()
    for values in vars(table).values():
        assert torch.isfinite(values).all()
    assert num_steps - 1 not in FlowSamplerConfig(kernel=kernel, num_steps=num_steps).stochastic_steps


def test_rlinf_schedule_values():
    std = kernel_table("flow_sde", 3, 0.5).std
    torch.testing.assert_close(std, torch.tensor([0.5, 0.408248, 0.204124], dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_steps", [1, 3, 4, 7])
def test_both_forms_of_the_mean_agree(kernel, num_steps):
    table = kernel_table(kernel, num_steps, 0.5)
    x, v = torch.randn(2, 50, dtype=torch.float64, generator=generator())
    for k in range(num_steps):
        t = table.flow_time[k]
        estimates = table.data_weight[k] * data_estimate(x, v, t) + table.noise_weight[k] * noise_estimate(x, v, t)
        torch.testing.assert_close(
            table.state_weight[k] * x + table.velocity_weight[k] * v, estimates, atol=1e-12, rtol=0
        )
        if kernel == "ode":
            torch.testing.assert_close(estimates, x - v / num_steps, atol=1e-12, rtol=0)


def test_euler_maruyama_is_the_flow_grpo_step():
    a, num_steps = 0.6, 5
    table, dt = kernel_table("flow_sde", num_steps, a), -1.0 / num_steps
    x, v = torch.randn(2, 50, dtype=torch.float64, generator=generator())
    for k in range(num_steps):
        t = table.flow_time[k].item()
        sigma2 = a**2 * t / (1 - (t if t < 1 else 1 - 1 / num_steps))
        expected = x * (1 + sigma2 / (2 * t) * dt) + v * (1 + sigma2 * (1 - t) / (2 * t)) * dt
        torch.testing.assert_close(
            table.state_weight[k] * x + table.velocity_weight[k] * v, expected, atol=1e-12, rtol=0
        )


def test_c1_convention_gives_the_same_chain():
    """tau = 1 - t, v -> -v: dx = [v - sigma^2/(2(1-tau)) (x - tau v)] dtau + sigma dW, sigma^2 = a^2 (1-tau)/tau."""
    a, num_steps, c = 0.5, 6, 0.3
    x_1 = torch.randn(64, 3, 2, dtype=torch.float64, generator=generator())
    config = FlowSamplerConfig(num_steps=num_steps, mode="full", noise_level=a)
    ours, _ = sample_chain(lambda p, x, t: torch.tanh(x) - c * t[:, None, None], None, x_1, config, generator(1))
    rng, x = generator(1), x_1
    for k in range(num_steps):
        tau, delta = k / num_steps, 1 / num_steps
        v = -(torch.tanh(x) - c * (1 - tau))
        sigma2 = a**2 * (1 - tau) / (tau if tau > 0 else 1 / num_steps)
        xi = torch.randn(x.shape, dtype=torch.float64, generator=rng)
        x = x + (v - sigma2 / (2 * (1 - tau)) * (x - tau * v)) * delta + math.sqrt(sigma2 * delta) * xi
    torch.testing.assert_close(ours, x, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", ["flow_sde", "cps"])
@pytest.mark.parametrize("mode", ["full", "hybrid"])
def test_small_noise_approaches_the_ode_linearly(kernel, mode):
    x_1 = torch.randn(128, 2, 2, dtype=torch.float64, generator=generator())

    def velocity(prefix, x, t):
        return torch.tanh(x) + 0.2 * t[:, None, None]

    target = ode(velocity, None, x_1, 4)
    errors = []
    for level in (1e-3, 1e-4, 1e-5):
        config = FlowSamplerConfig(kernel=kernel, mode=mode, noise_level=level)
        actions, trace = sample_chain(velocity, None, x_1, config, generator(3))
        assert torch.isfinite(trace.log_prob).all()
        errors.append((actions - target).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.05)


def test_small_noise_of_ou_leaves_only_a_fresh_start():
    """At t = 1 the odds are infinite, so rho is 0 there for every a > 0: the first step draws its noise anew, in the
    same distribution. The other steps approach the ODE linearly."""
    coarse, fine = kernel_table("ou", 5, 1e-3), kernel_table("ou", 5, 1e-4)
    assert coarse.std[0] == fine.std[0] == 0.8
    torch.testing.assert_close(
        coarse.std[1:4] / fine.std[1:4], torch.full((3,), 10.0, dtype=torch.float64), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(fine.noise_weight[1:], kernel_table("ode", 5).noise_weight[1:], rtol=0, atol=1e-7)


# -------------------------------------------------------------------------------------------------- exact marginals
@pytest.mark.parametrize("num_steps", [2, 4, 11])
@pytest.mark.parametrize("level", [0.3, 0.9])
@pytest.mark.parametrize("kernel", ["ou", "cps"])
def test_point_mass_is_exact(kernel, num_steps, level):
    """v = (x - c)/t; the law at t is N((1-t)c, t^2), and the recursion must stay on it."""
    table, c = kernel_table(kernel, num_steps, level), 0.4
    for k in range(num_steps):
        t, following = table.flow_time[k], table.flow_time[k + 1]
        slope = table.state_weight[k] + table.velocity_weight[k] / t
        mean = slope * (1 - t) * c - table.velocity_weight[k] / t * c
        variance = (slope * t) ** 2 + table.std[k] ** 2
        assert abs(mean - (1 - following) * c) < 1e-12
        assert abs(variance - following**2) < 1e-12


@pytest.mark.parametrize("num_steps", [1, 4, 30])
def test_point_mass_excess_of_euler_maruyama(num_steps):
    a, delta = 0.5, 1 / num_steps
    table = kernel_table("flow_sde", num_steps, a)
    for k in range(num_steps):
        t = table.flow_time[k]
        left = max(1 - t.item(), delta)
        slope = table.state_weight[k] + table.velocity_weight[k] / t
        excess = (slope * t) ** 2 + table.std[k] ** 2 - table.flow_time[k + 1] ** 2
        assert excess.item() == pytest.approx(delta**2 * (a**2 / left + a**4 / (4 * left**2)), abs=1e-12)


def gaussian_terminal(kernel, num_steps, data_std, level=0.5, mean=0.7, only_step=None):
    """Mean and std of the chain's end for data N(mean, data_std^2), by the exact linear recursion.

    `only_step`: the hybrid chain that is stochastic at this step alone.
    """
    noisy, plain = kernel_table(kernel, num_steps, level), kernel_table("ode", num_steps)
    m, variance = 0.0, 1.0
    for k in range(num_steps):
        table = noisy if only_step is None or k == only_step else plain
        t = table.flow_time[k].item()
        spread = (1 - t) ** 2 * data_std**2 + t**2
        gain = (t - (1 - t) * data_std**2) / spread  # v = gain (x - (1-t) mean) - mean
        slope = table.state_weight[k].item() + table.velocity_weight[k].item() * gain
        m = slope * m + table.velocity_weight[k].item() * (-gain * (1 - t) * mean - mean)
        variance = slope**2 * variance + table.std[k].item() ** 2
    return m, math.sqrt(variance)


TABLE = {  # K: per cent error of the std, (ODE, EM, OU, CPS) for data_std 0.2, then 0.5; a = 0.5
    4: ((-52.1, -17.2, -52.4, -52.9), (-31.9, -17.3, -33.2, -35.0)),
    10: ((-22.9, -13.1, -24.2, -27.8), (-13.8, -7.5, -15.1, -20.0)),
    20: ((-12.0, -6.9, -13.2, -18.9), (-7.2, -3.5, -7.9, -14.4)),
    50: ((-5.0, -2.6, -5.6, -13.0), (-2.9, -1.1, -3.3, -10.8)),
    100: ((-2.5, -1.1, -2.9, -10.7), (-1.5, -0.3, -1.7, -9.4)),
    400: ((-0.63, -0.06, -0.74, -8.7), (-0.37, 0.22, -0.42, -8.3)),
}


@pytest.mark.parametrize("num_steps", TABLE)
def test_gaussian_marginal_table(num_steps):
    for data_std, expected in zip((0.2, 0.5), TABLE[num_steps], strict=True):
        for kernel, percent in zip(KERNELS, expected, strict=True):
            mean, std = gaussian_terminal(kernel, num_steps, data_std)
            assert mean == pytest.approx(0.7, abs=1e-9)
            assert 100 * (std / data_std - 1) == pytest.approx(percent, abs=0.06)


def test_gaussian_hybrid_at_four_steps():
    expected = {"flow_sde": (0.102, 0.110, 0.116, 0.157), "ou": (0.0959, 0.0958, 0.0953, 0.0959)}
    for kernel, stds in expected.items():
        for k, std in enumerate(stds):
            assert gaussian_terminal(kernel, 4, 0.2, only_step=k)[1] == pytest.approx(std, abs=6e-4)


@pytest.mark.parametrize("kernel", ["ode", "ou"])
def test_error_halves_when_the_steps_double(kernel):
    errors = [abs(gaussian_terminal(kernel, k, 0.5)[1] / 0.5 - 1) for k in (100, 200, 400, 800)]
    for coarse, fine in itertools.pairwise(errors):
        assert 0.9 <= math.log2(coarse / fine) <= 1.1


def test_cps_does_not_converge():
    assert abs(gaussian_terminal("cps", 1600, 0.5)[1] / 0.5 - 1) > 0.07


# ---------------------------------------------------------------------------------------------------------- mixture
def mixture_velocity(prefix, x, t):
    """Closed form for 0.3 N(-0.6, 0.1^2) + 0.7 N(0.6, 0.1^2)."""
    t = t[:, None, None]
    spread = (1 - t) ** 2 * 0.01 + t**2
    centres = torch.tensor([-0.6, 0.6], dtype=x.dtype)
    logits = torch.tensor([0.3, 0.7], dtype=x.dtype).log() - (x - (1 - t) * centres) ** 2 / (2 * spread)
    weight = torch.softmax(logits, dim=-1)
    residual = x - (1 - t) * centres
    action = centres + (1 - t) * 0.01 / spread * residual
    return (weight * (t / spread * residual - action)).sum(dim=-1, keepdim=True)


def wasserstein(a, b):
    return (a.flatten().sort().values - b.flatten().sort().values).abs().mean().item()


def test_mixture_marginals():
    n = 60_000  # a stratified start and the data's exact quantiles leave little Monte-Carlo error
    quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    normal = torch.special.ndtri(quantiles)
    grid = torch.linspace(-1.5, 1.5, 20_001, dtype=torch.float64)
    cdf = 0.3 * torch.special.ndtr((grid + 0.6) / 0.1) + 0.7 * torch.special.ndtr((grid - 0.6) / 0.1)
    data = grid[torch.searchsorted(cdf, quantiles).clamp(max=len(grid) - 1)].float()
    x_1 = normal[torch.randperm(n, generator=generator(0))].float().view(n, 1, 1)

    def sample(kernel, num_steps, mode="full"):
        config = FlowSamplerConfig(kernel=kernel, num_steps=num_steps, mode=mode, noise_level=0.5)
        return sample_chain(mixture_velocity, None, x_1, config, generator(4))[0]

    ode_4 = ode(mixture_velocity, None, x_1, 4)
    assert wasserstein(ode_4, data) == pytest.approx(0.099, abs=0.006)
    assert wasserstein(sample("ou", 4), ode_4) < 0.01
    assert wasserstein(sample("flow_sde", 4), ode_4) == pytest.approx(0.084, abs=0.006)
    assert wasserstein(sample("flow_sde", 4, "hybrid"), ode_4) == pytest.approx(0.026, abs=0.006)
    assert wasserstein(sample("ou", 64), data) < 0.012
    assert wasserstein(sample("flow_sde", 64), data) < 0.006


# ------------------------------------------------------------------------------------------------- step index, config
@pytest.mark.parametrize(("kernel", "choices"), [("flow_sde", 4), ("flow_noise", 4), ("ou", 3), ("cps", 3)])
def test_hybrid_step_is_uniform_and_drawn_per_sample(kernel, choices):
    n = 60_000
    index = draw_step_index(FlowSamplerConfig(kernel=kernel), n, generator())
    counts = torch.bincount(index, minlength=4).double()
    assert counts[choices:].sum() == 0
    chi2 = ((counts[:choices] - n / choices) ** 2 / (n / choices)).sum().item()
    assert chi2 < 16.3  # 0.001 quantile for 3 degrees of freedom


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_level": 0.0}, "without noise there is no log-probability"),
        ({"noise_level": -0.5}, "expected > 0"),
        ({"kernel": "flow_noise", "noise_level": 0.5}, "no effect for flow_noise"),
        ({"kernel": "flow_sde", "std_max": 0.3}, "no effect for flow_sde"),
        ({"kernel": "flow_noise", "std_min": 0.3, "std_max": 0.1}, "std_min < std_max"),
        ({"kernel": "cps", "noise_level": 1.5}, "cps takes"),
        ({"kernel": "ou", "num_steps": 1}, "must be at least 2"),
        ({"kernel": "ode"}, "expected flow_sde"),
        ({"mode": "both"}, "expected hybrid or full"),
        ({"reduction": "mean"}, "expected joint_sum"),
        ({"num_steps": 0}, "at least 1"),
        ({"scored_horizon": 0}, "at least 1"),
    ],
)
def test_options_that_cannot_be_meant_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FlowSamplerConfig(**options)


def test_joint_clip_bookkeeping():
    assert FlowSamplerConfig(reduction="joint_sum", mode="full").joint_clip(0.2, 5, 7) == pytest.approx(0.2)
    assert FlowSamplerConfig(reduction="per_step", mode="full").joint_clip(0.2, 5, 7) == pytest.approx(0.8)
    assert FlowSamplerConfig(reduction="rlinf", mode="full").joint_clip(0.2, 5, 7) == pytest.approx(1.0)
    assert FlowSamplerConfig(reduction="rlinf", mode="hybrid").joint_clip(0.2, 5, 7) == pytest.approx(0.2)
    assert FlowSamplerConfig(reduction="per_dim", scored_horizon=3).joint_clip(0.01, 5, 7) == pytest.approx(0.21)
