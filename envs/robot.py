"""An arm on a table behind the one contract: evaluation and reinforcement learning run on it unchanged.

`RobotStepEnv` makes a step environment of a guarded arm (`Guard(arm)` in this process, or `SupervisorClient`), its
cameras, a mapping of actions to commands and a source of success. It keeps real time, moves the arm only through the
guard's safety filter, and takes it home through that filter for a reset. Between two chunks, while the policy thinks,
the arm stands: `KeptAlive(guarded_arm)` repeats the standing target then, for arms and supervisors that take silence
for a dead program. `ChunkedEnv(RobotStepEnv(...))` is the chunked environment, `RobotGymEnv` the Gymnasium one.

A person may take over at any step (`teleop`, `takeover`): `StepOutcome.taken` says what was executed in place of the
policy's proposals, and whose it was.

Where the arm reports a fault, the filter stops, or a stream grows stale, the arm holds and the episode is lost
(`StepOutcome.lost`): it counts apart, and nothing is learnt from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla_rl.core import CameraSpec, EnvSpec, Observation, Source, Taken
from vla_rl.envs.robot_actions import ActionMapping
from vla_rl.protocols import StepOutcome
from vla_rl.real_robot.interfaces import (
    ArmState,
    Camera,
    Command,
    HardwareError,
    Picture,
    Teleop,
    TeleopSample,
    Vector,
)
from vla_rl.real_robot.modes import Event, Mode
from vla_rl.real_robot.supervisor import GuardedArm
from vla_rl.real_robot.takeover import Control, Takeover

_GYM_SEED_LIMIT = 2**31


@dataclass(frozen=True)
class Clock:
    """Monotonic seconds, and waiting; another one in tests."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class RobotEnvConfig:
    """`max_age_s`: a state or picture older than that ends the episode. `home_noise` rad: half width of the uniform
    noise that an episode's seed adds to the home pose. `home_speed` rad/s, `home_tolerance` rad and `home_timeout_s`:
    of the motion home. `success_button`, `failure_button`: of the teleoperation device; "" for none."""

    name: str
    instruction: str
    control_hz: float = 10.0
    max_episode_steps: int | None = 200
    max_age_s: float = 0.2
    home_noise: float = 0.0
    home_speed: float = 0.3
    home_tolerance: float = 0.02
    home_timeout_s: float = 20.0
    success_button: str = "success"
    failure_button: str = ""

    def __post_init__(self) -> None:
        if not (self.control_hz > 0 and self.home_speed > 0 and self.max_age_s > 0):
            raise ValueError(f"RobotEnvConfig: control_hz, home_speed and max_age_s must be positive, got {self}")


@dataclass(frozen=True)
class RobotParts:
    """What the environment is made of. The arm is connected, and closed by who made it; cameras and teleoperation are
    connected by `RobotStepEnv` and closed by its `close`.

    `success`: says of an observation [1] with pictures whether the task is done: a classifier, a topic of the twin;
    None where only a button does. `failure`: the same of an episode that is lost for good. `confirm`: tells a person
    what to do (put the scene back, look why the arm stopped) and returns when it is done. Without it nobody puts the
    scene back, and a stop ends the run. `begin`: puts arm and scene where the episode of a seed begins, while the guard
    is disarmed, and returns its instruction; None: the arm goes home, a person puts the scene back, and the instruction
    is the config's. `state_of` makes the state [S] named `state_names`; None: joints and gripper width.
    """

    arm: GuardedArm
    mapping: ActionMapping
    cameras: Sequence[Camera] = ()
    success: Callable[[Observation], bool] | None = None
    failure: Callable[[Observation], bool] | None = None
    begin: Callable[[int], str] | None = None
    confirm: Callable[[str], object] | None = None
    teleop: Teleop | None = None
    takeover: Takeover | None = None
    state_names: tuple[str, ...] = ()
    state_of: Callable[[ArmState], NDArray[np.floating]] | None = None
    clock: Clock = field(default_factory=Clock)


@dataclass(frozen=True)
class _Shown:
    """Everything that was seen at one moment."""

    arm: ArmState
    pictures: Mapping[str, Picture]


class RobotStepEnv:
    """A `StepEnv` of one arm, in real time.

    `num_late`: steps that began more than half a period late, as the first after a slow policy does. Raises
    HardwareError where the hardware does not answer when it is built, or an arm does not come home.
    """

    num_envs = 1

    def __init__(self, parts: RobotParts, config: RobotEnvConfig) -> None:
        if (parts.teleop is None) != (parts.takeover is None):
            raise ValueError("RobotParts: give teleop and takeover, or neither")
        if (parts.state_of is None) != (not parts.state_names):
            raise ValueError("RobotParts: give state_of and state_names, or neither")
        self.parts, self.config = parts, config
        self.num_late = 0
        self._instruction = config.instruction
        self._num_clamped, self._clamped = 0, False
        self._period = 1.0 / config.control_hz
        self._due = -np.inf
        self._target: Command | None = None
        self._buttons: Mapping[str, bool] = {}
        self._executed: tuple[Vector, Source] | None = None  # by the last step, where a person can take over
        self._source_stamps: dict[str, tuple[int, float]] = {}  # camera: its newest stamp, when we first saw that
        try:
            self._connect()
            self._shown = self._look()
        except BaseException:
            self.close()
            raise
        joints = parts.arm.spec.joint_names
        self.spec = EnvSpec(
            name=config.name,
            cameras={name: CameraSpec(*p.image.shape[:2]) for name, p in self._shown.pictures.items()},
            state_names=parts.state_names or (*joints, "gripper"),
            action=parts.mapping.action,
            max_episode_steps=config.max_episode_steps,
            control_hz=config.control_hz,
        )

    # ------------------------------------------------------------------------------------------------- the contract
    def reset(self, env_ids: Tensor, seeds: Tensor) -> None:
        """Begin the episode of its seed: see `RobotParts.begin`. Home has the noise of the seed."""
        if not len(env_ids):
            return
        if self.parts.begin is not None:
            self._disarm()
            self._instruction = self.parts.begin(int(seeds[0]))
            self._arm()
        else:
            self._go_home(int(seeds[0]))
        self._executed = None
        self._num_clamped = 0
        self._due = -np.inf
        self._shown = self._look()

    def _go_home(self, seed: int) -> None:
        spec, config = self.parts.arm.spec, self.config
        noise = np.random.default_rng(seed).uniform(-1.0, 1.0, spec.num_joints) * config.home_noise
        home = np.clip(spec.home + noise, spec.position_low, spec.position_high)
        self._arm()
        self._move_to(Command(home, spec.gripper_range[1]))
        if self.parts.confirm is not None:
            self.parts.confirm(f"{config.name}: put the scene back for: {config.instruction}")

    def step(self, actions: Tensor, active: Tensor) -> StepOutcome:
        if not bool(active[0]):
            return self._outcome()
        now = self._pace()
        action = self.spec.action.clamp(actions)[0].double().numpy()
        try:
            self._act(action, now)
            self.parts.clock.sleep(max(0.0, self._due - self.parts.clock.now()))
            self._shown = self._look()
            problem = self._problem()
        except HardwareError as error:
            problem = str(error)
        if problem:
            self.parts.arm.stop(problem)
            return self._outcome(lost=True)
        success, failed = (
            bool(self._buttons.get(button, False)) or (says is not None and bool(says(self._observation(True))))
            for button, says in (
                (self.config.success_button, self.parts.success),
                (self.config.failure_button, self.parts.failure),
            )
        )
        return self._outcome(success=success, failed=failed)

    def observe(self, env_ids: Tensor, images: bool) -> Observation:
        return self._observation(images).select(env_ids)

    def render(self, env_ids: Tensor) -> Tensor:
        """The first camera's picture; raises HardwareError for an arm without cameras."""
        if not self._shown.pictures:
            raise HardwareError(f"{self.config.name} has no camera, so there is nothing to record")
        picture = next(iter(self._shown.pictures.values()))
        return torch.from_numpy(picture.image.copy())[None][env_ids]

    def state_dict(self) -> dict[str, Any]:
        """Where the arm stands; the world around it cannot be saved."""
        target = self._standing()
        return {"position": torch.from_numpy(target.position.copy()), "gripper": float(target.gripper)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move the arm to where it stood, through the safety filter. The scene is a person's to restore."""
        self._arm()
        self._move_to(Command(state["position"].numpy().copy(), state["gripper"]))
        if self.parts.confirm is not None:
            self.parts.confirm(f"{self.config.name}: put the scene back to where the run stopped")
        self._shown = self._look()

    def close(self) -> None:
        """Disarm where the arm stands, and close cameras and teleoperation; the first error is raised after all."""
        errors: list[Exception] = []
        devices = [*self.parts.cameras, *([self.parts.teleop] if self.parts.teleop is not None else [])]
        for call in [self._disarm, *(device.close for device in devices)]:
            try:
                call()
            except HardwareError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def clamped_steps(self) -> list[int]:
        """[1], control steps of the running episode in which the safety filter changed the command."""
        return [self._num_clamped]

    # ------------------------------------------------------------------------------------------------------ the arm
    def _connect(self) -> None:
        for camera in self.parts.cameras:
            camera.connect()
        if self.parts.teleop is not None:
            self.parts.teleop.connect()

    def _pace(self) -> float:
        """The moment of this step. One that comes late does not make the next ones hurry."""
        now = self.parts.clock.now()
        if now > self._due + self._period / 2 and np.isfinite(self._due):
            self.num_late += 1
        self._due = now + self._period if now > self._due + self._period / 2 else self._due + self._period
        return now

    def _act(self, action: Vector, now: float) -> None:
        """Execute the policy's action, or the person's, and keep which it was."""
        standing = self._standing()
        who = Source.POLICY
        sample = self._sample()
        if self.parts.takeover is not None:
            human = self.parts.takeover.update(sample, standing, self._shown.arm.position, now)
            self._follow(human.control)
            if human.control != Control.POLICY:
                who = Source.HUMAN
                action = self.parts.mapping.action_of(human.command or standing, standing)
                low, high = np.array(self.spec.action.low), np.array(self.spec.action.high)
                action = np.clip(action, low, high)
            self._executed = action, who
        self._clamped = False
        self._send_along(self.parts.mapping.target(action, standing), now)
        self._num_clamped += self._clamped

    def _send_along(self, target: Command, now: float) -> None:
        """`target` within this step, at the rate at which the arm wants commands, in a straight line."""
        clock, start = self.parts.clock, self._standing().position
        count = max(1, round(self.parts.arm.spec.rate_hz / self.config.control_hz))
        for i in range(1, count + 1):
            position = target.position if i == count else start + (i / count) * (target.position - start)
            self._send(replace(target, position=position, sequence=self._standing().sequence + 1))
            if i < count:
                clock.sleep(max(0.0, now + i * self._period / count - clock.now()))

    def _sample(self) -> TeleopSample | None:
        if self.parts.teleop is None:
            return None
        try:
            sample = self.parts.teleop.read()
        except HardwareError:
            self._buttons = {}
            return None  # a takeover goes on to hold; a policy goes on
        self._buttons = sample.buttons
        return sample

    def _send(self, command: Command) -> None:
        applied = self.parts.arm.apply(command)
        if applied.command is None or applied.stop_reason:
            why = applied.stop_reason or f"nothing may be sent in mode {applied.mode.value}"
            raise HardwareError(f"the arm was stopped: {why}")
        self._clamped |= bool(applied.clamps)
        self._target = applied.command

    def _follow(self, control: Control) -> None:
        """Bring the guard's mode in line with whose commands come."""
        arm = self.parts.arm
        _, mode, _ = arm.read()
        if control == Control.HUMAN and mode in (Mode.RUN, Mode.HOLD):
            mode = arm.fire(Event.TAKEOVER)
        if control != Control.HUMAN and mode is Mode.HUMAN:
            mode = arm.fire(Event.RELEASE)
        if control == Control.POLICY and mode is Mode.HOLD:
            arm.fire(Event.RESUME)

    def _standing(self) -> Command:
        if self._target is None:
            state, _, _ = self.parts.arm.read()
            self._target = Command(state.position.copy(), state.gripper)
        return self._target

    def _move_to(self, goal: Command) -> None:
        """In a straight line in joint space at `home_speed`, through the filter, until the arm is there."""
        clock, config = self.parts.clock, self.config
        deadline = clock.now() + config.home_timeout_s
        planned = self._standing().position.copy()
        while clock.now() < deadline:
            now = clock.now()
            way = goal.position - planned
            longest = float(np.abs(way).max())
            share = 1.0 if longest == 0 else min(1.0, config.home_speed * self._period / longest)
            planned = goal.position.copy() if share == 1.0 else planned + share * way
            self._send(Command(planned, goal.gripper, self._standing().sequence + 1))
            clock.sleep(max(0.0, now + self._period - clock.now()))
            state, _, stopped = self.parts.arm.read()
            if state.fault or stopped:
                break
            arrived = np.abs(state.position - goal.position).max() <= config.home_tolerance
            if arrived and np.allclose(self._standing().position, goal.position, atol=1e-9):
                return
        state, _, stopped = self.parts.arm.read()
        self.parts.arm.stop("the arm does not come home")
        away = np.abs(state.position - goal.position).round(3).tolist()
        raise HardwareError(
            f"{config.name} is not home after {config.home_timeout_s} s (away by {away} rad, stopped by "
            f"{state.fault or stopped or 'nothing'}); look what is in its way, or raise home_timeout_s"
        )

    def _arm(self) -> None:
        """Make the guard ready to send. After a stop a person has to look first: nothing re-arms itself."""
        arm = self.parts.arm
        state, mode, stopped = arm.read()
        if problem := state.fault or stopped:
            if self.parts.confirm is None:
                raise HardwareError(f"{self.config.name} has stopped: {problem}; clear it and start again")
            self.parts.confirm(f"{self.config.name} has stopped: {problem}. Clear it")
        if mode is Mode.ESTOP:
            mode = arm.fire(Event.RESET)
        if self.parts.takeover is not None:
            self.parts.takeover.control = Control.POLICY
            self._follow(Control.POLICY)
        if mode is Mode.IDLE:
            self._target = None  # what stands is where the arm is
            try:
                arm.fire(Event.START)
            except ValueError as error:
                raise HardwareError(str(error)) from error

    def _disarm(self) -> None:
        if self.parts.arm.read()[1].sends:
            self.parts.arm.fire(Event.FINISH)

    # ------------------------------------------------------------------------------------------------- observations
    def _look(self) -> _Shown:
        return _Shown(self.parts.arm.read()[0], {camera.name: camera.latest() for camera in self.parts.cameras})

    def _problem(self) -> str:
        """Why the episode cannot go on, "" where it can."""
        now, state = self.parts.clock.now(), self._shown.arm
        if state.fault:
            return f"the arm reports: {state.fault}"
        if now - state.stamp > self.config.max_age_s:
            return f"the arm's state is {now - state.stamp:.2f} s old"
        for name, picture in self._shown.pictures.items():
            stamp, since = self._source_stamps.get(name, (None, now))
            if picture.source_stamp_ns != stamp:
                since = now
            self._source_stamps[name] = (picture.source_stamp_ns, since)
            age = max(now - picture.stamp, now - since)  # a frozen camera goes on sending one picture
            if age > max(self.config.max_age_s, 2 * self._period):
                return f"camera {name!r} has shown nothing new for {age:.2f} s"
        return ""

    def _observation(self, images: bool) -> Observation:
        state = self._shown.arm
        values = np.append(state.position, state.gripper) if self.parts.state_of is None else self.parts.state_of(state)
        pictures = self._shown.pictures if images else {}
        return Observation(
            {name: torch.from_numpy(picture.image.copy())[None] for name, picture in pictures.items()},
            torch.from_numpy(np.asarray(values, dtype=np.float32))[None],
            (self._instruction,),
        )

    def _outcome(self, *, success: bool = False, failed: bool = False, lost: bool = False) -> StepOutcome:
        def flag(value: bool) -> Tensor:
            return torch.tensor([value])

        taken = None
        if self._executed is not None:
            action, who = self._executed
            taken = Taken(torch.from_numpy(action).float()[None], torch.tensor([int(who)], dtype=torch.int8))
        return StepOutcome(
            torch.tensor([float(success)]), flag(success or failed), flag(False), flag(success), flag(lost), taken=taken
        )


class RobotGymEnv(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """The arm as a Gymnasium environment: a `Dict` of "state" and a picture a camera, actions as in `env.spec.action`.

    `info`: "success", "lost", and, where a person can take over, "action" and "source" that were executed.
    """

    def __init__(self, env: RobotStepEnv) -> None:
        self.env = env
        spec = env.spec
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": spec.control_hz}
        self.render_mode = "rgb_array" if spec.cameras else None
        spaces: dict[str, gym.Space[Any]] = {"state": gym.spaces.Box(-np.inf, np.inf, (spec.state_dim,), np.float32)}
        for name, camera in spec.cameras.items():
            spaces[name] = gym.spaces.Box(0, 255, (camera.height, camera.width, 3), np.uint8)
        self.observation_space: Any = gym.spaces.Dict(spaces)
        low, high = (np.array(bound, dtype=np.float32) for bound in (spec.action.low, spec.action.high))
        self.action_space = gym.spaces.Box(low, high, dtype=np.float32)
        self._one = torch.ones(1, dtype=torch.bool)
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self.env.reset(
            torch.zeros(1, dtype=torch.int64), torch.from_numpy(self.np_random.integers(_GYM_SEED_LIMIT, size=1))
        )
        self._steps = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Raises ValueError for an action that is not finite or of another shape."""
        action = np.asarray(action, dtype=np.float32)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(f"expected a finite action of shape {self.action_space.shape}, got {action}")
        outcome = self.env.step(torch.from_numpy(action)[None], self._one)
        self._steps += 1
        lost = outcome.lost is not None and bool(outcome.lost)
        limit = self.env.spec.max_episode_steps
        truncated = bool(outcome.truncated) or lost or (limit is not None and self._steps >= limit)
        info = {"success": bool(outcome.success), "lost": lost}
        asked = Taken(self.env.spec.action.clamp(torch.from_numpy(action)[None]), torch.tensor([int(Source.POLICY)]))
        taken = outcome.taken or asked
        info |= {"action": taken.actions[0].numpy(), "source": int(taken.source[0])}
        return self._observation(), float(outcome.reward), bool(outcome.terminated), truncated, info

    def render(self) -> np.ndarray:
        return self.env.render(torch.zeros(1, dtype=torch.int64))[0].numpy()

    def close(self) -> None:
        self.env.close()

    def _observation(self) -> dict[str, np.ndarray]:
        obs = self.env.observe(torch.zeros(1, dtype=torch.int64), images=True)
        return {"state": obs.state[0].numpy(), **{name: image[0].numpy() for name, image in obs.images.items()}}


__all__ = [
    "Clock", "RobotEnvConfig", "RobotGymEnv", "RobotParts", "RobotStepEnv",
]  # fmt: skip
