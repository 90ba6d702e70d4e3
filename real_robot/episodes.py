"""Episodes of an arm as a LeRobot dataset: every frame says whose command it was, and keeps what the policy proposed.

The action of a frame is the command that reached the arm, joint targets in rad and the gripper's width in m; the
proposal is the command that the policy's action would have been. A tick in which the arm was held is the policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from vla_rl.core import CameraSpec, Source
from vla_rl.data.lerobot_format import DatasetSpec
from vla_rl.data.lerobot_writer import LeRobotWriter
from vla_rl.real_robot.control_loop import Actions, Tick, joint_targets
from vla_rl.real_robot.interfaces import ArmSpec, Command, Vector
from vla_rl.real_robot.takeover import Control


class EpisodeRecorder:
    """Collects ticks between `start` and `end`. `add` only keeps what it is given, so that the control loop may call
    it; writing happens in `end`, on the caller's thread."""

    def __init__(
        self, writer: LeRobotWriter, to_command: Callable[[Actions, Command], Command] = joint_targets
    ) -> None:
        self._writer, self._to_command = writer, to_command
        self._ticks: list[Tick] | None = None
        self._instruction = ""

    @staticmethod
    def open(
        path: str | Path,
        arm: ArmSpec,
        pictures: Mapping[str, tuple[int, ...]],
        to_command: Callable[[Actions, Command], Command] = joint_targets,
    ) -> EpisodeRecorder:
        """A dataset at `path`, new or to go on with; `pictures`: camera to [h, w, 3]. Raises DatasetError where the one
        there has other features."""
        names = (*arm.joint_names, "gripper")
        cameras = {name: CameraSpec(shape[0], shape[1]) for name, shape in pictures.items()}
        spec = DatasetSpec(arm.rate_hz, names, names, cameras, arm.name, labelled=True)
        return EpisodeRecorder(LeRobotWriter.open(path, spec), to_command)

    @property
    def recording(self) -> bool:
        return self._ticks is not None

    @property
    def num_episodes(self) -> int:
        return self._writer.num_episodes

    def start(self, instruction: str) -> None:
        """Raises ValueError where an episode is being recorded, or without an instruction."""
        if self.recording:
            raise ValueError("an episode is being recorded; end it first")
        if not instruction:
            raise ValueError("an episode needs an instruction: set the task")
        self._instruction, self._ticks = instruction, []

    def add(self, tick: Tick) -> None:
        """A tick without a command at the arm is no frame."""
        if self._ticks is not None and tick.applied is not None:
            self._ticks.append(tick)

    def end(self, *, success: bool) -> int:
        """Write the episode, terminated at its last frame where it is a success, else truncated; returns its index.

        Raises ValueError where nothing was recorded.
        """
        ticks, self._ticks = self._ticks, None
        if not ticks:
            raise ValueError("no frame was recorded; start an episode and run the policy")
        applied = [tick.applied for tick in ticks if tick.applied is not None]
        standing = [Command(ticks[0].state.position, ticks[0].state.gripper), *applied[:-1]]
        proposed = [
            before if tick.proposal is None else self._to_command(tick.proposal, before)
            for tick, before in zip(ticks, standing, strict=True)
        ]
        human = torch.tensor([tick.source is Control.HUMAN for tick in ticks])
        last = torch.arange(len(ticks)) == len(ticks) - 1
        pictures = {
            name: torch.from_numpy(np.stack([tick.pictures[name].image for tick in ticks]))
            for name in self._writer.spec.cameras
        }
        return self._writer.add_episode(
            state=_rows([_row(tick.state.position, tick.state.gripper) for tick in ticks]),
            action=_rows([_row(c.position, c.gripper) for c in applied]),
            images=pictures,
            reward=(last & success).float(),
            success=last & success,
            instruction=self._instruction,
            truncated=not success,
            proposal=_rows([_row(c.position, c.gripper) for c in proposed]),
            source=torch.where(human, int(Source.HUMAN), int(Source.POLICY)),
        )

    def discard(self) -> None:
        """Forget the episode that is being recorded."""
        self._ticks = None

    def close(self) -> None:
        """What is being recorded is lost; what was ended is safe."""
        self.discard()
        self._writer.close()


def _row(position: Vector, gripper: float) -> Vector:
    return np.append(position, gripper)


def _rows(rows: list[Vector]) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.float32))


__all__ = ["EpisodeRecorder"]
