"""The safety filter: last before the hardware, whatever the source of a command. Not a safety-rated function.

The order: shape, finite, age and sequence, mode, workspace, step against the measurement, position limits with their
margin, velocity, acceleration and jerk. What the filter gives is always safe to send: where it stops or holds, that is
the last target, to which motion is braked within the limits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from vla_rl.real_robot.interfaces import ArmSpec, ArmState, Command, Vector
from vla_rl.real_robot.kinematics import Chain, ForwardKinematics
from vla_rl.real_robot.limits import MotionLimiter
from vla_rl.real_robot.modes import Event, Mode, ModeMachine

_PATH_POINTS = np.linspace(0.0, 1.0, 17)


@dataclass(frozen=True)
class SafetyConfig:
    """`chain`: of the tool, for the box; without one `workspace_low` and `workspace_high`, m in the base frame, must be
    None. The floor is the box's lower z.

    `max_step`: rad that a target may be away from the measured position. `position_margin`: rad inside of the position
    limits. `speed_scale`: share of the arm's velocity limits that is used, and its square and cube of acceleration and
    jerk, so that paths keep their shape.
    `max_state_age_s`: of the measurement. `min_spacing`: share of a period below which a command is too early; the
    target sent last is repeated then.
    `max_clamped_fraction`: of the commands within `clamp_window_s` that may be changed by more than `clamp_tolerance`
    rad; more stop the arm.
    """

    chain: Chain | None = None
    workspace_low: tuple[float, float, float] | None = None
    workspace_high: tuple[float, float, float] | None = None
    max_step: float = 0.35
    position_margin: float = 0.02
    speed_scale: float = 0.5
    max_state_age_s: float = 0.12
    min_spacing: float = 0.5
    max_clamped_fraction: float = 0.5
    clamp_window_s: float = 1.0
    clamp_tolerance: float = 0.02

    def __post_init__(self) -> None:
        boxed = self.workspace_low is not None and self.workspace_high is not None
        if (self.workspace_low is None) != (self.workspace_high is None) or boxed != (self.chain is not None):
            raise ValueError("SafetyConfig: give workspace_low, workspace_high and chain together, or none of them")
        positive = ("max_step", "speed_scale", "max_state_age_s", "clamp_window_s")
        if wrong := [name for name in positive if not getattr(self, name) > 0]:
            raise ValueError(f"SafetyConfig: {', '.join(wrong)} must be positive")
        if not 0 < self.speed_scale <= 1 or self.position_margin < 0 or not 0 <= self.min_spacing < 1:
            raise ValueError("SafetyConfig: speed_scale in (0, 1], position_margin >= 0, min_spacing in [0, 1)")


@dataclass(frozen=True)
class Filtered:
    """`command`: what to send, None where nothing may be sent. `clamps`: the checks that changed the command.
    `stop_reason`: not "" once the filter has stopped; it stays until a reset."""

    command: Command | None
    clamps: tuple[str, ...] = ()
    stop_reason: str = ""


class SafetyFilter:
    """One for each arm, in the process that owns it. `modes` decides whether anything is sent; a stop fires into it.

    Commands are setpoints of one control period each: limits hold for the stream at `spec.rate_hz`, a late command
    never catches up by a larger step.
    """

    def __init__(self, spec: ArmSpec, config: SafetyConfig | None = None, modes: ModeMachine | None = None) -> None:
        """Raises ValueError where the chain has another number of joints or the margin leaves no room."""
        self.spec, self.config = spec, config or SafetyConfig()
        self.modes = modes or ModeMachine()
        c = self.config
        self._kinematics = ForwardKinematics(c.chain) if c.chain else None
        if self._kinematics and self._kinematics.num_joints != spec.num_joints:
            raise ValueError(f"the chain has {self._kinematics.num_joints} joints, {spec.name} has {spec.num_joints}")
        self._box = np.array([c.workspace_low, c.workspace_high], dtype=float) if c.workspace_low else None
        self._limiter = MotionLimiter(
            spec.position_low + c.position_margin,
            spec.position_high - c.position_margin,
            spec.max_velocity * c.speed_scale,
            spec.max_acceleration * c.speed_scale**2,
            spec.max_jerk * c.speed_scale**3,
            1 / spec.rate_hz,
        )
        self._period = 1 / spec.rate_hz
        self._sent: Command | None = None
        self._sent_at = -np.inf
        self._sequence = -1
        self._recent: deque[tuple[float, bool]] = deque()
        self._clamped = 0

    # ------------------------------------------------------------------------------------------------------ arming
    def refusal(self, state: ArmState, now: float) -> str:
        """Why the arm must not be armed in `state`; "" where it may."""
        if problem := self.state_problem(state, now):
            return problem
        outside = (state.position < self.spec.position_low) | (state.position > self.spec.position_high)
        if outside.any():
            names = ", ".join(np.array(self.spec.joint_names)[outside])
            return f"{names} outside of the position limits; move the arm inside by hand"
        if self._kinematics and not self._in_box(state.position):
            return f"the tool is at {np.round(self._kinematics(state.position), 3)} m, outside of the workspace box"
        return ""

    def start(self, state: ArmState, now: float, event: Event = Event.START) -> None:
        """Arm: the state to limit from is at rest where the arm is. Raises ValueError where `refusal` says why not,
        ModeError where the mode does not allow it: after a stop, `reset` comes first."""
        if why := self.refusal(state, now):
            raise ValueError(f"{self.spec.name} is not armed: {why}")
        self.modes.fire(event, now)
        self._begin(state)

    def reset(self, now: float) -> None:
        """Forget a stop. Arms nothing: `start` must follow."""
        self.modes.fire(Event.RESET, now)

    def stop(self, reason: str, now: float) -> None:
        """The software e-stop: latches."""
        self.modes.fire(Event.STOP, now, reason)

    # ---------------------------------------------------------------------------------------------------- filtering
    def filter(self, command: Command, state: ArmState, now: float) -> Filtered:
        """What to send for `command`, in control period `now` (s, `time.monotonic()`)."""
        if self.modes.mode is not Mode.ESTOP and (problem := self._problem(command) or self.state_problem(state, now)):
            self.stop(problem, now)
        if not (self.modes.mode.sends or self.modes.mode is Mode.ESTOP):
            return Filtered(None)
        if self._sent is not None and now - self._sent_at < self.config.min_spacing * self._period:
            return Filtered(self._sent, ("early",), self.modes.stop_reason)
        if self.modes.mode in (Mode.HOLD, Mode.ESTOP):
            return self._hold(state, (), now)
        if command.sequence <= self._sequence:
            self._count(now, clamped=True)
            return self._hold(state, ("sequence",), now)
        self._sequence = command.sequence
        return self._move(command, state, now)

    def _move(self, command: Command, state: ArmState, now: float) -> Filtered:
        clamps = []
        wanted = np.asarray(command.position, dtype=float)
        target = self._shortened(wanted)
        if target is not wanted:
            clamps.append("workspace")
        near = np.clip(target, state.position - self.config.max_step, state.position + self.config.max_step)
        if (near != target).any():
            clamps.append("step")
        inside = np.clip(near, self._limiter.low, self._limiter.high)
        if (inside != near).any():
            clamps.append("position")
        position, rate_clamped = self._limited(inside)
        if rate_clamped:
            clamps.append("rate")
        gripper = float(np.clip(command.gripper, *self.spec.gripper_range))
        if gripper != command.gripper:
            clamps.append("gripper")
        self._count(now, clamped=bool(np.abs(position - wanted).max() > self.config.clamp_tolerance))
        self._sent, self._sent_at = Command(position, gripper, command.sequence), now
        return Filtered(self._sent, tuple(clamps), self.modes.stop_reason)

    def _limited(self, target: Vector) -> tuple[Vector, bool]:
        """The next setpoint. Where it, or the end of the stop after it, is outside of the box, the stop before it goes
        on, whose end was inside."""
        position = self._limiter.step(target)
        if self._kinematics and not (self._in_box(position) and self._in_box(self._limiter.stop_position)):
            position = self._limiter.undo_and_brake()
        return position, bool((position != target).any())

    def _shortened(self, wanted: Vector) -> Vector:
        """`wanted`, or the last point on the way to it from the last target before the tool leaves the box."""
        if self._kinematics is None or self._in_box(wanted):
            return wanted
        begin = self._limiter.position
        points = begin + _PATH_POINTS[:, None] * (np.clip(wanted, -2 * np.pi, 2 * np.pi) - begin)
        inside = np.cumprod(self._in_box(points))
        return points[max(int(inside.sum()) - 1, 0)]

    def _in_box(self, joints: Vector) -> np.ndarray:
        assert self._kinematics is not None
        assert self._box is not None
        tool = self._kinematics(joints)
        return np.all((tool >= self._box[0]) & (tool <= self._box[1]), axis=-1)

    # --------------------------------------------------------------------------------------------------------- checks
    def _problem(self, command: Command) -> str:
        joints = self.spec.num_joints
        try:
            position, gripper = np.asarray(command.position, dtype=float), np.asarray(command.gripper, dtype=float)
        except (TypeError, ValueError):
            return "a command that is not made of numbers"
        if position.shape != (joints,) or gripper.shape != ():
            return f"a command of shape {position.shape} and {gripper.shape}, expected ({joints},) and ()"
        if not (np.isfinite(position).all() and np.isfinite(gripper)):
            return "a command with values that are not finite"
        return ""

    def state_problem(self, state: ArmState, now: float) -> str:
        """Why an armed arm must be stopped in `state`; "" where it need not."""
        if state.fault:
            return f"the robot reports {state.fault}"
        if state.position.shape != (self.spec.num_joints,) or not np.isfinite(state.position).all():
            return "a measurement of the wrong shape or not finite"
        if not now - state.stamp <= self.config.max_state_age_s:
            return f"a measurement {now - state.stamp:.3f} s old, allowed {self.config.max_state_age_s} s"
        return ""

    def _hold(self, state: ArmState, clamps: tuple[str, ...], now: float) -> Filtered:
        """Brake to the last target; the measured position where nothing was sent, never zeros."""
        if self._sent is None:
            if state.position.shape != (self.spec.num_joints,) or not np.isfinite(state.position).all():
                return Filtered(None, clamps, self.modes.stop_reason)  # nobody knows where it is: the driver holds
            self._begin(state)
            gripper = float(np.clip(np.nan_to_num(state.gripper), *self.spec.gripper_range))
            self._sent = Command(self._limiter.position.copy(), gripper, self._sequence)
        else:
            self._sent = Command(self._limiter.brake(), self._sent.gripper, self._sent.sequence)
        self._sent_at = now
        return Filtered(self._sent, clamps, self.modes.stop_reason)

    def _begin(self, state: ArmState) -> None:
        self._limiter.reset(state.position)
        self._sent, self._sent_at, self._sequence = None, -np.inf, -1
        self._recent.clear()
        self._clamped = 0

    def _count(self, now: float, *, clamped: bool) -> None:
        """Stops where too many are clamped, judged over a whole window: the first commands after a start are few."""
        self._recent.append((now, clamped))
        self._clamped += clamped
        while self._recent[0][0] < now - self.config.clamp_window_s:
            self._clamped -= self._recent.popleft()[1]
        full = 0.9 * self.config.clamp_window_s / self._period
        if len(self._recent) >= full and self._clamped > self.config.max_clamped_fraction * len(self._recent):
            window = self.config.clamp_window_s
            self.stop(f"{self._clamped} of {len(self._recent)} commands of {window} s were clamped", now)
