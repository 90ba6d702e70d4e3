"""Any checkpoint folder, whatever its layout: read it, describe it, write it in another layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vla_rl.core import EnvSpec
from vla_rl.policies.adaptation import compute_in_own_precision
from vla_rl.policies.blocks.decoder import DecoderConfig
from vla_rl.policies.blocks.tokenizer import FILES
from vla_rl.policies.blocks.vision_transformer import VisionTransformerConfig
from vla_rl.policies.checkpoints.adapt import check_fits
from vla_rl.policies.checkpoints.assemble import Plan, assemble, family_of_config, family_of_policy
from vla_rl.policies.checkpoints.lerobot import FAMILIES, plan_lerobot, save_lerobot
from vla_rl.policies.checkpoints.names import family_of
from vla_rl.policies.checkpoints.native import (
    WEIGHTS_FILE,
    PolicyCheckpointError,
    build_described,
    check_spec,
    load_policy,
    policy_class_of,
    read_description,
    save_policy,
)
from vla_rl.policies.checkpoints.openpi import plan_openpi, save_openpi
from vla_rl.policies.checkpoints.openpi_jax import plan_openpi_jax, save_openpi_jax
from vla_rl.policies.checkpoints.openvla import (
    OpenVLAOptions,
    describe_openvla,
    is_openvla,
    read_openvla,
    write_openvla,
)
from vla_rl.policies.checkpoints.options import ReadOptions
from vla_rl.policies.checkpoints.orbax import OrbaxSource, params_folder
from vla_rl.policies.checkpoints.tensors import TensorSource, float32_keys, load_into, names_in, on_meta, read_json
from vla_rl.policies.pi0 import Pi0Config
from vla_rl.policies.smolvla import SmolVLAConfig

Layout = Literal["native", "openpi", "openpi_jax", "lerobot", "openvla"]
LAYOUTS: dict[Layout, str] = {
    "native": WEIGHTS_FILE,
    "openpi": "model.safetensors of pi0 or pi0.5 with config.json and assets/",
    "openpi_jax": "params/ of orbax, with assets/",
    "lerobot": f"model.safetensors with a config.json of type {', '.join(FAMILIES)}",
    "openvla": "safetensors with a config.json of model_type openvla",
}
_PLANS: dict[Layout, Callable[[Path, ReadOptions], Plan]] = {
    "openpi": plan_openpi,
    "openpi_jax": plan_openpi_jax,
    "lerobot": plan_lerobot,
}


def layout_of(folder: Path) -> Layout:
    """By the files in it. Raises PolicyCheckpointError where it is none that is known, or no folder at all."""
    if not folder.is_dir():
        raise PolicyCheckpointError(f"{folder} is no folder")
    if (folder / WEIGHTS_FILE).is_file():
        return "native"
    if is_openvla(folder):
        return "openvla"
    if params_folder(folder) is not None:
        return "openpi_jax"
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if config.get("type") in FAMILIES:
            return "lerobot"
        if family_of(TensorSource.of_folder(folder).keys()) in ("pi0", "pi05"):
            return "openpi"
    known = "".join(f"\n  {name}: {what}" for name, what in LAYOUTS.items())
    raise PolicyCheckpointError(f"{folder} is in no known layout; it holds {names_in(folder)}. Known are:{known}")


def load_any(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    spec: EnvSpec | None = None,
    tokenizer: Path | None = None,
    cameras: tuple[str, ...] = (),
    options: ReadOptions | None = None,
    openvla: OpenVLAOptions | None = None,
) -> nn.Module:
    """The policy of `folder`, in evaluation mode, whoever wrote it.

    `dtype`: of the parameters; None: our own layout as it was saved, others in float32. `spec`: the environment that
    it must fit; for another one see `adapt`. `tokenizer`, `cameras`: as in `ReadOptions`. `options`: what else a reader
    may be told. `openvla`: the same for that family.

    Raises PolicyCheckpointError for an unknown layout, for files that are missing, corrupt or of another model, and
    where `spec` has other states, actions or cameras; FileNotFoundError that says which tokenizer to bring.
    """
    folder = Path(folder)
    layout = layout_of(folder)
    if layout == "native":
        return _load_native(folder, device, dtype, spec)
    told = replace(options or ReadOptions(), device=device, dtype=dtype or torch.float32)
    told = replace(told, tokenizer=tokenizer or told.tokenizer, cameras=tuple(cameras) or told.cameras)
    if spec is not None:
        told = replace(told, state_dim=spec.state_dim, action_dim=spec.action.dim)
    policy = _read(folder, layout, told, openvla)
    if spec is not None:
        check_fits(policy, spec, str(folder))
    return policy


def convert(
    source: Path,
    target: Path,
    layout: Layout,
    options: ReadOptions | None = None,
    openvla: OpenVLAOptions | None = None,
) -> list[str]:
    """Write the policy of `source` to `target` in another layout; tensors keep the precision that they are stored in.

    Returns what the layout has no place for, in sentences: a reader of `target` goes by its own ways there. Raises
    PolicyCheckpointError where `target` holds anything already, where the layout cannot hold the family, and for
    options with our own layout as `source`, which says all itself.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PolicyCheckpointError(f"{target} is not empty; name a new folder")
    found = layout_of(source)
    told = options or ReadOptions(dtype=None)
    if openvla is not None and found not in ("native", "openvla"):
        raise PolicyCheckpointError(f"{source} is no folder of OpenVLA; leave its options out")
    if found == "native":
        if openvla is not None or replace(told, dtype=None) != ReadOptions(dtype=None):
            raise PolicyCheckpointError(
                f"{source} is in our own layout, which leaves nothing open; leave the options out"
            )
        policy: Any = _load_native(source, "cpu", None, None)
    else:
        policy = _read(source, found, told, openvla)
    if layout == "native":
        save_policy(policy, target, metadata={"converted_from": found})
        return []
    if layout == "openvla":
        write_openvla(policy, target)
        return []
    family_of_policy(policy)
    {"openpi": save_openpi, "openpi_jax": save_openpi_jax, "lerobot": save_lerobot}[layout](policy, target)
    again = _PLANS[layout](target, ReadOptions()).config
    pairs = {f.name: (getattr(policy.config, f.name), getattr(again, f.name)) for f in fields(again)}
    return [f"{name} {ours} is read back as {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]


def _read(folder: Path, layout: Layout, options: ReadOptions, openvla: OpenVLAOptions | None) -> nn.Module:
    if layout == "openvla":
        return read_openvla(folder, options, openvla)
    return assemble(_plan(folder, layout, options), options)


def _plan(folder: Path, layout: Layout, options: ReadOptions) -> Plan:
    """Raises PolicyCheckpointError for an option that this checkpoint has no use for."""
    plan = _PLANS[layout](folder, options)
    adaptive = isinstance(plan.config, Pi0Config) and plan.config.adaptive
    if not adaptive and (options.discrete_state is not None or options.state_width is not None):
        raise PolicyCheckpointError(
            f"{folder}: discrete_state and state_width are for pi0.5, this is {family_of_config(plan.config)}"
        )
    if options.asset and layout == "lerobot":
        raise PolicyCheckpointError(f"{folder}: asset {options.asset!r} is for openpi's checkpoints, this is LeRobot's")
    return plan


def _load_native(
    folder: Path, device: torch.device | str, dtype: torch.dtype | None, spec: EnvSpec | None
) -> nn.Module:
    """As `load_policy`, but straight from the file into `dtype` on `device`, which matters for large ones."""
    description = read_description(folder)
    if spec is not None and description["spec"] is not None:
        check_spec(description["spec"], spec, folder)
    policy = on_meta(lambda: build_described(description, folder))
    state = policy.state_dict()
    if all(name in state for name, _ in policy.named_buffers()):
        source = TensorSource(folder / WEIGHTS_FILE)
        load_into(policy, source, {key: key for key in state}, dtype=dtype, device=device)
        for name, kind in description["normalization"].items():
            policy.get_submodule(name).kind = kind
    else:  # buffers that are computed as it is built
        policy = load_policy(folder, device=device)
        kept = float32_keys(policy)
        for name, parameter in policy.named_parameters():
            if dtype is not None and name not in kept:
                parameter.data = parameter.data.to(dtype)
    if any(p.dtype != torch.float32 for p in policy.parameters()):
        compute_in_own_precision(policy)
    if spec is not None and description["spec"] is None:  # converted: sizes and cameras are what can be checked
        check_fits(policy, spec, str(folder))
    return policy.eval()


# ----------------------------------------------------------------------------------------------------------- describe
def describe(folder: Path, options: ReadOptions | None = None) -> dict[str, str]:
    """What `vla-rl checkpoint inspect` prints. No tensor of the networks is read."""
    layout = layout_of(folder)
    told = replace(options or ReadOptions(), require_tokenizer=False)
    lines = {"layout": layout}
    if layout == "native":
        return lines | _describe_native(folder)
    if layout == "openvla":
        return lines | describe_openvla(folder)
    plan = _plan(folder, layout, told)
    lines |= {"family": family_of_config(plan.config)} | _describe_config(plan.config) | _describe_tensors(plan.source)
    for name, normalizer in zip(("state", "action"), plan.normalizers, strict=True):
        lines[f"{name} normalisation"] = normalizer.kind
    if layout == "openpi_jax" and not told.action_horizon and not (folder / "config.json").is_file():
        lines["chunk"] = "its length is in no file: action_horizon, when it is loaded"
    lines["tokenizer"] = _describe_tokenizer(folder, told, plan)
    return lines


def _describe_native(folder: Path) -> dict[str, str]:
    description = read_description(folder)
    config = on_meta(lambda: build_described(description, folder)).config
    lines = {"family": description["class"], **_describe_tensors(TensorSource(folder / WEIGHTS_FILE))}
    if isinstance(config, Pi0Config | SmolVLAConfig):
        lines |= {"family": family_of_config(config), **_describe_config(config)}
    else:
        names = ("state_dim", "action_dim", "action_horizon", "cameras")
        lines |= {name.replace("_", " "): _text(getattr(config, name)) for name in names if hasattr(config, name)}
    lines |= {f"{name} normalisation": kind for name, kind in _short(description["normalization"]).items()}
    lines["environment"] = (description["spec"] or {}).get("name", "not stored")
    return lines


def _short(kinds: Mapping[str, str]) -> dict[str, str]:
    return {name.rpartition(".")[2].removesuffix("_normalizer"): kind for name, kind in kinds.items()}


def _describe_config(config: Any) -> dict[str, str]:
    policy = on_meta(lambda: policy_class_of(config)(config))
    parameters = sum(p.numel() for p in policy.parameters())
    return {
        "parameters": f"{parameters:,}",
        "vision": _vision(config.vision),
        "language model": _decoder(config.language),
        "expert": _decoder(config.expert),
        "state": f"{config.state_dim} dimensions, padded to {config.max_state_dim}",
        "action": f"{config.action_dim} dimensions, padded to {config.max_action_dim}",
        "chunk": f"{config.action_horizon} actions in {config.num_steps} steps",
        "cameras": _text(config.cameras),
        "prompt": f"{config.prompt.kind}, at most {config.tokenizer.max_tokens} tokens",
    }


def _describe_tensors(source: TensorSource | OrbaxSource) -> dict[str, str]:
    counts: Counter[str] = Counter()
    for key in source.keys():  # noqa: SIM118
        counts[source.dtype(key)] += int(torch.Size(source.shape(key)).numel())
    return {"stored numbers": ", ".join(f"{number:,} of {dtype}" for dtype, number in counts.most_common())}


def _describe_tokenizer(folder: Path, options: ReadOptions, plan: Plan) -> str:
    if plan.tokenizer.config.num_bytes:
        return f"{plan.tokenizer.config.kind}, {plan.tokenizer.num_ids:,} tokens"
    where = options.tokenizer or folder
    return f"MISSING: copy {' or '.join(FILES)} of the model into {where}, or name its folder with --tokenizer"


def _vision(config: VisionTransformerConfig) -> str:
    return (
        f"{config.depth} layers of {config.width}, {config.num_heads} heads, "
        f"{config.image_size} px in patches of {config.patch_size}"
    )


def _decoder(config: DecoderConfig) -> str:
    heads = f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} of keys"
    vocabulary = f", {config.vocab_size:,} tokens" if config.vocab_size else ""
    return f"{config.depth} layers of {config.width}, {heads}{vocabulary}"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


__all__ = ["LAYOUTS", "Layout", "convert", "describe", "layout_of", "load_any"]
