"""A complete flow VLA from the parts that every public layout has: sizes, tensors, statistics, a tokenizer's file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vla_rl.data.normalization import Normalizer
from vla_rl.policies.adaptation import compute_in_own_precision, plain_state_dict
from vla_rl.policies.blocks.images import Padding
from vla_rl.policies.blocks.tokenizer import Tokenizer
from vla_rl.policies.blocks.vla_inputs import PromptConfig
from vla_rl.policies.checkpoints.native import PolicyCheckpointError
from vla_rl.policies.checkpoints.options import ReadOptions
from vla_rl.policies.checkpoints.orbax import OrbaxSource
from vla_rl.policies.checkpoints.sizes import Shape, gemma_sizes, smollm_sizes, vision_sizes
from vla_rl.policies.checkpoints.tensors import Recipe, TensorSource, load_into, on_meta
from vla_rl.policies.pi0 import Pi0, Pi0Config
from vla_rl.policies.smolvla import SmolVLA, SmolVLAConfig

FlowVLA = Pi0 | SmolVLA
Depth = Callable[[str], int]

PALIGEMMA_BOS = 2


def pi0_config(
    shape: Shape,
    depth: Depth,
    backbone: dict[str, Any],
    where: Path,
    *,
    adaptive: bool,
    cameras: tuple[str, ...],
    num_image_slots: int,
    action_horizon: int,
    num_steps: int,
    normalizers: tuple[Normalizer, Normalizer],
    tokenizer: Tokenizer,
    prompt: PromptConfig,
    image_padding: Padding,
    loss_on_padding: bool,
) -> Pi0Config:
    """Sizes from shapes (`shape`, `depth`: of our keys), the rest as given. Raises PolicyCheckpointError."""
    try:
        return Pi0Config(
            state_dim=normalizers[0].dim,
            action_dim=normalizers[1].dim,
            cameras=cameras,
            num_image_slots=num_image_slots,
            action_horizon=action_horizon,
            max_state_dim=max_state_dim(shape, adaptive=adaptive),
            max_action_dim=shape("action_out_proj.weight")[0],
            num_steps=num_steps,
            vision=vision_sizes(shape, depth("vision.layers."), backbone, where),
            language=gemma_sizes(shape, "language_model", depth("language_model.layers."), vocab=True),
            expert=gemma_sizes(shape, "expert", depth("expert.layers."), vocab=False),
            adaptive=adaptive,
            prompt=prompt,
            tokenizer=tokenizer.config,
            image_padding=image_padding,
            loss_on_padding=loss_on_padding,
        )
    except ValueError as error:
        raise PolicyCheckpointError(f"{where}: {error}") from error


def smolvla_config(
    shape: Shape,
    depth: Depth,
    backbone: dict[str, Any],
    where: Path,
    *,
    cross_attention_every: int,
    cameras: tuple[str, ...],
    action_horizon: int,
    num_steps: int,
    normalizers: tuple[Normalizer, Normalizer],
    tokenizer: Tokenizer,
) -> SmolVLAConfig:
    """As `pi0_config`."""
    try:
        vision = vision_sizes(shape, depth("vision.layers."), backbone, where)
        language, expert = (depth(f"{tower}.layers.") for tower in ("language_model", "expert"))
        return SmolVLAConfig(
            state_dim=normalizers[0].dim,
            action_dim=normalizers[1].dim,
            cameras=cameras,
            action_horizon=action_horizon,
            max_state_dim=shape("state_proj.weight")[1],
            max_action_dim=shape("action_out_proj.weight")[0],
            num_steps=num_steps,
            vision=vision,
            pixel_shuffle=round((shape("connector.weight")[1] / vision.width) ** 0.5),
            language=smollm_sizes(shape, "language_model", language, backbone, where, vocab=True),
            expert=smollm_sizes(
                shape, "expert", expert, backbone, where, vocab=False, cross_every=cross_attention_every
            ),
            tokenizer=tokenizer.config,
        )
    except ValueError as error:
        raise PolicyCheckpointError(f"{where}: {error}") from error


def max_state_dim(shape: Shape, *, adaptive: bool) -> int:
    """Width that states are padded to. pi0.5 projects no state; its states are padded like actions, if at all."""
    return shape("action_out_proj.weight")[0] if adaptive else shape("state_proj.weight")[1]


@dataclass(frozen=True)
class Plan:
    """All that is known of a checkpoint before its tensors are read. `recipe`: of one of our keys; `unused`: as
    `load_into` has it."""

    config: Pi0Config | SmolVLAConfig
    source: TensorSource | OrbaxSource
    recipe: Callable[[str], Recipe | str]
    unused: tuple[str, ...]
    tokenizer: Tokenizer
    normalizers: tuple[Normalizer, Normalizer]


def assemble(plan: Plan, options: ReadOptions) -> FlowVLA:
    """The policy in evaluation mode. Raises PolicyCheckpointError as `load_into` does."""
    config = plan.config
    policy: FlowVLA = on_meta(lambda: Pi0(config) if isinstance(config, Pi0Config) else SmolVLA(config))
    given = {"inputs.tokenizer.file": plan.tokenizer.file}
    for name, normalizer in zip(("state", "action"), plan.normalizers, strict=True):
        given[f"inputs.{name}_normalizer.offset"] = normalizer.offset
        given[f"inputs.{name}_normalizer.scale"] = normalizer.scale
    recipes = {key: plan.recipe(key) for key in policy.state_dict() if key not in given}
    load_into(policy, plan.source, recipes, given=given, unused=plan.unused, dtype=options.dtype, device=options.device)
    policy.inputs.state_normalizer.kind = plan.normalizers[0].kind
    policy.inputs.action_normalizer.kind = plan.normalizers[1].kind
    if any(p.dtype != torch.float32 for p in policy.parameters()):
        compute_in_own_precision(policy)
    return policy.eval()


def network_state(policy: FlowVLA) -> dict[str, Any]:
    """Parameters alone, without normalisers and tokenizer, as in public files of weights; adapters are merged."""
    return {key: value for key, value in plain_state_dict(policy).items() if not key.startswith("inputs.")}


Family = Literal["pi0", "pi05", "smolvla"]


def family_of_policy(policy: Any) -> Family:
    """Raises PolicyCheckpointError for a policy that none of these layouts can hold."""
    if not isinstance(policy, FlowVLA):
        raise PolicyCheckpointError(f"{type(policy).__name__} has no public layout; pi0, pi0.5 and SmolVLA have")
    return family_of_config(policy.config)


def family_of_config(config: Pi0Config | SmolVLAConfig) -> Family:
    if isinstance(config, Pi0Config):
        return "pi05" if config.adaptive else "pi0"
    return "smolvla"


def required(config: Mapping[str, Any], name: str, where: Path) -> Any:
    """Raises PolicyCheckpointError where config.json lacks `name`."""
    if name not in config:
        raise PolicyCheckpointError(f"{where} has no {name!r}; it has {sorted(config)}")
    return config[name]


__all__ = [
    "PALIGEMMA_BOS",
    "Family",
    "FlowVLA",
    "Plan",
    "assemble",
    "family_of_config",
    "family_of_policy",
    "max_state_dim",
    "network_state",
    "pi0_config",
    "required",
    "smolvla_config",
]
