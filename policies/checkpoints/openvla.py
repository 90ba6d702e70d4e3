"""OpenVLA's and OpenVLA-OFT's folders, in the layout of Hugging Face: sharded safetensors, config.json, statistics.

Sizes come from the shapes. What no file of a published folder says is in `OpenVLAOptions`: whether action tokens are
decoded one by one or in parallel, the length of a chunk, the convention of the gripper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vla_rl.data.normalization import Normalizer
from vla_rl.policies.blocks.action_tokens import NUM_BINS
from vla_rl.policies.blocks.decoder import DecoderConfig
from vla_rl.policies.blocks.gripper import GripperConfig
from vla_rl.policies.blocks.images import Padding
from vla_rl.policies.blocks.prismatic import PrismaticConfig, PrismaticInputsConfig
from vla_rl.policies.blocks.vision_transformer import VisionTransformerConfig
from vla_rl.policies.blocks.vla_inputs import PromptConfig
from vla_rl.policies.checkpoints.native import PolicyCheckpointError
from vla_rl.policies.checkpoints.openvla_tensors import (
    ADAPTER,
    TOWERS,
    OpenVLASource,
    base_name,
    film_state,
    public_tensors,
    read_source,
    recipe,
    unused_names,
)
from vla_rl.policies.checkpoints.options import ReadOptions, read_tokenizer, write_tokenizer
from vla_rl.policies.checkpoints.tensors import load_into, on_meta, read_json, write_tensors
from vla_rl.policies.openvla import OpenVLA, OpenVLAConfig
from vla_rl.policies.openvla_oft import (
    OpenVLAOFT,
    OpenVLAOFTConfig,
    OpenVLAOFTTokens,
    OpenVLAOFTTokensConfig,
    ParallelConfig,
    initial_std_logit,
)

OpenVLAFamily = OpenVLA | OpenVLAOFT | OpenVLAOFTTokens
_EPS = 1e-8
_PUBLISHED_TOWERS = [[24, 16], [27, 16]]  # layers and heads of DINOv2 ViT-L/14 and SigLIP So400m/14
_LLAMA_BOS, _LLAMA_END, _LLAMA_STOP = 1, 29871, 2
_STATISTICS = "dataset_statistics.json"


@dataclass(frozen=True)
class OpenVLAOptions:
    """What a reader must be told, because published folders do not say it.

    `unnorm_key`: whose statistics, where there are those of several datasets. `decoding`: of action tokens; "parallel"
    is OFT without a regression head. "" and `action_horizon` 0: as config.json says, which our writer adds to it, or
    else "autoregressive", and chunks of 1 (autoregressive) or 8 (LIBERO; ALOHA has 25, Bridge 5).
    `bounds`: which statistics are -1 and 1; "min_max" for ALOHA. `base`: folder of the model that an adapter is for.
    `step`: of the `.pt` files, where there are more. `center_crop` 0: 0.9 for OFT, 1 for OpenVLA. `gripper`: see there;
    LIBERO is `GripperConfig("closed_is_one", binary=True)`. `max_tokens`: of a prompt.
    """

    unnorm_key: str = ""
    decoding: Literal["", "autoregressive", "parallel"] = ""
    action_horizon: int = 0
    bounds: Literal["quantiles", "min_max"] = "quantiles"
    base: Path | None = None
    step: str = ""
    center_crop: float = 0.0
    gripper: GripperConfig = GripperConfig()  # noqa: RUF009
    max_tokens: int = 64


def is_openvla(folder: Path) -> bool:
    """Whether `folder` holds OpenVLA or OpenVLA-OFT, merged or as an adapter."""
    if (folder / ADAPTER / "adapter_config.json").is_file() and (folder / _STATISTICS).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "openvla"


def read_openvla(
    folder: Path, options: ReadOptions | None = None, openvla: OpenVLAOptions | None = None
) -> OpenVLAFamily:
    """The policy in evaluation mode: OpenVLAOFT where there is an `action_head--*_checkpoint.pt`, OpenVLAOFTTokens or
    OpenVLA where there is none.

    `options.cameras`: in the order of the model's pictures, by default ("agent",); published folders do not say how
    many there are (OFT for LIBERO: two, the wrist's last). Raises PolicyCheckpointError for files that are missing, cut
    short or of another model, and FileNotFoundError where no tokenizer is found.
    """
    options, openvla = options or ReadOptions(), openvla or OpenVLAOptions()
    if list(folder.glob("noisy_action_projector--*")):
        raise PolicyCheckpointError(f"{folder} has the diffusion head of OpenVLA-OFT, which is not supported")
    source = read_source(folder, openvla.base, openvla.step)
    home = folder if (folder / "config.json").is_file() or openvla.base is None else openvla.base
    config = read_json(home / "config.json")
    vlm = _sizes(source, config, home)
    tokenizer_home = folder if options.tokenizer or any(folder.glob("tokenizer.*")) else home
    tokenizer = read_tokenizer(
        tokenizer_home,
        options,
        bos=_LLAMA_BOS,
        max_tokens=openvla.max_tokens,
        vocab_size=vlm.decoder.vocab_size,
    )
    entry = _statistics(folder, config, openvla.unnorm_key or options.asset)
    try:
        inputs = _inputs(config, tokenizer.config, openvla, regression=_has(source, "action_head."))
        policy_config = _policy_config(source, config, vlm, inputs, entry, options, openvla)
    except ValueError as error:
        raise PolicyCheckpointError(f"{home}: {error}") from error
    given = {"inputs.tokenizer.file": tokenizer.file}
    normalizers = {
        "state": _normalizer(entry, "proprio", openvla.bounds, policy_config.state_dim)
        if _has(source, "proprio_projector.")
        else Normalizer.identity(policy_config.state_dim),
        "action": _normalizer(entry, "action", openvla.bounds, policy_config.action_dim),
    }
    for name, normalizer in normalizers.items():
        given[f"inputs.{name}_normalizer.offset"] = normalizer.offset
        given[f"inputs.{name}_normalizer.scale"] = normalizer.scale
    policy = _load(policy_config, source, given, options)
    policy.inputs.state_normalizer.kind = normalizers["state"].kind
    policy.inputs.action_normalizer.kind = normalizers["action"].kind
    return policy.eval()


def describe_openvla(folder: Path) -> dict[str, str]:
    """What `folder` holds, for people; no tensor of the networks is read."""
    lines = {"family": "OpenVLA, or OpenVLA-OFT with token heads: no file says which (decoding)"}
    heads = sorted(file.name for file in folder.glob("*--*_checkpoint.pt"))
    if heads:
        lines = {"family": "OpenVLA-OFT", "beside the shards": ", ".join(heads)}
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not any(folder.glob("model.safetensors*")):
        lines["adapter of"] = f"{base_name(folder)}; its folder is needed (base)"
    if config.get("decoding"):
        lines["decoding"] = f"{config['decoding']}, chunks of {config.get('num_action_chunks', 1)}"
    file = folder / _STATISTICS
    found = read_json(file) if file.is_file() else config.get("norm_stats") or {}
    lines["statistics of"] = ", ".join(found) or "none"
    dims = sorted({len(entry.get("action", {}).get("q01", ())) for entry in found.values()})
    return lines | {"action dimensions": ", ".join(map(str, dims))}


def write_openvla(
    policy: OpenVLAFamily, folder: Path, *, unnorm_key: str = "vla_rl", step: int = 0, max_shard_bytes: int = 5 * 2**30
) -> None:
    """Write `policy` as `read_openvla` and the public code read it.

    Not in this layout, and lost: the deviation of OpenVLAOFT and the temperature; the crop, the filter of the resizing
    and the gripper's convention are options of a reader. Towers with FiLM are written without an adapter, which the
    public code expects in them.
    Raises PolicyCheckpointError for the tokenizer of bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(policy.inputs.tokenizer, folder)
    vlm, state = policy.vlm.config, policy.state_dict()
    tensors = public_tensors(state, _towers(vlm))
    for component in ("action_head", "proprio_projector"):
        part = {k.removeprefix(f"{component}."): v for k, v in tensors.items() if k.startswith(f"{component}.")}
        if part:
            _save_pt(part, folder / f"{component}--{step}_checkpoint.pt")
    if vlm.film:
        part = {k: v for k, v in tensors.items() if k.startswith("vision_backbone.")}
        _save_pt(film_state(part), folder / f"vision_backbone--{step}_checkpoint.pt")
    shards = {
        k: v
        for k, v in tensors.items()
        if k.startswith(("language_model.", "projector.")) or (k.startswith("vision_backbone.") and not _is_film(k))
    }
    _write_shards(shards, folder, max_shard_bytes)
    statistics = {unnorm_key: _entry(policy)}
    _write_json(folder / _STATISTICS, statistics)
    _write_json(folder / "config.json", _public_config(policy, statistics))
    _write_json(folder / "preprocessor_config.json", _pixels(vlm))


# ------------------------------------------------------------------------------------------------------------- config
def _sizes(source: OpenVLASource, config: Mapping[str, Any], home: Path) -> PrismaticConfig:
    text = config.get("text_config") or {}
    if text.get("rope_scaling") or config.get("n_action_bins", NUM_BINS) != NUM_BINS:
        raise PolicyCheckpointError(f"{home}: scaled rotary positions and other than {NUM_BINS} bins are not supported")
    pixels = read_json(home / "preprocessor_config.json") if (home / "preprocessor_config.json").is_file() else {}
    means = pixels.get("means", [[0.485, 0.456, 0.406], [0.5] * 3])
    stds = pixels.get("stds", [[0.229, 0.224, 0.225], [0.5] * 3])
    if len(means) != 2 or means[1] != [0.5] * 3 or stds[1] != [0.5] * 3:
        raise PolicyCheckpointError(f"{home}: expected the fused towers DINOv2 and SigLIP, got means {means}")
    layers_heads = config.get("vision_layers_heads", _PUBLISHED_TOWERS)  # our writer names others
    present = set(source.keys())
    needed = [f"vision_backbone.{tower}.pos_embed" for tower in TOWERS] + ["language_model.model.embed_tokens.weight"]
    if any(name not in present for name in needed):
        raise PolicyCheckpointError(f"{source.path} lacks {[n for n in needed if n not in present]}: no fused OpenVLA")
    try:
        towers = [
            _tower(source, present, f"vision_backbone.{tower}.", *sizes)
            for tower, sizes in zip(TOWERS, layers_heads, strict=True)
        ]
        return PrismaticConfig(
            dino=towers[0],
            siglip=towers[1],
            decoder=_llama(source, text),
            num_padding_ids=config.get("pad_to_multiple_of", 64),
            image_mean=(means[0][0], means[0][1], means[0][2]),
            image_std=(stds[0][0], stds[0][1], stds[0][2]),
        )
    except ValueError as error:
        raise PolicyCheckpointError(f"{home}: {error}") from error


def _tower(source: OpenVLASource, present: set[str], root: str, depth: int, num_heads: int) -> VisionTransformerConfig:
    def size(name: str, axis: int) -> int:
        return _size(source, root + name, axis)

    patch = size("patch_embed.proj.weight", 3)
    return VisionTransformerConfig(
        width=size("pos_embed", 2),
        depth=depth,
        mlp_width=size("blocks.0.mlp.fc1.weight", 0),
        num_heads=num_heads,
        image_size=math.isqrt(size("pos_embed", 1)) * patch,
        patch_size=patch,
        activation="gelu",
        num_registers=size("reg_token", 1) if f"{root}reg_token" in present else 0,
        class_token=f"{root}cls_token" in present,
        layer_scale=f"{root}blocks.0.ls1.scale_factor" in present,
        num_unused_layers=1,
        final_norm=False,
        film_width=size("blocks.0.scale.weight", 1) if f"{root}blocks.0.scale.weight" in present else 0,
    )


def _size(source: OpenVLASource, name: str, axis: int) -> int:
    """Raises PolicyCheckpointError where there is no such tensor, or it has fewer dimensions."""
    shape = source.shape(name) if name in source.keys() else ()  # noqa: SIM118
    if axis >= len(shape):
        raise PolicyCheckpointError(
            f"{source.path} has no {name} of {axis + 1} dimensions or more; copy the files again"
        )
    return shape[axis]


def _llama(source: OpenVLASource, text: Mapping[str, Any]) -> DecoderConfig:
    """What text_config leaves out has the default of transformers' LlamaConfig, which published folders rely on."""
    root = "language_model.model."
    vocab_size, width = (_size(source, f"{root}embed_tokens.weight", axis) for axis in (0, 1))
    heads = text.get("num_attention_heads") or 32
    head_dim = text.get("head_dim") or width // heads
    rope = text.get("rope_parameters") or {}
    return DecoderConfig(
        width=width,
        depth=text.get("num_hidden_layers", 32),
        mlp_width=text.get("intermediate_size", 11008),
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        norm_offset=False,
        norm_eps=text.get("rms_norm_eps", 1e-6),
        activation="silu",
        rope_base=float(text.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
    )


def _inputs(
    config: Mapping[str, Any], tokenizer: Any, openvla: OpenVLAOptions, *, regression: bool
) -> PrismaticInputsConfig:
    paddings: dict[str, Padding] = {"resize-naive": "stretch_lanczos", "letterbox": "center"}
    strategy = config.get("image_resize_strategy", "resize-naive")
    if strategy not in paddings:
        raise ValueError(f"image_resize_strategy {strategy!r} is not supported, known are {sorted(paddings)}")
    oft = regression or _decoding(config, openvla) == "parallel"
    return PrismaticInputsConfig(
        tokenizer=tokenizer,
        prompt=PromptConfig("question", clean=False, end=config.get("prompt_end_id", _LLAMA_END)),
        padding=paddings[strategy],
        center_crop=openvla.center_crop or (0.9 if oft else 1.0),
        gripper=openvla.gripper,
    )


def _policy_config(
    source: OpenVLASource,
    config: Mapping[str, Any],
    vlm: PrismaticConfig,
    inputs: PrismaticInputsConfig,
    entry: Mapping[str, Any],
    options: ReadOptions,
    openvla: OpenVLAOptions,
) -> OpenVLAConfig | OpenVLAOFTConfig | OpenVLAOFTTokensConfig:
    regression, proprio = _has(source, "action_head."), _has(source, "proprio_projector.")
    parallel = regression or _decoding(config, openvla) == "parallel"
    horizon = openvla.action_horizon or config.get("num_action_chunks") or (8 if parallel else 1)
    stated = len(entry.get("action", {}).get("q01", ())) or 7
    chunk_dim = _size(source, "action_head.model.fc2.bias", 0) if regression else stated
    state_dim = len(entry.get("proprio", {}).get("q01", ()))
    if proprio:
        state_dim = _size(source, "proprio_projector.fc1.weight", 1)
    if proprio and options.state_dim not in (0, state_dim):
        raise ValueError(f"the policy reads states of {state_dim} dimensions, the environment has {options.state_dim}")
    state_dim, action_dim = options.state_dim or state_dim or 1, options.action_dim or stated
    cameras = options.cameras or ("agent",)
    if config.get("num_images_in_input", len(cameras)) != len(cameras):
        raise ValueError(
            f"the policy takes {config['num_images_in_input']} pictures: name as many cameras, not {cameras}"
        )
    if not parallel:
        if proprio or vlm.film:
            raise ValueError("a proprio projector or FiLM without decoding='parallel': OpenVLA-OFT decodes in parallel")
        return OpenVLAConfig(state_dim, action_dim, cameras, horizon, chunk_dim, vlm=vlm, inputs=inputs)
    body = ParallelConfig(vlm, inputs, proprio, clip_state=True, stop=_LLAMA_STOP)
    kind = OpenVLAOFTConfig if regression else OpenVLAOFTTokensConfig
    return kind(state_dim, action_dim, cameras, horizon, chunk_dim, body=body)


def _decoding(config: Mapping[str, Any], openvla: OpenVLAOptions) -> str:
    return openvla.decoding or config.get("decoding", "autoregressive")


def _has(source: OpenVLASource, start: str) -> bool:
    return any(key.startswith(start) for key in source.keys())  # noqa: SIM118


def _load(
    config: OpenVLAConfig | OpenVLAOFTConfig | OpenVLAOFTTokensConfig,
    source: OpenVLASource,
    given: dict[str, Tensor],
    options: ReadOptions,
) -> OpenVLAFamily:
    policy: OpenVLAFamily
    if isinstance(config, OpenVLAConfig):
        policy = on_meta(lambda: OpenVLA(config))
    else:
        given = {f"body.{key}": value for key, value in given.items()}
        if isinstance(config, OpenVLAOFTConfig):
            policy = on_meta(lambda: OpenVLAOFT(config))
            given["std_logit"] = initial_std_logit(config)
        else:
            policy = on_meta(lambda: OpenVLAOFTTokens(config))
    towers = _towers(policy.vlm.config)
    recipes = {key: recipe(key, towers) for key in policy.state_dict() if key not in given}
    return load_into(
        policy, source, recipes, given=given, unused=unused_names(towers), dtype=options.dtype, device=options.device
    )


def _towers(vlm: PrismaticConfig) -> dict[str, VisionTransformerConfig]:
    return {"featurizer": vlm.dino, "fused_featurizer": vlm.siglip}


# --------------------------------------------------------------------------------------------------------- statistics
def _statistics(folder: Path, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """One dataset's entry."""
    file = folder / _STATISTICS
    found = read_json(file) if file.is_file() else config.get("norm_stats") or {}
    if not found:
        raise PolicyCheckpointError(f"{folder} has no {_STATISTICS}, which turns the model's actions into an arm's")
    if not key and len(found) == 1:
        return next(iter(found.values()))
    if key not in found:
        chosen = f"unnorm_key {key!r} is not among them" if key else "choose one of them with unnorm_key="
        raise PolicyCheckpointError(f"{folder} has the statistics of {sorted(found)}; {chosen}")
    return found[key]


def _normalizer(entry: Mapping[str, Any], name: str, bounds: str, dim: int) -> Normalizer:
    """`0.5 (a + 1) (high - low + 1e-8) + low` backwards; dimensions that `mask` leaves out are as they are."""
    low_name, high_name = ("q01", "q99") if bounds == "quantiles" else ("min", "max")
    stats = entry.get(name) or {}
    if low_name not in stats or high_name not in stats:
        raise PolicyCheckpointError(
            f"the statistics of {name} have {sorted(stats)}, and not {low_name} and {high_name}"
        )
    low, high = (torch.tensor(stats[n], dtype=torch.float64) for n in (low_name, high_name))
    mask = stats.get("mask") or [True] * len(low)
    if not len(low) == len(high) == len(mask) == dim:
        raise PolicyCheckpointError(
            f"the statistics of {name} have {len(low)} dimensions, the environment {dim}: another robot; "
            "fine-tune it there first: vla-rl sft RECIPE --policy FOLDER"
        )
    try:
        normalizer = Normalizer.bounds(low, high, eps=_EPS, min_range=0.0, kind=bounds)
    except ValueError as error:
        raise PolicyCheckpointError(f"statistics of {name}: {error}") from error
    return normalizer.keep([i for i, use in enumerate(mask) if not use])


def _entry(policy: OpenVLAFamily) -> dict[str, Any]:
    entry: dict[str, Any] = {"num_transitions": 0, "num_trajectories": 0}
    inputs = policy.inputs
    for name, normalizer in (("action", inputs.action_normalizer), ("proprio", inputs.state_normalizer)):
        offset, scale = (x.double().cpu() for x in (normalizer.offset, normalizer.scale))
        mask = (offset != 0.0) | (scale != 1.0)
        low = offset - scale
        high = low + 2.0 * scale - _EPS
        stats = {"mean": offset, "std": scale, "min": low, "max": high, "q01": low, "q99": high, "mask": mask}
        entry[name] = {key: value.tolist() for key, value in stats.items()}
    return entry


# --------------------------------------------------------------------------------------------------------------- files
def _public_config(policy: OpenVLAFamily, statistics: Mapping[str, Any]) -> dict[str, Any]:
    vlm, decoder = policy.vlm.config, policy.vlm.config.decoder
    autoregressive = isinstance(policy, OpenVLA)
    size = vlm.dino.image_size
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "use_fused_vision_backbone": True,
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "timm_override_act_layers": [None, None],
        "image_sizes": [size, size],
        "image_resize_strategy": "letterbox" if policy.inputs.padding == "center" else "resize-naive",
        "n_action_bins": NUM_BINS,
        "pad_to_multiple_of": vlm.num_padding_ids,
        "norm_stats": dict(statistics),
        "text_config": {
            "model_type": "llama",
            "vocab_size": decoder.vocab_size,
            "hidden_size": decoder.width,
            "num_hidden_layers": decoder.depth,
            "intermediate_size": decoder.mlp_width,
            "num_attention_heads": decoder.num_heads,
            "num_key_value_heads": decoder.num_kv_heads,
            "head_dim": decoder.head_dim,
            "rms_norm_eps": decoder.norm_eps,
            "rope_theta": decoder.rope_base,
        },
        "vision_layers_heads": [[tower.depth, tower.num_heads] for tower in (vlm.dino, vlm.siglip)],
        "prompt_end_id": policy.inputs.prompt.end,
        "num_action_chunks": policy.action_horizon,
        "num_images_in_input": len(policy.config.cameras),
        "decoding": "autoregressive" if autoregressive else "parallel",
    }


def _pixels(vlm: PrismaticConfig) -> dict[str, Any]:
    size = vlm.dino.image_size
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "use_fused_vision_backbone": True,
        "input_sizes": [[3, size, size]] * 2,
        "means": [list(vlm.image_mean), [0.5] * 3],
        "stds": [list(vlm.image_std), [0.5] * 3],
    }


def _write_shards(tensors: Mapping[str, Tensor], folder: Path, max_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, value in tensors.items():
        size = value.numel() * value.element_size()
        if filled and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = value
        filled += size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(x.numel() * x.element_size() for x in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _is_film(name: str) -> bool:
    return ".scale.weight" in name or ".scale.bias" in name or ".shift." in name


def _save_pt(tensors: Mapping[str, Tensor], path: Path) -> None:
    torch.save({name: value.detach().cpu().clone() for name, value in tensors.items()}, path)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


__all__ = ["OpenVLAFamily", "OpenVLAOptions", "describe_openvla", "is_openvla", "read_openvla", "write_openvla"]
