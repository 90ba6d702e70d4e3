"""Which environment a recipe is about: plain values that the command line can change and a run folder can keep."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vla_rl.envs.gym import GymConfig
from vla_rl.envs.libero import LiberoConfig
from vla_rl.envs.maniskill import ManiSkillConfig
from vla_rl.envs.metaworld import MetaworldConfig
from vla_rl.envs.ogbench import OGBenchConfig
from vla_rl.envs.perturbed import Perturbation, PerturbedEnv
from vla_rl.envs.point_maze import make_point_maze
from vla_rl.envs.robosuite import RobosuiteConfig
from vla_rl.envs.tabletop import make_tabletop
from vla_rl.envs.twin import TwinEnvConfig
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.sim.scene import SceneConfig
from vla_rl.sim.shift import SceneShift


@dataclass(frozen=True)
class EnvConfig:
    """A tabletop environment; see `make_tabletop` for the options.

    `task`: a name in `vla_rl.sim.tasks`. `cameras`: "agent", "wrist" or none, of `image_size` pixels in the square.
    `max_episode_steps`: None takes the task's. `randomization` of looks and physics: "off", "train" or "test".
    `shift`: how scenes differ from those of training, for tests (`vla_rl.evaluation.conditions`).
    `engine`: "cpu" or "warp" (a GPU), on `device` (None: the GPU where there is one). `num_threads`: None takes all
    cores.
    """

    task: str = "reach"
    cameras: tuple[str, ...] = ("agent",)
    image_size: int = 64
    control: str = "ee_delta"
    reward: str = "sparse"
    max_episode_steps: int | None = None
    privileged_state: bool = False
    randomization: str = "off"
    shift: SceneShift = field(default_factory=SceneShift)
    engine: str = "cpu"
    device: str | None = None
    num_threads: int | None = None

    @property
    def control_hz(self) -> float:
        """Control steps a second of simulated time."""
        return SceneConfig().control_hz

    def make(
        self,
        num_envs: int,
        *,
        split: str,
        auto_reset: bool = False,
        final_images: bool = False,
        task: str | None = None,
    ) -> ChunkedEnv:
        """`num_envs` environments of `split`; `task` another one than the recipe's."""
        return make_tabletop(
            task or self.task,
            num_envs,
            split=split,
            cameras=dict.fromkeys(self.cameras, self.image_size),
            control=self.control,
            reward=self.reward,
            max_episode_steps=self.max_episode_steps,
            privileged_state=self.privileged_state,
            auto_reset=auto_reset,
            final_images=final_images,
            num_threads=self.num_threads,
            randomization=self.randomization,
            shift=self.shift,
            engine=self.engine,
            device=self.device,
        )


@dataclass(frozen=True)
class PointMazeConfig:
    """A point maze; see `vla_rl.envs.point_maze`. It has no cameras, and needs no simulator.

    `start`: "broad" or "far", where episodes of training and evaluation begin; `demo_start`: those of demonstrations.
    """

    layout: str = "wall_gap"
    start: str = "far"
    demo_start: str = "broad"
    max_episode_steps: int = 60

    @property
    def task(self) -> str:
        """Name of the task in results."""
        return f"point_maze/{self.layout}"

    @property
    def cameras(self) -> tuple[str, ...]:
        return ()

    @property
    def control_hz(self) -> float:
        """Control steps a second."""
        return 20.0

    @property
    def for_demos(self) -> PointMazeConfig:
        """Where demonstrations are recorded: from `demo_start`."""
        return replace(self, start=self.demo_start)

    def make(
        self,
        num_envs: int,
        *,
        split: str,
        auto_reset: bool = False,
        final_images: bool = False,
        task: str | None = None,
    ) -> ChunkedEnv:
        """`num_envs` environments of `split`. Raises ValueError for another `task` than this one."""
        del final_images
        if task not in (None, self.task):
            raise ValueError(f"the recipe's task is {self.task!r}, and there is no other: {task!r} was asked for")
        return make_point_maze(
            num_envs,
            self.layout,
            start=self.start,
            max_episode_steps=self.max_episode_steps,
            split=split,
            auto_reset=auto_reset,
        )


SimulatorConfig = (
    EnvConfig
    | PointMazeConfig
    | ManiSkillConfig
    | RobosuiteConfig
    | LiberoConfig
    | MetaworldConfig
    | GymConfig
    | OGBenchConfig
    | TwinEnvConfig
)


@dataclass(frozen=True)
class PerturbedConfig:
    """An environment of any simulator with what a test does to it: noisy sensors, late actions, other sentences."""

    env: SimulatorConfig
    perturbation: Perturbation = field(default_factory=Perturbation)

    @property
    def task(self) -> str:
        """Name of the task in results."""
        return self.env.task

    @property
    def cameras(self) -> tuple[str, ...]:
        """Those of the environment."""
        return self.env.cameras

    @property
    def control_hz(self) -> float:
        """Control steps a second."""
        return self.env.control_hz

    def make(
        self,
        num_envs: int,
        *,
        split: str,
        auto_reset: bool = False,
        final_images: bool = False,
        task: str | None = None,
    ) -> ChunkedEnv:
        """`num_envs` environments of `split`. Raises ValueError for another `task` where the other instruction is one
        of this task's scene."""
        if self.perturbation.other_instruction and task not in (None, self.task):
            raise ValueError(f"the other instruction is for the scene of {self.task!r}, and {task!r} was asked for")
        inner = self.env.make(num_envs, split=split, final_images=final_images, task=task)
        env = PerturbedEnv(inner.step_env, self.perturbation)
        return ChunkedEnv(env, images=inner.images, final_images=inner.final_images, auto_reset=auto_reset)


AnyEnvConfig = SimulatorConfig | PerturbedConfig


def demo_env(env: AnyEnvConfig) -> AnyEnvConfig:
    """Where demonstrations for `env` are recorded: there, unperturbed, where it does not say otherwise."""
    if isinstance(env, PerturbedConfig):
        return demo_env(env.env)
    return env.for_demos if isinstance(env, PointMazeConfig | ManiSkillConfig | OGBenchConfig | TwinEnvConfig) else env


def without_cameras(env: AnyEnvConfig) -> AnyEnvConfig:
    """`env` for whoever needs no pictures."""
    if isinstance(env, PerturbedConfig):
        return replace(env, env=without_cameras(env.env))
    return replace(env, cameras=()) if env.cameras else env
