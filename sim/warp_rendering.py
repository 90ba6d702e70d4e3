"""Pictures of the batched engine: mujoco_warp's ray tracer, every simulation in one kernel launch, on the same device.

A picture is a view of the ray tracer's own buffer, but for one gather that puts the channels in order. Lights, colours
and textures are the model's, as in `CpuRenderer`, and so nearly are the pictures: at 128 px they differ by 0.6 to 1.6
of 255 in the mean, most of it at edges.
"""

from __future__ import annotations

from typing import Any

import mujoco_warp as mjw
import torch
import warp as wp
from torch import Tensor

from vla_rl.sim.warp_engine import WarpEngine


class WarpRenderer:
    """`Renderer` for a `WarpEngine`; raises ValueError for a camera that the scene lacks.

    All simulations are drawn, whichever are asked for: with thousands in one launch that is what the device does best.
    On a GPU the launches are one CUDA graph on torch's current stream.
    """

    def __init__(self, engine: WarpEngine) -> None:
        self._engine = engine
        self._cameras = {engine.model.camera(i).name: i for i in range(engine.model.ncam)}
        self._views: dict[tuple[str, int, int], _View] = {}
        # A pixel is packed as blue, green, red, alpha.
        self._red_green_blue = torch.tensor([2, 1, 0], device=engine.device)

    def render(self, camera: str, sim_ids: Tensor, height: int, width: int) -> Tensor:
        """Pictures of `sim_ids` (int64 [M]) from `camera`: uint8 [M, height, width, 3] on the engine's device."""
        if camera not in self._cameras:
            raise ValueError(f"camera {camera!r} is unknown; this scene has {', '.join(self._cameras)}")
        key = (camera, height, width)
        if key not in self._views:
            self._views[key] = _View(self._engine, camera, height, width)
        pixels = self._views[key].draw()
        ids = sim_ids.to(pixels.device)
        rows = pixels if len(ids) == self._engine.num_sims and _is_range(sim_ids) else pixels[ids]
        return rows.index_select(3, self._red_green_blue)

    def close(self) -> None:
        self._views = {}


class _View:
    """One camera at one size: the ray tracer's context and, on a GPU, its graph."""

    def __init__(self, engine: WarpEngine, camera: str, height: int, width: int) -> None:
        self._engine, self._camera, self._size = engine, camera, (height, width)
        self._fields: tuple[str, ...] | None = None
        self._context: Any = None
        self._graph: Any = None

    def draw(self) -> Tensor:
        """uint8 [N, height, width, 4], a view of the context's buffer: overwritten by the next call."""
        engine = self._engine
        with engine.scope():
            if self._fields != engine.expanded_fields:
                self._prepare()
            if self._graph is not None:
                engine.replay(self._graph)
            else:
                self._launch()
        packed = wp.to_torch(self._context.rgb_data)
        return packed.view(torch.uint8).reshape(engine.num_sims, *self._size, 4)

    def _prepare(self) -> None:
        """Make the context anew: a field that began to differ between simulations has other memory, and rays are
        computed beforehand only where all simulations share the camera's angle."""
        engine, (height, width) = self._engine, self._size
        self._context = mjw.create_render_context(
            engine.model,
            nworld=engine.num_sims,
            cam_res=(width, height),
            render_rgb=True,
            render_depth=False,
            render_seg=False,
            cam_active=[self._camera],
            use_textures=engine.model.ntex > 0,
            use_shadows=False,  # as the CPU renderer
            use_precomputed_rays="cam_fovy" not in engine.expanded_fields,
            enable_specular=False,
            enable_emission=False,
        )
        self._fields = engine.expanded_fields
        self._graph = None
        if engine.device.type == "cuda":
            self._launch()
            self._graph = engine.capture(self._launch)

    def _launch(self) -> None:
        engine = self._engine
        mjw.refit_bvh(engine.warp_model, engine.warp_data, self._context)
        mjw.render(engine.warp_model, engine.warp_data, self._context)


def _is_range(ids: Tensor) -> bool:
    return bool((ids.cpu() == torch.arange(len(ids))).all())


__all__ = ["WarpRenderer"]
