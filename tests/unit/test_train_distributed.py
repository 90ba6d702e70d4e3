"""Learners in several processes, and runs with workers that lose their driver."""

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

from tests.unit.two_learners import ENVIRONMENT, start_two
from vla_rl.configs import get_recipe
from vla_rl.envs.two_way_reach import make_two_way_reach
from vla_rl.onpolicy import ActorConfig, CriticConfig, GRPOConfig, PPOConfig, actor
from vla_rl.policies.build import build_policy
from vla_rl.policies.flow_mlp import FlowMLPConfig
from vla_rl.rollout.ray_config import RolloutConfig
from vla_rl.train.check import check_recipe
from vla_rl.train.checkpoint import CheckpointError
from vla_rl.train.distributed import join_learners, learner, leave_learners, merge_metrics
from vla_rl.train.loop import STATE_FILE, TrainConfig, run_training
from vla_rl.train.metrics import read_metrics

CONFIG = TrainConfig(
    num_envs=8,
    num_iterations=8,
    checkpoint_interval=2,
    algorithm=PPOConfig(
        num_decisions=4, critic_warmup_iterations=1, actor=ActorConfig(minibatch_size=32, num_epochs=2, target_kl=None)
    ),
)
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


# ----------------------------------------------------------------------------------------------------------- learners
def learn(folder):
    """One of two learners: a run of three iterations, and the same one stopped after two and gone on with. It leaves
    both policies and the gradient of the first minibatch."""
    torch.set_num_threads(1)
    folder, seen = Path(folder), []
    assert join_learners()
    average_gradients = actor.average_gradients

    def watched(parameters, num_rows):
        average_gradients(parameters, num_rows)
        seen.append([p.grad.clone() for p in parameters])

    actor.average_gradients = watched
    whole = train(folder / "two", learner_config(3))
    train(folder / "parts", learner_config(2))
    resumed = train(folder / "parts", learner_config(3), resume=True)
    left = {"whole": list(whole.parameters()), "resumed": list(resumed.parameters()), "gradient": seen[0]}
    torch.save({name: [x.detach() for x in tensors] for name, tensors in left.items()}, folder / f"{learner()}.pt")
    leave_learners()


def learner_config(num_iterations):
    """One minibatch an epoch: the same rows in a step, however many learners share them."""
    algorithm = PPOConfig(
        num_decisions=4,
        critic_warmup_iterations=0,
        actor=ActorConfig(minibatch_size=64, num_epochs=2, target_kl=None),
        critic=CriticConfig(minibatch_size=64),
    )
    return replace(CONFIG, algorithm=algorithm, num_iterations=num_iterations)


def test_two_learners_are_one(tmp_path, monkeypatch):
    """The same environments, gradient and policy as one process; and they go on from a checkpoint bit for bit."""
    seen = []
    monkeypatch.setattr(actor, "average_gradients", lambda ps, n: seen.append([p.grad.clone() for p in ps]))
    one = train(tmp_path / "one", learner_config(3))
    first, second = start_two("tests.unit.test_train_distributed:learn", tmp_path)
    for name in ("whole", "resumed", "gradient"):
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True)), name
    torch.testing.assert_close(first["gradient"], seen[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(first["whole"], [p.detach() for p in one.parameters()], atol=2e-5, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(first["whole"], first["resumed"], strict=True))
    one_rows, two_rows = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert two_rows == rows(tmp_path / "two" / "learners" / "1") == rows(tmp_path / "parts")
    for name in ("rollout/episodes_finished", "rollout/success_rate", "rollout/episode_length", "update/num_samples"):
        assert [r.get(name) for r in two_rows] == pytest.approx([r.get(name) for r in one_rows]), name
    assert two_rows[0]["update/policy_loss"] == pytest.approx(one_rows[0]["update/policy_loss"], abs=1e-6)
    with pytest.raises(CheckpointError, match="is of 2 learners, here are 1"):
        train(tmp_path / "parts", learner_config(3), resume=True)


def test_metrics_of_learners_merge():
    parts = [
        {
            "rollout/episodes_finished": 3.0,
            "rollout/success_rate": 1.0,
            "update/joint_kl": 0.2,
            "update/num_samples": 5.0,
        },
        {
            "rollout/episodes_finished": 1.0,
            "rollout/success_rate": 0.0,
            "update/joint_kl": 0.4,
            "update/num_samples": 7.0,
        },
        {"rollout/episodes_finished": 0.0, "update/joint_kl": 0.6, "update/num_samples": 0.0},
    ]
    merged = merge_metrics(parts)
    assert merged["rollout/success_rate"] == 0.75
    assert merged["rollout/episodes_finished"] == 4.0
    assert merged["update/num_samples"] == 12.0
    assert merged["update/joint_kl"] == pytest.approx(0.4)
    assert merge_metrics(parts[:1]) == parts[0]


@pytest.mark.parametrize(
    ("name", "algorithm", "rollout", "message"),
    [
        ("demo", None, RolloutConfig(workers=3, policy_batch_size=80), "do not divide into slices of 80"),
        ("demo", None, RolloutConfig(policy_batch_size=7), "divisor of the 160 environments"),
        ("demo", GRPOConfig(), RolloutConfig(workers=2, max_staleness=1), "max_staleness is for PPO"),
        ("maze_wsrl", None, RolloutConfig(workers=2), "1 environments do not divide"),
        ("maze_wsrl", None, RolloutConfig(workers=1, inference="shared"), "learns from replay"),
        ("maze_td3_bc", None, RolloutConfig(workers=1), "nobody collects"),
    ],
)
def test_rollouts_that_a_recipe_cannot_have(name, algorithm, rollout, message):
    recipe = replace(get_recipe(name), rollout=rollout)
    if algorithm is not None:
        recipe = replace(recipe, train=replace(recipe.train, algorithm=algorithm))
    with pytest.raises(ValueError, match=message):
        check_recipe(recipe)


def test_workers_need_a_function_that_builds_environments(tmp_path):
    policy = build_policy(FlowMLPConfig(width=16, num_layers=2), make_two_way_reach(1).spec, seed=0)
    with pytest.raises(ValueError, match="give a function that does"):
        run_training(policy, make_two_way_reach(8), CONFIG, tmp_path, rollout=RolloutConfig(workers=1))
