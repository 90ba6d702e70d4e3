"""The replay buffer against a reference that walks each episode step by step, and against the known mistakes."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.contract.scripted_env import FAILURE, SUCCESS, SUCCESS_AND_TIME, TIME, ScriptedEnv, script
from tests.unit.replay_reference import MISTAKES, differs, record, reference, store
from vla_rl.core import ActionSpec, CameraSpec, Source, Taken
from vla_rl.data.feature_cache import FeatureCache
from vla_rl.data.lerobot_format import DatasetSpec
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.data.lerobot_writer import LeRobotWriter
from vla_rl.data.replay import ReplayBuffer, ReplayConfig, SamplingWeights
from vla_rl.data.replay_mixing import MixedReplay, mix, offline_positions
from vla_rl.data.replay_writer import EpisodeWriter, add_lerobot
from vla_rl.data.returns import monte_carlo_returns
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig
from vla_rl.train.checkpoint import CheckpointError

torch.set_num_threads(1)
CONFIG = ReplayConfig(capacity=400, gamma=0.9, reward_scale=10.0, reward_bias=-4.0)
# length, terminated, truncated: each way to end, and lengths around the horizons
ENDS = [(9, True, False), (9, False, True), (9, True, True), (1, True, False), (1, False, True), (4, False, True)]


def make(config=CONFIG, **more):
    return ReplayBuffer(config, state_dim=2, action_dim=2, **more)


def filled(config=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    episodes = [record(i, *end, rng) for i, end in enumerate(ENDS)]
    buffer = make(config)
    for episode in episodes:
        store(buffer, episode)
    return buffer, episodes


def all_samples(buffer, episodes, horizon):
    """Every start's sample beside its episode, the one after it, and the step."""
    batch = buffer.batch(buffer.starts(horizon), horizon, prefixes=True)
    for row, (e, t) in enumerate(batch.obs.astype(int)):
        yield batch, row, episodes[e], episodes[(e + 1) % len(episodes)], t


# ------------------------------------------------------------------------------------------------------------- targets
@pytest.mark.parametrize("horizon", [1, 3, 9, 20])
def test_every_start_is_as_the_reference_says(horizon):
    buffer, episodes = filled()
    starts = []
    for batch, row, episode, following, t in all_samples(buffer, episodes, horizon):
        assert differs(batch, row, reference(episode, following, t, horizon, CONFIG)) == []
        starts.append((int(batch.obs[row, 0]), t))
    # every step is a start, the last h-1 of an episode too; not decision points only
    assert starts == [(e, t) for e, episode in enumerate(episodes) for t in range(len(episode))]
    assert len(buffer) == sum(map(len, episodes))
    assert batch.weight.min() == batch.weight.max() == 1
    assert batch.mask[:, 0].all()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_buffer_with_the_mistake_would_be_found_out(mistake):
    buffer, episodes = filled()
    wrong = [
        differs(batch, row, reference(episode, following, t, 5, CONFIG, mistake))
        for batch, row, episode, following, t in all_samples(buffer, episodes, 5)
    ]
    assert any(wrong)


@pytest.mark.parametrize("horizon", [1, 4, 12])
def test_prefix_targets_are_the_targets_of_shorter_chunks(horizon):
    buffer, episodes = filled()
    for batch, row, episode, following, t in all_samples(buffer, episodes, horizon):
        k, prefix = min(horizon, len(episode) - t), batch._asdict()
        for i in range(1, horizon + 1):
            wanted = reference(episode, following, t, min(i, k), CONFIG)  # past the end they equal those of k
            assert prefix["prefix_reward"][row, i - 1] == pytest.approx(wanted["reward"], abs=1e-4)
            assert prefix["prefix_discount"][row, i - 1] == pytest.approx(wanted["discount"], abs=1e-6)
            assert prefix["prefix_next_obs"][row, i - 1].tolist() == wanted["next_obs"].tolist()
        assert prefix["prefix_next_rows"][row].tolist() == [batch.rows[row] + min(i, k) for i in range(1, horizon + 1)]
    assert prefix["prefix_mask"].all()
    assert np.array_equal(prefix["prefix_reward"][:, -1], batch.reward)
    assert np.array_equal(prefix["prefix_discount"][:, -1], batch.discount)


def test_a_partial_chunk_discounted_for_the_whole_horizon_errs_by_three_units():
    buffer = make(ReplayConfig(capacity=10, gamma=0.99))
    store(buffer, record(0, 1, False, True, np.random.default_rng(0)))
    discount = float(buffer.batch(np.array([0]), 10).discount[0])
    assert discount == pytest.approx(0.99)
    assert -39 * (0.99**10 - discount) == pytest.approx(3.34, abs=0.01)


def test_minibatches_and_determinism():
    buffer, _ = filled()
    a, b = (buffer.sample(6, np.random.default_rng(3), horizon=4, prefixes=True, num_minibatches=5) for _ in range(2))
    assert a.actions.shape == (5, 6, 4, 2)
    assert a.prefix_next_obs.shape == (5, 6, 4, 2)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert a.obs.dtype == a.reward.dtype == a.discount.dtype == a.mc_return.dtype == np.float32


# ---------------------------------------------------------------------------------------------------------------- ring
def test_after_the_ring_wraps_no_chunk_crosses_the_seam_and_none_of_the_capacity_is_lost():
    rng = np.random.default_rng(0)
    buffer = make(ReplayConfig(capacity=40, gamma=0.9))
    episodes = {}
    for e in range(60):
        episodes[e] = record(e, 7, e % 2 == 0, e % 2 == 1, rng)
        store(buffer, episodes[e])
        kept = range(max(0, e - 4), e + 1)  # 40 rows hold five episodes of 8
        assert [tuple(o.astype(int)) for o in sorted(buffer.rows.obs[buffer.starts(3)], key=tuple)] == [
            (i, t) for i in kept for t in range(7)
        ]
        for batch, row, episode, following, t in all_samples(buffer, [*episodes.values()], 3):
            assert differs(batch, row, reference(episode, following, t, 3, buffer.config)) == []
    # the naive start rule, any row but the last h of the ring, reaches into other episodes
    naive = np.arange(40 - 3)
    crossing = buffer.rows.episode[naive] != buffer.rows.episode[naive + 3]
    assert crossing.any()
    assert not np.isin(naive[crossing & (buffer.rows.end[naive] == naive)], buffer.starts(3)).any()


def test_an_episode_is_dropped_whole_and_the_rest_of_the_ring_stays_empty_rather_than_split_one():
    rng = np.random.default_rng(0)
    buffer = make(ReplayConfig(capacity=20, gamma=0.9))
    for e, length in enumerate((5, 5, 5)):  # rows 0-5, 6-11, 12-17
        store(buffer, record(e, length, True, False, rng))
    store(buffer, record(3, 2, True, False, rng))  # needs 3, two are left: wraps, and drops episode 0
    assert sorted(set(buffer.rows.obs[buffer.starts(2), 0])) == [1, 2, 3]
    assert len(buffer) == 12
    assert buffer.num_episodes == 3
    with pytest.raises(ValueError, match=r"20 steps needs 21 rows, the capacity is 20"):
        store(buffer, record(4, 20, True, False, rng))
    assert len(buffer) == 12  # nothing was lost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": np.array([0.0, np.nan, 0.0])}, "not finite"),
        ({"actions": np.zeros((4, 2))}, r"actions must be \[3, 2\]"),
        ({"state": np.zeros((3, 2))}, r"state must be \[4, 2\]"),
        ({"truncated": False}, "an episode has ended"),
        ({"observed": [True, True, True, False]}, "final observation"),
        ({"images": {"agent": np.zeros((4, 2, 2, 3), np.uint8)}}, "images of"),
    ],
)
def test_bad_episodes_are_refused_and_change_nothing(change, message):
    buffer = make()
    good = {"state": np.zeros((4, 2)), "actions": np.zeros((3, 2)), "rewards": np.zeros(3)}
    with pytest.raises(ValueError, match=message):
        buffer.add_episode(**(good | {"terminated": False, "truncated": True} | change))
    with pytest.raises(ValueError, match="no chunk of 2 steps"):
        buffer.sample(1, np.random.default_rng(0), horizon=2)
    with pytest.raises(ValueError, match="are no starts"):
        buffer.batch(np.array([0]), 1)


# ------------------------------------------------------------------------------------------------------------- returns
def test_monte_carlo_returns_by_hand():
    def of(rewards, terminated, **more):
        return monte_carlo_returns(np.array(rewards), terminated=terminated, gamma=0.5, **more).tolist()

    assert of([1.0, 2.0, 4.0], True) == [3.0, 4.0, 4.0]
    assert of([-1.0, 0.0], False, reward_low=-1.0) == [-1.0 + 0.5 * (0.5 * -2.0), 0.5 * -2.0]
    assert of([-1.0, 0.0], False, reward_low=-1.0, truncated="none") == [-np.inf, -np.inf]
    assert of([-1.0, 0.0], False) == [-np.inf, -np.inf]
    assert of([-1.0, 0.0], False, reward_low=-1.0, truncated="finite") == [-1.0, 0.0]
    with pytest.raises(ValueError, match="reward of step 1 is nan"):
        of([0.0, np.nan], True)
    with pytest.raises(ValueError, match="below reward_low"):
        of([0.0, -2.0], True, reward_low=-1.0)


def test_cal_qls_sparse_rule_is_a_case_of_the_lower_bound():
    """AntMaze: r' = 10 * (0 or 1) - 5, so a failure is worth -5 / (1 - .99) = -500 at every step."""
    config = ReplayConfig(capacity=100, gamma=0.99, reward_scale=10.0, reward_bias=-5.0, reward_low=0.0)
    buffer = make(config)
    zeros = np.zeros(30)
    buffer.add_episode(
        state=np.zeros((31, 2)), actions=np.zeros((30, 2)), rewards=zeros, terminated=False, truncated=True
    )
    batch = buffer.batch(buffer.starts(5), 5)
    assert batch.mc_return == pytest.approx(np.full(30, -500.0), rel=1e-6)
    assert not np.allclose(monte_carlo_returns(zeros - 5, terminated=False, gamma=0.99, truncated="finite"), -500, 0.1)


def test_the_bound_is_below_the_value_where_the_finite_sum_is_far_above_it():
    """Kitchen's bias of -4: the last step before a truncation would be worth -4 and is worth at most -400 + ..."""
    rng = np.random.default_rng(0)
    value = -4.0 / (1 - 0.99)  # of a policy that never solves anything
    rewards = np.full(50, -4.0)
    bound = monte_carlo_returns(rewards, terminated=False, gamma=0.99, reward_low=-4.0)
    finite = monte_carlo_returns(rewards, terminated=False, gamma=0.99, reward_low=-4.0, truncated="finite")
    assert (bound <= value + 1e-9).all()
    assert (finite > value + 200).all()
    buffer = make(ReplayConfig(capacity=50, gamma=0.9, reward_scale=2.0, reward_bias=-1.0))
    episode = record(0, 6, True, False, rng)
    store(buffer, episode)
    steps = 2.0 * episode.rewards.astype(np.float64) - 1.0  # the transform that the rewards of a chunk get
    wanted = [sum(0.9**i * r for i, r in enumerate(steps[t:])) for t in range(6)]
    for horizon in (1, 4):  # a chunk does not change a state's return
        assert buffer.batch(buffer.starts(horizon), horizon).mc_return == pytest.approx(wanted, rel=1e-5)


# ------------------------------------------------------------------------------------------------- weights and mixtures
def test_weights_change_how_often_a_start_is_drawn_and_not_what_it_is():
    rng = np.random.default_rng(0)
    weights = SamplingWeights(reward=5.0, success=3.0)
    buffers = {}
    for in_loss in (False, True):
        config = ReplayConfig(capacity=100, gamma=0.9, weights=SamplingWeights(5.0, 0.0, 3.0, in_loss))
        buffers[in_loss] = buffer = make(config)
        for e, success in enumerate((True, False)):
            rewards = np.zeros(6)
            rewards[-1] = success
            buffer.add_episode(
                state=np.full((7, 2), e),
                actions=np.zeros((6, 2)),
                rewards=rewards,
                terminated=success,
                truncated=not success,
                success=success,
            )
    assert not weights.uniform
    wanted = np.array([3, 3, 3, 3, 15, 15, 1, 1, 1, 1, 1, 1]) / 48  # H = 2: two starts reach the reward
    drawn = buffers[False].sample(40_000, rng, horizon=2)
    counts = np.bincount(np.searchsorted(buffers[False].starts(2), drawn.rows), minlength=12)
    assert counts / 40_000 == pytest.approx(wanted, abs=0.01)
    assert (drawn.weight == 1).all()
    assert len(buffers[False]) == 12
    assert drawn.mc_return.max() == 1.0  # a step that is repeated in time would give 1 + gamma + ...
    uniform = buffers[True].sample(40_000, rng, horizon=2)
    assert uniform.weight.mean() == pytest.approx(1.0, abs=0.02)
    per_start = {int(r): float(w) for r, w in zip(uniform.rows, uniform.weight, strict=True)}
    assert [per_start[r] for r in buffers[True].starts(2)] == pytest.approx(wanted * 12)


def test_every_minibatch_has_the_offline_ratio_and_its_rows_alternate():
    online, offline = filled()[0], filled(seed=1)[0]
    online.rows.obs[:, 0] += 100
    u, b = 4, 8
    batch = mix(online, offline, b, 0.5, np.random.default_rng(0), u, horizon=3, prefixes=True)
    is_offline = batch.obs[..., 0] < 100
    assert (is_offline.sum(axis=1) == 4).all()
    assert (is_offline[:, ::2].sum(axis=1) == 0).all()
    assert np.array_equal(is_offline, batch.rows >= online.num_rows)
    # one after the other and then cut into minibatches: some purely online, some purely offline
    joined = np.concatenate([np.zeros(16), np.ones(16)]).reshape(u, b)
    assert set(joined.sum(axis=1)) == {0, 8}
    assert offline_positions(8, 0.25).tolist() == [False, False, False, True] * 2
    with pytest.raises(ValueError, match="no whole number"):
        mix(online, offline, 8, 0.3, np.random.default_rng(0), 1, horizon=3)
    with pytest.raises(ValueError, match="one reward_scale"):
        mix(online, make(ReplayConfig(40, 0.9, reward_bias=-4.0)), 8, 0.5, np.random.default_rng(0), 1, horizon=3)


def test_a_mixture_is_sampled_and_looked_up_as_one_buffer():
    online, offline = filled()[0], filled(seed=1)[0]
    mixed = MixedReplay(online, offline, 0.25)
    batch = mixed.sample(8, np.random.default_rng(0), horizon=3)
    assert batch.obs.shape == (8, 2)
    assert (batch.rows >= online.num_rows).sum() == 2
    assert np.array_equal(mixed.observations(batch.rows).state.numpy(), batch.obs)
    assert np.array_equal(mixed.observations(batch.next_rows).state.numpy(), batch.next_obs)
    assert np.array_equal(mixed.proposals(batch.rows, 3), batch.actions)
    only = MixedReplay(online, offline, 1.0).sample(4, np.random.default_rng(0), horizon=3, num_minibatches=2)
    assert (only.rows >= online.num_rows).all()
    assert MixedReplay(make(), offline, 1.0).sample(4, np.random.default_rng(0), horizon=3).obs.shape == (4, 2)


# -------------------------------------------------------------------------------------------------------- environments
def rollout(k, seeds, num_decisions=12, horizon_scale=2.0, limit=9):
    """Scripted episodes, wrong and right ends among them: the buffer, its writer, and each step as it happened."""
    env = ChunkedEnv(ScriptedEnv(len(seeds), limit))
    config = ReplayConfig(capacity=500, gamma=0.9)
    buffer = ReplayBuffer(
        config,
        state_dim=3,
        action_dim=2,
        cameras={"agent": (2, 2)},
        num_envs=len(seeds),
        max_episode_steps=limit,
    )
    writer = EpisodeWriter(buffer, env.spec.action)
    obs, generator, decisions = env.reset(seeds), torch.Generator().manual_seed(0), []
    for _ in range(num_decisions):
        actions = horizon_scale * torch.randn(len(seeds), k, 2, generator=generator)
        step = env.step(actions)
        writer.add(obs, actions, step)
        decisions.append((obs, actions, step))
        obs = step.obs
    return env, buffer, writer, decisions, obs


SEEDS = [script(SUCCESS, 5), script(TIME, 3), script(SUCCESS_AND_TIME, 4), script(FAILURE, 2), script(4, 99)]


@pytest.mark.parametrize("k", [1, 4])
def test_rows_of_parallel_environments_are_what_the_environment_did(k):
    """With chunks of K as the horizon, the samples at decision points are the environment's own transitions."""
    _, buffer, _, decisions, _ = rollout(k, SEEDS)
    batch = buffer.batch(buffer.starts(k), k)
    found = {tuple(obs.tolist()): row for row, obs in enumerate(batch.obs)}
    checked = set()
    for obs, actions, step in decisions:
        for n in range(len(SEEDS)):
            row = found[tuple(obs.state[n].tolist())]
            count = int(step.executed[n].sum())
            assert batch.mask[row].sum() == count
            executed = actions[n, :count].clamp(-1, 1)  # what moved the arm, not what was sent
            assert torch.equal(torch.from_numpy(batch.actions[row, :count]), executed)
            assert batch.reward[row] == pytest.approx(float((step.rewards[n] * 0.9 ** torch.arange(k)).sum()), rel=1e-5)
            assert batch.discount[row] == pytest.approx(0.0 if step.terminated[n] else 0.9**count)
            assert batch.next_obs[row].tolist() == step.next_obs.state[n].tolist()
            seen = buffer.observations(batch.next_rows[[row]])
            assert torch.equal(seen.images["agent"][0], step.next_obs.images["agent"][n])
            assert buffer.observations(batch.rows[[row]]).instruction == (obs.instruction[n],)
            assert torch.equal(torch.from_numpy(buffer.proposals(batch.rows[[row]], k)[0, :count]), actions[n, :count])
            checked.add(row)
    assert checked == set(range(len(batch.rows)))  # and there is nothing else


def test_running_episodes_can_be_sampled_where_the_whole_chunk_was_executed():
    _, buffer, writer, _, _ = rollout(1, [script(4, 99)] * 2, num_decisions=5)
    assert buffer.num_episodes == 0
    assert len(buffer) == 10
    starts = buffer.starts(3)
    assert sorted(buffer.rows.step[starts]) == [0, 0, 1, 1, 2, 2]
    assert not any(len(buffer.starts(h)) for h in (6, 9, 10, 12))  # not the neighbour's rows either
    batch = buffer.sample(64, np.random.default_rng(0), horizon=3)
    assert batch.mask.all()
    assert (batch.mc_return == -np.inf).all()
    writer.cut()
    assert buffer.num_episodes == 2
    assert not buffer.running_steps.any()
    cut = buffer.batch(buffer.starts(3), 3)
    assert len(cut.rows) == 10
    assert (cut.discount > 0).all()


def test_only_decision_points_are_starts_where_nobody_looked_between_them():
    _, buffer, _, _, _ = rollout(4, [script(4, 99)], num_decisions=2, limit=20)
    assert buffer.rows.step[buffer.starts(4)].tolist() == [0, 4]
    assert buffer.rows.step[buffer.starts(8)].tolist() == [0]
    prefix = buffer.batch(buffer.starts(4), 4, prefixes=True).prefix_mask
    assert prefix.tolist() == [[False, False, False, True]] * 2
    with pytest.raises(ValueError, match="take their distance as the horizon"):
        buffer.sample(1, np.random.default_rng(0), horizon=3)


def test_the_writer_refuses_what_would_tear_an_episode():
    env, buffer, writer, _, obs = rollout(1, [script(4, 99)] * 2, num_decisions=3)
    other = env.reset([script(TIME, 7), script(TIME, 8)])
    actions = torch.zeros(2, 1, 2)
    with pytest.raises(ValueError, match=r"environments \[0, 1\].*call cut"):
        writer.add(other, actions, env.step(actions))
    writer.cut([0, 1])
    assert buffer.num_episodes == 2
    env.reset([script(4, 99)] * 2)
    blind = ChunkedEnv(ScriptedEnv(2, 9), final_images=False)
    first = blind.reset([script(TIME, 1)] * 2)
    with pytest.raises(ValueError, match="final_images=True"):
        writer.add(first, actions, blind.step(actions))
    long = ChunkedEnv(ScriptedEnv(2, 30))
    obs = long.reset([script(4, 99)] * 2)
    with pytest.raises(ValueError, match="longer than max_episode_steps 9"):  # noqa: PT012
        for _ in range(10):
            step = long.step(actions)
            writer.add(obs, actions, step)
            obs = step.obs


def test_interventions_keep_the_executed_action_beside_the_proposal():
    env = ChunkedEnv(ScriptedEnv(2, 3))
    buffer = ReplayBuffer(
        ReplayConfig(60, 0.9), state_dim=3, action_dim=2, cameras={"agent": (2, 2)}, num_envs=2, max_episode_steps=3
    )
    writer, obs = EpisodeWriter(buffer, env.spec.action), env.reset([script(4, 99), script(4, 98)])
    proposal, person = torch.full((2, 1, 2), 0.25), torch.full((2, 1, 2), -0.5)
    for t in range(3):
        human = torch.tensor([[t == 1], [False]])
        actions = torch.where(human[..., None], person, proposal)
        source = torch.where(human, int(Source.HUMAN), int(Source.POLICY)).to(torch.int8)
        step = replace(env.step(actions), taken=Taken(actions, source))
        ended = writer.add(obs, proposal, step, policy_version=t // 2)
        obs = step.obs
    assert ended.tolist() == [0, 1]
    assert buffer.rows.policy_version[:8].tolist() == [0, 0, 1, -1] * 2
    state = buffer.state_dict()
    for rows in (state["ring"], state["running"]):
        del rows["policy_version"]
    later = ReplayBuffer(
        ReplayConfig(60, 0.9), state_dim=3, action_dim=2, cameras={"agent": (2, 2)}, num_envs=2, max_episode_steps=3
    )
    later.load_state_dict(state)  # as it was written before replay knew of versions
    assert (later.rows.policy_version == -1).all()
    assert later.rows.source[:8].tolist() == buffer.rows.source[:8].tolist()
    batch = buffer.batch(buffer.starts(3)[:1], 3)
    assert batch.actions[0, :, 0].tolist() == [0.25, -0.5, 0.25]
    assert buffer.proposals(batch.rows, 3)[0, :, 0].tolist() == [0.25] * 3
    assert buffer.rows.source[:3].tolist() == [Source.POLICY, Source.HUMAN, Source.POLICY]


# --------------------------------------------------------------------------------------------------------------- demos
def test_demonstrations_end_as_the_dataset_says(tmp_path):
    spec = DatasetSpec(10, ("episode", "frame"), ("x", "y"), {"agent": CameraSpec(2, 2)}, "arm")
    with LeRobotWriter.open(tmp_path / "demos", spec, episodes_per_commit=4) as writer:
        for e, truncated in enumerate((False, True)):
            reward = torch.tensor([0.0, 0.0, 0.0, float(not truncated)])
            writer.add_episode(
                state=torch.tensor([[e, t] for t in range(4)], dtype=torch.float32),
                action=torch.arange(8.0).reshape(4, 2) + e,
                images={"agent": torch.full((4, 2, 2, 3), 9, dtype=torch.uint8)},
                reward=reward,
                success=reward > 0,
                instruction=f"task {e}",
                truncated=truncated,
            )
    buffer = make(ReplayConfig(20, 0.9, reward_low=0.0), cameras={"agent": (2, 2)})
    assert add_lerobot(buffer, LeRobotDataset(tmp_path / "demos")) == 7  # no frame follows the truncated one's last
    batch = buffer.batch(buffer.starts(4), 4)
    assert batch.discount.tolist() == pytest.approx([0, 0, 0, 0, 0.9**3, 0.9**2, 0.9])
    assert batch.reward[:4].tolist() == pytest.approx([0.9**3, 0.9**2, 0.9, 1.0])
    assert batch.mc_return.tolist() == pytest.approx([0.9**3, 0.9**2, 0.9, 1.0, 0, 0, 0])
    assert batch.next_obs[4:].tolist() == [[1, 3]] * 3
    assert (buffer.rows.source[batch.rows] == Source.DEMO).all()
    assert buffer.rows.success[batch.rows].tolist() == [True] * 4 + [False] * 3


# ------------------------------------------------------------------------------------------------------------ features
def tiny(seed=0):
    torch.manual_seed(seed)
    policy = TinyVLA(TinyVLAConfig(state_dim=3, action_dim=2, cameras=("agent",), image_size=16))
    policy.freeze_encoder()
    return policy


def with_features(policy, steps=6):
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(
        ReplayConfig(60, 0.9), state_dim=3, action_dim=2, cameras={"agent": (16, 16)}, feature_dim=policy.feature_dim
    )
    for e in range(2):
        buffer.add_episode(
            state=rng.standard_normal((steps + 1, 3)),
            actions=np.zeros((steps, 2)),
            rewards=np.zeros(steps),
            terminated=False,
            truncated=True,
            images={"agent": rng.integers(0, 255, (steps + 1, 16, 16, 3), dtype=np.uint8)},
            instruction=f"push block {e}",
        )
    return buffer


def test_features_are_computed_once_and_again_when_the_encoder_changes():
    policy = tiny()
    buffer, cache = with_features(policy), FeatureCache(policy, batch_size=5)
    with pytest.raises(RuntimeError, match=r"14 observed rows have no features.*FeatureCache.refresh"):
        buffer.sample(4, np.random.default_rng(0), horizon=2)
    assert cache.refresh(buffer) == 14
    assert cache.refresh(buffer) == 0
    batch = buffer.sample(4, np.random.default_rng(0), horizon=2)
    assert batch.obs.shape == (4, policy.feature_dim + 3)
    for rows, obs in ((batch.rows, batch.obs), (batch.next_rows, batch.next_obs)):
        seen = buffer.observations(rows)
        with torch.no_grad():
            pooled = policy.eval().encode(policy.preprocess(seen)).pooled
        assert obs[:, : policy.feature_dim] == pytest.approx(pooled.numpy(), abs=1e-5)
        assert np.array_equal(obs[:, policy.feature_dim :], seen.state.numpy())
    next(p for p in policy.parameters() if p.requires_grad).data += 1.0  # the action head learns
    assert cache.refresh(buffer) == 0
    next(policy.encoder.parameters()).data += 0.01  # behind autograd's back
    assert cache.refresh(buffer) == 14
    again = buffer.batch(batch.rows, 2)
    assert not np.allclose(again.obs[:, : policy.feature_dim], batch.obs[:, : policy.feature_dim])
    policy.encoder.requires_grad_(True)
    with pytest.raises(ValueError, match="encoder learns"):
        cache.refresh(buffer)


def test_new_data_without_features_is_never_sampled_silently(tmp_path):
    policy = tiny()
    buffer, cache = with_features(policy), FeatureCache(policy)
    cache.refresh(buffer)
    buffer.save(tmp_path / "replay.pt")
    loaded = with_features(policy, steps=1)
    loaded.load(tmp_path / "replay.pt")
    assert cache.refresh(loaded) == 0  # kept across a restart
    loaded.add_episode(
        state=np.zeros((4, 3)),
        actions=np.zeros((3, 2)),
        rewards=np.zeros(3),
        terminated=True,
        truncated=False,
        images={"agent": np.zeros((4, 16, 16, 3), np.uint8)},
    )
    with pytest.raises(RuntimeError, match="4 observed rows have no features"):
        loaded.sample(64, np.random.default_rng(0), horizon=1)
    assert cache.refresh(loaded) == 4
    loaded.sample(64, np.random.default_rng(0), horizon=1)


def test_features_of_a_running_episode_come_with_its_decisions():
    env = ChunkedEnv(ScriptedEnv(2, 9))
    buffer = ReplayBuffer(
        ReplayConfig(60, 0.9),
        state_dim=3,
        action_dim=2,
        cameras={"agent": (2, 2)},
        feature_dim=1,
        num_envs=2,
        max_episode_steps=9,
    )
    writer, obs = EpisodeWriter(buffer, env.spec.action), env.reset([script(4, 99), script(4, 98)])
    for t in range(4):
        step = env.step(torch.zeros(2, 1, 2))
        writer.add(obs, torch.zeros(2, 1, 2), step, features=np.full((2, 1), 10.0 + t), encoder_version="a")
        obs = step.obs
    batch = buffer.batch(buffer.starts(1), 1)
    # the fourth step's successor has no features yet
    assert sorted(zip(batch.obs[:, 0], batch.next_obs[:, 0], strict=True)) == [
        (10, 11), (10, 11), (11, 12), (11, 12), (12, 13), (12, 13)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="encoder_version"):
        writer.add(obs, torch.zeros(2, 1, 2), env.step(torch.zeros(2, 1, 2)), features=np.zeros((2, 1)))


# --------------------------------------------------------------------------------------------------------------- state
@pytest.mark.parametrize("mapped", [False, True])
def test_a_restored_buffer_goes_on_exactly_as_the_first(tmp_path, mapped):
    _, buffer, _, _, _ = rollout(1, SEEDS, num_decisions=40)
    config = ReplayConfig(500, 0.9, memory_map=str(tmp_path / "map") if mapped else None)
    sizes = {
        "state_dim": 3, "action_dim": 2, "cameras": {"agent": (2, 2)}, "num_envs": 5, "max_episode_steps": 9
    }  # fmt: skip
    copy = ReplayBuffer(config, **sizes)
    buffer.save(tmp_path / "replay.pt")
    copy.load(tmp_path / "replay.pt")
    for _ in range(2):  # at once, and after both went on
        a, b = (x.sample(64, np.random.default_rng(1), horizon=3, prefixes=True) for x in (buffer, copy))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        one, two = buffer.observations(a.rows), copy.observations(b.rows)
        assert torch.equal(one.images["agent"], two.images["agent"])
        assert one.instruction == two.instruction
        assert len(buffer) == len(copy)
        assert buffer.num_episodes_added == copy.num_episodes_added
        for x in (buffer, copy):
            EpisodeWriter(x, ActionSpec((-1.0, -1.0), (1.0, 1.0), ("x", "y"))).cut()
    with pytest.raises(ValueError, match=r"gamma: 0.9 -> 0.95"):
        ReplayBuffer(ReplayConfig(500, 0.95), **sizes).load(tmp_path / "replay.pt")
    (tmp_path / "replay.pt").write_bytes((tmp_path / "replay.pt").read_bytes()[:-200])
    with pytest.raises(CheckpointError):
        copy.load(tmp_path / "replay.pt")


def test_stated_memory_is_what_is_used(tmp_path):
    sizes = {"state_dim": 30, "action_dim": 7, "cameras": {"a": (32, 32), "b": (16, 16)}, "feature_dim": 64}

    def measured(config):
        tracemalloc.start()
        buffer = ReplayBuffer(config, **sizes)
        buffer.add_episode(
            state=np.zeros((2, 30)), actions=np.zeros((1, 7)), rewards=np.zeros(1), terminated=True, truncated=False,
            images={"a": np.zeros((2, 32, 32, 3), np.uint8), "b": np.zeros((2, 16, 16, 3), np.uint8)},
        )  # fmt: skip
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return buffer, used

    buffer, used = measured(ReplayConfig(5000, 0.9))
    pictures = 5000 * 3 * (32 * 32 + 16 * 16)
    row = 4 * (94 + 7 + 7 + 1 + 1) + 3 + 1 + 8 + 4 + 4 + 4 + 2 + 8 + 1
    assert buffer.nbytes == 5000 * row + pictures  # float32 and uint8 throughout
    assert used == pytest.approx(buffer.nbytes, rel=0.01)
    buffer, used = measured(ReplayConfig(5000, 0.9, memory_map=str(tmp_path)))
    assert buffer.mapped_nbytes == pictures
    assert buffer.nbytes == 5000 * row
    assert used == pytest.approx(buffer.nbytes, rel=0.05)
    assert sum(f.stat().st_size for f in tmp_path.glob("*.npy")) == pytest.approx(pictures, rel=1e-4)
