"""An arm under ros2_control (UR, Franka, Kinova, ABB, ...) or MoveIt Servo, in the output that its controller takes:

    joint_trajectory   JointTrajectoryController, one point a period ahead; an empty one stops
    forward_command    JointGroupPositionController and its like; to stop, the last sent target again
    pose               a Cartesian controller, PoseStamped
    twist              MoveIt Servo, TwistStamped

Set `interpolate_from_desired_state: true` and `cmd_timeout` (off by default) of a JointTrajectoryController, so that it
stops by itself where commands end. The gripper is a topic of widths, or an action, sent when the width changes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vla_rl.real_robot.dds import COMMAND, SENSOR, STATUS
from vla_rl.real_robot.drivers import ros2_messages as ros
from vla_rl.real_robot.drivers.ros2_graph import Graph, Publish
from vla_rl.real_robot.drivers.vendor import checked_target
from vla_rl.real_robot.interfaces import ArmSpec, ArmState, Command, HardwareError, Picture, Vector

Output = Literal["joint_trajectory", "forward_command", "pose", "twist"]
OUTPUT_TYPES: dict[str, str] = {
    "joint_trajectory": "trajectory_msgs/msg/JointTrajectory",
    "forward_command": "std_msgs/msg/Float64MultiArray",
    "pose": "geometry_msgs/msg/PoseStamped",
    "twist": "geometry_msgs/msg/TwistStamped",
}


@dataclass(frozen=True)
class Kinematics:
    """What `pose` and `twist` need: `pose(position [J])` -> ([3] m, quaternion [4] x y z w) and `jacobian` -> [6, J]
    of the tool in `Ros2ControlConfig.frame`."""

    pose: Callable[[Vector], tuple[Vector, Vector]]
    jacobian: Callable[[Vector], Vector]


@dataclass(frozen=True)
class Ros2ControlConfig:
    """Topics of the arm. `finger_joints`: of the joint states; their positions add up to the gripper's width.

    `fault_topic`: std_msgs/String, "" where nothing publishes one. `gripper`: "" for none, "topic" for a
    Float64MultiArray of the width on `gripper_name`, or the action's kind, with `gripper_name` its name; its position
    is `gripper_scale` times the width. `periods_ahead`: control periods that a trajectory controller gets.
    """

    output: Output = "joint_trajectory"
    command_topic: str = "/joint_trajectory_controller/joint_trajectory"
    joint_states: str = "/joint_states"
    fault_topic: str = ""
    frame: str = "base_link"
    periods_ahead: float = 2.0
    finger_joints: tuple[str, ...] = ()
    gripper: Literal["", "topic", "GripperCommand", "ParallelGripperCommand"] = ""
    gripper_name: str = "/gripper_controller/gripper_cmd"
    gripper_joint: str = ""
    gripper_scale: float = 0.5
    gripper_effort: float = 20.0
    gripper_step: float = 0.001
    connect_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        if self.output not in OUTPUT_TYPES:
            raise ValueError(f"output {self.output!r} is unknown; use one of {', '.join(OUTPUT_TYPES)}")
        if self.gripper not in ("", "topic", "GripperCommand", "ParallelGripperCommand"):
            raise ValueError(
                f"gripper {self.gripper!r} is unknown; use topic, GripperCommand, ParallelGripperCommand, or nothing"
            )
        if self.periods_ahead <= 0 or self.connect_timeout_s <= 0:
            raise ValueError(f"periods_ahead and connect_timeout_s must be positive, got {self}")


def command_message(
    config: Ros2ControlConfig,
    spec: ArmSpec,
    position: Vector,
    measured: Vector,
    kinematics: Kinematics | None,
    now: float,
) -> ros.Message:
    """The message of joint targets [J] in the output of `config`; `measured` [J] and `now` (ROS clock) for a twist."""
    if config.output == "joint_trajectory":
        return ros.joint_trajectory(spec.joint_names, position[None], np.array([config.periods_ahead / spec.rate_hz]))
    if config.output == "forward_command":
        return ros.forward_command(position)
    if kinematics is None:
        raise ValueError(f"output {config.output} needs the arm's kinematics; give Kinematics(pose, jacobian)")
    if config.output == "pose":
        return ros.pose_stamped(config.frame, *kinematics.pose(position), now)
    # To be at the target one period from now, whatever is left of it.
    twist = kinematics.jacobian(measured) @ (position - measured) * spec.rate_hz
    return ros.twist_stamped(config.frame, twist, now)


def stop_message(
    config: Ros2ControlConfig, spec: ArmSpec, hold: Vector, kinematics: Kinematics | None, now: float
) -> ros.Message:
    """What makes the controller hold; `hold` [J] is the last sent target, or the measured pose where none was."""
    if config.output == "joint_trajectory":
        return ros.stop_trajectory(spec.joint_names)
    if config.output == "twist":
        return ros.twist_stamped(config.frame, np.zeros(6), now)
    return command_message(config, spec, hold, hold, kinematics, now)


class Ros2ControlArm:
    """Implements `Arm` over a ROS 2 graph, of rclpy or of DDS alone. `close` closes the graph."""

    def __init__(
        self, graph: Graph, spec: ArmSpec, config: Ros2ControlConfig, kinematics: Kinematics | None = None
    ) -> None:
        if config.output in ("pose", "twist") and kinematics is None:
            raise ValueError(f"output {config.output} needs the arm's kinematics; give Kinematics(pose, jacobian)")
        self.spec, self.config = spec, config
        self._graph, self._kinematics = graph, kinematics
        self._state: ArmState | None = None
        self._problem = ""
        self._fault = ""
        self._sent: Vector | None = None
        self._width: float | None = None
        self._news = threading.Event()
        self._lock = threading.Lock()
        self._publish: Publish | None = None
        self._publish_width: Publish | None = None

    def connect(self) -> None:
        """Raises HardwareError where no joint states come, or they lack a joint."""
        if self._publish is not None:
            return
        config, graph = self.config, self._graph
        graph.subscribe(config.joint_states, "sensor_msgs/msg/JointState", SENSOR, self._take_joints)
        if config.fault_topic:
            graph.subscribe(config.fault_topic, "std_msgs/msg/String", STATUS, self._take_fault)
        if config.gripper == "topic":
            self._publish_width = graph.publisher(config.gripper_name, "std_msgs/msg/Float64MultiArray", COMMAND)
        publish = graph.publisher(config.command_topic, OUTPUT_TYPES[config.output], COMMAND)
        if not self._news.wait(config.connect_timeout_s):
            raise HardwareError(
                f"{self.spec.name}: no joint states come on {config.joint_states} within {config.connect_timeout_s} s; "
                "is the robot's driver running, with the same ROS_DOMAIN_ID?"
            )
        self._publish = publish
        self.read()

    def read(self) -> ArmState:
        if self._problem:
            raise HardwareError(f"{self.spec.name}: {self._problem}")
        if self._state is None:
            raise HardwareError(f"{self.spec.name} is not connected, or no joint states have come; call connect()")
        state = self._state
        return ArmState(state.position, state.velocity, state.gripper, state.stamp, self._fault)

    def send(self, command: Command) -> Command:
        position = checked_target(command, self.spec)
        state = self.read()
        with self._lock:
            if self._publish is None:
                raise HardwareError(f"{self.spec.name} is not connected; call connect()")
            self._publish(
                command_message(self.config, self.spec, position, state.position, self._kinematics, self._graph.now_s())
            )
            self._sent = position
            width = self._send_width(command.gripper)
        return Command(position, width, command.sequence)

    def stop(self, reason: str) -> None:  # noqa: ARG002  a controller is told to hold, not why
        with self._lock:
            if self._publish is None or (self._sent is None and self._state is None):
                return
            hold = self._sent if self._sent is not None else self.read().position
            self._publish(stop_message(self.config, self.spec, hold, self._kinematics, self._graph.now_s()))

    def close(self) -> None:
        if self._publish is not None:
            self.stop("close")
            time.sleep(0.02)  # the last message is on its way before its writer goes
        self._publish = None
        self._graph.close()

    def _take_joints(self, message: Any, stamp: float) -> None:
        try:
            rows = ros.joint_rows(message.name, (*self.spec.joint_names, *self.config.finger_joints))
        except HardwareError as error:
            if self._state is None:  # several publishers may share the topic; once ours has been seen, skip the others
                self._problem = str(error)
                self._news.set()
            return
        position = np.asarray(message.position, np.float64)[rows]
        velocity = np.asarray(message.velocity, np.float64)
        velocity = velocity[rows] if len(velocity) else np.zeros(len(rows))
        count = self.spec.num_joints
        self._state = ArmState(position[:count], velocity[:count], float(position[count:].sum()), stamp)
        self._problem = ""
        self._news.set()

    def _take_fault(self, message: Any, stamp: float) -> None:  # noqa: ARG002
        self._fault = str(message.data)

    def _send_width(self, width: float) -> float:
        """The width that stands after this command: one that hardly differs is not sent again."""
        config = self.config
        if not config.gripper:
            return 0.0
        width = float(np.clip(width, *self.spec.gripper_range))
        if self._width is not None and abs(width - self._width) < config.gripper_step:
            return self._width
        if self._publish_width is not None:
            self._publish_width(ros.forward_command(np.array([width])))
        else:
            position = config.gripper_scale * width
            goal = ros.gripper_goal(config.gripper, config.gripper_joint, position, config.gripper_effort)
            self._graph.send_goal(config.gripper_name, goal)
        self._width = width
        return width


class Ros2Camera:
    """Implements `Camera` over a topic of sensor_msgs/Image. The graph is closed by who made it."""

    def __init__(self, graph: Graph, name: str, topic: str, connect_timeout_s: float = 5.0) -> None:
        self.name, self.topic = name, topic
        self._graph, self._timeout = graph, connect_timeout_s
        self._newest: tuple[Any, float] | None = None
        self._news = threading.Event()
        self._subscribed = False

    def connect(self) -> None:
        """Raises HardwareError where no picture comes, or it is of an encoding that is not understood."""
        if not self._subscribed:
            self._graph.subscribe(self.topic, "sensor_msgs/msg/Image", SENSOR, self._take)
            self._subscribed = True
        if not self._news.wait(self._timeout):
            raise HardwareError(f"camera {self.name}: no pictures come on {self.topic}; is its driver running?")
        self.latest()

    def latest(self) -> Picture:
        if self._newest is None:
            raise HardwareError(f"camera {self.name} is not connected; call connect()")
        message, stamp = self._newest
        return Picture(ros.pixels(message), stamp, ros.stamp_ns(message.header))

    def close(self) -> None:
        """The graph's subscription ends with the graph."""

    def _take(self, message: Any, stamp: float) -> None:
        self._newest = (message, stamp)
        self._news.set()


__all__ = [
    "OUTPUT_TYPES", "Kinematics", "Output", "Ros2Camera", "Ros2ControlArm", "Ros2ControlConfig", "command_message",
    "stop_message",
]  # fmt: skip
