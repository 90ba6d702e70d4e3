"""Topics without ROS between two processes on loopback: latency and losses of joint states at 500 Hz and of VGA
pictures at 30 Hz, each alone and both at once. Latency is from before `publish` to the subscriber's callback, coding
included. Joint states keep ten: with a depth of one, which commands have, unread ones are replaced and count as lost.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

from tests.benchmarks.harness import BenchmarkResult, hardware
from vla_rl.real_robot.dds import SENSOR, DDSNode, Publisher, QoS, Received

NUM_JOINTS, HEIGHT, WIDTH = 7, 480, 640
STREAMS = {
    "joint_states": ("sensor_msgs/msg/JointState", QoS(reliable=True, depth=10), 500.0),
    "image": ("sensor_msgs/msg/Image", SENSOR, 30.0),
}


def stream_fields(name: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    if name == "image":
        pixels = rng.integers(0, 256, HEIGHT * WIDTH * 3, dtype=np.uint8)
        return {"height": HEIGHT, "width": WIDTH, "encoding": "rgb8", "step": 3 * WIDTH, "data": pixels}
    joints = rng.normal(size=(3, NUM_JOINTS))
    names = [f"joint{i}" for i in range(NUM_JOINTS)]
    return {"name": names, **dict(zip(("position", "velocity", "effort"), joints, strict=True))}


def publish(node: DDSNode, publisher: Publisher, name: str, seconds: float, sent: dict[str, int]) -> None:
    """At absolute deadlines; the header carries `time.monotonic()`, which processes of a machine share."""
    type_name, _, rate = STREAMS[name]
    message = node.message(type_name, stream_fields(name))
    begin = time.monotonic()
    for i in range(round(rate * seconds)):
        time.sleep(max(0.0, begin + i / rate - time.monotonic()))
        now = time.monotonic_ns()
        message.header.stamp.sec, message.header.stamp.nanosec = now // 10**9, now % 10**9
        publisher.publish(message)
        sent[name] += 1


def run_publishers(domain: int, names: list[str], seconds: float) -> None:
    """The other process: publishes when all are heard, and says how much."""
    sent = dict.fromkeys(names, 0)
    with DDSNode("publishers", domain) as node:
        publishers = {name: node.publisher(f"/{name}", *STREAMS[name][:2]) for name in names}
        if not all(publisher.wait_for_subscribers(10.0) for publisher in publishers.values()):
            raise SystemExit("nobody listens")
        threads = [threading.Thread(target=publish, args=(node, p, n, seconds, sent)) for n, p in publishers.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(0.5)  # the last ones arrive
    print(" ".join(f"{name}={count}" for name, count in sent.items()), flush=True)


def measure(domain: int, names: list[str], seconds: float) -> dict[str, dict[str, float]]:
    latencies: dict[str, list[float]] = {name: [] for name in names}

    def arrive(received: Received, name: str) -> None:
        stamp = received.message.header.stamp
        latencies[name].append(time.monotonic() - stamp.sec - stamp.nanosec * 1e-9)

    with DDSNode("subscribers", domain) as node:
        for name in names:
            type_name, qos, _ = STREAMS[name]
            node.subscription(f"/{name}", type_name, qos, lambda received, name=name: arrive(received, name))
        command = [sys.executable, "-m", "tests.benchmarks.dds", "--publish", *names]
        options = ["--domain", str(domain), "--seconds", str(seconds)]
        done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=True)
    sent = {name: int(count) for name, count in (pair.split("=") for pair in done.stdout.split())}
    report = {}
    for name, values in latencies.items():
        p50, p99 = np.percentile(np.array(values) * 1e3, [50, 99])
        report[name] = {
            "sent": sent[name],
            "lost": sent[name] - len(values),
            "p50_ms": round(float(p50), 3),
            "p99_ms": round(float(p99), 3),
            "max_ms": round(max(values) * 1e3, 3),
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--domain", type=int, default=1 + os.getpid() % 90)
    parser.add_argument("--publish", nargs="+", choices=sorted(STREAMS), help="be the other process")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if options.publish:
        run_publishers(options.domain, options.publish, options.seconds)
        return
    details: dict[str, Any] = {"hardware": hardware()}
    for title, names in {**{name: [name] for name in STREAMS}, "both": list(STREAMS)}.items():
        details[title] = measure(options.domain, names, options.seconds)
        print(f"{title}: {details[title]}", flush=True)
    p50 = details["joint_states"]["joint_states"]["p50_ms"]
    BenchmarkResult("dds", p50, None, None, "ms, median latency of a joint state", details).finish(options.save)


if __name__ == "__main__":
    main()
