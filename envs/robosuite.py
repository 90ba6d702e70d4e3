"""robosuite's tasks (Lift, Can, Stack, Square, Door) on a Panda, with robosuite's own controllers, scenes and success.

    RobosuiteConfig(task="Can", cameras=("agentview",)).make(4, split="train")

robosuite pins another MuJoCo than this project, so it runs in a Python of its own: `vla-rl env install robosuite`. The
far end is `hosts/robosuite_host.py`.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace

from vla_rl.envs.install import simulator_python
from vla_rl.envs.remote import HostConfig, RemoteStepEnv
from vla_rl.envs.vector import ChunkedEnv

# Without robosuite's dependencies: it asks for a keyboard driver that must be compiled, and for solvers of controllers
# that are not used here. Its own numpy limit comes through numba.
REQUIREMENTS: tuple[tuple[str, ...], ...] = (
    (
        "mujoco==3.9.0", "numpy==1.26.4", "numba==0.68.1", "scipy==1.17.1", "pillow==13.0.0", "termcolor==3.3.0",
        "opencv-python-headless==4.11.0.86",
    ),
    ("--no-deps", "robosuite==1.5.2"),
)  # fmt: skip

# Short names of the literature: robosuite's name, and the horizon (robomimic's 400, else robosuite's 500).
TASKS = {
    "Lift": ("Lift", 400),
    "Can": ("PickPlaceCan", 400),
    "Square": ("NutAssemblySquare", 400),
    "Stack": ("Stack", 500),
    "Door": ("Door", 500),
}
SPLIT_STREAMS = {"train": (0,), "test": (1,)}
_RENDER_SIZE = 256


@dataclass(frozen=True)
class RobosuiteConfig:
    """A robosuite task with one Panda.

    `task`: a key of `TASKS`, or any other single-arm task by robosuite's name. `cameras`: robosuite's names
    ("agentview", "robot0_eye_in_hand", ...), pictures upright, `image_size` pixels in the square. `control`: "osc_pose"
    (deltas of the gripper's pose, in units of 5 cm and 0.5 rad), "osc_position", "ik_pose", "joint_position"
    or "joint_torque", each in [-1, 1] with the gripper (-1 open) last. `reward`: "sparse" (1 at
    success) or "dense" (robosuite's shaping). `max_episode_steps`: None takes the literature's. `privileged_state`:
    append robosuite's `object-state` to the gripper's pose (metres, quaternion x y z w) and fingers. `fast_pictures`:
    no shadows, reflections or multisampling; the pictures differ from robosuite's.
    """

    task: str = "Lift"
    cameras: tuple[str, ...] = ("agentview",)
    image_size: int = 84
    control: str = "osc_pose"
    reward: str = "sparse"
    control_hz: float = 20.0
    max_episode_steps: int | None = None
    privileged_state: bool = False
    fast_pictures: bool = False
    num_workers: int = 1

    @property
    def for_demos(self) -> RobosuiteConfig:
        """Where demonstrations are recorded: here."""
        return self

    @property
    def blind(self) -> RobosuiteConfig:
        """The same without cameras."""
        return replace(self, cameras=())

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

        Raises FileNotFoundError where robosuite is not installed, ValueError for an unknown split, reward or size, and
        SimulatorError for what robosuite does not know.
        """
        if split not in SPLIT_STREAMS:
            raise ValueError(f"robosuite: split {split!r} is unknown; use one of {', '.join(SPLIT_STREAMS)}")
        if self.reward not in ("sparse", "dense"):
            raise ValueError(f"robosuite: reward {self.reward!r} is unknown; use sparse or dense")
        if self.image_size < 1 or self.control_hz <= 0:
            raise ValueError(
                f"robosuite: image_size {self.image_size} and control_hz {self.control_hz} must be positive"
            )
        name, horizon = TASKS.get(task or self.task, (task or self.task, 500))
        options = asdict(self) | {
            "task": name,
            "cameras": {camera: [self.image_size, self.image_size] for camera in self.cameras},
            "max_episode_steps": self.max_episode_steps or horizon,
            "render_size": [_RENDER_SIZE, _RENDER_SIZE],
        }
        opengl = {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
        host = HostConfig(simulator_python("robosuite"), "robosuite", options, environment=opengl)
        env = RemoteStepEnv(host, num_envs, num_workers=self.num_workers, stream=SPLIT_STREAMS[split])
        return ChunkedEnv(env, final_images=final_images, auto_reset=auto_reset)
