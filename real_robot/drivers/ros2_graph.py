"""The two ways into a ROS 2 graph: rclpy where ROS 2 is sourced, DDS alone (topics only) where it is not."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from vla_rl.real_robot.dds import DDSNode, NodeConfig, QoS
from vla_rl.real_robot.drivers.ros2_messages import Message
from vla_rl.real_robot.drivers.vendor import import_vendor
from vla_rl.real_robot.interfaces import HardwareError

_INSTALL = "rclpy comes with ROS 2, not from PyPI: source /opt/ros/<distro>/setup.bash first, or use DdsGraph"

Publish = Callable[[Message], None]
Receive = Callable[[Any, float], None]
"""(message, when it came in seconds of `time.monotonic()`), on a thread of the graph's."""


class Graph(Protocol):
    """What a ros2_control arm needs of a ROS 2 graph."""

    def publisher(self, topic: str, type_name: str, qos: QoS) -> Publish: ...

    def subscribe(self, topic: str, type_name: str, qos: QoS, receive: Receive) -> None: ...

    def send_goal(self, action: str, goal: Message) -> None:
        """Send a goal and do not wait; raises HardwareError where no server is there, or actions are not possible."""
        ...

    def now_s(self) -> float:
        """The ROS clock, for stamps."""
        ...

    def close(self) -> None: ...


class DdsGraph:
    """Topics without a ROS installation. Actions and services differ between the middlewares: there are none."""

    def __init__(self, config: NodeConfig) -> None:
        self._node = DDSNode.open(config)

    def publisher(self, topic: str, type_name: str, qos: QoS) -> Publish:
        publisher = self._node.publisher(topic, type_name, qos)
        return lambda message: publisher.publish(self._node.message(*message))

    def subscribe(self, topic: str, type_name: str, qos: QoS, receive: Receive) -> None:
        self._node.subscription(topic, type_name, qos, lambda received: receive(received.message, received.stamp))

    def send_goal(self, action: str, goal: Message) -> None:
        raise HardwareError(f"{action} ({goal.type_name}) is an action, and DDS alone has topics only; use rclpy")

    def now_s(self) -> float:
        return time.time()

    def close(self) -> None:
        self._node.close()


class RclpyGraph:
    """A node of rclpy's. Given none, it makes one and spins it in a thread.

    Its signal handlers stay out of the way (`SignalHandlerOptions.NO`): rclpy's own end the context on Ctrl-C, and the
    stop that should follow could not be published any more.
    """

    def __init__(self, node: Any = None, name: str = "vla_rl_arm") -> None:
        self._rclpy = rclpy = import_vendor("rclpy", _INSTALL)
        self._executor: Any = None
        self._clients: dict[str, Any] = {}
        # Messages must come while another callback of the node (configuring, an action) waits for them.
        self._group = importlib.import_module("rclpy.callback_groups").ReentrantCallbackGroup()
        self._context: Any = None
        if node is None:
            self._context = rclpy.Context()
            no_handlers = importlib.import_module("rclpy.signals").SignalHandlerOptions.NO
            rclpy.init(context=self._context, signal_handler_options=no_handlers)
            node = rclpy.create_node(name, context=self._context)
            executors = importlib.import_module("rclpy.executors")
            self._executor = executors.SingleThreadedExecutor(context=self._context)
            self._executor.add_node(node)
            threading.Thread(target=self._executor.spin, daemon=True, name=f"spin {name}").start()
        self.node = node

    def publisher(self, topic: str, type_name: str, qos: QoS) -> Publish:
        publisher = self.node.create_publisher(ros_type(type_name), topic, rclpy_qos(qos))
        return lambda message: publisher.publish(to_ros(message))

    def subscribe(self, topic: str, type_name: str, qos: QoS, receive: Receive) -> None:
        def callback(message: Any) -> None:
            receive(message, time.monotonic())

        kind = ros_type(type_name)
        self.node.create_subscription(kind, topic, callback, rclpy_qos(qos), callback_group=self._group)

    def send_goal(self, action: str, goal: Message) -> None:
        kind = ros_type(goal.type_name)
        if action not in self._clients:
            actions = importlib.import_module("rclpy.action")
            self._clients[action] = actions.ActionClient(self.node, kind, action)
        client = self._clients[action]
        if not client.server_is_ready():
            raise HardwareError(f"no action server answers on {action}; is the gripper's controller active?")
        message = kind.Goal()
        _set_fields(message, goal.fields)
        client.send_goal_async(message)

    def now_s(self) -> float:
        return self.node.get_clock().now().nanoseconds * 1e-9

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()
            self.node.destroy_node()
            self._rclpy.shutdown(context=self._context)
            self._executor = None


def ros_type(type_name: str) -> Any:
    """The class of "package/msg/Name". Raises HardwareError where the package is not installed."""
    package, kind, name = type_name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.{kind}"), name)
    except (ImportError, AttributeError) as error:
        raise HardwareError(
            f"{type_name} is not installed ({error}): apt install ros-$ROS_DISTRO-{package.replace('_', '-')}"
        ) from error


def to_ros(message: Message) -> Any:
    """`message` as rclpy has it."""
    made = ros_type(message.type_name)()
    _set_fields(made, message.fields)
    return made


def _set_fields(message: Any, fields: dict[str, Any]) -> None:
    # Of every ROS 2 installation: fills nested messages and arrays of messages from plain values.
    importlib.import_module("rosidl_runtime_py.set_message").set_message_fields(message, fields)


def rclpy_qos(qos: QoS) -> Any:
    """rclpy's profile of ours. Readers ask for no deadline: one that is asked for and not offered matches nothing."""
    library = importlib.import_module("rclpy.qos")
    return library.QoSProfile(
        history=library.HistoryPolicy.KEEP_LAST,
        depth=qos.depth,
        reliability=library.ReliabilityPolicy.RELIABLE if qos.reliable else library.ReliabilityPolicy.BEST_EFFORT,
        durability=(
            library.DurabilityPolicy.TRANSIENT_LOCAL if qos.transient_local else library.DurabilityPolicy.VOLATILE
        ),
    )


__all__ = ["DdsGraph", "Graph", "Publish", "RclpyGraph", "Receive", "rclpy_qos", "ros_type", "to_ros"]
