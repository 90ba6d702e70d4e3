"""LIBERO's task suites (Spatial, Object, Goal, 10, 90): language, two cameras, the benchmark's own initial states.

    LiberoConfig(task="libero_object/0").make(4, split="train")

LIBERO pins another MuJoCo and robosuite than this project, so it runs in a Python of its own: `vla-rl env install
libero`. Its scene assets are not in its package: it fetches them from a model hub when first used, or takes them from
`LiberoConfig.assets` or `$VLA_RL_LIBERO_ASSETS`. The far end is `hosts/libero_host.py`.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from vla_rl.envs.install import environments_folder
from vla_rl.envs.mujoco_simulators import make_mujoco
from vla_rl.envs.vector import ChunkedEnv, split_stream

# Without LIBERO's dependencies: its metadata asks for a training stack (robomimic, wandb, transformers, hydra), and its
# simulator needs none of it.
REQUIREMENTS: tuple[tuple[str, ...], ...] = (
    (
        "mujoco==3.8.1", "numpy==1.26.4", "numba==0.68.1", "scipy==1.17.1", "pillow==13.0.0", "termcolor==3.3.0",
        "opencv-python-headless==4.11.0.86", "matplotlib>=3.9,<4", "pyyaml==6.0.3", "future==1.0.0", "easydict==1.14",
        "gymnasium==1.4.0", "cloudpickle==3.1.2", "huggingface_hub>=0.34", "packaging>=24",
    ),
    ("--no-deps", "hf-libero==0.1.4", "robosuite==1.4.0"),
    ("--no-deps", "bddl==1.0.1"),
)  # fmt: skip

HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
NUM_INIT_STATES = 50
INIT_STATES = ("disjoint", "customary")


@dataclass(frozen=True)
class LiberoConfig:
    """A LIBERO task.

    `task`: "SUITE/NUMBER" in the official order, or "SUITE/NAME" (the name of its BDDL file); suites are the keys of
    `HORIZONS`. `cameras`: "agentview" and "robot0_eye_in_hand", of `image_size` pixels in the square. `rotate_180`:
    turn LIBERO's upside-down pictures by 180 degrees (upright, but mirrored) as the literature's policies expect; False
    gives them as LIBERO does. `init_states`: "disjoint" trains on the even ones of a task's 50 initial states and tests
    on the odd ones; "customary" is the literature's protocol, all 50 for both. The seed of an episode chooses its
    state: seed modulo their number. `settle_steps`: null actions before an episode begins. `max_episode_steps`: None
    takes the literature's. The state is the gripper's position (metres), rotation vector and fingers;
    `privileged_state` appends poses of objects and joints of furniture. `fast_pictures`: no shadows, reflections or
    multisampling; the pictures differ from LIBERO's. `assets`: folder of LIBERO's scene assets, None takes
    `$VLA_RL_LIBERO_ASSETS`.
    """

    task: str = "libero_object/0"
    cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand")
    image_size: int = 128
    rotate_180: bool = True
    init_states: str = "disjoint"
    settle_steps: int = 10
    max_episode_steps: int | None = None
    privileged_state: bool = False
    fast_pictures: bool = False
    assets: str | None = None
    num_workers: int = 1

    @property
    def control_hz(self) -> float:
        """Control steps a second."""
        return 20.0

    def init_state_ids(self, split: str) -> list[int]:
        """Which of a task's 50 initial states episodes of `split` begin from. Raises ValueError for unknown names."""
        split_stream(split, "libero")  # or it is unknown; there are no streams, the states decide
        if self.init_states not in INIT_STATES:
            raise ValueError(
                f"libero: init_states {self.init_states!r} is unknown; use one of {', '.join(INIT_STATES)}"
            )
        if self.init_states == "customary":
            return list(range(NUM_INIT_STATES))
        return list(range(0 if split == "train" else 1, NUM_INIT_STATES, 2))

    def make(
        self,
        num_envs: int,
        *,
        split: str,
        auto_reset: bool = False,
        final_images: bool = False,
        task: str | None = None,
    ) -> ChunkedEnv:
        """`num_envs` environments of `split` ("train" or "test").

        Raises FileNotFoundError where LIBERO or its assets are missing, ValueError for an unknown split, suite,
        init_states or size, and SimulatorError for what LIBERO does not know.
        """
        ids = self.init_state_ids(split)
        suite = (task or self.task).partition("/")[0]
        if suite not in HORIZONS:
            raise ValueError(f"libero: suite {suite!r} is unknown; a task is SUITE/NAME of {', '.join(HORIZONS)}")
        if self.image_size < 1 or self.settle_steps < 0:
            raise ValueError(
                f"libero: image_size {self.image_size} or settle_steps {self.settle_steps} is out of range"
            )
        assets = self.assets or os.environ.get("VLA_RL_LIBERO_ASSETS")
        if assets and not (Path(assets) / "scenes").is_dir():
            raise FileNotFoundError(f"libero: there are no scene assets in {assets}; expected a folder 'scenes' in it")
        options = asdict(self) | {
            "task": task or self.task,
            "assets": assets,
            "init_state_ids": ids,
            "max_episode_steps": self.max_episode_steps or HORIZONS[suite],
        }
        own = str(environments_folder() / "libero" / "config")
        return make_mujoco(
            "libero",
            options,
            num_envs,
            stream=(),
            auto_reset=auto_reset,
            final_images=final_images,
            environment={"LIBERO_CONFIG_PATH": os.environ.get("LIBERO_CONFIG_PATH", own)},
        )
