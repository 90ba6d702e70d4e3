"""The updates: hand-computed losses, ratio one at the first epoch, resume, divergence, and each algorithm learning."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from vla_rl.envs.two_way_reach import make_two_way_reach
from vla_rl.flow import FlowSamplerConfig
from vla_rl.flow.sampler import GaussianSampler
from vla_rl.onpolicy import (
    GRPO,
    PPO,
    ActorConfig,
    ActorData,
    DenoisingDiscount,
    FPOConfig,
    FPOSampler,
    GRPOConfig,
    PPOConfig,
    flow_sampler,
)
from vla_rl.onpolicy.actor import clipped_loss
from vla_rl.onpolicy.critic import value_loss
from vla_rl.onpolicy.grpo import group_advantages
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.policies.gaussian import GaussianMLP, GaussianMLPConfig
from vla_rl.protocols import PolicyInputs
from vla_rl.rollout.collector import RolloutCollector
from vla_rl.train.divergence import DivergenceError

SDE = FlowSamplerConfig()
SAMPLERS = {
    "sde_hybrid": SDE,
    "sde_full": FlowSamplerConfig(mode="full"),
    "ou_full_per_step": FlowSamplerConfig(kernel="ou", mode="full", reduction="per_step"),
    "noise_per_dim": FlowSamplerConfig(kernel="flow_noise", mode="full", reduction="per_dim"),
    "noise_rlinf": FlowSamplerConfig(kernel="flow_noise", mode="full", reduction="rlinf"),
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_policy(seed=0, policy_class=FlowMLP):
    torch.manual_seed(seed)
    return policy_class(FlowMLPConfig(state_dim=5, action_dim=2, action_horizon=4, width=32, num_layers=2))


def make_sampler(config=SDE, seed=0):
    return flow_sampler(make_policy(seed), config, seed=seed)


def make_collector(sampler, num_envs=16, seed=0):
    return RolloutCollector(make_two_way_reach(num_envs), sampler, execution_horizon=4, seed=seed)


def config(seed=0, **actor):
    return PPOConfig(seed=seed, critic_warmup_iterations=0, actor=ActorConfig(**{"minibatch_size": 64} | actor))


def with_rewards(batch, seed=0):
    """The rollout with rewards at random, so that advantages of an untrained policy are not all the same."""
    return replace(batch, rewards=torch.randn(batch.rewards.shape, generator=torch.Generator().manual_seed(seed)))


# -------------------------------------------------------------------------------------------------------------- losses
def test_clipped_loss_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    assert clipped_loss(ratio, advantage, 0.2, None).tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -2.2])


def test_dual_clip_by_hand():
    ratio, advantage = torch.tensor([5.0, 2.0, 5.0]), torch.tensor([-1.0, -1.0, 1.0])
    assert clipped_loss(ratio, advantage, 0.2, None).tolist() == pytest.approx([5.0, 2.0, -1.2])
    assert clipped_loss(ratio, advantage, 0.2, 3.0).tolist() == pytest.approx([3.0, 2.0, -1.2])


def test_clip_higher_by_hand():
    ratio, advantage = torch.tensor([1.5, 1.25, 0.5, 0.5]), torch.tensor([1.0, 1.0, 1.0, -1.0])
    assert clipped_loss(ratio, advantage, 0.2, None, 0.28).tolist() == pytest.approx([-1.28, -1.25, -0.5, 0.8])


def test_value_loss_by_hand():
    values, old, target = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([3.0])
    assert value_loss(values, old, target, None, None).item() == pytest.approx(2.0)
    assert value_loss(values, old, target, 0.5, None).item() == pytest.approx(0.5 * 2.5**2)  # clipped to 0.5: larger
    assert value_loss(values, old, target, None, 1.0).item() == pytest.approx(1.0 * (2.0 - 0.5))


# ---------------------------------------------------------------------------------------------------------- first epoch
@pytest.mark.parametrize("name", SAMPLERS)
def test_ratio_is_one_before_the_first_step(name):
    sampler = make_sampler(SAMPLERS[name])
    ppo = PPO(sampler, config())
    metrics = ppo.update(with_rewards(make_collector(sampler).collect(8)))
    assert metrics["ratio_error_first"] < 1e-5
    assert abs(metrics["joint_kl_first"]) < 1e-6
    assert metrics["ratio_error"] > 1e-3  # later it is not


def test_a_full_update_moves_towards_rewarded_actions():
    """One large step on one minibatch raises the likelihood of what had a positive advantage and lowers the rest."""
    sampler = make_sampler(FlowSamplerConfig(mode="full"))
    batch = make_collector(sampler).collect(8)
    rng = torch.Generator().manual_seed(0)
    advantages = torch.where(torch.rand(8, 16, generator=rng) < 0.5, 1.0, -1.0)
    actor = PPO(sampler, config(num_epochs=1, minibatch_size=10_000, learning_rate=1e-3))._actor
    actor.update(ActorData.from_rollout(batch, advantages), rng)
    with torch.no_grad():
        change = sampler.score(batch.prefix, batch.trace).joint - batch.trace.log_prob
    good = advantages.flatten() > 0
    assert change[good].mean() > change[~good].mean() + 1e-3


def test_critic_warm_up_leaves_the_policy_alone():
    sampler = make_sampler()
    ppo = PPO(sampler, replace(config(), critic_warmup_iterations=1))
    before, critic = copy.deepcopy(sampler.policy.state_dict()), copy.deepcopy(ppo.critic.state_dict())
    batch = with_rewards(make_collector(sampler).collect(4))
    metrics = ppo.update(batch)
    assert "policy_loss" not in metrics
    assert all(torch.equal(before[k], v) for k, v in sampler.policy.state_dict().items())
    assert any(not torch.equal(critic[k], v) for k, v in ppo.critic.state_dict().items())
    assert "policy_loss" in ppo.update(batch)
    assert any(not torch.equal(before[k], v) for k, v in sampler.policy.state_dict().items())


def test_kl_stop():
    sampler = make_sampler()
    batch = with_rewards(make_collector(sampler).collect(8))
    free = PPO(copy.deepcopy(sampler), config(learning_rate=3e-3, target_kl=None)).update(batch)
    stopped = PPO(sampler, config(learning_rate=3e-3, target_kl=0.01)).update(batch)
    assert free["actor_steps"] == 8
    assert free["kl_stopped"] == 0
    assert free["joint_kl_max"] > 0.01
    assert stopped["kl_stopped"] == 1
    assert stopped["actor_steps"] < 8


def test_invalid_decisions_are_left_out():
    sampler = make_sampler()
    ppo = PPO(sampler, config())
    batch = with_rewards(make_collector(sampler).collect(4))
    valid = batch.valid.clone()
    valid[:, :5] = False
    metrics = ppo.update(replace(batch, valid=valid))
    assert metrics["num_samples"] == 4 * 11
    with pytest.raises(ValueError, match="no decision that the policy executed"):
        ppo.update(replace(batch, valid=torch.zeros_like(valid)))


class DroppingOut(FlowMLP):
    """A flow policy with dropout on its input."""

    def velocity(self, prefix, x_t, flow_time):
        dropped = torch.nn.functional.dropout(x_t, 0.5, self.training)
        return super().velocity(prefix, dropped, flow_time)


def test_dropout_is_off_in_rollouts_and_updates():
    sampler = flow_sampler(make_policy(policy_class=DroppingOut).train(), SDE)
    metrics = PPO(sampler, config()).update(with_rewards(make_collector(sampler).collect(8)))
    assert metrics["ratio_error_first"] < 1e-5


class LearningEncoder(FlowMLP):
    encoder_is_frozen = False

    def __init__(self, config):
        super().__init__(config)
        self.gain = torch.nn.Parameter(torch.ones(()))

    def encode(self, inputs):
        prefix = super().encode(inputs)
        return type(prefix)(prefix.tokens * self.gain, prefix.mask, prefix.pooled * self.gain)


def test_an_encoder_that_learns_gets_gradients_from_the_policy_alone():
    sampler = flow_sampler(make_policy(policy_class=LearningEncoder), SDE)
    batch = with_rewards(make_collector(sampler).collect(8))
    frozen = PPO(sampler, replace(config(), critic_warmup_iterations=5))
    frozen.update(batch)
    assert sampler.policy.gain.item() == 1.0  # the critic's loss does not reach it
    metrics = PPO(sampler, config()).update(batch)
    assert metrics["ratio_error_first"] < 1e-5
    assert sampler.policy.gain.item() != 1.0


def test_recomputed_log_probs_replace_stale_ones():
    sampler = make_sampler()
    batch = with_rewards(make_collector(sampler).collect(8))
    stale = replace(
        batch, trace=replace(batch.trace, values=batch.trace.values + 0.1, log_prob=batch.trace.log_prob + 0.1)
    )
    kept = PPO(copy.deepcopy(sampler), config()).update(stale)
    fresh = PPO(sampler, config(recompute_log_probs=True)).update(stale)
    assert kept["ratio_error_first"] == pytest.approx(1 - math.exp(-0.1), rel=1e-3)
    assert fresh["ratio_error_first"] < 1e-5


# ------------------------------------------------------------------------------------------------------- regularisers
def test_entropy_bonus_raises_the_noise():
    noise = FlowSamplerConfig(kernel="flow_noise", mode="full")
    found = {}
    for coefficient in (0.0, 10.0):
        sampler = make_sampler(noise)
        ppo = PPO(sampler, config(entropy_coef=coefficient, target_kl=None, learning_rate=1e-3))
        batch = with_rewards(make_collector(sampler).collect(4))
        for _ in range(3):
            metrics = ppo.update(batch)
        found[coefficient] = metrics["entropy"]
    assert found[10.0] > found[0.0] + 0.02
    sampler = make_sampler()
    with pytest.raises(ValueError, match="entropy_coef has no effect"):
        PPO(sampler, config(entropy_coef=0.1)).update(with_rewards(make_collector(sampler).collect(2)))


def test_reference_kl_holds_the_policy_back():
    found = {}
    for coefficient in (0.0, 10.0):
        sampler = make_sampler()
        start = copy.deepcopy(sampler)
        ppo = PPO(sampler, config(reference_kl_coef=coefficient, target_kl=None, learning_rate=1e-3))
        batch = with_rewards(make_collector(sampler).collect(8))
        for _ in range(3):
            ppo.update(batch)
        with torch.no_grad():
            ours, reference = (s.score(batch.prefix, batch.trace) for s in (sampler, start))
        found[coefficient] = ((ours.mean - reference.mean) ** 2).mean().item()
    assert found[10.0] < 0.5 * found[0.0]


def test_bc_term_fits_demonstrations_and_needs_a_source():
    sampler = make_sampler()
    state = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    inputs = PolicyInputs({}, torch.zeros(64, 0, dtype=torch.int64), state)
    actions, mask = torch.full((64, 4, 2), 0.5), torch.ones(64, 4, dtype=torch.bool)

    def demos(n):
        return inputs.select(torch.arange(n)), actions[:n], mask[:n]

    ppo = PPO(sampler, config(bc_coef=1.0, target_kl=None, learning_rate=2e-3), demos=demos)
    batch = with_rewards(make_collector(sampler).collect(8))
    losses = [ppo.update(batch)["bc_loss"] for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(ValueError, match="belong together"):
        PPO(sampler, config(bc_coef=1.0))
    with pytest.raises(ValueError, match="belong together"):
        PPO(sampler, config(), demos=demos)


# --------------------------------------------------------------------------------------------------- resume, divergence
@pytest.mark.parametrize("name", ["sde_hybrid", "noise_per_dim"])
def test_resume_is_bit_equal(name):
    def start():
        sampler = make_sampler(SAMPLERS[name])
        return PPO(sampler, config(reference_kl_coef=0.01, learning_rate_decay=0.5)), make_collector(sampler)

    def go_on(ppo, collector, iterations):
        return [ppo.update(with_rewards(collector.collect(4))) for _ in range(iterations)]

    whole, collector = start()
    go_on(whole, collector, 3)
    saved = copy.deepcopy((whole.state_dict(), collector.state_dict()))
    go_on(whole, collector, 3)
    resumed, again = start()
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    metrics = go_on(resumed, again, 3)
    first = config().actor.learning_rate * 0.5 ** (3 - config().critic_warmup_iterations)
    assert [m["learning_rate"] for m in metrics] == pytest.approx([first, first / 2, first / 4])
    for part in ("policy", "noise_head"):
        ours, other = whole.state_dict()["actor"][part], resumed.state_dict()["actor"][part]
        assert (ours is None) == (other is None)
        assert all(torch.equal(ours[k], other[k]) for k in (ours or {}))
    references = (ppo.state_dict()["actor"]["reference"]["average"] for ppo in (whole, resumed))
    assert all(torch.equal(ours, other) for ours, other in zip(*references, strict=True))
    critics = whole.state_dict()["critic"]["critic"], resumed.state_dict()["critic"]["critic"]
    assert all(torch.equal(critics[0][k], critics[1][k]) for k in critics[0])
    assert resumed.num_updates == 6


@pytest.mark.parametrize("poison", ["reward", "trace"])
def test_divergence_is_raised_before_parameters_change(poison):
    sampler = make_sampler()
    ppo = PPO(sampler, config(minibatch_size=10_000))
    batch = with_rewards(make_collector(sampler).collect(4))
    if poison == "reward":
        rewards = batch.rewards.clone()
        rewards[2, 3, 0] = math.nan
        batch = replace(batch, rewards=rewards)
    else:
        states = batch.trace.states.clone()
        states[7] = math.nan
        batch = replace(batch, trace=replace(batch.trace, states=states))
    before = copy.deepcopy(sampler.policy.state_dict())
    with pytest.raises(DivergenceError, match=r"not finite .*this step was not taken") as error:
        ppo.update(batch)
    assert all(torch.equal(before[k], v) for k, v in sampler.policy.state_dict().items())
    assert any(not torch.isfinite(v).all() for v in error.value.tensors.values() if v.is_floating_point())


@pytest.mark.parametrize(
    "options",
    [
        {"clip": 0.0},
        {"clip_high": 0.0},
        {"dual_clip": 0.5},
        {"num_epochs": 0},
        {"entropy_coef": -1.0},
        {"bc_coef": -1.0},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=r"expected|at least"):
        ActorConfig(**options)


# --------------------------------------------------------------------------------------------------------- other losses
def test_denoising_discount_weighs_the_last_step_fully():
    discount = DenoisingDiscount(num_steps=4, gamma_denoise=0.9, clip_first=0.1)
    step = torch.tensor([[0, 1, 2, 3]])
    assert discount.advantage_weight(step)[0].tolist() == pytest.approx([0.729, 0.81, 0.9, 1.0])
    clip = discount.clip(step, 0.01)[0]  # pyright: ignore[reportIndexIssue]
    assert clip[0].item() == pytest.approx(0.001)
    assert clip[3].item() == pytest.approx(0.01)
    assert clip[1].item() == pytest.approx(0.001 + 0.009 * math.expm1(1.0) / math.expm1(3.0))
    with pytest.raises(ValueError, match="per_step"):
        discount.advantage_weight(torch.tensor([[-1]]))
    with pytest.raises(ValueError, match="num_steps is 4"):
        discount.advantage_weight(torch.tensor([[4]]))


def test_denoising_discount_reaches_the_update():
    """With gamma_denoise near 0 only the last denoising step is learned from."""
    sampler = make_sampler(FlowSamplerConfig(mode="full", reduction="per_step"))
    batch = with_rewards(make_collector(sampler).collect(8))
    kept, found = copy.deepcopy(sampler), {}
    for gamma in (1.0, 1e-6):
        learner = copy.deepcopy(kept)
        weighting = DenoisingDiscount(num_steps=4, gamma_denoise=gamma)
        ppo = PPO(learner, config(target_kl=None, num_epochs=1, minibatch_size=10_000), step_weighting=weighting)
        advantages = torch.ones(8, 16)
        data = ActorData.from_rollout(batch, advantages)
        found[gamma] = ppo._actor.update(data, torch.Generator())["policy_loss"]
    assert found[1.0] == pytest.approx(-1.0, abs=1e-4)
    assert found[1e-6] == pytest.approx(-0.25, abs=1e-4)


def test_fpo_ratio_is_one_only_with_the_stored_draws():
    sampler = FPOSampler(make_policy(), FPOConfig(num_draws=4))
    batch = make_collector(sampler).collect(4)
    with torch.no_grad():
        same = (sampler.score(batch.prefix, batch.trace).values - batch.trace.values).exp()
        noise = torch.randn(batch.trace.noise.shape, generator=torch.Generator().manual_seed(1))
        redrawn = (sampler.score(batch.prefix, replace(batch.trace, noise=noise)).values - batch.trace.values).exp()
    assert (same - 1).abs().max() < 1e-5
    assert (redrawn - 1).abs().mean() > 0.05


@pytest.mark.parametrize("loss", ["noise", "velocity"])
def test_fpo_loss_by_hand(loss):
    sampler = FPOSampler(make_policy(), FPOConfig(num_draws=3, loss=loss, scored_horizon=2))
    batch = make_collector(sampler, num_envs=2).collect(1)
    trace, total = batch.trace, 0.0
    for i in range(3):
        t, noise = trace.flow_time[:1, i], trace.noise[:1, i]
        x = t * noise + (1 - t) * trace.actions[:1]
        v = sampler.policy.velocity(batch.prefix.select(torch.tensor([0])), x, t).velocity.detach()
        error = x + (1 - t) * v - noise if loss == "noise" else v - (noise - trace.actions[:1])
        total += float((error[:, :2] ** 2).mean()) / 3
    assert trace.log_prob[0].item() == pytest.approx(-total, abs=1e-5)


def test_group_advantages_by_hand():
    returns = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    advantages, informative = group_advantages(returns, normalize_std=True)
    assert informative.tolist() == [True, False]
    assert advantages[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-4)
    assert advantages[1].tolist() == [0.0] * 4
    plain, _ = group_advantages(returns, normalize_std=False)
    assert plain[0].tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])


# ------------------------------------------------------------------------------------------------------------- learning
def reach_fraction(policy, num_episodes=256):
    """Mean progress towards the right: sum of dx an episode would get from the deployed policy's first chunk."""
    env = make_two_way_reach(num_episodes)
    obs = env.reset(range(10**9, 10**9 + num_episodes))
    noise = torch.randn(num_episodes, 4, 2, generator=torch.Generator().manual_seed(0))
    return policy.act(obs, noise).actions[:, :, 0].mean().item()


def rewarding_rightwards(batch, actions):
    """Reward each executed step by its action's x: a dense toy signal that any sound policy gradient must climb."""
    rewards = torch.where(batch.executed, actions[..., 0].view_as(batch.executed).clamp(-1, 1), 0.0)
    return replace(batch, rewards=rewards)


def train_rightwards(sampler, settings, iterations=12):
    env, seen = make_two_way_reach(64), []
    step = env.step
    env.step = lambda actions: (seen.append(actions.clone()), step(actions))[1]
    collector = RolloutCollector(env, sampler, execution_horizon=4, seed=0)
    ppo = PPO(sampler, settings)
    before = reach_fraction(sampler.policy)
    for _ in range(iterations):
        seen.clear()
        batch = collector.collect(8)
        ppo.update(rewarding_rightwards(batch, torch.stack(seen)))
    return before, reach_fraction(sampler.policy)


LEARNERS = {
    "flow_sde": lambda: (make_sampler(SDE), 0.2),
    "flow_noise": lambda: (
        make_sampler(FlowSamplerConfig(kernel="flow_noise", mode="full", reduction="per_step")),
        0.2,
    ),
    "ou_full": lambda: (make_sampler(FlowSamplerConfig(kernel="ou", mode="full")), 0.2),
    "gaussian": lambda: (
        GaussianSampler(GaussianMLP(GaussianMLPConfig(state_dim=5, action_dim=2, action_horizon=4))),
        0.2,
    ),
    "fpo": lambda: (FPOSampler(make_policy(), FPOConfig()), 0.05),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_each_sampler_learns_and_shuffled_advantages_do_not(name):
    """A dense toy reward. The control has the same data and optimiser, and must gain far less."""
    gains = {}
    for shuffled in (False, True):
        torch.manual_seed(0)
        sampler, clip = LEARNERS[name]()
        settings = replace(
            config(clip=clip, learning_rate=1e-3, target_kl=None, minibatch_size=256), shuffle_advantages=shuffled
        )
        before, after = train_rightwards(sampler, replace(settings, gae_lambda=0.0, gamma=0.9))
        gains[shuffled] = after - before
    assert gains[False] > 0.1
    assert abs(gains[True]) < 0.5 * gains[False]


def test_grpo_collects_informative_groups_and_resumes():
    def start():
        sampler = make_sampler()
        grpo = GRPO(sampler, GRPOConfig(group_size=4, groups_per_update=6, max_rounds=3, actor=ActorConfig()))
        return sampler, grpo, make_collector(sampler, num_envs=16)

    _, grpo, collector = start()
    data, metrics = grpo.collect(collector)
    assert data is None  # an untrained policy never succeeds: no group says anything
    assert metrics["groups_sampled"] == 12
    assert metrics["groups_used"] == 0
    assert metrics["episodes_finished"] == 48
    with pytest.raises(ValueError, match="do not divide"):
        grpo.collect(make_collector(make_sampler(), num_envs=6))
    with pytest.raises(ValueError, match="at least 2"):
        GRPOConfig(group_size=1)


def test_grpo_groups_share_their_initial_state_and_advantages_their_episode():
    sampler = make_sampler()
    collector = make_collector(sampler, num_envs=8)
    collect = collector.collect_episodes
    # reward what happened by chance, so that groups hold information
    collector.collect_episodes = lambda seeds: with_rewards(collect(seeds), seed=seeds[0])
    grpo = GRPO(sampler, GRPOConfig(group_size=4, groups_per_update=3, max_rounds=4, actor=ActorConfig(num_epochs=2)))
    data, metrics = grpo.collect(collector)
    assert metrics["groups_used"] == 3
    assert metrics["groups_sampled"] == 4
    starts = collect([7] * 4 + [8] * 4).features[:8]
    assert torch.equal(starts[0], starts[3])
    assert not torch.equal(starts[0], starts[4])
    assert len(data.advantages.unique()) == 12  # three groups of four episodes, one advantage an episode
    before = copy.deepcopy(sampler.policy.state_dict())
    result = grpo.update(data)
    assert result["ratio_error_first"] < 1e-5
    assert any(not torch.equal(before[k], v) for k, v in sampler.policy.state_dict().items())
    other = GRPO(make_sampler(seed=3), grpo.config)
    other.load_state_dict(copy.deepcopy(grpo.state_dict()))
    grpo.update(data)
    other.update(data)
    assert other.num_updates == 2
    for ours, theirs in zip(sampler.policy.parameters(), other.sampler.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
