"""The project's own policy folder: `policy.safetensors` and `config.json`. Nothing in it is executed or unpickled.

`policy.safetensors` is complete by itself: weights, normalisers (as buffers) and, in its header, the same description
that `config.json` shows to people. One file replaced atomically cannot be half new and half old.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vla_rl.core import EnvSpec
from vla_rl.policies.adaptation import load_precision, plain_state_dict
from vla_rl.policies.blocks.normalizer_buffers import NormalizerBuffers
from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict
from vla_rl.policies.checkpoints.outside import how_to_import, import_named, register_config

WEIGHTS_FILE, CONFIG_FILE = "policy.safetensors", "config.json"
FORMAT = "vla_rl.policy.v1"

# Names are imported when they are asked for, so that loading a state policy does not import vision.
_REGISTRY: dict[str, tuple[type | str, type | str]] = {
    "tiny_vla": ("vla_rl.policies.tiny:TinyVLA", "vla_rl.policies.tiny:TinyVLAConfig"),
    "gaussian_mlp": ("vla_rl.policies.gaussian:GaussianMLP", "vla_rl.policies.gaussian:GaussianMLPConfig"),
    "agent": ("vla_rl.policies.agent:AgentPolicy", "vla_rl.policies.agent:AgentPolicyConfig"),
    "steered": ("vla_rl.policies.steered:SteeredPolicy", "vla_rl.policies.steered:SteeredPolicyConfig"),
    "pi0": ("vla_rl.policies.pi0:Pi0", "vla_rl.policies.pi0:Pi0Config"),
    "smolvla": ("vla_rl.policies.smolvla:SmolVLA", "vla_rl.policies.smolvla:SmolVLAConfig"),
    "openvla": ("vla_rl.policies.openvla:OpenVLA", "vla_rl.policies.openvla:OpenVLAConfig"),
    "openvla_oft": ("vla_rl.policies.openvla_oft:OpenVLAOFT", "vla_rl.policies.openvla_oft:OpenVLAOFTConfig"),
    "openvla_oft_tokens": (
        "vla_rl.policies.openvla_oft:OpenVLAOFTTokens",
        "vla_rl.policies.openvla_oft:OpenVLAOFTTokensConfig",
    ),
    "flow_mlp": ("vla_rl.policies.flow_mlp:FlowMLP", "vla_rl.policies.flow_mlp:FlowMLPConfig"),
    "hf_flow": ("vla_rl.policies.hf_vlm:HFFlowPolicy", "vla_rl.policies.hf_vlm:HFFlowConfig"),
    "hf_token": ("vla_rl.policies.hf_vlm:HFTokenPolicy", "vla_rl.policies.hf_vlm:HFTokenConfig"),
}


class PolicyCheckpointError(ValueError):
    """A policy folder cannot be read, or does not hold what it should."""


def register_policy(name: str, policy_class: type, config_class: type) -> None:
    """Make policies of `policy_class` storable under `name`, and their configs part of recipes. Its constructor takes
    one `config_class`, a frozen dataclass of JSON values, and keeps it as `config`. Raises ValueError where the name is
    taken."""
    if name in _REGISTRY and _REGISTRY[name] != (policy_class, config_class):
        raise ValueError(f"a policy {name!r} is registered already; choose another name")
    _REGISTRY[name] = (policy_class, config_class)
    register_config(config_class)


def policy_class_of(config: Any) -> type:
    """The registered class that is built from such a config. Raises TypeError where there is none."""
    own = f"{type(config).__module__}:{type(config).__qualname__}"
    for policy_class, config_class in _REGISTRY.values():
        if config_class is type(config) or config_class == own:
            return _resolve(policy_class)
    raise TypeError(
        f"{type(config).__name__} is not the config of a registered policy, known are {sorted(_REGISTRY)}; "
        "call register_policy(name, policy_class, config_class) in the module of yours"
    )


def save_policy(
    policy: nn.Module,
    folder: str | Path,
    *,
    spec: EnvSpec | None = None,
    metadata: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `policy` to `folder`, replacing what is there atomically; adapters are merged in what is written.

    `spec`: the environment that it was made for; `load_policy` can check it. `metadata`: JSON values for people.
    `state`: its `plain_state_dict`, of a policy that is divided among learners. Raises TypeError for a class that is
    not registered.
    """
    description = _describe(policy, spec, dict(metadata or {}))
    state = plain_state_dict(policy) if state is None else state
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    partial = path / f".{WEIGHTS_FILE}.{os.getpid()}.partial"
    try:
        save_file(tensors, partial, metadata={"description": json.dumps(description)})
        _sync(partial)
        os.replace(partial, path / WEIGHTS_FILE)
    finally:
        partial.unlink(missing_ok=True)
    _write_text(path / CONFIG_FILE, json.dumps(description, indent=2) + "\n")


def load_policy(folder: str | Path, *, device: torch.device | str = "cpu", spec: EnvSpec | None = None) -> nn.Module:
    """The policy of `folder`, bit for bit as it was saved, in evaluation mode.

    Raises PolicyCheckpointError for a missing or truncated file, an unknown class, or keys that are missing, unknown or
    of another shape; and, with `spec`, where the environment's state or action is not the one of the policy.
    """
    tensors, description = _read(Path(folder))
    if spec is not None:
        check_spec(description.get("spec"), spec, Path(folder))
    policy = build_described(description, Path(folder))
    load_precision(policy, tensors)
    _load_strict(policy, tensors, Path(folder) / WEIGHTS_FILE)
    for name, kind in description["normalization"].items():
        policy.get_submodule(name).kind = kind
    return policy.to(device).eval()


def build_described(description: Mapping[str, Any], folder: Path) -> nn.Module:
    """The policy that `description` is of, with new weights. Raises PolicyCheckpointError where it cannot be built."""
    policy_class, config_class = _classes(description["class"], description.get("module", ""), folder)
    try:
        return policy_class(config_from_dict(config_class, description["config"], where="config"))
    except ValueError as error:
        raise PolicyCheckpointError(f"{folder}: {error}") from error


def read_description(folder: str | Path) -> dict[str, Any]:
    """Class, config, spec, normalisation and metadata of a policy folder, without building the policy."""
    return _read(Path(folder), tensors=False)[1]


# ------------------------------------------------------------------------------------------------------- description
def _describe(policy: nn.Module, spec: EnvSpec | None, metadata: dict[str, Any]) -> dict[str, Any]:
    own = f"{type(policy).__module__}:{type(policy).__qualname__}"
    name = next((n for n, (p, _) in _REGISTRY.items() if p is type(policy) or p == own), None)
    if name is None:
        raise TypeError(
            f"{type(policy).__name__} is not a registered policy, so it could not be loaded again; "
            "call vla_rl.policies.checkpoints.native.register_policy(name, policy_class, config_class) first"
        )
    is_ours = isinstance(_REGISTRY[name][0], str)
    kinds = {n: m.kind for n, m in policy.named_modules() if isinstance(m, NormalizerBuffers)}
    return {
        "format": FORMAT,
        "class": name,
        **({} if is_ours else {"module": type(policy).__module__}),
        "config": config_to_dict(policy.config),
        "normalization": kinds,
        "spec": None if spec is None else config_to_dict(spec),
        "metadata": metadata,
    }


def _classes(name: str, module: str, folder: Path) -> tuple[Any, Any]:
    """`module`: of a class from outside, as the folder says."""
    if name not in _REGISTRY:
        import_named()
    if name not in _REGISTRY:
        raise PolicyCheckpointError(
            f"{folder}: unknown policy class {name!r}, known are {sorted(_REGISTRY)}; "
            + (how_to_import(module) if module else "import the module that registers it (register_policy) first")
        )
    policy_class, config_class = (_resolve(entry) for entry in _REGISTRY[name])
    return policy_class, config_class


def _resolve(entry: type | str) -> type:
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def check_spec(saved: Mapping[str, Any] | None, spec: EnvSpec, folder: Path) -> None:
    """Raise PolicyCheckpointError where the policy was `saved` for another state or action than those of `spec`."""
    if saved is None:
        raise PolicyCheckpointError(f"{folder}: saved without the spec of its environment, so it cannot be checked")
    here = config_to_dict(spec)
    checks = {
        "state_names": (saved["state_names"], here["state_names"]),
        "action names": (saved["action"]["names"], here["action"]["names"]),
        "action low": (saved["action"]["low"], here["action"]["low"]),
        "action high": (saved["action"]["high"], here["action"]["high"]),
    }
    for what, (theirs, ours) in checks.items():
        if theirs != ours:
            raise PolicyCheckpointError(
                f"{folder}: the policy was made for {saved['name']} with {what} {theirs}, "
                f"but {spec.name} has {ours}; choose the environment that it was trained in"
            )


# ------------------------------------------------------------------------------------------------------------- files
def _read(folder: Path, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise PolicyCheckpointError(f"{path}: no such file; expected a folder written by save_policy")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            values = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PolicyCheckpointError(
            f"{path}: not a whole safetensors file ({error}); it may be cut short, copy it again"
        ) from error
    if "description" not in header:
        raise PolicyCheckpointError(f"{path}: has no description of its policy; it was not written by save_policy")
    description = json.loads(header["description"])
    if description.get("format") != FORMAT:
        raise PolicyCheckpointError(f"{path}: format {description.get('format')!r}, this version reads {FORMAT!r}")
    _check_copy(folder / CONFIG_FILE, description)
    return values, description


def _check_copy(path: Path, description: Mapping[str, Any]) -> None:
    """`config.json` is a copy for people: one that says something else would be an edit without effect."""
    if not path.is_file():
        return
    try:
        copy = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PolicyCheckpointError(f"{path}: not JSON ({error}); delete it, {WEIGHTS_FILE} is complete") from error
    different = [key for key in ("class", "config") if copy.get(key) != description[key]]
    if different:
        raise PolicyCheckpointError(
            f"{path}: {' and '.join(different)} differ from what {WEIGHTS_FILE} was saved with. Editing this copy has "
            "no effect: delete it to use the saved values, or load the policy, change it and save it again"
        )


def _load_strict(policy: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    expected = policy.state_dict()
    problems = [f"missing {key} {tuple(expected[key].shape)}" for key in expected if key not in tensors]
    problems += [f"unknown {key} {tuple(tensors[key].shape)}" for key in tensors if key not in expected]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)} {tensors[key].dtype}, expected {tuple(value.shape)} {value.dtype}"
        for key, value in expected.items()
        if key in tensors and (tensors[key].shape != value.shape or tensors[key].dtype != value.dtype)
    ]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise PolicyCheckpointError(f"{path} does not fit {type(policy).__name__}:\n  {shown}")
    policy.load_state_dict(dict(tensors), strict=True)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    os.replace(partial, path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
