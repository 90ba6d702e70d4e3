"""The scene: the arm's kinematics, assets that behave, names that resolve."""

from __future__ import annotations

import math

import mujoco
import numpy as np
import pytest
import torch

from vla_rl.sim.arm import HOME, JOINT_HIGH, JOINT_LOW, JOINT_NAMES
from vla_rl.sim.engine import CpuEngine
from vla_rl.sim.scene import Bin, Block, Button, Drawer, Scene, SceneConfig, Zone, build_scene
from vla_rl.sim.view import SceneView, pick

torch.set_num_threads(1)

# Denavit-Hartenberg parameters (Craig's convention) of the Panda: a, d, alpha; joint i; then the flange.
DH = [(0, 0.333, 0), (0, 0, -math.pi / 2), (0, 0.316, math.pi / 2), (0.0825, 0, math.pi / 2),
      (-0.0825, 0.384, -math.pi / 2), (0, 0, math.pi / 2), (0.088, 0, math.pi / 2)]  # fmt: skip


def _dh_tip(joints: np.ndarray) -> np.ndarray:
    """Fingertip pose from the published table: flange at 0.107 m, hand turned by -45 degrees, tip at 0.1034 m."""
    pose = np.eye(4)
    for (a, d, alpha), q in zip(DH, joints, strict=True):
        ca, sa, cq, sq = math.cos(alpha), math.sin(alpha), math.cos(q), math.sin(q)
        pose = pose @ np.array(
            [[cq, -sq, 0, a], [sq * ca, cq * ca, -sa, -d * sa], [sq * sa, cq * sa, ca, d * ca], [0, 0, 0, 1]]
        )
    c = math.cos(-math.pi / 4)
    hand = np.array([[c, c, 0, 0], [-c, c, 0, 0], [0, 0, 1, 0.107 + 0.1034], [0, 0, 0, 1]])
    return pose @ hand


@pytest.fixture(scope="module")
def scene() -> Scene:
    return build_scene(
        [Block("a"), Block("b", movable=False), Zone("zone"), Bin("bin"), Drawer("drawer"), Button("button")]
    )


def test_kinematics_are_a_pandas(scene: Scene) -> None:
    data = mujoco.MjData(scene.model)
    rng = np.random.default_rng(0)
    for joints in [np.array(HOME), *rng.uniform(JOINT_LOW, JOINT_HIGH, (20, 7))]:
        data.qpos[list(scene.arm_qpos)] = joints
        mujoco.mj_kinematics(scene.model, data)
        expected = _dh_tip(joints)
        np.testing.assert_allclose(data.site("tip").xpos, expected[:3, 3], atol=1e-6)
        np.testing.assert_allclose(data.site("tip").xmat.reshape(3, 3), expected[:3, :3], atol=1e-6)


def test_joint_limits_are_in_the_model(scene: Scene) -> None:
    for name, low, high in zip(JOINT_NAMES, JOINT_LOW, JOINT_HIGH, strict=True):
        np.testing.assert_allclose(scene.model.joint(name).range, (low, high))


def test_only_the_movable_block_has_degrees_of_freedom(scene: Scene) -> None:
    assert scene.placements["a"].kind == "free"
    assert {scene.placements[n].kind for n in ("b", "zone", "bin", "drawer", "button")} == {"mocap"}
    assert scene.model.nv == 9 + 6 + 1 + 1


def test_an_episode_colours_named_geoms_only(scene: Scene) -> None:
    names = {scene.model.geom(g).name for g in scene.placements["drawer"].geoms}
    assert names == {"drawer", "drawer/handle", "drawer/neck", "drawer/top"}
    assert len(scene.placements["bin"].geoms) == 5


def test_repeated_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['a'\] occur more than once"):
        build_scene([Block("a"), Zone("a")])


def test_unknown_shapes_and_bad_time_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="'cone' is unknown"):
        build_scene([Block("a", shape="cone")])
    with pytest.raises(ValueError, match="must be positive"):
        SceneConfig(substeps=0)


def _settle(scene: Scene, poses: dict[str, tuple[float, float, float]], seconds: float) -> CpuEngine:
    engine = CpuEngine(scene.model, 1)
    for i, (name, place) in enumerate(scene.placements.items()):
        x, y, z = poses.get(name, (-1.0, i * 0.4, place.rest_height))
        pose = torch.tensor([x, y, z], dtype=torch.float64)
        if place.kind == "free":
            engine.qpos[0, place.address : place.address + 3] = pose
        else:
            engine.mocap_pos[0, place.address] = pose
    engine.forward(torch.tensor([0]))
    for _ in range(round(seconds * 20)):
        engine.step(torch.tensor([True]), 5)
    return engine


def test_a_dropped_block_comes_to_rest_in_the_bin(scene: Scene) -> None:
    engine = _settle(scene, {"a": (0.5, 0.1, 0.12), "bin": (0.5, 0.1, 0.0)}, 1.5)
    view = SceneView(scene, engine)
    assert torch.allclose(view.object_pos("a")[0], torch.tensor([0.5, 0.1, 0.031], dtype=torch.float64), atol=2e-3)
    assert view.object_speed("a")[0] < 1e-3


def test_a_block_stands_on_a_block(scene: Scene) -> None:
    engine = _settle(scene, {"b": (0.5, 0.0, 0.025), "a": (0.5, 0.0, 0.078)}, 1.5)
    assert abs(float(SceneView(scene, engine).object_pos("a")[0, 2]) - 0.075) < 1e-3


def test_a_button_gives_way_and_springs_back(scene: Scene) -> None:
    engine = _settle(scene, {"button": (0.5, 0.0, 0.0)}, 0.5)
    view = SceneView(scene, engine)
    assert abs(float(view.joint_position("button"))) < 1e-3
    cap = scene.model.body("button/cap").id
    engine.xfrc_applied[0, cap, 2] = -5.0
    for _ in range(20):
        engine.step(torch.tensor([True]), 5)
    assert float(view.joint_position("button")) > 0.015
    engine.xfrc_applied[:] = 0.0
    for _ in range(40):
        engine.step(torch.tensor([True]), 5)
    assert float(view.joint_position("button")) < 2e-3


def test_a_drawer_is_pulled_open_and_stays(scene: Scene) -> None:
    engine = _settle(scene, {"drawer": (0.6, 0.0, 0.0)}, 0.2)
    view = SceneView(scene, engine)
    handle = view.site_pos("drawer/handle")[0].clone()
    engine.xfrc_applied[0, scene.model.body("drawer/tray").id, 0] = -3.0
    for _ in range(10):
        engine.step(torch.tensor([True]), 5)
    engine.xfrc_applied[:] = 0.0
    for _ in range(10):
        engine.step(torch.tensor([True]), 5)
    opened = float(view.joint_position("drawer"))
    assert 0.05 < opened <= 0.125
    moved = view.site_pos("drawer/handle")[0] - handle
    assert torch.allclose(moved, torch.tensor([-opened, 0.0, 0.0], dtype=torch.float64), atol=1e-6)


def test_the_view_reads_yaw_and_refuses_what_is_not_there(scene: Scene) -> None:
    engine = CpuEngine(scene.model, 1)
    place = scene.placements["zone"]
    engine.mocap_quat[0, place.address] = torch.tensor([math.cos(0.35), 0, 0, math.sin(0.35)], dtype=torch.float64)
    engine.forward(torch.tensor([0]))
    view = SceneView(scene, engine)
    assert abs(float(view.object_yaw("zone")) - 0.7) < 1e-9
    assert abs(float(view.gripper_opening) - 0.08) < 1e-9
    with pytest.raises(ValueError, match="has no joint"):
        view.joint_position("a")
    with pytest.raises(ValueError, match="not movable"):
        view.object_speed("zone")


def test_pick_takes_one_row_each() -> None:
    rows = torch.arange(12.0).reshape(2, 3, 2)
    assert pick(rows, torch.tensor([2, 0])).tolist() == [[4.0, 5.0], [6.0, 7.0]]
    assert pick(rows[..., 0], torch.tensor([1, 1])).tolist() == [2.0, 8.0]
