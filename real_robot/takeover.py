"""A person takes the arm over and gives it back, without a jump in either direction.

`Engagement` decides whether somebody wants the arm: a deadman button, or deflection of the device with hysteresis.
`Takeover` turns samples of a device into commands. At the moment of engaging it anchors itself at the last sent target,
so the first command is the one that the arm has already; a leader arm moves relative to where it was engaged. On
release the last human target stands, and whoever runs the policy drops the rest of its chunk (`changed`).

A device that falls silent while a person has the arm is no release: the arm holds until a fresh sample shows that the
person has let go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from vla_rl.real_robot.interfaces import ArmSpec, Command, TeleopSample, Vector

InverseKinematics = Callable[[Vector, Vector], Vector]
"""`solve(position [J], delta [6] m and rad of the tool) -> position [J]` that moves the tool by `delta`."""


class Control(IntEnum):
    """Whose commands go to the arm now."""

    POLICY = 1
    HUMAN = 2
    HOLD = 3


@dataclass(frozen=True)
class EngagementConfig:
    """Deflection (0 at rest, 1 at the stop) that engages, and below which for `release_s` it releases."""

    engage_above: float = 0.05
    release_below: float = 0.02
    release_s: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.release_below < self.engage_above <= 1 or self.release_s < 0:
            raise ValueError(
                f"EngagementConfig: expected 0 <= release_below < engage_above <= 1 and release_s >= 0, got {self}"
            )


class Engagement:
    """Whether the person wants the arm. A deadman button decides alone; without one the deflection does."""

    def __init__(self, config: EngagementConfig) -> None:
        self.config = config
        self.engaged = False
        self._last_deflected = -np.inf

    def update(self, deflection: float, now: float, deadman: bool | None = None) -> bool:
        """`deflection`: largest of the device's axes, 0 to 1. `now`: seconds, monotonic. A deflection that is not a
        number counts as none."""
        if deadman is not None:
            self.engaged = deadman
            return deadman
        config = self.config
        if deflection > config.engage_above or (self.engaged and deflection >= config.release_below):
            self._last_deflected = now
        self.engaged = deflection > config.engage_above or (
            self.engaged and now - self._last_deflected < config.release_s
        )
        return self.engaged


@dataclass(frozen=True)
class TakeoverConfig:
    """`silent_s`: a sample older than that is none. `max_lead`: rad by which a target may run ahead of the measured
    joints while a person drives, so that an arm at an obstacle does not wind up."""

    silent_s: float = 0.2
    max_lead: float = 0.2


@dataclass(frozen=True)
class HumanTarget:
    """What `Takeover.update` found. `command`: only with HUMAN. `changed`: control has changed hands just now, so
    chunks that wait to be executed are void."""

    control: Control
    command: Command | None
    changed: bool
    reason: str = ""


class Takeover:
    """Turns samples of a teleoperation device into commands for the safety filter.

    `solve` is needed by devices that give tool deltas; a leader arm, which gives joints, does without.
    """

    def __init__(self, spec: ArmSpec, config: TakeoverConfig, solve: InverseKinematics | None = None) -> None:
        self.spec, self.config, self._solve = spec, config, solve
        self.control = Control.POLICY
        self._target = np.zeros(spec.num_joints)
        self._leader_anchor = np.zeros(spec.num_joints)
        self._anchor = np.zeros(spec.num_joints)
        self._gripper_anchor: float | None = None
        self._last_stamp = -np.inf

    def update(self, sample: TeleopSample | None, last_sent: Command, measured: Vector, now: float) -> HumanTarget:
        """`sample`: the newest of the device, None where it does not answer. `last_sent`: the arm's standing target.
        `measured` [J] rad.

        Raises ValueError where the device gives tool deltas and no inverse kinematics was given.
        """
        before = self.control
        silent = sample is None or now - sample.stamp > self.config.silent_s or not _is_finite(sample)
        if silent:
            self.control = Control.POLICY if before == Control.POLICY else Control.HOLD
            reason = "the teleoperation device is silent" if self.control == Control.HOLD else ""
            return HumanTarget(self.control, None, self.control != before, reason)
        assert sample is not None
        if not sample.engaged:
            self.control = Control.POLICY
            return HumanTarget(Control.POLICY, None, before != Control.POLICY)
        if before == Control.HOLD:  # it came back with the deadman held: the person must let go first
            return HumanTarget(Control.HOLD, None, False, "let go of the device, then take over again")
        self.control = Control.HUMAN
        if before == Control.POLICY:
            self._engage(sample, last_sent)
            return HumanTarget(Control.HUMAN, replace(last_sent, position=self._target.copy()), True)
        return HumanTarget(Control.HUMAN, self._move(sample, last_sent, measured), False)

    def _engage(self, sample: TeleopSample, last_sent: Command) -> None:
        self._target = np.array(last_sent.position, dtype=float)
        self._anchor = self._target.copy()
        self._leader_anchor = self._target if sample.joints is None else np.array(sample.joints, dtype=float)
        self._gripper_anchor = sample.gripper
        self._last_stamp = sample.stamp

    def _move(self, sample: TeleopSample, last_sent: Command, measured: Vector) -> Command:
        fresh = sample.stamp > self._last_stamp  # a sample read twice moves the arm once
        self._last_stamp = sample.stamp
        if sample.joints is not None:
            self._target = self._anchor + np.asarray(sample.joints) - self._leader_anchor
        elif fresh and np.any(sample.delta):
            if self._solve is None:
                raise ValueError("this device gives tool deltas: give Takeover the arm's inverse kinematics (solve)")
            self._target = self._solve(self._target, np.asarray(sample.delta))
        lead = np.clip(self._target - measured, -self.config.max_lead, self.config.max_lead)
        if sample.joints is None:  # a leader arm's target is where the leader is; a delta device's must not wind up
            self._target = measured + lead
        position = np.clip(measured + lead, self.spec.position_low, self.spec.position_high)
        return Command(position, self._gripper(sample, last_sent), last_sent.sequence)

    def _gripper(self, sample: TeleopSample, last_sent: Command) -> float:
        """The standing width until the person has moved the device's own gripper control since engaging."""
        if self._gripper_anchor is not None and abs(sample.gripper - self._gripper_anchor) > 1e-3:
            self._gripper_anchor = None
        return last_sent.gripper if self._gripper_anchor is not None else float(sample.gripper)


def _is_finite(sample: TeleopSample) -> bool:
    arrays = [np.asarray(sample.delta), np.asarray(sample.gripper)]
    arrays += [] if sample.joints is None else [np.asarray(sample.joints)]
    return all(bool(np.isfinite(a).all()) for a in arrays)


__all__ = [
    "Control", "Engagement", "EngagementConfig", "HumanTarget", "InverseKinematics", "Takeover", "TakeoverConfig",
]  # fmt: skip
