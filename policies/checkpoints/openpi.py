"""openpi's PyTorch checkpoints of pi0 and pi0.5: model.safetensors, config.json, assets/<asset>/norm_stats.json.

config.json does not say which of the two it is: the tensors do. No file holds the tokenizer: bring PaliGemma's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_rl.data.normalization import Normalizer
from vla_rl.policies.blocks.decoder import DecoderConfig
from vla_rl.policies.blocks.tokenizer import Tokenizer
from vla_rl.policies.blocks.vla_inputs import PromptConfig
from vla_rl.policies.checkpoints.assemble import (
    PALIGEMMA_BOS,
    Depth,
    Plan,
    family_of_policy,
    max_state_dim,
    network_state,
    pi0_config,
    required,
)
from vla_rl.policies.checkpoints.names import PI0_NAMES, UNUSED, PublicNames, theirs
from vla_rl.policies.checkpoints.native import PolicyCheckpointError
from vla_rl.policies.checkpoints.options import ReadOptions, read_tokenizer, write_tokenizer
from vla_rl.policies.checkpoints.sizes import Shape, backbone_config, write_backbone_config
from vla_rl.policies.checkpoints.stats import openpi_normalizer, openpi_stats
from vla_rl.policies.checkpoints.tensors import TensorSource, read_json, write_tensors
from vla_rl.policies.pi0 import Pi0, Pi0Config, gemma

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
PROMPT_TOKENS = {"pi0": 48, "pi05": 200}


def plan_openpi(folder: Path, options: ReadOptions) -> Plan:
    """Raises PolicyCheckpointError for files that are missing, corrupt or of another model, FileNotFoundError where no
    tokenizer is found."""
    names = PublicNames(TensorSource.of_folder(folder))
    config = read_json(folder / "config.json")
    config, tokenizer, normalizers = read_parts(
        folder,
        options,
        names.shape,
        names.depth,
        adaptive=names.family == "pi05",
        action_horizon=options.action_horizon or required(config, "action_horizon", folder / "config.json"),
        backbone=backbone_config(folder),
    )
    return Plan(config, names.source, names, UNUSED, tokenizer, normalizers)


def save_openpi(policy: Pi0, folder: Path, *, asset: str = "vla_rl") -> None:
    """Write `policy` as `plan_openpi`, and openpi, read it. Raises PolicyCheckpointError for another class and for the
    tokenizer of bytes."""
    if family_of_policy(policy) == "smolvla":
        raise PolicyCheckpointError("openpi has no SmolVLA; convert to 'lerobot'")
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(policy.inputs.tokenizer, folder)
    config = policy.config
    write_tensors(folder / "model.safetensors", public_tensors(policy))
    dtype = next(policy.expert.layers.parameters()).dtype
    values = {
        "action_dim": config.max_action_dim,
        "action_horizon": config.action_horizon,
        "paligemma_variant": variant_of(config.language),
        "action_expert_variant": variant_of(config.expert),
        "precision": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    write_backbone_config(folder, "paligemma", config.vision, config.language)
    write_norm_stats(policy, folder / "assets" / asset)


def public_tensors(policy: Pi0) -> dict[str, Tensor]:
    """Under openpi's names. The token embedding lies under `paligemma.lm_head`, where tied tensors are written once.
    The expert's output layer, which no action needs, is zeros: openpi and LeRobot refuse a file without it."""
    names = {"language_model.embed_tokens.": "paligemma_with_expert.paligemma.lm_head.", **PI0_NAMES}
    tensors = {theirs(key, names): value for key, value in network_state(policy).items()}
    embedding = policy.language_model.embed_tokens.weight
    head = torch.zeros(len(embedding), policy.config.expert.width, dtype=embedding.dtype)
    return tensors | {"paligemma_with_expert.gemma_expert.lm_head.weight": head}


# ------------------------------------------------------------------------------- what the JAX layout has as well
def read_parts(
    folder: Path,
    options: ReadOptions,
    shape: Shape,
    depth: Depth,
    *,
    adaptive: bool,
    action_horizon: int,
    backbone: dict[str, Any],
) -> tuple[Pi0Config, Tokenizer, tuple[Normalizer, Normalizer]]:
    """What is the same whichever file the tensors lie in."""
    discrete_state = adaptive and options.discrete_state is not False
    vocab_size = shape("language_model.embed_tokens.weight")[0]
    tokens = PROMPT_TOKENS["pi05" if adaptive else "pi0"]
    tokenizer = read_tokenizer(folder, options, bos=PALIGEMMA_BOS, max_tokens=tokens, vocab_size=vocab_size)
    widths = (max_state_dim(shape, adaptive=adaptive), shape("action_out_proj.weight")[0])
    normalizers = read_norm_stats(folder, options, widths, quantiles=adaptive)
    config = pi0_config(
        shape,
        depth,
        backbone,
        folder,
        adaptive=adaptive,
        cameras=options.cameras or CAMERAS,
        num_image_slots=len(CAMERAS),
        action_horizon=action_horizon,
        num_steps=10,
        normalizers=normalizers,
        tokenizer=tokenizer,
        prompt=PromptConfig("state" if discrete_state else "line", state_width=options.state_width or 0),
        image_padding="center",
        loss_on_padding=True,
    )
    return config, tokenizer, normalizers


def norm_stats_files(folder: Path) -> list[Path]:
    return sorted((folder / "assets").glob("**/norm_stats.json"))


def read_norm_stats(
    folder: Path, options: ReadOptions, widths: tuple[int, int], *, quantiles: bool
) -> tuple[Normalizer, Normalizer]:
    """Of the state and of the action. Without assets (a bare base model) they are the identity on the padded widths.

    Raises PolicyCheckpointError where there are several and `options.asset` does not choose.
    """
    files = norm_stats_files(folder)
    if not files:
        dims = (options.state_dim or widths[0], options.action_dim or widths[1])
        return Normalizer.identity(dims[0]), Normalizer.identity(dims[1])
    assets = [str(file.parent.relative_to(folder / "assets")) for file in files]
    if len(files) > 1 and options.asset not in assets:
        raise PolicyCheckpointError(
            f"{folder}/assets has the statistics of {assets}; choose one of them with asset= (--asset)"
        )
    file = files[assets.index(options.asset)] if options.asset in assets else files[0]
    stats = read_json(file).get("norm_stats", {})
    state, action = (
        openpi_normalizer(required(stats, name, file), quantiles=quantiles, dim=dim, where=f"{file}: {name}")
        for name, dim in (("state", options.state_dim), ("actions", options.action_dim))
    )
    return state, action


def write_norm_stats(policy: Pi0, folder: Path) -> None:
    """norm_stats.json in `folder`."""
    inputs, quantiles = policy.inputs, policy.config.adaptive
    stats = {
        "state": openpi_stats(inputs.state_normalizer.normalizer, quantiles=quantiles),
        "actions": openpi_stats(inputs.action_normalizer.normalizer, quantiles=quantiles),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}, indent=2) + "\n", encoding="utf-8")


def variant_of(config: DecoderConfig) -> str:
    """openpi's name of a Gemma, "custom" for a size that it has no name for."""
    for name in ("gemma_2b", "gemma_300m", "dummy"):
        same = gemma(name)
        fields = ("width", "depth", "mlp_width", "num_heads", "num_kv_heads", "head_dim")
        if all(getattr(same, field) == getattr(config, field) for field in fields):
            return name
    return "custom"


__all__ = ["CAMERAS", "plan_openpi", "public_tensors", "read_norm_stats", "save_openpi"]
