"""An arm of two joints with an ideal controller, cameras, and a policy, for tests of the control loop: real objects of
the protocols in `real_robot/interfaces.py`, which write down what they are told."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from vla_rl.real_robot.interfaces import ArmSpec, ArmState, Command, HardwareError, Picture, TeleopSample

RATE_HZ = 100.0
SPEC = ArmSpec(
    name="sim",
    joint_names=("shoulder", "elbow"),
    position_low=np.array([-1.0, -2.0]),
    position_high=np.array([1.5, 2.0]),
    max_velocity=np.array([2.0, 1.0]),
    max_acceleration=np.array([10.0, 20.0]),
    max_jerk=np.array([1000.0, 400.0]),
    gripper_range=(0.0, 0.08),
    rate_hz=RATE_HZ,
    home=np.array([0.2, 0.3]),
)


class SimArm:
    """Is where it was sent. `record`: a file that gets a line for every command and stop, "" for none; it outlives the
    process that is killed. `stale`: the measurement stops growing younger."""

    def __init__(self, record: str = "", spec: ArmSpec = SPEC) -> None:
        self.spec, self.record = spec, record
        self.events: list[dict] = []
        self.position = spec.home.copy()
        self.gripper, self.fault = 0.04, ""
        self.connected = False
        self.frozen_at: float | None = None

    def connect(self) -> None:
        self.connected = True

    def read(self) -> ArmState:
        if not self.connected:
            raise HardwareError("not connected")
        stamp = time.monotonic() if self.frozen_at is None else self.frozen_at
        return ArmState(self.position.copy(), np.zeros(self.spec.num_joints), self.gripper, stamp, self.fault)

    def send(self, command: Command) -> Command:
        self._write("send", position=command.position.tolist(), gripper=command.gripper)
        self.position, self.gripper = command.position.copy(), command.gripper
        return command

    def stop(self, reason: str) -> None:
        self._write("stop", reason=reason)

    def close(self) -> None:
        self._write("close")

    @property
    def sent(self) -> np.ndarray:
        return np.array([e["position"] for e in self.events if e["what"] == "send"])

    def stops(self) -> list[str]:
        return [e["reason"] for e in self.events if e["what"] == "stop"]

    def _write(self, what: str, **fields: object) -> None:
        self.events.append({"at": time.monotonic(), "what": what, **fields})
        if self.record:
            with Path(self.record).open("a") as file:
                file.write(json.dumps(self.events[-1]) + "\n")


def read_record(path: Path | str) -> list[dict]:
    """What arms wrote down, whole lines only."""
    text = Path(path).read_text() if Path(path).exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


class SimCamera:
    """30 Hz of grey pictures until `frozen`, then the last one again and again, freshly received."""

    def __init__(self, name: str = "front") -> None:
        self.name, self.frozen, self.dead_since = name, False, None
        self._index = 0

    def connect(self) -> None: ...

    def latest(self) -> Picture:
        now = time.monotonic()
        if not self.frozen:
            self._index = int(now * 30)
        received = now if self.dead_since is None else self.dead_since
        return Picture(np.full((8, 8, 3), self._index % 256, np.uint8), received, self._index * 33_333_333)

    def close(self) -> None: ...


class SimTeleop:
    """A leader arm: `joints` rad, and a deadman."""

    def __init__(self) -> None:
        self.joints, self.engaged, self.silent = np.zeros(2), False, False

    def connect(self) -> None: ...

    def read(self) -> TeleopSample:
        if self.silent:
            raise HardwareError("the device was unplugged")
        return TeleopSample(np.zeros(6), 0.04, self.engaged, {}, time.monotonic(), self.joints.copy())

    def close(self) -> None: ...


class Reaching:
    """A policy: chunks of 20 joint targets that go from the measured pose to `goal` at 0.5 rad/s."""

    def __init__(self, goal: tuple[float, float] = (0.8, -0.5), delay_s: float = 0.0) -> None:
        self.goal, self.delay_s = np.array(goal), delay_s
        self.calls = 0
        self.fail = ""
        self.nan = False

    def __call__(self, observation: dict) -> np.ndarray:
        self.calls += 1
        time.sleep(self.delay_s)
        if self.fail:
            raise RuntimeError(self.fail)
        q = observation["state"][:2].astype(float)
        away = self.goal - q
        steps = np.arange(1, 21)[:, None] * 0.5 / RATE_HZ
        chunk = q + np.sign(away) * np.minimum(steps, np.abs(away))
        return np.full((20, 3), np.nan) if self.nan else np.hstack([chunk, np.full((20, 1), 0.02)])
