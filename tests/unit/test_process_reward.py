"""The process reward: labels by hand, a potential that learns and its control does not, shaping that is a baseline."""

import copy
from dataclasses import replace

import pytest
import torch

from vla_rl.core import chunk_discount
from vla_rl.envs.point_maze import make_point_maze
from vla_rl.envs.two_way_reach import make_two_way_reach
from vla_rl.flow.sampler import GaussianSampler
from vla_rl.onpolicy import PPO, ActorConfig, PPOConfig
from vla_rl.onpolicy.process_reward import (
    ProcessReward,
    ProcessRewardConfig,
    ProgressLabels,
    gripper_milestones,
    segment_progress,
)
from vla_rl.policies.gaussian import GaussianMLP, GaussianMLPConfig
from vla_rl.rollout.collector import RolloutCollector


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_sampler(state_dim=5, seed=0):
    torch.manual_seed(seed)
    return GaussianSampler(GaussianMLP(GaussianMLPConfig(state_dim=state_dim, action_dim=2, action_horizon=4)))


def make_collector(sampler, env=None):
    return RolloutCollector(env or make_two_way_reach(8), sampler, execution_horizon=4, seed=0)


def settings(**options):
    actor = ActorConfig(minibatch_size=64, num_epochs=2)
    return PPOConfig(critic_warmup_iterations=0, actor=actor, process_reward=ProcessRewardConfig(**options))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------------------- labels
def test_gripper_milestones_by_hand():
    opened_closed_opened = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    assert gripper_milestones(opened_closed_opened) == [2, 5]
    slowly, chatter = torch.linspace(0.0, 1.0, 9), torch.tensor([0.0, 0.0, 0.7, 0.3, 0.6, 1.0, 0.5, 1.0])
    assert gripper_milestones(slowly) == [6]
    assert gripper_milestones(chatter) == [5]
    assert gripper_milestones(torch.full((5,), 0.3)) == []


def test_segment_progress_by_hand():
    assert segment_progress(4).tolist() == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert segment_progress(6, [2, 5]).tolist() == pytest.approx([0, 1 / 6, 1 / 3, 4 / 9, 5 / 9, 2 / 3])
    for bad in ([0], [3, 2], [4]):
        with pytest.raises(ValueError, match=r"ascending and lie in 1\.\.3"):
            segment_progress(4, bad)


def test_rollouts_are_labelled_across_windows():
    """Decisions of an episode that runs through three windows get their share of it; a failure's are 0."""
    collector = make_collector(make_sampler())
    batch = collector.collect(3)
    model = ProcessReward(5, ProcessRewardConfig())
    nobody = torch.zeros_like(batch.terminated)
    first, second, third = nobody.clone(), nobody.clone(), nobody.clone()
    second[0, 1] = third[1, 0] = True  # environment 1 ends after 4 decisions, environment 0 after 8
    success = nobody.clone()
    success[1, 0] = True
    parts = [
        replace(batch, terminated=ended, truncated=nobody, success=won, features=batch.features + i)
        for i, (ended, won) in enumerate([(first, nobody), (second, nobody), (third, success)])
    ]
    for part in parts:
        model._label(part)
    labels = model._rollouts
    rows = batch.features.unflatten(0, (3, 8))
    assert labels.progress.tolist() == pytest.approx([0.0] * 4 + [j / 8 for j in range(8)])
    assert torch.equal(labels.features[:4], torch.cat([rows[:, 1], rows[:1, 1] + 1]))
    assert torch.equal(labels.features[4:], torch.cat([rows[:, 0], rows[:, 0] + 1, rows[:2, 0] + 2]))
    assert len(model._running[0]) == 1
    assert not model._succeeded.any()


# ------------------------------------------------------------------------------------------------------------- learning
def synthetic(n, seed):
    """Progress shows nonlinearly in two features of eight; one more tells the failures, whose label is 0."""
    rng = generator(seed)
    progress, fails = torch.rand(n, generator=rng), torch.rand(n, generator=rng) < 0.4
    noise = torch.randn(n, 8, generator=rng)
    noise[:, 0], noise[:, 1] = torch.sin(3.0 * progress), torch.cos(3.0 * progress)
    noise[:, 2] = torch.where(fails, -1.0, 1.0)
    return ProgressLabels(noise, torch.where(fails, 0.0, progress))


@pytest.mark.parametrize("shuffled", [False, True])
def test_it_learns_progress_and_from_shuffled_labels_it_does_not(shuffled):
    labels, held_out = synthetic(4096, 0), synthetic(2048, 1)
    if shuffled:
        labels = ProgressLabels(labels.features, labels.progress[torch.randperm(4096, generator=generator())])
    torch.manual_seed(0)
    model = ProcessReward(8, ProcessRewardConfig(num_updates=400), demos=labels)
    model.fit(generator())
    error = (model.potential(held_out.features) - held_out.progress).square().mean() / held_out.progress.var()
    explained = 1.0 - error.item()
    assert (explained < 0.02) if shuffled else (explained > 0.95)


# -------------------------------------------------------------------------------------------------------------- shaping
@pytest.mark.parametrize("env", [make_two_way_reach(8), make_point_maze(8, max_episode_steps=14)])
def test_shaped_rewards_of_an_episode_telescope(env):
    """Ends by termination and by truncation: only the first potential, and that of a cut-off last state, remain."""
    gamma, coef = 0.9, 0.7
    batch = make_collector(make_sampler(env.spec.state_dim), env).collect(12)
    model = ProcessReward(env.spec.state_dim, ProcessRewardConfig(coef=coef), demos=synthetic(4, 0))
    discounts = chunk_discount(batch.executed.flatten(0, 1), batch.terminated.flatten(), gamma).view(12, 8)
    shaping = model.shaping(batch, discounts)
    potential = model.potential(batch.features).view(12, 8)
    at_ends, checked = model.potential(batch.bootstrap_features), 0
    for n in range(8):
        start = 0
        for end in batch.ended[:, n].nonzero().flatten().tolist():
            steps = batch.executed[start : end + 1, n].sum(dim=1)
            before = gamma ** (steps.cumsum(0) - steps).double()
            total = (before * shaping[start : end + 1, n]).sum().item()
            last = at_ends[batch.bootstrap_index[end, n]].item() if not batch.terminated[end, n] else 0.0
            expected = coef * (gamma ** int(steps.sum()) * last - potential[start, n].item())
            assert total == pytest.approx(expected, abs=1e-5)
            start, checked = end + 1, checked + 1
    assert checked >= 8


def test_shaping_changes_no_advantage_but_by_a_function_of_the_state():
    """With full returns (lambda 1) and a critic of zero, -coef * P(s) at every decision of an episode that ended, so
    every comparison of actions in a state stays as it was."""
    sampler = make_sampler()
    batch = make_collector(sampler).collect(12)
    found = {}
    for config in (settings(coef=0.5), replace(settings(), process_reward=None)):
        ppo = PPO(sampler, replace(config, gae_lambda=1.0), progress_demos=None)
        for parameter in ppo.critic.parameters():
            torch.nn.init.zeros_(parameter)
        if ppo.process_reward is not None:
            ppo.process_reward._label(batch)
            potential = ppo.process_reward.potential(batch.features).view(12, 8)
        found[config.process_reward is not None] = ppo.advantages(batch)[0]
    difference = found[True] - found[False]
    ends_later = batch.terminated.flip(0).cumsum(0).flip(0) > 0
    assert ends_later.sum() > 30
    torch.testing.assert_close(difference[ends_later], -0.5 * potential[ends_later])
    assert potential.std() > 1e-3


def test_it_makes_a_sparse_reward_dense():
    """Two states that differ in nothing but how far they are: the step onwards is rewarded, the step back costs."""
    labels = synthetic(4096, 0)
    torch.manual_seed(0)
    model = ProcessReward(8, ProcessRewardConfig(num_updates=400), demos=labels)
    model.fit(generator())
    near, far = (torch.tensor([[torch.sin(p), torch.cos(p), 1.0, 0, 0, 0, 0, 0]]) for p in torch.tensor([2.4, 0.6]))
    assert (model.potential(near) - model.potential(far)).item() == pytest.approx(0.6, abs=0.1)


# ---------------------------------------------------------------------------------------------------------- the updates
def test_ppo_uses_it_and_resumes_bit_for_bit():
    demos = ProgressLabels(torch.randn(64, 5, generator=generator()), torch.rand(64, generator=generator(1)))

    def start():
        sampler = make_sampler()
        return PPO(sampler, settings(num_updates=4), progress_demos=demos), make_collector(sampler)

    def go_on(ppo, collector):
        return [ppo.update(collector.collect(5)) for _ in range(2)]

    whole, collector = start()
    first = go_on(whole, collector)
    assert all(m["ratio_error_first"] < 1e-5 for m in first)
    assert "progress_loss" in first[0]
    saved = copy.deepcopy((whole.state_dict(), collector.state_dict()))
    go_on(whole, collector)
    resumed, again = start()
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    go_on(resumed, again)
    for part in ("actor", "process_reward"):
        name = {"actor": "policy", "process_reward": "head"}[part]
        ours, other = whole.state_dict()[part][name], resumed.state_dict()[part][name]
        assert all(torch.equal(ours[k], other[k]) for k in ours)
    assert torch.equal(whole.process_reward._rollouts.features, resumed.process_reward._rollouts.features)


def test_it_is_off_by_default_and_then_nothing_changes():
    assert PPOConfig().process_reward is None
    sampler = make_sampler()
    batch = make_collector(sampler).collect(4)
    plain = PPO(sampler, replace(settings(), process_reward=None))
    unlabelled = PPO(copy.deepcopy(sampler), settings())
    for ours, other in zip(plain.advantages(batch), unlabelled.advantages(batch), strict=True):
        assert torch.equal(ours, other)  # no label yet: the potential is 0
    with pytest.raises(ValueError, match="no effect without process_reward"):
        PPO(sampler, PPOConfig(), progress_demos=synthetic(4, 0))
    sampler.policy.encoder_is_frozen = False
    with pytest.raises(ValueError, match="keeps features"):
        PPO(sampler, settings())
    for bad in ({"coef": 0.0}, {"num_updates": 0}):
        with pytest.raises(ValueError, match=r"expected|positive"):
            ProcessRewardConfig(**bad)
