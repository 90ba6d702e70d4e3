"""The control loop: at a fixed rate it reads the arm and the cameras, gives observations to the policy, takes actions
from the chunk broker, and hands them to the guarded arm. It never waits for the policy.

Where nothing fresh is to be had (a dead policy, a frozen camera, a silent teleoperation device) the arm holds, and
after `grace_s` it is stopped. A person may take over at any tick, and every tick says who moved the arm.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vla_rl.real_robot.inference import Inference, Reply
from vla_rl.real_robot.interfaces import ArmState, Camera, Command, HardwareError, Picture, Teleop, TeleopSample, Vector
from vla_rl.real_robot.loop_config import LoopConfig
from vla_rl.real_robot.modes import Event, Mode
from vla_rl.real_robot.supervisor import Applied, GuardedArm
from vla_rl.real_robot.takeover import Control, Takeover
from vla_rl.serving.broker import ChunkBroker

Actions = NDArray[np.floating]
_BRAKING_S = 5.0


class StartRefusedError(RuntimeError):
    """The arm must not be started now; the message says why."""


def joint_targets(action: Actions, standing: Command) -> Command:
    """An action of J joint targets, rad, and a gripper width, m. Raises ValueError for another size."""
    if action.shape != (len(standing.position) + 1,):
        raise ValueError(f"an action of joint targets has {len(standing.position) + 1} numbers, got {action.shape}")
    return Command(np.asarray(action[:-1], dtype=float), float(action[-1]))


def joints_and_gripper(state: ArmState) -> NDArray[np.float32]:
    """The state of a policy that sees the joints, rad, and the gripper's width, m: [J + 1]."""
    return np.append(state.position, state.gripper).astype(np.float32)


@dataclass(frozen=True)
class LoopParts:
    """What the loop runs. All connected already. `to_command`: an action [A] and the standing target to the next
    target; a ValueError of it stops the arm. `observe`: an arm's state to the policy's [S]. `policy_problem`: what is
    wrong with the policy whether or not it owes a reply, "" for nothing. `on_tick`: sees every tick, and must be
    quick."""

    arm: GuardedArm
    cameras: Sequence[Camera]
    inference: Inference
    to_command: Callable[[Actions, Command], Command] = joint_targets
    observe: Callable[[ArmState], NDArray[np.float32]] = joints_and_gripper
    teleop: Teleop | None = None
    takeover: Takeover | None = None
    policy_problem: Callable[[], str] = str
    on_tick: Callable[[Tick], object] | None = None


class Tick(NamedTuple):
    """One period. `source`: whose command it was. `proposal`: the policy's action [A], also while a person drives.
    `wanted`: the command before the filter, `applied`: what reached the arm; None where nothing did. `observation`:
    what went to the policy in this tick, None where nothing did. `reply`: came in this tick. `late_s`: after its
    deadline."""

    at: float
    mode: Mode
    source: Control
    state: ArmState
    pictures: Mapping[str, Picture]
    proposal: Actions | None
    wanted: Command | None
    applied: Command | None
    clamps: tuple[str, ...]
    observation: Mapping[str, Any] | None
    reply: Reply | None
    problem: str
    late_s: float


@dataclass
class LoopReport:
    """`late_s`: of the newest ticks, how long after its deadline each began. `latency_s`: of inference."""

    ticks: int = 0
    missed: int = 0
    held: int = 0
    clamped: int = 0
    failures: int = 0
    stop_reason: str = ""
    late_s: deque[float] = field(default_factory=lambda: deque(maxlen=100_000))
    latency_s: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))

    def summary(self) -> dict[str, float | int | str]:
        """For a log: counts, and percentiles in ms."""
        out: dict[str, float | int | str] = {
            name: getattr(self, name) for name in ("ticks", "missed", "held", "clamped", "failures", "stop_reason")
        }
        for name, values in (("late", self.late_s), ("latency", self.latency_s)):
            for q in (50, 99):
                out[f"{name}_p{q}_ms"] = round(1000 * float(np.percentile(values, q)), 3) if values else 0.0
        return out


class ControlLoop:
    """`start` (or `start(shadow=True)`), then `run`. Not thread-safe but for `finish`."""

    def __init__(self, parts: LoopParts, config: LoopConfig) -> None:
        """Raises ValueError where only one of teleop and takeover is given."""
        if (parts.teleop is None) != (parts.takeover is None):
            raise ValueError("LoopParts: give teleop and takeover, or neither")
        self.parts, self.config = parts, config
        self.report = LoopReport()
        self.broker = ChunkBroker(config.broker)
        self.mode = Mode.IDLE
        self._period = 1.0 / parts.arm.spec.rate_hz
        self._finishing = False
        self._sequence = 0
        self._standing: Command | None = None  # the target that the arm has
        self._ramp: tuple[float, Vector] | None = None  # since when, and from where
        self._held_since = 0.0
        self._problem = self._hold_reason = ""
        self._planned_at = -np.inf  # capture of the observation of the newest chunk
        self._changed: dict[str, tuple[int, float]] = {}  # camera: its newest own stamp, and when we first saw that

    # ------------------------------------------------------------------------------------------------------- starting
    def start(self, *, shadow: bool = False) -> None:
        """Waits for fresh streams and the first chunk, then arms. In shadow everything runs and nothing is sent.

        Raises StartRefusedError where a stream stays stale, no chunk comes, the first target is too far from the
        measured pose, or the guard refuses.
        """
        end = time.monotonic() + self.config.start_timeout_s
        self._finishing = False
        _, self.mode, stopped = self.parts.arm.read()
        if stopped:
            raise StartRefusedError(f"the arm was stopped: {stopped}; see to it, then reset")
        self._wait_for_streams(end)
        state, action = self._first_action(end)
        self._standing = Command(state.position.copy(), state.gripper)
        first = self.parts.to_command(action, self._standing)
        away = np.abs(first.position - state.position)
        if not shadow and not away.max() <= self.config.start_tolerance:
            joint = self.parts.arm.spec.joint_names[int(np.argmax(away))]
            raise StartRefusedError(
                f"the first target of {joint} is {away.max():.3f} rad from the measured pose, allowed "
                f"{self.config.start_tolerance}; bring the arm to where the policy begins"
            )
        try:
            self.mode = self.parts.arm.fire(Event.SHADOW if shadow else Event.START)
        except (ValueError, RuntimeError) as error:
            raise StartRefusedError(str(error)) from error
        self._begin_ramp(time.monotonic())

    def _wait_for_streams(self, end: float) -> None:
        """Until the arm answers and every camera has shown two different pictures."""
        first: dict[str, int | None] = {}
        while True:
            now = time.monotonic()
            _, pictures, problem = self._look(now)
            stamps = {name: picture.source_stamp_ns for name, picture in pictures.items()}
            moving = all(
                stamps.get(camera.name) != first.setdefault(camera.name, stamps.get(camera.name))
                for camera in self.parts.cameras
            )
            if not problem and moving:
                return
            problem = problem or "a camera repeats its picture"
            if now > end:
                raise StartRefusedError(f"not every stream is fresh: {problem}")
            time.sleep(self._period)

    def _first_action(self, end: float) -> tuple[ArmState, Actions]:
        self.broker.flush(time.monotonic())
        error = "no answer"
        while time.monotonic() < end:
            now = time.monotonic()
            state, pictures, problem = self._look(now)
            if not problem:
                self._ask(state, pictures, now)
            if (reply := self._take_reply(time.monotonic())) is not None and reply.error:
                error = reply.error
            if (action := self.broker.action_at(time.monotonic())) is not None:
                return state, action
            time.sleep(self._period / 4)
        raise StartRefusedError(f"the policy gives no actions within {self.config.start_timeout_s} s: {error}")

    # -------------------------------------------------------------------------------------------------------- running
    def finish(self) -> None:
        """Ends `run`: the arm is braked to rest and disarmed. From any thread."""
        self._finishing = True

    def run(self, duration_s: float | None = None) -> LoopReport:
        """Ticks until `finish`, `duration_s` seconds, or a stop. Call it right after `start`: the guard takes a silent
        loop for a dead one. Whatever is raised, Ctrl-C too, stops the arm first."""
        begun = deadline = time.monotonic()
        try:
            while True:
                time.sleep(max(0.0, deadline - time.monotonic()))
                self.tick(deadline)
                over = duration_s is not None and deadline + self._period - begun >= duration_s
                if self.mode is Mode.ESTOP or self._finishing or over:
                    break
                # Absolute deadlines: no drift. What is missed is skipped, never caught up in a burst.
                skipped = int((time.monotonic() - deadline) / self._period)
                self.report.missed += skipped
                deadline += (skipped + 1) * self._period
            self._disarm(deadline + self._period)
        except BaseException as error:
            self._stop(f"the control loop ended with {type(error).__name__} {error}".strip())
            raise
        return self.report

    def tick(self, due: float | None = None) -> Tick:
        """One period, which is due now or was at `due`: look, think, decide, act. Chunks are played on the grid of
        deadlines: by the clock, a tick that comes a little early after a late one would get the action before once
        more."""
        now = time.monotonic()
        due = now if due is None else due
        late_s = now - due
        state, pictures, problem = self._look(now)
        reply = self._take_reply(now)
        observation = None if problem else self._ask(state, pictures, due)
        source, human, sampled = self._human(state, now)
        proposal = self.broker.action_at(due)  # after the person, whose coming and going voids what was planned
        wanted: Command | None = None
        if self.mode is Mode.HUMAN:
            wanted = human
        elif self.mode in (Mode.RUN, Mode.HOLD, Mode.SHADOW):
            wanted = self._policy(proposal, problem or sampled, source, now)
        applied = self._apply(wanted)
        source = Control.HOLD if self.mode is Mode.HOLD or wanted is None else source
        problem = problem or self._problem or (self._hold_reason if self.mode is Mode.HOLD else "")
        tick = Tick(
            now, self.mode, source, state, pictures, proposal, wanted,
            applied.command, applied.clamps, observation, reply, problem, late_s,
        )  # fmt: skip
        self._count(tick)
        if self.parts.on_tick is not None:
            self.parts.on_tick(tick)
        return tick

    # ------------------------------------------------------------------------------------------------------- observing
    def _look(self, now: float) -> tuple[ArmState, dict[str, Picture], str]:
        """The newest of every stream, and what is wrong with one."""
        state, self.mode, self.report.stop_reason = self.parts.arm.read()
        pictures: dict[str, Picture] = {}
        problem = ""
        for camera in self.parts.cameras:
            try:
                picture = pictures[camera.name] = camera.latest()
            except HardwareError as error:
                problem = str(error)
                continue
            stamp, since = self._changed.get(camera.name, (None, now))
            if picture.source_stamp_ns != stamp:
                since = picture.stamp
            self._changed[camera.name] = (picture.source_stamp_ns, since)
            if now - picture.stamp > self.config.max_picture_age_s:
                problem = f"camera {camera.name}: its picture is {now - picture.stamp:.3f} s old"
            elif now - since > self.config.max_picture_age_s:
                problem = f"camera {camera.name}: frozen for {now - since:.3f} s"
        return state, pictures, problem

    def _ask(self, state: ArmState, pictures: Mapping[str, Picture], now: float) -> Mapping[str, Any] | None:
        """The observation, where the policy was free to take it."""
        if self.parts.inference.busy or self._has_enough(now):
            return None
        images = {name: picture.image for name, picture in pictures.items()}
        observation = {"images": images, "state": self.parts.observe(state), "prompt": self.config.prompt}
        observation |= self.broker.continuation(now)  # where the motion was going, for real-time chunking
        return observation if self.parts.inference.submit(observation, now) else None

    def _has_enough(self, now: float) -> bool:
        """In mode sync the policy is asked once the chunk is used up."""
        return self.config.broker.mode == "sync" and self.broker.remaining(now) > 0

    def _take_reply(self, now: float) -> Reply | None:
        reply = self.parts.inference.poll()
        if reply is None:
            return None
        self.report.latency_s.append(reply.latency_s)
        if reply.actions is None:
            self.report.failures += 1
            self._problem = reply.error
            self.broker.flush(now)  # what is left of the plan is not worth moving for: hold
        else:
            self._problem = ""
            if self.broker.offer(reply.actions, reply.observed_at, reply.sequence, now):
                self._planned_at = reply.observed_at
        return reply

    # -------------------------------------------------------------------------------------------------------- deciding
    def _human(self, state: ArmState, now: float) -> tuple[Control, Command | None, str]:
        """Who has the arm, the person's command, and why nobody may have it."""
        teleop, takeover, standing = self.parts.teleop, self.parts.takeover, self._standing
        if teleop is None or takeover is None or standing is None or self.mode in (Mode.IDLE, Mode.SHADOW, Mode.ESTOP):
            return Control.POLICY, None, ""
        sample: TeleopSample | None
        try:
            sample = teleop.read()
        except HardwareError:
            sample = None
        human = takeover.update(sample, standing, state.position, now)
        if human.changed:
            self.broker.flush(now)  # it was planned for another course
        if human.control is Control.HUMAN and self.mode is not Mode.HUMAN:
            self.mode = self.parts.arm.fire(Event.TAKEOVER)
        elif human.control is not Control.HUMAN and self.mode is Mode.HUMAN:
            self.mode = self.parts.arm.fire(Event.RELEASE, human.reason)
            self._held_since = now
        return human.control, human.command, human.reason

    def _policy(self, proposal: Actions | None, problem: str, control: Control, now: float) -> Command | None:
        """The policy's command; None to hold. Changes between RUN and HOLD, and stops after the grace time."""
        assert self._standing is not None
        problem = problem or self.parts.policy_problem()
        age = self.config.max_plan_age_s
        if age is not None and now - self._planned_at > age:
            problem = problem or f"the policy's plan is {now - self._planned_at:.3f} s old"
        able = proposal is not None and not problem and control is Control.POLICY
        self._hold_reason = "" if able else problem or self._problem or "no action"
        if self.mode is Mode.SHADOW:
            return None if proposal is None else self._command(proposal)
        if not able:
            if self.mode is Mode.RUN:
                self.mode = self.parts.arm.fire(Event.HOLD, self._hold_reason)
                self._held_since = now
            elif now - self._held_since > self.config.grace_s:
                why = problem or self._problem or "the policy gives no actions"
                self._stop(f"held for {self.config.grace_s} s: {why}")
            return None
        assert proposal is not None
        if self.mode is Mode.HOLD:
            self.mode = self.parts.arm.fire(Event.RESUME)
            self._begin_ramp(now)
        command = self._command(proposal)
        return None if command is None else self._ramped(command, now)

    def _command(self, proposal: Actions) -> Command | None:
        """None where the policy's action is none: the arm is stopped then."""
        assert self._standing is not None
        try:
            return self.parts.to_command(proposal, self._standing)
        except ValueError as error:
            self._stop(f"the policy's action is refused: {error}")
            return None

    def _begin_ramp(self, now: float) -> None:
        assert self._standing is not None
        self._ramp = (now, self._standing.position.copy())

    def _ramped(self, command: Command, now: float) -> Command:
        if self._ramp is None:
            return command
        since, begin = self._ramp
        share = (now - since) / self.config.ramp_s if self.config.ramp_s > 0 else 1.0
        if share >= 1.0:
            self._ramp = None
            return command
        return Command(begin + max(share, 0.0) * (command.position - begin), command.gripper)

    # ---------------------------------------------------------------------------------------------------------- acting
    def _apply(self, wanted: Command | None) -> Applied:
        """Sends also where the arm holds: to the guard a silent loop is a dead one."""
        if not self.mode.sends:
            return Applied(None, (), self.mode, self.report.stop_reason)
        assert self._standing is not None
        self._sequence += 1
        command = wanted or self._standing
        applied = self.parts.arm.apply(Command(command.position, command.gripper, self._sequence))
        self.mode, self.report.stop_reason = applied.mode, applied.stop_reason
        if applied.command is not None:
            self._standing = applied.command
        return applied

    def _disarm(self, deadline: float) -> None:
        """Brake to rest, then disarm."""
        if self.mode is Mode.RUN:
            self.mode = self.parts.arm.fire(Event.HOLD, "finished")
        elif self.mode is Mode.HUMAN:
            self.mode = self.parts.arm.fire(Event.RELEASE, "finished")
        still, end = 0, time.monotonic() + _BRAKING_S
        while self.mode is Mode.HOLD and still < 3:
            if time.monotonic() > end:
                return self._stop(f"not at rest after {_BRAKING_S} s of braking")
            time.sleep(max(0.0, deadline - time.monotonic()))
            deadline = max(deadline, time.monotonic() - self._period) + self._period
            before = self._standing
            self._apply(None)
            after = self._standing
            same = before is not None and after is not None and np.array_equal(before.position, after.position)
            still = still + 1 if same else 0
        if self.mode in (Mode.HOLD, Mode.SHADOW):
            self.mode = self.parts.arm.fire(Event.FINISH)

    def _stop(self, reason: str) -> None:
        try:
            self.parts.arm.stop(reason)
        except HardwareError as error:  # the supervisor is gone or will find us silent
            reason = f"{reason} ({error})"
        self.mode, self.report.stop_reason = Mode.ESTOP, reason

    def _count(self, tick: Tick) -> None:
        report = self.report
        report.ticks += 1
        report.held += tick.mode is Mode.HOLD
        report.clamped += bool(tick.clamps)
        report.late_s.append(tick.late_s)


__all__ = [
    "ControlLoop", "LoopParts", "LoopReport", "StartRefusedError", "Tick", "joint_targets",
    "joints_and_gripper",
]  # fmt: skip
