"""The digital twin of a tabletop arm: one process with MuJoCo's physics and cameras on its own clock, which serves the
topics that a robot's ros2_control would. The bridge cannot tell.

    python -m vla_rl.real_robot.twin --task reach --cameras agent wrist

It is the tabletop simulator (`envs/tabletop.py`) in real time, so that a policy trained there sees the same pictures,
state and arm, and an episode's seed means the same episode. Topics, with `arm` as in `TwinConfig`:

    /joint_states              out  sensor_msgs/msg/JointState       seven joints and both fingers, every physics step
    /<arm>/tip_pose            out  geometry_msgs/msg/PoseStamped    of the point between the fingertips
    /<arm>/fault               out  std_msgs/msg/String              what the robot reports, "" for nothing
    /camera/<name>/image_raw   out  sensor_msgs/msg/Image            rgb8
    /episode/state             out  std_msgs/msg/String              JSON: see `EpisodeState`
    /episode/instruction       out  std_msgs/msg/String
    /episode/success           out  std_msgs/msg/Bool                the task's predicate, now
    /<arm>/joint_trajectory    in   trajectory_msgs/msg/JointTrajectory  see `TrajectoryController`
    /gripper/commands          in   std_msgs/msg/Float64MultiArray   [width in m]
    /episode/reset             in   std_msgs/msg/Int64               begin the episode of this seed
    /twin/faults               in   std_msgs/msg/String              JSON: see `Faults`
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's compiled modules have no type stubs)

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mujoco
import numpy as np
import torch

from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv
from vla_rl.real_robot.dds import SENSOR, STATUS, DDSNode, NodeConfig, Publisher, QoS, Received
from vla_rl.real_robot.drivers.twin_episodes import EpisodeState
from vla_rl.real_robot.interfaces import Vector
from vla_rl.real_robot.twin_controller import TrajectoryController
from vla_rl.real_robot.twin_faults import Faults, FaultyWire, Recorder
from vla_rl.sim.arm import FINGER_NAMES, FINGER_TRAVEL, JOINT_NAMES, NUM_JOINTS

_JOINT_STATES = QoS(reliable=True, depth=1)  # as the joint state broadcaster offers them: readers may choose
_LATE_S = 0.1  # behind its clock by more than this, the twin lets time pass instead of catching up
_EVERYONE = torch.tensor([0])


@dataclass(frozen=True)
class TwinConfig:
    """`task`, `split`, `randomization`: of the tabletop. `cameras`: their pictures are squares of `image_size` pixels.
    `camera_hz`: at best a divisor of the physics' rate. `cmd_timeout_s`: of the trajectory controller, from a
    trajectory's last point. `record`: a file for every command received and every change of the arm's status, "" for
    none."""

    task: str = "reach"
    split: str = "train"
    seed: int = 0
    cameras: tuple[str, ...] = ("agent",)
    image_size: int = 64
    camera_hz: float = 20.0
    randomization: str = "off"
    arm: str = "arm"
    cmd_timeout_s: float = 0.2
    node: NodeConfig = field(default_factory=lambda: NodeConfig("twin"))
    faults: Faults = field(default_factory=Faults)
    record: str = ""


class Twin:
    """Build it, then `run` until `stop`. Raises ValueError for an unknown task, split or camera, HardwareError where
    topics cannot be opened."""

    def __init__(self, config: TwinConfig) -> None:
        self.config = config
        cameras = dict.fromkeys(config.cameras, config.image_size)
        tabletop = TabletopConfig(config.split, cameras, randomization=config.randomization, num_threads=1)
        self.env = TabletopEnv(config.task, 1, tabletop)
        model, scene = self.env.scene.model, self.env.scene
        self._names = (*JOINT_NAMES, *FINGER_NAMES)
        self._qpos = [scene.joint_qpos[name] for name in self._names]
        self._qvel = [int(model.joint(name).dofadr[0]) for name in self._names]
        self._period = scene.config.timestep
        self._camera_every = max(1, round(1.0 / (config.camera_hz * self._period)))
        self._frames: dict[str, Any] = {}
        self._ticks, self._late, self._episodes = 0, 0, -1
        self._stopping = threading.Event()
        self._wire = FaultyWire()
        self._recorder = Recorder(config.record)
        self._status = ""
        self.controller = TrajectoryController(JOINT_NAMES, self._measured(), config.cmd_timeout_s)
        self._node = DDSNode.open(config.node)
        self._open_topics()
        self._set_faults(config.faults)
        self._reset(config.seed)

    # --------------------------------------------------------------------------------------------------------- topics
    def _open_topics(self) -> None:
        arm, node = self.config.arm, self._node
        images = {f"/camera/{name}/image_raw": ("sensor_msgs/msg/Image", SENSOR) for name in self.config.cameras}
        self._publishers: dict[str, Publisher] = {
            topic: node.publisher(topic, type_name, qos)
            for topic, (type_name, qos) in {
                "/joint_states": ("sensor_msgs/msg/JointState", _JOINT_STATES),
                f"/{arm}/tip_pose": ("geometry_msgs/msg/PoseStamped", _JOINT_STATES),
                f"/{arm}/fault": ("std_msgs/msg/String", STATUS),
                "/episode/state": ("std_msgs/msg/String", STATUS),
                "/episode/instruction": ("std_msgs/msg/String", STATUS),
                "/episode/success": ("std_msgs/msg/Bool", STATUS),
                **images,
            }.items()
        }
        self._listen(f"/{arm}/joint_trajectory", "trajectory_msgs/msg/JointTrajectory", self._take_trajectory)
        self._listen("/gripper/commands", "std_msgs/msg/Float64MultiArray", self._take_gripper)
        self._listen("/episode/reset", "std_msgs/msg/Int64", lambda received: self._reset(received.message.data))
        self._listen("/twin/faults", "std_msgs/msg/String", self._take_faults)

    def _listen(self, topic: str, type_name: str, action: Callable[[Received], None]) -> None:
        """Commands are written down when they come, and happen between two physics steps, if they get through."""

        def receive(received: Received) -> None:
            self._recorder.write("received", received.stamp, {"topic": topic, **_plain(received)})
            self._wire.pass_on(topic, lambda: action(received))

        self._node.subscription(topic, type_name, QoS(reliable=True, depth=20), receive)

    def _publish(self, topic: str, message: Any) -> None:
        self._wire.pass_on(topic, lambda: self._publishers[topic].publish(message))

    def _header(self) -> dict[str, Any]:
        now = time.time_ns() + round(self._wire.faults.clock_step_s * 1e9)
        return {"stamp": {"sec": now // 10**9, "nanosec": now % 10**9}, "frame_id": "base"}

    # ------------------------------------------------------------------------------------------------------- commands
    def _take_trajectory(self, received: Received) -> None:
        now, stamp = time.monotonic(), received.message.header.stamp
        clock = time.time_ns() * 1e-9 + self._wire.faults.clock_step_s
        begins = None if stamp.sec == stamp.nanosec == 0 else stamp.sec + stamp.nanosec * 1e-9 - clock
        refused = (
            f"the robot reports {self._wire.faults.fault!r}"
            if self._wire.faults.fault
            else self.controller.accept(received.message, now, self._measured(), begins)
        )
        if refused:
            self._recorder.write("refused", now, {"why": refused})

    def _take_gripper(self, received: Received) -> None:
        width = received.message.data
        if len(width) == 1 and np.isfinite(width[0]) and not self._wire.faults.fault:
            self._finger_target = float(np.clip(width[0] / 2, 0.0, FINGER_TRAVEL))
        else:
            self._recorder.write("refused", time.monotonic(), {"why": f"gripper width {list(width)}"})

    def _take_faults(self, received: Received) -> None:
        try:
            self._set_faults(Faults.from_json(received.message.data))
        except (ValueError, TypeError) as error:
            self._recorder.write("refused", time.monotonic(), {"why": str(error)})

    def _set_faults(self, faults: Faults) -> None:
        if faults.exit_code is not None:
            os._exit(faults.exit_code)
        self._wire.faults = faults
        if faults.fault:
            self.controller.hold(self._measured(), "fault")
        self._publish(f"/{self.config.arm}/fault", self._node.message("std_msgs/msg/String", {"data": faults.fault}))

    def _reset(self, seed: int) -> None:
        self.env.reset(_EVERYONE, torch.tensor([seed]))
        self._seed, self._episodes = seed, self._episodes + 1
        self._success, self._success_once, self._failure = False, False, False
        self._ticks = self._steps = 0
        self._finger_target = FINGER_TRAVEL
        self.controller.hold(self._measured(), "reset")
        instruction = self._node.message("std_msgs/msg/String", {"data": self.env.instructions[0]})
        self._publish("/episode/instruction", instruction)
        self._publish("/episode/success", self._node.message("std_msgs/msg/Bool", {"data": False}))
        self._publish_arm()
        self._publish_pictures()
        self._publish_episode()

    # ----------------------------------------------------------------------------------------------------------- time
    def run(self) -> None:
        """Physics in real time until `stop`, on the calling thread."""
        due = time.monotonic()
        while not self._stopping.is_set():
            self._tick()
            due += self._period
            ahead = due - time.monotonic()
            if ahead < -_LATE_S:
                self._late += 1
                due = time.monotonic()
            elif ahead > 0:
                time.sleep(ahead)

    def stop(self) -> None:
        """`run` ends. For any thread and signal handlers."""
        self._stopping.set()

    def close(self) -> None:
        self._node.close()
        self._recorder.close()
        self.env.close()

    def _tick(self) -> None:
        self._wire.deliver()
        now, engine = time.monotonic(), self.env.engine
        engine.ctrl[0, :NUM_JOINTS] = torch.from_numpy(self.controller.sample(now, self._measured()))
        engine.ctrl[0, NUM_JOINTS : NUM_JOINTS + 2] = self._finger_target
        engine.step(torch.tensor([True]), 1)
        self._ticks += 1
        self._publish_arm()
        if self._ticks % self._camera_every == 0:
            self._publish_pictures()
        if self._ticks % self.env.config.scene.substeps == 0:
            self._evaluate()
            self._publish_episode()
        if self.controller.status != self._status:
            self._status = self.controller.status
            self._recorder.write("status", now, {"status": self._status, "position": self._measured().tolist()})
        self._wire.deliver()

    def _measured(self) -> Vector:
        return self.env.engine.qpos[0].numpy()[self._qpos[:NUM_JOINTS]]

    def _evaluate(self) -> None:
        """The task's predicate, at the tabletop's control rate, as its episodes have it."""
        env = self.env
        status = env.task.evaluate(env.view, env.variables)
        for name, value in status.variables.items():
            env.variables[name].copy_(value)
        self._steps += 1
        success = bool(status.success[0])
        if success != self._success:
            self._publish("/episode/success", self._node.message("std_msgs/msg/Bool", {"data": success}))
        self._success, self._success_once = success, self._success_once or success
        self._failure = self._failure or bool(status.failure[0])

    # ----------------------------------------------------------------------------------------------------- publishing
    def _publish_arm(self) -> None:
        engine, header = self.env.engine, self._header()
        joints = {
            "header": header,
            "name": self._names,
            "position": engine.qpos[0].numpy()[self._qpos],
            "velocity": engine.qvel[0].numpy()[self._qvel],
        }
        self._publish("/joint_states", self._node.message("sensor_msgs/msg/JointState", joints))
        position = self.env.view.tip_pos[0].tolist()
        pose = {
            "position": dict(zip("xyz", position, strict=True)),
            "orientation": dict(zip("wxyz", _quaternion(self.env.view.tip_rotation[0].numpy()), strict=True)),
        }
        message = self._node.message("geometry_msgs/msg/PoseStamped", {"header": header, "pose": pose})
        self._publish(f"/{self.config.arm}/tip_pose", message)

    def _publish_pictures(self) -> None:
        frozen = self._wire.faults.freeze
        if set(self.config.cameras) - set(frozen):
            for name, image in self.env.observe(_EVERYONE, images=True).images.items():
                if name not in frozen or name not in self._frames:
                    self._frames[name] = self._picture(image[0].numpy())
        for name, message in self._frames.items():
            self._publish(f"/camera/{name}/image_raw", message)

    def _picture(self, image: np.ndarray) -> Any:
        height, width = image.shape[:2]
        fields = {"height": height, "width": width, "encoding": "rgb8", "step": 3 * width, "data": image.reshape(-1)}
        return self._node.message("sensor_msgs/msg/Image", {"header": self._header(), **fields})

    def _publish_episode(self) -> None:
        state = EpisodeState(
            episode=self._episodes,
            seed=self._seed,
            task=self.config.task,
            instruction=self.env.instructions[0],
            success=self._success,
            success_once=self._success_once,
            failure=self._failure,
            steps=self._steps,
            max_steps=self.env.max_episode_steps,
            late_ticks=self._late,
            split=self.config.split,
        )
        self._publish("/episode/state", self._node.message("std_msgs/msg/String", {"data": state.to_json()}))


def _quaternion(rotation: np.ndarray) -> list[float]:
    """w, x, y, z of a rotation matrix."""
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, rotation.reshape(9))
    return quaternion.tolist()


def _plain(received: Received) -> dict[str, Any]:
    """A command as JSON values."""
    message = received.message
    if hasattr(message, "points"):
        return {
            "frame_id": message.header.frame_id,
            "joint_names": list(message.joint_names),
            "positions": [list(p.positions) for p in message.points],
            "times": [p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points],
        }
    data = message.data
    return {"data": list(data) if isinstance(data, np.ndarray) else data}


def run_twin(config: TwinConfig) -> None:
    """Runs until SIGINT or SIGTERM."""
    twin = Twin(config)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: twin.stop())
        print(f"twin: {config.task!r} is up in domain {twin._node.domain} on {config.node.network}", flush=True)
        twin.run()
    finally:
        twin.close()


def main() -> None:
    import tyro

    run_twin(tyro.cli(TwinConfig, description=__doc__))


if __name__ == "__main__":
    main()

__all__ = ["Twin", "TwinConfig", "main", "run_twin"]
