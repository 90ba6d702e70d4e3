"""The ament_python package: all of it that needs no rclpy, and what can be said of the rest without running it."""

# pyright: reportMissingImports=false
from __future__ import annotations

import ast
import importlib
import os
import py_compile
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.unit import rclpy_stand_in
from vla_rl.real_robot.control_loop import LoopReport, Tick
from vla_rl.real_robot.deploy_config import DeployConfig
from vla_rl.real_robot.inference import ServerConfig
from vla_rl.real_robot.interfaces import ArmState, Command, Picture
from vla_rl.real_robot.kinematics import ForwardKinematics
from vla_rl.real_robot.loop_config import LoopConfig
from vla_rl.real_robot.modes import Mode
from vla_rl.real_robot.safety import SafetyConfig
from vla_rl.real_robot.takeover import Control

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "real_robot/ros2"
INTERFACES = ROOT / "real_robot/ros2_interfaces"
ROBOTS = ("twin", "franka", "ur")
PATIENT = {"loop.max_picture_age_s": 0.5, "safety.max_state_age_s": 0.5}  # on a machine that does other work


@pytest.fixture(scope="module", autouse=True)
def on_path():
    sys.path.insert(0, str(PACKAGE))
    yield
    sys.path.remove(str(PACKAGE))


def module(name: str) -> Any:
    return importlib.import_module(f"vla_rl_ros2.{name}")


# ------------------------------------------------------------------------------------------------------------ the files
def test_package_is_complete():
    root = ET.parse(PACKAGE / "package.xml").getroot()
    assert root.get("format") == "3"
    assert root.findtext("export/build_type") == "ament_python"
    name = root.findtext("name")
    assert (PACKAGE / "resource" / str(name)).is_file()
    cfg = (PACKAGE / "setup.cfg").read_text()
    assert f"script_dir=$base/lib/{name}" in cfg
    assert f"install_scripts=$base/lib/{name}" in cfg
    assert {p.stem for p in (PACKAGE / "config").glob("*.yaml")} == set(ROBOTS)
    assert {p.name for p in (PACKAGE / "launch").iterdir()} - {"__pycache__"} == {f"{r}.launch.py" for r in ROBOTS}


def test_packages_that_are_used_are_declared():
    topics = module("topics")
    used = {kind.split("/")[0] for kind, _ in topics.PUBLISHED.values()} | {
        kind.split("/")[0] for kind in (*topics.SERVICES.values(), topics.ACTION[1], topics.JOY[0])
    }
    from vla_rl.real_robot.drivers.ros2_control import OUTPUT_TYPES

    used |= {kind.split("/")[0] for kind in OUTPUT_TYPES.values()}
    declared = {e.text for e in ET.parse(PACKAGE / "package.xml").getroot().findall("exec_depend")}
    assert used <= declared


def test_every_file_compiles_and_the_node_is_short(tmp_path: Path):
    files = [*PACKAGE.rglob("*.py")]
    assert len(files) >= 9
    for file in files:
        py_compile.compile(str(file), cfile=str(tmp_path / "x.pyc"), doraise=True)
    assert len((PACKAGE / "vla_rl_ros2/policy_node.py").read_text().splitlines()) < 400


@pytest.mark.parametrize("library", ["rclpy", "launch", "launch_ros", "ament_index_python"])
def test_ros_is_imported_only_where_it_must(library: str):
    importers = {}
    for file in (PACKAGE / "vla_rl_ros2").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == library for name in names):
                importers.setdefault(file.name, []).append(node.col_offset)
    if library == "rclpy":
        assert set(importers) == {"policy_node.py"}
    else:
        assert set(importers) == {"launching.py"}
        assert all(column > 0 for column in importers["launching.py"]), "only where it is called"


def test_node_keeps_signals_to_itself_and_stops_before_the_context_ends():
    """rclpy's handlers would end the context before the stop could be published."""
    tree = ast.parse((PACKAGE / "vla_rl_ros2/policy_node.py").read_text())
    (main,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    calls = [ast.unparse(n) for n in ast.walk(main) if isinstance(n, ast.Call)]
    assert "rclpy.init(signal_handler_options=SignalHandlerOptions.NO)" in calls
    lines = {ast.unparse(n.func): n.lineno for n in ast.walk(main) if isinstance(n, ast.Call)}
    assert lines["signal.signal"] < lines["node.end"] < lines["executor.shutdown"] < lines["rclpy.shutdown"]


def test_handlers_of_every_service():
    tree = ast.parse((PACKAGE / "vla_rl_ros2/policy_node.py").read_text())
    keys = {k.value for n in ast.walk(tree) if isinstance(n, ast.Dict) for k in n.keys if isinstance(k, ast.Constant)}
    assert keys == set(module("topics").SERVICES)


def test_interfaces_are_read_by_ros_own_grammar():
    pytest.importorskip("rosbags")
    from rosbags.typesys import get_types_from_msg

    goal, result, feedback = (INTERFACES / "action/RunPolicy.action").read_text().split("---")
    request, response = (INTERFACES / "srv/SetTask.srv").read_text().split("---")
    fields = {}
    for name, text in [("Goal", goal), ("Result", result), ("Feedback", feedback), ("Req", request), ("Res", response)]:
        (definition,) = get_types_from_msg(text, f"vla_rl_interfaces/msg/{name}").values()
        fields[name] = [field for field, _ in definition[1]]
    assert fields["Goal"] == ["prompt", "max_duration_s", "shadow"]
    assert fields["Result"] == ["success", "reason", "ticks", "latency_p99_ms"]
    assert fields["Feedback"] == ["tick", "mode", "latency_ms"]
    assert (fields["Req"], fields["Res"]) == (["task"], ["success", "message"])
    listed = (INTERFACES / "CMakeLists.txt").read_text()
    assert all(f'"{p.relative_to(INTERFACES)}"' in listed for p in INTERFACES.rglob("*.[as][cr][tv]*"))


# ----------------------------------------------------------------------------------------------------------- parameters
@pytest.mark.parametrize("robot", ROBOTS)
def test_parameter_files_are_whole(robot: str):
    settings = module("settings")
    parameters = settings.read_yaml(PACKAGE / "config" / f"{robot}.yaml")
    made = settings.make_settings(parameters)
    assert made.spec.num_joints == (6 if robot == "ur" else 7)
    from vla_rl.real_robot.safety import SafetyFilter

    safety = SafetyFilter(made.spec, made.safety)  # its limits leave room to move
    state = ArmState(made.spec.home, np.zeros(made.spec.num_joints), 0.04, 10.0)
    assert safety.refusal(state, 10.0) == "", "home is inside of the workspace"
    safety.start(state, 10.0)
    standing = Command(made.spec.home, 0.04, 0)
    target = made.to_command()(np.append(np.full(made.spec.num_joints, 0.1), 1.0), standing)
    np.testing.assert_allclose(target.position, made.spec.home + 0.1 * made.max_step)
    assert safety.filter(target, state, 10.0 + 1 / made.spec.rate_hz).stop_reason == ""


def test_twin_file_is_the_twin():
    from vla_rl.real_robot.drivers.dds_arm import DDSArmConfig, twin_arm_spec

    settings = module("settings")
    made = settings.make_settings(settings.read_yaml(PACKAGE / "config/twin.yaml"))
    spec, topics = twin_arm_spec("twin", 20.0), DDSArmConfig()
    assert made.spec.joint_names == spec.joint_names
    for name in ("position_low", "position_high", "max_velocity", "max_acceleration", "max_jerk"):
        np.testing.assert_allclose(getattr(made.spec, name), getattr(spec, name))
    np.testing.assert_allclose(made.spec.home, spec.home, atol=1e-4)
    assert made.arm.command_topic == topics.trajectory
    assert (made.arm.gripper_name, made.arm.finger_joints) == (topics.gripper, topics.finger_joints)
    assert (made.arm.joint_states, made.arm.fault_topic) == (topics.joint_states, topics.fault)


def test_franka_tool_is_where_frankas_tables_put_it():
    """Flange of the arm stretched out upwards: x = 0.088, z = 0.333 + 0.316 + 0.384 - 0.107, the hand pointing down."""
    settings = module("settings")
    made = settings.make_settings(settings.read_yaml(PACKAGE / "config/franka.yaml"))
    tip = ForwardKinematics(made.safety.chain)(np.zeros(7))
    np.testing.assert_allclose(tip, [0.088, 0.0, 0.333 + 0.316 + 0.384 - 0.2104], atol=1e-6)
    solve, q = made.solve(), made.spec.home
    forward = ForwardKinematics(made.safety.chain)
    moved = solve(q, np.array([0.005, -0.003, 0.004, 0.1, 0.0, 0.0]))
    np.testing.assert_allclose(forward(moved) - forward(q), [0.005, -0.003, 0.004], atol=3e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm.joint_nams": ["a"]}, "arm.joint_nams is unknown; do you mean arm.joint_names"),
        ({"arm.joint_names": [""]}, "arm.joint_names is missing"),
        ({"arm.home": [0.0]}, "arm.home has 1 numbers, expected 7"),
        ({"arm.home": [9.0] * 7}, "outside of the position limits"),
        ({"arm.max_jerk": [0.0] * 7}, "must be positive"),
        ({"arm.rate_hz": "fast"}, "arm.rate_hz must be float, got 'fast'"),
        ({"arm.rate_hz": float("nan")}, "arm.rate_hz must be float"),
        ({"arm.joint_names": "a"}, "must be a list of str"),
        ({"policy.execution_horizon": 2.5}, "must be int"),
        ({"policy.action": "torque"}, "use one of joint_targets"),
        ({"policy.mode": "magic"}, "mode must be sync"),
        ({"output.kind": "torque"}, "'torque' is unknown"),
        ({"input.cameras": ["front"]}, 'must be "name:=topic"'),
        ({"safety.workspace_low": [0.0, 0.0]}, "need x, y, z each"),
        ({"safety.workspace_low": [0.0] * 3, "safety.workspace_high": [1.0] * 3}, "expected a, d, alpha of 7 joints"),
        ({"safety.speed_scale": 2.0}, "speed_scale"),
        ({"loop.start_tolerance": 0.0}, "must be positive"),
        ({"arm.gripper_range": [0.08, 0.0]}, "gripper_range"),
    ],
)
def test_wrong_parameters_are_named(change: dict[str, Any], message: str):
    settings = module("settings")
    parameters = settings.read_yaml(PACKAGE / "config/twin.yaml") | change
    with pytest.raises(settings.SettingsError, match=message):
        settings.make_settings(parameters)


def test_integers_stand_for_floats_and_defaults_are_of_ros_types():
    """YAML's `20` is an integer to ROS; an empty list has no type there, so no default is one."""
    settings = module("settings")
    parameters = settings.read_yaml(PACKAGE / "config/twin.yaml")
    made = settings.make_settings(parameters | {"arm.rate_hz": 20})
    assert isinstance(made.spec.rate_hz, float)
    for name, default in settings.DEFAULTS.items():
        items = default if isinstance(default, list) else [default]
        assert items, name
        assert len({type(x) for x in items}) == 1
        assert type(items[0]) in (bool, int, float, str)


def test_limits_are_those_of_the_bridge():
    """A limit that nobody sets is one number, whichever way the arm is driven."""
    settings = module("settings")
    made = settings.make_settings(settings.read_yaml(PACKAGE / "config/twin.yaml"))
    deployed = DeployConfig()
    for config in (LoopConfig("", made.loop.broker), deployed):
        assert made.loop.max_picture_age_s == config.max_picture_age_s
        assert made.loop.grace_s == config.grace_s
    assert made.safety.max_state_age_s == SafetyConfig().max_state_age_s == deployed.max_state_age_s
    assert made.loop.max_plan_age_s == deployed.max_plan_age_s
    assert made.server.heartbeat_s == ServerConfig("").heartbeat_s == deployed.heartbeat_s
    sync = settings.make_settings(settings.read_yaml(PACKAGE / "config/twin.yaml") | {"policy.mode": "sync"})
    assert sync.loop.max_plan_age_s is None  # the arm waits for the policy then
    own = {"loop.max_picture_age_s": 0.3, "safety.max_state_age_s": 0.2}  # a camera of 5 Hz, a slow network
    made = settings.make_settings(settings.read_yaml(PACKAGE / "config/twin.yaml") | own)
    assert (made.loop.max_picture_age_s, made.safety.max_state_age_s) == (0.3, 0.2)


def test_file_without_the_node_is_refused(tmp_path: Path):
    settings = module("settings")
    (tmp_path / "other.yaml").write_text("camera:\n  ros__parameters: {fps: 30}\n")
    with pytest.raises(settings.SettingsError, match="no parameters of the node 'policy'"):
        settings.read_yaml(tmp_path / "other.yaml")


# --------------------------------------------------------------------------------------------------------------- topics
def tick(mode: Mode = Mode.RUN, problem: str = "") -> Tick:
    state = ArmState(np.zeros(2), np.zeros(2), 0.04, 9.98)
    pictures = {"front": Picture(np.zeros((2, 2, 3), np.uint8), 9.95, 1)}
    applied = Command(np.array([0.1, 0.2]), 0.05, 3)
    return Tick(10.0, mode, Control.HUMAN, state, pictures, np.ones(3, np.float32), applied, applied, ("rate",), None, None, problem, 0.001)  # fmt: skip # noqa: E501


def test_commands_are_reliable_and_forgotten_and_status_is_kept():
    topics = module("topics")
    from vla_rl.real_robot.dds import COMMAND

    assert (COMMAND.reliable, COMMAND.depth, COMMAND.transient_local) == (True, 1, False)
    assert topics.PUBLISHED["~/mode"][1].transient_local
    assert not topics.JOY[1].reliable


def test_messages_are_of_ros(recwarn: pytest.WarningsRecorder):
    pytest.importorskip("rosbags")
    from vla_rl.real_robot.ros_messages import message_types

    topics, types = module("topics"), message_types("jazzy")
    report = LoopReport(ticks=20, clamped=2)
    report.latency_s.extend([0.05, 0.06])
    message = topics.diagnostics("/policy", 1_500_000_000, Mode.RUN, tick(), report, 19.97)
    back = types.deserialize(types.serialize(types.message(*message)), message.type_name)
    status = back.status[0]
    values = {pair.key: pair.value for pair in status.values}
    assert (back.header.stamp.sec, back.header.stamp.nanosec) == (1, 500_000_000)
    assert (status.name, status.message) == ("/policy: control loop", "run")
    assert values["achieved_hz"] == "20.0"
    assert values["state_age_ms"] == "20.0"
    assert values["front_age_ms"] == "50.0"
    assert values["clamped"] == "2"
    assert values["source"] == "human"
    assert float(values["latency_p99_ms"]) == pytest.approx(59.9)
    actions = topics.action_messages(tick())
    assert actions["~/action_raw"].fields == {"data": [1.0, 1.0, 1.0]}
    assert actions["~/action_applied"].fields == {"data": [0.1, 0.2, 0.05]}
    for name, sent in actions.items():
        assert topics.PUBLISHED[name][0] == sent.type_name
        types.message(*sent)
    held = tick()._replace(proposal=None, applied=None)
    assert topics.action_messages(held) == {}


@pytest.mark.parametrize(
    ("mode", "problem", "level"), [(Mode.RUN, "", 0), (Mode.RUN, "stale", 1), (Mode.HOLD, "", 1), (Mode.ESTOP, "", 2)]
)
def test_diagnostic_level_of_modes(mode: Mode, problem: str, level: int):
    message = module("topics").diagnostics("/policy", 0, mode, tick(mode, problem), LoopReport(), 0.0)
    assert message.fields["status"][0]["level"] == level


def test_joystick_messages():
    topics = module("topics")
    joy = topics.JoyDevice({"deadman": 0, "gripper": 5})
    joy.take(SimpleNamespace(axes=[0.5, -1.0], buttons=[1, 0]))
    values, buttons = joy.read()
    assert values.tolist() == [0.5, -1.0, 0, 0, 0, 0]
    assert buttons == {"deadman": True, "gripper": False}  # a button that the device has not is not pressed


# ---------------------------------------------------------------------------------------------------- the bridge on DDS
class Robot:
    """A robot's side on DDS: follows the last trajectory point at once, publishes joint states and pictures."""

    def __init__(self, domain: int, home: np.ndarray) -> None:
        from vla_rl.real_robot.dds import COMMAND, SENSOR, STATUS, DDSNode

        self.node = DDSNode("robot", domain)
        self.position, self.points, self.stops = home.copy(), 0, 0
        self.joints = self.node.publisher("/joint_states", "sensor_msgs/msg/JointState", SENSOR)
        self.images = self.node.publisher("/camera/agent/image_raw", "sensor_msgs/msg/Image", SENSOR)
        self.fault = self.node.publisher("/arm/fault", "std_msgs/msg/String", STATUS)
        self.node.subscription(
            "/arm/joint_trajectory", "trajectory_msgs/msg/JointTrajectory", COMMAND, lambda r: self.take(r.message)
        )
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def take(self, message: Any) -> None:
        if len(message.points):
            self.points += 1
            self.position = np.array(message.points[-1].positions)
        else:
            self.stops += 1

    def run(self) -> None:
        names = [f"joint{i}" for i in range(1, 8)] + ["finger_left", "finger_right"]
        count = 0
        while not self.ended.wait(0.02):
            count += 1
            state = {"name": names, "position": [*self.position, 0.02, 0.02]}
            self.joints.publish(self.node.message("sensor_msgs/msg/JointState", state))
            data = np.full(4 * 6 * 3, count % 256, np.uint8)
            stamp = {"stamp": {"sec": count // 50, "nanosec": 20_000_000 * (count % 50)}}
            picture = {"header": stamp, "height": 4, "width": 6, "encoding": "rgb8", "step": 18, "data": data}
            self.images.publish(self.node.message("sensor_msgs/msg/Image", picture))

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        self.node.close()


def test_bridge_runs_records_and_stops(tmp_path: Path):
    """What the node does, over real topics, with a policy in this process."""
    pytest.importorskip("cyclonedds")
    from vla_rl.core import Source
    from vla_rl.data.lerobot_reader import LeRobotDataset
    from vla_rl.real_robot.dds import NodeConfig
    from vla_rl.real_robot.drivers.ros2_graph import DdsGraph

    settings = module("settings")
    parameters = settings.read_yaml(PACKAGE / "config/twin.yaml")
    parameters |= {"record.path": str(tmp_path / "episodes"), "gripper.kind": "", "loop.ramp_s": 0.1, **PATIENT}
    made = settings.make_settings(parameters)
    robot = Robot(95, made.spec.home)
    chunk = np.tile(np.array([0.2, 0, 0, 0, 0, 0, 0, 1.0], np.float32), (8, 1))
    bridge = module("bridge").Bridge(made, DdsGraph(NodeConfig("bridge", 95)), infer=lambda observation: chunk)
    try:
        bridge.recorder.start("touch the cube")
        threading.Timer(0.5, setattr, (bridge.teleop, "held", True)).start()
        threading.Timer(0.9, setattr, (bridge.teleop, "held", False)).start()
        report = bridge.run(1.6)
        assert report.stop_reason == ""
        assert report.ticks >= 25
        assert robot.points >= 15
        assert robot.position[0] > made.spec.home[0] + 0.1
        assert bridge.mode is Mode.IDLE
        index = bridge.recorder.end(success=True)
        episode = LeRobotDataset(tmp_path / "episodes").episode(index)
        assert set(episode.source.tolist()) == {Source.POLICY, Source.HUMAN}
        human = episode.source == Source.HUMAN
        assert float((episode.action[human][:, 0].diff()).abs().max()) < 0.03  # held while the person has it
        assert (
            float((episode.proposal[human] - episode.action[human])[:, 0].median()) > 0.01
        )  # the policy went on wanting
        assert bool(episode.success[-1])
        assert episode.images["agent"].shape[1:] == (4, 6, 3)

        bridge.stop("e-stop service")
        end = time.monotonic() + 2
        while not robot.stops and time.monotonic() < end:
            time.sleep(0.01)
        assert robot.stops, "the controller got its stop"
        with pytest.raises(Exception, match=r"estop|stopped"):
            bridge.run(0.5)
        bridge.reset_stop()
        assert bridge.mode is Mode.IDLE
    finally:
        bridge.close("test")
        robot.close()


# ------------------------------------------------------------------------------------------------------------- the node
def test_node_with_a_stand_in_for_rclpy_over_real_topics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The node's own code: what its transitions, services and action do to a robot on DDS."""
    pytest.importorskip("cyclonedds")
    from vla_rl.real_robot.dds import STATUS, DDSNode, NodeConfig
    from vla_rl.real_robot.drivers.ros2_graph import DdsGraph

    rclpy_stand_in.install(monkeypatch)
    monkeypatch.delitem(sys.modules, "vla_rl_ros2.policy_node", raising=False)
    node_module = module("policy_node")
    plain = SimpleNamespace(Result=SimpleNamespace, Feedback=SimpleNamespace)
    monkeypatch.setattr(node_module, "ros_type", lambda name: plain)
    monkeypatch.setattr(node_module, "RclpyGraph", lambda node: DdsGraph(NodeConfig("policy", 96)))
    chunk = np.tile(np.array([0.2, 0, 0, 0, 0, 0, 0, 1.0], np.float32), (8, 1))
    bridge_of = module("bridge").Bridge
    monkeypatch.setattr(node_module, "Bridge", lambda settings, graph: bridge_of(settings, graph, lambda _: chunk))

    node = node_module.PolicyNode()
    assert node.on_configure(None) == "failure"
    assert "arm.joint_names is missing" in node.fail
    settings = module("settings")
    made = settings.read_yaml(PACKAGE / "config/twin.yaml") | {"gripper.kind": "", "loop.ramp_s": 0.1, **PATIENT}
    node.parameters |= made | {"record.path": str(tmp_path / "episodes")}
    robot = Robot(96, np.array(made["arm.home"]))
    modes: list[str] = []
    watcher = DDSNode("watcher", 96)
    watcher.subscription("~/mode", "std_msgs/msg/String", STATUS, lambda r: modes.append(r.message.data))

    def call(name: str, **request: Any) -> Any:
        return node.services[name](SimpleNamespace(**request), SimpleNamespace())

    goal = {"prompt": "touch the cube", "max_duration_s": 0.8, "shadow": False}
    try:
        assert not call("~/estop").success  # unconfigured
        assert node.on_configure(None) == "success", node.fail
        assert node.action.accepts(SimpleNamespace(**goal)) == "reject"  # inactive
        assert node.on_activate(None) == "success"
        assert node.action.accepts(SimpleNamespace(**goal)) == "accept"
        assert call("~/set_task", task="touch the cube").success
        assert "empty" in call("~/set_task", task="").message
        assert call("~/start_episode").success
        handle = rclpy_stand_in.GoalHandle(**goal)
        result = node.action.execute(handle)
        assert (handle.ended, result.success, result.reason) == ("succeeded", True, "")
        assert result.ticks >= 12
        assert handle.feedback[-1].mode == "run"
        assert call("~/end_episode", data=True).success
        assert "no frame" in call("~/end_episode", data=True).message
        ((period, diagnose),) = node.timers
        assert period == 1.0
        diagnose()

        handle = rclpy_stand_in.GoalHandle(**(goal | {"max_duration_s": 5.0}))
        threading.Timer(0.5, setattr, (handle, "is_cancel_requested", True)).start()
        node.action.execute(handle)
        assert handle.ended == "canceled"

        handle = rclpy_stand_in.GoalHandle(**(goal | {"max_duration_s": 5.0}))
        threading.Timer(0.5, call, ("~/estop",)).start()
        result = node.action.execute(handle)
        assert (handle.ended, result.success) == ("aborted", False)
        assert "e-stop" in result.reason
        assert node.action.accepts(SimpleNamespace(**goal)) == "reject"  # latched
        assert call("~/reset_estop").success
        assert node.action.accepts(SimpleNamespace(**goal)) == "accept"
        before = robot.stops
        assert node.on_deactivate(None) == "success"
        end = time.monotonic() + 2
        while robot.stops == before and time.monotonic() < end:
            time.sleep(0.01)
        assert robot.stops > before
        assert modes[0] == "idle"
        assert {"run", "estop"} <= set(modes)
    finally:
        node.end("test")
        watcher.close()
        robot.close()


# ------------------------------------------------------------------------------------------------------------- with ROS
def test_node_with_rclpy():
    pytest.importorskip("rclpy", reason="rclpy comes with ROS 2, which is not sourced here")
    pytest.importorskip("vla_rl_interfaces", reason="build real_robot/ros2_interfaces with colcon first")
    import rclpy

    rclpy.init()
    node = module("policy_node").PolicyNode()
    try:
        assert node.trigger_configure().name == "FAILURE"  # no joints are named
        assert "arm.joint_names is missing" in node.fail
    finally:
        node.destroy_node()
        rclpy.shutdown()


@pytest.mark.parametrize("robot", ROBOTS)
def test_launch_files(robot: str):
    pytest.importorskip("launch_ros", reason="launch comes with ROS 2, which is not sourced here")
    spec = importlib.util.spec_from_file_location(robot, PACKAGE / "launch" / f"{robot}.launch.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    assert loaded.generate_launch_description().entities


@pytest.mark.slow
def test_builds_with_colcon(tmp_path: Path):
    """Of colcon alone, which PyPI has: no ROS is needed to install an ament_python package."""
    colcon = shutil.which("colcon") or str(ROOT / "runs/venvs/colcon/bin/colcon")
    if not Path(colcon).exists():
        pytest.skip(
            "no colcon: python3 -m venv runs/venvs/colcon && .../pip install colcon-core colcon-ros 'setuptools<80'"
        )
    source = tmp_path / "src/vla_rl_ros2"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__"))
    environment = dict(os.environ, PATH=f"{Path(colcon).parent}:{os.environ['PATH']}", COLCON_HOME=str(tmp_path))
    done = subprocess.run(
        [colcon, "build"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    installed = tmp_path / "install/vla_rl_ros2"
    assert (installed / "lib/vla_rl_ros2/policy_node").exists()
    for robot in ROBOTS:
        assert (installed / f"share/vla_rl_ros2/launch/{robot}.launch.py").exists()
        assert (installed / f"share/vla_rl_ros2/config/{robot}.yaml").exists()
    assert (installed / "share/ament_index/resource_index/packages/vla_rl_ros2").exists()
