"""Our own simulator as an environment: tabletop tasks with pictures and sentences.

env = make_tabletop("reach", num_envs=64, cameras={"agent": 64})
obs = env.reset(seeds=range(64))
step = env.step(actions)            # [64, K, 4] in [-1, 1]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.core import CameraSpec, EnvSpec, Observation
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.protocols import StepOutcome
from vla_rl.sim.arm import JOINT_NAMES, NUM_JOINTS
from vla_rl.sim.control import CONTROLLERS, Controller, make_controller
from vla_rl.sim.engine import CpuEngine, Engine
from vla_rl.sim.randomization import RANDOMIZATIONS, RandomizationConfig, Randomizer, randomization_config, texture_mjcf
from vla_rl.sim.rendering import CpuRenderer, Renderer
from vla_rl.sim.scene import CAMERAS, Scene, SceneConfig, build_scene
from vla_rl.sim.shift import SceneShift, sample_episode
from vla_rl.sim.tasks import SPLITS, Task, get_task
from vla_rl.sim.tasks.base import EpisodeStart, Pose
from vla_rl.sim.view import SceneView

REWARDS = ("sparse", "dense")
ENGINES = ("cpu", "warp")


@dataclass(frozen=True)
class TabletopConfig:
    """`split`: see `sim/tasks/base.py`. `cameras`: name -> size in pixels, one number for a square or (height, width);
    none by default. `control`: one of `CONTROLLERS`. `reward`: "sparse" (1 at success) or "dense" (the change of the
    task's progress, plus 1 at success). `max_episode_steps`: None takes the task's. `privileged_state`: append goal and
    object poses to the state. `joint_noise`: the arm starts within this many radians of home, in every joint.
    `render_size`: pixels of pictures for people. `randomization`: of looks and physics, one of `RANDOMIZATIONS` or a
    configuration. `shift`: how the scene differs from training, for tests; it sets looks and physics itself where it
    changes them. `engine`: "cpu" (MuJoCo on `num_threads` threads, None takes all cores) or "warp" (batched on
    `device`, by default the GPU where there is one)."""

    split: str = "train"
    cameras: Mapping[str, int | tuple[int, int]] = field(default_factory=dict)
    control: str = "ee_delta"
    reward: str = "sparse"
    max_episode_steps: int | None = None
    privileged_state: bool = False
    terminate_on_success: bool = True
    joint_noise: float = 0.04
    render_size: int = 256
    randomization: str | RandomizationConfig = "off"
    shift: SceneShift = field(default_factory=SceneShift)
    engine: str = "cpu"
    device: str | None = None
    num_threads: int | None = None
    scene: SceneConfig = field(default_factory=SceneConfig)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("split", self.split, SPLITS), ("control", self.control, CONTROLLERS), ("reward", self.reward, REWARDS),
            ("engine", self.engine, ENGINES),
            *(("camera", camera, CAMERAS) for camera in self.cameras),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"tabletop: {name} {value!r} is unknown; use one of {', '.join(known)}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"tabletop: num_threads must be at least 1, got {self.num_threads}; None takes all cores")
        for camera, size in self.cameras.items():
            if min(size if isinstance(size, tuple) else (size,)) < 1:
                raise ValueError(f"tabletop: camera {camera!r} has size {size}, expected at least 1 pixel")
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise ValueError(f"tabletop: max_episode_steps must be at least 1, got {self.max_episode_steps}")
        if randomization_config(self.randomization) is not None and self.shift.randomization is not None:
            raise ValueError(
                "tabletop: a shift of color, light, camera or physics sets them itself; use randomization='off' with it"
            )
        if self.engine == "cpu" and self.device not in (None, "cpu"):
            raise ValueError(f"tabletop: the cpu engine runs on the CPU, not on {self.device!r}; use engine='warp'")


class TabletopEnv:
    """A `StepEnv` over one engine. Between `reset` and the end of an episode it draws no random number."""

    def __init__(
        self,
        task: str | Task,
        num_envs: int,
        config: TabletopConfig | None = None,
        *,
        engine: Engine | None = None,
        renderer: Renderer | None = None,
        scene: Scene | None = None,
    ) -> None:
        """`engine` and `renderer` default to the configured ones, `scene` to the task's. An engine must be of
        `scene.model`."""
        self.task = get_task(task)
        self.config = config = config or TabletopConfig()
        self.num_envs = num_envs
        randomization = config.shift.randomization or randomization_config(config.randomization)
        assets = [*self.task.assets(), *config.shift.clutter()]
        self.scene = scene or build_scene(assets, _scene_config(config.scene, randomization))
        clutter = {asset.name for asset in config.shift.clutter()}  # which a state has no numbers for
        self._known = {name: asset for name, asset in self.scene.assets.items() if name not in clutter}
        self.engine: Engine = engine or _make_engine(config, self.scene, num_envs)
        self.renderer: Renderer = renderer or _make_renderer(config, self.engine)
        self.view = SceneView(self.scene, self.engine)
        self.controller: Controller = make_controller(config.control, self.view)
        self.max_episode_steps = config.max_episode_steps or self.task.max_episode_steps
        self.seeds = torch.zeros(num_envs, dtype=torch.int64)
        self.episode_steps = torch.zeros(num_envs, dtype=torch.int64, device=self.engine.device)
        self.instructions = [""] * num_envs
        self.stage_names: tuple[str, ...] = getattr(self.task, "stage_names", ())
        shape = (num_envs, len(self.stage_names))
        self._reached = torch.zeros(shape, dtype=torch.bool, device=self.engine.device)
        self.variables = self._allocate_variables()
        self._randomizer = (
            None if randomization is None
            else Randomizer(randomization, self.scene, self.engine, self.controller.action)
        )  # fmt: skip
        self._progress = self.engine.qpos.new_zeros(num_envs)
        self._action_low = self.engine.qpos.new_tensor(self.controller.action.low)
        self._action_high = self.engine.qpos.new_tensor(self.controller.action.high)
        self._starts = _StartWriter(self.scene, self.engine)
        self._sizes = {c: (s, s) if isinstance(s, int) else tuple(s) for c, s in config.cameras.items()}
        self.spec = EnvSpec(
            name=f"tabletop/{self.task.name}",
            cameras={camera: CameraSpec(*size) for camera, size in self._sizes.items()},
            state_names=self._state_names(),
            action=self.controller.action,
            max_episode_steps=self.max_episode_steps,
            control_hz=config.scene.control_hz,
        )

    def reset(self, env_ids: Tensor, seeds: Tensor) -> None:
        """Start episodes; see `StepEnv`. An episode depends on (task, split, seed) alone."""
        config = self.config
        drawn = [sample_episode(self.task, config.split, seed, config.shift) for seed in seeds.tolist()]
        starts, rngs = [start for start, _ in drawn], [rng for _, rng in drawn]
        joint_noise = [rng.uniform(-1.0, 1.0, NUM_JOINTS) * config.joint_noise for rng in rngs]
        ids = env_ids.to(self.engine.device)
        self.engine.reset(env_ids)
        self._starts.write(ids, starts, np.stack(joint_noise))
        if self._randomizer is not None:
            self._randomizer.reset(env_ids, rngs)
        self.engine.forward(env_ids)
        self.seeds[env_ids] = seeds
        self.episode_steps[ids] = 0
        self._reached[ids] = False
        for i, start in zip(env_ids.tolist(), starts, strict=True):
            self.instructions[i] = start.instruction
        for name, rows in self.variables.items():
            values = np.stack([np.asarray(start.variables[name]) for start in starts])
            rows[ids] = torch.from_numpy(values).to(rows)
        self.controller.reset(env_ids)
        if self.config.reward == "dense":
            self._progress[ids] = self.task.evaluate(self.view, self.variables).progress[ids]

    def step(self, actions: Tensor, active: Tensor) -> StepOutcome:
        """One control step; see `StepEnv`."""
        engine = self.engine
        active = active.to(engine.device)
        clamped = actions.to(engine.device, engine.qpos.dtype).clamp(self._action_low, self._action_high)
        if self._randomizer is not None:
            clamped = self._randomizer.delay(clamped, active)
        self.controller.apply(clamped, active)
        engine.step(active, self.config.scene.substeps)
        self.episode_steps += active
        status = self.task.evaluate(self.view, self.variables)
        for name, value in status.variables.items():
            mask = active.reshape(-1, *([1] * (value.ndim - 1)))
            self.variables[name].copy_(torch.where(mask, value, self.variables[name]))
        if status.stages is not None:
            self._reached |= status.stages & active[:, None]
        reward = status.success.to(torch.float32)
        if self.config.reward == "dense":
            reward = reward + (status.progress - self._progress).float()
            self._progress.copy_(torch.where(active, status.progress, self._progress))
        ends = status.failure | status.success if self.config.terminate_on_success else status.failure
        truncated = torch.zeros_like(ends)
        if actions.device == engine.device:
            return StepOutcome(reward, ends, truncated, status.success)
        return StepOutcome(*(x.to(actions.device) for x in (reward, ends, truncated, status.success)))

    def observe(self, env_ids: Tensor, images: bool) -> Observation:
        """Observations; see `StepEnv`."""
        state = self._state()
        everyone = len(env_ids) == self.num_envs and bool((env_ids == torch.arange(self.num_envs)).all())
        pictures = {}
        if images:
            pictures = {c: self.renderer.render(c, env_ids, *size) for c, size in self._sizes.items()}
        return Observation(
            images=pictures,
            state=state if everyone else state[env_ids.to(state.device)],
            instruction=tuple(self.instructions[i] for i in env_ids.tolist()),
        )

    def furthest_stage(self) -> list[int]:
        """The furthest of `stage_names` that each environment has reached in its running episode; -1: none yet."""
        order = torch.arange(len(self.stage_names), device=self._reached.device)
        return torch.where(self._reached, order, -1).amax(dim=1).tolist() if len(order) else [-1] * self.num_envs

    def render(self, env_ids: Tensor) -> Tensor:
        """A picture for people from the agent camera, uint8 [M, h, w, 3]."""
        return self.renderer.render("agent", env_ids, self.config.render_size, self.config.render_size)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future; see `StepEnv`."""
        return {
            "kind": self._kind(),
            "engine": self.engine.state_dict(),
            "controller": self.controller.state_dict(),
            "variables": {name: value.clone() for name, value in self.variables.items()},
            "instructions": list(self.instructions),
            "seeds": self.seeds.clone(),
            "episode_steps": self.episode_steps.clone(),
            "progress": self._progress.clone(),
            "reached": self._reached.clone(),
            "randomization": self._randomizer.state_dict() if self._randomizer is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, with nothing changed, for a state of another task, control, randomization, shift or
        engine."""
        here = self._kind()
        different = [name for name in here if state["kind"].get(name) != here[name]]
        if different:
            raise ValueError(f"this state and this environment differ in {', '.join(different)}")
        self.engine.load_state_dict(state["engine"])
        if self._randomizer is not None:
            self._randomizer.load_state_dict(state["randomization"])
        self.controller.load_state_dict(state["controller"])
        for name, value in self.variables.items():
            value.copy_(state["variables"][name])
        self.instructions = list(state["instructions"])
        self.seeds.copy_(state["seeds"])
        self.episode_steps.copy_(state["episode_steps"])
        self._progress.copy_(state["progress"])
        self._reached.copy_(state["reached"])

    def _kind(self) -> dict[str, str]:
        config = self.config
        return {
            "task": self.task.name,
            "control": config.control,
            "randomization": str(config.randomization),
            "shift": str(config.shift),
            "engine": config.engine,
        }

    def close(self) -> None:
        self.renderer.close()
        self.engine.close()

    def _allocate_variables(self) -> dict[str, Tensor]:
        """One tensor a task variable, shaped as in a trial episode."""
        example, _ = sample_episode(self.task, self.config.split, 0, self.config.shift)
        _check_start(self.task, self.scene, example)
        variables = {}
        for name, value in example.variables.items():
            row = torch.as_tensor(np.asarray(value))
            dtype = row.dtype if not row.dtype.is_floating_point else self.engine.qpos.dtype
            variables[name] = torch.zeros(self.num_envs, *row.shape, dtype=dtype, device=self.engine.device)
        return variables

    def _state(self) -> Tensor:
        view = self.view
        parts = [view.joint_positions, view.tip_pos, view.tip_yaw[:, None], view.gripper_opening[:, None]]
        if self.config.privileged_state:
            assets = list(self._known)
            movable = [name for name, asset in self._known.items() if asset.movable]
            parts += [self.task.goal(view, self.variables), view.object_positions(assets).flatten(1)]
            if movable:
                parts.append(view.object_quats(movable).flatten(1))
            parts += [view.joint_position(name)[:, None] for name in assets if self._known[name].joint]
        return torch.cat(parts, dim=1).float()

    def _state_names(self) -> tuple[str, ...]:
        names = [*JOINT_NAMES, "tip_x", "tip_y", "tip_z", "tip_yaw", "gripper_opening"]
        if self.config.privileged_state:
            assets = self._known
            names += self.task.goal_names
            names += [f"{name}_{axis}" for name in assets for axis in "xyz"]
            names += [f"{name}_q{axis}" for name, asset in assets.items() if asset.movable for axis in "wxyz"]
            names += [f"{name}_joint" for name, asset in assets.items() if asset.joint]
        return tuple(names)


def _scene_config(config: SceneConfig, randomization: RandomizationConfig | None) -> SceneConfig:
    if randomization is None or not randomization.looks.textures:
        return config
    return replace(config, asset_mjcf=config.asset_mjcf + texture_mjcf())


def _make_engine(config: TabletopConfig, scene: Scene, num_envs: int) -> Engine:
    if config.engine == "cpu":
        return CpuEngine(scene.model, num_envs, config.num_threads)
    from vla_rl.sim.warp_engine import WarpEngine  # needs packages that a CPU-only installation lacks

    return WarpEngine(scene.model, num_envs, config.device)


def _make_renderer(config: TabletopConfig, engine: Engine) -> Renderer:
    if config.engine == "cpu":
        return CpuRenderer(engine, config.num_threads)
    from vla_rl.sim.warp_engine import WarpEngine
    from vla_rl.sim.warp_rendering import WarpRenderer

    assert isinstance(engine, WarpEngine)
    return WarpRenderer(engine)


class _StartWriter:
    """Writes drawn episodes into an engine's tensors, one write a tensor for all environments that begin."""

    def __init__(self, scene: Scene, engine: Engine) -> None:
        self._scene = scene
        self._engine = engine
        self._home = scene.model.key_qpos[0].copy()
        self._rgba = engine.model_field("geom_rgba")
        painted = [(geom, name) for name, place in scene.placements.items() for geom in place.geoms]
        self._geoms = torch.tensor([geom for geom, _ in painted], dtype=torch.int64, device=engine.device)
        self._geom_names = [name for _, name in painted]
        self._default = {name: scene.geom_rgba[geom] for geom, name in reversed(painted)}

    def write(self, ids: Tensor, starts: list[EpisodeStart], joint_noise: np.ndarray) -> None:
        """`ids` int64 [M]; `joint_noise [M, 7]` rad, added to the arm's home."""
        scene, engine = self._scene, self._engine
        qpos = np.tile(self._home, (len(starts), 1))
        mocap = np.zeros((len(starts), max(1, scene.model.nmocap), 7))
        mocap[..., 3] = 1.0
        qpos[:, list(scene.arm_qpos)] += joint_noise
        for row, start in enumerate(starts):
            for name, place in scene.placements.items():
                if place.kind == "free":
                    qpos[row, place.address : place.address + 7] = _seven(start.poses[name], place.rest_height)
                else:
                    mocap[row, place.address] = _seven(start.poses[name], place.rest_height)
            for name, value in start.joints.items():
                qpos[row, scene.joint_qpos[str(scene.assets[name].joint)]] = value
        engine.qpos[ids] = torch.from_numpy(qpos).to(engine.qpos)
        if scene.model.nmocap:
            poses = torch.from_numpy(mocap).to(engine.mocap_pos)
            engine.mocap_pos[ids] = poses[..., :3]
            engine.mocap_quat[ids] = poses[..., 3:]
        if len(self._geom_names):
            colors = [[start.colors.get(name, self._default[name]) for name in self._geom_names] for start in starts]
            self._rgba[ids[:, None], self._geoms] = torch.tensor(np.array(colors)).to(self._rgba)


def _seven(pose: Pose, rest_height: float) -> tuple[float, ...]:
    z = rest_height if pose.z is None else pose.z
    return (pose.x, pose.y, z, float(np.cos(pose.yaw / 2)), 0.0, 0.0, float(np.sin(pose.yaw / 2)))


def _check_start(task: Task, scene: Scene, start: EpisodeStart) -> None:
    missing = sorted(scene.placements.keys() - start.poses.keys())
    unknown = sorted((start.poses.keys() | start.colors.keys() | start.joints.keys()) - scene.placements.keys())
    if missing or unknown:
        raise ValueError(
            f"task {task.name!r}: sample() must give a pose to each of its assets {sorted(scene.placements)}"
            + (f"; missing {missing}" if missing else "")
            + (f"; unknown {unknown}" if unknown else "")
        )


def make_tabletop(
    task: str | Task = "reach",
    num_envs: int = 1,
    *,
    split: str = "train",
    cameras: Mapping[str, int | tuple[int, int]] | None = None,
    control: str = "ee_delta",
    reward: str = "sparse",
    max_episode_steps: int | None = None,
    privileged_state: bool = False,
    auto_reset: bool = True,
    final_images: bool = True,
    num_threads: int | None = None,
    randomization: str | RandomizationConfig = "off",
    shift: SceneShift | None = None,
    engine: str = "cpu",
    device: str | None = None,
) -> ChunkedEnv:
    """A chunked tabletop environment. Options: see `TabletopConfig` and `ChunkedEnv`. `cameras` defaults to none.

    Raises ValueError for an unknown task, split, camera, control, reward, randomization or engine.
    """
    config = TabletopConfig(
        split=split,
        cameras=cameras or {},
        control=control,
        reward=reward,
        max_episode_steps=max_episode_steps,
        privileged_state=privileged_state,
        num_threads=num_threads,
        randomization=randomization,
        shift=shift or SceneShift(),
        engine=engine,
        device=device,
    )
    env = TabletopEnv(task, num_envs, config)
    return ChunkedEnv(env, auto_reset=auto_reset, final_images=final_images)


__all__ = ["CONTROLLERS", "ENGINES", "RANDOMIZATIONS", "REWARDS", "TabletopConfig", "TabletopEnv", "make_tabletop"]
