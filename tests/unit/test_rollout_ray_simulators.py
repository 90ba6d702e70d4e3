"""One inference for several simulators: the same rollouts as in one process, whichever process dies meanwhile."""

import dataclasses
import itertools
import os
import signal
import time

import pytest
import ray
import torch

from tests.unit.test_rollout_ray import (
    BLOCK,
    NUM_ENVS,
    OPTIONS,
    assert_same,
    in_process,
    make_deadly,
    make_sampler,
    update,
)
from vla_rl.envs.two_way_reach import TwoWayReachEnv, make_two_way_reach
from vla_rl.envs.vector import ChunkedEnv, episode_seed
from vla_rl.rollout.ray_collector import RayRolloutCollector
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.rollout.ray_simulators import MAX_DEATHS, RaySimulators
from vla_rl.train.checkpoint import load_state, save_state

SHARED = RolloutConfig(
    workers=2, inference="shared", policy_batch_size=BLOCK, cpus_per_worker=0.25, cpus_for_inference=0.5
)


@pytest.fixture(scope="module", autouse=True)
def _ray():
    torch.set_num_threads(1)
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


class FaultyReach(TwoWayReachEnv):
    """Where `folder/fault` names one: its process is killed, or hangs, at the next step after a first one."""

    def __init__(self, num_envs, folder):
        super().__init__(num_envs)
        self.folder = folder

    def step(self, actions, active):
        fault = self.folder / "fault"
        if int(self._steps.max()) > 0 and fault.exists():
            kind = fault.read_text()
            try:
                fault.rename(self.folder / "done")  # whoever is first
            except FileNotFoundError:
                return super().step(actions, active)
            if kind == "hang":
                time.sleep(10**6)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(actions, active)


def shared(folder, config=SHARED, num_envs=NUM_ENVS):
    return RayRolloutCollector(
        lambda n: ChunkedEnv(FaultyReach(n, folder)), make_sampler(), num_envs=num_envs, config=config, **OPTIONS
    )


@pytest.mark.parametrize("size", [BLOCK, None])
def test_the_same_transitions_as_in_one_process_whatever_dies(tmp_path, size):
    """Bit for bit also without `policy_batch_size`: the policy sees all environments at once, as in one process."""
    one, many = (
        in_process(make_sampler(), size),
        shared(tmp_path, dataclasses.replace(SHARED, policy_batch_size=size, timeout_s=3.0)),
    )
    faults = {1: "kill", 2: "hang"} if size else {}
    for window in range(4):
        if window in faults:
            (tmp_path / "fault").write_text(faults[window])
        if window == 3 and size:
            os.kill(many.worker_pids()[0], signal.SIGKILL)  # the inference
        assert_same(one.collect(5), many.collect(5))
        assert not (tmp_path / "fault").exists()
        assert many.metrics()["rollout/worker_restarts"] == (window if size else 0)
        if window == 0:
            save_state(tmp_path / "state.pt", many.state_dict())
        for collector in (one, many):
            update(collector.sampler if collector is one else many._sampler, collector)
    assert many.metrics()["rollout/worker_lost_episodes"] == 0.0
    if size is None:
        seeds = list(range(100, 100 + NUM_ENVS))
        assert_same(one.collect_episodes(seeds), many.collect_episodes(seeds))
        resumed = in_process(make_sampler(), size)
        resumed.collect(5)
        many._sampler.policy.load_state_dict(resumed.sampler.policy.state_dict())
        many.load_state_dict(load_state(tmp_path / "state.pt"))
        assert_same(resumed.collect(5), many.collect(5))
    many.close()


def test_a_state_that_kills_its_simulator_costs_its_episodes():
    """Dead twice at the same place: the row of that simulator is lost, that of the other one is as ever."""
    simulators = RaySimulators(make_deadly, 2, SHARED)
    starts = itertools.count(1)
    start = next(s for s in starts if episode_seed(2**32 + s, 1) % 2 == 0)
    simulators._num_fresh_starts = start - 1
    env, actions = make_two_way_reach(2), torch.full((2, 4, 2), 0.5)
    before, expected = env.reset([4, 3]), env.step(actions)
    simulators.reset([4, 3])
    step = simulators.step(actions)
    assert step.lost.tolist() == step.truncated.tolist() == [False, True]
    assert step.executed.all(dim=1).tolist() == [True, False]
    assert step.rewards[1].tolist() == [0.0] * 4
    assert step.final_obs is not None
    assert step.final_ids.tolist() == [1]
    assert torch.equal(step.final_obs.state[0], before.state[1])
    assert torch.equal(step.obs.state[0], expected.obs.state[0])
    assert torch.equal(step.obs.state[1], env.reset([4, episode_seed(2**32 + start, 1)]).state[1])
    assert simulators.num_restarts == 2
    assert simulators.step(actions).executed.all()
    simulators.state_dict()
    simulators.reset([3, 4])
    simulators._deaths = [MAX_DEATHS, 0]
    with pytest.raises(RuntimeError, match="simulator 0 died 5 times in one window"):
        simulators.step(actions)
    with pytest.raises(ValueError, match="not of 2 simulators"):
        simulators.load_state_dict({"env": 0})
    simulators.close()
