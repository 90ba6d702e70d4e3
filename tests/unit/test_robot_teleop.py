"""Teleoperation devices and taking over: engaging, anchors, silence, the devices' own numbers."""

from __future__ import annotations

import os
import pty
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_rl.core import Source
from vla_rl.data.lerobot_format import DatasetError, DatasetSpec
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.data.lerobot_writer import LeRobotWriter
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.data.replay_writer import add_lerobot
from vla_rl.real_robot.control_loop import Tick
from vla_rl.real_robot.episodes import EpisodeRecorder
from vla_rl.real_robot.interfaces import ArmSpec, ArmState, Command, HardwareError, Picture, Teleop, TeleopSample
from vla_rl.real_robot.modes import Mode
from vla_rl.real_robot.takeover import Control, Engagement, EngagementConfig, Takeover, TakeoverConfig
from vla_rl.real_robot.teleop import Axes, AxesTeleop, Gamepad, Keyboard, LeaderArm, SpaceMouse, TeleopConfig

ONE = np.ones(2)
SPEC = ArmSpec("arm", ("a", "b"), -2 * ONE, 2 * ONE, ONE, ONE, ONE, (0.0, 0.08), 20.0, 0 * ONE)


# ------------------------------------------------------------------------------------------------------------- engaging
def test_hysteresis_of_deflection():
    """On above 0.05; off after 0.3 s below 0.02; in between it stays as it is."""
    engagement = Engagement(EngagementConfig())
    script = [
        (0.0, 0.04, False), (0.1, 0.051, True), (0.2, 0.03, True), (5.0, 0.021, True), (5.1, 0.019, True),
        (5.2, 0.0, True), (5.29, 0.0, True), (5.31, 0.0, False), (5.4, 0.03, False), (5.5, 0.2, True),
    ]  # fmt: skip
    for now, deflection, expected in script:
        assert engagement.update(deflection, now) == expected, now
    assert not Engagement(EngagementConfig()).update(float("nan"), 0.0)
    with pytest.raises(ValueError, match="release_below < engage_above"):
        EngagementConfig(0.02, 0.05)


def test_deadman_decides_alone():
    engagement = Engagement(EngagementConfig())
    assert not engagement.update(1.0, 0.0, deadman=False)
    assert engagement.update(0.0, 0.1, deadman=True)
    assert not engagement.update(1.0, 0.2, deadman=False)  # let go: at once, not after 0.3 s


# ------------------------------------------------------------------------------------------------------------- takeover
def sample(now: float, *, engaged: bool = True, delta: Any = None, joints: Any = None, gripper: float = 0.08):
    delta = np.zeros(6) if delta is None else np.asarray(delta, float)
    return TeleopSample(delta, gripper, engaged, {}, now, None if joints is None else np.asarray(joints, float))


def solve(position: np.ndarray, delta: np.ndarray) -> np.ndarray:
    return position + delta[:2]


def test_no_jump_in_either_direction_with_a_leader_arm():
    takeover = Takeover(SPEC, TakeoverConfig())
    last = Command(np.array([0.5, -0.5]), 0.03, 4)
    measured = np.array([0.48, -0.47])  # it lags behind its target, as arms under load do
    leader = np.array([1.9, 0.7])  # anywhere else
    first = takeover.update(sample(1.0, joints=leader), last, measured, 1.0)
    assert (first.control, first.changed) == (Control.HUMAN, True)
    np.testing.assert_array_equal(first.command.position, last.position)
    assert first.command.gripper == 0.03  # the device's 0.08 does not open the hand
    second = takeover.update(sample(1.05, joints=leader + np.array([0.02, 0])), last, measured, 1.05)
    np.testing.assert_allclose(second.command.position, [0.52, -0.5])
    assert not second.changed
    released = takeover.update(sample(1.1, engaged=False, joints=leader), second.command, measured, 1.1)
    assert (released.control, released.command, released.changed) == (Control.POLICY, None, True)
    again = takeover.update(sample(1.2, joints=leader - 0.3), second.command, measured, 1.2)
    np.testing.assert_array_equal(again.command.position, second.command.position)  # anchored anew


def test_deltas_move_once_a_sample_and_do_not_wind_up_at_an_obstacle():
    takeover = Takeover(SPEC, TakeoverConfig(max_lead=0.1), solve)
    last, stuck = Command(np.zeros(2), 0.08), np.zeros(2)
    takeover.update(sample(0.0), last, stuck, 0.0)
    push = [0.04, 0, 0, 0, 0, 0]
    target = takeover.update(sample(0.05, delta=push), last, stuck, 0.05).command
    np.testing.assert_allclose(target.position, [0.04, 0])
    same = takeover.update(sample(0.05, delta=push), target, stuck, 0.06).command  # the device has nothing newer
    np.testing.assert_allclose(same.position, [0.04, 0])
    for k in range(20):
        target = takeover.update(sample(0.1 + 0.05 * k, delta=push), target, stuck, 0.1 + 0.05 * k).command
    np.testing.assert_allclose(target.position, [0.1, 0])
    back = takeover.update(sample(2.0, delta=[-0.04, 0, 0, 0, 0, 0]), target, stuck, 2.0).command
    np.testing.assert_allclose(back.position, [0.06, 0])  # and it comes back at once


def test_gripper_follows_once_the_person_has_moved_it():
    takeover = Takeover(SPEC, TakeoverConfig(), solve)
    last = Command(np.zeros(2), 0.02)
    takeover.update(sample(0.0, gripper=0.08), last, np.zeros(2), 0.0)
    assert takeover.update(sample(0.1, gripper=0.08), last, np.zeros(2), 0.1).command.gripper == 0.02
    assert takeover.update(sample(0.2, gripper=0.0), last, np.zeros(2), 0.2).command.gripper == 0.0
    assert takeover.update(sample(0.3, gripper=0.08), last, np.zeros(2), 0.3).command.gripper == 0.08


@pytest.mark.parametrize("silence", ["gone", "old", "nan"])
def test_silence_of_the_device_holds_until_the_person_lets_go(silence: str):
    takeover = Takeover(SPEC, TakeoverConfig(silent_s=0.2), solve)
    last = Command(np.zeros(2), 0.08)
    takeover.update(sample(0.0), last, np.zeros(2), 0.0)
    lost = {"gone": None, "old": sample(0.0), "nan": sample(0.5, delta=np.full(6, np.nan))}[silence]
    held = takeover.update(lost, last, np.zeros(2), 0.5)
    assert (held.control, held.command, held.changed) == (Control.HOLD, None, True)
    assert "silent" in held.reason
    back = takeover.update(sample(1.0), last, np.zeros(2), 1.0)  # with the deadman held: not his decision yet
    assert (back.control, back.changed) == (Control.HOLD, False)
    assert takeover.update(sample(1.1, engaged=False), last, np.zeros(2), 1.1).control == Control.POLICY
    assert takeover.update(sample(1.2), last, np.zeros(2), 1.2).control == Control.HUMAN
    idle = Takeover(SPEC, TakeoverConfig(), solve)  # without a takeover a dead device is nobody's business
    assert idle.update(None, last, np.zeros(2), 0.5).control == Control.POLICY


def test_tool_deltas_need_inverse_kinematics():
    takeover = Takeover(SPEC, TakeoverConfig())
    takeover.update(sample(0.0), Command(np.zeros(2), 0.08), np.zeros(2), 0.0)
    with pytest.raises(ValueError, match="inverse kinematics"):
        takeover.update(sample(0.1, delta=np.ones(6)), Command(np.zeros(2), 0.08), np.zeros(2), 0.1)


NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=32)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.lists(NUMBERS, min_size=6, max_size=6), NUMBERS), min_size=1, max_size=20))
def test_commands_are_finite_and_near_the_arm_whatever_the_device_says(stream: list[Any]):
    takeover = Takeover(SPEC, TakeoverConfig(max_lead=0.1), solve)
    last, measured = Command(np.zeros(2), 0.08), np.zeros(2)
    for k, (engaged, delta, gripper) in enumerate(stream):
        now = 0.05 * k
        target = takeover.update(sample(now, engaged=engaged, delta=delta, gripper=gripper), last, measured, now)
        if target.command is not None:
            assert np.isfinite(target.command.position).all()
            assert np.abs(target.command.position - measured).max() <= 0.1 + 1e-9
            last = target.command


# -------------------------------------------------------------------------------------------------------------- devices
class Device:
    def __init__(self) -> None:
        self.axes, self.buttons = np.zeros(6), {"gripper": False, "deadman": False}

    def open(self) -> None: ...

    def read(self) -> Axes:
        return Axes(self.axes, self.buttons)

    def close(self) -> None: ...


def test_axes_become_metres_and_radians_of_the_time_that_passed():
    device, now = Device(), [0.0]
    teleop = AxesTeleop(device, TeleopConfig(max_speed=0.2, max_turn=1.0), clock=lambda: now[0])
    assert isinstance(teleop, Teleop)
    teleop.connect()
    device.axes = np.array([0.5, 0, 0, 0, 0, -2.0])  # clipped to -1
    now[0] = 0.05
    first = teleop.read()
    assert first.engaged
    np.testing.assert_allclose(first.delta, [0.005, 0, 0, 0, 0, -0.05])
    now[0] = 3.0  # the loop was away: that is not 3 s of motion
    np.testing.assert_allclose(teleop.read().delta[0], 0.2 * 0.5 * 0.1)
    device.axes = np.full(6, 0.01)  # drift of a device at rest
    now[0] = 3.05
    np.testing.assert_array_equal(teleop.read().delta, np.zeros(6))


def test_gripper_button_toggles_and_deadman_is_asked():
    device, now = Device(), [0.0]
    teleop = AxesTeleop(device, TeleopConfig(deadman="deadman"), clock=lambda: now[0])
    device.axes = np.ones(6)
    now[0] = 0.05
    assert not teleop.read().engaged
    assert not teleop.read().delta.any()
    device.buttons["deadman"] = True
    assert teleop.read().engaged
    widths = []
    for pressed in (True, True, False, True):
        device.buttons["gripper"] = pressed
        widths.append(teleop.read().gripper)
    assert widths == [0.0, 0.0, 0.0, 0.08]
    with pytest.raises(ValueError, match="no button 'pedal'; it has"):
        AxesTeleop(device, TeleopConfig(deadman="pedal")).read()


def test_spacemouse_reads_all_that_waits(monkeypatch: pytest.MonkeyPatch):
    """pyspacemouse 2 reads one report a call; left unread, they are what the hand did a second ago."""

    class Mouse:
        def __init__(self) -> None:
            self.waiting, self.state = (
                [],
                SimpleNamespace(t=-1.0, x=0.0, y=0.0, z=0.0, roll=0.0, pitch=0.0, yaw=0.0, buttons=[0, 0]),
            )

        def read(self) -> SimpleNamespace:
            if self.waiting:
                self.state.t, self.state.x = self.waiting.pop(0)
            return self.state

        def close(self) -> None:
            self.waiting = []

    mouse = Mouse()
    library = ModuleType("pyspacemouse")
    library.AxisConvention = SimpleNamespace(ROS="ros")
    library.open = lambda axis_convention: mouse if axis_convention == "ros" else None
    monkeypatch.setitem(sys.modules, "pyspacemouse", library)
    device = SpaceMouse()
    with pytest.raises(HardwareError, match="not open"):
        device.read()
    device.open()
    mouse.waiting = [(0.01 * k, 0.1 * k) for k in range(1, 10)]
    mouse.state.buttons = [1, 0]
    values, buttons = device.read()
    assert values[0] == pytest.approx(0.9)
    assert buttons == {"gripper": True, "success": False}
    monkeypatch.setitem(sys.modules, "pyspacemouse", None)
    with pytest.raises(HardwareError, match="pip install pyspacemouse"):
        SpaceMouse().open()


def test_gamepad_axes_point_where_the_tool_goes(monkeypatch: pytest.MonkeyPatch):
    axes, pressed, count = [0.0, -1.0, -1.0, 0.5, 0.0, 0.0], {5: 1}, [1]

    class Pad:
        init = staticmethod(lambda: None)
        quit = staticmethod(lambda: None)
        get_init = staticmethod(lambda: True)
        get_axis = staticmethod(lambda i: axes[i])
        get_button = staticmethod(lambda i: pressed.get(i, 0))

    library = ModuleType("pygame")
    library.init = lambda: None
    library.event = SimpleNamespace(pump=lambda: None)
    library.joystick = SimpleNamespace(get_count=lambda: count[0], Joystick=lambda index: Pad)
    monkeypatch.setitem(sys.modules, "pygame", library)
    pad = Gamepad()
    pad.open()
    values, buttons = pad.read()
    np.testing.assert_allclose(values, [1.0, 0, 0.5, 0, 0, -0.5])  # stick pushed: forward; right trigger half: up
    assert buttons == {"gripper": False, "success": False, "deadman": True}
    count[0] = 0
    with pytest.raises(HardwareError, match="gone"):
        pad.read()


def test_keyboard_of_a_real_terminal():
    controller, terminal = pty.openpty()
    now = [0.0]
    with os.fdopen(terminal, "r") as stream:
        keyboard = Keyboard(0.6, stream, clock=lambda: now[0])
        keyboard.open()
        try:
            assert not keyboard.read().values.any()
            os.write(controller, b"wwa ")
            for _ in range(100):
                values, buttons = keyboard.read()
                if values.any():
                    break
            assert values.tolist() == [1, 1, 0, 0, 0, 0]
            assert buttons["gripper"]
            now[0] = 0.5
            held = keyboard.read()
            assert held.values[0] == 1
            assert not held.buttons["gripper"]  # pressed once
            now[0] = 0.7
            assert not keyboard.read().values.any()
        finally:
            keyboard.close()
            os.close(controller)
    with open(os.devnull) as nothing, pytest.raises(HardwareError, match="needs a terminal"):
        Keyboard(stream=nothing).open()


def test_leader_arm_maps_its_joints_and_its_hand():
    class Leader:
        spec = SPEC
        fault = ""

        def connect(self) -> None: ...

        def read(self) -> ArmState:
            return ArmState(np.array([0.5, -0.5]), np.zeros(2), 0.02, 7.0, self.fault)

        def close(self) -> None: ...

    leader, switch = Leader(), [False]
    teleop = LeaderArm(leader, lambda: switch[0], (0.0, 0.1), signs=np.array([1, -1]), offsets=np.array([0, 0.1]))
    assert isinstance(teleop, Teleop)
    read = teleop.read()
    np.testing.assert_allclose(read.joints, [0.5, 0.6])
    assert (read.gripper, read.engaged, read.stamp) == (pytest.approx(0.025), False, 7.0)
    leader.fault = "overheated"
    with pytest.raises(HardwareError, match="overheated"):
        teleop.read()


# ------------------------------------------------------------------------------------------------------------- episodes
def tick(k: int, source: Control, *, applied: bool = True) -> Tick:
    state = ArmState(np.array([0.1 * k, 0.0]), np.zeros(2), 0.04, float(k))
    picture = {"front": Picture(np.full((2, 2, 3), k, np.uint8), float(k), k)}
    sent = Command(np.array([0.1 * k + 0.05, 0.0]), 0.04, k) if applied else None
    proposal = None if k == 2 else np.array([9.0, 0.5, 0.08], np.float32)
    return Tick(float(k), Mode.RUN, source, state, picture, proposal, sent, sent, (), None, None, "", 0.0)


def test_episodes_keep_whose_action_it_was_and_what_was_proposed(tmp_path: Path):
    path = tmp_path / "episodes"
    sources = [Control.POLICY, Control.HUMAN, Control.HUMAN, Control.HOLD]
    for success in (True, False):  # the second time the dataset is opened again
        recorder = EpisodeRecorder.open(path, SPEC, {"front": (2, 2, 3)})
        with pytest.raises(ValueError, match="instruction"):
            recorder.start("")
        recorder.add(tick(9, Control.POLICY))  # nobody records yet
        recorder.start("open the drawer")
        for k, source in enumerate(sources):
            recorder.add(tick(k, source))
        recorder.add(tick(9, Control.POLICY, applied=False))
        recorder.end(success=success)
        with pytest.raises(ValueError, match="no frame"):
            recorder.end(success=True)
        recorder.close()
    dataset = LeRobotDataset(path)
    first, second = dataset.episode(0), dataset.episode(1)
    assert first.source.tolist() == [Source.POLICY, Source.HUMAN, Source.HUMAN, Source.POLICY]
    np.testing.assert_allclose(first.action[:, 0], [0.05, 0.15, 0.25, 0.35], atol=1e-6)
    np.testing.assert_allclose(first.proposal[:, 0], [9.0, 9.0, 0.15, 9.0], atol=1e-6)  # none: what stood before
    np.testing.assert_allclose(first.state[:, 0], [0.0, 0.1, 0.2, 0.3], atol=1e-6)
    assert first.images["front"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert (first.reward.tolist(), first.truncated[-1].item()) == ([0, 0, 0, 1], False)
    assert (second.success.any().item(), second.truncated[-1].item()) == (False, True)

    buffer = ReplayBuffer(ReplayConfig(capacity=50, gamma=0.9), state_dim=3, action_dim=3)
    assert add_lerobot(buffer, dataset) == 7  # a truncated episode loses its last step
    assert buffer.rows.source[:4].tolist() == first.source.tolist()
    np.testing.assert_allclose(buffer.rows.proposals[:4], first.proposal)


def test_labels_belong_to_labelled_datasets(tmp_path: Path):
    import torch

    spec = DatasetSpec(10.0, ("a",), ("a",), {}, "arm")
    episode: dict[str, Any] = {
        "state": torch.zeros(3, 1), "action": torch.zeros(3, 1), "images": {}, "reward": torch.zeros(3),
        "success": torch.zeros(3, dtype=torch.bool), "instruction": "go",
    }  # fmt: skip
    with LeRobotWriter.open(tmp_path / "plain", spec) as writer:
        with pytest.raises(ValueError, match="labelled=True"):
            writer.add_episode(**episode, source=torch.zeros(3, dtype=torch.int64))
        writer.add_episode(**episode)
    assert LeRobotDataset(tmp_path / "plain").episode(0).source is None
    labelled = DatasetSpec(10.0, ("a",), ("a",), {}, "arm", labelled=True)
    with pytest.raises(DatasetError, match="other features"):
        LeRobotWriter.open(tmp_path / "plain", labelled)
    with LeRobotWriter.open(tmp_path / "labelled", labelled) as writer:
        with pytest.raises(ValueError, match="give proposal"):
            writer.add_episode(**episode)
        with pytest.raises(ValueError, match="finite proposal"):
            writer.add_episode(**episode, proposal=torch.full((3, 1), torch.nan), source=torch.zeros(3))
