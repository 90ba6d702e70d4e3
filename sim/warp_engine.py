"""The batched engine: mujoco_warp, all simulations in one kernel launch, on a GPU or (slowly, to test) on a CPU.

Tensors are float32 views of Warp's own memory: nothing is copied between physics, tasks and policies on one device. On
a GPU the substeps of a control step are one CUDA graph, launched on torch's current stream, and nothing in `step` waits
for the device; a diverged simulation or an overflow of the contact buffers is therefore reported at the next `reset`.

Results are bit-identical from run to run on a CPU. On a GPU contacts are found in any order, so they are not.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's compiled modules have no type stubs)

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
import torch
from torch import Tensor

try:
    import warp as wp

    # Warp announces itself and each of 50 kernels on stdout, and it starts when mujoco_warp is imported.
    wp.config.log_level = wp.LOG_ERROR
    import mujoco_warp as mjw
except ImportError as error:
    raise ImportError(
        "the warp engine needs mujoco-warp and warp-lang: pip install -e '.[gpu]', or use engine='cpu'"
    ) from error

# What a step changes and a frozen simulation must keep; the rest of the state is written from outside alone.
_MOVING = ("qpos", "qvel", "act", "qacc_warmstart", "time")
_STATE = (*_MOVING, "ctrl", "mocap_pos", "mocap_quat", "xfrc_applied", "qfrc_applied")
# Constants that `refresh_constants` derives from masses and inertias.
_MASS_CONSTANTS = ("body_subtreemass", "body_invweight0", "dof_invweight0", "actuator_acc0")
_OVERFLOWS = (
    mjw.OverflowType.NEFC
    | mjw.OverflowType.NJMAX_NNZ
    | mjw.OverflowType.BROADPHASE
    | mjw.OverflowType.NARROWPHASE
    | mjw.OverflowType.CCD
)


@dataclass(frozen=True)
class WarpConfig:
    """Room for contacts and for constraint rows (four a contact, one a joint at its limit) of each simulation."""

    contacts_per_sim: int = 64
    constraints_per_sim: int = 256


class WarpEngine:
    """`Engine` on mujoco_warp; see the module's text. `device`: "cpu", "cuda" or "cuda:<i>"; None takes the GPU where
    there is one. Raises ValueError for a GPU that is not there.

    `warp_model`, `warp_data`: what mujoco_warp works on, for a renderer.
    """

    qpos: Tensor
    qvel: Tensor
    ctrl: Tensor
    mocap_pos: Tensor
    mocap_quat: Tensor
    xfrc_applied: Tensor
    xpos: Tensor
    xquat: Tensor
    site_xpos: Tensor
    site_xmat: Tensor
    xanchor: Tensor
    xaxis: Tensor
    sensordata: Tensor

    def __init__(
        self, model: mujoco.MjModel, num_sims: int, device: str | None = None, config: WarpConfig | None = None
    ) -> None:
        if num_sims < 1:
            raise ValueError(f"WarpEngine: num_sims must be at least 1, got {num_sims}")
        config = config or WarpConfig()
        self.model = model
        self.num_sims = num_sims
        self.device = _device(device)
        self._fields: dict[str, Tensor] = {}
        self._graphs: dict[int, Any] = {}
        with self.scope():
            self.warp_model = mjw.put_model(model)
            self.warp_model.opt.warn_overflow &= ~(mjw.OverflowType.ITERATIONS | mjw.OverflowType.LS_ITERATIONS)
            self.warp_data = mjw.make_data(
                model, nworld=num_sims, nconmax=config.contacts_per_sim, njmax=config.constraints_per_sim
            )
        self._state = {name: self._data_tensor(name) for name in _STATE}
        self._overflow = self._data_tensor("overflow")
        for name in ("qpos", "qvel", "ctrl", "mocap_pos", "mocap_quat", "xfrc_applied"):
            setattr(self, name, self._state[name])
        for name in ("xpos", "xquat", "site_xpos", "xanchor", "xaxis", "sensordata"):
            setattr(self, name, self._data_tensor(name))
        self.site_xmat = self._data_tensor("site_xmat").reshape(num_sims, model.nsite, 9)
        self._zero = torch.zeros((), device=self.device)
        self._home = {
            name: torch.tensor(np.array(value), dtype=torch.float32, device=self.device)
            for name, value in _keyframe(model).items()
        }
        self.reset(torch.arange(num_sims))
        self.forward(torch.arange(num_sims))

    def step(self, active: Tensor, num_substeps: int) -> None:
        """See `Engine.step`. All simulations are computed and the frozen ones put back: with thousands of them in one
        launch that costs less than gathering the active ones. On a CPU, raises RuntimeError where physics diverged."""
        if self.device.type == "cpu" and not bool(active.any()):
            return
        before = {name: self._state[name].clone() for name in _MOVING}
        with self.scope():
            if self.device.type == "cuda":
                self.replay(self._graph(num_substeps))
            else:
                self._substeps(num_substeps)
        for name, value in before.items():
            mask = active.reshape(-1, *([1] * (value.ndim - 1)))
            self._state[name].copy_(torch.where(mask, self._state[name], value))
        self._kinematics()
        if self.device.type == "cpu":
            self._check()

    def forward(self, sim_ids: Tensor) -> None:
        """See `Engine.forward`: computes all simulations; where nothing was written, the result is the same."""
        if len(sim_ids):
            self._kinematics()

    def reset(self, sim_ids: Tensor) -> None:
        """See `Engine.reset`. Raises RuntimeError where a simulation diverged or had no room for its contacts since the
        last reset."""
        if not len(sim_ids):
            return
        self._check()
        ids = sim_ids.to(self.device)
        for name, tensor in self._state.items():
            tensor[ids] = self._home.get(name, self._zero)

    def model_field(self, name: str) -> Tensor:
        """See `Engine.model_field`. Raises ValueError where the model has no such field."""
        if name not in self._fields:
            shapes = {f.name: getattr(f.type, "shape", ()) for f in dataclasses.fields(mjw.Model)}
            if tuple(shapes.get(name, ()))[:1] != ("*",):
                raise ValueError(f"model_field: {name!r} cannot differ between simulations")
            shared = getattr(self.warp_model, name)
            rows = wp.to_torch(shared)[:1].repeat(self.num_sims, *([1] * (wp.to_torch(shared).ndim - 1)))
            setattr(self.warp_model, name, wp.from_torch(rows.contiguous(), dtype=shared.dtype))
            self._fields[name] = wp.to_torch(getattr(self.warp_model, name))
            self._graphs.clear()  # they read the shared field's memory
        return self._fields[name]

    @property
    def expanded_fields(self) -> tuple[str, ...]:
        return tuple(self._fields)

    def refresh_constants(self, sim_ids: Tensor) -> None:
        if len(sim_ids):
            for name in _MASS_CONSTANTS:
                self.model_field(name)
            with self.scope():
                mjw.set_const(self.warp_model, self.warp_data)

    def state_dict(self) -> dict[str, Any]:
        """See `Engine.state_dict`."""
        return {
            "state": {name: value.clone() for name, value in self._state.items()},
            "model_fields": {name: value.clone() for name, value in self._fields.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the state is of another engine, model or number of simulations."""
        theirs = {name: tuple(value.shape) for name, value in state["state"].items()} if (
            isinstance(state["state"], Mapping)
        ) else "another engine's"  # fmt: skip
        ours = {name: tuple(value.shape) for name, value in self._state.items()}
        if theirs != ours:
            raise ValueError(
                f"this state is of {theirs}, here it is {ours}; load it with the same engine, task and number of "
                "environments"
            )
        for name in self._fields.keys() - state["model_fields"].keys():
            self._fields[name].copy_(torch.from_numpy(np.array(getattr(self.model, name))).to(self._fields[name]))
        for name, value in state["model_fields"].items():
            self.model_field(name).copy_(value)
        for name, value in state["state"].items():
            self._state[name].copy_(value)
        self._kinematics()

    def close(self) -> None:
        """Nothing to release: Warp's memory ends with its arrays."""

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Warp launches inside go to this engine's device and, on a GPU, to torch's current stream."""
        with wp.ScopedDevice(str(self.device)):
            if self.device.type == "cuda":
                with wp.ScopedStream(self._torch_stream()):
                    yield
            else:
                yield

    def capture(self, launch: Callable[[], None]) -> Any:
        """The CUDA graph of what `launch` launches; it must have run before, so that its kernels are loaded."""
        torch.cuda.synchronize(self.device)
        # On a stream of its own: CUDA refuses to capture the default stream, which is torch's current one as a rule.
        stream = wp.Stream(str(self.device))
        with wp.ScopedStream(stream), wp.ScopedCapture(stream=stream) as capture:
            launch()
        return capture.graph

    def replay(self, graph: Any) -> None:
        """Launch a graph of `capture` on torch's current stream."""
        wp.capture_launch(graph, stream=self._torch_stream())

    def _torch_stream(self) -> Any:
        return wp.stream_from_torch(torch.cuda.current_stream(self.device))

    def _data_tensor(self, name: str) -> Tensor:
        return wp.to_torch(getattr(self.warp_data, name))

    def _substeps(self, num_substeps: int) -> None:
        for _ in range(num_substeps):
            mjw.step(self.warp_model, self.warp_data)

    def _kinematics(self) -> None:
        with self.scope():
            mjw.fwd_kinematics(self.warp_model, self.warp_data)

    def _graph(self, num_substeps: int) -> Any:
        """The CUDA graph of `num_substeps`. The first call runs them once, so that every kernel is loaded before the
        capture, and puts the state back."""
        if num_substeps not in self._graphs:
            before = {name: value.clone() for name, value in self._state.items()}
            self._substeps(num_substeps)
            for name, value in before.items():
                self._state[name].copy_(value)
            self._graphs[num_substeps] = self.capture(lambda: self._substeps(num_substeps))
        return self._graphs[num_substeps]

    def _check(self) -> None:
        finite = torch.isfinite(self.qpos).all(dim=1) & torch.isfinite(self.qvel).all(dim=1)
        full = (self._overflow & int(_OVERFLOWS)) != 0
        if bool((~finite | full).any()):
            diverged, crowded = ((~finite).nonzero().flatten().tolist(), full.nonzero().flatten().tolist())
            self._overflow.zero_()
            if diverged:
                raise RuntimeError(
                    f"the physics of simulations {diverged} diverged (not-a-number positions or velocities); look for "
                    "an action that is not a number, an extreme mass, gain or friction, or a large SceneConfig.timestep"
                )
            raise RuntimeError(
                f"simulations {crowded} had more contacts than there was room for; give TabletopEnv a WarpEngine "
                "with a larger WarpConfig.contacts_per_sim and constraints_per_sim"
            )


def _keyframe(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    """What keyframe 0 says of the state; everything else starts at zero."""
    values = {
        "qpos": model.key_qpos[0],
        "qvel": model.key_qvel[0],
        "ctrl": model.key_ctrl[0],
        "time": model.key_time[0],
    }
    if model.nmocap:
        values["mocap_pos"] = model.key_mpos[0].reshape(-1, 3)
        values["mocap_quat"] = model.key_mquat[0].reshape(-1, 4)
    return values


def _device(device: str | None) -> torch.device:
    wp.init()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.device(device)
    if kind.type == "cuda":
        if not torch.cuda.is_available() or not wp.is_cuda_available():
            raise ValueError(f"WarpEngine: {device!r} needs a CUDA device that torch and Warp both see; there is none")
        return torch.device("cuda", kind.index if kind.index is not None else torch.cuda.current_device())
    if kind.type != "cpu":
        raise ValueError(f"WarpEngine: device {device!r} is unknown; use cpu, cuda or cuda:<i>")
    return kind


__all__ = ["WarpConfig", "WarpEngine"]
