"""The safety filter: limits under adversarial streams, the order of the checks, latches, hold; modes; kinematics.

Tolerance of the limits: 1e-6 of each, from finite differences of what was sent (third differences of float64 radians at
1 ms lose about nine digits)."""

import dataclasses
import json
import math

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sim_arm import RATE_HZ, SPEC
from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict
from vla_rl.real_robot.interfaces import ArmState, Command
from vla_rl.real_robot.kinematics import ForwardKinematics, chain_from_dh, chain_from_mujoco
from vla_rl.real_robot.limits import MotionLimiter, stop_plan
from vla_rl.real_robot.modes import TRANSITIONS, Event, Mode, ModeError, ModeMachine
from vla_rl.real_robot.safety import SafetyConfig, SafetyFilter

PERIOD = 1 / RATE_HZ
LIMITS = (SPEC.position_low, SPEC.position_high, SPEC.max_velocity, SPEC.max_acceleration, SPEC.max_jerk)
EASY = SafetyConfig(speed_scale=1.0, position_margin=0.0, max_step=100.0, max_clamped_fraction=1.0)
FR3 = [
    (0, 0.333, 0), (0, 0, -math.pi / 2), (0, 0.316, math.pi / 2), (0.0825, 0, math.pi / 2),
    (-0.0825, 0.384, -math.pi / 2), (0, 0, math.pi / 2), (0.088, 0, math.pi / 2),
]  # fmt: skip


def assert_within_limits(sent, period, limits=LIMITS, rest=True):
    """`sent` [T, ..., J], the first at rest."""
    low, high, *rates = limits
    assert np.isfinite(sent).all()
    assert (sent >= low - 1e-9).all()
    assert (sent <= high + 1e-9).all()
    difference = np.concatenate([np.repeat(sent[:1], 3, axis=0), sent])
    for limit in rates:
        difference = np.diff(difference, axis=0) / period
        excess = np.abs(difference) / limit
        assert excess.max() <= 1 + 1e-6


def adversarial(kind, rng, shape, target, k):
    """The next targets: what a broken policy, a broken person or a broken wire may send."""
    jump = rng.random(shape) < 0.05
    if kind == "white":
        return rng.uniform(-3, 3, shape)
    if kind == "walk":
        return target + 0.05 * rng.normal(size=shape)
    if kind == "jumps":
        return np.where(jump, rng.choice([-1e300, 1e300, 5e-324, -5e-324, -1.0, 1.5, 0.0], shape), target)
    if kind == "bang":  # from limit to limit as soon as it is there
        return np.where(k // 37 % 2, -1.0, 1.5) * np.ones(shape)
    return 0.25 + 1.3 * np.sin(k * PERIOD * (1 + np.arange(shape[0])[:, None] % 7)) * np.ones(shape)


@pytest.mark.parametrize("kind", ["white", "walk", "jumps", "bang", "sine"])
@pytest.mark.parametrize("period", [0.001, 0.01, 0.05])
def test_adversarial_streams_stay_within_all_limits(kind, period):
    """Fifteen cases of 400 arms, 170 periods: half a million commands of two joints, a million joint setpoints."""
    rng = np.random.default_rng(7)
    arms = 400
    limiter = MotionLimiter(*LIMITS, period)
    target = rng.uniform(SPEC.position_low, SPEC.position_high, (arms, 2))
    limiter.reset(target)
    sent = [target]
    for k in range(170):
        target = adversarial(kind, rng, (arms, 2), target, k)
        sent.append(limiter.step(np.nan_to_num(target)))
    sent += [limiter.brake() for _ in range(5)]
    assert_within_limits(np.array(sent), period)


@given(
    v=st.floats(-300, 300), share=st.floats(-1, 1), limit=st.floats(0.05, 60),
)  # fmt: skip
def test_a_stop_plan_ends_at_rest_where_it_says(v, share, limit):
    a = share * limit
    plan = stop_plan(np.array([v]), np.array([a]), np.array([limit]))
    position, speed, before, way = 0.0, v, a, [0.0]
    for i in range(1, int(plan.periods[0]) + 2):
        now = float(plan.at(np.array([float(i)]))[0])
        assert abs(now - before) <= 1 + 1e-9
        assert abs(now) <= limit + 1e-9
        speed, before = speed + now, now
        position += speed
        way.append(position)
    scale = 1 + max(map(abs, way))
    assert speed == pytest.approx(0, abs=1e-9 * (1 + abs(v)))
    assert before == 0
    assert position == pytest.approx(plan.end[0], abs=1e-9 * scale)
    assert min(way) >= min(plan.low[0], 0) - 1e-9 * scale
    assert max(way) <= max(plan.high[0], 0) + 1e-9 * scale


def test_a_step_is_reached_quickly_without_overshoot():
    limiter = MotionLimiter(*LIMITS, PERIOD)
    limiter.reset(np.array([-0.5, 0.0]))
    target = np.array([1.5, 0.4])  # the first is the limit itself
    sent = np.array([limiter.step(target) for _ in range(180)])
    assert (sent <= target + 1e-12).all()
    np.testing.assert_array_equal(sent[-1], target)
    # A trapezoid of 2 rad at 2 rad/s, 10 rad/s^2 and 1000 rad/s^3 takes 1 + 0.2 + 0.01 s.
    assert np.argmax(sent[:, 0] >= 1.4999) * PERIOD == pytest.approx(1.21, abs=0.06)


def test_a_stream_within_the_limits_passes_unchanged_and_the_filter_is_idempotent():
    rng = np.random.default_rng(3)
    first, second = MotionLimiter(*LIMITS, PERIOD), MotionLimiter(*LIMITS, PERIOD)
    target = rng.uniform(-0.9, 1.4, (300, 2))
    first.reset(target)
    second.reset(target)
    for k in range(200):
        target = adversarial("jumps" if k % 2 else "walk", rng, (300, 2), target, k)
        sent = first.step(target)
        np.testing.assert_allclose(second.step(sent), sent, atol=1e-9)


def test_a_smooth_stream_passes_bit_for_bit():
    f = armed(EASY)
    for k in range(300):
        position = SPEC.home + np.array([0.3, 0.2]) * (1 - math.cos(k * PERIOD)) / 2
        out = f.filter(Command(position, 0.03, k), state(now=k * PERIOD), k * PERIOD)
        assert out.clamps == ()
        np.testing.assert_array_equal(out.command.position, position)


# ----------------------------------------------------------------------------------------------------------- the filter
def state(now=0.0, position=SPEC.home, fault="", stamp=None):
    return ArmState(np.asarray(position), np.zeros(2), 0.04, now if stamp is None else stamp, fault)


def armed(config=EASY):
    f = SafetyFilter(SPEC, config)
    f.start(state(), 0.0)
    return f


FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=64)
COMMANDS = st.tuples(
    st.one_of(st.lists(FLOATS, min_size=2, max_size=2), st.lists(st.floats(-2, 2), min_size=2, max_size=2)),
    st.one_of(FLOATS, st.floats(0, 0.08)),
    st.integers(-3, 60),
    st.floats(0, 0.05),
)


@settings(max_examples=60)
@given(st.lists(COMMANDS, max_size=40))
def test_whatever_comes_what_is_sent_is_finite_and_within_limits(stream):
    """NaN, infinities, denormals, huge values, jittering clocks, sequences out of order; after a stop it goes on
    asking. Only commands that are sent count: an early one is the last again."""
    f, now, sent = armed(), 0.0, [SPEC.home]
    for position, gripper, sequence, wait in stream:
        now += wait
        out = f.filter(Command(np.array(position), gripper, sequence), state(now), now)
        if "early" not in out.clamps:
            sent.append(out.command.position)
        assert 0 <= out.command.gripper <= 0.08
        bad = not (np.isfinite(position).all() and np.isfinite(gripper))
        assert bool(out.stop_reason) >= bad
    assert_within_limits(np.array(sent), PERIOD)


def run_filter(count, seed, rate_hz=RATE_HZ):
    """`count` commands to one arm, 50 of a kind after each other; how many of them were sent."""
    rng, period = np.random.default_rng(seed), 1 / rate_hz
    f = SafetyFilter(dataclasses.replace(SPEC, rate_hz=rate_hz), EASY)
    f.start(state(), 0.0)
    now, sent, target = 0.0, [SPEC.home], SPEC.home
    for k in range(count):
        now += rng.choice([0.4, 0.6, 0.9, 1.0, 1.1, 3.0]) * period
        target = adversarial(("walk", "jumps", "white", "bang", "sine")[k // 50 % 5], rng, (1, 2), target, k)[0]
        sequence = k if rng.random() > 0.1 else k - 5
        out = f.filter(Command(target, float(rng.normal()), sequence), state(now), now)
        if "early" not in out.clamps:
            sent.append(out.command.position)
    assert f.modes.stop_reason == ""
    assert_within_limits(np.array(sent), period)
    return len(sent) - 1


@pytest.mark.parametrize("rate_hz", [20.0, 100.0, 1000.0])
def test_thousands_of_adversarial_commands_through_the_whole_filter(rate_hz):
    assert run_filter(1_000, 1, rate_hz) > 500


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_million_adversarial_commands_through_the_whole_filter():
    sent = [run_filter(10_200, seed, (20.0, 100.0, 1000.0)[seed % 3]) for seed in range(120)]
    print(f"{120 * 10_200} commands, {sum(sent)} of them sent, none outside of a limit")
    assert sum(sent) >= 1_000_000


@pytest.mark.parametrize(
    ("position", "gripper", "says"),
    [
        ([np.nan, 0.0], 0.0, "not finite"),
        ([0.0, np.inf], 0.0, "not finite"),
        ([0.0, 0.0], np.nan, "not finite"),
        ([0.0, 0.0, 0.0], 0.0, "shape"),
        ([[0.0, 0.0]], 0.0, "shape"),
        (["a", "b"], 0.0, "numbers"),
        (None, 0.0, "shape"),
    ],
)
def test_what_is_no_command_stops_and_latches(position, gripper, says):
    f = armed()
    moving = [f.filter(Command(SPEC.home + 0.5, 0.0, k), state(), k * PERIOD) for k in range(10)]
    out = f.filter(Command(position, gripper, 11), state(0.1), 0.1)
    assert says in out.stop_reason
    sent = [SPEC.home, *(m.command.position for m in moving), out.command.position]
    for k in range(12, 60):  # good commands change nothing any more
        again = f.filter(Command(SPEC.home, 0.0, k), state(k * PERIOD), k * PERIOD)
        assert again.stop_reason == out.stop_reason
        sent.append(again.command.position)
    assert_within_limits(np.array(sent), PERIOD)  # braked, not jerked, and then at rest
    np.testing.assert_array_equal(sent[-1], sent[-2])
    with pytest.raises(ModeError, match=r"not finite|shape|numbers"):
        f.start(state(1.0), 1.0)
    f.reset(1.0)
    assert f.filter(Command(SPEC.home, 0.0, 0), state(1.0), 1.0).command is None  # a reset alone moves nothing
    f.start(state(1.0), 1.0)
    assert f.filter(Command(SPEC.home, 0.0, 0), state(1.0), 1.0).stop_reason == ""


def test_stale_broken_and_faulty_measurements_stop():
    for broken, says in [
        (state(stamp=0.9), "s old"),
        (state(stamp=np.nan), "s old"),
        (state(1.0, fault="joint 3 overheated"), "overheated"),
        (state(1.0, position=[np.nan, 0]), "finite"),
    ]:
        f = SafetyFilter(SPEC, SafetyConfig(max_state_age_s=0.05))
        f.start(state(), 0.0)
        assert says in f.filter(Command(SPEC.home, 0.0, 1), broken, 1.0).stop_reason


def test_hold_is_the_last_target_sent_and_the_measured_pose_if_there_was_none():
    f = SafetyFilter(SPEC, EASY)
    f.stop("a person pressed the button", 0.0)
    measured = np.array([0.7, -0.4])
    np.testing.assert_array_equal(
        f.filter(Command(SPEC.home, 0, 1), state(position=measured), 0).command.position, measured
    )
    f = armed()
    for k in range(200):
        f.filter(Command(SPEC.home + 0.05, 0.03, k), state(k * PERIOD), k * PERIOD)
    f.modes.fire(Event.HOLD, 2.0)
    out = f.filter(Command(SPEC.home - 1, 0.0, 201), state(2.0, position=SPEC.home - 0.02), 2.0)
    np.testing.assert_array_equal(out.command.position, SPEC.home + 0.05)  # not the sagging measurement
    assert out.command.gripper == 0.03


@pytest.mark.parametrize("mode", [Mode.IDLE, Mode.SHADOW])
def test_nothing_is_sent_in_idle_and_shadow(mode):
    f = SafetyFilter(SPEC)
    if mode is Mode.SHADOW:
        f.modes.fire(Event.SHADOW, 0.0)
    assert f.filter(Command(SPEC.home, 0.0, 1), state(), 0.0).command is None


def test_commands_that_come_early_or_out_of_order_do_not_move_the_arm_faster():
    f = armed()
    one = f.filter(Command(SPEC.home + 0.5, 0.0, 1), state(), 0.0)
    early = f.filter(Command(SPEC.home + 0.5, 0.0, 2), state(0.002), 0.002)
    assert early.clamps == ("early",)
    np.testing.assert_array_equal(early.command.position, one.command.position)
    old = f.filter(Command(SPEC.home - 0.5, 0.0, 1), state(0.01), 0.01)
    assert old.clamps == ("sequence",)
    assert (old.command.position >= one.command.position).all()  # braked from its motion up, not sent down


def test_a_target_far_from_the_measurement_is_shortened():
    f = armed(SafetyConfig(speed_scale=1.0, max_step=0.1, max_clamped_fraction=1.0))
    for k in range(100):
        out = f.filter(Command(SPEC.home + 0.7, 0.0, k), state(k * PERIOD), k * PERIOD)  # the arm is stuck at home
    assert "step" in out.clamps
    np.testing.assert_allclose(out.command.position, SPEC.home + 0.1, atol=1e-9)


def test_repeated_clamping_stops_and_a_little_does_not():
    f = armed(SafetyConfig(position_margin=0.0, max_step=5.0))
    for k in range(40):
        assert not f.filter(Command(np.array([9.0, 0.3]), 0.0, k), state(k * PERIOD), k * PERIOD).stop_reason
    for k in range(40, 130):
        out = f.filter(Command(np.array([9.0, 0.3]), 0.0, k), state(k * PERIOD), k * PERIOD)
    assert "were clamped" in out.stop_reason


def test_the_tool_stays_in_the_box_and_above_the_floor():
    chain = chain_from_dh([(0.0, 0.2, 0.0), (0.0, 0.0, math.pi / 2)], (0.5, 0.0, 0.0))
    box = SafetyConfig(
        chain=chain, workspace_low=(-1, -0.45, 0.05), workspace_high=(1, 0.45, 1), speed_scale=1, max_step=9,
        max_clamped_fraction=1.0,
    )  # fmt: skip
    f, rng, where = armed(box), np.random.default_rng(0), ForwardKinematics(chain)
    tools, target, clamped = [], SPEC.home, 0
    for k in range(1500):
        target = rng.uniform(SPEC.position_low, SPEC.position_high) if k % 40 == 0 else target
        out = f.filter(Command(target, 0.0, k), state(k * PERIOD), k * PERIOD)
        clamped += "workspace" in out.clamps
        tools.append(where(out.command.position))
    assert clamped > 100
    assert (np.array(tools) >= np.array([-1, -0.45, 0.05]) - 1e-9).all()
    assert (np.array(tools) <= np.array([1, 0.45, 1]) + 1e-9).all()
    assert np.ptp(np.array(tools)[:, 1]) > 0.5  # and it did move
    with pytest.raises(ValueError, match="outside of the workspace box"):
        SafetyFilter(SPEC, box).start(state(position=[0.0, -1.5]), 0.0)


def test_a_start_is_refused_outside_of_the_limits_and_allowed_inside_of_the_margin():
    f = SafetyFilter(SPEC, SafetyConfig(position_margin=0.1))
    with pytest.raises(ValueError, match="elbow outside of the position limits"):
        f.start(state(position=[0.0, 2.1]), 0.0)
    f.start(state(position=[1.45, 0.0]), 0.0)  # within the margin: it may stay, and go in
    for k in range(300):
        out = f.filter(Command(np.array([1.5, 0.0]), 0.0, k), state(k * PERIOD, [1.45, 0]), k * PERIOD)
        assert out.command.position[0] <= 1.45
    assert out.command.position[0] == pytest.approx(1.4)


@pytest.mark.parametrize(
    "wrong", [{"speed_scale": 0.0}, {"speed_scale": 2.0}, {"min_spacing": 1.0}, {"workspace_low": (0, 0, 0)}]
)
def test_configs_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="SafetyConfig"):
        SafetyConfig(**wrong)


def test_a_config_goes_through_json():
    config = SafetyConfig(chain=chain_from_dh(FR3, (0, 0, 0.1)), workspace_low=(0, 0, 0), workspace_high=(1, 1, 1))
    assert config_from_dict(SafetyConfig, json.loads(json.dumps(config_to_dict(config)))) == config


# ---------------------------------------------------------------------------------------------------------- kinematics
def test_forward_kinematics_of_a_known_pose():
    """Franka's DH table; with all joints zero the flange is at (0.088, 0, 0.333 + 0.316 + 0.384 - 0.107)."""
    where = ForwardKinematics(chain_from_dh(FR3, (0.0, 0.0, 0.107)))
    np.testing.assert_allclose(where(np.zeros(7)), [0.088, 0.0, 0.926], atol=1e-12)


def test_a_chain_from_mujoco_agrees_with_mujoco():
    xml = """<mujoco><worldbody><body pos=".1 .2 .3" euler="10 20 30"><joint name="a" axis="0 1 1"/>
      <geom size=".1"/><body pos="0 .3 .1" euler="0 40 0"><joint name="b" axis="1 0 0" pos=".02 0 0"/><geom size=".1"/>
      <body pos="0 0 .3"><geom size=".1"/><body pos=".1 0 0"><joint name="c" axis="0 0 1"/><geom size=".1"/>
      <site name="tip" pos="0 0 .2"/></body></body></body></body></worldbody></mujoco>"""
    model = mujoco.MjModel.from_xml_string(xml)
    where = ForwardKinematics(chain_from_mujoco(model, ["a", "b", "c"], "tip"))
    data, joints = mujoco.MjData(model), np.random.default_rng(0).uniform(-3, 3, (20, 3))
    for q, tip in zip(joints, where(joints), strict=True):
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        np.testing.assert_allclose(tip, data.site("tip").xpos, atol=1e-9)
    with pytest.raises(ValueError, match="does not hang"):
        chain_from_mujoco(model, ["b", "a"], "tip")


# --------------------------------------------------------------------------------------------------------------- modes
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("event", list(Event))
def test_every_change_of_mode_is_in_the_table_or_refused(mode, event):
    machine = ModeMachine()
    machine.mode = mode
    if (mode, event) in TRANSITIONS:
        assert machine.fire(event, 1.0, "why") is TRANSITIONS[mode, event]
    else:
        with pytest.raises(ModeError, match=f"{event.value} is not possible in mode {mode.value}"):
            machine.fire(event, 1.0)
        assert machine.mode is mode


def test_the_table_keeps_what_safety_needs():
    assert all(TRANSITIONS[mode, Event.STOP] is Mode.ESTOP for mode in Mode)
    assert {e for m, e in TRANSITIONS if m is Mode.ESTOP} == {Event.STOP, Event.RESET}
    assert {m for (m, _), after in TRANSITIONS.items() if after is Mode.RUN} == {Mode.IDLE, Mode.HOLD}
    assert not any(after.sends for (m, _), after in TRANSITIONS.items() if m in (Mode.SHADOW, Mode.ESTOP))


def test_the_first_reason_of_a_stop_is_kept():
    machine = ModeMachine()
    machine.fire(Event.STOP, 1.0, "first")
    machine.fire(Event.STOP, 2.0, "second")
    assert machine.stop_reason == "first"
    assert [c.reason for c in machine.changes] == ["first"]
    machine.fire(Event.RESET, 3.0)
    assert machine.stop_reason == ""
