"""The log of a run on an arm: one MCAP bag that ROS 2's own tools open, and `vla-rl replay` reads back.

    /vla_rl/about               std_msgs/msg/String            JSON: `LogAbout`, once
    /vla_rl/tick                std_msgs/msg/String            JSON: mode, source, clamps, problem, latency, every tick
    /observation/joint_states   sensor_msgs/msg/JointState     measured, the gripper last
    /observation/state          std_msgs/msg/Float64MultiArray what the policy saw, where it was asked
    /observation/<camera>       sensor_msgs/msg/Image          rgb8, where the policy was asked
    /action/raw                 std_msgs/msg/Float64MultiArray the policy's proposal, also while a person drives
    /action/wanted              sensor_msgs/msg/JointState     before the safety filter
    /action/applied             sensor_msgs/msg/JointState     what reached the arm

Bag time is the time of the control loop's tick, on the wall clock as it was when the log began.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_rl.real_robot.control_loop import Tick
from vla_rl.real_robot.interfaces import Command
from vla_rl.real_robot.ros_messages import MessageTypes

_QUEUE = 512
_STRING, _ARRAY = "std_msgs/msg/String", "std_msgs/msg/Float64MultiArray"
_JOINTS, _IMAGE = "sensor_msgs/msg/JointState", "sensor_msgs/msg/Image"


@dataclass(frozen=True)
class LogAbout:
    """`config`: everything that decides the run, JSON values; `policy`: its name or address, `policy_digest` of its
    weights. `control_hz`: of the actions in a chunk. `config_digest` is added when the log is written."""

    joint_names: tuple[str, ...]
    prompt: str
    control_hz: float
    policy: str = ""
    policy_digest: str = ""
    action_names: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    config_digest: str = ""


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of the configuration's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


class RobotLog:
    """`LoopParts.on_tick` may be its `write`: a thread of its own writes, so that a slow disk does not slow the arm.

    `dropped`: ticks that the disk was too slow for. `close` it, or the bag has no index. Raises FileExistsError where
    something is at `path` already.
    """

    def __init__(self, path: Path | str, about: LogAbout) -> None:
        from rosbags.rosbag2 import StoragePlugin, Writer

        if Path(path).exists():
            raise FileExistsError(f"{path} exists already; name another folder for the log")
        self.dropped = 0
        self._types = MessageTypes("jazzy")
        self._names = [*about.joint_names, "gripper"]
        self._writer = Writer(Path(path), version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._connections: dict[str, Any] = {}
        self._offset = time.time_ns() - time.monotonic_ns()
        self._queue: queue.Queue[Tick | None] = queue.Queue(_QUEUE)
        self._error: Exception | None = None
        known = asdict(about) | {"config_digest": config_digest(about.config)}
        self._put("/vla_rl/about", _STRING, {"data": json.dumps(known)}, time.monotonic())
        self._thread = threading.Thread(target=self._run, daemon=True, name="log")
        self._thread.start()

    def write(self, tick: Tick) -> None:
        """Never blocks. Raises OSError, from then on, where the disk refuses."""
        if self._error is not None:
            raise OSError(f"the log cannot be written: {self._error}") from self._error
        try:
            self._queue.put_nowait(tick)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Waits for what is still to be written. Any number of times."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
            self._writer.close()

    def __enter__(self) -> RobotLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        while (tick := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._write(tick)
                except Exception as error:  # shown to whoever writes next; the queue must go on being emptied
                    self._error = error

    def _write(self, tick: Tick) -> None:
        at, state = tick.at, tick.state
        measured = {"position": np.append(state.position, state.gripper), "velocity": np.append(state.velocity, 0.0)}
        self._put("/observation/joint_states", _JOINTS, {"name": self._names, **measured}, at)
        if tick.observation is not None:
            self._put("/observation/state", _ARRAY, {"data": tick.observation["state"]}, at)
            for camera, image in tick.observation["images"].items():
                self._put(f"/observation/{camera}", _IMAGE, _image(image), at)
        if tick.proposal is not None:
            self._put("/action/raw", _ARRAY, {"data": tick.proposal}, at)
        for topic, command in (("/action/wanted", tick.wanted), ("/action/applied", tick.applied)):
            if command is not None:
                position = np.append(command.position, command.gripper)
                self._put(topic, _JOINTS, {"name": self._names, "position": position}, at)
        self._put("/vla_rl/tick", _STRING, {"data": json.dumps(_tick_fields(tick))}, at)

    def _put(self, topic: str, type_name: str, fields: Mapping[str, Any], at: float) -> None:
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, type_name, typestore=self._types.store)
        data = self._types.serialize(self._types.message(type_name, fields))
        self._writer.write(self._connections[topic], int(at * 1e9) + self._offset, data)


def _tick_fields(tick: Tick) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "mode": tick.mode.value,
        "source": tick.source.name.lower(),
        "clamps": list(tick.clamps),
        "problem": tick.problem,
        "late_ms": 1000 * tick.late_s,
        "state_age_ms": 1000 * (tick.at - tick.state.stamp),
        "picture_age_ms": {name: 1000 * (tick.at - p.stamp) for name, p in tick.pictures.items()},
    }
    if (reply := tick.reply) is not None:
        fields["reply"] = {"sequence": reply.sequence, "latency_ms": 1000 * reply.latency_s, "error": reply.error}
    return fields


def _image(image: NDArray[np.uint8]) -> dict[str, Any]:
    height, width, _ = image.shape
    return {"height": height, "width": width, "encoding": "rgb8", "step": 3 * width, "data": image.reshape(-1)}


# ------------------------------------------------------------------------------------------------------------- reading
@dataclass
class LoggedTick:
    """`at`: s since the log's first tick. `observation`: as the policy was given it, None where it was not asked."""

    at: float
    fields: Mapping[str, Any]
    position: NDArray[np.float64]
    observation: dict[str, Any] | None = None
    raw: NDArray[np.float64] | None = None
    wanted: Command | None = None
    applied: Command | None = None


def read_about(path: Path | str) -> LogAbout:
    """Raises ValueError where `path` is no log of ours."""
    for topic, _, message in _messages(path, ["/vla_rl/about"]):
        if topic == "/vla_rl/about":
            about = json.loads(message.data)
            as_tuple = ("joint_names", "action_names")
            return LogAbout(**about | {name: tuple(about[name]) for name in as_tuple})
    raise ValueError(f"{path} is a bag, but no log of an arm: it has no /vla_rl/about")


def read_ticks(path: Path | str) -> Iterator[LoggedTick]:
    """The ticks in order; one at a time, because pictures are large. Raises ValueError where `path` is no log."""
    prompt, begun, parts = read_about(path).prompt, None, {}
    for topic, stamp, message in _messages(path, []):
        begun = stamp if begun is None and topic != "/vla_rl/about" else begun
        parts[topic] = message
        if topic == "/vla_rl/tick":
            yield _logged_tick((stamp - (begun or stamp)) / 1e9, parts, prompt)
            parts = {}


def read_tick_fields(path: Path | str) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Seconds since the first tick, and what `/vla_rl/tick` says, without the pictures. Raises ValueError as
    `read_ticks`."""
    begun = None
    for _, stamp, message in _messages(path, ["/vla_rl/tick"]):
        begun = stamp if begun is None else begun
        yield (stamp - begun) / 1e9, json.loads(message.data)


def _logged_tick(at: float, parts: Mapping[str, Any], prompt: str) -> LoggedTick:
    tick = LoggedTick(at, json.loads(parts["/vla_rl/tick"].data), parts["/observation/joint_states"].position)
    if "/observation/state" in parts:
        images = {
            topic.removeprefix("/observation/"): m.data.reshape(m.height, m.width, 3)
            for topic, m in parts.items()
            if m.__msgtype__ == _IMAGE
        }
        state = np.asarray(parts["/observation/state"].data, np.float32)
        tick.observation = {"images": images, "state": state, "prompt": prompt}
    if "/action/raw" in parts:
        tick.raw = parts["/action/raw"].data
    for name in ("wanted", "applied"):
        if (message := parts.get(f"/action/{name}")) is not None:
            setattr(tick, name, Command(message.position[:-1], float(message.position[-1])))
    return tick


def _messages(path: Path | str, topics: list[str]) -> Iterator[tuple[str, int, Any]]:
    from rosbags.rosbag2 import Reader, ReaderError

    types = MessageTypes("jazzy")
    try:
        with Reader(Path(path)) as reader:
            chosen = [c for c in reader.connections if c.topic in topics or not topics]
            if topics and not chosen:
                return
            for connection, stamp, data in reader.messages(connections=chosen):
                yield connection.topic, stamp, types.deserialize(bytes(data), connection.msgtype)
    except (ReaderError, FileNotFoundError) as error:
        raise ValueError(f"{path} is no log that can be read: {error}. Was it closed?") from error


__all__ = ["LogAbout", "LoggedTick", "RobotLog", "config_digest", "read_about", "read_tick_fields", "read_ticks"]
