"""What the twin offers beyond an arm: episodes that begin on request, a task that knows its success, faults."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_rl.real_robot.dds import COMMAND, SENSOR, STATUS, DDSNode, NodeConfig
from vla_rl.real_robot.interfaces import ArmState, HardwareError
from vla_rl.real_robot.twin_faults import Faults


@dataclass(frozen=True)
class EpisodeState:
    """`episode` counts resets. `success`: the task's predicate, now; `success_once`: it held since the reset.
    `failure`: the tabletop would have ended the episode without success. `steps`: control steps since the reset.
    `late_ticks`: how often the twin fell behind its clock. `split`: of the tabletop, in which
    the seeds are."""

    episode: int
    seed: int
    task: str
    instruction: str
    success: bool
    success_once: bool
    failure: bool
    steps: int
    max_steps: int
    late_ticks: int
    split: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> EpisodeState:
        return EpisodeState(**json.loads(text))


class TwinEpisodes:
    """Raises HardwareError where no twin answers."""

    def __init__(self, node: NodeConfig | None = None, *, arm: str = "arm", timeout_s: float = 5.0) -> None:
        self._timeout_s = timeout_s
        self._node = DDSNode.open(node or NodeConfig("vla_rl_episodes"))
        try:
            self._states = self._node.subscription("/episode/state", "std_msgs/msg/String", STATUS)
            self._tip = self._node.subscription(f"/{arm}/tip_pose", "geometry_msgs/msg/PoseStamped", SENSOR)
            self._resets = self._node.publisher("/episode/reset", "std_msgs/msg/Int64", COMMAND)
            self._faults = self._node.publisher("/twin/faults", "std_msgs/msg/String", COMMAND)
            if self._states.wait(timeout_s) is None or self._tip.wait(timeout_s) is None:
                raise HardwareError(
                    f"no twin in domain {self._node.domain}; start one: python -m vla_rl.real_robot.twin"
                )
            if not (self._resets.wait_for_subscribers(timeout_s) and self._faults.wait_for_subscribers(timeout_s)):
                raise HardwareError("something publishes episodes but takes no resets; is it the twin?")
        except BaseException:
            self._node.close()
            raise

    def state(self) -> EpisodeState:
        received = self._states.latest()
        assert received is not None  # since the constructor
        return EpisodeState.from_json(received.message.data)

    def reset(self, seed: int) -> EpisodeState:
        """Begin the tabletop's episode of `seed`; returns when the twin shows it. Raises HardwareError where it does
        not."""
        before = self.state().episode
        self._resets.publish(self._node.message("std_msgs/msg/Int64", {"data": seed}))
        end = time.monotonic() + self._timeout_s
        while (state := self.state()).episode == before or state.seed != seed:
            if time.monotonic() > end:
                raise HardwareError(f"the twin did not begin the episode of seed {seed} within {self._timeout_s} s")
            time.sleep(0.005)
        return state

    def inject(self, faults: Faults) -> None:
        """What is wrong from now on; `Faults()` ends it."""
        self._faults.publish(self._node.message("std_msgs/msg/String", {"data": faults.to_json()}))

    def tabletop_state(self, arm: ArmState) -> NDArray[np.float32]:
        """The tabletop's state [12]: seven joints, tip_x, tip_y, tip_z, tip_yaw, gripper_opening."""
        received = self._tip.latest()
        assert received is not None  # since the constructor
        p, q = received.message.pose.position, received.message.pose.orientation
        yaw = np.arctan2(2 * (q.w * q.z + q.x * q.y), 1 - 2 * (q.y**2 + q.z**2))
        return np.array([*arm.position, p.x, p.y, p.z, yaw, arm.gripper], np.float32)

    def close(self) -> None:
        self._node.close()


__all__ = ["EpisodeState", "TwinEpisodes"]
