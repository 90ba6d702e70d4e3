"""The messages that a ros2_control arm takes, as plain values: `Message(type_name, fields)`.

No ROS is needed to build one. `ros_messages.MessageTypes.message(*message)` makes it for DDS,
`ros2_graph.RclpyGraph` for rclpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vla_rl.real_robot.interfaces import HardwareError, Vector


class Message(NamedTuple):
    """`type_name`: "package/msg/Name". `fields`: plain values by name, nested messages as mappings."""

    type_name: str
    fields: dict[str, Any]


def time_fields(seconds: float) -> dict[str, int]:
    """The fields of builtin_interfaces/msg/Duration and Time. Raises ValueError for a negative number."""
    nanoseconds = round(seconds * 1e9)
    if nanoseconds < 0:
        raise ValueError(f"a duration must not be negative, got {seconds} s")
    return {"sec": nanoseconds // 10**9, "nanosec": nanoseconds % 10**9}


def joint_trajectory(names: Sequence[str], positions: Vector, times: Vector) -> Message:
    """`positions` [T, J] rad, reached `times` [T] s after the message is taken up (its stamp of zero says now)."""
    positions, times = np.atleast_2d(np.asarray(positions, np.float64)), np.asarray(times, np.float64)
    if positions.shape != (len(times), len(names)) or np.any(np.diff(times) <= 0) or np.any(times <= 0):
        raise ValueError(
            f"expected positions [{len(times)}, {len(names)}] at rising times > 0, got {list(positions.shape)} at "
            f"{times.tolist()}"
        )
    points = [
        {"positions": row.tolist(), "time_from_start": time_fields(t)}
        for row, t in zip(positions, times.tolist(), strict=True)
    ]
    fields = {"header": {"frame_id": ""}, "joint_names": list(names), "points": points}
    return Message("trajectory_msgs/msg/JointTrajectory", fields)


def stop_trajectory(names: Sequence[str]) -> Message:
    """A trajectory without points: the controller drops what it has and holds."""
    fields = {"header": {"frame_id": ""}, "joint_names": list(names), "points": []}
    return Message("trajectory_msgs/msg/JointTrajectory", fields)


def forward_command(values: Vector) -> Message:
    """[J] in rad or rad/s, in the order of the controller's `joints`."""
    return Message("std_msgs/msg/Float64MultiArray", {"data": np.asarray(values, np.float64).tolist()})


def pose_stamped(frame: str, position: Vector, quaternion: Vector, stamp_s: float = 0.0) -> Message:
    """`position` [3] m and `quaternion` [4] (x, y, z, w) of the tool in `frame`. Raises ValueError for a quaternion
    that is not of length 1."""
    if abs(float(np.linalg.norm(quaternion)) - 1.0) > 1e-3:
        raise ValueError(f"a pose needs a quaternion (x, y, z, w) of length 1, got {quaternion}")
    pose = {
        "position": dict(zip("xyz", map(float, position), strict=True)),
        "orientation": dict(zip("xyzw", map(float, quaternion), strict=True)),
    }
    header = {"stamp": time_fields(stamp_s), "frame_id": frame}
    return Message("geometry_msgs/msg/PoseStamped", {"header": header, "pose": pose})


def twist_stamped(frame: str, twist: Vector, stamp_s: float = 0.0) -> Message:
    """`twist` [6] m/s and rad/s in `frame`, for MoveIt Servo. Servo drops what is older than its
    `incoming_command_timeout`, so `stamp_s` is the ROS clock's now."""
    values = np.asarray(twist, np.float64)
    if values.shape != (6,):
        raise ValueError(f"a twist has 6 numbers, got {list(values.shape)}")
    parts = {
        "linear": dict(zip("xyz", values[:3].tolist(), strict=True)),
        "angular": dict(zip("xyz", values[3:].tolist(), strict=True)),
    }
    header = {"stamp": time_fields(stamp_s), "frame_id": frame}
    return Message("geometry_msgs/msg/TwistStamped", {"header": header, "twist": parts})


def gripper_goal(kind: str, joint: str, position: float, max_effort: float) -> Message:
    """The goal of the gripper's action: "GripperCommand" or "ParallelGripperCommand". `position`: what the controller
    calls it, most often one finger's travel in m. Raises ValueError for another kind."""
    if kind == "GripperCommand":
        command: dict[str, Any] = {"position": float(position), "max_effort": float(max_effort)}
    elif kind == "ParallelGripperCommand":
        command = {"name": [joint], "position": [float(position)], "effort": [float(max_effort)]}
    else:
        raise ValueError(f"gripper action {kind!r} is unknown; use GripperCommand or ParallelGripperCommand")
    return Message(f"control_msgs/action/{kind}", {"command": command})


def joint_rows(names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where `wanted` stand among `names` of a JointState, which comes in any order and may hold others."""
    missing = [name for name in wanted if name not in names]
    if missing:
        raise HardwareError(f"the joint states have no {missing}; they have {list(names)}: give the robot's own names")
    return [list(names).index(name) for name in wanted]


def pixels(image: Any) -> np.ndarray:
    """uint8 [h, w, 3] RGB of a sensor_msgs/msg/Image, of rclpy or of rosbags. Raises HardwareError for an encoding
    other than rgb8, bgr8, rgba8, bgra8 and mono8, and for data that is too short."""
    channels = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}.get(image.encoding)
    if channels is None:
        raise HardwareError(f"pictures are encoded {image.encoding!r}; set the camera to rgb8, bgr8 or mono8")
    data = np.frombuffer(image.data, np.uint8) if isinstance(image.data, (bytes, bytearray, memoryview)) else image.data
    data = np.asarray(data, np.uint8)
    if data.size != image.height * image.step or image.step < channels * image.width:
        raise HardwareError(
            f"a picture of {image.width}x{image.height} has {data.size} bytes in rows of {image.step}; it is damaged"
        )
    rows = data.reshape(image.height, image.step)[:, : channels * image.width]
    picture = rows.reshape(image.height, image.width, channels)
    if channels == 1:
        return np.repeat(picture, 3, axis=2)
    picture = picture[..., :3]
    return np.ascontiguousarray(picture[..., ::-1] if image.encoding.startswith("bgr") else picture)


def stamp_ns(header: Any) -> int:
    """The header's stamp, in ns."""
    return int(header.stamp.sec) * 10**9 + int(header.stamp.nanosec)


def diagnostic(name: str, level: int, text: str, values: Mapping[str, object]) -> dict[str, Any]:
    """One diagnostic_msgs/msg/DiagnosticStatus; `level`: 0 fine, 1 warning, 2 error, 3 stale."""
    pairs = [{"key": key, "value": str(value)} for key, value in values.items()]
    return {"level": level, "name": name, "message": text, "hardware_id": "", "values": pairs}


__all__ = [
    "Message", "diagnostic", "forward_command", "gripper_goal", "joint_rows", "joint_trajectory", "pixels",
    "pose_stamped", "stamp_ns", "stop_trajectory", "time_fields", "twist_stamped",
]  # fmt: skip
