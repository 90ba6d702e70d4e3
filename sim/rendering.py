"""Pictures on a CPU: MuJoCo's OpenGL renderer on worker threads, one OpenGL context each.

A frame depends on one simulation's state and on its visual model fields alone, so pixels do not depend on which other
environments are drawn with it or on the number of workers. Threads beat processes here (17,000 against 18,000 frames/s
of two cores at 64 px, without copying states to and fro): MuJoCo's calls release Python's interpreter lock. Mesa's own
rasteriser threads are turned off (LP_NUM_THREADS=0), for one core a frame is faster when all cores have frames to draw.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's compiled modules have no type stubs)

from __future__ import annotations

import importlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import mujoco
import numpy as np
import torch
from torch import Tensor

from vla_rl.cpu import available_cores
from vla_rl.sim.engine import VISUAL_FIELDS, Engine

_MISSING_GL = (
    "cannot make an OpenGL context with MUJOCO_GL={backend}: {error}. Rendering without a display needs "
    "Mesa's libraries; on Debian: apt-get install libegl1 libgl1 libosmesa6 libgles2. "
    "To run without pictures, ask for no cameras."
)


class RenderingError(RuntimeError):
    """No OpenGL context can be made on this machine."""


class Renderer(Protocol):
    """Draws chosen simulations of an engine."""

    def render(self, camera: str, sim_ids: Tensor, height: int, width: int) -> Tensor:
        """Pictures of `sim_ids` (int64 [M]) from `camera`: uint8 [M, height, width, 3]."""
        ...

    def close(self) -> None: ...


class CpuRenderer:
    """`Renderer` for an engine whose state lies in CPU memory.

    Raises RenderingError at the first frame where OpenGL is missing, ValueError for a camera that the scene lacks.
    """

    def __init__(self, engine: Engine, num_threads: int | None = None) -> None:
        self._engine = engine
        self._cameras = {engine.model.camera(i).name: i for i in range(engine.model.ncam)}
        self._num_threads = min(num_threads or available_cores(), engine.num_sims)
        self._threads: list[ThreadPoolExecutor] = []
        self._painters: list[_Painter] = []

    def render(self, camera: str, sim_ids: Tensor, height: int, width: int) -> Tensor:
        if camera not in self._cameras:
            raise ValueError(f"camera {camera!r} is unknown; this scene has {', '.join(self._cameras)}")
        self._start_workers()
        out = torch.empty(len(sim_ids), height, width, 3, dtype=torch.uint8)
        ids = sim_ids.tolist()
        fields = {name: self._engine.model_field(name).numpy() for name in self._visual_fields()}
        state = tuple(x.numpy() for x in (self._engine.qpos, self._engine.mocap_pos, self._engine.mocap_quat))
        # Contiguous shares: each worker writes its own rows of the result.
        shares = np.array_split(np.arange(len(ids)), len(self._threads))
        jobs: list[Future[None]] = []
        for thread, painter, share in zip(self._threads, self._painters, shares, strict=True):
            if len(share):
                rows = slice(int(share[0]), int(share[-1]) + 1)
                target = out[rows].numpy()
                jobs.append(thread.submit(painter.paint, self._cameras[camera], ids[rows], state, fields, target))
        for job in jobs:
            job.result()
        return out

    def close(self) -> None:
        for thread, painter in zip(self._threads, self._painters, strict=True):
            thread.submit(painter.close).result()
            thread.shutdown()
        self._threads, self._painters = [], []

    def _visual_fields(self) -> list[str]:
        """Visual model fields that differ between simulations."""
        return [name for name in self._engine.expanded_fields if name in VISUAL_FIELDS]

    def _start_workers(self) -> None:
        if self._threads:
            return
        _prepare_environment()
        for _ in range(self._num_threads):
            thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vla-rl-render")
            try:
                painter = thread.submit(_Painter, self._engine.model).result()
            except BaseException:
                thread.shutdown()
                self.close()
                raise
            self._threads.append(thread)
            self._painters.append(painter)


class _Painter:
    """One worker's OpenGL context, model and scratch data. Made, used and closed on the worker's own thread."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model.__copy__()
        self._data = mujoco.MjData(self._model)
        self._scene = mujoco.MjvScene(self._model, maxgeom=max(200, 2 * model.ngeom))
        for flag in (
            mujoco.mjtRndFlag.mjRND_SHADOW,
            mujoco.mjtRndFlag.mjRND_REFLECTION,
            mujoco.mjtRndFlag.mjRND_SKYBOX,
        ):
            self._scene.flags[flag] = 0
        self._option = mujoco.MjvOption()
        self._perturb = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._max_size = (int(model.vis.global_.offheight), int(model.vis.global_.offwidth))
        self._gl = _gl_context(self._max_size)
        self._context = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)

    def paint(
        self,
        camera: int,
        sims: list[int],
        state: tuple[np.ndarray, ...],
        fields: dict[str, np.ndarray],
        out: np.ndarray,
    ) -> None:
        height, width = out.shape[1:3]
        if height > self._max_size[0] or width > self._max_size[1]:
            raise ValueError(
                f"pictures are at most {self._max_size[0]} x {self._max_size[1]} (h x w), got {height} x {width}"
            )
        model, data = self._model, self._data
        self._camera.fixedcamid = camera
        viewport = mujoco.MjrRect(0, 0, width, height)
        qpos, mocap_pos, mocap_quat = state
        for j, sim in enumerate(sims):
            data.qpos[:], data.mocap_pos[:], data.mocap_quat[:] = qpos[sim], mocap_pos[sim], mocap_quat[sim]
            for name, values in fields.items():
                getattr(model, name)[:] = values[sim]
            mujoco.mj_kinematics(model, data)
            mujoco.mj_camlight(model, data)
            mujoco.mjv_updateScene(
                model, data, self._option, self._perturb, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
            )
            mujoco.mjr_render(viewport, self._scene, self._context)
            mujoco.mjr_readPixels(out[j], None, viewport, self._context)
            out[j] = out[j, ::-1].copy()  # OpenGL's rows begin at the bottom

    def close(self) -> None:
        self._context.free()
        self._gl.free()


def _prepare_environment() -> None:
    """Defaults of Mesa that must stand before its first context; what the user set is kept."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "0")


def _gl_context(size: tuple[int, int]) -> Any:
    backend = os.environ.get("MUJOCO_GL", "egl").lower()
    if backend not in ("egl", "osmesa", "glfw"):
        raise RenderingError(f"MUJOCO_GL={backend!r} is not one of egl, osmesa, glfw; unset it to use egl")
    try:
        context = importlib.import_module(f"mujoco.{backend}").GLContext(size[1], size[0])
        context.make_current()
    except Exception as error:  # PyOpenGL raises AttributeError, ImportError or its own types, as the library lacks
        raise RenderingError(_MISSING_GL.format(backend=backend, error=error)) from error
    return context
