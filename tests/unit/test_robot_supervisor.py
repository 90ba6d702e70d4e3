"""The supervisor with real processes: what is killed, and what the arm saw. The arm writes to a file that outlives all
of them; CLOCK_MONOTONIC is the same in every process. Bounds are loose (1 s) because the machine may be busy."""

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import struct
import threading
import time

import numpy as np
import pytest

from tests.unit.sim_arm import RATE_HZ, SPEC, Reaching, SimArm, SimCamera, read_record
from vla_rl.real_robot.control_loop import ControlLoop, LoopParts
from vla_rl.real_robot.inference import Inference
from vla_rl.real_robot.interfaces import ArmState, Command, HardwareError
from vla_rl.real_robot.loop_config import LoopConfig
from vla_rl.real_robot.modes import Event, Mode, ModeError
from vla_rl.real_robot.safety import SafetyConfig
from vla_rl.real_robot.supervisor import Guard, SupervisorClient, SupervisorConfig
from vla_rl.serving.broker import BrokerConfig

SAFETY = SafetyConfig(speed_scale=1.0, max_state_age_s=0.5, max_clamped_fraction=1.0)
CONFIG = SupervisorConfig(safety=SAFETY, timeout_s=0.25, linger_s=20.0)
BOUND_S = 1.0


def loop_process(record, supervisor_pid):
    """A control loop that starts its own supervisor and runs for long."""
    client = SupervisorClient.start(functools.partial(SimArm, record), CONFIG)
    supervisor_pid.value = client.process.pid
    parts = LoopParts(client, [SimCamera()], Inference(Reaching()))
    loop = ControlLoop(parts, LoopConfig("go", BrokerConfig(RATE_HZ), max_picture_age_s=0.5))
    loop.start()
    loop.run(60.0)


@pytest.fixture
def running(tmp_path):
    """(process of a loop that moves the arm, pid of its supervisor, the arm's record)."""
    record = tmp_path / "arm.jsonl"
    context = multiprocessing.get_context("spawn")
    pid = context.Value("i", 0)
    process = context.Process(target=loop_process, args=(str(record), pid))
    process.start()
    wait_for(lambda: len(sends(record)) > 20, 60)
    yield process, pid.value, record
    process.kill()
    process.join()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid.value, signal.SIGKILL)


def wait_for(condition, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def sends(record):
    return [e for e in read_record(record) if e["what"] == "send"]


def stops(record):
    return [e for e in read_record(record) if e["what"] == "stop"]


def test_killing_the_loop_stops_the_arm(running):
    process, _, record = running
    at = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: stops(record))
    assert stops(record)[0]["at"] - at < BOUND_S
    assert "connection" in stops(record)[0]["reason"]
    assert all(e["at"] <= stops(record)[0]["at"] for e in sends(record))


def test_a_loop_that_is_frozen_is_taken_for_dead_and_cannot_go_on(running):
    process, _, record = running
    at = time.monotonic()
    os.kill(process.pid, signal.SIGSTOP)
    try:
        wait_for(lambda: stops(record))
        assert CONFIG.timeout_s / 2 < stops(record)[0]["at"] - at < CONFIG.timeout_s + BOUND_S
        assert "silent" in stops(record)[0]["reason"]
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join(10)  # it finds itself stopped, and its run ends
    assert all(e["at"] <= stops(record)[0]["at"] for e in sends(record))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_supervisor_stops_the_arm_before_it_ends(running, number):
    _, pid, record = running
    at = time.monotonic()
    os.kill(pid, number)
    wait_for(lambda: any(e["what"] == "close" for e in read_record(record)))
    assert stops(record)[0]["at"] - at < BOUND_S
    assert number.name in stops(record)[0]["reason"]


def test_ctrl_c_to_the_loop_stops_the_arm(running):
    process, _, record = running
    at = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: stops(record))
    assert stops(record)[0]["at"] - at < BOUND_S


def test_nan_stops_latches_and_needs_a_reset_and_a_start(tmp_path):
    record = tmp_path / "arm.jsonl"
    with SupervisorClient.start(functools.partial(SimArm, str(record)), CONFIG) as arm:
        for name in ("joint_names", "gripper_range", "rate_hz"):
            assert getattr(arm.spec, name) == getattr(SPEC, name)
        np.testing.assert_array_equal(arm.spec.max_jerk, SPEC.max_jerk)
        state, mode, stop = arm.read()
        np.testing.assert_array_equal(state.position, SPEC.home)
        assert (mode, stop) == (Mode.IDLE, "")
        assert arm.apply(Command(SPEC.home, 0.0, 0)).command is None  # not armed
        arm.fire(Event.START)
        assert arm.apply(Command(SPEC.home, 0.03, 1)).command.gripper == 0.03
        applied = arm.apply(Command(np.array([np.nan, 0.0]), 0.0, 2))
        assert (applied.command, applied.mode) == (None, Mode.ESTOP)
        assert "not finite" in applied.stop_reason
        assert arm.apply(Command(SPEC.home, 0.0, 3)).mode is Mode.ESTOP
        with pytest.raises(ModeError, match="not finite"):
            arm.fire(Event.START)
        arm.fire(Event.RESET)
        arm.fire(Event.START)
        assert arm.apply(Command(SPEC.home, 0.0, 1)).mode is Mode.RUN
        arm.stop("a person pressed the button")
        assert arm.read()[2] == "a person pressed the button"
    assert len(sends(record)) == 2
    assert "not finite" in stops(record)[0]["reason"]
    assert read_record(record)[-1]["what"] == "close"


def test_a_wild_client_is_shut_out_and_the_arm_held(tmp_path):
    record = tmp_path / "arm.jsonl"
    with SupervisorClient.start(functools.partial(SimArm, str(record)), CONFIG) as arm:
        arm.fire(Event.START)
        arm._socket.sendall(struct.pack("!I", 5) + b"\xff\xff\xff\xff\xff")
        wait_for(lambda: stops(record))
        assert "broken" in stops(record)[0]["reason"]
        with pytest.raises(HardwareError, match=r"supervisor (has ended|does not answer)"):
            arm.read()
        again = SupervisorClient(arm.path)  # the process lives, and holds
        assert again.read()[1] is Mode.ESTOP
        again.fire(Event.RESET)
        again._socket.close()


def test_an_arm_that_does_not_connect_is_said_so():
    with pytest.raises(HardwareError, match="no such port"):
        SupervisorClient.start(broken_arm, CONFIG)
    with pytest.raises(HardwareError, match="no supervisor answers"):
        SupervisorClient("/nowhere/socket")


def broken_arm():
    raise HardwareError("no such port /dev/arm")


def test_the_socket_is_the_owners_alone(tmp_path):
    with SupervisorClient.start(functools.partial(SimArm, ""), CONFIG) as arm:
        assert os.stat(arm.path).st_mode & 0o077 == 0
        with socket.socket(socket.AF_UNIX) as second:  # served after the first, never beside it
            second.connect(arm.path)
            second.settimeout(0.2)
            with pytest.raises(TimeoutError):
                second.recv(1)


# ------------------------------------------------------------------------------------------------------------ the guard
class SlowArm(SimArm):
    """Its bus takes a while."""

    def send(self, command):
        time.sleep(0.2)
        return super().send(command)


def test_a_stop_does_not_wait_for_the_bus_and_is_the_last_word():
    arm = SlowArm()
    arm.connect()
    guard = Guard(arm, SAFETY)
    guard.fire(Event.START)
    thread = threading.Thread(target=guard.apply, args=(Command(SPEC.home, 0.0, 1),))
    thread.start()
    time.sleep(0.05)
    guard.stop("now")
    thread.join()
    assert [e["what"] for e in arm.events] == ["stop", "send", "stop"]
    assert guard.apply(Command(SPEC.home, 0.0, 2)).command is None


def test_hardware_that_fails_or_reports_a_fault_is_stopped():
    class Failing(SimArm):
        def send(self, command):
            raise HardwareError("the cable is out")

    arm = Failing()
    arm.connect()
    guard = Guard(arm, SAFETY)
    guard.fire(Event.START)
    assert guard.apply(Command(SPEC.home, 0.0, 1)).stop_reason == "the cable is out"
    assert arm.stops()
    faulty = SimArm()
    faulty.connect()
    guard = Guard(faulty, SAFETY)
    guard.fire(Event.START)
    faulty.fault = "collision"
    assert "collision" in guard.apply(Command(SPEC.home, 0.0, 1)).stop_reason
    assert isinstance(guard.read()[0], ArmState)


def test_between_commands_an_armed_arm_is_watched():
    arm = SimArm()
    arm.connect()
    guard = Guard(arm, SAFETY)
    arm.frozen_at = time.monotonic() - 1.0
    guard.check()
    assert arm.stops() == []  # not armed: it does not move
    arm.frozen_at = None
    guard.fire(Event.START)
    guard.check()
    assert arm.stops() == []
    arm.frozen_at = time.monotonic() - 1.0
    guard.check()
    assert "s old" in arm.stops()[0]
    assert guard.modes.mode is Mode.ESTOP


def test_a_measurement_that_grows_old_stops_the_arm_without_a_command(tmp_path):
    record = tmp_path / "arm.jsonl"
    patient = SupervisorConfig(safety=SAFETY, timeout_s=20.0)
    with SupervisorClient.start(functools.partial(StaleArm, str(record)), patient) as arm:
        arm.fire(Event.START)
        wait_for(lambda: stops(record))
        assert "s old" in stops(record)[0]["reason"]
        assert arm.read()[1] is Mode.ESTOP


class StaleArm(SimArm):
    """Was measured once."""

    def connect(self):
        super().connect()
        self.frozen_at = time.monotonic() + 0.5
