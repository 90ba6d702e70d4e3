"""An arm and cameras over ROS 2 topics without a ROS installation: ros2_control's joint trajectory controller, a
gripper that takes a width, and the digital twin, which is the same to it.

Every command is one trajectory of one point, a control period ahead. The controller interpolates to it from where its
setpoint is; if nothing follows, it has arrived after that period and stands. Set the controller's
`interpolate_from_desired_state: true` and, for it is off by default, `cmd_timeout`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_rl.real_robot.dds import COMMAND, SENSOR, STATUS, DDSNode, NodeConfig, Publisher, Received, Subscription
from vla_rl.real_robot.interfaces import ArmSpec, ArmState, Command, HardwareError, Picture
from vla_rl.sim.arm import FINGER_NAMES, FINGER_TRAVEL, HOME, JOINT_HIGH, JOINT_LOW, JOINT_NAMES, JOINT_SPEED


@dataclass(frozen=True)
class DDSArmConfig:
    """`finger_joints`: of /joint_states, their positions add up to the gripper's width; () for no gripper.
    `periods_ahead`: how long the controller gets for a command, in control periods. A width is sent when it differs
    from the last one sent by `gripper_step` metres, and again after `gripper_repeat_s`: never with every command, which
    some grippers answer by starting anew."""

    node: NodeConfig = field(default_factory=lambda: NodeConfig("vla_rl_arm"))
    joint_states: str = "/joint_states"
    trajectory: str = "/arm/joint_trajectory"
    gripper: str = "/gripper/commands"
    fault: str = "/arm/fault"
    finger_joints: tuple[str, ...] = FINGER_NAMES
    periods_ahead: float = 1.0
    gripper_step: float = 0.0005
    gripper_repeat_s: float = 1.0
    connect_timeout_s: float = 5.0


@dataclass(frozen=True)
class DDSCameraConfig:
    """`topic`: of sensor_msgs/msg/Image, encoded rgb8 or bgr8."""

    name: str
    topic: str
    node: NodeConfig = field(default_factory=lambda: NodeConfig("vla_rl_camera"))
    connect_timeout_s: float = 5.0


def twin_arm_spec(name: str = "twin", rate_hz: float = 20.0) -> ArmSpec:
    """The tabletop's arm. Limits of acceleration and jerk are those that Franka Robotics documents for the Panda."""
    return ArmSpec(
        name=name,
        joint_names=JOINT_NAMES,
        position_low=np.array(JOINT_LOW),
        position_high=np.array(JOINT_HIGH),
        max_velocity=np.array(JOINT_SPEED),
        max_acceleration=np.array([15.0, 7.5, 10.0, 12.5, 15.0, 20.0, 20.0]),
        max_jerk=np.array([7500.0, 3750.0, 5000.0, 6250.0, 7500.0, 10000.0, 10000.0]),
        gripper_range=(0.0, 2 * FINGER_TRAVEL),
        rate_hz=rate_hz,
        home=np.array(HOME),
    )


class DDSArm:
    """See `interfaces.Arm`. `send` is for one thread, `stop` for any. `connect` raises HardwareError where no joint
    states come, or nobody takes commands."""

    def __init__(self, spec: ArmSpec, config: DDSArmConfig | None = None) -> None:
        self.spec = spec
        self.config = config or DDSArmConfig()
        self._node: DDSNode | None = None
        self._wanted = (*spec.joint_names, *self.config.finger_joints)
        self._lock = threading.Lock()
        self._joints: dict[str, tuple[float, float, float]] = {}  # name -> position, velocity, receive stamp
        self._width, self._width_sent = np.nan, -np.inf

    def connect(self) -> None:
        config, node = self.config, DDSNode.open(self.config.node)
        self._width_sent = -np.inf
        self._joints.clear()
        try:
            node.subscription(config.joint_states, "sensor_msgs/msg/JointState", SENSOR, self._take_joints)
            self._fault: Subscription = node.subscription(config.fault, "std_msgs/msg/String", STATUS)
            self._trajectory: Publisher = node.publisher(
                config.trajectory, "trajectory_msgs/msg/JointTrajectory", COMMAND
            )
            self._gripper: Publisher = node.publisher(config.gripper, "std_msgs/msg/Float64MultiArray", COMMAND)
            end = time.monotonic() + config.connect_timeout_s
            while not set(self._wanted) <= self._joints.keys():
                if time.monotonic() > end:
                    raise HardwareError(self._what_is_missing(node))
                time.sleep(0.005)
            wanted = {config.trajectory: self._trajectory} | (
                {config.gripper: self._gripper} if config.finger_joints else {}
            )
            for topic, publisher in wanted.items():
                if not publisher.wait_for_subscribers(max(0.0, end - time.monotonic())):
                    raise HardwareError(f"nobody takes commands on {topic} {_where(node, config.node)}")
        except BaseException:
            node.close()
            raise
        self._node = node

    def read(self) -> ArmState:
        """See `Arm.read`; as old as the oldest of its joints. Raises HardwareError before `connect`."""
        self._connected()
        with self._lock:
            position, velocity, stamps = np.ascontiguousarray(np.array([self._joints[name] for name in self._wanted]).T)
        count, fault = self.spec.num_joints, self._fault.latest()
        return ArmState(
            position=position[:count],
            velocity=velocity[:count],
            gripper=float(position[count:].sum()),
            stamp=float(stamps.min()),
            fault="" if fault is None else fault.message.data,
        )

    def send(self, command: Command) -> Command:
        """Publishes joint targets, and the gripper's where it changed. Raises ValueError for another shape."""
        node = self._connected()
        target = np.asarray(command.position, np.float64)
        if target.shape != (self.spec.num_joints,):
            raise ValueError(f"{self.spec.name}: a command has {self.spec.num_joints} joints, got {target.shape}")
        ahead = round(self.config.periods_ahead / self.spec.rate_hz * 1e9)
        point = {
            "positions": target,
            "time_from_start": {"sec": ahead // 10**9, "nanosec": ahead % 10**9},
        }
        self._trajectory.publish(self._message(node, [point]))
        if self.config.finger_joints:
            self._send_width(node, command.gripper)
        return command

    def stop(self, reason: str) -> None:
        """An empty trajectory: the controller drops what it has and holds. The gripper keeps what it grips."""
        node = self._node
        if node is not None:
            self._trajectory.publish(self._message(node, [], reason))

    def close(self) -> None:
        """Stops, and leaves the topics. Any number of times."""
        if self._node is not None:
            self.stop("closed")
            time.sleep(0.02)  # the last message is on its way before its writer goes
            self._node.close()
            self._node = None

    def _message(self, node: DDSNode, points: list[dict[str, Any]], frame_id: str = "") -> Any:
        # A header stamp of zero: begin now, on the controller's own clock.
        fields = {"header": {"frame_id": frame_id}, "joint_names": self.spec.joint_names, "points": points}
        return node.message("trajectory_msgs/msg/JointTrajectory", fields)

    def _send_width(self, node: DDSNode, width: float) -> None:
        config, now = self.config, time.monotonic()
        if abs(width - self._width) < config.gripper_step and now - self._width_sent < config.gripper_repeat_s:
            return
        self._width, self._width_sent = width, now
        self._gripper.publish(node.message("std_msgs/msg/Float64MultiArray", {"data": [width]}))

    def _take_joints(self, received: Received) -> None:
        """Several nodes may publish joint states, each of its own joints, in any order; some only velocities."""
        message, stamp = received.message, received.stamp
        count = len(message.name)
        if len(message.position) != count:
            return
        velocity = message.velocity if len(message.velocity) == count else np.zeros(count)
        with self._lock:
            for name, q, v in zip(message.name, message.position, velocity, strict=True):
                self._joints[name] = (q, v, stamp)

    def _what_is_missing(self, node: DDSNode) -> str:
        topic, missing = self.config.joint_states, [name for name in self._wanted if name not in self._joints]
        if not self._joints:
            return f"no joint states come on {topic} {_where(node, self.config.node)}"
        return (
            f"{topic} has no {', '.join(missing)}; it has {', '.join(self._joints)}: give ArmSpec.joint_names and "
            "finger_joints as the robot calls them"
        )

    def _connected(self) -> DDSNode:
        if self._node is None:
            raise HardwareError(f"{self.spec.name} is not connected; call connect()")
        return self._node


class DDSCamera:
    """See `interfaces.Camera`. A picture that comes again with the same stamp of its source does not grow younger.
    `connect` raises HardwareError where no picture comes."""

    def __init__(self, config: DDSCameraConfig) -> None:
        self.name, self.config = config.name, config
        self._node: DDSNode | None = None
        self._newest: tuple[Any, float, int] | None = None  # message, when it came first, its source's stamp

    def connect(self) -> None:
        node, self._newest = DDSNode.open(self.config.node), None
        node.subscription(self.config.topic, "sensor_msgs/msg/Image", SENSOR, self._take)
        end = time.monotonic() + self.config.connect_timeout_s
        while self._newest is None:
            if time.monotonic() > end:
                node.close()
                raise HardwareError(f"no pictures come on {self.config.topic} {_where(node, self.config.node)}")
            time.sleep(0.005)
        self._node = node

    def latest(self) -> Picture:
        """See `Camera.latest`. Raises HardwareError before `connect`, and for another encoding."""
        if self._node is None or self._newest is None:
            raise HardwareError(f"camera {self.name} is not connected; call connect()")
        message, came, source_stamp_ns = self._newest
        return Picture(_pixels(message), came, source_stamp_ns)

    def close(self) -> None:
        if self._node is not None:
            self._node.close()
            self._node = None

    def _take(self, received: Received) -> None:
        stamp = received.message.header.stamp
        source_stamp_ns = stamp.sec * 10**9 + stamp.nanosec
        if self._newest is None or source_stamp_ns != self._newest[2]:
            self._newest = received.message, received.stamp, source_stamp_ns


def _pixels(image: Any) -> np.ndarray:
    if image.encoding not in ("rgb8", "bgr8"):
        raise HardwareError(f"pictures are encoded {image.encoding!r}; set the camera to rgb8 or bgr8")
    rows = image.data.reshape(image.height, image.step)[:, : 3 * image.width]
    pixels = rows.reshape(image.height, image.width, 3)
    return pixels[..., ::-1] if image.encoding == "bgr8" else pixels


def _where(node: DDSNode, config: NodeConfig) -> str:
    return (
        f"in domain {node.domain} on {config.network!r}. Is the arm's driver (or the twin: python -m "
        "vla_rl.real_robot.twin) running, in the same ROS_DOMAIN_ID and on the same network?"
    )


__all__ = ["DDSArm", "DDSArmConfig", "DDSCamera", "DDSCameraConfig", "twin_arm_spec"]
