"""A policy on the twin as users deploy it: twin, policy server, supervisor and control loop, each a process of its own,
over DDS and websocket. Then the policy server is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from vla_rl.cli import main
from vla_rl.envs.tabletop import make_tabletop
from vla_rl.evaluation.result import EvalResult
from vla_rl.evaluation.video import read_video
from vla_rl.policies.checkpoints.native import save_policy
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig
from vla_rl.real_robot.deploy_config import DeployConfig
from vla_rl.real_robot.deploy_processes import start_server
from vla_rl.real_robot.drivers.dds_arm import DDSArm, twin_arm_spec
from vla_rl.real_robot.log import read_about, read_ticks
from vla_rl.real_robot.twin_faults import read_record

TRAJECTORY = "/arm/joint_trajectory"
# A machine that is busy with something else must not fail these tests: nothing here asserts a latency.
PATIENT = ["--silence-s", "2", "--max-state-age-s", "2", "--max-picture-age-s", "2", "--reply-s", "5"]
PATIENT += ["--max-plan-age-s", "2", "--heartbeat-s", "2"]


@pytest.fixture(scope="module", autouse=True)
def domain():
    """A DDS domain for this module and every process that it starts."""
    before = os.environ.get("ROS_DOMAIN_ID")
    os.environ["ROS_DOMAIN_ID"] = str(100 + os.getpid() % 100)
    yield
    if before is None:
        del os.environ["ROS_DOMAIN_ID"]
    else:
        os.environ["ROS_DOMAIN_ID"] = before


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Untrained, for the recipe demo_smoke: it moves the arm, and that is what counts here."""
    torch.manual_seed(0)
    env = make_tabletop("reach", 1, cameras={"agent": 64})
    config = TinyVLAConfig(
        state_dim=env.spec.state_dim,
        action_dim=4,
        cameras=("agent",),
        image_size=64,
        prefix_width=16,
        vision_channels=8,
        vision_blocks=1,
    )
    folder = tmp_path_factory.mktemp("policy")
    save_policy(TinyVLA(config), folder, spec=env.spec)
    env.close()
    return folder


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What a twin that runs, as a user would have started it, writes down."""
    file = tmp_path_factory.mktemp("twin") / "record.jsonl"
    options = ["--task", "reach", "--cameras", "agent", "--camera-hz", "20", "--record", str(file)]
    command = [sys.executable, "-c", "import sys; from vla_rl.cli import main; sys.exit(main())", "twin", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "'reach' is up" in process.stdout.readline()
    yield file
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    process.stdout.close()


@pytest.fixture(scope="module")
def server(policy, tmp_path_factory):
    """A policy server that runs; its process and address."""
    with ExitStack() as stack:
        yield start_server(policy, tmp_path_factory.mktemp("server") / "server.log", stack)


def deploy(policy, out, *options):
    return main(
        ["deploy", "--robot", "twin", "--policy", str(policy), "--recipe", "demo_smoke", "--out", str(out), *options]
    )


def commands(record, since):
    """Trajectories that the twin received after `since`: how many with points, how many that stop it."""
    received = [e for e in read_record(record, "received") if e["topic"] == TRAJECTORY and e["stamp"] > since]
    moving = [e for e in received if e["positions"]]
    return moving, [e for e in received if not e["positions"]]


def test_episodes_on_the_twin(policy, record, tmp_path, capfd):
    begun, out = time.monotonic(), tmp_path / "out"
    assert deploy(policy, out, "--episodes", "2", "--num-videos", "1", *PATIENT) == 0
    said = capfd.readouterr().out
    assert "seed    0" in said
    assert "policy latency" in said

    result = EvalResult.load(out)
    assert [(e.task, e.seed) for e in result.episodes] == [("tabletop/reach", 0), ("tabletop/reach", 1)]
    env = make_tabletop("reach", 2, split="test")
    obs = env.reset(seeds=[0, 1])  # the episodes are those of the simulator
    assert tuple(e.instruction for e in result.episodes) == obs.instruction
    env.close()
    values = json.loads((out / "deploy.json").read_text())
    assert values["stopped"] == ""
    assert values["broker"]["accepted"] >= 2
    assert 0 < values["latency_ms"]["p50"] <= values["latency_ms"]["p99"] < 5000
    assert [row["seed"] for row in values["episodes"]] == [0, 1]
    for row, episode in zip(values["episodes"], result.episodes, strict=True):
        assert row["steps"] == episode.length <= 24
        assert row["ticks"] >= row["steps"] > 0

    moving, _ = commands(record, begun)
    starts = [np.array(moving[0]["positions"][0]), obs.state[0, :7].numpy()]
    assert np.abs(starts[0] - starts[1]).max() < 0.15  # the first target is near where the episode begins
    for seed in (0, 1):
        log = out / "logs" / f"episode_{seed}"
        assert read_about(log).prompt == obs.instruction[seed]
        applied = [t for t in read_ticks(log) if t.applied is not None]
        assert len(applied) >= result.episodes[seed].length
    assert read_video(out / "videos" / "episode_0.mp4").shape[1:] == (256, 256, 3)
    assert not (out / "videos" / "episode_1.mp4").exists()
    page = (out / "deploy.html").read_text()
    assert "2 episodes on the twin in real time" in page
    assert "data:video/mp4;base64," in page
    assert values["server"]["policy_digest"] in page

    assert deploy(policy, out, "--episodes", "1") == 1
    assert "holds a deployment already" in capfd.readouterr().err


def test_shadow_sends_nothing(policy, record, server, tmp_path):
    begun, out = time.monotonic(), tmp_path / "out"
    assert deploy(policy, out, "--shadow", "--server", server[1], "--episodes", "1", *PATIENT) == 0
    values = json.loads((out / "deploy.json").read_text())
    assert values["episodes"][0]["steps"] == 24
    assert not values["episodes"][0]["success"]
    assert commands(record, begun)[0] == []


def test_the_arm_holds_when_the_policy_server_is_killed(policy, record, server, tmp_path, capfd):
    out = tmp_path / "out"
    killed = []
    process, url = server

    def kill():
        while not (out / "logs" / "episode_1").exists():
            time.sleep(0.01)
        begun = time.monotonic()
        while len(commands(record, begun)[0]) < 6:  # in the middle of the episode, however slow the machine is
            time.sleep(0.02)
        killed.append(time.monotonic())
        process.kill()

    threading.Thread(target=kill, daemon=True).start()
    assert deploy(policy, out, "--server", url, "--episodes", "500", "--grace-s", "0.5", *PATIENT) == 1
    ended = time.monotonic()
    error = capfd.readouterr().err
    assert "the arm was stopped in the episode of seed" in error
    assert "and holds: held for 0.5 s: the policy server does not answer" in error
    values = json.loads((out / "deploy.json").read_text())
    assert "held for 0.5 s" in values["stopped"]
    assert len(values["episodes"]) < 500
    assert values["episodes"][-1]["held"] > 0

    _, stops = commands(record, killed[0])
    assert stops
    moving, _ = commands(record, ended)
    assert moving == []
    arm = DDSArm(twin_arm_spec())
    arm.connect()
    held = arm.read().position
    time.sleep(0.3)
    assert np.abs(arm.read().position - held).max() < 1e-4
    arm.close()


def test_a_deployment_without_a_policy_is_refused(tmp_path, capfd):
    recipe = ["deploy", "--robot", "twin", "--recipe", "demo_smoke", "--out", str(tmp_path / "none")]
    assert main(recipe) == 1
    assert "name a policy's folder" in capfd.readouterr().err
    assert main(["deploy", "--out", str(tmp_path / "none")]) == 2
    with pytest.raises(ValueError, match="episodes must be at least 1"):
        DeployConfig(episodes=0)
