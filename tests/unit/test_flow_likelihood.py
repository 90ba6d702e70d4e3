"""Likelihoods of denoising chains: replay, martingale, score identity, differences, policy gradients, locality."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from vla_rl.flow import FlowSamplerConfig, FlowTrace, NoiseHead, chain_kl, gaussian_kl, k3_divergence, log_prob, ode
from vla_rl.flow.likelihood import gaussian_entropy
from vla_rl.flow.sampling import sample_chain
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.protocols import PolicyInputs, VelocityOutput

CHAINS = [
    FlowSamplerConfig(kernel=kernel, mode=mode, reduction=reduction)
    for kernel in ("flow_sde", "ou", "cps", "flow_noise")
    for mode in ("hybrid", "full")
    for reduction in ("joint_sum", "per_step", "per_dim", "rlinf")
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_policy(seed=0):
    torch.manual_seed(seed)
    return FlowMLP(FlowMLPConfig(state_dim=3, action_dim=2, action_horizon=4, width=32, num_layers=2))


def make_head(policy, config, seed=0):
    if config.kernel != "flow_noise":
        return None
    torch.manual_seed(seed)
    head = NoiseHead(policy.hidden_dim, policy.action_dim, *config.std_range)
    nn.init.normal_(head.out.weight, std=0.3)
    return head


def make_prefix(policy, n, seed=0):
    state = torch.randn(n, 3, generator=generator(seed))
    return policy.encode(PolicyInputs({}, torch.zeros(n, 0, dtype=torch.int64), state))


def sampled(config, n=64, seed=0):
    policy = make_policy()
    head, prefix = make_head(policy, config), make_prefix(policy, n)
    x_1 = torch.randn(n, 4, 2, generator=generator(seed + 1))
    actions, trace = sample_chain(policy, prefix, x_1, config, generator(seed + 2), head)
    return policy, head, prefix, actions, trace


# ------------------------------------------------------------------------------------------------------------- replay
@pytest.mark.parametrize("config", CHAINS, ids=lambda c: f"{c.kernel}-{c.mode}-{c.reduction}")
def test_replayed_log_prob_is_the_stored_one(config):
    policy, head, prefix, actions, trace = sampled(config)
    score = log_prob(policy, prefix, trace, config, head)
    torch.testing.assert_close(score.joint, trace.log_prob, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(score.values, trace.values, atol=1e-5, rtol=1e-6)
    assert score.values.dtype == torch.float32
    # in other batch shapes: rows in another order, in parts
    rows = torch.randperm(64, generator=generator(9))
    parts = [log_prob(policy, prefix.select(r), trace.select(r), config, head) for r in rows.split(10)]
    torch.testing.assert_close(torch.cat([p.joint for p in parts]), trace.log_prob[rows], atol=1e-4, rtol=0)
    last = trace.states[:, -1]
    if config.mode == "full":
        assert torch.equal(last, actions)


def test_values_of_each_reduction_add_up():
    policy, head, prefix, _, trace = sampled(FlowSamplerConfig(kernel="flow_noise", mode="full"))
    scores = {
        r: log_prob(policy, prefix, trace, FlowSamplerConfig(kernel="flow_noise", mode="full", reduction=r), head)
        for r in ("joint_sum", "per_step", "per_dim", "rlinf")
    }
    joint = scores["joint_sum"].joint
    assert scores["per_step"].values.shape == (64, 4)
    assert scores["per_dim"].values.shape == (64, 4 * 4 * 2)
    for reduction in ("per_step", "per_dim"):
        torch.testing.assert_close(scores[reduction].values.sum(dim=1), joint, atol=1e-4, rtol=1e-5)
    assert scores["per_step"].step[0].tolist() == [0, 1, 2, 3]
    assert scores["per_dim"].step[0, ::8].tolist() == [0, 1, 2, 3]
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(trace.states[:, 0]).sum(dim=(1, 2))
    torch.testing.assert_close(scores["rlinf"].values[:, 0], (prior + joint) / 5, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["flow_sde", "flow_noise"])
def test_per_step_with_one_step_is_the_joint(kernel):
    config = FlowSamplerConfig(kernel=kernel, num_steps=1, mode="full", reduction="per_step")
    policy, head, prefix, _, trace = sampled(config)
    score = log_prob(policy, prefix, trace, config, head)
    assert torch.equal(score.values[:, 0], score.joint)


def test_log_prob_against_torch_distributions():
    """Written out for one Euler-Maruyama step, with torch's own normal density."""
    config = FlowSamplerConfig(num_steps=4, noise_level=0.5)
    policy, _, prefix, _, trace = sampled(config)
    score = log_prob(policy, prefix, trace, config)
    for i in range(64):
        k, x = int(trace.step_index[i]), trace.states[i : i + 1, 0]
        t = 1 - k / 4
        v = policy.velocity(prefix.select(torch.tensor([i])), x, torch.tensor([t])).velocity
        sigma2 = 0.25 * t / (1 - t if k else 0.25)
        mean = (x - t * v) * (1 - t + 0.25) + (x + (1 - t) * v) * (t - 0.25 - sigma2 / (8 * t))
        std = math.sqrt(sigma2 / 4)
        expected = torch.distributions.Normal(mean, std).log_prob(trace.states[i, 1]).sum()
        assert score.joint[i].item() == pytest.approx(expected.item(), abs=2e-4)


def test_ode_is_plain_euler_bit_for_bit_and_draws_nothing():
    policy, prefix = make_policy(), make_prefix(make_policy(), 32)
    x_1 = torch.randn(32, 4, 2, generator=generator())
    x = x_1
    for k in range(4):
        x = x - policy.velocity(prefix, x, torch.full((32,), 1 - k / 4)).velocity / 4
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(ode(policy, prefix, x_1, 4), x)
    assert torch.equal(before, torch.get_rng_state())


def test_float32_head_is_needed_and_used_under_autocast():
    """With a bfloat16 network the stored and the recomputed score still agree, since both take their last steps in
    float32; and a float32 score of the same chain shows how large the error of bfloat16 is."""
    config = FlowSamplerConfig(mode="full")
    policy = make_policy()
    prefix, x_1 = make_prefix(policy, 64), torch.randn(64, 4, 2, generator=generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, trace = sample_chain(policy, prefix, x_1, config, generator(1))
        score = log_prob(policy, prefix, trace, config)
    assert trace.states.dtype == score.joint.dtype == torch.float32
    torch.testing.assert_close(score.joint, trace.log_prob, atol=1e-4, rtol=1e-5)
    exact = log_prob(policy, prefix, trace, config).joint
    assert (exact - score.joint).abs().max() > 1e-2


# -------------------------------------------------------------------------------------------------- true likelihood
def per_sample_velocity(parameters):
    """v = p*x + q*t + 0.3*sin(x), with a `p` and a `q` of its own for each sample, so that gradients are per sample."""
    p, q = parameters

    def velocity(prefix, x, t):
        rows = torch.arange(len(p)).repeat_interleave(len(x) // len(p))
        return p[rows] * x + q[rows] * t[:, None, None] + 0.3 * torch.sin(x)

    return velocity


def parameters_of(n, p, q, dtype=torch.float64):
    return tuple(torch.full((n, 1, 1), value, dtype=dtype, requires_grad=True) for value in (p, q))


@pytest.mark.parametrize("kernel", ["flow_sde", "ou", "cps"])
@pytest.mark.parametrize("mode", ["full", "hybrid"])
def test_expected_joint_ratio_is_one(kernel, mode):
    n = 100_000
    config = FlowSamplerConfig(kernel=kernel, mode=mode)
    x_1 = torch.randn(n, 1, 2, dtype=torch.float64, generator=generator())
    _, trace = sample_chain(per_sample_velocity(parameters_of(n, 0.5, 0.2)), None, x_1, config, generator(1))
    other = parameters_of(n, 0.55, 0.25)
    with torch.no_grad():
        log_ratio = log_prob(per_sample_velocity(other), None, trace, config).joint - trace.log_prob
    ratio = log_ratio.exp()
    assert log_ratio.std() > 0.02
    assert abs(ratio.mean() - 1.0) < 4 * ratio.std() / math.sqrt(n)


def test_a_tempered_ratio_is_no_likelihood_ratio():
    n = 100_000
    config = FlowSamplerConfig(mode="full", reduction="rlinf")
    x_1 = torch.randn(n, 2, 2, dtype=torch.float64, generator=generator())
    _, trace = sample_chain(per_sample_velocity(parameters_of(n, 0.5, 0.2)), None, x_1, config, generator(1))
    with torch.no_grad():
        score = log_prob(per_sample_velocity(parameters_of(n, 0.65, 0.4)), None, trace, config)
    tempered = (score.values - trace.values)[:, 0].exp()
    joint = (score.joint - trace.log_prob).exp()
    assert abs(joint.mean() - 1.0) < 4 * joint.std() / math.sqrt(n)
    assert tempered.mean() - 1.0 < -4 * tempered.std() / math.sqrt(n)


@pytest.mark.parametrize("kernel", ["flow_sde", "ou", "cps"])
@pytest.mark.parametrize("mode", ["full", "hybrid"])
def test_expected_score_is_zero(kernel, mode):
    n = 50_000
    config = FlowSamplerConfig(kernel=kernel, mode=mode)
    parameters = parameters_of(n, 0.5, 0.2)
    x_1 = torch.randn(n, 1, 2, dtype=torch.float64, generator=generator())
    _, trace = sample_chain(per_sample_velocity(parameters), None, x_1, config, generator(1))
    log_prob(per_sample_velocity(parameters), None, trace, config).joint.sum().backward()
    for parameter in parameters:
        score = parameter.grad
        assert score.std() > 0.01
        assert abs(score.mean()) < 4 * score.std() / math.sqrt(n)


@pytest.mark.parametrize("config", CHAINS[::4], ids=lambda c: f"{c.kernel}-{c.mode}")
def test_gradient_against_central_differences(config):
    policy, head, prefix, _, trace = sampled(config, n=8)
    policy.double()
    prefix = replace(prefix, tokens=prefix.tokens.double(), pooled=prefix.pooled.double())
    trace = FlowTrace(trace.states.double(), trace.step_index, trace.values, trace.log_prob)
    modules = [policy] if head is None else [policy, head.double()]
    parameters = [p for module in modules for p in module.parameters()]

    def value():
        return log_prob(policy, prefix, trace, config, head).joint.sum()

    gradient = torch.autograd.grad(value(), parameters)
    rng, step = generator(7), 1e-5
    for _ in range(3):
        direction = [torch.randn(p.shape, dtype=torch.float64, generator=rng) for p in parameters]
        values = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(sign * step * d)
                values.append(value())
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(sign * step * d)
        numeric = (values[0] - values[1]) / (2 * step)
        exact = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
        assert exact.item() == pytest.approx(numeric.item(), rel=1e-6)


# --------------------------------------------------------------------------------------- closed-form policy gradient
K, SIGMA, TARGET = 4, 0.2, 0.5


def linear_return(p, q, sigma):
    """E[-(x_K - TARGET)^2] of x' = x - (p x + q)/K + sigma xi from x_0 ~ N(0, 1): exact mean and variance."""
    mean, variance = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for _ in range(K):
        mean, variance = mean - (p * mean + q) / K, (1 - p / K) ** 2 * variance + sigma**2
    return -((mean - TARGET) ** 2 + variance)


@pytest.mark.parametrize("mode", ["full", "hybrid"])
def test_policy_gradient_of_the_linear_quadratic_case(mode):
    """Flow-Noise: the score-function gradient is that of the return. Hybrid: 1/K of the ODE's own gradient."""
    n = 200_000
    p, q = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 0.3))
    scale = 1.0 if mode == "full" else 1.0 / K
    exact = torch.autograd.grad(scale * linear_return(p, q, SIGMA if mode == "full" else 0.0), (p, q))

    config = FlowSamplerConfig(kernel="flow_noise", mode=mode, num_steps=K, std_min=0.1, std_max=0.4)  # sqrt(.04) = .2
    head = NoiseHead(1, 1, 0.1, 0.4).double()
    slope, offset = parameters_of(n, 0.4, 0.3)

    def velocity(prefix, x, t):
        rows = torch.arange(n).repeat_interleave(len(x) // n)
        return VelocityOutput(slope[rows] * x + offset[rows], x)

    x_1 = torch.randn(n, 1, 1, dtype=torch.float64, generator=generator())
    actions, trace = sample_chain(velocity, None, x_1, config, generator(1), head)
    reward = -((actions.flatten() - TARGET) ** 2)
    log_prob(velocity, None, trace, config, head).joint.sum().backward()
    for gradient, expected in zip((slope.grad, offset.grad), exact, strict=True):
        sample = (reward - reward.mean()) * gradient.flatten()
        error = sample.std() / math.sqrt(n)
        assert error < 0.02 * abs(expected) + 0.005
        assert abs(sample.mean() - expected) < 4 * error


# ------------------------------------------------------------------------------------------------------------ locality
@pytest.mark.parametrize("kernel", ["flow_sde", "flow_noise"])
def test_hybrid_trace_holds_the_stochastic_step_only(kernel):
    config = FlowSamplerConfig(kernel=kernel)
    policy, head, prefix, actions, trace = sampled(config)
    assert trace.states.shape == (64, 2, 4, 2)
    # before it the chain is the ODE from the noise, after it the ODE to the action
    x_1 = torch.randn(64, 4, 2, generator=generator(1))
    for i in range(64):
        row, k, x = torch.tensor([i]), int(trace.step_index[i]), x_1[i : i + 1]
        for j in range(4):
            if j == k:
                torch.testing.assert_close(x, trace.states[i : i + 1, 0], atol=1e-5, rtol=0)
                x = trace.states[i : i + 1, 1]
            else:
                x = x - policy.velocity(prefix.select(row), x, torch.tensor([1 - j / 4])).velocity / 4
        torch.testing.assert_close(x, actions[i : i + 1], atol=1e-5, rtol=0)
    for position in (0, 1):
        states = trace.states.clone()
        states[:, position] += 0.1
        moved = log_prob(policy, prefix, replace(trace, states=states), config, head).joint
        assert ((moved - trace.log_prob).abs() > 1e-3).all()


@pytest.mark.parametrize("kernel", ["flow_sde", "ou", "flow_noise"])
@pytest.mark.parametrize("mode", ["full", "hybrid"])
def test_unscored_numbers_follow_the_ode_and_do_not_count(kernel, mode):
    config = FlowSamplerConfig(kernel=kernel, mode=mode, scored_horizon=2, scored_dims=1, num_steps=2)

    def velocity(prefix, x, t):  # every number by itself, so that noise cannot spread through the network
        return VelocityOutput(torch.tanh(x), torch.ones_like(x))

    head = NoiseHead(2, 2, 0.08, 0.3) if kernel == "flow_noise" else None
    x_1 = torch.randn(32, 4, 2, generator=generator())
    actions, trace = sample_chain(velocity, None, x_1, config, generator(1), head)
    plain = ode(velocity, None, x_1, 2)
    torch.testing.assert_close(actions[:, 2:], plain[:, 2:], atol=1e-6, rtol=0)
    torch.testing.assert_close(actions[:, :, 1], plain[:, :, 1], atol=1e-6, rtol=0)
    assert ((actions - plain)[:, :2, 0].abs() > 1e-6).all()
    states = trace.states.clone()
    states[:, 1:, 2:] += 5.0  # where the chain went in unscored steps does not matter to what follows a scored one
    states[:, :, :, 1] -= 3.0
    moved = log_prob(velocity, None, replace(trace, states=states), config, head)
    torch.testing.assert_close(moved.joint, trace.log_prob, atol=1e-6, rtol=0)
    assert moved.mean.shape[2:] == (2, 1)


def test_the_start_of_the_chain_has_no_gradient_and_cancels():
    config = FlowSamplerConfig(kernel="flow_noise", mode="full", reduction="rlinf")
    policy, head, prefix, _, trace = sampled(config)
    score = log_prob(policy, prefix, trace, config, head)
    gradient = torch.autograd.grad(score.values.sum(), list(policy.parameters()), retain_graph=True)
    joint = torch.autograd.grad(score.joint.sum() / 5, list(policy.parameters()))
    for a, b in zip(gradient, joint, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- noise head, divergence
def test_noise_head_bounds_entropy_and_start():
    head = NoiseHead(8, 2, 0.05, 0.2)
    std = head(torch.randn(16, 4, 8, generator=generator()))
    torch.testing.assert_close(std, torch.full_like(std, 0.1))  # geometric mean of the bounds
    nn.init.normal_(head.out.weight, std=1e6)
    extreme = head(1e6 * torch.randn(64, 4, 8, generator=generator()))
    assert extreme.min() >= 0.05 - 1e-9
    assert extreme.max() <= 0.2 + 1e-9
    torch.testing.assert_close(gaussian_entropy(extreme), torch.distributions.Normal(0.0, extreme).entropy())


def test_narrow_noise_bounds_approach_the_ode():
    policy, prefix = make_policy(), make_prefix(make_policy(), 32)
    x_1 = torch.randn(32, 4, 2, generator=generator())
    errors = []
    for std in (1e-2, 1e-3):
        config = FlowSamplerConfig(kernel="flow_noise", mode="full", std_min=std, std_max=1.001 * std)
        actions, _ = sample_chain(policy, prefix, x_1, config, generator(1), make_head(policy, config))
        errors.append((actions - ode(policy, prefix, x_1, 4)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)


def test_flow_noise_entropy_is_reported_and_sde_has_none():
    config = FlowSamplerConfig(kernel="flow_noise", mode="full")
    policy, head, prefix, _, trace = sampled(config)
    score = log_prob(policy, prefix, trace, config, head)
    expected = torch.distributions.Normal(0.0, score.std).entropy().mean(dim=(1, 2, 3))
    torch.testing.assert_close(score.entropy, expected)
    sde = FlowSamplerConfig()
    policy, _, prefix, _, trace = sampled(sde)
    assert log_prob(policy, prefix, trace, sde).entropy is None


def test_gaussian_kl_against_monte_carlo_and_torch():
    normal = torch.distributions.Normal
    ours, other = normal(0.3, 0.2), normal(0.1, 0.35)
    closed = gaussian_kl(*(torch.tensor(v) for v in (0.3, 0.2, 0.1, 0.35)))
    torch.testing.assert_close(closed, torch.distributions.kl_divergence(ours, other))
    x = 0.3 + 0.2 * torch.randn(200_000, generator=generator())
    sample = ours.log_prob(x) - other.log_prob(x)
    assert abs(sample.mean() - closed) < 4 * sample.std() / math.sqrt(len(x))


@pytest.mark.parametrize("mode", ["full", "hybrid"])
def test_chain_kl_is_the_expected_log_ratio_and_k3_estimates_it(mode):
    n = 50_000
    config = FlowSamplerConfig(mode=mode)
    old, new = parameters_of(n, 0.5, 0.2), parameters_of(n, 0.6, 0.35)
    x_1 = torch.randn(n, 1, 2, dtype=torch.float64, generator=generator())
    _, trace = sample_chain(per_sample_velocity(old), None, x_1, config, generator(1))
    with torch.no_grad():
        before = log_prob(per_sample_velocity(old), None, trace, config)
        after = log_prob(per_sample_velocity(new), None, trace, config)
    closed = chain_kl(before, after)
    log_ratio = after.joint - before.joint
    assert abs((-log_ratio - closed).mean()) < 4 * (-log_ratio - closed).std() / math.sqrt(n)
    k3 = k3_divergence(log_ratio)
    assert (k3 >= 0).all()
    assert abs((k3 - closed).mean()) < 4 * (k3 - closed).std() / math.sqrt(n)


# -------------------------------------------------------------------------------------------------------------- errors
def test_mismatched_trace_and_missing_head_are_errors():
    policy, _, prefix, _, trace = sampled(FlowSamplerConfig())
    with pytest.raises(ValueError, match="a full trace of 4 steps holds 5 states"):
        log_prob(policy, prefix, trace, FlowSamplerConfig(mode="full"))
    _, _, _, _, full = sampled(FlowSamplerConfig(mode="full"))
    with pytest.raises(ValueError, match="a hybrid trace holds 2 states"):
        log_prob(policy, prefix, full, FlowSamplerConfig())
    with pytest.raises(ValueError, match="needs a noise_head"):
        log_prob(policy, prefix, trace, FlowSamplerConfig(kernel="flow_noise"))
    with pytest.raises(ValueError, match="exceed the chunk"):
        log_prob(policy, prefix, trace, FlowSamplerConfig(scored_horizon=9))


def test_trace_select_and_concatenate():
    _, _, _, _, trace = sampled(FlowSamplerConfig())
    rows = torch.tensor([3, 1])
    joined = FlowTrace.concatenate([trace.select(rows), trace]).to("cpu")
    assert len(joined) == 66
    assert torch.equal(joined.states[:2], trace.states[rows])
    assert torch.equal(joined.log_prob[2:], trace.log_prob)
    assert torch.equal(joined.step_index[:2], trace.step_index[rows])
