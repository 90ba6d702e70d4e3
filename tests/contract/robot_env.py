"""An arm with an ideal controller, on a clock of its own, behind `RobotStepEnv`; several side by side for the suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.core import Observation
from vla_rl.envs.robot import Clock, RobotEnvConfig, RobotParts, RobotStepEnv
from vla_rl.envs.robot_actions import JointDelta
from vla_rl.protocols import StepOutcome
from vla_rl.real_robot.interfaces import ArmSpec, ArmState, Command, Picture
from vla_rl.real_robot.modes import Event, Mode
from vla_rl.real_robot.safety import SafetyConfig, SafetyFilter
from vla_rl.real_robot.supervisor import Applied

SPEC = ArmSpec(
    name="ideal",
    joint_names=("a", "b"),
    position_low=np.array([-2.0, -1.5]),
    position_high=np.array([2.0, 1.5]),
    max_velocity=np.array([4.0, 4.0]),
    max_acceleration=np.array([400.0, 400.0]),
    max_jerk=np.array([80000.0, 80000.0]),
    gripper_range=(0.0, 0.08),
    rate_hz=20.0,
    home=np.array([0.3, -0.2]),
)


class FakeTime:
    """Goes on where somebody sleeps."""

    def __init__(self) -> None:
        self.t = 100.0

    def clock(self) -> Clock:
        return Clock(lambda: self.t, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.t += seconds


class IdealArm:
    """Is at once where it is sent to. Keeps all that it was asked."""

    def __init__(self, time: FakeTime, spec: ArmSpec = SPEC) -> None:
        self.spec, self._time = spec, time
        self.position, self.gripper = np.array([0.1, 0.1])[: spec.num_joints], 0.08
        self.sent: list[tuple[float, Command]] = []
        self.stops: list[str] = []
        self.fault = ""
        self.age = 0.0
        self.closed = False

    def connect(self) -> None:
        self.closed = False

    def read(self) -> ArmState:
        velocity = np.zeros(self.spec.num_joints)
        return ArmState(self.position.copy(), velocity, self.gripper, self._time.t - self.age, self.fault)

    def send(self, command: Command) -> Command:
        self.sent.append((self._time.t, command))
        self.position, self.gripper = command.position.copy(), command.gripper
        return command

    def stop(self, reason: str) -> None:
        self.stops.append(reason)

    def close(self) -> None:
        self.closed = True


class TimedGuard:
    """What `supervisor.Guard` does, with its safety filter, on the clock of a test."""

    def __init__(self, arm: IdealArm, time: FakeTime) -> None:
        self.arm, self.spec, self._time = arm, arm.spec, time
        self.filter = SafetyFilter(arm.spec, SafetyConfig(speed_scale=1.0, max_step=1.0))

    def read(self) -> tuple[ArmState, Mode, str]:
        return self.arm.read(), self.filter.modes.mode, self.filter.modes.stop_reason

    def fire(self, event: Event, reason: str = "") -> Mode:
        if event is Event.START:
            self.filter.start(self.arm.read(), self._time.t)
            return self.filter.modes.mode
        return self.filter.modes.fire(event, self._time.t, reason)

    def apply(self, command: Command) -> Applied:
        filtered = self.filter.filter(command, self.arm.read(), self._time.t)
        if filtered.stop_reason or filtered.command is None:
            self.stop(filtered.stop_reason)
            return Applied(None, (), self.filter.modes.mode, filtered.stop_reason)
        return Applied(self.arm.send(filtered.command), filtered.clamps, self.filter.modes.mode, "")

    def stop(self, reason: str) -> None:
        self.arm.stop(reason)
        self.filter.stop(reason, self._time.t)


class ArmCamera:
    """Shows where the arm is. With `frozen`, the same picture over and over."""

    name = "front"

    def __init__(self, arm: IdealArm, time: FakeTime) -> None:
        self._arm, self._time, self.frozen = arm, time, False
        self._last: Picture | None = None

    def connect(self) -> None:
        pass

    def latest(self) -> Picture:
        if not (self.frozen and self._last):
            value = int(np.clip(128 + 60 * self._arm.position[0], 0, 255))
            image = np.full((4, 6, 3), value, np.uint8)
            self._last = Picture(image, self._time.t, round(self._time.t * 1e9))
        return Picture(self._last.image, self._time.t, self._last.source_stamp_ns)

    def close(self) -> None:
        pass


def done(obs: Observation) -> bool:
    """Where the first joint is far out."""
    return bool(obs.state[0, 0] > 0.8)


def make_robot(
    config: RobotEnvConfig | None = None, time: FakeTime | None = None, arm: IdealArm | None = None, **parts: Any
) -> tuple[RobotStepEnv, IdealArm, FakeTime]:
    time = time or FakeTime()
    arm = arm or IdealArm(time)
    config = config or RobotEnvConfig(
        "ideal arm", "reach out", control_hz=10.0, max_episode_steps=7, home_noise=0.1, home_speed=2.0
    )
    defaults: dict[str, Any] = {"success": done, "cameras": (ArmCamera(arm, time),), "confirm": lambda text: None}
    made = RobotParts(
        TimedGuard(arm, time), **({"mapping": JointDelta(SPEC, 0.15), "clock": time.clock()} | defaults | parts)
    )
    return RobotStepEnv(made, config), arm, time


class SideBySide:
    """A batch of environments of one, for the suite."""

    def __init__(self, envs: Sequence[RobotStepEnv]) -> None:
        self._envs, self.num_envs, self.spec = envs, len(envs), envs[0].spec

    def reset(self, env_ids: Tensor, seeds: Tensor) -> None:
        for i, seed in zip(env_ids.tolist(), seeds, strict=True):
            self._envs[i].reset(torch.zeros(1, dtype=torch.int64), seed[None])

    def step(self, actions: Tensor, active: Tensor) -> StepOutcome:
        outcomes = [env.step(actions[i : i + 1], active[i : i + 1]) for i, env in enumerate(self._envs)]
        fields = ("reward", "terminated", "truncated", "success", "lost")
        return StepOutcome(*(torch.cat([getattr(o, name) for o in outcomes]) for name in fields))

    def observe(self, env_ids: Tensor, images: bool) -> Observation:
        one = torch.zeros(1, dtype=torch.int64)
        if not len(env_ids):
            return self._envs[0].observe(one[:0], images)
        return Observation.concatenate([self._envs[i].observe(one, images) for i in env_ids.tolist()])

    def render(self, env_ids: Tensor) -> Tensor:
        return torch.cat([self._envs[i].render(torch.zeros(1, dtype=torch.int64)) for i in env_ids.tolist()])

    def state_dict(self) -> dict[str, Any]:
        return {"envs": [env.state_dict() for env in self._envs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for env, own in zip(self._envs, state["envs"], strict=True):
            env.load_state_dict(own)

    def close(self) -> None:
        for env in self._envs:
            env.close()


def make_robots(num_envs: int) -> SideBySide:
    return SideBySide([make_robot()[0] for _ in range(num_envs)])
