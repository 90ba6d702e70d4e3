"""Metaworld's 50 tasks on a Sawyer arm, each with a scripted expert.

    MetaworldConfig(task="drawer-open-v3", cameras=()).make(4, split="train")

Metaworld pins another MuJoCo than this project, so it runs in a Python of its own: `vla-rl env install metaworld`. The
far end is `hosts/metaworld_host.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vla_rl.envs.mujoco_simulators import make_mujoco
from vla_rl.envs.vector import ChunkedEnv, split_stream

# gymnasium 1.4 imports packaging and does not say so.
REQUIREMENTS: tuple[tuple[str, ...], ...] = (
    (
        "metaworld==3.1.1", "mujoco==3.3.0", "gymnasium==1.4.0", "numpy==2.4.6", "scipy==1.17.1", "imageio==2.38.1",
        "packaging==26.3",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class MetaworldConfig:
    """A Metaworld task.

    `task`: one of the 50, such as "pick-place-v3". `cameras`: "corner", "corner2", "corner3", "corner4" (upright here:
    Metaworld's hang upside down), "topview", "behindGripper" or "gripperPOV", of `image_size` pixels in the square.
    Actions in [-1, 1] are the hand's motion x, y, z in units of 1 cm and the gripper (-1 open). `reward`: "sparse" (1
    at success) or "dense" (Metaworld's own, up to 10 a step). `max_episode_steps`: None takes Metaworld's 500.
    `privileged_state`: all 39 numbers, with objects, the step before and the goal; else the hand's position (metres)
    and the gripper's opening (0 to 1). `fast_pictures`: no shadows, reflections or multisampling; the pictures differ.
    """

    task: str = "reach-v3"
    cameras: tuple[str, ...] = ("corner2",)
    image_size: int = 84
    reward: str = "sparse"
    max_episode_steps: int | None = None
    privileged_state: bool = False
    fast_pictures: bool = False
    num_workers: int = 1

    @property
    def control_hz(self) -> float:
        """Control steps a second."""
        return 80.0

    def make(
        self,
        num_envs: int,
        *,
        split: str,
        auto_reset: bool = False,
        final_images: bool = False,
        task: str | None = None,
    ) -> ChunkedEnv:
        """`num_envs` environments of `split` ("train" or "test": no seed gives the same episode in both).

        Raises FileNotFoundError where Metaworld is not installed, ValueError for an unknown split, reward or size, and
        SimulatorError for what Metaworld does not know.
        """
        stream = split_stream(split, "metaworld")
        if self.reward not in ("sparse", "dense"):
            raise ValueError(f"metaworld: reward {self.reward!r} is unknown; use sparse or dense")
        if self.image_size < 1:
            raise ValueError(f"metaworld: image_size must be positive, got {self.image_size}")
        options = asdict(self) | {"task": task or self.task, "max_episode_steps": self.max_episode_steps or 500}
        return make_mujoco(
            "metaworld", options, num_envs, stream=stream, auto_reset=auto_reset, final_images=final_images
        )
