"""Workers that act for a learner from replay: what they do, how old their policy is, and what deaths cost."""

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from tests.unit.test_train_offpolicy import HORIZON, LIMIT, ONLINE, REPLAY, SAC
from tests.unit.two_learners import ENVIRONMENT
from vla_rl.data.normalization import Normalizer
from vla_rl.envs.point_maze import PointMazeEnv
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.offpolicy.critics import MLPCriticConfig
from vla_rl.offpolicy.learner import AgentLearner
from vla_rl.offpolicy.pa_rl import CriticAgentConfig
from vla_rl.offpolicy.policy_learner import PolicyLearner, PolicyLearnerConfig
from vla_rl.policies.agent import AgentPolicy, AgentPolicyConfig
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.rollout.ray_batches import from_plain, to_plain
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.rollout.ray_replay import RayReplayCollector
from vla_rl.rollout.replay_actor import ReplayActor, ReplayWindow
from vla_rl.train.check import check_replay_rollout
from vla_rl.train.checkpoint import load_state, save_state
from vla_rl.train.loop import STATE_FILE, run_iterations
from vla_rl.train.metrics import read_metrics
from vla_rl.train.offpolicy import OfflineConfig, OffPolicyConfig, OnlineTrainer, online_buffer

NUM_ENVS = 3
CONFIG = replace(
    ONLINE,
    num_env_steps=144,
    num_envs=NUM_ENVS,
    execution_horizon=3,
    warmup_env_steps=24,
    utd_ratio=0.25,
    env_steps_per_iteration=24,
    checkpoint_interval=2,
)
TIMED = ("rollout/wait_s", "time_s")


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    torch.set_num_threads(1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def make_maze(num_envs):
    return ChunkedEnv(PointMazeEnv(num_envs, max_episode_steps=LIMIT))


def make_policy():
    policy = AgentPolicy(AgentPolicyConfig(SAC, HORIZON, 4, 2))
    bounds = Normalizer.bounds(-torch.ones(2), torch.ones(2), kind="min_max")
    policy.set_normalization(Normalizer.identity(4), bounds)
    return policy


shared_policy = cache(make_policy)  # each new one compiles its update anew


def make_learner():
    """One at a time."""
    return AgentLearner(shared_policy(), 0)


def make_trainer(staleness, workers, address=None):
    config = RolloutConfig(workers=workers, max_staleness=staleness, cpus_per_worker=0.5, ray_address=address)
    learner = make_learner()
    options = {"env_seeds": CONFIG.env_seeds, "seed": CONFIG.seed, "config": config}
    collector = RayReplayCollector(make_maze, learner, CONFIG.pace, **options)
    return OnlineTrainer(learner, collector, online_buffer(REPLAY, collector.spec, NUM_ENVS), CONFIG), collector


def train(folder, num_iterations, address=None, *, resume=False):
    """Asynchronous, saved every second iteration."""
    trainer, collector = make_trainer(1, 1, address)
    schedule = replace(CONFIG, num_env_steps=num_iterations * CONFIG.env_steps_per_iteration)
    run_iterations(trainer, folder, schedule, label="test", resume=resume, tensorboard=False)
    collector.close()
    return trainer


def copy_of_part(learner, envs):
    """What a worker does in its slice, in this process."""
    actor = ReplayActor(make_maze(len(envs)), learner, CONFIG.pace, CONFIG.env_seeds[envs.start : envs.stop])

    def window(number, version):
        numbers = np.random.SeedSequence([CONFIG.seed, envs.start, number]).generate_state(1, np.uint64)
        learner.seed_exploration(int(numbers[0] >> np.uint64(1)))
        return [actor.act(version) for _ in range(8)]

    return window


def changed(learner, factor):
    return [factor * x for x in learner.acting_weights()]


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_rounds_are_of_the_policy_as_it_was_through_deaths(cluster, staleness):
    """Window w is acted by version max(0, w - staleness), whoever is faster and whoever dies."""
    learner = make_learner()
    config = RolloutConfig(workers=2, max_staleness=staleness, cpus_per_worker=0.5)
    options = {"env_seeds": CONFIG.env_seeds, "seed": CONFIG.seed, "config": config}
    collector = RayReplayCollector(make_maze, learner, CONFIG.pace, **options)
    slices = config.slices(NUM_ENVS)
    shadow = AgentLearner(make_policy(), 0)
    parts = [copy_of_part(shadow, envs) for envs in slices]
    versions = [copy.deepcopy(learner.acting_weights())]
    for w in range(5):
        if w == 2:
            os.kill(collector.worker_pids()[1], signal.SIGKILL)
        version = max(0, w - staleness)
        rounds = list(collector.rounds(8))
        assert collector.windows.num_in_flight == staleness
        shadow.act_with(versions[version])
        for envs, part in zip(slices, parts, strict=True):
            for got, wanted in zip(rounds, part(w, version), strict=True):
                rows = slice(envs.start, envs.stop)
                assert torch.equal(got.obs.state[rows], wanted.obs.state)
                assert torch.equal(got.actions[rows], wanted.actions)
                assert torch.equal(got.step.rewards[rows], wanted.step.rewards)
                assert torch.equal(got.step.ended[rows], wanted.step.ended)
        assert {r.policy_version for r in rounds} == {version}
        assert {r.lost for r in rounds} == {None}
        metrics = collector.metrics()
        assert metrics["rollout/staleness"] == metrics["rollout/staleness_mean"] == w - version <= staleness
        learner.act_with(changed(learner, 1.1))
        versions.append(copy.deepcopy(learner.acting_weights()))
        collector.learned()
    assert metrics["rollout/worker_restarts"] == 1.0
    assert metrics["rollout/worker_lost_episodes"] == 0.0
    collector.close()


@pytest.mark.slow
def test_a_worker_that_dies_for_good_costs_its_running_episodes(cluster):
    """Twice in a window: what its environments were doing ends as truncated where it stood, and others begin."""
    trainer, collector = make_trainer(0, 2)
    trainer.iterate()
    running = trainer._buffer.running_steps.copy()
    assert (running == 24 // NUM_ENVS % LIMIT).all()
    windows = collector.windows
    submit, deaths = windows._submit, []

    def submit_and_kill(i, window):
        part = submit(i, window)
        if i == 1 and len(deaths) < 2:
            deaths.append(i)
            ray.kill(windows.workers[1])
        return part

    windows._submit = submit_and_kill
    metrics = trainer.iterate()
    envs = collector._slices[1]
    assert metrics["rollout/worker_restarts"] == 2.0
    assert metrics["rollout/worker_lost_episodes"] == len(envs) == 2
    rows = trainer._buffer.rows
    cut = [first + n - 2 for first, n in trainer._buffer.finished_episodes() if n - 1 == running[0]]
    assert len(cut) == 2
    assert rows.truncated[cut].all()
    assert (trainer._buffer.running_steps == [16 % LIMIT, 8 % LIMIT, 8 % LIMIT]).all()
    assert len(trainer._buffer) == 48
    collector.close()


def drive(folder, address):
    """The driver that is killed: never done."""
    train(folder, 10**6, address)


def test_a_killed_driver_goes_on_from_its_checkpoint(cluster, tmp_path):
    code = "import sys; from tests.unit.test_rollout_ray_replay import drive; drive(*sys.argv[1:])"
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed"), cluster.address], env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / STATE_FILE).exists():
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    done = int(torch.load(tmp_path / "killed" / STATE_FILE, weights_only=True)["num_iterations"])
    resumed = train(tmp_path / "killed", done + 3, resume=True)
    whole = train(tmp_path / "whole", done + 3)
    for name, column in whole._buffer.rows.columns().items():
        np.testing.assert_array_equal(column, resumed._buffer.rows.columns()[name], err_msg=name)
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in TIMED} for row in read_metrics(tmp_path / name)]
        for name in ("killed", "whole")
    )
    assert ours == theirs
    require_bound(whole, [row["rollout/staleness"] for row in theirs], done + 3)


def require_bound(trainer, staleness, num_iterations):
    """Each step in replay knows its policy, and none came in more than a version late."""
    # nobody learns from the first window, which is the warm-up: the second is of version 0 too, and not behind
    assert staleness == [0.0, 0.0] + [1.0] * (num_iterations - 2)
    rows = trainer._buffer.rows
    steps = np.flatnonzero(rows.end > np.arange(len(rows.end)))
    last = rows.policy_version[steps].max()
    assert last == num_iterations - 3
    assert [(rows.policy_version[steps] == version).sum() for version in (last, last - 1)] == [24, 24]
    assert (rows.policy_version[steps] >= 0).all()
    assert int(trainer.learner.state.num_updates) == (24 * num_iterations - 24) * CONFIG.utd_ratio


def test_a_copy_of_a_policy_that_learns_acts_as_it_does():
    """Weights of a torch policy, and of the critic, which chooses what is done."""
    spec = make_maze(1).spec
    config = PolicyLearnerConfig(CriticAgentConfig(MLPCriticConfig(2, (8,))), explore_improved=True)
    ours, theirs = (
        PolicyLearner(
            FlowMLP(FlowMLPConfig(4, 2, action_horizon=4, width=16)),
            config,
            horizon=HORIZON,
            action_spec=spec.action,
            seed=seed,
        )
        for seed in (0, 1)
    )
    there = theirs.acting_copy()
    weights = ours.acting_weights()
    assert len(weights) == len(ours._trained) + len(jax.tree.leaves(ours.state.params["critic"]))
    there.act_with(weights)
    obs = make_maze(3).reset([1, 2, 3])
    for learner in (ours, theirs, there):
        learner.seed_exploration(7)
    wanted = ours.explore(obs)
    assert torch.equal(there.explore(obs), wanted)
    assert not torch.equal(theirs.explore(obs), wanted)


def test_what_has_no_use_for_workers_says_so():
    offline = OffPolicyConfig(agent=SAC, offline=OfflineConfig())
    online = OffPolicyConfig(agent=SAC, online=CONFIG)
    two = RolloutConfig(workers=2)
    check_replay_rollout(two, online)
    for rollout, train, message in (
        (two, offline, "nobody collects"),
        (replace(two, inference="shared"), online, "for on-policy learning"),
        (RolloutConfig(policy_batch_size=1), online, "for on-policy learning"),
        (replace(two, workers=4), online, "do not divide"),
    ):
        with pytest.raises(ValueError, match=message):
            check_replay_rollout(rollout, train)


def test_a_window_comes_back_from_a_state_file(tmp_path):
    actor = ReplayActor(make_maze(2), make_learner(), replace(CONFIG.pace, num_envs=2), [1, 2])
    rounds = [actor.act(3) for _ in range(LIMIT)]
    window = ReplayWindow(
        rounds[0].obs, tuple(r.actions for r in rounds), tuple(r.step for r in rounds), 3, torch.tensor([False, True])
    )
    save_state(tmp_path / "state.pt", {"window": to_plain(window)})
    back = from_plain(load_state(tmp_path / "state.pt")["window"])
    for got, wanted in zip(back.rounds(), rounds, strict=True):
        assert torch.equal(got.obs.state, wanted.obs.state)
        assert got.obs.instruction == wanted.obs.instruction
        assert torch.equal(got.actions, wanted.actions)
        assert (got.step.final_obs is None) == (wanted.step.final_obs is None)
        assert got.policy_version == 3
    assert torch.equal(got.step.final_obs.state, wanted.step.final_obs.state)  # of the time limit
    assert [r.lost is None for r in back.rounds()] == [False] + [True] * (LIMIT - 1)
