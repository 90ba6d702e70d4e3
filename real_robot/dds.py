"""ROS 2 topics without a ROS installation: cyclonedds carries the bytes, rosbags knows the messages. Topics only.

A node made here is one of the graph: `ros2 node list`, `ros2 topic list` and `ros2 topic info -v` show it, and nodes on
rmw_cyclonedds or rmw_fastrtps exchange messages with it. Services and actions differ between ROS's middlewares on the
wire and need rclpy.

    node = DDSNode("logger")
    joints = node.subscription("/joint_states", "sensor_msgs/msg/JointState", SENSOR)
    stop = node.publisher("/arm/joint_trajectory", "trajectory_msgs/msg/JointTrajectory", COMMAND)
    stop.publish(node.message("trajectory_msgs/msg/JointTrajectory", {}))

The wire is DDS without its security extension: whoever reaches it can command the arm. So a node is on this machine's
loopback interface unless it is given another network by name.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from vla_rl.real_robot.interfaces import HardwareError
from vla_rl.real_robot.ros_messages import MessageTypes, message_types

LOOPBACK = "loopback"
_INFO = "rmw_dds_common/msg/ParticipantEntitiesInfo"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QoS:
    """Quality of service. A best-effort reader takes from every writer, a reliable one from reliable writers alone."""

    reliable: bool
    depth: int
    transient_local: bool = False


COMMAND = QoS(reliable=True, depth=1)  # nothing is kept for late joiners: an old command is poison
SENSOR = QoS(reliable=False, depth=5)
STATUS = QoS(reliable=True, depth=1, transient_local=True)  # who joins late gets the last one


@dataclass(frozen=True)
class NodeConfig:
    """`domain`: None takes ROS_DOMAIN_ID, else 0. `network`: "loopback" or the name or address of a network interface
    ("eth0"), which opens topics and commands to whoever is on that network. `distro`: one of `ros_messages.DISTROS`."""

    name: str
    domain: int | None = None
    network: str = LOOPBACK
    distro: str = "jazzy"


# ------------------------------------------------------------------------------------------------------------- domains
_domains: dict[int, tuple[Any, str, int]] = {}  # number -> (domain, network, how many nodes)
_domains_lock = threading.Lock()


def cyclone_config(network: str) -> str:
    """Cyclone DDS's configuration for a network, which stands above CYCLONEDDS_URI. On loopback there is no multicast:
    participants find each other on the first 60 of the domain's ports."""
    if network != LOOPBACK:
        which = "address" if network[:1].isdigit() or ":" in network else "name"
        return (
            f"<CycloneDDS><Domain><General><Interfaces><NetworkInterface {which}='{network}'/></Interfaces></General>"
            "</Domain></CycloneDDS>"
        )
    return (
        "<CycloneDDS><Domain><General><Interfaces><NetworkInterface address='127.0.0.1'/></Interfaces>"
        "<AllowMulticast>false</AllowMulticast></General>"
        "<Discovery><ParticipantIndex>auto</ParticipantIndex><MaxAutoParticipantIndex>60</MaxAutoParticipantIndex>"
        "<Peers><Peer address='127.0.0.1'/></Peers></Discovery></Domain></CycloneDDS>"
    )


def _join_domain(number: int, network: str) -> None:
    """A process has one configuration a domain: nodes share it."""
    from cyclonedds.core import DDSException
    from cyclonedds.domain import Domain

    with _domains_lock:
        domain, existing, count = _domains.get(number, (None, network, 0))
        if existing != network:
            raise HardwareError(
                f"this process is in domain {number} on {existing!r} and cannot be there on {network!r} too; close the "
                "other nodes first, or use another domain"
            )
        if domain is None:
            try:
                domain = Domain(number, cyclone_config(network))
            except DDSException as error:
                raise HardwareError(
                    f"Cyclone DDS cannot open domain {number} on network {network!r}: {error}; is there such an "
                    "interface (ip address), and no other DDS domain of that number in this process?"
                ) from error
            if network != LOOPBACK:
                warnings.warn(
                    f"domain {number} is open to network {network!r}, without DDS security: whoever is on it can read "
                    "the topics and command the arm",
                    stacklevel=4,
                )
        _domains[number] = (domain, network, count + 1)


def _leave_domain(number: int) -> None:
    with _domains_lock:
        domain, network, count = _domains[number]
        if count > 1:
            _domains[number] = (domain, network, count - 1)
        else:
            del _domains[number]


# --------------------------------------------------------------------------------------------------------------- nodes
@dataclass(frozen=True)
class Received:
    """`stamp`: when it came, `time.monotonic()`. `source_stamp_ns`: the writer's clock, since 1970. `index`: how many
    came before it."""

    message: Any
    stamp: float
    source_stamp_ns: int
    index: int


class Publisher:
    """May be used from any thread."""

    def __init__(self, types: MessageTypes, type_name: str, writer: Any) -> None:
        self._types, self._type_name, self._writer = types, type_name, writer
        self._sample = types.sample_class(type_name)

    @property
    def num_subscribers(self) -> int:
        """Readers that are matched. One that was killed counts for another 10 s."""
        return len(self._open().get_matched_subscriptions())

    def publish(self, message: Any) -> None:
        """Raises HardwareError after `close` or where Cyclone DDS cannot send, TypeError for a message of another
        type."""
        from cyclonedds.core import DDSException

        if getattr(message, "__msgtype__", None) != self._type_name:
            raise TypeError(f"this topic carries {self._type_name}, got {type(message).__name__}")
        sample = self._sample()
        sample.cdr = self._types.serialize(message)
        try:
            self._open().write(sample)
        except DDSException as error:
            raise HardwareError(f"cannot publish {self._type_name}: {error}") from error

    def wait_for_subscribers(self, timeout_s: float) -> bool:
        """Until a reader is matched, and then as long as it usually takes the reader to know of it too: what is
        published before is lost to a volatile reader."""
        end = time.monotonic() + timeout_s
        while not self.num_subscribers:
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        time.sleep(0.1)
        return True

    def close(self) -> None:
        self._writer = None

    def _open(self) -> Any:
        writer = self._writer
        if writer is None:
            raise HardwareError("this publisher's node is closed")
        return writer


class Subscription:
    """The newest message of a topic, and a callback for each, on the subscription's own thread."""

    def __init__(
        self, node: DDSNode, type_name: str, reader: Any, depth: int, callback: Callable[[Received], None] | None
    ) -> None:
        self.num_received = 0
        self.num_malformed = 0
        self._type_name, self._types = type_name, node.types
        self._reader: Any = reader
        self._depth, self._callback = depth, callback
        self._latest: Received | None = None
        self._news = threading.Condition()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._receive, args=(node.participant,), daemon=True)
        self._thread.start()

    def latest(self) -> Received | None:
        """The newest message, None before the first; never blocks."""
        return self._latest

    def wait(self, timeout_s: float, after: int = -1) -> Received | None:
        """The newest message once there is one with an index above `after`; None if none comes in time."""
        with self._news:
            self._news.wait_for(lambda: self._latest is not None and self._latest.index > after, timeout_s)
            latest = self._latest
        return latest if latest is not None and latest.index > after else None

    def close(self) -> None:
        self._closing.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._reader = None

    def _receive(self, participant: Any) -> None:
        from cyclonedds.core import InstanceState, ReadCondition, SampleState, ViewState, WaitSet
        from cyclonedds.util import duration

        waitset = WaitSet(participant)
        waitset.attach(ReadCondition(self._reader, SampleState.NotRead | ViewState.Any | InstanceState.Any))
        while not self._closing.is_set():
            if not waitset.wait(duration(milliseconds=50)):
                continue
            samples = self._reader.take(self._depth)
            stamp = time.monotonic()
            for sample in samples:
                if sample.sample_info.valid_data:  # else the notice that a writer is gone
                    self._take(sample, stamp)

    def _take(self, sample: Any, stamp: float) -> None:
        try:
            message = self._types.deserialize(sample.cdr, self._type_name)
        except Exception:  # whatever numpy and rosbags raise on bytes from elsewhere
            self.num_malformed += 1
            return
        received = Received(message, stamp, sample.sample_info.source_timestamp, self.num_received)
        with self._news:
            self.num_received += 1
            self._latest = received
            self._news.notify_all()
        if self._callback is not None:
            try:
                self._callback(received)
            except Exception:
                _log.exception("a callback for %s failed", self._type_name)


class DDSNode:
    """A node of the ROS 2 graph with its publishers and subscriptions.

    Raises HardwareError where cyclonedds or rosbags is missing, or the domain cannot be opened on `network`.
    """

    def __init__(self, name: str, domain: int | None = None, network: str = LOOPBACK, *, distro: str = "jazzy") -> None:
        self.types = message_types(distro)
        from cyclonedds.domain import DomainParticipant
        from cyclonedds.qos import Policy, Qos

        self.name = name
        self.domain = int(os.environ.get("ROS_DOMAIN_ID") or 0) if domain is None else domain
        _join_domain(self.domain, network)
        self.participant: Any = DomainParticipant(self.domain, Qos(Policy.Userdata(b"enclave=/;")))
        self._publishers: list[Publisher] = []
        self._subscriptions: list[Subscription] = []
        self._gids: dict[str, list[bytes]] = {"reader": [], "writer": []}
        self._lock = threading.Lock()
        self._info = Publisher(self.types, _INFO, self._entity("DataWriter", "ros_discovery_info", _INFO, STATUS))
        self._announce()

    @staticmethod
    def open(config: NodeConfig) -> DDSNode:
        return DDSNode(config.name, config.domain, config.network, distro=config.distro)

    def message(self, type_name: str, fields: Mapping[str, Any]) -> Any:
        """See `MessageTypes.message`."""
        return self.types.message(type_name, fields)

    def publisher(self, topic: str, type_name: str, qos: QoS) -> Publisher:
        """A writer of `topic` ("/joint_states")."""
        writer = self._entity("DataWriter", "rt/" + topic.strip("/"), type_name, qos)
        publisher = Publisher(self.types, type_name, writer)
        self._publishers.append(publisher)
        self._announce("writer", writer)
        return publisher

    def subscription(
        self, topic: str, type_name: str, qos: QoS, callback: Callable[[Received], None] | None = None
    ) -> Subscription:
        """A reader of `topic`, from now on; `callback` runs on a thread of its own, one message after the other."""
        reader = self._entity("DataReader", "rt/" + topic.strip("/"), type_name, qos)
        subscription = Subscription(self, type_name, reader, qos.depth, callback)
        self._subscriptions.append(subscription)
        self._announce("reader", reader)
        return subscription

    def close(self) -> None:
        """Ends all publishers and subscriptions. Any number of times."""
        if self.participant is None:
            return
        for end in (*self._subscriptions, *self._publishers, self._info):
            end.close()
        self.participant = None
        _leave_domain(self.domain)

    def __enter__(self) -> DDSNode:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _entity(self, kind: str, dds_topic: str, type_name: str, qos: QoS) -> Any:
        """A DataWriter or DataReader with the quality of service of a ROS 2 endpoint."""
        from cyclonedds.pub import DataWriter
        from cyclonedds.qos import Policy, Qos
        from cyclonedds.sub import DataReader
        from cyclonedds.topic import Topic

        if self.participant is None:
            raise HardwareError(f"node {self.name!r} is closed")
        reliability = Policy.Reliability
        policies = [
            reliability.Reliable(max_blocking_time=100_000_000) if qos.reliable else reliability.BestEffort,
            Policy.Durability.TransientLocal if qos.transient_local else Policy.Durability.Volatile,
            Policy.History.KeepLast(qos.depth),
            Policy.DataRepresentation(use_cdrv0_representation=True),  # rmw_cyclonedds takes no other
        ]
        type_hash = self.types.type_hash(type_name)
        if type_hash is not None:
            policies.append(Policy.Userdata(f"typehash={type_hash};".encode()))
        topic = Topic(self.participant, dds_topic, self.types.sample_class(type_name))
        make = DataWriter if kind == "DataWriter" else DataReader
        return make(self.participant, topic, qos=Qos(*policies))

    def _announce(self, kind: str = "", endpoint: Any = None) -> None:
        """Tell the graph which endpoints are this node's, as rmw's do on ros_discovery_info."""
        with self._lock:
            if endpoint is not None:
                self._gids[kind].append(endpoint.guid.bytes)
            node = {
                "node_namespace": "/",
                "node_name": self.name,
                **{f"{kind}_gid_seq": [self._gid(g) for g in gids] for kind, gids in self._gids.items()},
            }
            fields = {"gid": self._gid(self.participant.guid.bytes), "node_entities_info_seq": [node]}
            self._info.publish(self.message(_INFO, fields))

    def _gid(self, guid: bytes) -> dict[str, Any]:
        """16 bytes, which Humble pads to 24."""
        empty = self.message("rmw_dds_common/msg/Gid", {}).data
        return {"data": np.frombuffer(guid.ljust(len(empty), b"\0"), np.uint8)}


__all__ = [
    "COMMAND",
    "LOOPBACK",
    "SENSOR",
    "STATUS",
    "DDSNode",
    "NodeConfig",
    "Publisher",
    "QoS",
    "Received",
    "Subscription",
    "cyclone_config",
]
