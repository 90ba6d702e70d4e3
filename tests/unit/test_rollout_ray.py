"""Rollouts by Ray workers are those of one process, whatever dies meanwhile."""

import copy
import dataclasses
import os
import signal
import threading
import time

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from tests.contract.scripted_env import FAILURE, SUCCESS, TIME, ScriptedEnv, script
from vla_rl.envs.two_way_reach import TwoWayReachEnv, make_two_way_reach
from vla_rl.envs.vector import ChunkedEnv, episode_seed
from vla_rl.flow import FlowSamplerConfig
from vla_rl.flow.sampler import FlowSampler
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.rollout.collector import RolloutBatch, RolloutCollector
from vla_rl.rollout.ray_batches import from_plain, join_envs, to_plain
from vla_rl.rollout.ray_collector import RayRolloutCollector, start_ray
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.rollout.ray_worker import load_weights, weights_of
from vla_rl.train.checkpoint import load_state, save_state

OPTIONS = {"execution_horizon": 4, "seed": 3}
NUM_ENVS, BLOCK = 12, 4
TWO = RolloutConfig(workers=2, policy_batch_size=BLOCK, cpus_per_worker=0.5)


@pytest.fixture(scope="module", autouse=True)
def _ray():
    torch.set_num_threads(1)
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def make_sampler(seed=0, state_dim=5):
    torch.manual_seed(seed)
    policy = FlowMLP(FlowMLPConfig(state_dim=state_dim, action_dim=2, action_horizon=4, width=16))
    return FlowSampler(policy, FlowSamplerConfig(mode="hybrid", noise_level=0.5))


def in_process(sampler, size=BLOCK):
    return RolloutCollector(make_two_way_reach(NUM_ENVS), sampler, policy_batch_size=size, **OPTIONS)


def with_workers(sampler, config=TWO):
    return RayRolloutCollector(make_two_way_reach, sampler, num_envs=NUM_ENVS, config=config, **OPTIONS)


def update(sampler, collector):
    """What a learner does to the policy, without the learning."""
    with torch.no_grad():
        for parameter in sampler.policy.parameters():
            parameter.mul_(1.01)
    collector.policy_version += 1


def flat(value, name=""):
    if isinstance(value, torch.Tensor):
        return {name: value}
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {k: v for n, x in fields.items() for k, v in flat(x, f"{name}.{n}").items()}
    return {}


def assert_same(a: RolloutBatch, b: RolloutBatch):
    """Every tensor bit for bit; the episodes of workers come worker by worker."""
    first, second = flat(a), flat(b)
    assert first.keys() == second.keys()
    for name, x in first.items():
        if ".episodes" in name:
            x, second[name] = x.sort().values, second[name].sort().values
        assert torch.equal(x, second[name]), name
    assert a.episodes.metrics() == b.episodes.metrics()


@pytest.fixture(scope="module")
def many():
    collector = with_workers(make_sampler())
    yield collector
    if ray.is_initialized():  # the last test has a cluster of its own
        collector.close()


def slices_from(states, sampler):
    """Collectors in this process that go on from the states of workers."""
    parts = []
    for state, envs in zip(states, TWO.slices(NUM_ENVS), strict=True):
        part = RolloutCollector(make_two_way_reach(len(envs)), sampler, **OPTIONS, **slice_of(envs))
        part.load_state_dict(state)
        parts.append(part)
    return parts


def slice_of(envs):
    return {"first_env": envs.start, "policy_batch_size": BLOCK}


def test_the_same_transitions_as_in_one_process_through_deaths(many):
    sampler = make_sampler()
    one = in_process(sampler)
    assert len({*many.worker_pids(), os.getpid()}) == 3
    assert [len(s) for s in TWO.slices(NUM_ENVS)] == [4, 8]
    for window in range(5):
        if window == 2:
            os.kill(many.worker_pids()[1], signal.SIGKILL)
        if window == 3:
            killer = threading.Timer(0.002, ray.kill, [many.windows.workers[0]])
            killer.start()
        a, b = one.collect(5), many.collect(5)
        if window == 3:
            killer.join()
        assert_same(a, b)
        assert (b.policy_version == window).all()
        update(sampler, one)
        update(many._sampler, many)
    assert many.metrics()["rollout/worker_restarts"] == 2.0
    assert many.metrics()["rollout/worker_lost_episodes"] == 0.0  # they were collected again, decision by decision
    assert many.metrics()["rollout/staleness"] == 0.0
    assert many.windows.num_in_flight == 0
    with pytest.raises(ValueError, match="of rollouts by one process, here are 2 workers"):
        many.load_state_dict(one.state_dict())


def test_whole_episodes(many):
    """As many decisions as a slice's longest episode has; the rows after an end are not valid and hold nothing."""
    seeds = list(range(100, 100 + NUM_ENVS))
    parts = slices_from(many.state_dict()["workers"], many._sampler)
    batch = many.collect_episodes(seeds)
    expected = [
        p.collect_episodes([seeds[i] for i in envs]) for p, envs in zip(parts, TWO.slices(NUM_ENVS), strict=True)
    ]
    assert batch.num_decisions == max(p.num_decisions for p in expected)
    for envs, part in zip(TWO.slices(NUM_ENVS), expected, strict=True):
        t = part.num_decisions
        assert torch.equal(batch.valid[:t, envs.start : envs.stop], part.valid)
        assert not batch.valid[t:, envs.start : envs.stop].any()
        rows = batch.trace.log_prob.unflatten(0, (-1, NUM_ENVS))[:t, envs.start : envs.stop]
        assert torch.equal(rows, part.trace.log_prob.view(t, -1))
    assert len(batch.episodes) == NUM_ENVS


def test_asynchronous_windows_are_of_the_policy_as_it_was_and_a_restored_state_goes_on(many, tmp_path):
    """Window w is collected by version max(w - 1, first), whoever is faster; what was under way is in the state."""
    sampler = copy.deepcopy(many._sampler)
    parts = slices_from(many.state_dict()["workers"], sampler)
    first = many.policy_version
    many.windows.config = dataclasses.replace(TWO, max_staleness=1)
    weights = [copy.deepcopy(sampler.policy.state_dict())]
    batches = []
    for window in range(5):
        batch = many.collect(3)
        assert many.windows.num_in_flight == 1  # never more than max_staleness
        version = max(window - 1, 0)
        sampler.policy.load_state_dict(weights[version])
        for part in parts:
            part.policy_version = first + version
        assert_same(join_envs([p.collect(3) for p in parts]), batch)
        assert many.metrics()["rollout/staleness"] == float(window - version)
        batches.append(batch)
        if window == 2:
            save_state(tmp_path / "state.pt", many.state_dict() | {"policy": many._sampler.policy.state_dict()})
            os.kill(many.worker_pids()[0], signal.SIGKILL)
        update(many._sampler, many)
        weights.append(copy.deepcopy(many._sampler.policy.state_dict()))
    state = load_state(tmp_path / "state.pt")
    many._sampler.policy.load_state_dict(state["policy"])
    many.load_state_dict(state)
    for expected in batches[3:]:
        update(many._sampler, many)
        assert_same(many.collect(3), expected)
    with pytest.raises(ValueError, match="whole episodes"):
        many.collect_episodes([0] * NUM_ENVS)


def test_parts_join_in_the_order_of_one_collector():
    """Ends by truncation in both slices: a critic gets the same rows in the same places."""
    seeds = [
        script(TIME, 4),
        script(FAILURE, 99),
        script(TIME, 2),
        script(SUCCESS, 5),
        script(TIME, 1),
        script(TIME, 7),
    ]

    def collect(envs):
        env = ChunkedEnv(ScriptedEnv(len(envs)), images=False)
        options = {"env_seeds": [seeds[i] for i in envs], "first_env": envs.start, "policy_batch_size": 2}
        return RolloutCollector(
            env, make_sampler(state_dim=3), **OPTIONS | {"execution_horizon": 3}, **options
        ).collect(3)

    whole, parts = collect(range(6)), [collect(range(2)), collect(range(2, 6))]
    ends = [[-1, -1, 0, -1, 1, -1], [2, -1, -1, -1, -1, -1], [-1, 5, -1, -1, 8, 3]]
    assert whole.bootstrap_index.tolist() == ends
    assert join_envs(parts).bootstrap_index.tolist() == ends
    assert_same(join_envs(parts), whole)
    assert_same(from_plain(to_plain(whole)), whole)


def test_weights_cross_as_bytes_and_only_what_learns():
    ours, theirs = make_sampler(), make_sampler(seed=1)
    theirs.policy.bfloat16()
    ours.policy.bfloat16()
    frozen = next(ours.policy.parameters())
    frozen.requires_grad_(False)
    next(theirs.policy.parameters()).requires_grad_(False)
    before = next(theirs.policy.parameters()).clone()
    weights = weights_of(ours)
    assert sum(w.nbytes for w in weights) == 2 * sum(p.numel() for p in ours.policy.parameters() if p.requires_grad)
    load_weights(theirs, weights)
    pairs = list(zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True))
    assert torch.equal(pairs[0][1], before)
    assert all(torch.equal(a, b) for a, b in pairs[1:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RolloutConfig(workers=-1), "must be at least 0"),
        (lambda: RolloutConfig(max_staleness=1), "no effect without workers"),
        (lambda: RolloutConfig(timeout_s=60.0), "no effect without workers"),
        (lambda: RolloutConfig(inference="shared"), "no effect without workers"),
        (lambda: RolloutConfig(workers=1, inference="both"), 'expected "worker" or "shared"'),
        (lambda: RolloutConfig(workers=1, gpus_for_inference=1.0), 'only with rollout.inference "shared"'),
        (lambda: start_ray(RolloutConfig(workers=2, inference="shared")), "need 3 CPU, there are 2"),
        (lambda: RolloutConfig(workers=1, timeout_s=0.0), "timeout_s is 0.0, expected seconds"),
        (lambda: RolloutConfig(workers=3, policy_batch_size=4).slices(8), "do not divide"),
        (lambda: RolloutConfig(workers=3, policy_batch_size=4).slices(13), "do not divide"),
        (lambda: start_ray(RolloutConfig(workers=2, worker_resource="arm")), "need 2 arm, there are 0"),
        (lambda: start_ray(RolloutConfig(workers=9)), "need 9 CPU, there are 2"),
    ],
)
def test_what_cannot_work_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------ machines and states
class DeadlyReach(TwoWayReachEnv):
    """Episodes with an odd seed kill the process that simulates them at their second step."""

    def reset(self, env_ids, seeds):
        super().reset(env_ids, seeds)
        self.deadly = bool((seeds % 2 == 1).any())

    def step(self, actions, active):
        if self.deadly and int(self._steps[0]) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(actions, active)


def make_deadly(num_envs):
    return ChunkedEnv(DeadlyReach(num_envs))


@pytest.mark.slow
def test_a_state_that_kills_its_simulator_costs_its_episodes():
    base = next(s for s in range(1, 99, 2) if episode_seed(s, 2**32 + 1) % 2 == 0)
    config = RolloutConfig(workers=1, cpus_per_worker=0.5)
    options = {"num_envs": 1, "config": config, "env_seeds": [base], **OPTIONS}
    collector = RayRolloutCollector(make_deadly, make_sampler(), **options)
    assert collector.collect(1).valid.all()
    assert collector.metrics()["rollout/worker_restarts"] == 2.0  # tried again once, then new episodes
    assert collector.metrics()["rollout/worker_lost_episodes"] == 1.0
    collector.close()


class SleepyReach(TwoWayReachEnv):
    """Hangs for good at its second step, the first time that any process gets there."""

    def __init__(self, num_envs, mark):
        super().__init__(num_envs)
        self.mark = mark

    def step(self, actions, active):
        if int(self._steps.max()) == 1 and not self.mark.exists():
            self.mark.touch()
            time.sleep(10**6)
        return super().step(actions, active)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_that_hangs_is_started_again(tmp_path, stopped):
    """In its simulator, or as a process that gets no time at all."""
    mark, config = tmp_path / "slept", RolloutConfig(workers=1, cpus_per_worker=0.5, timeout_s=1.0)
    if stopped:
        mark.touch()
    collector = RayRolloutCollector(
        lambda n: ChunkedEnv(SleepyReach(n, mark)), make_sampler(), num_envs=NUM_ENVS, config=config, **OPTIONS
    )
    one = in_process(make_sampler(), size=None)
    pid = collector.worker_pids()[0]
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert_same(one.collect(3), collector.collect(3))
    assert 1.0 <= time.monotonic() - begin < 30.0
    assert mark.exists()
    assert collector.worker_pids() != [pid]
    assert collector.metrics()["rollout/worker_restarts"] == 1.0
    assert collector.metrics()["rollout/worker_lost_episodes"] == 0.0
    collector.close()


@pytest.mark.slow
def test_a_machine_that_dies_changes_nothing():
    """Placement by a custom resource; the machine that has it is lost with everything on it, and another one comes."""
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    machine = cluster.add_node(num_cpus=1, resources={"simulator": 1})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    sampler = make_sampler()
    many = with_workers(sampler, RolloutConfig(workers=1, worker_resource="simulator", max_staleness=2))
    one = in_process(make_sampler(), size=None)
    for window in range(5):
        if window == 2:
            cluster.remove_node(machine, allow_graceful=False)
            cluster.add_node(num_cpus=1, resources={"simulator": 1})
        assert_same(one.collect(3), many.collect(3))
        assert many.windows.num_in_flight <= 2
    assert many.metrics()["rollout/worker_restarts"] >= 1.0
    assert many.metrics()["rollout/worker_lost_episodes"] == 0.0
    many.close()
    ray.shutdown()
    cluster.shutdown()
