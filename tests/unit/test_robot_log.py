"""The log: what a loop did is what is read back, by our reader and by rosbags' own; the open-loop check."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore

from tests.unit.sim_arm import RATE_HZ, SPEC, Reaching, SimArm, SimCamera
from vla_rl.cli import main
from vla_rl.policies.checkpoints.native import save_policy
from vla_rl.policies.tiny import TinyVLA, TinyVLAConfig
from vla_rl.real_robot.control_loop import ControlLoop, LoopParts
from vla_rl.real_robot.inference import Inference
from vla_rl.real_robot.log import LogAbout, RobotLog, config_digest, read_about, read_ticks
from vla_rl.real_robot.loop_config import LoopConfig
from vla_rl.real_robot.replay import replay
from vla_rl.real_robot.safety import SafetyConfig
from vla_rl.real_robot.supervisor import Guard
from vla_rl.serving.broker import BrokerConfig

ABOUT = LogAbout(
    joint_names=SPEC.joint_names,
    prompt="reach",
    control_hz=RATE_HZ,
    policy="reaching",
    policy_digest="abc",
    action_names=(*SPEC.joint_names, "gripper"),
    config={"ramp_s": 0.0, "grace_s": 1.0},
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(log, ticks, report) of half a second."""
    path = tmp_path_factory.mktemp("log") / "run"
    arm = SimArm()
    arm.connect()
    ticks = []
    with RobotLog(path, ABOUT) as log:

        def see(tick):
            ticks.append(tick)
            log.write(tick)

        safety = SafetyConfig(speed_scale=1.0, max_state_age_s=1.0)
        parts = LoopParts(Guard(arm, safety), [SimCamera()], Inference(Reaching()), on_tick=see)
        loop = ControlLoop(parts, LoopConfig("reach", BrokerConfig(RATE_HZ), max_picture_age_s=1.0))
        loop.start()
        report = loop.run(0.5)
    assert log.dropped == 0
    return path, ticks, report


def test_everything_is_read_back(run):
    path, ticks, _ = run
    about = read_about(path)
    assert about == replace(ABOUT, config_digest=config_digest(ABOUT.config))
    logged = list(read_ticks(path))
    assert len(logged) == len(ticks) > 20
    for a, b in zip(logged, ticks, strict=True):
        assert a.at == pytest.approx(b.at - ticks[0].at, abs=1e-6)
        np.testing.assert_array_equal(a.position, [*b.state.position, b.state.gripper])
        assert (a.fields["mode"], a.fields["source"]) == (b.mode.value, b.source.name.lower())
        assert a.fields["clamps"] == list(b.clamps)
        assert (a.raw is None) == (b.proposal is None)
        np.testing.assert_array_equal(a.applied.position, b.applied.position)
        assert a.applied.gripper == b.applied.gripper
        assert (a.observation is None) == (b.observation is None)
        if a.observation is not None:
            np.testing.assert_array_equal(a.observation["images"]["front"], b.observation["images"]["front"])
            np.testing.assert_array_equal(a.observation["state"], b.observation["state"])
            assert a.observation["prompt"] == "reach"
    assert any("reply" in t.fields and t.fields["reply"]["latency_ms"] > 0 for t in logged)


def test_another_reader_opens_it(run):
    with AnyReader([run[0]], default_typestore=get_typestore(Stores.ROS2_JAZZY)) as reader:
        topics = {c.topic: c.msgtype for c in reader.connections}
        assert topics["/observation/front"] == "sensor_msgs/msg/Image"
        assert topics["/action/applied"] == "sensor_msgs/msg/JointState"
        about = [c for c in reader.connections if c.topic == "/vla_rl/about"]
        (message,) = [reader.deserialize(data, c.msgtype) for c, _, data in reader.messages(connections=about)]
        assert json.loads(message.data)["policy_digest"] == "abc"


def test_the_same_policy_replays_close_to_what_it_did_and_another_does_not(run, tmp_path):
    same = replay(run[0], Reaching())
    other = replay(run[0], Reaching(goal=(-0.8, 1.5)))
    assert same.num_decisions > 5
    near, far = same.errors(same.proposed), other.errors(other.proposed)
    # The arm's reply came a few ticks later than the replay's: at 0.5 rad/s that is a few times 5 mrad.
    assert near[:2, 0].max() < 0.03
    assert (far[:2, 0] > near[:2, 0]).all()
    assert near[2].max() < 1e-6  # the gripper's width is constant
    assert np.isfinite(same.errors(same.applied)).all()
    assert "shoulder" in same.format_table()
    same.write_html(tmp_path / "replay.html")
    page = (tmp_path / "replay.html").read_text()
    assert page.count("<svg") == 3
    assert "elbow" in page


def test_bad_logs_and_policies_are_refused(run, tmp_path):
    with pytest.raises(FileExistsError, match="name another folder"):
        RobotLog(run[0], ABOUT)
    with pytest.raises(ValueError, match="no log"):
        read_about(tmp_path / "nothing")
    with pytest.raises(ValueError, match="actions of 4 numbers, the log has 3"):
        replay(run[0], lambda obs: np.zeros((5, 4)))
    with RobotLog(tmp_path / "empty", ABOUT):
        pass
    with pytest.raises(ValueError, match="no observation"):
        replay(tmp_path / "empty", Reaching())


def test_digests_depend_on_values_and_not_on_order():
    assert config_digest({"a": 1, "b": 2}) == config_digest({"b": 2, "a": 1}) != config_digest({"a": 1, "b": 3})


def test_the_command_asks_a_policys_folder(run, tmp_path, capsys):
    policy = TinyVLA(TinyVLAConfig(state_dim=3, action_dim=3, cameras=("front",), image_size=16, action_horizon=4))
    save_policy(policy, tmp_path / "policy")
    assert main(["replay", str(run[0]), "--policy", str(tmp_path / "policy"), "--out", str(tmp_path / "r.html")]) == 0
    first = capsys.readouterr().out
    assert "shoulder" in first
    assert (tmp_path / "r.html").stat().st_size > 5000
    main(["replay", str(run[0]), "--policy", str(tmp_path / "policy")])
    assert capsys.readouterr().out.splitlines()[:6] == first.splitlines()[:6]  # the same noise again
    assert main(["replay", str(run[0]), "--policy", "ws://127.0.0.1:9"]) == 1
    assert "no policy server" in capsys.readouterr().err
