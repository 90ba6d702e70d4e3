"""Whom an evaluation can ask: a stored policy, a server, a function of yours, the scripted expert.

    a folder                  of ours or a public checkpoint
    ws://host:port            any server of openpi's protocol
    expert                    the scripted one of the task
    module:function           function(spec) gives a `Policy`, or a function of one observation, see `NumpyPolicy`

Actors are plain values, so that every process of an evaluation can open its own.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vla_rl.core import ActionChunk, EnvSpec, Observation
from vla_rl.envs.config import AnyEnvConfig, without_cameras
from vla_rl.envs.experts import AnyExpertConfig, best_expert, make_expert
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.policies.checkpoints.load_any import layout_of, load_any
from vla_rl.policies.checkpoints.native import read_description
from vla_rl.protocols import Policy
from vla_rl.serving.config import RemoteConfig, require_serving

NumpyAct = Callable[[Mapping[str, Any]], Any]


class PolicyActor(Protocol):
    """Somebody who has a policy. `label`: for tables. `identity`: JSON values that decide its actions."""

    @property
    def label(self) -> str: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def open(self, spec: EnvSpec) -> Policy:
        """The policy for the environment of `spec`. Raises ValueError where it is for another."""
        ...


@dataclass(frozen=True)
class StoredPolicy:
    """The policy of `folder` on `device`; the environment's cameras fill a public checkpoint's picture slots in order.
    `name`: for tables, "" for the folder."""

    folder: Path
    device: str = "cpu"
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or str(self.folder)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"policy": self.label, "policy_digest": weights_digest(self.folder)}

    def open(self, spec: EnvSpec) -> Policy:
        policy: Any = load_any(self.folder, device=torch.device(self.device), spec=spec, cameras=tuple(spec.cameras))
        return policy

    def seen(self) -> dict[str, Any]:
        """Cameras and their size in pixels that the policy was made for, as fields of an environment; {} where its
        folder does not say, or says several sizes."""
        spec = read_description(self.folder)["spec"] if layout_of(self.folder) == "native" else None
        cameras = (spec or {}).get("cameras", {})
        sizes = {(c["height"], c["width"]) for c in cameras.values()}
        if len(sizes) != 1 or (size := sizes.pop())[0] != size[1]:
            return {}
        return {"cameras": tuple(cameras), "image_size": size[0]}


@dataclass(frozen=True)
class ServedPolicy:
    """The policy behind the server at `url`."""

    url: str
    remote: RemoteConfig

    @property
    def label(self) -> str:
        return self.url

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"policy": self.url, "keys": self.remote.keys}

    def open(self, spec: EnvSpec) -> Policy:
        require_serving()
        from vla_rl.serving.remote_policy import RemotePolicy

        return RemotePolicy(self.url, spec, self.remote)


@dataclass(frozen=True)
class FunctionPolicy:
    """What `entry`, "module:function", returns for an `EnvSpec`; the module lies on the path or in the working
    folder. Raises ValueError, when opened, for one that is not there or returns something else."""

    entry: str

    @property
    def label(self) -> str:
        return self.entry

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"policy": self.entry}

    def open(self, spec: EnvSpec) -> Policy:
        module, _, name = self.entry.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            made = getattr(importlib.import_module(module), name)(spec)
        except (ModuleNotFoundError, AttributeError) as error:
            raise ValueError(f"policy {self.entry!r} cannot be loaded: {error}") from error
        finally:
            sys.path.remove(os.getcwd())
        if isinstance(made, Policy):
            return made
        if not callable(made):
            raise ValueError(
                f"{self.entry} returned {type(made).__name__}; expected a policy, or a function of an observation"
            )
        return NumpyPolicy(made, spec)


@dataclass(frozen=True)
class ReadyPolicy:
    """A policy that is here already; only the process that has it can ask it."""

    policy: Any
    label: str = ""

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"policy": self.label}

    def open(self, spec: EnvSpec) -> Policy:
        del spec
        return self.policy


@dataclass(frozen=True)
class Expert:
    """The scripted expert, which sees the simulator's state. `config`: None takes the one of each environment."""

    config: AnyExpertConfig | None = None

    @property
    def label(self) -> str:
        return "expert"

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"policy": "expert"}

    def environment(self, env: AnyEnvConfig) -> AnyEnvConfig:
        """`env` as the expert needs it: nothing is rendered for who looks at no picture."""
        return without_cameras(env)

    def controller(self, env: ChunkedEnv, config: AnyEnvConfig) -> Callable[[], Tensor]:
        """Gives actions [N, 1, A] for the environments as they are now."""
        return make_expert(env, self.config or best_expert(config))


Actor = PolicyActor | Expert


class NumpyPolicy:
    """A `Policy` around `act(observation) -> actions [H, A]`, a function of one observation as dictionary:
    "images" (camera -> uint8 [h, w, 3]), "state" (float32 [S]), "prompt". Its own randomness is its own business.

    Raises ValueError for actions that are not [H, A] of the environment's A, of one H throughout.
    """

    rows_are_independent = True

    def __init__(self, act: NumpyAct, spec: EnvSpec) -> None:
        self._act, self._spec = act, spec
        self.action_dim = spec.action.dim
        self.action_horizon = 0
        black = {c: np.zeros((s.height, s.width, 3), np.uint8) for c, s in spec.cameras.items()}
        first = self._ask({"images": black, "state": np.zeros(spec.state_dim, np.float32), "prompt": ""})
        self.action_horizon = len(first)

    def act(self, obs: Observation, noise: Tensor) -> ActionChunk:
        del noise
        rows = [
            self._ask(
                {
                    "images": {camera: image[i].cpu().numpy() for camera, image in obs.images.items()},
                    "state": obs.state[i].cpu().numpy(),
                    "prompt": obs.instruction[i],
                }
            )
            for i in range(len(obs))
        ]
        return ActionChunk(torch.from_numpy(np.stack(rows)).to(obs.state.device))

    def _ask(self, observation: Mapping[str, Any]) -> np.ndarray:
        actions = np.asarray(self._act(observation), dtype=np.float32)
        horizon = self.action_horizon or (len(actions) if actions.ndim == 2 else 1)
        if actions.shape != (horizon, self.action_dim) or not horizon:
            raise ValueError(
                f"the policy's function returned actions {actions.shape}, expected [{horizon}, {self.action_dim}] "
                f"for {self._spec.name}"
            )
        return actions


def actor_of(name: str, *, device: str = "cpu", remote: RemoteConfig | None = None) -> Actor:
    """Who `name` is, see the top of this file. Raises ValueError where it is nobody, or where `remote` is given for one
    who is not behind a server."""
    if name.startswith(("ws://", "wss://")):
        return ServedPolicy(name, remote or RemoteConfig())
    if remote is not None and remote != RemoteConfig():
        raise ValueError(f"--remote.* is for a policy behind a server, and {name} is none")
    if name == "expert":
        return Expert()
    if Path(name).is_dir():
        return StoredPolicy(Path(name), device)
    module, colon, function = name.partition(":")
    if colon and module.replace(".", "").isidentifier() and function.isidentifier():
        return FunctionPolicy(name)
    raise ValueError(
        f"there is no policy {name!r}: expected a folder, ws://host:port, expert, or module:function of a function of "
        "yours"
    )


def weights_digest(folder: Path) -> str:
    """Of the files with a policy's weights and of its configuration, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json")):
        digest.update(json.dumps(path.relative_to(folder).as_posix()).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


__all__ = [
    "Actor", "Expert", "FunctionPolicy", "NumpyPolicy", "PolicyActor", "ReadyPolicy", "ServedPolicy", "StoredPolicy",
    "actor_of", "weights_digest",
]  # fmt: skip
