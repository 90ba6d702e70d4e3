"""A second process on the topics. `echo DOMAIN DISTRO`: says something once, to whoever joins late, and sends back what
it gets. `shout DOMAIN CONFIG`: publishes on /ears ten times a second with a Cyclone configuration of its own."""

from __future__ import annotations

import sys
import time
import warnings

from vla_rl.real_robot import dds
from vla_rl.real_robot.dds import COMMAND, SENSOR, STATUS, DDSNode

TYPES = {"joints": "sensor_msgs/msg/JointState", "image": "sensor_msgs/msg/Image"}


def echo(domain: int, distro: str) -> None:
    node = DDSNode("echo", domain, distro=distro)
    once = node.publisher("/once", "std_msgs/msg/String", STATUS)
    once.publish(node.message("std_msgs/msg/String", {"data": "said before"}))
    for name, type_name in TYPES.items():
        back = node.publisher(f"/back/{name}", type_name, COMMAND)
        node.subscription(f"/to/{name}", type_name, COMMAND, lambda received, back=back: back.publish(received.message))
    print("ready", flush=True)
    sys.stdin.read()
    node.close()


def shout(domain: int, config: str) -> None:
    warnings.simplefilter("ignore")
    dds.cyclone_config = lambda network: config
    node = DDSNode("shout", domain, "other")
    publisher = node.publisher("/ears", "std_msgs/msg/String", SENSOR)
    print("ready", flush=True)
    while True:
        publisher.publish(node.message("std_msgs/msg/String", {"data": "shout"}))
        time.sleep(0.1)


if __name__ == "__main__":
    {"echo": echo, "shout": shout}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
