"""The scene: a table, the arm, two cameras, and the assets that a task asks for, compiled into one MuJoCo model.

Frame: the robot's base is the origin, x points away from it over the table, y to its left, z up; the table's top is
z = 0. Units are metres and radians.

An asset is placed once an episode. Movable blocks hang on a free joint; everything else is a MuJoCo mocap body: it
stands where it was put and costs no degrees of freedom. Drawers and buttons are mocap bodies that carry a sliding part.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's compiled modules have no type stubs)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import mujoco
import numpy as np

from vla_rl.sim.arm import ARM_DEFAULTS, FINGER_NAMES, FINGER_TRAVEL, HOME, JOINT_NAMES, arm_actuators, arm_bodies

Rgba = tuple[float, float, float, float]

GRAY: Rgba = (0.55, 0.57, 0.6, 1.0)
CAMERAS = ("agent", "wrist")

# Collision groups: a pair collides if one's contype meets the other's conaffinity. Objects (1) meet objects, fingers
# (2) and the table (4); fingers meet objects and the table; the arm's links meet nothing.
_OBJECT = 'contype="1" conaffinity="7"'
_VISUAL = 'contype="0" conaffinity="0"'


class Asset(Protocol):
    """Something that a task puts on the table.

    `name` is unique in a scene. `movable`: placed through a free joint, else as a mocap body. `rest_height`: z of the
    body's origin when it lies on the table. `joint`: name of the sliding joint that it carries, or None.
    """

    @property
    def name(self) -> str: ...

    @property
    def movable(self) -> bool: ...

    @property
    def rest_height(self) -> float: ...

    @property
    def joint(self) -> str | None: ...

    def mjcf(self) -> str:
        """The geoms and child bodies inside the asset's body. A geom named `<name>` or `<name>/...` takes its colour
        from the episode; others keep their own."""
        ...


@dataclass(frozen=True)
class Block:
    """A block of side `2 * half` m, a box, cylinder or sphere. A fixed one (`movable=False`) is still solid."""

    name: str
    half: float = 0.025
    movable: bool = True
    shape: str = "box"
    mass: float = 0.08
    joint: str | None = None

    @property
    def rest_height(self) -> float:
        return self.half

    def mjcf(self) -> str:
        sizes = {"box": f"{self.half} {self.half} {self.half}", "cylinder": f"{self.half} {self.half}",
                 "sphere": f"{self.half}"}  # fmt: skip
        if self.shape not in sizes:
            raise ValueError(f"Block {self.name!r}: shape {self.shape!r} is unknown; use one of {sorted(sizes)}")
        return (
            f'<geom name="{self.name}" type="{self.shape}" size="{sizes[self.shape]}" mass="{self.mass}" {_OBJECT} '
            'friction="1 .01 .0005"/>'
        )


@dataclass(frozen=True)
class Puck:
    """A flat round block that slides and does not tip over: something to push. Its friction is its own, not the
    greater of two (MuJoCo's `priority`), so that it does not cling to a finger."""

    name: str
    radius: float = 0.03
    half_height: float = 0.015
    mass: float = 0.12
    movable: bool = True
    joint: str | None = None

    @property
    def rest_height(self) -> float:
        return self.half_height

    def mjcf(self) -> str:
        return (
            f'<geom name="{self.name}" type="cylinder" size="{self.radius} {self.half_height}" mass="{self.mass}" '
            f'{_OBJECT} friction=".9 .005 .0001" priority="1"/>'
        )


@dataclass(frozen=True)
class Zone:
    """A flat coloured disc on the table, which nothing touches."""

    name: str
    radius: float = 0.06
    movable: bool = False
    joint: str | None = None
    rest_height: float = 0.001

    def mjcf(self) -> str:
        return f'<geom name="{self.name}" type="cylinder" size="{self.radius} .001" {_VISUAL}/>'


@dataclass(frozen=True)
class Bin:
    """An open box with inner half width `half` m and walls `height` m high."""

    name: str
    half: float = 0.055
    height: float = 0.04
    movable: bool = False
    joint: str | None = None
    rest_height: float = 0.0

    def mjcf(self) -> str:
        wall, h = 0.006, self.height / 2
        out = self.half + wall
        walls = [(out, 0, wall, out), (-out, 0, wall, out), (0, out, out, wall), (0, -out, out, wall)]
        geoms = f'<geom name="{self.name}" type="box" size="{out} {out} .003" pos="0 0 .003" {_OBJECT}/>'
        for i, (x, y, sx, sy) in enumerate(walls):
            geoms += f'<geom name="{self.name}/wall{i}" type="box" size="{sx} {sy} {h}" pos="{x} {y} {h}" {_OBJECT}/>'
        return geoms


@dataclass(frozen=True)
class Drawer:
    """A cabinet whose drawer slides out along the asset's -x (towards the robot at yaw 0) by up to `travel` m.

    The joint's position is the opening in metres. The handle is a vertical bar `handle_reach` m in front of the
    drawer's face, which open jaws can close on or which a finger can hook. `half_width`: of the cabinet along y, m.
    Face, handle and the cabinet's top take the episode's colour, so that both cameras see it.
    """

    name: str
    travel: float = 0.12
    movable: bool = False
    rest_height: float = 0.0
    handle_reach: float = 0.035
    half_width: float = 0.075

    @property
    def joint(self) -> str:
        return f"{self.name}/slide"

    def mjcf(self) -> str:
        shell = f'rgba=".45 .33 .24 1" type="box" {_OBJECT}'
        w = self.half_width
        side, face, floor = w - 0.005, w - 0.013, w - 0.02
        return f"""
<geom name="{self.name}/top" type="box" {_OBJECT} size=".07 {w} .004" pos="0 0 .086"/>
<geom {shell} size=".07 .005 .041" pos="0 {side} .041"/>
<geom {shell} size=".07 .005 .041" pos="0 -{side} .041"/><geom {shell} size=".004 {side} .041" pos=".066 0 .041"/>
<body name="{self.name}/tray"><inertial pos="0 0 .03" mass=".3" diaginertia=".001 .001 .001"/>
 <joint name="{self.joint}" type="slide" axis="-1 0 0" range="0 {self.travel}" damping="4" frictionloss=".6"/>
 <geom name="{self.name}" type="box" size=".005 {face} .034" pos="-.066 0 .042" {_OBJECT}/>
 <geom type="box" size=".06 {floor} .003" pos="0 0 .012" rgba=".6 .5 .4 1" {_OBJECT}/>
 <geom name="{self.name}/handle" type="capsule" size=".008" fromto="-{0.071 + self.handle_reach} 0 .05
  -{0.071 + self.handle_reach} 0 .095" {_OBJECT} friction="1.5 .02 .001"/>
 <geom name="{self.name}/neck" type="capsule" size=".006" fromto="-.071 0 .05 -{0.071 + self.handle_reach} 0 .05"
  {_OBJECT}/>
 <site name="{self.name}/handle" pos="-{0.071 + self.handle_reach} 0 .085" rgba="0 0 0 0" size=".001"/></body>"""


@dataclass(frozen=True)
class Button:
    """A round button on a base; the joint's position is how far it is pressed, in metres, up to `travel`."""

    name: str
    radius: float = 0.028
    travel: float = 0.02
    movable: bool = False
    rest_height: float = 0.0

    @property
    def joint(self) -> str:
        return f"{self.name}/press"

    def mjcf(self) -> str:
        return f"""<geom type="box" size=".04 .04 .012" pos="0 0 .012" rgba=".25 .25 .28 1" {_OBJECT}/>
<body name="{self.name}/cap" pos="0 0 .035"><inertial pos="0 0 0" mass=".05" diaginertia="1e-5 1e-5 1e-5"/>
 <joint name="{self.joint}" type="slide" axis="0 0 -1" range="0 {self.travel}" stiffness="120" springref="-.004"
  damping="2" armature=".02"/>
 <geom name="{self.name}" type="cylinder" size="{self.radius} .012" {_OBJECT}/></body>"""


@dataclass(frozen=True)
class SceneConfig:
    """`timestep` s of one physics step and `substeps` of them a control step: 5 x 10 ms is 20 Hz.

    `workspace_low`, `workspace_high`: the box, in metres, that Cartesian control keeps the fingertip in.
    `asset_mjcf`: textures and materials that pictures may need, MJCF for the inside of `<asset>`.
    """

    timestep: float = 0.01
    substeps: int = 5
    workspace_low: tuple[float, float, float] = (0.32, -0.26, 0.012)
    workspace_high: tuple[float, float, float] = (0.66, 0.26, 0.32)
    table_rgba: Rgba = (0.72, 0.62, 0.50, 1.0)
    floor_rgba: Rgba = (0.40, 0.44, 0.50, 1.0)
    asset_mjcf: str = ""

    def __post_init__(self) -> None:
        if self.timestep <= 0 or self.substeps < 1:
            raise ValueError(f"SceneConfig: timestep {self.timestep} and substeps {self.substeps} must be positive")

    @property
    def control_hz(self) -> float:
        return 1.0 / (self.timestep * self.substeps)


@dataclass(frozen=True)
class Placement:
    """Where an asset's pose lives. `kind` is "free" (`address` into qpos, `dof` into qvel) or "mocap" (`address` is the
    mocap body's index). `body`: its body. `geoms`: the geoms that take the episode's colour."""

    kind: str
    address: int
    dof: int
    body: int
    rest_height: float
    geoms: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """A compiled model and the addresses of what a task speaks of by name."""

    model: mujoco.MjModel
    config: SceneConfig
    assets: Mapping[str, Asset]
    placements: Mapping[str, Placement]
    joint_qpos: Mapping[str, int]
    sites: Mapping[str, int]
    geom_rgba: np.ndarray

    @property
    def arm_qpos(self) -> tuple[int, ...]:
        return tuple(self.joint_qpos[name] for name in JOINT_NAMES)

    @property
    def finger_qpos(self) -> tuple[int, ...]:
        return tuple(self.joint_qpos[name] for name in FINGER_NAMES)

    @property
    def arm_joints(self) -> tuple[int, ...]:
        """Indices of the arm's joints among the model's."""
        return tuple(self.model.joint(name).id for name in JOINT_NAMES)


def build_scene(assets: Sequence[Asset], config: SceneConfig | None = None) -> Scene:
    """Compile the arm, the table and `assets`. Raises ValueError where two assets have one name."""
    config = config or SceneConfig()
    names = [asset.name for asset in assets]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"build_scene: assets must have distinct names, {repeated} occur more than once")
    model = mujoco.MjModel.from_xml_string(scene_mjcf(assets, config))
    joint_qpos = {model.joint(i).name: int(model.jnt_qposadr[i]) for i in range(model.njnt)}
    _home_keyframe(model, joint_qpos)
    return Scene(
        model=model,
        config=config,
        assets={asset.name: asset for asset in assets},
        placements={asset.name: _placement(model, asset) for asset in assets},
        joint_qpos=joint_qpos,
        sites={model.site(i).name: i for i in range(model.nsite)},
        geom_rgba=model.geom_rgba.copy(),
    )


def scene_mjcf(assets: Sequence[Asset], config: SceneConfig) -> str:
    """The scene as MJCF text. Visual quality is kept low (few facets, no multisampling, no shadows): it is what
    software rendering spends its time on, and at 64 to 224 pixels nobody sees the difference."""
    bodies = "".join(
        f'<body name="{a.name}" mocap="false"><freejoint name="{a.name}"/>{a.mjcf()}</body>' if a.movable
        else f'<body name="{a.name}" mocap="true">{a.mjcf()}</body>'
        for a in assets
    )  # fmt: skip
    table = " ".join(map(str, config.table_rgba))
    floor = " ".join(map(str, config.floor_rgba))
    return f"""
<mujoco model="tabletop">
<compiler angle="radian" autolimits="true"/>
<option timestep="{config.timestep}" integrator="implicitfast" cone="pyramidal" iterations="10" ls_iterations="10"/>
<visual>
 <quality shadowsize="0" offsamples="0" numslices="12" numstacks="6" numquads="1"/>
 <headlight ambient=".45 .45 .45" diffuse=".3 .3 .3" specular="0 0 0"/>
 <global offwidth="640" offheight="480"/><map znear=".01" zfar="20"/>
</visual>
<default>{ARM_DEFAULTS}</default>
<asset>{config.asset_mjcf}</asset>
<worldbody>
 <light name="key" pos=".8 .6 1.5" dir="-.3 -.5 -1" directional="true" diffuse=".45 .45 .45" specular="0 0 0"/>
 <geom name="floor" type="plane" size="4 4 1" pos="0 0 -.6" {_VISUAL} rgba="{floor}"/>
 <geom name="table" type="box" size=".50 .60 .03" pos=".35 0 -.03" contype="4" conaffinity="3" rgba="{table}"/>
 <camera name="agent" pos="1.0 0 .55" xyaxes="0 1 0 -.647 0 .762" fovy="37"/>
 {arm_bodies()}{bodies}
</worldbody>
<actuator>{arm_actuators()}</actuator>
<keyframe><key name="home"/></keyframe>
</mujoco>"""


def _home_keyframe(model: mujoco.MjModel, joint_qpos: Mapping[str, int]) -> None:
    """Write the arm's home, jaws open, into keyframe 0, with servos that hold it there."""
    targets = (*HOME, FINGER_TRAVEL, FINGER_TRAVEL)
    for name, value in zip((*JOINT_NAMES, *FINGER_NAMES), targets, strict=True):
        model.key_qpos[0, joint_qpos[name]] = value
    model.key_ctrl[0, : len(targets)] = targets


def _placement(model: mujoco.MjModel, asset: Asset) -> Placement:
    body = model.body(asset.name).id
    geoms = tuple(
        i for i in range(model.ngeom)
        if model.geom(i).name == asset.name or model.geom(i).name.startswith(f"{asset.name}/")
    )  # fmt: skip
    if asset.movable:
        joint = model.joint(asset.name).id
        address, dof = int(model.jnt_qposadr[joint]), int(model.jnt_dofadr[joint])
        return Placement("free", address, dof, body, asset.rest_height, geoms)
    return Placement("mocap", int(model.body_mocapid[body]), -1, body, asset.rest_height, geoms)


__all__ = [
    "CAMERAS", "Asset", "Bin", "Block", "Button", "Drawer", "Placement", "Puck", "Scene", "SceneConfig", "Zone",
    "build_scene",
]  # fmt: skip
