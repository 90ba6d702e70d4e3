"""Learning on the twin's arm as users do it: twin, supervisor and a person at the keyboard, over DDS, in real time."""

import json
import os
import pty
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from vla_rl.core import Source
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.data.replay_writer import EpisodeWriter
from vla_rl.envs.config import EnvConfig
from vla_rl.envs.twin import TwinEnvConfig, TwinRobot
from vla_rl.evaluation.result import EvalResult
from vla_rl.real_robot.interfaces import Command, TeleopSample

PATIENT = {"max_state_age_s": 2.0, "silence_s": 2.0}  # nothing here asserts a latency
SHORT = (
    "--demos.num-episodes 4 --demos.num-envs 4 --sft.num-updates 3 --sft.batch-size 8 --sft.warmup-updates 1 "
    "--train.online.num-env-steps 48 --train.online.env-steps-per-iteration 16 --train.online.warmup-env-steps 8 "
    "--train.online.batch-size 8 --train.online.updates-per-call 1 --train.agent.policy-batch-size 8 "
    "--evaluation.num-episodes 1 --evaluation.num-videos 0 --env.max-state-age-s 2 --env.silence-s 2"
)


@pytest.fixture(scope="module", autouse=True)
def domain():
    """A DDS domain for this module and every process that it starts."""
    before = os.environ.get("ROS_DOMAIN_ID")
    os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
    yield
    if before is None:
        del os.environ["ROS_DOMAIN_ID"]
    else:
        os.environ["ROS_DOMAIN_ID"] = before


class Hand:
    """A `Teleop` that moves the tool down by 1 cm a step in the steps 4 to 8 of the first episode."""

    reads = -1

    def connect(self):
        pass

    def read(self):
        self.reads += 1
        return TeleopSample(np.array([0, 0, -0.01, 0, 0, 0]), 0.08, 4 <= self.reads < 9, {}, time.monotonic())

    def close(self):
        pass


def test_the_twin_has_the_simulators_episodes_and_a_persons_actions_are_the_policys_kind():
    simulated = EnvConfig().make(1, split="train")
    robot = TwinRobot(TwinEnvConfig(max_episode_steps=12, **PATIENT), "train")
    env = robot.env(teleop=Hand(), auto_reset=True, final_images=True)
    try:
        first, shown = env.reset([7]), simulated.reset([7])
        assert first.instruction == shown.instruction
        for name in ("cameras", "state_names", "action", "control_hz", "name"):
            assert getattr(env.spec, name) == getattr(simulated.spec, name)
        torch.testing.assert_close(first.state, shown.state, atol=5e-3, rtol=0)
        difference = (first.images["agent"].float() - shown.images["agent"].float()).abs()
        assert difference.mean() < 2.0

        down = 3
        step = env.step(torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(1, 12, 1))
        assert step.taken is not None
        assert step.taken.source[0].tolist() == [Source.POLICY] * 4 + [Source.HUMAN] * 5 + [Source.POLICY] * down
        # Engaging moves nothing; then 1 cm is half of the 2 cm that an action of 1 moves.
        torch.testing.assert_close(
            step.taken.actions[0, 5:9], torch.tensor([[0.0, 0.0, -0.5, 1.0]] * 4), atol=0.05, rtol=0
        )
        assert step.final_obs is not None
        z = env.spec.state_names.index("tip_z")
        assert step.final_obs.state[0, z] == pytest.approx(float(first.state[0, z]) - 0.04, abs=0.012)
        assert bool(step.truncated)
        assert step.obs.instruction != first.instruction or env.episode_seeds != (7,)

        buffer = ReplayBuffer(
            ReplayConfig(100, 0.9), state_dim=12, action_dim=4, num_envs=1, max_episode_steps=12,
            cameras={"agent": (64, 64)},
        )  # fmt: skip
        EpisodeWriter(buffer, env.spec.action).add(first, torch.zeros(1, 12, 4), step)
        assert (buffer.rows.source[:12] == Source.HUMAN).sum() == 5
    finally:
        env.close()
        simulated.close()


def test_persons_tool_deltas_and_actions_are_inverse():
    robot = TwinRobot(TwinEnvConfig(**PATIENT), "train")
    try:
        arm = robot.arm
        state, _, _ = arm.read()
        standing = Command(state.position, 0.08)
        moved = Command(arm.solve(state.position, np.array([0.01, -0.006, 0.004, 0, 0, 0])), 0.0)
        np.testing.assert_allclose(arm.action_of(moved, standing), [0.5, -0.3, 0.2, -1.0], atol=0.02)
        np.testing.assert_array_equal(arm.read()[0].position, state.position)  # the model was put back
    finally:
        robot.close()


def test_there_is_one_arm():
    with pytest.raises(ValueError, match="there is one arm: num_envs is 2"):
        TwinEnvConfig().make(2, split="train")


def test_learning_with_a_person_at_the_keyboard_from_demonstrations_to_the_report(tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "import sys; from vla_rl.cli import main; sys.exit(main())", "run", "twin_hil"]
    command += ["--run-dir", str(tmp_path), "--env.operator", "keyboard", *SHORT.split()]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=theirs, stdout=log, stderr=subprocess.STDOUT)
    os.close(theirs)
    ended = threading.Event()

    def press() -> None:
        """The key for "up", for two of each three seconds."""
        while not ended.wait(0.05):
            if time.monotonic() % 3 < 2:
                os.write(ours, b"r")

    keys = threading.Thread(target=press)
    keys.start()
    try:
        code = process.wait(400)
    finally:
        ended.set()
        keys.join()
        process.kill()
        os.close(ours)
    assert code == 0, (tmp_path / "log").read_text()[-2000:]
    lines = (tmp_path / "rl" / "online" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["rollout/intervention_rate"] for line in lines]
    assert len(rates) == 3
    assert 0.0 < max(rates) <= 1.0
    (evaluation,) = [path.parent for path in tmp_path.rglob("eval.json") if "rl" in path.parts]
    assert len(EvalResult.load(evaluation).episodes) == 1
