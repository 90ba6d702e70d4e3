"""The arm as an environment: pace, mapping, success, reset, what ends an episode, interventions."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from tests.contract.robot_env import SPEC, ArmCamera, FakeTime, IdealArm, make_robot
from vla_rl.core import ActionSpec, Source
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.data.replay_writer import EpisodeWriter
from vla_rl.envs.robot import RobotEnvConfig, RobotGymEnv, RobotParts, RobotStepEnv
from vla_rl.envs.robot_actions import JointDelta, JointPosition, ToolDelta
from vla_rl.envs.robot_hold import KeptAlive
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.real_robot.interfaces import Command, HardwareError, TeleopSample
from vla_rl.real_robot.modes import Mode
from vla_rl.real_robot.safety import SafetyConfig
from vla_rl.real_robot.supervisor import Guard
from vla_rl.real_robot.takeover import Takeover, TakeoverConfig

ONE = torch.ones(1, dtype=torch.bool)
FIRST = torch.zeros(1, dtype=torch.int64)


def reset(env: RobotStepEnv, seed: int = 0) -> None:
    env.reset(FIRST, torch.tensor([seed]))


def quiet(name: str = "ideal arm", **options: object) -> RobotEnvConfig:
    defaults: dict = {"control_hz": 10.0, "max_episode_steps": 50, "home_speed": 2.0}
    return RobotEnvConfig(name, "reach out", **(defaults | options))


# ------------------------------------------------------------------------------------------------------------- mappings
def jacobian(position: np.ndarray) -> np.ndarray:
    """Two links of 0.5 m in a plane; the arm turns about z."""
    a, b = position
    both = a + b
    top = np.array([
        [-0.5 * np.sin(a) - 0.5 * np.sin(both), -0.5 * np.sin(both)],
        [0.5 * np.cos(a) + 0.5 * np.cos(both), 0.5 * np.cos(both)],
    ])  # fmt: skip
    return np.vstack([top, np.zeros((3, 2)), np.ones((1, 2))])


def test_mappings_to_targets_and_back():
    standing = Command(np.array([0.2, 0.4]), 0.02, 7)
    deltas = JointDelta(SPEC, 0.15)
    target = deltas.target(np.array([1.0, -0.5, 0.0]), standing)
    np.testing.assert_allclose(target.position, [0.35, 0.325])
    assert (target.gripper, target.sequence) == (pytest.approx(0.04), 8)
    np.testing.assert_allclose(deltas.action_of(target, standing), [1.0, -0.5, 0.0])
    positions = JointPosition(SPEC)
    assert positions.action == ActionSpec((-2.0, -1.5, -1.0), (2.0, 1.5, 1.0), ("a", "b", "gripper"))
    target = positions.target(np.array([0.5, 9.0, 1.0]), standing)
    np.testing.assert_allclose(target.position, [0.5, 1.5])
    np.testing.assert_allclose(positions.action_of(target, standing), [0.5, 1.5, 1.0])


def test_tool_delta_moves_the_tool_and_stays_bounded_where_it_is_singular():
    tool = ToolDelta(SPEC, jacobian, max_translation=0.02, max_rotation=10.0, damping=1e-4)
    standing = Command(np.array([0.3, 1.0]), 0.08)

    def tip(q: np.ndarray) -> np.ndarray:
        return 0.5 * np.array([np.cos(q[0]) + np.cos(q.sum()), np.sin(q[0]) + np.sin(q.sum())])

    dq = np.array([0.01, -0.005])
    action = tool.action_of(Command(standing.position + dq, 0.08), standing)
    target = tool.target(action, standing)
    np.testing.assert_allclose(target.position - standing.position, dq, atol=1e-5)
    np.testing.assert_allclose(tip(target.position) - tip(standing.position), 0.02 * action[:2], atol=1e-4)
    straight = Command(np.zeros(2), 0.08)  # stretched: it cannot move outwards
    damped = ToolDelta(SPEC, jacobian, 0.02, 0.1, damping=0.05)
    assert np.abs(damped.target(np.array([1.0, 0, 0, 0, 0, 0, 1.0]), straight).position).max() < 0.02


# --------------------------------------------------------------------------------------------------------------- moving
def test_steps_keep_real_time_and_are_divided_to_the_rate_of_the_arm():
    env, arm, fake = make_robot(quiet())
    reset(env)
    begin, before = fake.t, len(arm.sent)
    for _ in range(3):
        env.step(torch.tensor([[1.0, 0.0, 1.0]]), ONE)
    assert fake.t - begin == pytest.approx(0.3)
    sent = arm.sent[before:]
    np.testing.assert_allclose([t - begin for t, _ in sent], [0, 0.05, 0.1, 0.15, 0.2, 0.25], atol=1e-9)
    np.testing.assert_allclose(np.diff([c.position[0] for _, c in sent]), 0.075, atol=1e-6)
    assert env.num_late == 0
    fake.sleep(0.3)  # a slow policy
    env.step(torch.tensor([[0.0, 0.0, 1.0]]), ONE)
    late = fake.t
    env.step(torch.tensor([[0.0, 0.0, 1.0]]), ONE)
    assert env.num_late == 1
    assert fake.t - late == pytest.approx(0.1)  # and nobody hurries to make up for it


def test_nothing_passes_by_the_safety_filter():
    env, arm, _ = make_robot(quiet(home_speed=100.0))
    reset(env)
    for _ in range(20):
        env.step(torch.tensor([[1.0, 1.0, 1.0]]), ONE)
    positions = np.array([c.position for _, c in arm.sent])
    assert np.abs(np.diff(positions, axis=0)).max() <= 4.0 / 20 + 1e-9  # max_velocity at 20 Hz, on the way home too
    assert (positions <= SPEC.position_high - 0.02 + 1e-9).all()
    assert 0 < env.clamped_steps()[0] <= 20
    calm, _, _ = make_robot(quiet())
    reset(calm)
    calm.step(torch.tensor([[0.1, 0.1, 1.0]]), ONE)
    assert calm.clamped_steps() == [0]


def test_home_is_a_function_of_the_seed():
    env, arm, _ = make_robot()
    reset(env, 3)
    first = arm.position.copy()
    env.step(torch.tensor([[1.0, 1.0, 1.0]]), ONE)
    reset(env, 4)
    assert not np.allclose(arm.position, first)
    reset(env, 3)
    np.testing.assert_array_equal(arm.position, first)
    assert np.abs(first - SPEC.home).max() <= 0.1


def test_arm_that_does_not_come_home_is_an_error_and_stopped():
    class Stuck(IdealArm):
        def send(self, command: Command) -> Command:
            self.sent.append((self._time.t, command))
            return command

    fake = FakeTime()
    stuck, arm, _ = make_robot(quiet(home_timeout_s=2.0), fake, arm=Stuck(fake))
    with pytest.raises(HardwareError, match="is not home after"):
        reset(stuck)
    assert arm.stops[-1] == "the arm does not come home"


# ----------------------------------------------------------------------------------------------------------------- ends
def test_success_ends_the_episode_with_reward_one():
    env, _, _ = make_robot(quiet())
    reset(env)
    outcomes = [env.step(torch.tensor([[1.0, 0.0, 1.0]]), ONE) for _ in range(4)]  # 0.3 + 4 * 0.15 > 0.8
    assert [float(o.reward) for o in outcomes] == [0.0, 0.0, 0.0, 1.0]
    assert [bool(o.terminated) for o in outcomes] == [False, False, False, True]
    assert bool(outcomes[-1].success)


@pytest.mark.parametrize("problem", ["fault", "stale", "frozen"])
def test_a_broken_arm_or_camera_loses_the_episode_and_the_arm_holds(problem: str):
    fake = FakeTime()
    asked: list[str] = []
    env, arm, _ = make_robot(quiet(), fake, confirm=asked.append)
    reset(env)
    camera = env.parts.cameras[0]
    assert isinstance(camera, ArmCamera)
    if problem == "fault":
        arm.fault = "protective stop"
    elif problem == "stale":
        arm.age = 0.5
    else:
        camera.frozen = True
    outcomes = [env.step(torch.tensor([[0.1, 0.0, 1.0]]), ONE) for _ in range(4)]
    assert bool(outcomes[-1].lost)
    assert env.parts.arm.read()[1] is Mode.ESTOP
    assert arm.stops
    sent = len(arm.sent)
    env.step(torch.tensor([[0.1, 0.0, 1.0]]), ONE)
    moved = [c.position for _, c in arm.sent[sent:]]
    assert not moved, "nothing is sent after the stop"

    arm.fault, arm.age, camera.frozen = "", 0.0, False
    asked.clear()
    reset(env)
    assert "has stopped" in asked[0]  # a person was asked before anything moved
    assert not env.step(torch.tensor([[0.1, 0.0, 1.0]]), ONE).lost.any()


def test_after_a_stop_nothing_arms_itself():
    env, arm, _ = make_robot(quiet(), confirm=None)
    reset(env)
    arm.fault = "reflex"
    assert env.step(torch.tensor([[0.1, 0.0, 1.0]]), ONE).lost.all()
    arm.fault = ""
    with pytest.raises(HardwareError, match="has stopped"):
        reset(env)


def test_lost_episodes_are_dropped_by_the_chunked_environment():
    env, arm, _ = make_robot(quiet())
    chunked = ChunkedEnv(env, auto_reset=False)
    chunked.reset([1])
    arm.fault = "reflex"
    step = chunked.step(torch.zeros(1, 5, 3))
    assert step.lost.all()
    assert not step.executed.any()
    assert step.truncated.all()


# -------------------------------------------------------------------------------------------------------- interventions
class Hand:
    """A person who pushes the second joint's leader up from step `begin` to `end`."""

    def __init__(self, time: FakeTime, begin: int, end: int) -> None:
        self._time, self._begin, self._end, self.reads = time, begin, end, -1

    def connect(self) -> None:
        pass

    def read(self) -> TeleopSample:
        self.reads += 1
        engaged = self._begin <= self.reads < self._end
        joints = np.array([0.0, 0.1 * max(0, self.reads - self._begin)])
        return TeleopSample(np.zeros(6), 0.08, engaged, {}, self._time.t, joints)

    def close(self) -> None:
        pass


def test_a_person_takes_over_and_both_actions_are_stored():
    fake = FakeTime()
    hand = Hand(fake, 2, 5)
    env, arm, _ = make_robot(
        quiet(), fake, teleop=hand, takeover=Takeover(SPEC, TakeoverConfig(max_lead=0.5)), success=None
    )
    chunked = ChunkedEnv(env, auto_reset=False)
    obs = chunked.reset([5])
    proposals = torch.tensor([0.2, 0.0, 1.0]).repeat(1, 7, 1)
    step = chunked.step(proposals)
    taken = step.taken
    assert taken is not None
    assert taken.source[0].tolist() == [Source.POLICY] * 2 + [Source.HUMAN] * 3 + [Source.POLICY] * 2
    np.testing.assert_allclose(taken.actions[0, 2], [0, 0, 1], atol=1e-6)  # engaging moves nothing
    np.testing.assert_allclose(taken.actions[0, 3], [0, 0.1 / 0.15, 1], atol=1e-6)
    np.testing.assert_allclose(taken.actions[0, 5:], proposals[0, 5:])
    np.testing.assert_allclose(arm.position, SPEC.home + np.array([4 * 0.03, 0.2]), atol=1e-6)

    config = ReplayConfig(capacity=100, gamma=0.99)
    buffer = ReplayBuffer(
        config, action_dim=3, state_dim=3, num_envs=1, max_episode_steps=50, cameras={"front": (4, 6)}
    )
    writer = EpisodeWriter(buffer, chunked.spec.action)
    writer.add(obs, proposals, step)
    writer.cut()
    assert buffer.rows.source[:7].tolist() == taken.source[0].tolist()
    np.testing.assert_allclose(buffer.rows.proposals[:7], proposals[0])
    np.testing.assert_allclose(buffer.rows.actions[:7], taken.actions[0])


def test_device_that_falls_silent_in_a_takeover_holds_the_arm():
    fake = FakeTime()

    class Silent(Hand):
        def read(self) -> TeleopSample:
            sample = super().read()
            if self.reads >= 3:
                raise HardwareError("unplugged")
            return sample

    env, arm, _ = make_robot(
        quiet(), fake, teleop=Silent(fake, 1, 99), takeover=Takeover(SPEC, TakeoverConfig()), success=None
    )
    reset(env)
    for _ in range(6):
        env.step(torch.tensor([[1.0, 0.0, 1.0]]), ONE)
    held = [c.position for _, c in arm.sent[-4:]]
    np.testing.assert_allclose(np.diff(held, axis=0), 0.0, atol=1e-9)
    assert env.parts.arm.read()[1] is Mode.HOLD


# ------------------------------------------------------------------------------------------------------ in real time
class RealTime(FakeTime):
    """The machine's own clock."""

    @property
    def t(self) -> float:
        return time.monotonic()

    @t.setter
    def t(self, value: float) -> None:
        pass


def test_silence_between_chunks_is_no_silence_for_the_arm():
    arm = IdealArm(RealTime())
    kept = KeptAlive(Guard(arm, SafetyConfig(speed_scale=1.0, max_step=1.0)))
    parts = RobotParts(kept, JointDelta(SPEC, 0.15))
    env = RobotStepEnv(parts, quiet(home_speed=3.0, control_hz=20.0))
    try:
        reset(env)
        for _ in range(2):  # 20 Hz
            env.step(torch.tensor([[0.5, 0.0, 1.0]]), ONE)
            time.sleep(0.5)  # a slow policy
        stamps = np.array([t for t, _ in arm.sent])
        assert np.diff(stamps).max() < 0.2
        assert kept.num_repeated >= 10
        assert np.diff(stamps).min() > 0.5 / 20  # and none was too early for the filter
        np.testing.assert_allclose(arm.sent[-1][1].position, SPEC.home + np.array([0.15, 0.0]), atol=1e-6)
        assert len({c.sequence for _, c in arm.sent}) == len(arm.sent)
        kept.stop("a person")
        count = len(arm.sent)
        time.sleep(0.2)
        assert len(arm.sent) == count, "what is stopped is not kept alive"
    finally:
        kept.close()
    env.close()


# ------------------------------------------------------------------------------------------------------------ Gymnasium
def test_gymnasium_environment():
    env, _, _ = make_robot(quiet(max_episode_steps=3))
    robot = RobotGymEnv(env)
    obs, _ = robot.reset(seed=1)
    assert robot.observation_space.contains(obs)
    assert robot.render().shape == (4, 6, 3)
    ends = [robot.step(np.array([0.1, 0.0, 1.0], np.float32))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    obs, reward, terminated, _, info = robot.step(np.array([1.0, 0.0, 9.0], np.float32))
    assert robot.observation_space.contains(obs)
    assert (reward, terminated, info["success"], info["source"]) == (0.0, False, False, Source.POLICY)
    assert info["action"][2] == 1.0  # clamped, as executed
    with pytest.raises(ValueError, match="finite"):
        robot.step(np.array([np.nan, 0, 0], np.float32))
    robot.close()
    assert env.parts.arm.read()[1] is Mode.IDLE


@pytest.mark.filterwarnings("ignore:.*infinity:UserWarning")  # a state has no bounds
def test_gymnasium_checker_accepts_it():
    from gymnasium.utils.env_checker import check_env

    env, _, _ = make_robot(quiet())
    check_env(RobotGymEnv(env), skip_render_check=True)
