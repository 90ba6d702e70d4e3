"""Rollouts by Ray workers are those of one process, whatever dies meanwhile."""

import dataclasses
import os
import signal

import pytest
import ray
import torch

from vla_rl.envs.two_way_reach import make_two_way_reach
from vla_rl.flow import FlowSamplerConfig
from vla_rl.flow.sampler import FlowSampler
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.rollout.collector import RolloutBatch, RolloutCollector
from vla_rl.rollout.ray_collector import RayRolloutCollector
from vla_rl.rollout.ray_config import RolloutConfig
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


def make_sampler(seed=0):
    torch.manual_seed(seed)
    policy = FlowMLP(FlowMLPConfig(state_dim=5, action_dim=2, action_horizon=4, width=16))
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


def test_the_same_transitions_as_in_one_process_through_updates_deaths_and_a_restored_state(tmp_path):
    ours, theirs = make_sampler(), make_sampler()
    one, many = in_process(ours), with_workers(theirs)
    pids = many.worker_pids()
    assert len({*pids, os.getpid()}) == 3
    for window in range(6):
        if window == 2:
            os.kill(many.worker_pids()[1], signal.SIGKILL)
        if window == 3:
            ray.kill(many._workers[0])
        a, b = one.collect(5), many.collect(5)
        assert_same(a, b)
        assert (b.policy_version == window).all()
        if window == 4:
            save_state(tmp_path / "state.pt", many.state_dict())
        update(ours, one)
        update(theirs, many)
    assert many.metrics()["rollout/worker_restarts"] == 2.0
    assert many.metrics()["rollout/worker_lost_episodes"] == 0.0  # they were collected again, decision by decision
    assert many.num_in_flight == 0
    many.load_state_dict(load_state(tmp_path / "state.pt"))
    many.policy_version = 5
    with torch.no_grad():  # the weights of window 5
        for parameter in theirs.policy.parameters():
            parameter.div_(1.01)
    again = many.collect(5)
    torch.testing.assert_close(again.features, b.features, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="of rollouts by one process, here are 2 workers"):
        many.load_state_dict(one.state_dict())
    many.close()
