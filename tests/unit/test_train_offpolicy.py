"""Trainers of off-policy learning: warm-up, credit of updates, open-loop chunks, mixing, resume; and their configs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.offpolicy_batches import assert_same, differs, host
from vla_rl.configs import get_recipe
from vla_rl.core import Source, Taken
from vla_rl.data.normalization import Normalizer
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.envs.point_maze import PointMazeEnv, waypoint_episodes
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.offpolicy.bc_flow import FlowNetConfig
from vla_rl.offpolicy.build import SteeringConfig
from vla_rl.offpolicy.calql import CalQLConfig, ConservativeConfig
from vla_rl.offpolicy.co_rft import BehaviorCloningConfig, CoRFTConfig
from vla_rl.offpolicy.critics import EnsembleReduction, MLPCriticConfig
from vla_rl.offpolicy.dsrl import DSRLConfig
from vla_rl.offpolicy.expo import ExpoConfig
from vla_rl.offpolicy.iql import IQLConfig
from vla_rl.offpolicy.learner import AgentLearner
from vla_rl.offpolicy.networks import ActorNetConfig
from vla_rl.offpolicy.policy_learner import PolicyLearnerConfig
from vla_rl.offpolicy.prefix_critic import PrefixCriticConfig
from vla_rl.offpolicy.qc import QCConfig
from vla_rl.offpolicy.residual import ResidualConfig
from vla_rl.offpolicy.sac import SACConfig
from vla_rl.offpolicy.td3 import TD3Config
from vla_rl.offpolicy.value_heads import HLGaussHead
from vla_rl.offpolicy.wsrl import CarryOver
from vla_rl.policies.agent import AgentPolicy, AgentPolicyConfig
from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict
from vla_rl.policies.steered import SteeredPolicyConfig
from vla_rl.policies.tiny import TinyVLAConfig
from vla_rl.train.checkpoint import CheckpointError
from vla_rl.train.offpolicy import OfflineConfig, OfflineTrainer, OffPolicyConfig, OnlineConfig, OnlineTrainer
from vla_rl.train.run_folder import RunFolderError, open_run_folder

SAC = SACConfig(actor=ActorNetConfig((8,)), critic=MLPCriticConfig(2, (8,)))
HORIZON, LIMIT = 4, 7  # an episode's end is inside of a chunk
REPLAY = ReplayConfig(capacity=400, gamma=0.9, reward_bias=-1.0, reward_low=0.0)
ONLINE = OnlineConfig(
    num_env_steps=80,
    num_envs=1,
    execution_horizon=HORIZON,
    warmup_env_steps=20,
    utd_ratio=1.0,
    updates_per_call=1,
    batch_size=8,
    env_steps_per_iteration=20,
)


class WatchedLearner(AgentLearner):
    """Writes down what the trainer asks of it."""

    def __init__(self, policy, seed=0):
        super().__init__(policy, seed)
        self.trainer = None
        self.chunks, self.batches, self.update_steps = [], [], []

    def explore(self, obs):
        chunk = super().explore(obs)
        self.chunks.append(chunk)
        return chunk

    def update(self, batches):
        self.batches.append(batches)
        if self.trainer is not None:
            self.update_steps.append(self.trainer.num_env_steps)
        return super().update(batches)


class WatchedEnv(ChunkedEnv):
    def __init__(self, num_envs):
        super().__init__(PointMazeEnv(num_envs, max_episode_steps=LIMIT), auto_reset=True)
        self.history = []

    def step(self, actions, *, record=()):
        step = super().step(actions, record=record)
        self.history.append((actions.clone(), step.ended.clone()))
        return step


@pytest.fixture(scope="module")
def policy():
    """One agent for all: each new one compiles its update anew."""
    policy = AgentPolicy(AgentPolicyConfig(SAC, HORIZON, 4, 2))
    bounds = Normalizer.bounds(-torch.ones(2), torch.ones(2), kind="min_max")
    policy.set_normalization(Normalizer.identity(4), bounds)
    return policy


def make_online(policy, config=ONLINE, offline=None, replay=REPLAY):
    env = WatchedEnv(config.num_envs)
    buffer = ReplayBuffer(replay, state_dim=4, action_dim=2, num_envs=config.num_envs, max_episode_steps=LIMIT)
    learner = WatchedLearner(policy)
    learner.trainer = OnlineTrainer(learner, env, buffer, config, offline)
    return learner.trainer, learner, env, buffer


def offline_buffer(replay=REPLAY):
    buffer = ReplayBuffer(replay, state_dim=4, action_dim=2)
    for e in waypoint_episodes("wall_gap", 6, seed=1, max_episode_steps=20):
        ends = {"terminated": e.terminated, "truncated": e.truncated, "success": e.terminated}
        buffer.add_episode(state=e.states, actions=e.actions, rewards=e.rewards, source=Source.DEMO, **ends)
    return buffer


# ------------------------------------------------------------------------------------------------- a person at hand
class Supervised(PointMazeEnv):
    """A person pushes down in the steps 2 and 3 of every episode."""

    def step(self, actions, active):
        begins = self.asked % LIMIT in (2, 3)
        self.asked += 1
        done = torch.tensor([[0.0, -1.0]]).expand_as(actions) if begins else actions
        outcome = super().step(done, active)
        source = torch.full((self.num_envs,), int(Source.HUMAN if begins else Source.POLICY), dtype=torch.int8)
        return replace(outcome, taken=Taken(done, source))

    asked = 0


def supervised_trainer(policy, demos, **changes):
    env = ChunkedEnv(Supervised(1, layout="wall_gap", start="far", max_episode_steps=LIMIT), auto_reset=True)
    config = replace(ONLINE, offline_ratio=0.5, intervention_rows=40, **changes)
    buffer = ReplayBuffer(REPLAY, state_dim=4, action_dim=2, num_envs=1, max_episode_steps=LIMIT)
    return OnlineTrainer(WatchedLearner(policy), env, buffer, config, demos), buffer


def test_what_a_person_did_is_stored_as_theirs_and_reaches_the_demonstrations(policy):
    demos = offline_buffer(replace(REPLAY, capacity=300))
    before = demos.num_episodes
    trainer, buffer = supervised_trainer(policy, demos, env_steps_per_iteration=40)
    metrics = trainer.iterate()
    assert metrics["rollout/intervention_rate"] == pytest.approx(12 / 40)  # two steps of each seven
    rows = np.flatnonzero(buffer.rows.source[: 5 * (LIMIT + 1)] == Source.HUMAN)
    assert len(rows) == 10
    assert (buffer.rows.actions[rows] == [0.0, -1.0]).all()
    assert not np.allclose(buffer.rows.proposals[rows], [0.0, -1.0])
    assert demos.num_episodes == before + 5
    copied = [(first, count) for first, count in demos.finished_episodes()][-5:]
    assert [count for _, count in copied] == [3] * 5  # two steps, and where they led
    assert all((demos.rows.source[first : first + 2] == Source.HUMAN).all() for first, _ in copied)


def test_plans_from_before_a_person_took_over_are_void(policy):
    trainer, _ = supervised_trainer(policy, offline_buffer())
    trainer.iterate()  # decides at 0 (of 0 to 3), after the person's steps 2 and 3 at 3 and 4, and begins anew at 7
    assert len(trainer.learner.chunks) == 9  # 0 3 4 | 7 10 11 | 14 17 18 of the 20 steps


def test_a_run_with_a_person_resumes_exactly(policy, tmp_path):
    runs = []
    for stops in (False, True):
        demos = offline_buffer(replace(REPLAY, capacity=300))
        trainer, _ = supervised_trainer(policy, demos)
        trainer.iterate()
        if stops:
            trainer.save(tmp_path)
            demos = offline_buffer(replace(REPLAY, capacity=300))
            asked = trainer._collector._actor.env.step_env.asked
            trainer, _ = supervised_trainer(policy, demos)
            trainer.load(tmp_path)
            trainer._collector._actor.env.step_env.asked = asked
        trainer.iterate()
        runs.append((host(trainer.learner.state), demos.num_episodes, demos.rows.actions.copy()))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    np.testing.assert_array_equal(runs[0][2], runs[1][2])


def test_room_for_interventions_needs_offline_data():
    with pytest.raises(ValueError, match="set offline_ratio above 0"):
        replace(ONLINE, intervention_rows=10)


# ------------------------------------------------------------------------------------------------------------- online
@pytest.mark.parametrize(("warmup", "first"), [(20, 21), (0, 9)])
def test_nothing_is_learned_during_the_warm_up_and_the_first_update_follows_it(policy, warmup, first):
    """Without a warm-up the first update waits for as many rows as it draws."""
    trainer, learner, _, buffer = make_online(policy, replace(ONLINE, warmup_env_steps=warmup))
    before, shown = host(learner.state), {k: v.clone() for k, v in policy.state_dict().items()}
    metrics = trainer.iterate()
    if warmup:
        assert_same(before, host(learner.state))
        assert all(torch.equal(v, shown[k]) for k, v in policy.state_dict().items())
        assert not [name for name in metrics if name.startswith("update/")]
    trainer.iterate()
    assert learner.update_steps[0] == first
    assert differs(before, host(learner.state))
    assert len(buffer) == 40
    steps = buffer.rows.end > np.arange(buffer.num_rows)
    assert steps.sum() == 40
    assert set(buffer.rows.source[steps].tolist()) == {int(Source.POLICY)}


@pytest.mark.parametrize(("utd_ratio", "updates_per_call"), [(0.25, 1), (2.0, 2)])
def test_control_steps_pay_for_their_updates_and_the_warm_up_for_none(policy, utd_ratio, updates_per_call):
    config = replace(ONLINE, utd_ratio=utd_ratio, updates_per_call=updates_per_call)
    trainer, learner, *_ = make_online(policy, config)
    for _ in range(4):
        trainer.iterate()
    assert int(learner.state.num_updates) == utd_ratio * (80 - 20)
    assert {b.reward.shape for b in learner.batches} == {(updates_per_call, 8)}
    calls = np.bincount(learner.update_steps, minlength=81)[21:]
    assert calls.max() == max(1, int(utd_ratio / updates_per_call))  # spread evenly, not in one go


def test_chunks_are_executed_as_planned_and_planned_anew_after_an_episode(policy):
    config = replace(ONLINE, num_envs=3, execution_horizon=3, num_env_steps=120, env_steps_per_iteration=120)
    trainer, learner, env, _ = make_online(policy, replace(config, warmup_env_steps=120))
    trainer.iterate()
    decisions, plan, done = 0, [torch.empty(0)] * 3, [3] * 3
    for actions, ended in env.history:
        if 3 in done:
            decisions += 1
        for i in range(3):
            if done[i] == 3:
                plan[i], done[i] = learner.chunks[decisions - 1][i], 0
            assert torch.equal(actions[i, 0], plan[i][done[i]])
            done[i] = 3 if ended[i] else done[i] + 1
    assert decisions == len(learner.chunks)
    assert decisions < len(env.history)
    ends = torch.stack([ended for _, ended in env.history])
    assert int(ends.sum()) >= 15  # 40 steps of 3 environments in episodes of 7: chunks of 3, 3 and 1


def test_where_only_decisions_are_observed_they_alone_are_starts(policy):
    config = replace(ONLINE, num_envs=2, observe_every_step=False, env_steps_per_iteration=40, warmup_env_steps=8)
    trainer, learner, env, buffer = make_online(policy, config)
    trainer.iterate()
    trainer.iterate()
    assert all(actions.shape[1] == HORIZON for actions, _ in env.history)
    assert trainer.num_env_steps == 80
    assert len(buffer) < 80  # what an end left of its chunk is counted, not stored
    rows = np.concatenate([b.rows.ravel() for b in learner.batches])
    assert set(buffer.rows.step[rows].tolist()) <= {0, HORIZON}
    assert int(learner.state.num_updates) == 80 - 8


def test_the_first_steps_can_be_random(policy):
    trainer, learner, env, _ = make_online(policy, replace(ONLINE, random_env_steps=20))
    trainer.iterate()
    assert learner.chunks == []
    actions = torch.cat([a[:, 0] for a, _ in env.history])
    assert actions.abs().max() <= 1.0
    assert actions.abs().mean() == pytest.approx(0.5, abs=0.12)
    trainer.iterate()
    assert learner.chunks


def test_each_minibatch_has_its_share_of_offline_rows_and_one_reward(policy):
    config = replace(ONLINE, offline_ratio=0.25)
    trainer, learner, _, buffer = make_online(policy, config, offline_buffer())
    trainer.iterate()
    trainer.iterate()
    assert learner.batches
    for batch in learner.batches:
        assert ((batch.rows >= buffer.num_rows).sum(axis=1) == 2).all()
    wrong = replace(REPLAY, reward_bias=0.0)
    other, *_ = make_online(policy, config, offline_buffer(wrong))
    other.iterate()  # the warm-up
    with pytest.raises(ValueError, match=r"one reward_bias, got -1\.0 and 0\.0"):
        other.iterate()
    with pytest.raises(ValueError, match="give offline data where it is above 0"):
        make_online(policy, config)
    with pytest.raises(ValueError, match="give offline data where it is above 0"):
        make_online(policy, ONLINE, offline_buffer())


# ------------------------------------------------------------------------------------------------------------- resume
def test_an_online_run_goes_on_bit_for_bit(policy, tmp_path):
    """Replay, running episodes, half-executed chunks, environment and every generator are in the state."""
    config = replace(ONLINE, num_envs=2, execution_horizon=3, offline_ratio=0.5, env_steps_per_iteration=20)
    trainer, whole, _, buffer = make_online(policy, config, offline_buffer())
    wanted = [trainer.iterate() for _ in range(4)]
    stopped, *_ = make_online(policy, config, offline_buffer())
    first = [stopped.iterate() for _ in range(2)]
    stopped.save(tmp_path)
    resumed, again, _, same = make_online(policy, config, offline_buffer())
    again._generator.manual_seed(99)
    resumed.load(tmp_path)
    assert [*first, resumed.iterate(), resumed.iterate()] == wanted
    assert_same(whole.state, again.state)
    for name, column in buffer.rows.columns().items():
        np.testing.assert_array_equal(column, same.rows.columns()[name], err_msg=name)


def test_an_offline_run_goes_on_bit_for_bit_and_only_with_its_own_config(policy, tmp_path):
    config = OfflineConfig(num_updates=40, batch_size=8, updates_per_iteration=10)

    def make(config=config):
        learner = WatchedLearner(policy)
        return OfflineTrainer(learner, offline_buffer(), config, WatchedEnv(1).spec), learner

    trainer, whole = make()
    wanted = [trainer.iterate() for _ in range(4)]
    assert int(whole.state.num_updates) == 40
    stopped, _ = make()
    stopped.iterate()
    stopped.save(tmp_path)
    resumed, again = make(replace(config, num_updates=60, eval_interval=3))
    resumed.load(tmp_path)
    assert [resumed.iterate() for _ in range(3)] == wanted[1:]
    assert_same(whole.state.params, again.state.params)
    with pytest.raises(CheckpointError, match="batch_size: 8 -> 16"):
        make(replace(config, batch_size=16))[0].load(tmp_path)


def test_a_divergence_is_an_error_with_its_name(policy):
    trainer, learner, *_ = make_online(policy, ONLINE)
    learner.update = lambda batches: {"td_loss": float("nan")}
    trainer.iterate()
    with pytest.raises(FloatingPointError, match="td_loss is not finite"):
        trainer.iterate()


# ------------------------------------------------------------------------------------------------------------ configs
AGENTS = {
    "sac": replace(SAC, bc_weight=0.5, backup_entropy=True),
    "calql": CalQLConfig(SAC, ConservativeConfig(lagrange_gap=0.8, members=EnsembleReduction("min", 2, True))),
    "iql": IQLConfig(expectile=0.9, critic=PrefixCriticConfig(width=8)),
    "td3": TD3Config(q_weight=2.5, normalize_q=True, bc_weight=1.0),
    "co_rft": CoRFTConfig(TD3Config(critic=PrefixCriticConfig(head=HLGaussHead(-10.0, 0.0, 11))), alpha=0.2),
    "cloning": BehaviorCloningConfig(exploration_noise=0.1),
    "qc": QCConfig(policy="distilled", flow=FlowNetConfig((8,))),
    "policy": PolicyLearnerConfig(bc_weight=0.5),
    "dsrl": DSRLConfig(noise_bound=1.0),
    "expo": ExpoConfig(num_base=2),
    "residual": ResidualConfig(tau=0.01),
}


@pytest.mark.parametrize("name", AGENTS)
def test_every_agents_config_comes_back_from_its_file(name):
    config = OffPolicyConfig(agent=AGENTS[name], offline=OfflineConfig())
    assert config_from_dict(OffPolicyConfig, json.loads(json.dumps(config_to_dict(config)))) == config
    if name == "policy":
        return
    steers = isinstance(AGENTS[name], SteeringConfig)
    policy = SteeredPolicyConfig(TinyVLAConfig(), AGENTS[name]) if steers else AgentPolicyConfig(AGENTS[name], 4, 3, 2)
    assert config_from_dict(type(policy), json.loads(json.dumps(config_to_dict(policy)))) == policy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OfflineConfig(num_updates=30, updates_per_iteration=20), "whole iterations of 20"),
        (lambda: OfflineConfig(checkpoint_interval=0), "checkpoint_interval is 0"),
        (lambda: OfflineConfig(eval_interval=-1), "eval_interval is -1"),
        (lambda: replace(ONLINE, env_steps_per_iteration=0), "env_steps_per_iteration is 0"),
        (lambda: replace(ONLINE, num_envs=3), "whole rounds of 3"),
        (lambda: replace(ONLINE, utd_ratio=0.0), "utd_ratio > 0"),
        (lambda: replace(ONLINE, warmup_env_steps=-1), "warmup_env_steps is -1"),
        (lambda: OffPolicyConfig(), "offline, online or both"),
        (lambda: OffPolicyConfig(agent=SAC, horizon=2, online=ONLINE), "execution_horizon is 4, a chunk has 2"),
        (
            lambda: OffPolicyConfig(agent=SAC, horizon=8, online=replace(ONLINE, observe_every_step=False)),
            "set execution_horizon to 8",
        ),
        (lambda: OffPolicyConfig(agent=SAC, online_agent=SAC, offline=OfflineConfig()), "no effect without online"),
        (lambda: OffPolicyConfig(agent=SAC, online_agent=SAC, online=ONLINE), "after the switch"),
        (
            lambda: OffPolicyConfig(agent=SAC, online=replace(ONLINE, carried=CarryOver(moments=False))),
            "nothing crosses",
        ),
        (lambda: OffPolicyConfig(agent=SAC, cloning=OfflineConfig(), offline=OfflineConfig()), "is for a CoRFTConfig"),
        (
            lambda: OffPolicyConfig(
                agent=SAC, online_agent=PolicyLearnerConfig(), offline=OfflineConfig(), online=ONLINE
            ),
            "must both improve a policy",
        ),
        (
            lambda: OffPolicyConfig(
                agent=PolicyLearnerConfig(), online_agent=ExpoConfig(), offline=OfflineConfig(), online=ONLINE
            ),
            "both steer one",
        ),
    ],
)
def test_configs_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_run_may_be_made_longer_and_nothing_else(tmp_path):
    config = OffPolicyConfig(agent=SAC, offline=OfflineConfig(), online=ONLINE)
    recipe = replace(get_recipe("maze_wsrl"), train=config)
    folder = open_run_folder(tmp_path / "run", recipe, resume=False, kind="train")
    (folder / "offline").mkdir()
    longer = replace(
        config,
        offline=replace(config.offline, num_updates=40_000, eval_interval=7),
        online=replace(ONLINE, num_env_steps=800, checkpoint_interval=3),
    )
    open_run_folder(folder, replace(recipe, train=longer), resume=True, kind="train")
    other = replace(recipe, train=replace(longer, online=replace(ONLINE, utd_ratio=2.0)))
    with pytest.raises(RunFolderError, match=r"train.online.utd_ratio was 1.0 and is 2.0"):
        open_run_folder(folder, other, resume=True, kind="train")
