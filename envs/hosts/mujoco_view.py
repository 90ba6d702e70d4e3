"""Pictures of a MuJoCo simulation, for the host modules; numpy and mujoco only."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

mujoco: Any = importlib.import_module("mujoco")


class View:
    """Renders cameras of MuJoCo models on one OpenGL context, which outlives the models: a simulator that compiles its
    scene anew at each reset would otherwise make a context an episode.

    `fast`: no shadows, no reflections, no multisampling. Faster on a CPU, and the pictures differ. `hide`: groups of
    geoms that are not shown (0 has robosuite's collision shapes).
    """

    def __init__(self, fast: bool, hide: tuple[int, ...] = (0,)) -> None:
        self._fast, self._hide = fast, list(hide)
        self._gl: Any = None
        self._context: Any = None
        self._model: Any = None

    def picture(self, model: Any, data: Any, camera: str, height: int, width: int) -> np.ndarray:
        """What `camera` sees, uint8 [height, width, 3], upright. Raises ValueError for a camera that is not there."""
        camera_id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if camera_id < 0:
            raise ValueError(f"there is no camera {camera!r}; this scene has {', '.join(camera_names(model))}")
        self._prepare(model, height, width)
        options, view = mujoco.MjvOption(), mujoco.MjvCamera()
        options.geomgroup[self._hide] = 0
        view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, camera_id
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(model, data, options, mujoco.MjvPerturb(), view, everything, self._scene)
        if self._fast:
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        pixels = np.empty((height, width, 3), np.uint8)
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, self._scene, self._context)
        mujoco.mjr_readPixels(pixels, None, viewport, self._context)
        return np.ascontiguousarray(pixels[::-1])  # OpenGL counts rows from below

    def close(self) -> None:
        if self._context is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = self._context = self._model = None

    def _prepare(self, model: Any, height: int, width: int) -> None:
        buffer = model.vis.global_
        fits = height <= buffer.offheight and width <= buffer.offwidth
        if self._gl is None:
            self._gl = mujoco.GLContext(max(width, 640), max(height, 480))
        self._gl.make_current()
        if model is self._model and fits:
            return
        if self._context is not None:
            self._context.free()
        buffer.offheight, buffer.offwidth = max(height, buffer.offheight), max(width, buffer.offwidth)
        if self._fast:
            model.vis.quality.offsamples = 0
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=4000)
        self._model = model


def camera_names(model: Any) -> list[str]:
    """Names of a model's cameras."""
    return [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_CAMERA, i) for i in range(model.ncam)]
