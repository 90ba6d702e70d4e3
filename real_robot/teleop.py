"""Teleoperation: SpaceMouse, gamepad, keyboard and leader arm behind the `Teleop` of `interfaces.py`.

A device with axes is an `AxesDevice` of a few lines; `AxesTeleop` makes tool deltas in m and rad of its axes, and
decides whether the person wants control: by the deadman button, or by deflection with hysteresis. A leader arm gives
joints.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from vla_rl.real_robot.drivers.vendor import import_vendor
from vla_rl.real_robot.interfaces import Arm, HardwareError, TeleopSample, Vector
from vla_rl.real_robot.takeover import Engagement, EngagementConfig


class Axes(NamedTuple):
    """`values` [6] in -1 to 1: x forward, y left, z up, then turns about them. `buttons`: by name."""

    values: Vector
    buttons: Mapping[str, bool]


class AxesDevice(Protocol):
    """A device at hand. `read` never blocks and raises HardwareError where the device is gone."""

    def open(self) -> None: ...

    def read(self) -> Axes: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class TeleopConfig:
    """`max_speed` m/s and `max_turn` rad/s at full deflection. `gripper_range`: closed and open width in m.
    `deadman`: the button that must be held, "" where deflection engages. `gripper_button` opens and closes in turn.
    `max_gap_s`: time between samples that is moved at most, whatever the loop was doing."""

    max_speed: float = 0.15
    max_turn: float = 0.6
    gripper_range: tuple[float, float] = (0.0, 0.08)
    deadman: str = ""
    gripper_button: str = "gripper"
    max_gap_s: float = 0.1
    engagement: EngagementConfig = field(default_factory=EngagementConfig)


class AxesTeleop:
    """Implements `Teleop` over a device with axes."""

    def __init__(
        self, device: AxesDevice, config: TeleopConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config, self._device, self._clock = config, device, clock
        self._engagement = Engagement(config.engagement)
        self._gripper = config.gripper_range[1]
        self._pressed = False
        self._last = clock()

    def connect(self) -> None:
        self._device.open()
        self._last = self._clock()

    def read(self) -> TeleopSample:
        """Raises HardwareError where the device is gone, and ValueError for a button that it has not."""
        config = self.config
        values, buttons = self._device.read()
        if config.deadman and config.deadman not in buttons:
            raise ValueError(f"the device has no button {config.deadman!r}; it has {sorted(buttons)}")
        now = self._clock()
        elapsed, self._last = min(now - self._last, config.max_gap_s), now
        values = np.clip(np.nan_to_num(values), -1.0, 1.0)
        deflection = float(np.abs(values).max())
        if deflection < config.engagement.release_below:
            values = np.zeros(6)  # a device at rest does not stand at zero exactly
        engaged = self._engagement.update(deflection, now, buttons[config.deadman] if config.deadman else None)
        pressed = bool(buttons.get(config.gripper_button, False))
        if pressed and not self._pressed:
            closed, opened = config.gripper_range
            self._gripper = closed if self._gripper == opened else opened
        self._pressed = pressed
        speed = np.repeat([config.max_speed, config.max_turn], 3)
        delta = values * speed * elapsed if engaged else np.zeros(6)
        return TeleopSample(delta, self._gripper, engaged, dict(buttons), now)

    def close(self) -> None:
        self._device.close()


class SpaceMouse:
    """A 3Dconnexion SpaceMouse through `pyspacemouse`; buttons "gripper" (left) and "success" (right).

    One call reads one report, and the device sends up to 16 ms worth of them: all that wait are read.
    """

    _MAX_REPORTS = 50

    def __init__(self) -> None:
        self._device: Any = None

    def open(self) -> None:
        library = import_vendor("pyspacemouse", "run: pip install pyspacemouse (it needs libhidapi)")
        try:
            self._device = library.open(axis_convention=library.AxisConvention.ROS)
        except Exception as error:  # its own kinds and hidapi's
            raise HardwareError(f"no SpaceMouse: {error}; check the cable and the udev rule for hidraw") from error

    def read(self) -> Axes:
        if self._device is None:
            raise HardwareError("the SpaceMouse is not open; call connect()")
        try:
            state = self._device.read()
            for _ in range(self._MAX_REPORTS):
                stamp = state.t
                state = self._device.read()
                if state.t == stamp:
                    break
        except Exception as error:
            raise HardwareError(f"the SpaceMouse is gone: {error}") from error
        values = np.array([state.x, state.y, state.z, state.roll, state.pitch, state.yaw], dtype=float)
        names = ("gripper", "success")
        return Axes(values, {name: bool(pressed) for name, pressed in zip(names, state.buttons, strict=False)})

    def close(self) -> None:
        if self._device is not None:
            self._device.close()
            self._device = None


@dataclass(frozen=True)
class GamepadConfig:
    """Axes and buttons by number, as SDL counts those of an Xbox pad. `signs`: of x, y, z, roll, pitch, yaw.

    Left stick: x and y. Triggers: z (right up, left down). Right stick: yaw and pitch. Right shoulder: deadman.
    """

    x_axis: int = 1
    y_axis: int = 0
    yaw_axis: int = 3
    pitch_axis: int = 4
    up_trigger: int = 5
    down_trigger: int = 2
    buttons: Mapping[str, int] = field(default_factory=lambda: {"gripper": 0, "success": 3, "deadman": 5})


class Gamepad:
    """A gamepad through `pygame`. Use `deadman="deadman"`: sticks do not come back to zero."""

    def __init__(self, config: GamepadConfig | None = None, index: int = 0) -> None:
        self.config, self._index = config or GamepadConfig(), index
        self._pygame: Any = None
        self._pad: Any = None

    def open(self) -> None:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # no window is wanted
        os.environ.setdefault("SDL_JOYSTICK_ALLOW_BACKGROUND_EVENTS", "1")
        self._pygame = pygame = import_vendor("pygame", "run: pip install pygame")
        pygame.init()
        if pygame.joystick.get_count() <= self._index:
            raise HardwareError(f"no gamepad {self._index}; {pygame.joystick.get_count()} are plugged in")
        self._pad = pygame.joystick.Joystick(self._index)
        self._pad.init()

    def read(self) -> Axes:
        if self._pad is None:
            raise HardwareError("the gamepad is not open; call connect()")
        self._pygame.event.pump()
        if not self._pad.get_init() or self._pygame.joystick.get_count() <= self._index:
            raise HardwareError("the gamepad is gone")
        axis, c = self._pad.get_axis, self.config
        up = (axis(c.up_trigger) - axis(c.down_trigger)) / 2  # a trigger at rest stands at -1
        # SDL counts sticks down and right positive; ours are forward and left.
        values = np.array([-axis(c.x_axis), -axis(c.y_axis), up, 0.0, -axis(c.pitch_axis), -axis(c.yaw_axis)])
        return Axes(values, {name: bool(self._pad.get_button(number)) for name, number in c.buttons.items()})

    def close(self) -> None:
        if self._pad is not None:
            self._pad.quit()
            self._pad = None


# key -> (axis, sign): x forward, y left, z up, roll, pitch, yaw
_KEYS = {
    "w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1),
    "u": (3, 1), "o": (3, -1), "i": (4, 1), "k": (4, -1), "j": (5, 1), "l": (5, -1),
}  # fmt: skip
_BUTTON_KEYS = {" ": "gripper", "\n": "success", "\r": "success"}


class Keyboard:
    """A terminal's keyboard. A terminal reports no release, so a key counts as held for `held_s` after it was last seen
    (longer than the pause before a key repeats), and as the deadman: letting go of all keys gives control back.

    w s: forward, back. a d: left, right. r f: up, down. u o, i k, j l: turns. Space: gripper. Enter: success.
    """

    def __init__(self, held_s: float = 0.6, stream: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._held_s, self._clock = held_s, clock
        self._stream = sys.stdin if stream is None else stream
        self._settings: Any = None
        self._seen: dict[str, float] = {}

    def open(self) -> None:
        if not self._stream.isatty():
            raise HardwareError("the keyboard needs a terminal; run the command in one")
        self._settings = termios.tcgetattr(self._stream)
        tty.setcbreak(self._stream)  # Ctrl-C still interrupts

    def read(self) -> Axes:
        now = self._clock()
        new = set()
        while select.select([self._stream], [], [], 0)[0]:
            keys = os.read(self._stream.fileno(), 64).decode(errors="ignore")
            if not keys:
                raise HardwareError("the terminal is gone")
            new |= set(keys)
        self._seen |= dict.fromkeys(new & _KEYS.keys(), now)
        values = np.zeros(6)
        for key, stamp in self._seen.items():
            if now - stamp <= self._held_s:
                axis, sign = _KEYS[key]
                values[axis] += sign
        buttons = dict.fromkeys(_BUTTON_KEYS.values(), False)
        buttons |= {_BUTTON_KEYS[key]: True for key in new & _BUTTON_KEYS.keys()}
        return Axes(values, buttons)

    def close(self) -> None:
        if self._settings is not None:
            termios.tcsetattr(self._stream, termios.TCSADRAIN, self._settings)
            self._settings = None


class LeaderArm:
    """Implements `Teleop` over an arm that a person moves and nobody drives (GELLO, an SO-100 leader, a second arm).

    `engaged` says whether the person wants control: a foot switch, a key. `signs`, `offsets` [J] map the leader's
    joints to the follower's: `signs * q + offsets`; offsets hardly matter, a takeover moves from where it engaged.
    """

    def __init__(
        self,
        leader: Arm,
        engaged: Callable[[], bool],
        follower_gripper: tuple[float, float],
        *,
        signs: Vector | None = None,
        offsets: Vector | None = None,
    ) -> None:
        self._leader, self._engaged, self._follower_gripper = leader, engaged, follower_gripper
        joints = leader.spec.num_joints
        self._signs = np.ones(joints) if signs is None else np.asarray(signs, dtype=float)
        self._offsets = np.zeros(joints) if offsets is None else np.asarray(offsets, dtype=float)

    def connect(self) -> None:
        self._leader.connect()

    def read(self) -> TeleopSample:
        state = self._leader.read()
        if state.fault:
            raise HardwareError(f"the leader arm {self._leader.spec.name} reports: {state.fault}")
        low, high = self._leader.spec.gripper_range
        share = float(np.clip((state.gripper - low) / (high - low), 0.0, 1.0))
        closed, opened = self._follower_gripper
        joints = self._signs * state.position + self._offsets
        gripper = closed + share * (opened - closed)
        return TeleopSample(np.zeros(6), gripper, self._engaged(), {}, state.stamp, joints)

    def close(self) -> None:
        self._leader.close()


__all__ = [
    "Axes", "AxesDevice", "AxesTeleop", "Gamepad", "GamepadConfig", "Keyboard", "LeaderArm", "SpaceMouse",
    "TeleopConfig",
]  # fmt: skip
