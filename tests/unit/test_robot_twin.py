"""The digital twin as its users meet it: a process behind topics, asked through the drivers, judged by what it wrote
down."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv
from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict
from vla_rl.real_robot.dds import SENSOR, DDSNode, NodeConfig
from vla_rl.real_robot.drivers.dds_arm import DDSArm, DDSArmConfig, DDSCamera, DDSCameraConfig, twin_arm_spec
from vla_rl.real_robot.drivers.twin_episodes import TwinEpisodes
from vla_rl.real_robot.interfaces import Arm, Camera, Command, HardwareError
from vla_rl.real_robot.ros_messages import message_types
from vla_rl.real_robot.twin import TwinConfig
from vla_rl.real_robot.twin_controller import TrajectoryController
from vla_rl.real_robot.twin_faults import Faults, FaultyWire, read_record
from vla_rl.sim.experts import ScriptedExpert

DOMAIN = 1 + 5 * os.getpid() % 90  # and up to four more: processes that test side by side do not meet
NODE = NodeConfig("tester", DOMAIN)
TRAJECTORY = "/arm/joint_trajectory"


# ------------------------------------------------------------------------------------------------------- trajectories
def trajectory(*points, names=("a", "b")):
    """`points`: (seconds, positions) or (seconds, positions, velocities)."""
    fields = [
        {
            "positions": point[1],
            "velocities": point[2] if len(point) > 2 else [],
            "time_from_start": {"sec": int(point[0]), "nanosec": round(point[0] % 1 * 1e9)},
        }
        for point in points
    ]
    return message_types().message(
        "trajectory_msgs/msg/JointTrajectory", {"joint_names": list(names), "points": fields}
    )


def controller(**options):
    return TrajectoryController(("a", "b"), np.array([0.0, 1.0]), **options)


MEASURED = np.array([0.05, 0.95])


def test_a_new_trajectory_begins_at_the_setpoint_not_at_the_measurement():
    c = controller()
    assert c.accept(trajectory((1.0, [1.0, 1.0]), (2.0, [1.0, 3.0])), 10.0, MEASURED) == ""
    assert c.sample(10.5, MEASURED).tolist() == [0.5, 1.0]
    assert c.sample(11.5, MEASURED).tolist() == [1.0, 2.0]
    assert c.status == "moving"
    assert c.accept(trajectory((1.0, [0.0, 0.0])), 11.5, MEASURED) == ""
    assert c.sample(11.75, MEASURED).tolist() == [0.75, 1.5]
    assert c.sample(12.5, MEASURED).tolist() == [0.0, 0.0]
    assert c.status == "arrived"
    assert c.sample(99.0, MEASURED).tolist() == [0.0, 0.0]  # no time-out by default, as in ros2_control


def test_points_with_velocities_are_joined_by_cubics():
    c = controller()
    assert c.accept(trajectory((1.0, [2.0, 1.0], [4.0, 0.0]), (2.0, [4.0, 1.0], [0.0, 0.0])), 0.0, MEASURED) == ""
    # From rest at 0 to 2 at slope 4 within a second: 2 x^2 + 0 x^3; then 4 x - 2 x^2 on top.
    assert c.sample(0.5, MEASURED) == pytest.approx([0.5, 1.0])
    assert c.velocity == pytest.approx([2.0, 0.0])
    assert c.sample(1.5, MEASURED) == pytest.approx([2.0 + 2.0 - 0.5, 1.0])
    assert c.velocity == pytest.approx([2.0, 0.0])


def test_an_empty_trajectory_and_the_timeout_hold_at_the_measurement():
    c = controller(cmd_timeout_s=0.2)
    c.accept(trajectory((1.0, [1.0, 1.0])), 0.0, MEASURED)
    c.sample(0.5, MEASURED)
    assert c.accept(trajectory(), 0.5, MEASURED) == ""
    assert (c.sample(0.6, np.zeros(2)).tolist(), c.status) == (MEASURED.tolist(), "stopped")
    c.accept(trajectory((1.0, [1.0, 1.0])), 1.0, MEASURED)
    assert (c.sample(2.19, MEASURED).tolist(), c.status) == ([1.0, 1.0], "arrived")  # counts from the last point
    assert (c.sample(2.21, MEASURED).tolist(), c.status) == (MEASURED.tolist(), "timed out")


def test_points_in_the_past_are_skipped_and_a_trajectory_of_the_past_is_refused():
    c = controller()
    late = trajectory((1.0, [1.0, 1.0]), (2.0, [2.0, 1.0]))
    assert c.accept(late, 10.0, MEASURED, start_in_s=-1.5) == ""
    assert c.sample(10.25, MEASURED) == pytest.approx([1.75, 1.0])
    assert c.accept(late, 10.25, MEASURED, start_in_s=-2.25) == "it ended 0.250 s ago"
    assert c.sample(10.3, MEASURED) == pytest.approx([1.8, 1.0])
    assert c.accept(late, 20.0, MEASURED, start_in_s=1.0) == ""  # and one that begins later goes there until then
    assert c.sample(21.0, MEASURED) == pytest.approx([1.4, 1.0])


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (trajectory((1.0, [np.nan, 0.0])), "positions are not 2 finite numbers"),
        (trajectory((1.0, [0.0, 0.0], [np.inf, 0.0])), "velocities are not 2 finite numbers"),
        (trajectory((1.0, [0.0])), "positions are not 2 finite numbers"),
        (trajectory((1.0, [0.0, 0.0]), names=("a", "c")), r"joints \['a', 'c'\], expected \['a', 'b'\]"),
        (trajectory((1.0, [0.0, 0.0]), (1.0, [1.0, 1.0])), "times of points do not rise"),
    ],
)
def test_what_is_wrong_is_refused_and_changes_nothing(message, why):
    c = controller()
    c.accept(trajectory((1.0, [2.0, 1.0])), 0.0, MEASURED)
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(c.accept(message, 0.5, MEASURED))
    assert c.sample(0.75, MEASURED).tolist() == [1.5, 1.0]


def test_joints_may_come_in_another_order():
    c = controller()
    c.accept(trajectory((1.0, [3.0, 4.0]), names=("b", "a")), 0.0, MEASURED)
    assert c.sample(1.0, MEASURED).tolist() == [4.0, 3.0]


# --------------------------------------------------------------------------------------------------------------- faults
def test_faults_are_json_of_known_fields():
    faults = Faults(drop={"/x": 0.5}, freeze=("agent",), clock_step_s=-2.0)
    assert Faults.from_json(faults.to_json()) == faults
    assert Faults.from_json("{}") == Faults()
    for text in ('{"frezze": []}', "[]"):
        with pytest.raises(ValueError, match="faults are a JSON object with some of drop, delay_s, freeze"):
            Faults.from_json(text)


def test_the_wire_loses_its_share_and_delays_in_order():
    wire, got = FaultyWire(), []
    wire.faults = Faults(drop={"/lossy": 0.25}, delay_s={"/late": 0.05})
    for i in range(2000):
        wire.pass_on("/lossy", lambda i=i: got.append(i))
    wire.deliver()
    assert got == sorted(got)
    assert len(got) == pytest.approx(1500, abs=80)  # four standard deviations
    wire.pass_on("/late", lambda: got.append("late"))
    wire.pass_on("/now", lambda: got.append("now"))
    wire.deliver()
    assert got[-1] == "now"
    time.sleep(0.06)
    wire.deliver()
    assert got[-1] == "late"


# --------------------------------------------------------------------------------------------------------- the process
def start_twin(domain, record, *options):
    command = [sys.executable, "-m", "vla_rl.real_robot.twin", "--node.domain", str(domain), "--record", str(record)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert "is up in domain" in process.stdout.readline()
    return process


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The running twin with an arm, a camera and the episodes of it."""
    record = tmp_path_factory.mktemp("twin") / "record.jsonl"
    process = start_twin(DOMAIN, record)
    arm = DDSArm(twin_arm_spec(), DDSArmConfig(node=NODE))
    camera = DDSCamera(DDSCameraConfig("agent", "/camera/agent/image_raw", NODE))
    arm.connect()
    camera.connect()
    episodes = TwinEpisodes(NODE)
    assert isinstance(arm, Arm)
    assert isinstance(camera, Camera)
    yield SimpleNamespace(arm=arm, camera=camera, episodes=episodes, record=record)
    for end in (arm, camera, episodes):
        end.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 0
    process.stdout.close()


@pytest.fixture(autouse=True)
def healthy(request):
    if "twin" in request.fixturenames:
        twin = request.getfixturevalue("twin")
        twin.episodes.inject(Faults())
        twin.episodes.reset(0)


def wait_for(condition, timeout_s=3.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def events_since(twin, since, event=""):
    return [e for e in read_record(twin.record, event) if e["stamp"] >= since]


def statuses(twin, since):
    return [e["status"] for e in events_since(twin, since, "status")]


def stream(arm, positions, width, period_s=0.05):
    for position in positions:
        arm.send(Command(position, width))
        time.sleep(period_s)


def test_joints_move_and_arrive_and_the_twin_wrote_down_what_it_was_told(twin):
    start, since = twin.arm.read().position, time.monotonic()
    path = start + np.linspace(0, 0.2, 11)[1:, None] * np.array([1, 0, 0, -1, 0, 0, 1])
    stream(twin.arm, path, 0.08)
    wait_for(lambda: np.abs(twin.arm.read().position - path[-1]).max() < 1e-3)
    told = [e for e in events_since(twin, since, "received") if e["topic"] == TRAJECTORY]
    assert np.array_equal([e["positions"][0] for e in told], path)
    assert {tuple(e["times"]) for e in told} == {(0.05,)}
    assert np.diff([e["stamp"] for e in told]).min() > 0.02
    wait_for(lambda: statuses(twin, since)[-1:] == ["timed out"])  # nothing follows: it holds
    assert np.abs(twin.arm.read().position - path[-1]).max() < 2e-3


def test_the_gripper_closes_opens_and_is_not_told_with_every_command(twin):
    position, since = twin.arm.read().position, time.monotonic()
    stream(twin.arm, [position] * 8, 0.01)
    wait_for(lambda: abs(twin.arm.read().gripper - 0.01) < 1e-3)
    stream(twin.arm, [position] * 8, 0.07)
    wait_for(lambda: abs(twin.arm.read().gripper - 0.07) < 1e-3)
    told = [e["data"] for e in events_since(twin, since, "received") if e["topic"] == "/gripper/commands"]
    assert 2 <= len(told) < 8  # of 16 commands; a second has passed, so some may be repeated
    assert told == sorted(told)
    assert {told[0][0], told[-1][0]} == {0.01, 0.07}


def test_a_stop_holds_in_the_middle_of_a_motion(twin):
    slow = DDSArm(twin_arm_spec(rate_hz=1.0), DDSArmConfig(node=NODE))  # a command takes a second
    slow.connect()
    start, since = slow.read().position, time.monotonic()
    slow.send(Command(start + np.array([0.5, 0, 0, 0, 0, 0, 0]), 0.08))
    time.sleep(0.4)
    slow.stop("a test")
    wait_for(lambda: "stopped" in statuses(twin, since))
    [stopped] = [e for e in events_since(twin, since, "status") if e["status"] == "stopped"]
    [told] = [e for e in events_since(twin, since, "received") if e.get("positions") == []]
    assert told["frame_id"] == "a test"
    assert stopped["stamp"] - told["stamp"] < 0.15
    time.sleep(0.3)
    moved = slow.read().position[0] - start[0]
    assert 0.1 < moved < 0.35
    assert abs(slow.read().position[0] - stopped["position"][0]) < 0.02  # the servo's way to stand from 0.5 rad/s
    assert np.abs(slow.read().velocity).max() < 1e-3
    slow.close()


DRIVER = """
import sys, time
import numpy as np
from vla_rl.real_robot.dds import NodeConfig
from vla_rl.real_robot.drivers.dds_arm import DDSArm, DDSArmConfig, twin_arm_spec
from vla_rl.real_robot.interfaces import Command
arm = DDSArm(twin_arm_spec(), DDSArmConfig(node=NodeConfig("victim", int(sys.argv[1]))))
arm.connect()
position = arm.read().position.copy()
print("ready", flush=True)
while True:
    position[0] += 0.02
    arm.send(Command(position, 0.08))
    time.sleep(0.05)
"""


def test_when_the_driver_is_killed_the_twin_holds(twin):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(DOMAIN)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "ready\n"
    time.sleep(0.5)
    assert twin.arm.read().velocity[0] > 0.1
    driver.kill()
    killed = time.monotonic()
    driver.wait()
    driver.stdout.close()
    wait_for(lambda: statuses(twin, killed)[-1:] == ["timed out"])
    [arrived] = [e["stamp"] for e in events_since(twin, killed, "status") if e["status"] == "arrived"]
    assert arrived - killed < 0.25  # a control period, a tick, and this machine's other work
    assert not [e for e in events_since(twin, killed + 0.05, "received") if e["topic"] == TRAJECTORY]
    held = twin.arm.read().position
    time.sleep(0.3)
    assert np.abs(twin.arm.read().position - held).max() < 1e-4


def test_the_picture_of_a_frozen_camera_grows_old_though_it_comes_again_and_again(twin):
    twin.episodes.inject(Faults(freeze=("agent",)))
    with DDSNode.open(NODE) as node:
        received = node.subscription("/camera/agent/image_raw", "sensor_msgs/msg/Image", SENSOR)
        time.sleep(0.3)
        first, before = twin.camera.latest(), received.num_received
        wait_for(lambda: received.num_received > before + 2)
    again = twin.camera.latest()
    assert (again.stamp, again.source_stamp_ns) == (first.stamp, first.source_stamp_ns)
    twin.episodes.inject(Faults())
    wait_for(lambda: twin.camera.latest().source_stamp_ns > first.source_stamp_ns)


def test_dropped_joint_states_grow_old_and_come_back(twin):
    twin.episodes.inject(Faults(drop={"/joint_states": 1.0}))
    time.sleep(0.4)
    assert time.monotonic() - twin.arm.read().stamp > 0.3
    twin.episodes.inject(Faults())
    wait_for(lambda: time.monotonic() - twin.arm.read().stamp < 0.03)


def test_delayed_commands_act_late(twin):
    twin.episodes.inject(Faults(delay_s={TRAJECTORY: 0.3}))
    time.sleep(0.1)
    since = time.monotonic()
    twin.arm.send(Command(twin.arm.read().position + 0.02, 0.08))
    wait_for(lambda: "moving" in statuses(twin, since))
    [told] = [e["stamp"] for e in events_since(twin, since, "received") if e["topic"] == TRAJECTORY]
    moving = next(e["stamp"] for e in events_since(twin, since, "status") if e["status"] == "moving")
    assert 0.3 <= moving - told < 0.6


def test_a_clock_step_shows_in_the_stamps_alone(twin):
    twin.episodes.inject(Faults(clock_step_s=-5.0))
    wait_for(lambda: twin.camera.latest().source_stamp_ns < time.time_ns() - 4_500_000_000)
    assert time.monotonic() - twin.arm.read().stamp < 0.1


def test_a_fault_of_the_robot_is_read_and_holds(twin):
    twin.episodes.inject(Faults(fault="protective stop"))
    wait_for(lambda: twin.arm.read().fault == "protective stop")
    before, since = twin.arm.read().position, time.monotonic()
    twin.arm.send(Command(before + 0.1, 0.08))
    wait_for(lambda: events_since(twin, since, "refused"))
    assert events_since(twin, since, "refused")[0]["why"] == "the robot reports 'protective stop'"
    assert np.abs(twin.arm.read().position - before).max() < 1e-3
    twin.episodes.inject(Faults())
    wait_for(lambda: twin.arm.read().fault == "")


def test_what_is_no_number_is_refused(twin):
    since = time.monotonic()
    twin.arm.send(Command(np.full(7, np.nan), 0.08))
    wait_for(lambda: events_since(twin, since, "refused"))
    assert "not 7 finite numbers" in events_since(twin, since, "refused")[0]["why"]
    with pytest.raises(ValueError, match=r"a command has 7 joints, got \(3,\)"):
        twin.arm.send(Command(np.zeros(3), 0.08))


def tabletop(seed):
    env = TabletopEnv("reach", 1, TabletopConfig(cameras={"agent": 64}, num_threads=1))
    env.reset(torch.tensor([0]), torch.tensor([seed]))
    return env, env.observe(torch.tensor([0]), images=True)


def test_a_seed_is_the_tabletops_episode(twin):
    env, obs = tabletop(seed=11)
    state = twin.episodes.reset(11)
    assert (state.seed, state.instruction) == (11, obs.instruction[0])
    assert (state.success, state.max_steps) == (False, env.max_episode_steps)
    assert state.steps < 5
    time.sleep(0.1)
    ours = twin.episodes.tabletop_state(twin.arm.read())
    assert len(ours) == len(env.spec.state_names)
    assert np.abs(ours - obs.state[0].numpy()).max() < 1e-5  # a tenth of a second of standing
    assert np.abs(twin.camera.latest().image.astype(int) - obs.images["agent"][0].numpy()).max() <= 1
    env.close()


def test_the_tabletops_joint_targets_succeed_in_the_twin_too(twin):
    env, _ = tabletop(seed=3)
    expert, targets, success = ScriptedExpert(env), [], False
    while not success:
        success = bool(env.step(expert.act(), torch.tensor([True])).success[0])
        targets.append(env.engine.ctrl[0, :7].numpy().copy())
    env.close()
    assert len(targets) > 5
    twin.episodes.reset(3)
    stream(twin.arm, [*targets, targets[-1], targets[-1]], 0.08)
    wait_for(lambda: twin.episodes.state().success_once)


def test_an_arm_with_other_joints_or_another_domain_is_refused(twin):
    strange = DDSArm(twin_arm_spec(), DDSArmConfig(node=NODE, finger_joints=("thumb",), connect_timeout_s=0.5))
    with pytest.raises(HardwareError, match="/joint_states has no thumb; it has joint1, joint2"):
        strange.connect()
    strange.close()
    alone = DDSArm(twin_arm_spec(), DDSArmConfig(node=NodeConfig("alone", DOMAIN + 1), connect_timeout_s=0.2))
    with pytest.raises(HardwareError, match=rf"no joint states come on /joint_states in domain {DOMAIN + 1} on"):
        alone.connect()
    with pytest.raises(HardwareError, match=r"not connected; call connect\(\)"):
        alone.read()
    alone.stop("nothing to stop")
    camera = DDSCamera(DDSCameraConfig("wrist", "/camera/wrist/image_raw", NODE, connect_timeout_s=0.2))
    with pytest.raises(HardwareError, match="no pictures come on /camera/wrist/image_raw"):
        camera.connect()


def test_joint_states_come_at_a_hundred_hertz(twin):
    with DDSNode("counter", DOMAIN) as node:
        stamps = []
        node.subscription("/joint_states", "sensor_msgs/msg/JointState", SENSOR, lambda r: stamps.append(r.stamp))
        time.sleep(1.5)
    rate = (len(stamps) - 1) / (stamps[-1] - stamps[0])
    assert 80 < rate < 101


def test_the_twin_can_die_with_a_code(tmp_path):
    process = start_twin(
        DOMAIN + 2, tmp_path / "record.jsonl", "--cameras", "wrist", "--image-size", "32", "--task", "pick"
    )
    episodes = TwinEpisodes(NodeConfig("tester", DOMAIN + 2))
    assert episodes.state().task == "pick"
    camera = DDSCamera(DDSCameraConfig("wrist", "/camera/wrist/image_raw", NodeConfig("tester", DOMAIN + 2)))
    camera.connect()
    assert camera.latest().image.shape == (32, 32, 3)
    episodes.inject(Faults(exit_code=3))
    assert process.wait(timeout=5) == 3
    process.stdout.close()
    camera.close()
    episodes.close()


def test_configurations_are_json():
    for config in (
        TwinConfig(faults=Faults(drop={"/x": 0.5}, freeze=("agent",)), node=NODE),
        DDSArmConfig(node=NODE),
        DDSCameraConfig("agent", "/camera/agent/image_raw"),
    ):
        assert config_from_dict(type(config), json.loads(json.dumps(config_to_dict(config)))) == config
