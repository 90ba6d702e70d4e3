"""Learners started through Ray are those of torchrun."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import ray
import torch

from tests.unit.test_train_distributed import rows
from tests.unit.two_learners import ENVIRONMENT, ROOT
from vla_rl.cli import main
from vla_rl.configs import get_recipe
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.native import load_policy, save_policy
from vla_rl.train.ray_learners import LearnersConfig, run_learners
from vla_rl.train.recipe import Recipe

RECIPE = "tests.unit.test_train_ray_learners:small"
CODE = "import sys; from vla_rl.cli import main; sys.exit(main())"
LEARNERS = ["--learners.num", "2", "--learners.cpus-per-learner", "0.5"]


def small() -> Recipe:
    """The demo's kind of run, with 8 environments and 3 updates on 2 demonstrations."""
    recipe = get_recipe("demo")
    algorithm = replace(recipe.train.algorithm, num_decisions=2, critic_warmup_iterations=0)
    train = replace(recipe.train, num_envs=8, num_iterations=2, eval_interval=0, algorithm=algorithm)
    sft = replace(recipe.sft, num_updates=3, warmup_updates=1, batch_size=7)
    demos = replace(recipe.demos, num_episodes=2, num_envs=2)
    return replace(recipe, demos=demos, sft=sft, train=train, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def _ray():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "PYTHONPATH", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
            patch.setenv(name, ENVIRONMENT[name])
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of an untrained policy."""
    torch.set_num_threads(1)
    recipe, folder = small(), tmp_path_factory.mktemp("start")
    env = recipe.env.make(1, split="train")
    save_policy(build_policy(recipe.policy, env.spec, seed=0), folder / "policy", spec=env.spec)
    env.close()
    return folder / "policy"


def arguments(start, run_dir, *more):
    return ["train", RECIPE, "--policy", str(start), "--run-dir", str(run_dir), *more]


def test_the_same_run_as_with_torchrun(start, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, sys.executable, "-c", CODE, *arguments(start, tmp_path / "torchrun")]
    by_torchrun = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False)
    assert by_torchrun.returncode == 0, by_torchrun.stderr
    assert main(arguments(start, tmp_path / "ray", *LEARNERS)) == 0
    weights = [tmp_path / how / "policy" / "policy.safetensors" for how in ("ray", "torchrun")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert rows(tmp_path / "ray") == rows(tmp_path / "torchrun")
    second = tmp_path / "ray" / "learners" / "1"
    assert rows(second) == rows(tmp_path / "ray")


def test_fine_tuning_by_two_that_divide_layers_is_that_of_one(tmp_path):
    assert main(["demos", RECIPE, "--out", str(tmp_path / "demos")]) == 0
    command = ["sft", RECIPE, "--dataset", str(tmp_path / "demos"), "--run-dir"]
    assert main([*command, str(tmp_path / "one")]) == 0
    assert main([*command, str(tmp_path / "two"), *LEARNERS, "--learners.shard"]) == 0
    one, two = (load_policy(tmp_path / name / "policy").state_dict() for name in ("one", "two"))
    for key, value in one.items():
        # where a gradient is rounding alone (a bias before a softmax), Adam makes steps of it
        torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3, msg=key)
    assert rows(tmp_path / "two")[-1]["sft/loss"] == pytest.approx(rows(tmp_path / "one")[-1]["sft/loss"], rel=1e-4)


@pytest.mark.slow
def test_ctrl_c_reaches_all_learners_and_the_run_goes_on(start, tmp_path):
    more = [*LEARNERS, "--train.num-iterations", "1000000"]
    driver = subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments(start, tmp_path, *more)], env=ENVIRONMENT, cwd=ROOT
    )
    deadline = time.monotonic() + 90
    while not (tmp_path / "metrics.jsonl").exists() or not rows(tmp_path):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGINT)
    assert driver.wait(timeout=60) == 130
    done = len(rows(tmp_path))
    more[-1] = str(done + 1)
    assert main(arguments(start, tmp_path, *more, "--resume")) == 0
    assert len(rows(tmp_path)) == done + 1


@pytest.mark.slow
def test_a_learner_that_fails_ends_the_others(start, tmp_path):
    with pytest.raises(RuntimeError, match=r"learner \d ended with status 1"):
        run_learners(arguments(start, tmp_path, "--train.num-envs", "7"), LearnersConfig(num=2, cpus_per_learner=0.5))


def test_learners_that_cannot_be(monkeypatch, capsys):
    with pytest.raises(ValueError, match="no effect with one learner"):
        LearnersConfig(gpus_per_learner=1.0)
    with pytest.raises(ValueError, match="3 learners need 3 CPU, there are 2"):
        run_learners(["recipes"], LearnersConfig(num=3))
    assert main(["train", "maze_wsrl", "--run-dir", "nowhere", "--learners.num", "2"]) == 2
    assert "several learners are for on-policy recipes" in capsys.readouterr().err
    assert main(["sft", RECIPE, "--dataset", "no", "--run-dir", "nowhere", "--learners.shard"]) == 2
    assert "learners.shard divides a policy among learners" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["train", RECIPE, "--run-dir", "nowhere", "--learners.num", "2"]) == 2
    assert "torchrun has started 3" in capsys.readouterr().err
