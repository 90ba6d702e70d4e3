"""Token policies and Laplace heads: exact likelihoods, addressed draws, ratio one, resume, learning and its control."""

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Laplace, kl_divergence

from vla_rl.core import ActionChunk
from vla_rl.envs.two_way_reach import make_two_way_reach
from vla_rl.flow.likelihood import (
    LogProb,
    categorical_entropy,
    categorical_kl,
    chain_kl,
    laplace_entropy,
    laplace_kl,
    laplace_log_prob,
)
from vla_rl.flow.noise import RowNoise, bins_of_noise
from vla_rl.flow.sampler import GaussianSampler, laplace_of_normal
from vla_rl.onpolicy import GRPO, PPO, ActorConfig, GRPOConfig, PPOConfig, TokenSampler, TokenSamplerConfig
from vla_rl.onpolicy.build import GaussianSamplerConfig, build_sampler
from vla_rl.onpolicy.tokens import TokenTrace
from vla_rl.policies.blocks.state_only import state_prefix
from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict
from vla_rl.policies.gaussian import GaussianMLP, GaussianMLPConfig
from vla_rl.protocols import PolicyInputs, Prefix, TokenPolicy
from vla_rl.rollout.collector import RolloutCollector
from vla_rl.rollout.ray_batches import from_plain, to_plain
from vla_rl.train.loop import TrainConfig


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class TinyTokens(nn.Module):
    """Autoregressive bins: logits of a position from the state and the embeddings of the bins before it.

    `excluded`: bins that are masked, as the rest of a language model's vocabulary is.
    """

    encoder_is_frozen = True

    def __init__(self, num_bins=5, steps=4, dims=2, state_dim=5, width=16, excluded=()):
        super().__init__()
        self.num_bins, self.action_horizon, self.action_dim = num_bins, steps, dims
        self.feature_dim = state_dim
        self.length = steps * dims
        self.state = nn.Linear(state_dim, width)
        self.position = nn.Parameter(0.3 * torch.randn(self.length, width))
        self.embedding = nn.Embedding(num_bins, width)
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(width, num_bins))
        mask = torch.zeros(num_bins)
        mask[list(excluded)] = -math.inf
        self.register_buffer("mask", mask)

    def preprocess(self, obs):
        return PolicyInputs({}, torch.zeros(len(obs), 0, dtype=torch.int64), obs.state)

    def encode(self, inputs):
        return state_prefix(inputs)

    def token_logits(self, prefix, bins):
        seen = self.embedding(bins).cumsum(dim=1) - self.embedding(bins)
        hidden = self.state(prefix.pooled)[:, None] + self.position[: bins.shape[1]] + seen
        return self.head(hidden) + self.mask

    def sample_tokens(self, prefix, draw):
        bins = torch.zeros(len(prefix), self.length, dtype=torch.int64)
        for position in range(self.length):
            bins[:, position] = draw(self.token_logits(prefix, bins)[:, position], position)
        return bins

    def actions_of_bins(self, bins):
        centres = torch.linspace(-1.0, 1.0, self.num_bins)
        return centres[bins].unflatten(1, (self.action_horizon, -1))

    def normalize_actions(self, actions):
        return actions

    def unnormalize_actions(self, actions):
        return actions

    @torch.no_grad()
    def act(self, obs, noise):
        del noise  # the mode
        bins = self.sample_tokens(self.encode(self.preprocess(obs)), lambda logits, _: logits.argmax(dim=1))
        return ActionChunk(self.actions_of_bins(bins))


def make_tokens(seed=0, **options):
    torch.manual_seed(seed)
    return TinyTokens(**options)


def states(n, dim=5, seed=0):
    pooled = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return Prefix(pooled[:, None], torch.ones(n, 1, dtype=torch.bool), pooled)


def noise(streams, decision=0):
    return RowNoise(3, torch.as_tensor(streams), 0, decision)


# ---------------------------------------------------------------------------------------------------------- likelihoods
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_scores_are_those_of_torch_categoricals(temperature):
    policy, prefix = make_tokens(), states(64)
    assert isinstance(policy, TokenPolicy)
    sampler = TokenSampler(policy, TokenSamplerConfig(temperature=temperature, reduction="token", scored_horizon=3))
    actions, trace = sampler.sample(prefix, noise(range(64)))
    assert torch.equal(actions, policy.actions_of_bins(trace.bins))
    logits = policy.token_logits(prefix, trace.bins).detach()
    there = Categorical(logits=logits / temperature)
    expected = there.log_prob(trace.bins)[:, :6]
    score = sampler.score(prefix, trace)
    torch.testing.assert_close(score.values, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(trace.values, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(trace.log_prob, expected.sum(dim=1), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(score.entropy, there.entropy()[:, :6].mean(dim=1))
    other = make_tokens(seed=1)
    reference = TokenSampler(other, sampler.config).score(prefix, trace)
    divergence = kl_divergence(there, Categorical(logits=other.token_logits(prefix, trace.bins) / temperature))
    torch.testing.assert_close(chain_kl(score, reference), divergence[:, :6].sum(dim=1))
    chunk = TokenSampler(policy, replace(sampler.config, reduction="chunk"))
    assert torch.equal(chunk.score(prefix, trace).values, score.joint[:, None])
    assert (sampler.joint_clip(0.2), chunk.joint_clip(0.2)) == (pytest.approx(1.2), 0.2)


def every_chunk(num_bins, length):
    return torch.tensor(list(itertools.product(range(num_bins), repeat=length)))


@pytest.mark.parametrize("scored_horizon", [1, 2])
def test_likelihoods_of_all_chunks_sum_to_one(scored_horizon):
    """3 bins, 2 steps of 2 numbers: 81 chunks; with one scored step the 9 beginnings, whatever follows."""
    policy = make_tokens(num_bins=3, steps=2)
    sampler = TokenSampler(policy, TokenSamplerConfig(temperature=1.6, scored_horizon=scored_horizon))
    bins = every_chunk(3, 4)
    prefix = states(1).select(torch.zeros(81, dtype=torch.int64))
    trace = TokenTrace(bins, torch.zeros(81, 1), torch.zeros(81))
    total = sampler.score(prefix, trace).joint.double().exp().sum().item()
    assert total == pytest.approx(1.0 if scored_horizon == 2 else 9.0, abs=1e-5)


class Padded(TinyTokens):
    """Writes one number more a step than the environment takes."""

    def __init__(self, **options):
        super().__init__(dims=3, **options)
        self.noise_dim, self.action_dim = 3, 2


@pytest.mark.parametrize(("parallel", "scored"), [(False, [0, 1, 2, 3, 4]), (True, [0, 1, 3, 4])])
def test_padding_is_scored_where_later_tokens_depend_on_it(parallel, scored):
    torch.manual_seed(0)
    policy = Padded(steps=3)
    policy.decodes_in_parallel = parallel
    sampler = TokenSampler(policy, TokenSamplerConfig(reduction="token", scored_horizon=2))
    _, trace = sampler.sample(states(4), noise(range(4)))
    every = Categorical(logits=policy.token_logits(states(4), trace.bins)).log_prob(trace.bins)
    torch.testing.assert_close(trace.values, every[:, scored].detach())
    torch.testing.assert_close(sampler.score(states(4), trace).values, every[:, scored])


def test_frequencies_are_the_probabilities():
    policy = make_tokens(num_bins=3, steps=1)
    sampler = TokenSampler(policy, TokenSamplerConfig(temperature=0.7))
    n, chunks = 40_000, every_chunk(3, 2)
    one = states(1)
    _, trace = sampler.sample(one.select(torch.zeros(n, dtype=torch.int64)), noise(range(n)))
    found = torch.bincount(trace.bins @ torch.tensor([3, 1]), minlength=9) / n
    prefix = one.select(torch.zeros(9, dtype=torch.int64))
    expected = sampler.score(prefix, TokenTrace(chunks, torch.zeros(9, 1), torch.zeros(9))).joint.exp().detach()
    assert (found - expected).abs().max() < 4 * 0.5 / math.sqrt(n)


def test_masked_bins_are_never_drawn_and_harm_no_gradient():
    policy = make_tokens(num_bins=6, excluded=(0, 3, 5))
    prefix, config = states(2000), TokenSamplerConfig(temperature=5.0)
    sampler, reference = (
        TokenSampler(policy, config),
        TokenSampler(make_tokens(1, num_bins=6, excluded=(0, 3, 5)), config),
    )
    _, trace = sampler.sample(prefix, noise(range(2000)))
    assert set(trace.bins.unique().tolist()) == {1, 2, 4}
    score = sampler.score(prefix, trace)
    (score.joint.mean() + score.entropy.mean() + chain_kl(score, reference.score(prefix, trace)).mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters())
    impossible = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert categorical_kl(*impossible).item() == math.inf
    assert categorical_kl(*impossible[::-1]).item() == pytest.approx(math.log(2.0))
    assert categorical_entropy(impossible[1]).item() == 0.0


def test_bins_at_the_ends_of_the_noise():
    log_probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).log().expand(5, 5)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 1.0 - 1e-12, 1.0], dtype=torch.float64)
    assert bins_of_noise(log_probs, torch.special.ndtri(uniform)).tolist() == [1, 1, 3, 3, 3]


def test_traces_travel():
    sampler = TokenSampler(make_tokens(), TokenSamplerConfig())
    _, trace = sampler.sample(states(6), noise(range(6)))
    again = from_plain(
        to_plain(TokenTrace.concatenate([trace.select(torch.arange(2)), trace.select(torch.arange(2, 6))]))
    )
    assert isinstance(again, TokenTrace)
    assert all(torch.equal(a, b) for a, b in zip(vars(again).values(), vars(trace).values(), strict=True))


def test_a_rows_draw_depends_on_its_address_alone():
    policy, prefix = make_tokens(steps=8), states(6)
    sampler = TokenSampler(policy, TokenSamplerConfig(temperature=1.6))
    _, whole = sampler.sample(prefix, noise(range(6)))
    rows = torch.tensor([4, 1])
    _, part = sampler.sample(prefix.select(rows), noise(rows))
    assert torch.equal(part.bins, whole.bins[rows])
    _, later = sampler.sample(prefix, noise(range(6), decision=1))
    assert not torch.equal(later.bins, whole.bins)
    long = make_tokens(num_bins=2, steps=50, dims=14)  # more tokens than an address has draws
    assert TokenSampler(long, sampler.config).sample(states(2), noise(range(2)))[1].bins.shape == (2, 700)


# -------------------------------------------------------------------------------------------------------- Laplace heads
def test_laplace_against_torch_distributions_and_finite_differences():
    rng = torch.Generator().manual_seed(0)
    x, mean, other = (torch.randn(200, generator=rng, dtype=torch.float64) for _ in range(3))
    std, other_std = (torch.rand(200, generator=rng, dtype=torch.float64) + 0.1 for _ in range(2))
    there, elsewhere = Laplace(mean, std / math.sqrt(2.0)), Laplace(other, other_std / math.sqrt(2.0))
    torch.testing.assert_close(there.stddev, std)
    torch.testing.assert_close(laplace_log_prob(x, mean, std), there.log_prob(x))
    torch.testing.assert_close(laplace_entropy(std), there.entropy())
    torch.testing.assert_close(laplace_kl(mean, std, other, other_std), kl_divergence(there, elsewhere))
    inputs = [t[:20].clone().requires_grad_() for t in (mean, std, other, other_std)]
    assert torch.autograd.gradcheck(laplace_kl, inputs)
    assert torch.autograd.gradcheck(lambda m, s: laplace_log_prob(x[:20], m, s), inputs[:2])


def test_laplace_draws():
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    draws = laplace_of_normal(z).double()
    assert draws.mean().abs().item() < 0.01
    assert draws.std().item() == pytest.approx(1.0, abs=0.015)
    assert draws.abs().mean().item() == pytest.approx(math.sqrt(0.5), abs=0.01)  # a Gaussian's is 0.798
    quantile = Laplace(0.0, math.sqrt(0.5)).icdf(torch.special.ndtr(torch.tensor(1.5))).item()
    assert laplace_of_normal(torch.tensor([-1.5, 0.0, 1.5])).tolist() == pytest.approx([-quantile, 0.0, quantile])
    assert torch.isfinite(laplace_of_normal(torch.tensor([-6.7, 6.7]))).all()


def make_laplace():
    policy: Any = GaussianMLP(GaussianMLPConfig(state_dim=5, action_dim=2, action_horizon=4))
    policy.noise_family = "laplace"
    return policy


def test_laplace_sampler_scores_what_it_draws():
    torch.manual_seed(0)
    policy = make_laplace()
    sampler = build_sampler(policy, GaussianSamplerConfig(scored_horizon=3), seed=0)
    prefix = states(32)
    actions, trace = sampler.sample(prefix, noise(range(32)))
    mean, std = policy.distribution(prefix)
    expected = Laplace(mean, std / math.sqrt(2.0)).log_prob(actions)[:, :3].sum(dim=(1, 2))
    torch.testing.assert_close(trace.log_prob, expected.detach())
    score = sampler.score(prefix, trace)
    assert chain_kl(score, score).abs().max().item() < 1e-5
    assert LogProb.concatenate([score, score.select(torch.arange(3))]).family == "laplace"
    policy.noise_family = "cauchy"
    with pytest.raises(ValueError, match="family is 'cauchy'"):
        build_sampler(policy, GaussianSamplerConfig(), seed=0)


# ---------------------------------------------------------------------------------------------------------- the updates
SAMPLERS = {
    "chunk": lambda: TokenSampler(make_tokens(), TokenSamplerConfig(temperature=1.6)),
    "token": lambda: TokenSampler(make_tokens(), TokenSamplerConfig(temperature=1.6, reduction="token")),
    "laplace": lambda: GaussianSampler(make_laplace()),
}


def make_collector(sampler, num_envs=16, seed=0):
    return RolloutCollector(make_two_way_reach(num_envs), sampler, execution_horizon=4, seed=seed)


def settings(**actor):
    actor = {"minibatch_size": 64, "target_kl": None} | actor
    return PPOConfig(critic_warmup_iterations=0, actor=ActorConfig(**actor))


def with_rewards(batch, seed=0):
    return replace(batch, rewards=torch.randn(batch.rewards.shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("recompute", [False, True])
def test_ratio_is_one_before_the_first_step(name, recompute):
    sampler = SAMPLERS[name]()
    ppo = PPO(sampler, settings(reference_kl_coef=0.1, entropy_coef=0.01, recompute_log_probs=recompute))
    metrics = ppo.update(with_rewards(make_collector(sampler).collect(8)))
    assert metrics["ratio_error_first"] < 1e-5
    assert metrics["ratio_error"] > 1e-3
    assert metrics["reference_kl"] > 0.0


@pytest.mark.parametrize("name", ["chunk", "token"])
def test_resume_is_bit_equal(name):
    def start():
        sampler = SAMPLERS[name]()
        return PPO(sampler, settings(reference_kl_coef=0.01)), make_collector(sampler)

    def go_on(ppo, collector):
        for _ in range(2):
            ppo.update(with_rewards(collector.collect(4)))

    whole, collector = start()
    go_on(whole, collector)
    saved = copy.deepcopy((whole.state_dict(), collector.state_dict()))
    go_on(whole, collector)
    resumed, again = start()
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    go_on(resumed, again)
    ours, others = whole.state_dict()["actor"]["policy"], resumed.state_dict()["actor"]["policy"]
    assert all(torch.equal(ours[k], others[k]) for k in ours)


def test_grpo_with_clip_higher_and_no_kl():
    """SimpleVLA-RL's recipe: groups that all succeed or all fail are dropped, and the clip is wider upwards."""
    sampler = SAMPLERS["token"]()
    collector = make_collector(sampler, num_envs=8)
    collect = collector.collect_episodes
    collector.collect_episodes = lambda seeds: with_rewards(collect(seeds), seed=seeds[0])
    actor = ActorConfig(num_epochs=2, minibatch_size=64, clip=0.2, clip_high=0.28)
    metrics = GRPO(sampler, GRPOConfig(group_size=4, groups_per_update=2, actor=actor)).iterate(collector)
    assert metrics["rollout/groups_used"] == 2
    assert metrics["update/ratio_error_first"] < 1e-5


def test_configs_round_trip_and_choose_their_sampler():
    for config in (TokenSamplerConfig(1.6, "token", 2), GaussianSamplerConfig(2)):
        train = TrainConfig(sampler=config, algorithm=GRPOConfig(actor=ActorConfig(clip_high=0.28)))
        assert config_from_dict(TrainConfig, config_to_dict(train)) == train
    assert isinstance(build_sampler(make_tokens(), TokenSamplerConfig(), seed=0), TokenSampler)
    policy = GaussianMLP(GaussianMLPConfig(state_dim=5, action_dim=2))
    with pytest.raises(TypeError, match="TokenPolicy"):
        build_sampler(policy, TokenSamplerConfig(), seed=0)
    for bad in ({"temperature": 0.0}, {"reduction": "joint"}):
        with pytest.raises(ValueError, match="expected"):
            TokenSamplerConfig(**bad)
    with pytest.raises(ValueError, match=r"expected 1\.\.4"):
        TokenSampler(make_tokens(), TokenSamplerConfig(scored_horizon=5))


# ------------------------------------------------------------------------------------------------------------- learning
def mean_dx(policy):
    """Mean x of the deployed policy's first chunks."""
    obs = make_two_way_reach(128).reset(range(10**9, 10**9 + 128))
    return policy.act(obs, torch.zeros(128, 4, 2)).actions[:, :, 0].mean().item()


def train_rightwards(sampler, config, iterations=10):
    """Reward each executed step by its action's x."""
    env, seen = make_two_way_reach(64), []
    step = env.step
    env.step = lambda actions: (seen.append(actions.clone()), step(actions))[1]
    collector, ppo = RolloutCollector(env, sampler, execution_horizon=4, seed=0), PPO(sampler, config)
    before = mean_dx(sampler.policy)
    for _ in range(iterations):
        seen.clear()
        batch = collector.collect(8)
        rewards = torch.where(batch.executed, torch.stack(seen)[..., 0].clamp(-1, 1), 0.0)
        ppo.update(replace(batch, rewards=rewards))
    return mean_dx(sampler.policy) - before


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_learns_and_shuffled_advantages_do_not(name):
    gains = {}
    for shuffled in (False, True):
        torch.manual_seed(0)
        config = settings(learning_rate=2e-3, minibatch_size=256)
        config = replace(config, gae_lambda=0.0, gamma=0.9, shuffle_advantages=shuffled)
        gains[shuffled] = train_rightwards(SAMPLERS[name](), config)
    assert gains[False] > 0.15
    assert abs(gains[True]) < 0.5 * gains[False]
