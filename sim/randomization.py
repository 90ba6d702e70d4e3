"""Domain randomisation: how an episode looks and how it moves, drawn once an episode from the episode's seed.

Looks are colours, textures, light and camera poses; physics is masses, friction, servo gains, joint damping and the
delay of actions. An episode's task (poses, sentence, colours named in it) is the same at every level, so a policy can
be compared on the same episodes with and without randomisation.

Levels. "train" is moderate; "test" has wider ranges, textures that "train" never shows, and a random stream of its own.

    make_tabletop("reach", 64, randomization="train")
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's compiled modules have no type stubs)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mujoco
import numpy as np
import torch
from torch import Tensor

from vla_rl.core import ActionSpec
from vla_rl.sim.arm import FINGER_NAMES, JOINT_NAMES
from vla_rl.sim.engine import Engine
from vla_rl.sim.scene import Scene

# Procedural textures, which MuJoCo paints itself: MJCF attributes of `<texture builtin=...>` and repeats on a surface.
TEXTURES: dict[str, tuple[str, float]] = {
    "checker": ('builtin="checker" rgb1=".78 .78 .78" rgb2="1 1 1"', 6.0),
    "planks": ('builtin="flat" rgb1=".95 .95 .95" mark="edge" markrgb=".55 .55 .55"', 5.0),
    "speckle": ('builtin="flat" rgb1="1 1 1" mark="random" random=".06" markrgb=".55 .55 .55"', 2.0),
    "stripes": ('builtin="gradient" rgb1="1 1 1" rgb2=".65 .65 .65"', 4.0),
    "grid": ('builtin="flat" rgb1=".98 .98 .98" mark="cross" markrgb=".35 .35 .35"', 7.0),
    "tiles": ('builtin="checker" rgb1=".45 .45 .5" rgb2="1 1 1"', 12.0),
    "gravel": ('builtin="flat" rgb1=".9 .9 .9" mark="random" random=".3" markrgb=".35 .35 .35"', 1.5),
}
Reserve = Callable[[int], slice]  # columns of an episode's vector of uniform numbers
_SURFACES = ("table", "floor")


def texture_mjcf() -> str:
    """MJCF of `TEXTURES` and a material of each, for the inside of `<asset>` (`SceneConfig.asset_mjcf`)."""
    return "".join(
        f'<texture name="{name}" type="2d" width="64" height="64" {look}/>'
        f'<material name="{name}" texture="{name}" texrepeat="{repeat} {repeat}" specular="0"/>'
        for name, (look, repeat) in TEXTURES.items()
    )


@dataclass(frozen=True)
class CameraJitter:
    """Uniform in a cube: `shift` m and `turn` rad a axis, in the frame of the camera's parent; `fovy` degrees."""

    shift: float = 0.0
    turn: float = 0.0
    fovy: float = 0.0


@dataclass(frozen=True)
class LooksConfig:
    """`object_color`, `arm_color`, `surface_color`: largest change of a colour channel (0 to 1) of the task's assets,
    of the arm, and of table and floor; objects change little, for a sentence names their colours. `textures`: names in
    `TEXTURES` that a surface may wear, each as likely as none; empty for never. `light_level`: factor of the key
    light's brightness. `light_tilt`: largest change of each component of its unit direction. `cameras`: by name."""

    object_color: float = 0.0
    arm_color: float = 0.0
    surface_color: float = 0.0
    textures: tuple[str, ...] = ()
    light_level: tuple[float, float] = (1.0, 1.0)
    light_tilt: float = 0.0
    cameras: Mapping[str, CameraJitter] = field(default_factory=dict)


@dataclass(frozen=True)
class PhysicsConfig:
    """Factors are log-uniform in the given range. `mass`: of each movable asset, inertia with it. `friction`: sliding
    friction of everything, one factor an episode. `gain`: stiffness and damping of each servo. `damping`: of each arm
    joint. `max_action_delay`: control steps that an action waits, uniform in 0..max, constant in an episode."""

    mass: tuple[float, float] = (1.0, 1.0)
    friction: tuple[float, float] = (1.0, 1.0)
    gain: tuple[float, float] = (1.0, 1.0)
    damping: tuple[float, float] = (1.0, 1.0)
    max_action_delay: int = 0

    def __post_init__(self) -> None:
        for name in ("mass", "friction", "gain", "damping"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"PhysicsConfig: {name} must be a range of positive factors, got ({low}, {high})")
        if self.max_action_delay < 0:
            raise ValueError(f"PhysicsConfig: max_action_delay counts steps and is >= 0, got {self.max_action_delay}")


@dataclass(frozen=True)
class RandomizationConfig:
    """`stream`: configurations with different numbers never share a random number, whatever the seed. `at_limits`: each
    number takes one end of its range or the other and nothing between, so that a range is a strength; textures: any."""

    looks: LooksConfig = field(default_factory=LooksConfig)
    physics: PhysicsConfig = field(default_factory=PhysicsConfig)
    stream: int = 0
    at_limits: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.looks.textures) - TEXTURES.keys())
        if unknown:
            raise ValueError(f"LooksConfig: textures {unknown} are unknown; there are {', '.join(TEXTURES)}")


LEVELS: dict[str, RandomizationConfig] = {
    "train": RandomizationConfig(
        LooksConfig(
            object_color=0.05,
            arm_color=0.10,
            surface_color=0.15,
            textures=("checker", "planks", "speckle", "stripes"),
            light_level=(0.6, 1.5),
            light_tilt=0.3,
            cameras={"agent": CameraJitter(0.02, 0.02, 1.5), "wrist": CameraJitter(0.004, 0.02, 2.0)},
        ),
        PhysicsConfig(mass=(0.6, 1.6), friction=(0.7, 1.3), gain=(0.9, 1.1), damping=(0.7, 1.5), max_action_delay=1),
        stream=1,
    ),
    "test": RandomizationConfig(
        LooksConfig(
            object_color=0.08,
            arm_color=0.20,
            surface_color=0.25,
            textures=("grid", "tiles", "gravel"),
            light_level=(0.4, 1.9),
            light_tilt=0.5,
            cameras={"agent": CameraJitter(0.035, 0.035, 2.5), "wrist": CameraJitter(0.007, 0.035, 3.0)},
        ),
        PhysicsConfig(mass=(0.4, 2.5), friction=(0.5, 1.6), gain=(0.8, 1.2), damping=(0.5, 2.0), max_action_delay=2),
        stream=2,
    ),
}
RANDOMIZATIONS = ("off", *LEVELS)


def randomization_config(level: str | RandomizationConfig) -> RandomizationConfig | None:
    """The configuration of a level by name, or the given one; None for "off". Raises ValueError for another name."""
    if isinstance(level, RandomizationConfig):
        return level
    if level not in RANDOMIZATIONS:
        raise ValueError(f"randomization {level!r} is unknown; use one of {', '.join(RANDOMIZATIONS)}")
    return LEVELS.get(level)


class Randomizer:
    """Draws looks and physics of episodes that begin and writes them into the engine's per-simulation model fields.

    An episode takes one vector of uniform numbers from its own generator, and every quantity is a function of its
    columns: so an episode is the same in any batch, and the writes are batched. The model fields are part of the
    engine's state; `state_dict` here holds the delayed actions.
    """

    def __init__(self, config: RandomizationConfig, scene: Scene, engine: Engine, action: ActionSpec) -> None:
        self._config = config
        self._num_columns = 0
        self._looks = _Looks(config.looks, scene, engine, self._reserve)
        self._physics = _Physics(config.physics, scene, engine, self._reserve)
        self._delay = _ActionDelay(config.physics.max_action_delay, engine, action, self._reserve)

    def reset(self, env_ids: Tensor, rngs: Sequence[np.random.Generator]) -> None:
        """New looks and physics for `env_ids` (int64 [M]); `rngs[j]` is the generator of episode `env_ids[j]`. Call it
        when the episode's own colours are written, and the engine's `forward` after it."""
        streams = [np.random.default_rng([self._config.stream, int(rng.integers(2**62))]) for rng in rngs]
        uniforms = torch.from_numpy(np.stack([stream.random(self._num_columns) for stream in streams]))
        if self._config.at_limits:
            kept = uniforms[:, self._looks.choices].clone()
            uniforms = uniforms.round().clamp(max=1.0 - 2.0**-53)  # below 1, as `random` is
            uniforms[:, self._looks.choices] = kept
        for part in (self._looks, self._physics, self._delay):
            part.reset(env_ids, uniforms)

    def delay(self, actions: Tensor, active: Tensor) -> Tensor:
        """What reaches the controller now, [N, A], of `actions [N, A]` given now; an inactive environment's queue of
        delayed actions does not move."""
        return self._delay.push(actions, active)

    def state_dict(self) -> dict[str, Any]:
        return self._delay.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._delay.load_state_dict(state)

    def _reserve(self, count: int) -> slice:
        self._num_columns += count
        return slice(self._num_columns - count, self._num_columns)


class _Looks:
    """Colours, textures, light and cameras. Only fields that the configuration changes become per-simulation."""

    def __init__(self, config: LooksConfig, scene: Scene, engine: Engine, reserve: Reserve) -> None:
        self._config, self._engine = config, engine
        model = engine.model
        self._groups, self._spread, self._painted = _color_groups(config, scene)
        self._surfaces = [model.geom(name).id for name in _SURFACES]
        self._materials = torch.tensor([-1, *_material_ids(model, config.textures)], dtype=torch.int32)
        known = {model.camera(i).name: i for i in range(model.ncam)}
        self._cameras = [(known[name], jitter) for name, jitter in config.cameras.items() if name in known]
        self._color_columns = reserve(3 * len(self._spread))
        self.choices = reserve(len(self._surfaces))
        self._light_columns = reserve(4)
        self._camera_columns = [reserve(7) for _ in self._cameras]

    def reset(self, env_ids: Tensor, uniforms: Tensor) -> None:
        ids = env_ids.to(self._engine.device)
        if self._spread.any():
            self._write_colors(ids, uniforms[:, self._color_columns])
        if len(self._materials) > 1:
            choice = (uniforms[:, self.choices] * len(self._materials)).long()
            field_ = self._engine.model_field("geom_matid")
            field_[ids[:, None], torch.tensor(self._surfaces, device=ids.device)] = self._materials[choice].to(field_)
        if self._config.light_tilt or self._config.light_level != (1.0, 1.0):
            self._write_light(ids, uniforms[:, self._light_columns])
        for (camera, jitter), columns in zip(self._cameras, self._camera_columns, strict=True):
            self._write_camera(ids, camera, jitter, 2 * uniforms[:, columns] - 1)

    def _write_colors(self, ids: Tensor, uniforms: Tensor) -> None:
        field_ = self._engine.model_field("geom_rgba")
        colors = torch.from_numpy(self._engine.model.geom_rgba).repeat(len(ids), 1, 1)
        colors[:, self._painted] = field_[ids].cpu()[:, self._painted]  # what the episode painted just now
        change = (2 * uniforms.reshape(len(ids), -1, 3) - 1) * self._spread[:, None]
        colors[..., :3] = (colors[..., :3] + change[:, self._groups]).clamp(0.0, 1.0)
        field_[ids] = colors.to(field_)

    def _write_light(self, ids: Tensor, uniforms: Tensor) -> None:
        direction, diffuse = self._engine.model_field("light_dir"), self._engine.model_field("light_diffuse")
        base = torch.from_numpy(self._engine.model.light_dir.copy())
        base = base / torch.linalg.vector_norm(base, dim=1, keepdim=True)
        tilted = base + self._config.light_tilt * (2 * uniforms[:, None, :3] - 1)
        direction[ids] = (tilted / torch.linalg.vector_norm(tilted, dim=2, keepdim=True)).to(direction)
        low, high = self._config.light_level
        level = low + (high - low) * uniforms[:, 3, None, None]
        diffuse[ids] = (torch.from_numpy(self._engine.model.light_diffuse.copy()) * level).to(diffuse)

    def _write_camera(self, ids: Tensor, camera: int, jitter: CameraJitter, signed: Tensor) -> None:
        """`signed [M, 7]` in [-1, 1]: shift, turn, field of view."""
        model = self._engine.model
        fields = [self._engine.model_field(name) for name in ("cam_pos", "cam_quat", "cam_fovy")]
        pos = torch.from_numpy(model.cam_pos[camera].copy()) + jitter.shift * signed[:, :3]
        turn = _small_rotation(jitter.turn * signed[:, 3:6])
        quat = _quat_product(turn, torch.from_numpy(model.cam_quat[camera].copy()).expand_as(turn))
        fovy = model.cam_fovy[camera] + jitter.fovy * signed[:, 6]
        for field_, value in zip(fields, (pos, quat, fovy), strict=True):
            field_[ids, camera] = value.to(field_)


class _Physics:
    """Masses, friction, servo gains and joint damping."""

    def __init__(self, config: PhysicsConfig, scene: Scene, engine: Engine, reserve: Reserve) -> None:
        self._config, self._engine = config, engine
        model = scene.model
        bodies = [scene.placements[name].body for name, asset in scene.assets.items() if asset.movable]
        self._bodies = torch.tensor(bodies, dtype=torch.int64)
        self._servos = torch.tensor([model.actuator(name).id for name in (*JOINT_NAMES, *FINGER_NAMES)])
        self._dofs = torch.tensor([int(model.jnt_dofadr[j]) for j in scene.arm_joints])
        self._mass_columns = reserve(len(bodies))
        self._friction_columns = reserve(1)
        self._gain_columns = reserve(2 * len(self._servos))
        self._damping_columns = reserve(len(self._dofs))

    def reset(self, env_ids: Tensor, uniforms: Tensor) -> None:
        ids, config = env_ids.to(self._engine.device), self._config
        if config.friction != (1.0, 1.0):
            factor = _log_uniform(uniforms[:, self._friction_columns], config.friction)
            friction = torch.from_numpy(self._engine.model.geom_friction).repeat(len(ids), 1, 1)
            friction[..., 0] *= factor
            self._write("geom_friction", ids, friction)
        if config.gain != (1.0, 1.0):
            self._write_gains(ids, _log_uniform(uniforms[:, self._gain_columns], config.gain))
        if config.damping != (1.0, 1.0):
            factor = _log_uniform(uniforms[:, self._damping_columns], config.damping)
            damping = torch.from_numpy(self._engine.model.dof_damping).repeat(len(ids), 1)
            damping[:, self._dofs] *= factor
            self._write("dof_damping", ids, damping)
        if config.mass != (1.0, 1.0) and len(self._bodies):
            factor = _log_uniform(uniforms[:, self._mass_columns], config.mass)
            mass = torch.from_numpy(self._engine.model.body_mass).repeat(len(ids), 1)
            inertia = torch.from_numpy(self._engine.model.body_inertia).repeat(len(ids), 1, 1)
            mass[:, self._bodies] *= factor
            inertia[:, self._bodies] *= factor[..., None]
            self._write("body_mass", ids, mass)
            self._write("body_inertia", ids, inertia)
            self._engine.refresh_constants(env_ids)

    def _write_gains(self, ids: Tensor, factor: Tensor) -> None:
        """A position servo's force is `kp * (ctrl - q) - kv * qd`: kp is in gainprm[0] and -biasprm[1], kv in
        -biasprm[2]. `factor [M, 2 * servos]`: of kp, then of kv."""
        model, count = self._engine.model, len(self._servos)
        gain = torch.from_numpy(model.actuator_gainprm).repeat(len(ids), 1, 1)
        bias = torch.from_numpy(model.actuator_biasprm).repeat(len(ids), 1, 1)
        gain[:, self._servos, 0] *= factor[:, :count]
        bias[:, self._servos, 1] *= factor[:, :count]
        bias[:, self._servos, 2] *= factor[:, count:]
        self._write("actuator_gainprm", ids, gain)
        self._write("actuator_biasprm", ids, bias)

    def _write(self, name: str, ids: Tensor, values: Tensor) -> None:
        field_ = self._engine.model_field(name)
        field_[ids] = values.to(field_)


class _ActionDelay:
    """A queue of past actions for each environment, the newest first."""

    def __init__(self, max_delay: int, engine: Engine, action: ActionSpec, reserve: Reserve) -> None:
        self._max_delay = max_delay
        self._columns = reserve(1)
        # Until the first action arrives the arm stays where it is, jaws open as at the start.
        self._rest = engine.qpos.new_zeros(action.dim)
        self._rest[-1] = 1.0
        self._queue = self._rest.repeat(engine.num_sims, max_delay + 1, 1)
        self._steps = torch.zeros(engine.num_sims, dtype=torch.int64, device=engine.device)
        self._rows = torch.arange(engine.num_sims, device=engine.device)

    def reset(self, env_ids: Tensor, uniforms: Tensor) -> None:
        ids = env_ids.to(self._steps.device)
        steps = (uniforms[:, self._columns] * (self._max_delay + 1)).long().squeeze(1)
        self._steps[ids] = steps.to(self._steps)
        self._queue[ids] = self._rest

    def push(self, actions: Tensor, active: Tensor) -> Tensor:
        if self._max_delay == 0:
            return actions
        moved = torch.cat([actions[:, None], self._queue[:, :-1]], dim=1)
        self._queue.copy_(torch.where(active[:, None, None], moved, self._queue))
        return self._queue[self._rows, self._steps]

    def state_dict(self) -> dict[str, Any]:
        return {"queue": self._queue.clone(), "delay_steps": self._steps.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._queue.copy_(state["queue"])
        self._steps.copy_(state["delay_steps"])


def _color_groups(config: LooksConfig, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Geoms of one asset change their colour together, so do those of the arm, and each surface by itself. Returns each
    geom's group, int64 [ngeom]; each group's largest change, [groups]; and the geoms that wear an episode's colour."""
    model = scene.model
    roots = model.body_rootid[model.geom_bodyid]
    assets = {place.body for place in scene.placements.values()}
    groups = np.zeros(model.ngeom, dtype=np.int64)
    spread = [0.0]  # group 0: whatever is none of the others
    for geom in (model.geom(name).id for name in _SURFACES):
        groups[geom] = len(spread)
        spread.append(config.surface_color)
    for root in sorted({int(root) for root in roots} - {0}):
        groups[roots == root] = len(spread)
        spread.append(config.object_color if root in assets else config.arm_color)
    painted = [geom for place in scene.placements.values() for geom in place.geoms]
    return torch.from_numpy(groups), torch.tensor(spread, dtype=torch.float64), torch.tensor(painted, dtype=torch.int64)


def _material_ids(model: mujoco.MjModel, names: Sequence[str]) -> list[int]:
    there = {model.material(i).name: i for i in range(model.nmat)}
    missing = sorted(set(names) - there.keys())
    if missing:
        raise ValueError(
            f"this scene has no materials {missing}; build it with SceneConfig(asset_mjcf=texture_mjcf()) or take "
            "LooksConfig.textures=()"
        )
    return [there[name] for name in names]


def _log_uniform(uniforms: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = np.log(limits[0]), np.log(limits[1])
    return torch.exp(low + (high - low) * uniforms)


def _small_rotation(vector: Tensor) -> Tensor:
    """Quaternions [M, 4] (w first) of rotation vectors [M, 3], rad."""
    angle = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    return torch.cat([torch.cos(angle / 2), vector * 0.5 * torch.sinc(angle / (2 * torch.pi))], dim=1)


def _quat_product(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product of quaternions [M, 4], w first."""
    aw, av, bw, bv = a[:, :1], a[:, 1:], b[:, :1], b[:, 1:]
    w = aw * bw - (av * bv).sum(dim=1, keepdim=True)
    return torch.cat([w, aw * bv + bw * av + torch.linalg.cross(av, bv)], dim=1)


__all__ = [
    "LEVELS", "RANDOMIZATIONS", "TEXTURES", "CameraJitter", "LooksConfig", "PhysicsConfig", "RandomizationConfig",
    "Randomizer", "randomization_config", "texture_mjcf",
]  # fmt: skip
