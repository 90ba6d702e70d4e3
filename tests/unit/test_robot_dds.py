"""ROS 2 topics between two processes: what arrives, what the graph shows, and who cannot hear."""

import fcntl
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vla_rl.real_robot import dds
from vla_rl.real_robot.dds import COMMAND, SENSOR, STATUS, DDSNode, QoS
from vla_rl.real_robot.interfaces import HardwareError
from vla_rl.real_robot.ros_messages import message_types

PEER = Path(__file__).with_name("dds_peer.py")
DOMAIN = 1 + 5 * os.getpid() % 90  # and up to four more: processes that test side by side do not meet
JOINTS, IMAGE, STRING = "sensor_msgs/msg/JointState", "sensor_msgs/msg/Image", "std_msgs/msg/String"
# As every Jazzy installation computes it (`ros2 topic info -v`).
JOINTS_HASH = "RIHS01_a13ee3a330e346c9d87b5aa18d24e11690752bd33a0350f11c5882bc9179260e"


def start_peer(*arguments):
    peer = subprocess.Popen(
        [sys.executable, str(PEER), *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert peer.stdout.readline() == "ready\n"
    return peer


def end_peer(peer):
    peer.stdin.close()
    peer.stdout.close()
    if peer.wait(timeout=10) not in (0, -signal.SIGKILL):
        raise AssertionError(f"the peer ended with {peer.returncode}")


@pytest.fixture(scope="module")
def peer():
    process = start_peer("echo", DOMAIN, "jazzy")
    yield process
    end_peer(process)


@pytest.fixture
def node():
    with DDSNode("tester", DOMAIN) as node:
        yield node


def joint_state(types):
    return types.message(
        JOINTS,
        {
            "header": {"stamp": {"sec": 5, "nanosec": 7}, "frame_id": "base"},
            "name": ["a", "joint_b"],
            "position": [0.1, -np.pi],
            "velocity": [1e-300, np.inf],
        },
    )


def there_and_back(node, name, type_name, message):
    back = node.subscription(f"/back/{name}", type_name, COMMAND)
    to = node.publisher(f"/to/{name}", type_name, COMMAND)
    assert to.wait_for_subscribers(5.0)
    before = time.monotonic()
    to.publish(message)
    received = back.wait(5.0)
    assert received is not None
    assert before < received.stamp < time.monotonic()
    assert abs(received.source_stamp_ns - time.time_ns()) < 5e9
    return received.message


def test_joint_states_come_back_bit_for_bit(peer, node):
    message = joint_state(node.types)
    assert node.types.serialize(there_and_back(node, "joints", JOINTS, message)) == node.types.serialize(message)


def test_a_vga_picture_comes_back_bit_for_bit(peer, node):
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    fields = {"height": 480, "width": 640, "encoding": "rgb8", "step": 1920, "data": pixels.reshape(-1)}
    message = there_and_back(node, "image", IMAGE, node.message(IMAGE, fields))
    assert np.array_equal(message.data.reshape(480, 640, 3), pixels)
    assert (message.height, message.width, message.encoding, message.step) == (480, 640, "rgb8", 1920)


def test_who_joins_late_gets_the_last_status(peer, node):
    received = node.subscription("/once", STRING, STATUS).wait(5.0)
    assert received is not None
    assert received.message.data == "said before"
    assert node.subscription("/once", STRING, SENSOR).wait(0.5) is None  # who did not ask for it, does not


def test_the_graph_shows_the_node_its_endpoints_and_type_hashes(peer, node):
    from cyclonedds.builtin import BuiltinDataReader, BuiltinTopicDcpsPublication
    from cyclonedds.qos import Policy

    reader = node._entity("DataReader", "ros_discovery_info", dds._INFO, QoS(True, 10, True))
    endpoints = BuiltinDataReader(node.participant, BuiltinTopicDcpsPublication)
    infos, published, end = [], {}, time.monotonic() + 5
    while time.monotonic() < end and not ("rt/back/image" in published and len(infos) > 1):
        infos += [node.types.deserialize(s.cdr, dds._INFO) for s in reader.take(10) if s.sample_info.valid_data]
        published |= {p.topic_name: p for p in endpoints.take(50) if hasattr(p, "topic_name")}
        time.sleep(0.02)
    [echo] = [i for i in infos if i.node_entities_info_seq[0].node_name == "echo"]
    gids = {gid.data.tobytes() for gid in echo.node_entities_info_seq[0].writer_gid_seq}
    assert gids == {published[t].key.bytes for t in ("rt/once", "rt/back/joints", "rt/back/image")}
    assert len(echo.node_entities_info_seq[0].reader_gid_seq) == 2
    assert echo.gid.data.tobytes() == published["rt/once"].participant_key.bytes
    assert published["rt/back/joints"].type_name == "sensor_msgs::msg::dds_::JointState_"
    assert published["rt/back/joints"].qos[Policy.Userdata].data == f"typehash={JOINTS_HASH};".encode()


def test_a_killed_writer_is_silent_and_a_new_one_is_heard():
    peer = start_peer("echo", DOMAIN + 1, "humble")  # another distribution: the same bytes, no hashes, longer ids
    with DDSNode("tester", DOMAIN + 1, distro="humble") as node:
        once = node.subscription("/once", STRING, STATUS)
        assert once.wait(5.0) is not None
        peer.kill()
        end_peer(peer)
        assert once.wait(0.3, after=0) is None
        again = start_peer("echo", DOMAIN + 1, "humble")
        assert once.wait(5.0, after=0) is not None
        end_peer(again)  # leaves in peace: its readers are told
        last = start_peer("echo", DOMAIN + 1, "humble")
        assert once.wait(5.0, after=1) is not None
        end_peer(last)


def test_a_reader_that_stands_still_does_not_block_a_writer():
    peer = start_peer("echo", DOMAIN + 3, "jazzy")
    with DDSNode("tester", DOMAIN + 3) as node:
        back = node.subscription("/back/joints", JOINTS, COMMAND)
        to = node.publisher("/to/joints", JOINTS, COMMAND)
        assert to.wait_for_subscribers(5.0)
        peer.send_signal(signal.SIGSTOP)
        message, longest = joint_state(node.types), 0.0
        for i in range(500):
            message.position[0] = i
            before = time.monotonic()
            to.publish(message)
            longest = max(longest, time.monotonic() - before)
            time.sleep(0.001)
        peer.send_signal(signal.SIGCONT)
        end = time.monotonic() + 5
        while (received := back.latest()) is None or received.message.position[0] != 499:
            assert time.monotonic() < end, "the newest did not come"
            time.sleep(0.01)
    assert longest < 0.08  # a writer that waits, waits 100 ms
    end_peer(peer)


def test_bytes_are_those_of_cyclonedds_own_coder():
    types = message_types()
    point = {"positions": [1.0, 2.0], "time_from_start": {"sec": 1}}
    status = {"name": "arm", "values": [{"key": "a", "value": "b"}], "level": 2}
    messages = [
        joint_state(types),
        types.message("trajectory_msgs/msg/JointTrajectory", {"joint_names": ["a", "b"], "points": [point, {}]}),
        types.message("geometry_msgs/msg/PoseStamped", {"pose": {"position": {"x": 1.5}}}),
        types.message("sensor_msgs/msg/CameraInfo", {"k": np.arange(9), "d": [0.5], "roi": {"do_rectify": True}}),
        types.message("diagnostic_msgs/msg/DiagnosticArray", {"status": [status]}),
        types.message("std_msgs/msg/Bool", {"data": True}),
    ]
    for message in messages:
        pure = pure_sample(types, message, {}).serialize(use_version_2=False)
        ours = types.serialize(message)
        assert ours.ljust(len(pure), b"\0") == pure, message.__msgtype__
        assert types.serialize(types.deserialize(pure, message.__msgtype__)) == ours


def pure_sample(types, message, made):
    """The same message as cyclonedds's own class, with its own coder."""
    sample = types._idl(message.__msgtype__, made)()
    for name, _ in types._fields(message.__msgtype__):
        value = getattr(message, name)
        if hasattr(value, "__msgtype__"):
            value = pure_sample(types, value, made)
        elif isinstance(value, list) and value and hasattr(value[0], "__msgtype__"):
            value = [pure_sample(types, v, made) for v in value]
        elif isinstance(value, np.ndarray):
            value = value.tolist()
        setattr(sample, name, value)
    return sample


def test_messages_from_plain_values():
    types = message_types()
    state = types.message(JOINTS, {"position": [1, 2]})
    assert state.position.dtype == np.float64
    assert (state.header.stamp.sec, state.name, len(state.velocity)) == (0, [], 0)
    assert types.message("sensor_msgs/msg/CameraInfo", {}).k.shape == (9,)
    strided = types.message(JOINTS, {"position": np.arange(6.0)[::2]})
    assert types.deserialize(types.serialize(strided), JOINTS).position.tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="has no field positions; it has header, name, position"):
        types.message(JOINTS, {"positions": [1]})
    with pytest.raises(ValueError, match="'JointState' is not in ROS 2 jazzy"):
        types.message("JointState", {})
    with pytest.raises(ValueError, match="'lunar' is unknown; use one of humble"):
        message_types("lunar")


def test_a_type_can_be_added_from_its_msg_file(node):
    node.types.register("my_msgs/msg/Grip", "float32 force\nuint8[3] codes\nstd_msgs/Header header\n")
    grips = node.subscription("/grip", "my_msgs/msg/Grip", SENSOR)
    publisher = node.publisher("/grip", "my_msgs/msg/Grip", COMMAND)
    assert publisher.wait_for_subscribers(2.0)
    publisher.publish(node.message("my_msgs/msg/Grip", {"force": 1.5, "codes": [1, 2, 3]}))
    received = grips.wait(2.0)
    assert received is not None
    assert received.message.codes.tolist() == [1, 2, 3]


def test_damaged_bytes_and_failing_callbacks_do_not_end_a_subscription(node, caplog):
    caplog.set_level(logging.ERROR)
    subscription = node.subscription("/names", STRING, QoS(True, 10), lambda received: 1 // len(received.message.data))
    publisher = node.publisher("/names", STRING, COMMAND)
    assert publisher.wait_for_subscribers(2.0)
    damaged = publisher._sample()
    damaged.cdr = b"\0\1\0\0\3\0\0\0\xff\xfe\0"  # no UTF-8; lengths that are wrong do not even leave Cyclone
    publisher._writer.write(damaged)
    for text in ("", "whole"):
        publisher.publish(node.message(STRING, {"data": text}))
    received = subscription.wait(2.0, after=0)
    assert received is not None
    assert (received.message.data, received.index) == ("whole", 1)
    assert subscription.num_malformed == 1
    assert [r.exc_info[0] for r in caplog.records] == [ZeroDivisionError]


def test_publishers_refuse_other_types_and_closed_nodes(node):
    publisher = node.publisher("/names", STRING, COMMAND)
    with pytest.raises(TypeError, match="carries std_msgs/msg/String, got sensor_msgs__msg__JointState"):
        publisher.publish(node.message(JOINTS, {}))
    node.close()
    node.close()
    with pytest.raises(HardwareError, match="closed"):
        publisher.publish(node.message(STRING, {}))
    with pytest.raises(HardwareError, match="'tester' is closed"):
        node.publisher("/names", STRING, COMMAND)


def other_address():
    """The address of a network interface that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:
                continue
            address = socket.inet_ntoa(answer[20:24])
            if not address.startswith("127."):
                return address
    pytest.skip("this machine has no network but loopback")


def test_only_a_node_that_is_opened_hears_the_network():
    address = other_address()
    config = dds.cyclone_config(address).replace(  # it looks for nodes on that address, without multicast
        "</Domain>", f"<Discovery><Peers><Peer address='{address}'/></Peers></Discovery></Domain>"
    )
    peer = start_peer("shout", DOMAIN + 2, config)
    with DDSNode("tester", DOMAIN + 2) as node:
        assert node.subscription("/ears", STRING, SENSOR).wait(2.0) is None
        with pytest.raises(HardwareError, match=r"is in domain .* on 'loopback' and cannot be there"):
            DDSNode("second", DOMAIN + 2, address)
    with pytest.warns(UserWarning, match="whoever is on it can read the topics and command the arm"):
        opened = DDSNode("tester", DOMAIN + 2, address)
    assert opened.subscription("/ears", STRING, SENSOR).wait(5.0) is not None
    opened.close()
    peer.kill()
    end_peer(peer)


def test_an_unknown_interface_is_an_error():
    with pytest.raises(HardwareError, match=r"cannot open domain .* on network 'nowhere0'"):
        DDSNode("tester", DOMAIN + 4, "nowhere0")


def test_missing_packages_are_named():
    code = (
        "import sys; sys.modules['cyclonedds'] = None\n"
        "from vla_rl.real_robot.dds import DDSNode\n"
        "assert 'torch' not in sys.modules\n"
        "DDSNode('tester')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "HardwareError: ROS 2 topics need the packages cyclonedds and rosbags" in done.stderr
    assert "pip install 'vla-rl[robot]'" in done.stderr
