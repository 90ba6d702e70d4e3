"""Pictures: deterministic, independent of the batch, of what the state says; a clear error without OpenGL."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv
from vla_rl.sim.language import COLORS
from vla_rl.sim.rendering import CpuRenderer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def env():
    env = TabletopEnv("reach", 7, TabletopConfig(cameras={"agent": 64, "wrist": (48, 64)}))
    env.reset(torch.arange(7), torch.arange(100, 107))
    yield env
    env.close()


def test_shapes_follow_the_spec(env: TabletopEnv) -> None:
    obs = env.observe(torch.tensor([4, 1]), images=True)
    assert obs.images["agent"].shape == (2, 64, 64, 3)
    assert obs.images["wrist"].shape == (2, 48, 64, 3)
    assert env.observe(torch.tensor([4, 1]), images=False).images == {}
    assert env.render(torch.tensor([2])).shape == (1, 256, 256, 3)


@pytest.mark.parametrize("camera", ["agent", "wrist"])
def test_pixels_do_not_depend_on_the_batch_or_the_workers(env: TabletopEnv, camera: str) -> None:
    everyone = env.renderer.render(camera, torch.arange(7), 64, 64)
    single = CpuRenderer(env.engine, num_threads=1)
    try:
        for i in (0, 3, 6):
            env.renderer.render("agent", torch.tensor([(i + 1) % 7]), 128, 128)  # another frame in between
            assert torch.equal(env.renderer.render(camera, torch.tensor([i]), 64, 64)[0], everyone[i])
            assert torch.equal(single.render(camera, torch.tensor([5, i]), 64, 64)[1], everyone[i])
    finally:
        single.close()


def test_another_environment_of_the_same_episode_has_the_same_pixels(env: TabletopEnv) -> None:
    other = TabletopEnv("reach", 2, TabletopConfig(cameras={"agent": 64}))
    other.reset(torch.tensor([1]), torch.tensor([103]))
    try:
        ours = env.renderer.render("agent", torch.tensor([3]), 64, 64)
        assert torch.equal(other.renderer.render("agent", torch.tensor([1]), 64, 64), ours)
    finally:
        other.close()


def test_the_named_blocks_are_seen_in_their_colours(env: TabletopEnv) -> None:
    """Every block covers at least 20 pixels of its own hue in a picture of 64 x 64, in every one of the episodes."""
    pictures = env.renderer.render("agent", torch.arange(7), 64, 64).float() / 255
    hue = pictures / pictures.sum(dim=-1, keepdim=True).clamp(min=0.05)
    rgba = env.engine.model_field("geom_rgba")
    for i in range(7):
        for name in ("block0", "block1", "block2"):
            color = rgba[i, env.scene.placements[name].geoms[0], :3]
            assert any(torch.allclose(color, torch.tensor(c[:3])) for c in COLORS.values())
            near = ((hue[i] - color / color.sum()).abs().sum(dim=-1) < 0.15).sum()
            assert near >= 20, (i, name, int(near))


def test_the_picture_is_the_right_way_up(env: TabletopEnv) -> None:
    """A block that is moved away from the robot moves down in the agent's picture, to the left (+y) moves right."""
    masks = []
    address = env.scene.placements["block0"].address
    saved = env.engine.mocap_pos[0].clone()
    colors = env.engine.model_field("geom_rgba")[0].clone()
    env.engine.model_field("geom_rgba")[0, env.scene.placements["block0"].geoms[0]] = torch.tensor([1.0, 0, 1.0, 1.0])
    for x, y in ((0.42, 0.0), (0.56, 0.0), (0.49, 0.12)):
        env.engine.mocap_pos[0] = torch.tensor([3.0, 3.0, -1.0], dtype=torch.float64)
        env.engine.mocap_pos[0, address] = torch.tensor([x, y, 0.025], dtype=torch.float64)
        picture = env.renderer.render("agent", torch.tensor([0]), 64, 64)[0].float()
        mask = (picture[..., 0] > 90) & (picture[..., 2] > 90) & (picture[..., 1] < 40)
        masks.append(mask.nonzero().float().mean(dim=0))
    env.engine.mocap_pos[0] = saved
    env.engine.model_field("geom_rgba")[0] = colors
    near_robot, far, left = masks
    assert far[0] > near_robot[0] + 8
    assert left[1] > near_robot[1] + 8


def test_errors_name_cameras_and_sizes(env: TabletopEnv) -> None:
    with pytest.raises(ValueError, match="agent, wrist"):
        env.renderer.render("ceiling", torch.tensor([0]), 64, 64)
    with pytest.raises(ValueError, match="480 x 640"):
        env.renderer.render("agent", torch.tensor([0]), 64, 2000)


_BROKEN = """
import sys, torch
from vla_rl.envs.tabletop import make_tabletop
from vla_rl.sim.rendering import RenderingError
env = make_tabletop("reach", 2, cameras={"agent": 32})
try:
    env.reset([0, 1])
except RenderingError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ({"PYOPENGL_PLATFORM": "glx", "MUJOCO_GL": "egl"}, "apt-get install libegl1 libgl1 libosmesa6 libgles2"),
        ({"MUJOCO_GL": "vulkan"}, "unset it to use egl"),
    ],
)
def test_without_opengl_the_error_says_what_to_do(setting: dict[str, str], advice: str) -> None:
    """In a process of its own, where OpenGL cannot be had. Set after the import of mujoco, which checks them too."""
    code = f"import os, mujoco; os.environ.update({setting!r})\n{_BROKEN}"
    clean = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr[-2000:]
    assert advice in done.stdout
