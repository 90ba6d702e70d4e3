"""Runs with workers that lose their driver, and learners in several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from vla_rl.envs.two_way_reach import make_two_way_reach
from vla_rl.onpolicy import ActorConfig, PPOConfig
from vla_rl.policies.build import build_policy
from vla_rl.policies.flow_mlp import FlowMLPConfig
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.train.loop import STATE_FILE, TrainConfig, run_training
from vla_rl.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
CONFIG = TrainConfig(
    num_envs=8,
    num_iterations=8,
    checkpoint_interval=2,
    algorithm=PPOConfig(
        num_decisions=4, critic_warmup_iterations=1, actor=ActorConfig(minibatch_size=32, num_epochs=2, target_kl=None)
    ),
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
TIMED = ("time_s", "update/iteration_s", "rollout/wait_s")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def train(folder, config=CONFIG, **options):
    policy = build_policy(FlowMLPConfig(width=16, num_layers=2), make_two_way_reach(1).spec, seed=0)
    run_training(policy, make_two_way_reach, config, folder, tensorboard=False, **options)
    return policy


def rows(folder):
    return [{k: v for k, v in row.items() if k not in TIMED} for row in read_metrics(folder)]


def train_with_workers(folder, address):
    """The driver that is killed: saves every second iteration and is never done."""
    rollout = RolloutConfig(workers=1, ray_address=address, cpus_per_worker=0.5, max_staleness=1)
    train(folder, replace(CONFIG, num_iterations=10**6), rollout=rollout)


def test_a_killed_driver_goes_on_from_its_checkpoint(tmp_path):
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        code = "import sys; from tests.unit.test_train_distributed import *; train_with_workers(*sys.argv[1:])"
        driver = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "killed"), cluster.address], env=ENVIRONMENT
        )
        deadline = time.monotonic() + 60
        while not (tmp_path / "killed" / STATE_FILE).exists():
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        done = int(torch.load(tmp_path / "killed" / STATE_FILE, weights_only=True)["num_iterations"])
        config = replace(CONFIG, num_iterations=done + 3)
        rollout = RolloutConfig(workers=1, cpus_per_worker=0.5, max_staleness=1)
        resumed = train(tmp_path / "killed", config, rollout=rollout, resume=True)
        whole = train(tmp_path / "whole", config, rollout=rollout)
        assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
        assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
        assert rows(tmp_path / "whole")[-1]["rollout/staleness"] == 1.0
    finally:
        ray.shutdown()
        cluster.shutdown()
