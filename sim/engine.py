"""Engines: a batch of simulations of one MuJoCo model behind one small interface, all of it torch tensors.

Scene, task, control and reward code reads and writes these tensors and asks nothing of MuJoCo, so that the same code
drives `CpuEngine` (mujoco.batch on CPU threads) and an engine on a GPU.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's compiled modules have no type stubs)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import mujoco
import numpy as np
import torch
from mujoco.batch import Batch
from torch import Tensor

from vla_rl.cpu import available_cores

# Fields of the model that only pictures depend on: kept by the engine and read by renderers, never by physics.
VISUAL_FIELDS = frozenset(
    {
        "geom_rgba",
        "geom_matid",
        "mat_rgba",
        "cam_pos",
        "cam_quat",
        "cam_fovy",
        "light_pos",
        "light_dir",
        "light_diffuse",
    }
)

_STATE_FIELDS = ("qpos", "qvel", "ctrl", "mocap_pos", "mocap_quat", "xfrc_applied")
_DERIVED_FIELDS = ("xpos", "xquat", "site_xpos", "site_xmat", "xanchor", "xaxis")


@runtime_checkable
class Engine(Protocol):
    """N simulations of one model. Tensors are live, on `device`, in the engine's own float type.

    State, which may be written in place and counts at the next `step` or `forward`:
    `qpos [N, nq]`, `qvel [N, nv]`, `ctrl [N, nu]`, `mocap_pos [N, nmocap, 3]`, `mocap_quat [N, nmocap, 4]` (w first),
    `xfrc_applied [N, nbody, 6]` (force, torque; N and N m).

    Derived, read only, current after `step` and `forward`: `xpos [N, nbody, 3]`, `xquat [N, nbody, 4]`,
    `site_xpos [N, nsite, 3]`, `site_xmat [N, nsite, 9]` (row major), and for Jacobians `xanchor [N, njnt, 3]`,
    `xaxis [N, njnt, 3]`. Contacts are read as touch sensors where a model has them: `sensordata [N, nsensordata]`,
    which like every force describes the last substep.
    """

    model: mujoco.MjModel
    num_sims: int
    device: torch.device
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

    def step(self, active: Tensor, num_substeps: int) -> None:
        """Advance the simulations where `active` (bool [N]); the others do not change in any bit."""
        ...

    def forward(self, sim_ids: Tensor) -> None:
        """Make derived tensors of `sim_ids` (int64 [M]) current with their state."""
        ...

    def reset(self, sim_ids: Tensor) -> None:
        """Put `sim_ids` into the model's keyframe 0, solver memory and applied forces included. Call `forward` after
        the writes that follow. Model fields stay as they are."""
        ...

    def model_field(self, name: str) -> Tensor:
        """A field of the model with a value for each simulation, `[N, ...]`, live: write rows to randomise them.

        The first call gives every simulation the model's value. After writes to masses, inertias or geometry that
        constants derive from, call `refresh_constants`.
        """
        ...

    @property
    def expanded_fields(self) -> tuple[str, ...]:
        """Names of the model fields that `model_field` gave a value for each simulation."""
        ...

    def refresh_constants(self, sim_ids: Tensor) -> None:
        """Recompute constants that derive from per-simulation masses, inertias and geometry of `sim_ids`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future, so that a loaded batch goes on bit for bit."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def _ascending(sim_ids: Tensor) -> np.ndarray:
    """Ids as `mujoco.batch` insists on them: sorted, each once. What is asked of a simulation depends on no order."""
    return np.unique(sim_ids.numpy())


class CpuEngine:
    """`Engine` on `mujoco.batch.Batch`: simulations share `num_threads` CPU threads; results are bit-identical at any
    number of threads. Tensors are float64 views of the batch's own memory.
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

    def __init__(self, model: mujoco.MjModel, num_sims: int, num_threads: int | None = None) -> None:
        if num_sims < 1:
            raise ValueError(f"CpuEngine: num_sims must be at least 1, got {num_sims}")
        self.model = model
        self.num_sims = num_sims
        self.device = torch.device("cpu")
        self._batch = Batch(model, num_sims, min(num_threads or available_cores(), num_sims))
        self._fields: dict[str, Tensor] = {}
        for name in _STATE_FIELDS:
            setattr(self, name, torch.from_numpy(self._batch.bind(name)))
        for name in (*_DERIVED_FIELDS, "sensordata"):
            setattr(self, name, self._view(name))
        self._state = torch.from_numpy(self._batch.state)
        self._errors = [int(w) for w in _FATAL_WARNINGS]
        self._batch.reset(None, 0, mujoco.mjtStage.mjSTAGE_POS)

    def _view(self, name: str) -> Tensor:
        # Derived fields are marked read-only, which torch has no notion of: view the writable memory under them.
        # A write would be lost, not harmful, for every call copies them out anew.
        array = self._batch.bind(name)
        if array.size == 0 or not isinstance(array.base, np.ndarray):
            return torch.from_numpy(array.copy())
        return torch.from_numpy(array.base.view(array.dtype).reshape(array.shape))

    def step(self, active: Tensor, num_substeps: int) -> None:
        """See `Engine.step`. Raises RuntimeError, naming the simulations, where the physics diverged."""
        moving = active.numpy()
        ids = None if moving.all() else np.flatnonzero(moving)
        if ids is not None and len(ids) == 0:
            return
        self._batch.step(ids, num_substeps, mujoco.mjtStage.mjSTAGE_POS)
        self._check_divergence()

    def forward(self, sim_ids: Tensor) -> None:
        if len(sim_ids):
            self._batch.forward(_ascending(sim_ids), mujoco.mjtStage.mjSTAGE_POS)

    def reset(self, sim_ids: Tensor) -> None:
        if len(sim_ids):
            self._batch.reset(_ascending(sim_ids), 0, mujoco.mjtStage.mjSTAGE_NONE)

    def model_field(self, name: str) -> Tensor:
        """See `Engine.model_field`. Raises ValueError where the model has no such field."""
        if name not in self._fields:
            if name in VISUAL_FIELDS:
                value = torch.from_numpy(getattr(self.model, name).copy())
                self._fields[name] = value.expand(self.num_sims, *value.shape).clone()
            else:
                try:
                    self._fields[name] = torch.from_numpy(self._batch.expand(name))
                except (AttributeError, ValueError) as error:
                    raise ValueError(f"model_field: {name!r} cannot differ between simulations: {error}") from error
        return self._fields[name]

    @property
    def expanded_fields(self) -> tuple[str, ...]:
        return tuple(self._fields)

    def refresh_constants(self, sim_ids: Tensor) -> None:
        if len(sim_ids):
            self._batch.set_const(_ascending(sim_ids))

    def state_dict(self) -> dict[str, Any]:
        fields = {name: value.clone() for name, value in self._fields.items()}
        return {"state": self._state.clone(), "model_fields": fields}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the state is of another model or number of simulations."""
        if state["state"].shape != self._state.shape:
            raise ValueError(
                f"this state is of {tuple(state['state'].shape)} (simulations, size), here it is "
                f"{tuple(self._state.shape)}; load it with the same task and number of environments"
            )
        for name in self._fields.keys() - state["model_fields"].keys():
            self._fields[name].copy_(torch.from_numpy(np.array(getattr(self.model, name))).to(self._fields[name]))
        for name, value in state["model_fields"].items():
            self.model_field(name).copy_(value)
        if any(name not in VISUAL_FIELDS for name in self._fields):
            self._batch.set_const(None)
        self._state.copy_(state["state"])
        self._batch.forward(None, mujoco.mjtStage.mjSTAGE_POS)

    def close(self) -> None:
        """Nothing to release: the batch's threads end with it."""

    def _check_divergence(self) -> None:
        # MuJoCo silently resets a simulation whose numbers blow up; an episode that jumps home is worse than an error.
        bad = self._batch.warning[:, self._errors, 1].any(axis=1)
        if bad.any():
            ids = np.flatnonzero(bad).tolist()
            self._batch.warning[ids] = 0
            raise RuntimeError(
                f"the physics of simulations {ids} diverged (not-a-number or huge positions, velocities or "
                "accelerations); look for an extreme mass, gain or friction, or use a smaller SceneConfig.timestep"
            )


_FATAL_WARNINGS = (
    mujoco.mjtWarning.mjWARN_BADQPOS,
    mujoco.mjtWarning.mjWARN_BADQVEL,
    mujoco.mjtWarning.mjWARN_BADQACC,
    mujoco.mjtWarning.mjWARN_BADCTRL,
)


__all__ = ["VISUAL_FIELDS", "CpuEngine", "Engine"]
