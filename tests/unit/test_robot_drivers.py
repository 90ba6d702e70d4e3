"""Drivers over modules that record calls and units; ros2_control over real ROS 2 message definitions and real DDS;
franky over the vendor's protocol against franky-sim, in a marked job."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.vendor_modules import DegreesRobot, UrModules, XArmModules
from vla_rl.real_robot.drivers import ros2_messages as ros
from vla_rl.real_robot.drivers.franky import FrankyArm, FrankyConfig
from vla_rl.real_robot.drivers.lerobot import JointCalibration, LeRobotArm
from vla_rl.real_robot.drivers.ros2_control import (
    Kinematics,
    Ros2Camera,
    Ros2ControlArm,
    Ros2ControlConfig,
    command_message,
    stop_message,
)
from vla_rl.real_robot.drivers.ros2_graph import DdsGraph, RclpyGraph
from vla_rl.real_robot.drivers.ur_rtde import UrRtdeArm, UrRtdeConfig
from vla_rl.real_robot.drivers.vendor import Poller
from vla_rl.real_robot.drivers.xarm import XArm, XArmConfig
from vla_rl.real_robot.interfaces import Arm, ArmSpec, Camera, Command, HardwareError

ROOT = Path(__file__).parents[2]


def spec(joints: int, rate_hz: float = 50.0) -> ArmSpec:
    one = np.ones(joints)
    return ArmSpec("arm", tuple(f"j{i}" for i in range(joints)), -3 * one, 3 * one, one, one, one, (0.0, 0.08), rate_hz, 0 * one)  # fmt: skip # noqa: E501


# -------------------------------------------------------------------------------------------------------------- missing
@pytest.mark.parametrize(
    ("arm", "command"),
    [
        (FrankyArm(FrankyConfig("10.0.0.1"), spec(7)), "pip install franky-control"),
        (UrRtdeArm(UrRtdeConfig("10.0.0.1"), spec(6)), "pip install ur-rtde"),
        (XArm(XArmConfig("10.0.0.1"), spec(6)), "pip install xarm-python-sdk"),
    ],
)
def test_missing_library_says_what_to_install(arm: Arm, command: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("franky", "rtde_control", "rtde_receive", "xarm", "xarm.wrapper"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(HardwareError, match=command):
        arm.connect()
    with pytest.raises(HardwareError, match=r"connect\(\)"):
        arm.read()
    arm.stop("nothing is connected")
    arm.close()


def test_missing_rclpy_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rclpy", None)
    with pytest.raises(HardwareError, match="source /opt/ros"):
        RclpyGraph()


# -------------------------------------------------------------------------------------------------------------- LeRobot
@pytest.fixture
def lerobot():
    robot = DegreesRobot()
    joints = (JointCalibration.degrees("pan.pos", zero=10.0), JointCalibration.normalized("lift.pos", -1.0, 2.0))
    arm = LeRobotArm(robot, spec(2), joints, camera_keys=("front",))
    arm.connect()
    yield robot, arm
    arm.close()
    assert not robot.is_connected
    assert robot.clashes == 0


def test_calibration_is_its_own_inverse():
    for joint in (JointCalibration.degrees("a", 10.0, -1.0), JointCalibration.normalized("a", -1.0, 2.0)):
        assert joint.from_rad(joint.to_rad(17.0)) == pytest.approx(17.0)
    assert JointCalibration.degrees("a", 10.0, -1.0).to_rad(100.0) == pytest.approx(-math.pi / 2)
    assert [JointCalibration.normalized("a", -1.0, 2.0).to_rad(v) for v in (-100, 0, 100)] == [-1.0, 0.5, 2.0]
    with pytest.raises(ValueError, match="scale must be finite"):
        JointCalibration("a", 0.0)


def test_lerobot_units(lerobot: tuple[DegreesRobot, LeRobotArm]):
    robot, arm = lerobot
    assert isinstance(arm, Arm)
    state = arm.read()
    np.testing.assert_allclose(state.position, [math.radians(20), -1.0])
    assert state.gripper == pytest.approx(0.02)
    applied = arm.send(Command(np.array([0.0, 2.0]), 0.04, 3))
    assert robot.actions[-1] == pytest.approx({"pan.pos": 10.0, "lift.pos": 100.0, "gripper.pos": 50.0})
    np.testing.assert_allclose(applied.position, [0.0, 2.0], atol=1e-12)
    assert (applied.gripper, applied.sequence) == (pytest.approx(0.04), 3)


def test_lerobot_returns_what_it_clamped(lerobot: tuple[DegreesRobot, LeRobotArm]):
    robot, arm = lerobot
    robot.max_relative = 5.0
    applied = arm.send(Command(np.array([0.0, 2.0]), 0.08))
    np.testing.assert_allclose(applied.position, [math.radians(15), -1.0 + 5 / 200 * 3])
    assert applied.gripper == pytest.approx(0.08 * 0.30)
    arm.stop("test")  # holds what was sent, not what is measured
    assert robot.actions[-1]["pan.pos"] == pytest.approx(25.0)


def test_lerobot_reads_in_a_thread_and_reports_a_broken_bus(lerobot: tuple[DegreesRobot, LeRobotArm]):
    robot, arm = lerobot
    first = arm.read().stamp
    for i in range(50):
        arm.send(Command(np.array([0.01 * i, 0.0]), 0.04))  # beside the thread; `clashes` counts in the fixture
    assert arm.read().stamp > first
    robot.broken = "no status packet"
    time.sleep(0.1)
    with pytest.raises(HardwareError, match="no status packet"):
        arm.read()
    robot.broken = ""
    time.sleep(0.1)
    arm.read()


def test_lerobot_camera(lerobot: tuple[DegreesRobot, LeRobotArm]):
    _, arm = lerobot
    camera = arm.camera("front")
    assert isinstance(camera, Camera)
    picture = camera.latest()
    assert picture.image.shape == (4, 6, 3)
    time.sleep(0.1)
    assert camera.latest().source_stamp_ns > picture.source_stamp_ns
    with pytest.raises(ValueError, match="wrist"):
        arm.camera("wrist")


def test_lerobot_without_a_joint_of_the_calibration():
    arm = LeRobotArm(DegreesRobot(), spec(1), (JointCalibration.degrees("elbow.pos"),))
    with pytest.raises(HardwareError, match=r"no \['elbow.pos'\]; it has"):
        arm.connect()
    with pytest.raises(ValueError, match="2 joints, got 1"):
        LeRobotArm(DegreesRobot(), spec(2), (JointCalibration.degrees("pan.pos"),))


# ------------------------------------------------------------------------------------------------------------- UR, xArm
@pytest.fixture
def ur(monkeypatch: pytest.MonkeyPatch):
    modules = UrModules()
    monkeypatch.setitem(sys.modules, "rtde_control", modules.control)
    monkeypatch.setitem(sys.modules, "rtde_receive", modules.receive)
    return modules, UrRtdeArm(UrRtdeConfig("10.0.0.2", watchdog_hz=20.0), spec(6, 125.0))


def test_ur_servo_and_watchdog(ur: tuple[UrModules, UrRtdeArm]):
    modules, arm = ur
    arm.connect()
    assert ("setWatchdog", 20.0) not in modules.calls  # it would end the program of an arm that nobody moves yet
    np.testing.assert_allclose(arm.read().position, modules.position)
    target = np.array(modules.position) + 0.01
    applied = arm.send(Command(target, 0.0, 4))
    np.testing.assert_array_equal(applied.position, target)
    arm.send(Command(target, 0.0, 5))
    names = [call[0] for call in modules.calls]
    assert names == ["control", "setWatchdog", "servoJ", "kickWatchdog", "servoJ"]
    assert modules.calls[2] == ("servoJ", target.tolist(), 0.0, 0.0, 1 / 125, 0.1, 300.0)
    arm.stop("test")
    arm.stop("test")
    arm.close()
    assert [c[0] for c in modules.calls[-6:]] == [
        "servoStop", "servoStop", "servoStop", "stopScript", "disconnect", "receive.disconnect"
    ]  # fmt: skip


def test_ur_faults(ur: tuple[UrModules, UrRtdeArm]):
    modules, arm = ur
    modules.emergency = True
    with pytest.raises(HardwareError, match="emergency stop; release it at the pendant"):
        arm.connect()
    modules.emergency = False
    arm.connect()
    modules.protective = True
    assert arm.read().fault == "protective stop"
    modules.protective, modules.running, modules.accepts = False, False, False
    assert "does not run" in arm.read().fault
    with pytest.raises(HardwareError, match="servoJ was refused"):
        arm.send(Command(np.zeros(6), 0.0))
    arm.recover()
    assert arm.read().fault == ""
    modules.connected = False
    with pytest.raises(HardwareError, match="is lost"):
        arm.read()
    with pytest.raises(HardwareError, match="no UR robot at nowhere"):
        UrRtdeArm(UrRtdeConfig("nowhere"), spec(6)).connect()
    with pytest.raises(ValueError, match="slower than the watchdog"):
        UrRtdeArm(UrRtdeConfig("10.0.0.2"), spec(6, 5.0))


@pytest.fixture
def xarm(monkeypatch: pytest.MonkeyPatch):
    modules = XArmModules()
    monkeypatch.setitem(sys.modules, "xarm", modules.package)
    monkeypatch.setitem(sys.modules, "xarm.wrapper", modules.wrapper)
    arm = XArm(XArmConfig("10.0.0.3"), spec(6))
    yield modules, arm
    arm.close()


def test_xarm_units_and_servo_mode(xarm: tuple[XArmModules, XArm]):
    modules, arm = xarm
    arm.connect()
    assert modules.calls[:4] == [("XArmAPI", "10.0.0.3"), ("motion_enable", True), ("set_mode", 1), ("set_state", 0)]
    state = arm.read()
    np.testing.assert_allclose(state.position, [0.2] * 6)  # rad, and of seven slots the arm's six
    assert state.gripper == pytest.approx(0.04)
    for width in (0.05, 0.0505, 0.06):
        arm.send(Command(np.full(6, 0.3), width))
    assert ("set_servo_angle_j", [0.3] * 6, True) in modules.calls
    pulses = [call[1] for call in modules.calls if call[0] == "set_gripper_position"]
    assert pulses == pytest.approx([500.0, 600.0])  # 0.5 mm more is not sent
    arm.stop("test")
    assert modules.state == 4
    arm.send(Command(np.full(6, 0.3), 0.06))  # ready again
    assert modules.state == 0


def test_xarm_errors(xarm: tuple[XArmModules, XArm]):
    modules, arm = xarm
    modules.error = 22
    with pytest.raises(HardwareError, match="error 22; clear it"):
        arm.connect()
    modules.error = 0
    arm.connect()
    modules.error = 31
    time.sleep(0.1)
    assert arm.read().fault == "error 31"
    arm.recover()
    modules.code = 3
    with pytest.raises(HardwareError, match="refused with code 3"):
        arm.send(Command(np.zeros(6), 0.0))


@pytest.mark.parametrize("position", [np.full(6, np.nan), np.zeros(5)])
def test_target_that_is_none_reaches_no_driver(ur: tuple[UrModules, UrRtdeArm], position: np.ndarray):
    modules, arm = ur
    arm.connect()
    with pytest.raises(ValueError, match="6 finite joint targets"):
        arm.send(Command(position, 0.0))
    assert not [call for call in modules.calls if call[0] == "servoJ"]


def test_poller_keeps_the_newest_and_ends():
    count = iter(range(10**6))
    poller = Poller(lambda: next(count), 200.0, "counter")
    with pytest.raises(HardwareError, match=r"connect\(\)"):
        poller.latest()
    poller.start()
    time.sleep(0.1)
    assert 5 <= poller.latest() <= 25
    poller.stop()
    last = poller.latest()
    time.sleep(0.03)
    assert poller.latest() == last


# --------------------------------------------------------------------------------------------------------- ros2_control
PLANAR = Kinematics(
    pose=lambda q: (np.array([math.cos(q[0]), math.sin(q[0]), q[1]]), np.array([0, 0, math.sin(q[0] / 2), math.cos(q[0] / 2)])),  # noqa: E501
    jacobian=lambda q: np.array([[-math.sin(q[0]), 0], [math.cos(q[0]), 0], [0, 1], [0, 0], [0, 0], [1, 0]]),
)  # fmt: skip


@pytest.fixture(scope="module")
def types() -> Any:
    pytest.importorskip("rosbags")
    from vla_rl.real_robot.ros_messages import message_types

    return message_types("jazzy")


@pytest.mark.parametrize("output", ["joint_trajectory", "forward_command", "pose", "twist"])
def test_commands_are_messages_of_ros(types: Any, output: Any):
    """The real definitions: a field that ROS does not have is an error, and CDR gives back what was written."""
    config, arm = Ros2ControlConfig(output=output, frame="base"), spec(2)
    target, measured = np.array([0.5, 0.3]), np.array([0.4, 0.3])
    sent = command_message(config, arm, target, measured, PLANAR, now=12.25)
    stop = stop_message(config, arm, target, PLANAR, now=12.25)
    for message in (sent, stop):
        types.message(*message)
    back = types.deserialize(types.serialize(types.message(*sent)), sent.type_name)
    if output == "joint_trajectory":
        assert back.joint_names == ["j0", "j1"]
        assert back.points[0].positions.tolist() == [0.5, 0.3]
        assert (back.points[0].time_from_start.sec, back.points[0].time_from_start.nanosec) == (0, 40_000_000)
        assert stop.fields["points"] == []
    elif output == "forward_command":
        assert back.data.tolist() == stop.fields["data"] == [0.5, 0.3]  # to stop: the last target again
    elif output == "pose":
        assert (back.header.frame_id, back.header.stamp.nanosec) == ("base", 250_000_000)
        assert (back.pose.position.x, back.pose.orientation.w) == pytest.approx((math.cos(0.5), math.cos(0.25)))
    else:
        assert back.twist.angular.z == pytest.approx(0.1 * 50)  # there in one period
        assert not any(stop.fields["twist"]["linear"].values())


def test_trajectories_of_a_whole_chunk(types: Any):
    message = ros.joint_trajectory(["a"], np.array([[0.1], [0.2]]), np.array([0.5, 1.25]))
    points = types.message(*message).points
    assert [(p.time_from_start.sec, p.time_from_start.nanosec) for p in points] == [(0, 500_000_000), (1, 250_000_000)]
    with pytest.raises(ValueError, match="rising times"):
        ros.joint_trajectory(["a"], np.array([[0.1], [0.2]]), np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="rising times"):
        ros.joint_trajectory(["a", "b"], np.array([[0.1], [0.2]]), np.array([0.5, 1.0]))
    with pytest.raises(ValueError, match="length 1"):
        ros.pose_stamped("base", np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="6 numbers"):
        ros.twist_stamped("base", np.zeros(3))


def test_gripper_goals_and_outputs_that_do_not_exist():
    assert ros.gripper_goal("GripperCommand", "", 0.02, 5).fields == {"command": {"position": 0.02, "max_effort": 5.0}}
    goal = ros.gripper_goal("ParallelGripperCommand", "finger", 0.02, 5)
    assert goal == (
        "control_msgs/action/ParallelGripperCommand",
        {"command": {"name": ["finger"], "position": [0.02], "effort": [5.0]}},
    )
    with pytest.raises(ValueError, match="unknown; use GripperCommand"):
        ros.gripper_goal("Grip", "", 0.0, 0.0)
    with pytest.raises(ValueError, match="output 'torque' is unknown"):
        Ros2ControlConfig(output="torque")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kinematics"):
        Ros2ControlArm(object(), spec(2), Ros2ControlConfig(output="twist"))  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "mono8"])
def test_pictures_of_ros(types: Any, encoding: str):
    rgb = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    data = {
        "rgb8": rgb, "bgr8": rgb[..., ::-1], "mono8": rgb[..., :1],
        "rgba8": np.concatenate([rgb, np.full((2, 4, 1), 255, np.uint8)], axis=2),
    }[encoding]  # fmt: skip
    rows = np.zeros((2, 4 * data.shape[2] + 3), np.uint8)  # rows may be longer than the picture
    rows[:, : 4 * data.shape[2]] = data.reshape(2, -1)
    fields = {"height": 2, "width": 4, "encoding": encoding, "step": rows.shape[1], "data": rows.reshape(-1)}
    expected = np.repeat(rgb[..., :1], 3, axis=2) if encoding == "mono8" else rgb
    np.testing.assert_array_equal(ros.pixels(types.message("sensor_msgs/msg/Image", fields)), expected)
    short = types.message("sensor_msgs/msg/Image", fields | {"data": rows.reshape(-1)[:-5]})
    with pytest.raises(HardwareError, match="damaged"):
        ros.pixels(short)
    with pytest.raises(HardwareError, match="yuv422"):
        ros.pixels(types.message("sensor_msgs/msg/Image", fields | {"encoding": "yuv422"}))


def test_arm_and_camera_over_real_topics():
    """A robot's side on DDS: joint states in another order and with a stranger's joint, a fault, pictures."""
    pytest.importorskip("cyclonedds")
    from vla_rl.real_robot.dds import COMMAND, SENSOR, STATUS, DDSNode, NodeConfig

    got: list[Any] = []
    widths: list[float] = []
    with DDSNode("robot", 91) as robot:
        joints = robot.publisher("/joint_states", "sensor_msgs/msg/JointState", SENSOR)
        fault = robot.publisher("/fault", "std_msgs/msg/String", STATUS)
        images = robot.publisher("/image", "sensor_msgs/msg/Image", SENSOR)
        robot.subscription("/jt", "trajectory_msgs/msg/JointTrajectory", COMMAND, lambda r: got.append(r.message))
        robot.subscription("/w", "std_msgs/msg/Float64MultiArray", COMMAND, lambda r: widths.append(r.message.data[0]))

        graph = DdsGraph(NodeConfig("driver", 91))
        config = Ros2ControlConfig(
            command_topic="/jt", fault_topic="/fault", finger_joints=("f0", "f1"), gripper="topic", gripper_name="/w"
        )
        arm, camera = Ros2ControlArm(graph, spec(2), config), Ros2Camera(graph, "front", "/image")
        assert isinstance(arm, Arm)
        assert isinstance(camera, Camera)
        state = {"name": ["f1", "j1", "x", "j0", "f0"], "position": [0.02, 0.5, 9.0, -0.5, 0.01]}
        picture = {"height": 1, "width": 2, "encoding": "rgb8", "step": 6, "data": np.arange(6, dtype=np.uint8)}
        picture["header"] = {"stamp": {"sec": 3, "nanosec": 4}, "frame_id": ""}
        stop = _publish(lambda: (
            joints.publish(robot.message("sensor_msgs/msg/JointState", state)),
            images.publish(robot.message("sensor_msgs/msg/Image", picture)),
        ))  # fmt: skip
        try:
            arm.connect()
            camera.connect()
            np.testing.assert_allclose(arm.read().position, [-0.5, 0.5])
            assert arm.read().gripper == pytest.approx(0.03)
            assert camera.latest().source_stamp_ns == 3_000_000_004
            assert time.monotonic() - arm.read().stamp < 0.5
            time.sleep(0.2)  # a command to a reader that is not matched yet is lost
            arm.send(Command(np.array([0.1, 0.2]), 0.05, 1))
            arm.send(Command(np.array([0.2, 0.2]), 0.0501, 2))
            _wait(lambda: got and got[-1].points and got[-1].points[0].positions.tolist() == [0.2, 0.2])
            _wait(lambda: widths == [0.05])
            arm.stop("test")
            _wait(lambda: len(got[-1].points) == 0)
            fault.publish(robot.message("std_msgs/msg/String", {"data": "reflex"}))
            _wait(lambda: arm.read().fault == "reflex")
        finally:
            stop()
            arm.close()


def test_joint_states_of_another_robot_are_refused():
    pytest.importorskip("cyclonedds")
    from vla_rl.real_robot.dds import SENSOR, DDSNode, NodeConfig

    with DDSNode("robot", 92) as robot:
        joints = robot.publisher("/joint_states", "sensor_msgs/msg/JointState", SENSOR)
        stop = _publish(lambda: joints.publish(robot.message("sensor_msgs/msg/JointState", {"name": ["elbow"]})))
        arm = Ros2ControlArm(DdsGraph(NodeConfig("driver", 92)), spec(2), Ros2ControlConfig())
        try:
            with pytest.raises(HardwareError, match=r"no \['j0', 'j1'\]; they have \['elbow'\]"):
                arm.connect()
        finally:
            stop()
            arm.close()


def test_actions_need_rclpy():
    pytest.importorskip("cyclonedds")
    from vla_rl.real_robot.dds import NodeConfig

    graph = DdsGraph(NodeConfig("driver", 93))
    with pytest.raises(HardwareError, match="is an action"):
        graph.send_goal("/gripper", ros.gripper_goal("GripperCommand", "", 0.02, 5))
    graph.close()


def _publish(publish: Any) -> Any:
    """Call `publish` at 50 Hz in a thread; returns what ends it."""
    import threading

    ended = threading.Event()

    def run() -> None:
        while not ended.wait(0.02):
            publish()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def stop() -> None:
        ended.set()
        thread.join()

    return stop


def _wait(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.slow
def test_ros2_control_over_rclpy():
    pytest.importorskip("rclpy", reason="rclpy comes with ROS 2, which is not sourced here")
    graph = RclpyGraph(name="vla_rl_driver_test")
    messages: list[Any] = []
    graph.subscribe("/jt", "trajectory_msgs/msg/JointTrajectory", _qos(), lambda m, stamp: messages.append(m))
    publish = graph.publisher("/jt", "trajectory_msgs/msg/JointTrajectory", _qos())
    _wait(lambda: publish(ros.stop_trajectory(["a", "b"])) is None and bool(messages))
    assert list(messages[-1].joint_names) == ["a", "b"]
    graph.close()


def _qos() -> Any:
    from vla_rl.real_robot.dds import COMMAND

    return COMMAND


# --------------------------------------------------------------------------------------------------------------- franky
@pytest.mark.slow
def test_franky_over_the_vendors_protocol(tmp_path: Path):
    """FrankyArm and the unmodified franky against franky-sim, a MuJoCo FR3 that speaks libfranka's protocol."""
    folder = Path(os.environ.get("VLA_RL_FRANKY_ENV", ROOT / "runs/venvs/franky"))
    python = folder / "bin/python"
    if not python.exists():
        pytest.skip(f"franky-sim is not installed: python3 -m venv {folder} && {folder}/bin/pip install franky-control franky-sim")  # fmt: skip # noqa: E501
    script = Path(__file__).with_name("franky_sim_job.py")
    done = subprocess.run(
        [str(python), str(script), str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["reached"] < 2e-3  # rad
    assert result["retargets"] == 45
    assert result["fault_while_moving"] == ""
    assert result["largest_velocity"] < 2.62  # of the FR3 at relative dynamics 1
    assert result["stood_after_stop_s"] < 1.5
    assert result["moved_after_stop"] < 5e-3  # rad; it settles
    assert abs(result["gripper"] - 0.02) < 2e-3
    assert result["read_ms"] < 10
