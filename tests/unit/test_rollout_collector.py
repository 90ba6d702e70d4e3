"""The collector against environments whose episodes end where their seed says."""

import copy

import pytest
import torch

from tests.contract.scripted_env import FAILURE, SUCCESS, TIME, ScriptedEnv, script
from vla_rl.core import Observation
from vla_rl.envs.two_way_reach import make_two_way_reach
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.flow import FlowSamplerConfig
from vla_rl.flow.sampler import FlowSampler, GaussianSampler
from vla_rl.onpolicy import PPO, PPOConfig
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.policies.gaussian import GaussianMLP, GaussianMLPConfig
from vla_rl.rollout.collector import RolloutCollector


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class LearningEncoder(FlowMLP):
    """A flow policy whose encoder has a weight that learns."""

    encoder_is_frozen = False

    def __init__(self, config):
        super().__init__(config)
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.num_encoded = 0

    def encode(self, inputs):
        self.num_encoded += len(inputs)
        prefix = super().encode(inputs)
        return type(prefix)(prefix.tokens * self.gain, prefix.mask, prefix.pooled * self.gain)


def make_sampler(state_dim=3, policy_class=FlowMLP, mode="hybrid", horizon=4):
    torch.manual_seed(0)
    policy = policy_class(FlowMLPConfig(state_dim=state_dim, action_dim=2, action_horizon=horizon, width=16))
    return FlowSampler(policy, FlowSamplerConfig(mode=mode, noise_level=0.5))


def scripted(num_envs, **options):
    return ChunkedEnv(ScriptedEnv(num_envs), images=False, **options)


def test_layout_ends_and_successors():
    """Env 0 succeeds at step 2, env 1 runs out of time at step 5, env 2 goes on; chunks of 3."""
    seeds = [script(SUCCESS, 2), script(TIME, 5), script(FAILURE, 100)]
    collector = RolloutCollector(scripted(3), make_sampler(), execution_horizon=3, seed=0, env_seeds=seeds)
    batch = collector.collect(2)
    assert batch.rewards.shape == (2, 3, 3)
    assert batch.executed[0].tolist() == [[True, True, False], [True] * 3, [True] * 3]
    assert batch.executed[1, 1].tolist() == [True, True, False]
    assert batch.terminated[0].tolist() == [True, False, False]
    assert batch.truncated[1, 1]
    assert not batch.terminated[1, 1]
    assert batch.valid.all()
    assert batch.features.shape == (6, 3)
    assert torch.equal(batch.prefix.pooled, batch.features)
    # state is (seed, time, sum): the truncated episode's own last frame, not that of the episode after it
    final = batch.bootstrap_features[batch.bootstrap_index[1, 1]]
    assert final[:2].tolist() == [float(script(TIME, 5)), 5.0]
    going_on = batch.bootstrap_features[batch.bootstrap_index[1, 2]]
    assert going_on[:2].tolist() == [float(script(FAILURE, 100)), 6.0]
    assert (batch.bootstrap_index[0] == -1).all()
    # row = t * N + n
    assert batch.features[3 + 2, :2].tolist() == [float(script(FAILURE, 100)), 3.0]


def test_next_values_are_of_the_true_successor():
    seeds = [script(SUCCESS, 2), script(TIME, 5), script(FAILURE, 100)]
    collector = RolloutCollector(scripted(3), make_sampler(), execution_horizon=3, seed=0, env_seeds=seeds)
    batch = collector.collect(3)

    def value(features):  # a value that shows which frame it was computed from
        return features[:, 0] + 0.01 * features[:, 1]

    values = value(batch.features).view(3, 3)
    following = batch.next_values(values, value(batch.bootstrap_features))
    assert following[0, 0] == 0.0  # terminated
    assert following[0, 1] == values[1, 1]
    assert following[1, 1].item() == pytest.approx(script(TIME, 5) + 0.05)  # truncated: its last frame
    assert following[0, 2] == values[1, 2]
    assert following[2, 2].item() == pytest.approx(script(FAILURE, 100) + 0.09)  # the window's end
    assert values[2, 1] != pytest.approx(script(TIME, 5) + 0.05)


def test_episode_statistics():
    seeds = [script(SUCCESS, 2), script(TIME, 5), script(FAILURE, 4)]
    collector = RolloutCollector(scripted(3), make_sampler(), execution_horizon=3, seed=0, env_seeds=seeds)
    batch = collector.collect(2)
    stats = batch.episodes
    by_length = {int(length): bool(s) for length, s in zip(stats.length, stats.success_once, strict=True)}
    assert by_length[2] is True
    assert by_length[5] is False
    assert by_length[4] is False
    returns = {int(length): float(r) for length, r in zip(stats.length, stats.returns, strict=True)}
    assert returns[5] == pytest.approx(float(batch.rewards[:, 1].sum()), abs=1e-5)
    metrics = stats.metrics()
    assert metrics["success_rate"] == pytest.approx(float(stats.success_once.float().mean()))
    # an episode that goes on across two windows is counted once, with its whole length
    long = RolloutCollector(scripted(1), make_sampler(), execution_horizon=3, seed=0, env_seeds=[script(TIME, 8)])
    assert len(long.collect(2).episodes) == 0
    assert long.collect(1).episodes.length.tolist() == [8]


def test_actions_reach_the_environment_unclamped_and_the_trace_is_raw():
    sampler = make_sampler(state_dim=5)
    sampler.policy.action_normalizer.scale.fill_(20.0)
    env = make_two_way_reach(8)
    seen = []
    step = env.step
    env.step = lambda actions, **options: (seen.append(actions.clone()), step(actions, **options))[1]
    collector = RolloutCollector(env, sampler, execution_horizon=4, seed=0)
    batch = collector.collect(2)
    assert seen[0].abs().max() > 1.0  # clamping is the environment's business
    assert env.observe().state[:, :2].abs().max() < 2.0  # and it did clamp
    score = sampler.score(batch.prefix, batch.trace)
    torch.testing.assert_close(score.joint, batch.trace.log_prob, atol=1e-5, rtol=1e-6)


def test_only_the_execution_horizon_is_executed():
    sampler = make_sampler(horizon=4)
    env = scripted(2)
    shapes = []
    step = env.step
    env.step = lambda actions: (shapes.append(tuple(actions.shape)), step(actions))[1]
    RolloutCollector(env, sampler, execution_horizon=2, seed=0).collect(1)
    assert shapes == [(2, 2, 2)]
    with pytest.raises(ValueError, match=r"expected 1\.\.4"):
        RolloutCollector(env, sampler, execution_horizon=5, seed=0)


def test_each_decision_is_encoded_once_and_final_frames_only_where_needed():
    seeds = [script(SUCCESS, 2), script(TIME, 5), script(FAILURE, 100)]
    sampler = make_sampler(policy_class=LearningEncoder)
    collector = RolloutCollector(scripted(3), sampler, execution_horizon=3, seed=0, env_seeds=seeds)
    batch = collector.collect(2)
    truncated = int((batch.truncated & ~batch.terminated).sum())
    assert truncated >= 1
    assert sampler.policy.num_encoded == 3 * 3 + truncated  # decisions, the last bootstrap, truncated frames
    assert batch.prefix is None
    assert len(batch.inputs) == 6
    # after an update the encoder is another one, and the current observation is encoded again
    with torch.no_grad():
        sampler.policy.gain.fill_(2.0)
    before = sampler.policy.num_encoded
    again = collector.collect(1)
    assert sampler.policy.num_encoded - before >= 6
    torch.testing.assert_close(again.features, 2.0 * again.inputs.state)


@pytest.mark.parametrize("mode", ["hybrid", "full"])
def test_resume_goes_on_bit_for_bit(mode):
    sampler = make_sampler(state_dim=5, mode=mode)
    whole = RolloutCollector(make_two_way_reach(6), sampler, execution_horizon=4, seed=3)
    whole.collect(5)
    state = copy.deepcopy(whole.state_dict())
    expected = whole.collect(6)
    resumed = RolloutCollector(make_two_way_reach(6), sampler, execution_horizon=4, seed=99)
    resumed.load_state_dict(state)
    batch = resumed.collect(6)
    for name in ("features", "rewards", "executed", "terminated", "bootstrap_features", "bootstrap_index"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    for name in ("states", "step_index", "log_prob"):
        assert torch.equal(getattr(batch.trace, name), getattr(expected.trace, name)), name
    assert torch.equal(batch.episodes.returns, expected.episodes.returns)
    assert torch.equal(batch.episodes.length, expected.episodes.length)


def test_resume_before_the_first_decision():
    sampler = make_sampler(state_dim=5)
    state = RolloutCollector(make_two_way_reach(3), sampler, execution_horizon=4, seed=3).state_dict()
    fresh = RolloutCollector(make_two_way_reach(3), sampler, execution_horizon=4, seed=3)
    expected = fresh.collect(2)
    resumed = RolloutCollector(make_two_way_reach(3), sampler, execution_horizon=4, seed=3)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.collect(2).features, expected.features)


@pytest.mark.parametrize("auto_reset", [True, False])
def test_one_episode_of_each_environment(auto_reset):
    seeds = [script(SUCCESS, 2), script(TIME, 5), script(FAILURE, 9)]
    env = ChunkedEnv(ScriptedEnv(3, max_episode_steps=12), images=False, auto_reset=auto_reset)
    collector = RolloutCollector(env, make_sampler(), execution_horizon=3, seed=0)
    batch = collector.collect_episodes(seeds)
    assert batch.valid.tolist() == [[True] * 3, [False, True, True], [False, False, True]]
    assert batch.executed.sum(dim=(0, 2)).tolist() == [2, 5, 9]
    assert sorted(batch.episodes.length.tolist()) == [2, 5, 9]
    assert len(batch.episodes) == 3


def test_gaussian_policy_is_collected_too():
    torch.manual_seed(0)
    sampler = GaussianSampler(GaussianMLP(GaussianMLPConfig(state_dim=5, action_dim=2, action_horizon=4)))
    batch = RolloutCollector(make_two_way_reach(4), sampler, execution_horizon=4, seed=0).collect(3)
    score = sampler.score(batch.prefix, batch.trace)
    torch.testing.assert_close(score.joint, batch.trace.log_prob, atol=1e-5, rtol=1e-6)
    mean, std = sampler.policy.distribution(batch.prefix)
    expected = torch.distributions.Normal(mean, std).log_prob(batch.trace.actions).sum(dim=(1, 2))
    torch.testing.assert_close(score.joint, expected, atol=1e-5, rtol=1e-6)


def test_wrong_use_is_an_error():
    sampler = make_sampler()
    with pytest.raises(ValueError, match="auto_reset=True"):
        RolloutCollector(scripted(1, auto_reset=False), sampler, execution_horizon=3, seed=0).collect(1)
    with pytest.raises(ValueError, match="no max_episode_steps"):
        RolloutCollector(scripted(1), sampler, execution_horizon=3, seed=0).collect_episodes([1])
    with pytest.raises(ValueError, match="at least 1"):
        RolloutCollector(scripted(1), sampler, execution_horizon=3, seed=0).collect(0)
    assert isinstance(scripted(1).reset([0]), Observation)


@pytest.mark.parametrize("encoder_learns", [False, True])
def test_slices_of_the_environments_see_what_the_whole_sees(encoder_learns):
    """Bit for bit with a fixed batch for the policy, to rounding without."""
    sampler = make_sampler(state_dim=5, policy_class=LearningEncoder if encoder_learns else FlowMLP)

    def collect(num_envs, first_env, size):
        collector = RolloutCollector(
            make_two_way_reach(num_envs),
            sampler,
            execution_horizon=4,
            seed=3,
            first_env=first_env,
            policy_batch_size=size,
        )
        collector.collect(3)  # an address counts the calls too
        return collector.collect(6)

    whole, plain = collect(12, 0, 4), collect(12, 0, None)
    parts = [collect(4, 0, 4), collect(8, 4, 4)]
    plain_parts = [collect(4, 0, None), collect(8, 4, None)]
    for name in ("rewards", "executed", "terminated", "success", "policy_version"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts], dim=1), getattr(whole, name)), name
    for part, batch, exact in ((parts, whole, True), (plain_parts, plain, False)):
        for rows in (lambda b: b.features, lambda b: b.trace.states, lambda b: b.trace.log_prob):
            joined = torch.cat([rows(p).unflatten(0, (6, -1)) for p in part], dim=1).flatten(0, 1)
            if exact:
                assert torch.equal(joined, rows(batch))
            torch.testing.assert_close(joined, rows(batch), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="divisor of the 12 environments"):
        collect(12, 0, 5)


def test_final_frames_are_encoded_in_the_row_of_their_environment():
    """Two environments of a block, and one of the other, run out of time in the same chunk."""
    seeds = [
        script(FAILURE, 90),
        script(TIME, 3),
        script(TIME, 2),
        script(FAILURE, 99),
        script(TIME, 1),
        script(TIME, 9),
    ]
    sampler = make_sampler(policy_class=LearningEncoder)
    options = {"execution_horizon": 3, "seed": 0, "env_seeds": seeds}
    batch, blocks = (
        RolloutCollector(scripted(6), sampler, policy_batch_size=size, **options).collect(1) for size in (None, 3)
    )
    assert batch.bootstrap_index.tolist() == [[3, 0, 1, 6, 2, 8]]
    assert torch.equal(blocks.bootstrap_index, batch.bootstrap_index)
    final = blocks.bootstrap_features[blocks.bootstrap_index[0]]
    assert final[:, 0].tolist() == [float(s) for s in seeds]
    torch.testing.assert_close(blocks.bootstrap_features, batch.bootstrap_features)


def test_prefixes_beyond_the_bound_are_encoded_again_with_the_same_update():
    def update(gib):
        sampler = make_sampler(state_dim=5)
        collector = RolloutCollector(make_two_way_reach(4), sampler, execution_horizon=4, seed=0, prefix_cache_gib=gib)
        batch = collector.collect(3)
        assert (batch.prefix is None) == (gib == 0.0)
        assert (batch.inputs is None) == (gib > 0.0)
        kept = batch.inputs if batch.prefix is None else batch.prefix
        assert kept is not None
        cached = collector.metrics()["rollout/prefix_cache_gib"]
        assert cached == kept.num_bytes / 2**30 > 0.0
        metrics = PPO(sampler, PPOConfig(num_decisions=3, critic_warmup_iterations=0)).update(batch)
        return metrics, next(iter(sampler.policy.parameters())).detach().clone()

    (kept, weights), (again, same_weights) = update(1.0), update(0.0)
    assert kept == pytest.approx(again)
    torch.testing.assert_close(weights, same_weights)
