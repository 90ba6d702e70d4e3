"""Names of our parameters in OpenVLA's files, and what lies beside the shards: `.pt` heads and a LoRA adapter.

The vision towers are timm's: queries, keys and values in one matrix, class token and registers apart. With FiLM, the
towers of the shards are those before fine-tuning; the whole ones, with their adapter inside, are a `.pt` file.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_rl.policies.blocks.vision_transformer import VisionTransformerConfig
from vla_rl.policies.checkpoints.native import PolicyCheckpointError
from vla_rl.policies.checkpoints.tensors import ReadsTensors, Recipe, TensorSource, read_json

TOWERS = {"featurizer": "dino", "fused_featurizer": "siglip"}
ADAPTER = Path("lora_adapter")
_LAYER = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "scale1": "ls1.scale_factor",
    "scale2": "ls2.scale_factor",
    "film_scale": "scale",
    "film_shift": "shift",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def recipe(key: str, towers: Mapping[str, VisionTransformerConfig]) -> Recipe | str:
    """Where one of our parameters lies in the checkpoint."""
    key = key.removeprefix("body.")
    for start, theirs in (
        ("vlm.decoder.", "language_model.model."),
        ("vlm.lm_head.", "language_model.lm_head."),
        ("vlm.projector.", "projector."),
        ("proprio_projector.", "proprio_projector."),
        ("action_head.", "action_head.model."),
    ):
        if key.startswith(start):
            return theirs + key.removeprefix(start)
    tower, _, rest = key.removeprefix("vlm.vision.").partition(".")
    return _tower_recipe(f"vision_backbone.{tower}.", rest, towers[tower])


def _tower_recipe(root: str, key: str, config: VisionTransformerConfig) -> Recipe | str:
    if key == "position_embedding":
        return Recipe((f"{root}pos_embed",), lambda x: x[0])
    if key == "extra_tokens":
        names = ["cls_token"] * config.class_token + ["reg_token"] * (config.num_registers > 0)
        return Recipe(tuple(root + name for name in names), lambda *parts: torch.cat([x[0] for x in parts]))
    if key.startswith("patch_embedding."):
        return f"{root}patch_embed.proj.{key.removeprefix('patch_embedding.')}"
    _, layer, rest = key.split(".", 2)
    module, _, kind = rest.rpartition(".")
    if module in _QKV:
        part = _QKV.index(module)
        return Recipe((f"{root}blocks.{layer}.attn.qkv.{kind}",), lambda x: x.chunk(3)[part])
    name = _LAYER[rest] if rest in _LAYER else f"{_LAYER[module]}.{kind}"
    return f"{root}blocks.{layer}.{name}"


def public_tensors(state: Mapping[str, Tensor], towers: Mapping[str, VisionTransformerConfig]) -> dict[str, Tensor]:
    """Inverse of `recipe`: all parameters of a policy under their public names. What the layout has no place for (the
    learned deviation) is left out, and `unused_tensors` are added, so that public readers miss nothing."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "std_logit" or ".inputs." in f".{key}":
            continue
        found = recipe(key, towers)
        if isinstance(found, str):
            tensors[found] = value
        elif key.endswith("position_embedding"):
            tensors[found.sources[0]] = value[None]
        elif key.endswith("extra_tokens"):
            sizes = [1] * (len(found.sources) - 1)
            parts = value[None].split([*sizes, value.shape[0] - sum(sizes)], dim=1)
            tensors |= dict(zip(found.sources, parts, strict=True))
        elif "q_proj" in key:
            tensors[found.sources[0]] = torch.cat([state[key.replace("q_proj", f"{x}_proj")] for x in "qkv"])
    for tower, config in towers.items():
        tensors |= unused_tensors(f"vision_backbone.{tower}.", config, tensors)
    return tensors


def unused_tensors(root: str, config: VisionTransformerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for what the layout ships and no feature depends on: the last block, the last norm, SigLIP's pooling."""
    first, last = f"{root}blocks.0.", f"{root}blocks.{config.depth - 1}."
    zeros = {last + k.removeprefix(first): torch.zeros_like(v) for k, v in tensors.items() if k.startswith(first)}
    like, width = tensors[f"{root}patch_embed.proj.bias"], config.width
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (width,), "norm.bias": (width,)}
    if not config.class_token:
        shapes |= {
            "attn_pool.latent": (1, 1, width),
            "attn_pool.norm.weight": (width,),
            "attn_pool.norm.bias": (width,),
        }
        for name, rows, columns in (
            ("q", width, width),
            ("kv", 2 * width, width),
            ("proj", width, width),
            ("mlp.fc1", config.mlp_width, width),
            ("mlp.fc2", width, config.mlp_width),
        ):
            shapes |= {f"attn_pool.{name}.weight": (rows, columns), f"attn_pool.{name}.bias": (rows,)}
    return zeros | {root + name: like.new_zeros(shape) for name, shape in shapes.items()}


def unused_names(towers: Mapping[str, VisionTransformerConfig]) -> tuple[str, ...]:
    """Regular expressions of what `unused_tensors` writes, and of a table that old Llama files carry."""
    patterns = [rf"vision_backbone\.{t}\.(blocks\.{c.depth - 1}|norm|attn_pool)\..*" for t, c in towers.items()]
    return (*patterns, r".*\.rotary_emb\.inv_freq")


# ----------------------------------------------------------------------------------------------- beside the shards
@dataclass(frozen=True)
class LowRank:
    """An update `scale * up @ down` of one matrix (Hu et al. 2022): `lora_B` and `lora_A` of peft."""

    down: Tensor
    up: Tensor
    scale: float


class OpenVLASource:
    """All tensors of a checkpoint, wherever they lie, under the names of the shards, `.pt` heads after their component.
    Updates are added in float32 when a matrix is read; the sum has the precision of the matrix, as if merged."""

    def __init__(
        self, path: Path, shards: ReadsTensors, own: Mapping[str, Tensor], updates: Mapping[str, LowRank]
    ) -> None:
        self.path, self._shards, self._own, self._updates = path, shards, dict(own), dict(updates)
        replaced = any(key.startswith("vision_backbone.") for key in own)
        kept = [k for k in shards.keys() if not (replaced and k.startswith("vision_backbone."))]  # noqa: SIM118
        self._keys = [*kept, *own]
        self._check_updates()

    def keys(self) -> list[str]:
        return self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._own[key].shape) if key in self._own else self._shards.shape(key)

    def view(self, key: str) -> Tensor:
        value = self._own[key] if key in self._own else self._shards.view(key)
        update = self._updates.get(key)
        if update is None:
            return value
        return (value.float() + update.scale * (update.up.float() @ update.down.float())).to(value.dtype)

    def _check_updates(self) -> None:
        present = set(self._keys)
        problems = [f"{key}: no such matrix" for key in self._updates if key not in present]
        problems += [
            f"{key}: the matrix is {self.shape(key)}, the update {(len(u.up), u.down.shape[1])} of rank {len(u.down)}"
            for key, u in self._updates.items()
            if key in present and self.shape(key) != (len(u.up), u.down.shape[1])
        ]
        if problems:
            shown = "\n  ".join(problems[:20])
            raise PolicyCheckpointError(f"the adapter in {self.path} is not of this model:\n  {shown}")


def read_source(folder: Path, base: Path | None, step: str) -> OpenVLASource:
    """Of the merged model in `folder`, or else of `base` with the adapter in `folder`. `step`: of the `.pt` files,
    where there are more. Raises PolicyCheckpointError."""
    merged = any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))
    adapter = folder / ADAPTER
    own: dict[str, Tensor] = {}
    for component in ("action_head", "proprio_projector"):
        own |= {f"{component}.{key}": value for key, value in read_component(folder, component, step).items()}
    vision = read_component(folder, "vision_backbone", step)
    scale = read_adapter_scale(adapter) if adapter.is_dir() and (vision or not merged) else None
    towers, updates = split_film(vision, scale)
    if merged or not adapter.is_dir():
        return OpenVLASource(folder, TensorSource.of_folder(folder), own | towers, updates)
    if base is None:
        raise PolicyCheckpointError(
            f"{folder} holds an adapter without its model ({base_name(folder)}); bring the folder of that model (base=)"
        )
    updates |= read_adapter(adapter, scale, skip_vision=bool(vision))
    return OpenVLASource(folder, TensorSource.of_folder(base), own | towers, updates)


def read_component(folder: Path, component: str, step: str) -> dict[str, Tensor]:
    """`<component>--<step>_checkpoint.pt` without DistributedDataParallel's prefix; nothing where there is none. Raises
    PolicyCheckpointError for several, and for a file that is cut short or holds more than tensors: none is executed."""
    files = sorted(folder.glob(f"{component}--{step or '*'}_checkpoint.pt"))
    if not files:
        return {}
    if len(files) > 1:
        raise PolicyCheckpointError(f"{folder} has {[f.name for f in files]}; choose one of their steps (step=)")
    try:
        values = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise PolicyCheckpointError(
            f"{files[0]} is cut short, or holds something else than tensors, which is not loaded: {error}"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise PolicyCheckpointError(f"{files[0]} is no dictionary of tensors")
    return {str(key).removeprefix("module."): value for key, value in values.items()}


def split_film(vision: Mapping[str, Tensor], scale: float | None) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
    """Towers and updates from the `.pt` file of a FiLM policy. `scale`: that of the adapter's config; without one it is
    that of the public code, min(rank, 16) / rank."""
    plain: dict[str, Tensor] = {}
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in vision.items():
        name = re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", key).replace(".base_layer.", ".")
        found = re.fullmatch(r"(.+)\.lora_([AB])\.(?:default\.)?weight", name)
        if found:
            factors.setdefault(f"{found[1]}.weight", {})[found[2]] = value
        else:
            plain[name] = value
    return plain, _low_rank(factors, scale)


def read_adapter(folder: Path, scale: float | None, *, skip_vision: bool) -> dict[str, LowRank]:
    """`adapter_model.safetensors` of peft. `skip_vision`: those of the towers lie elsewhere."""
    source = TensorSource.of_folder(folder, "adapter_model")
    factors: dict[str, dict[str, Tensor]] = {}
    for key in source.keys():  # noqa: SIM118
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if not found:
            raise PolicyCheckpointError(f"{folder}: {key} is no factor of a LoRA update")
        if not (skip_vision and found[1].startswith("vision_backbone.")):
            factors.setdefault(f"{found[1]}.weight", {})[found[2]] = source.view(key)
    return _low_rank(factors, scale)


def read_adapter_scale(folder: Path) -> float:
    """alpha / rank of `adapter_config.json`. Raises PolicyCheckpointError for adapters that are not plain LoRA."""
    config = read_json(folder / "adapter_config.json")
    expected = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}}
    other = {key: config[key] for key, plain in expected.items() if config.get(key, plain) not in (plain, None)}
    if config.get("peft_type", "LORA") != "LORA" or config.get("modules_to_save") or other:
        raise PolicyCheckpointError(
            f"{folder}: only plain LoRA is read, this has {other or config}; merge it with peft"
        )
    rank, alpha = float(config["r"]), float(config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def base_name(folder: Path) -> str:
    """The model that an adapter says it belongs to, for a message."""
    return str(read_json(folder / ADAPTER / "adapter_config.json").get("base_model_name_or_path", "not named"))


def _low_rank(factors: Mapping[str, Mapping[str, Tensor]], scale: float | None) -> dict[str, LowRank]:
    incomplete = [name for name, parts in factors.items() if set(parts) != {"A", "B"}]
    if incomplete:
        raise PolicyCheckpointError(f"LoRA updates with one factor alone: {incomplete[:5]}")
    return {
        name: LowRank(p["A"], p["B"], min(len(p["A"]), 16) / len(p["A"]) if scale is None else scale)
        for name, p in factors.items()
    }


def film_state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Towers with FiLM as the `.pt` file names them."""
    wrapped: dict[str, Any] = {}
    for key, value in tensors.items():
        own = re.fullmatch(r".+\.blocks\.\d+\.(scale|shift)\.(weight|bias)", key)
        wrapped[key if own else re.sub(r"(\.blocks\.\d+)\.", r"\1.block.", key)] = value
    return wrapped


__all__ = [
    "ADAPTER",
    "TOWERS",
    "LowRank",
    "OpenVLASource",
    "base_name",
    "film_state",
    "public_tensors",
    "read_source",
    "recipe",
    "unused_names",
]
