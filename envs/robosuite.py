"""robosuite's tasks (Lift, Can, Stack, Square, Door) on a Panda, with robosuite's own controllers, scenes and success.

    RobosuiteConfig(task="Can", cameras=("agentview",)).make(4, split="train")

robosuite pins another MuJoCo than this project, so it runs in a Python of its own: `vla-rl env install robosuite`. The
far end is `hosts/robosuite_host.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vla_rl.envs.mujoco_simulators import make_mujoco
from vla_rl.envs.vector import ChunkedEnv, split_stream

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
        stream = split_stream(split, "robosuite")
        if self.reward not in ("sparse", "dense"):
            raise ValueError(f"robosuite: reward {self.reward!r} is unknown; use sparse or dense")
        if self.image_size < 1 or self.control_hz <= 0:
            raise ValueError(
                f"robosuite: image_size {self.image_size} and control_hz {self.control_hz} must be positive"
            )
        name, horizon = TASKS.get(task or self.task, (task or self.task, 500))
        options = asdict(self) | {"task": name, "max_episode_steps": self.max_episode_steps or horizon}
        return make_mujoco(
            "robosuite", options, num_envs, stream=stream, auto_reset=auto_reset, final_images=final_images
        )
