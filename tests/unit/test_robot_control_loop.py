"""The control loop in one process, over a simulated arm behind the real guard and filter. Waits are short, bounds
loose: the machine may be busy."""

import threading
import time

import numpy as np
import pytest

from tests.unit.sim_arm import RATE_HZ, SPEC, Reaching, SimArm, SimCamera, SimTeleop
from vla_rl.real_robot.control_loop import ControlLoop, LoopParts, StartRefusedError, joint_targets
from vla_rl.real_robot.inference import Inference, PolicyProcess
from vla_rl.real_robot.interfaces import Command
from vla_rl.real_robot.loop_config import LoopConfig
from vla_rl.real_robot.modes import Event, Mode
from vla_rl.real_robot.safety import SafetyConfig
from vla_rl.real_robot.supervisor import Guard
from vla_rl.real_robot.takeover import Control, Takeover, TakeoverConfig
from vla_rl.serving.broker import BrokerConfig

LOOSE = SafetyConfig(speed_scale=1.0, max_state_age_s=0.5, max_clamped_fraction=1.0)


class Rig:
    """Everything of one loop, and what its ticks were."""

    def __init__(self, policy=None, teleop=None, safety=LOOSE, parts=None, **config):
        self.arm, self.camera, self.policy, self.teleop = SimArm(), SimCamera(), policy or Reaching(), teleop
        self.arm.connect()
        self.guard = Guard(self.arm, safety)
        self.inference = Inference(self.policy)
        self.ticks = []
        takeover = None if teleop is None else Takeover(SPEC, TakeoverConfig(max_lead=2.0))
        parts = LoopParts(
            self.guard, [self.camera], self.inference, teleop=teleop, takeover=takeover, on_tick=self.see, **parts or {}
        )  # fmt: skip
        options = {"max_picture_age_s": 0.3, "grace_s": 0.3, "ramp_s": 0.3, "start_timeout_s": 1.0} | config
        self.loop = ControlLoop(parts, LoopConfig("reach the goal", BrokerConfig(RATE_HZ), **options))
        self.then = {}  # tick number -> what happens then

    def see(self, tick):
        self.ticks.append(tick)
        self.then.get(len(self.ticks), lambda: None)()

    def modes(self):
        return [change.after for change in self.guard.modes.changes]

    def run(self, duration_s, **start):
        self.loop.start(**start)
        report = self.loop.run(duration_s)
        self.inference.close()
        return report


def smooth(sent, times=1.0):
    """No step of the targets is greater than the arm's speed allows."""
    assert (np.abs(np.diff(sent, axis=0)) <= SPEC.max_velocity * times / RATE_HZ + 1e-9).all()


def test_it_runs_a_policy_and_disarms_at_rest():
    rig = Rig()
    report = rig.run(1.5)
    assert report.ticks + report.missed == pytest.approx(150, abs=5)
    assert rig.modes() == [Mode.RUN, Mode.HOLD, Mode.IDLE]
    assert rig.arm.position[0] > SPEC.home[0] + 0.2  # towards the goal
    smooth(rig.arm.sent)
    np.testing.assert_array_equal(rig.arm.sent[-1], rig.arm.sent[-2])
    assert rig.arm.stops() == []
    assert {t.source for t in rig.ticks} >= {Control.POLICY}
    assert float(report.summary()["latency_p50_ms"]) > 0


def test_a_ramp_makes_the_start_gentle():
    slow, fast = Rig(ramp_s=1.0), Rig(ramp_s=0.0)
    slow.run(0.4)
    fast.run(0.4)
    assert 0 < np.ptp(slow.arm.sent[:40, 0]) < 0.6 * np.ptp(fast.arm.sent[:40, 0])


def test_shadow_sends_nothing_at_all():
    rig = Rig()
    rig.run(0.3, shadow=True)
    assert rig.arm.events == []
    assert rig.modes() == [Mode.SHADOW, Mode.IDLE]
    assert all(t.wanted is not None and t.applied is None for t in rig.ticks[2:])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda r: setattr(r.camera, "frozen", True), "repeats its picture|frozen"),
        (lambda r: setattr(r.camera, "dead_since", 1.0), "s old"),
        (lambda r: setattr(r.policy, "fail", "out of memory"), "out of memory"),
        (lambda r: setattr(r.policy, "nan", True), "first target"),
        (lambda r: setattr(r.arm, "position", np.array([2.0, 0.0])), "shoulder outside"),
        (lambda r: setattr(r.arm, "frozen_at", 1.0), "s old"),
        (lambda r: setattr(r.arm, "fault", "brake"), "brake"),
        (lambda r: r.guard.stop("pressed"), "pressed"),
    ],
)
def test_a_start_is_refused(spoil, says):
    rig = Rig(max_picture_age_s=0.2, start_timeout_s=0.4, start_tolerance=9.0)
    spoil(rig)
    with pytest.raises(StartRefusedError, match=says):
        rig.loop.start()
    assert len(rig.arm.sent) == 0


def test_a_start_is_refused_where_the_first_target_is_far():
    rig = Rig(start_tolerance=0.3)
    rig.loop.parts.inference._infer = lambda obs: np.tile([1.0, 0.3, 0.02], (5, 1))
    with pytest.raises(StartRefusedError, match=r"first target of shoulder is 0\.800 rad"):
        rig.loop.start()


def test_starvation_holds_and_a_policy_that_comes_back_goes_on():
    rig = Rig(grace_s=5.0)
    rig.then = {40: lambda: setattr(rig.policy, "fail", "gone"), 90: lambda: setattr(rig.policy, "fail", "")}
    report = rig.run(1.5)
    assert rig.modes() == [Mode.RUN, Mode.HOLD, Mode.RUN, Mode.HOLD, Mode.IDLE]
    assert report.held > 10
    assert report.failures > 10
    smooth(rig.arm.sent)
    assert rig.arm.position[0] > 0.4


def test_starvation_stops_after_the_grace_time_and_latches():
    rig = Rig()
    rig.then = {30: lambda: setattr(rig.policy, "fail", "the server is gone")}
    report = rig.run(5.0)
    assert report.ticks < 200
    assert "held for 0.3 s" in report.stop_reason
    assert "the server is gone" in report.stop_reason
    assert rig.arm.stops()
    with pytest.raises(StartRefusedError, match="held for"):
        rig.loop.start()
    rig.guard.fire(Event.RESET)
    rig.policy.fail = ""
    rig.loop = ControlLoop(LoopParts(rig.guard, [rig.camera], Inference(rig.policy)), rig.loop.config)
    rig.loop.start()
    assert rig.loop.run(0.2).stop_reason == ""


def test_a_plan_is_not_followed_for_longer_than_it_may():
    ages = []
    for limit in (None, 0.05):
        rig = Rig(max_plan_age_s=limit)
        rig.then = {40: lambda rig=rig: setattr(rig.policy, "delay_s", 3.0)}
        rig.run(5.0)
        ages.append(next(t.at for t in rig.ticks[40:] if t.mode is Mode.HOLD) - rig.ticks[39].at)
    assert ages[1] < ages[0] - 0.05  # the chunk has 0.2 s


def test_a_failed_reply_voids_the_plan_in_its_tick():
    rig = Rig(grace_s=0.05)
    rig.then = {40: lambda: setattr(rig.policy, "fail", "gone")}
    report = rig.run(5.0)
    failed = next(t for t in rig.ticks if t.reply is not None and t.reply.error)
    assert failed.mode is Mode.HOLD
    assert failed.wanted is None
    assert "gone" in report.stop_reason


def test_a_policy_that_is_known_to_be_gone_holds_the_arm_whatever_is_planned():
    gone = []
    rig = Rig(parts={"policy_problem": lambda: "no heartbeat" if gone else ""}, grace_s=0.05)
    rig.then = {40: lambda: gone.append(1)}
    report = rig.run(5.0)
    assert rig.ticks[39].wanted is not None
    assert [t.mode for t in rig.ticks[40:42]] == [Mode.HOLD] * 2
    assert report.stop_reason == "held for 0.05 s: no heartbeat"


def test_an_action_that_is_none_stops_the_arm():
    def to_command(action, standing):
        if len(rig.ticks) >= 40:
            raise ValueError("it points out of the room")
        return joint_targets(action, standing)

    rig = Rig(parts={"to_command": to_command})
    report = rig.run(5.0)
    assert report.stop_reason == "the policy's action is refused: it points out of the room"
    assert rig.arm.stops()
    assert rig.guard.modes.mode is Mode.ESTOP


def test_a_frozen_camera_holds_then_stops():
    rig = Rig(max_picture_age_s=0.15)
    rig.then = {30: lambda: setattr(rig.camera, "frozen", True)}
    report = rig.run(5.0)
    held = next(t for t in rig.ticks if t.mode is Mode.HOLD)
    assert "frozen" in held.problem
    assert held.at - rig.ticks[29].at < 1.0
    assert "frozen" in report.stop_reason


@pytest.mark.parametrize(
    "spoil", [lambda r: setattr(r.policy, "nan", True), lambda r: setattr(r.arm, "frozen_at", 1.0)]
)
def test_nan_actions_and_stale_measurements_stop(spoil):
    rig = Rig()
    rig.then = {30: lambda: spoil(rig)}
    report = rig.run(5.0)
    assert "not finite" in report.stop_reason or "s old" in report.stop_reason
    assert rig.guard.modes.mode is Mode.ESTOP
    last_send = max(i for i, e in enumerate(rig.arm.events) if e["what"] == "send")
    assert "stop" in [e["what"] for e in rig.arm.events[last_send:]]
    assert np.isfinite(rig.arm.sent).all()


def test_an_exception_anywhere_stops_the_arm():
    rig = Rig()

    def interrupt():
        raise KeyboardInterrupt

    rig.then = {20: interrupt}
    with pytest.raises(KeyboardInterrupt):
        rig.run(5.0)
    assert "KeyboardInterrupt" in rig.arm.stops()[0]
    assert rig.guard.modes.mode is Mode.ESTOP


def test_takeover_and_release_do_not_jump_and_every_tick_is_labelled():
    teleop = SimTeleop()
    rig = Rig(teleop=teleop)
    teleop.joints = np.array([2.0, -1.5])  # the leader arm stands elsewhere

    def engage():
        teleop.engaged = True
        rig.at_takeover = rig.arm.position.copy()

    def drive():
        teleop.joints = teleop.joints + np.array([-0.1, 0.1])

    def release():
        teleop.engaged = False
        rig.at_release = rig.arm.position.copy()

    rig.then = {40: engage, 60: drive, 120: release}
    rig.run(2.5)
    assert rig.modes()[:4] == [Mode.RUN, Mode.HUMAN, Mode.HOLD, Mode.RUN]
    smooth(rig.arm.sent)
    human = [t for t in rig.ticks if t.source is Control.HUMAN]
    assert len(human) > 50
    assert all(t.proposal is not None and t.applied is not None for t in human[20:])  # both are there to be stored
    np.testing.assert_allclose(human[17].applied.position, rig.at_takeover, atol=0.03)  # anchored where it was
    np.testing.assert_allclose(
        human[-1].applied.position, human[17].applied.position + np.array([-0.1, 0.1]), atol=0.01
    )
    after = rig.ticks[rig.ticks.index(human[-1]) + 1 :]
    assert after[0].source is Control.HOLD
    resumed = [t for t in after if t.source is Control.POLICY]
    np.testing.assert_allclose(resumed[3].applied.position, rig.at_release, atol=0.02)  # ramps from there
    assert resumed[-1].applied.position[0] > rig.at_release[0] + 0.1


def test_a_teleoperation_device_that_falls_silent_holds_then_stops():
    teleop = SimTeleop()
    rig = Rig(teleop=teleop)
    rig.then = {20: lambda: setattr(teleop, "engaged", True), 40: lambda: setattr(teleop, "silent", True)}
    report = rig.run(5.0)
    assert Mode.HUMAN in rig.modes()
    assert "silent" in report.stop_reason


def test_it_does_not_wait_for_a_slow_policy():
    rig = Rig(policy=Reaching(delay_s=0.08))
    report = rig.run(1.0)
    assert report.ticks > 40  # it would be 12 if it waited; a busy machine misses some
    assert rig.policy.calls < 20
    assert rig.arm.position[0] > SPEC.home[0] + 0.05


def test_missed_deadlines_are_skipped_not_caught_up():
    rig = Rig()
    rig.then = {20: lambda: time.sleep(0.1)}
    report = rig.run(1.0)
    assert report.missed >= 9
    assert report.ticks + report.missed == pytest.approx(100, abs=3)
    gaps = np.diff([t.at for t in rig.ticks])
    assert gaps.min() > 0.002  # no burst


def test_finish_from_another_thread_ends_the_run():
    rig = Rig()
    threading.Timer(0.5, rig.loop.finish).start()
    assert rig.run(None).ticks < 300
    assert rig.guard.modes.mode is Mode.IDLE


def make_reaching():
    return Reaching()


def make_nothing():
    raise RuntimeError("no checkpoint there")


def test_a_policy_in_a_process_of_its_own():
    observation = {"images": {"front": np.zeros((8, 8, 3), np.uint8)}, "state": np.zeros(3, np.float32), "prompt": "go"}
    policy = PolicyProcess(make_reaching, timeout_s=5.0)
    try:
        np.testing.assert_allclose(policy(observation), Reaching()(observation), atol=1e-6)
        policy._process.kill()
        with pytest.raises((RuntimeError, OSError)):
            policy(observation)
    finally:
        policy.close()
    with pytest.raises(RuntimeError, match="no checkpoint there"):
        PolicyProcess(make_nothing)


def test_actions_of_another_size_are_refused():
    standing = Command(np.zeros(2), 0.0)
    assert joint_targets(np.array([0.1, 0.2, 0.03]), standing).gripper == 0.03
    with pytest.raises(ValueError, match="3 numbers"):
        joint_targets(np.zeros(2), standing)
