"""LeRobot's checkpoints of pi0, pi0.5 and SmolVLA.

config.json, model.safetensors (names begin with "model."), and the pipelines policy_preprocessor.json and
policy_postprocessor.json, whose normalisers keep statistics in safetensors files of their own. Before version 0.4 the
statistics lay among the weights. No file holds the tokenizer: bring PaliGemma's, or SmolVLM2's for SmolVLA.

Prompts differ from openpi's: the sentence of pi0 and SmolVLA is not cleaned, and LeRobot 0.4 padded the state of pi0.5
to 32 numbers before it wrote them into the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vla_rl.data.normalization import Normalizer
from vla_rl.policies.blocks.tokenizer import Tokenizer
from vla_rl.policies.blocks.vla_inputs import PromptConfig
from vla_rl.policies.checkpoints.assemble import (
    PALIGEMMA_BOS,
    FlowVLA,
    Plan,
    family_of_policy,
    network_state,
    pi0_config,
    required,
    smolvla_config,
)
from vla_rl.policies.checkpoints.names import SMOLVLA_NAMES, UNUSED, PublicNames, theirs
from vla_rl.policies.checkpoints.native import PolicyCheckpointError
from vla_rl.policies.checkpoints.openpi import public_tensors, variant_of
from vla_rl.policies.checkpoints.options import ReadOptions, read_tokenizer, write_tokenizer
from vla_rl.policies.checkpoints.sizes import backbone_config, write_backbone_config
from vla_rl.policies.checkpoints.stats import LEROBOT_EPS, lerobot_normalizer, lerobot_stats
from vla_rl.policies.checkpoints.tensors import TensorSource, read_json, write_tensors
from vla_rl.policies.pi0 import Pi0, Pi0Config
from vla_rl.policies.smolvla import SmolVLAConfig

FAMILIES = ("pi0", "pi05", "smolvla")
PREFIX, PICTURES = "model.", "observation.images."
STATE, ACTION = "observation.state", "action"
_EARLY = {STATE: "normalize_inputs.buffer_observation_state.", ACTION: "unnormalize_outputs.buffer_action."}
_UNUSED = (
    *(PREFIX.replace(".", r"\.") + pattern for pattern in UNUSED),
    r"(normalize_inputs|normalize_targets|unnormalize_outputs)\..*",
)
# Settings that change what the policy computes and that ours cannot follow, with the value that means "off".
_OFF: dict[str, Any] = {
    "adapt_to_pi_aloha": False,
    "use_delta_joint_actions_aloha": False,
    "use_relative_actions": False,
    "use_visual_memory": False,
    "use_proprioceptive_memory": False,
    "add_image_special_tokens": False,
    "attention_mode": "cross_attn",
    "n_obs_steps": 1,
    "min_period": 4e-3,
    "max_period": 4.0,
}


def plan_lerobot(folder: Path, options: ReadOptions) -> Plan:
    """Raises PolicyCheckpointError for files that are missing, corrupt or of another model, or a setting that this
    project does not have; FileNotFoundError where no tokenizer is found."""
    where = folder / "config.json"
    config = read_json(where)
    weights = TensorSource.of_folder(folder)
    names = PublicNames(weights, PREFIX)
    family = required(config, "type", where)
    if family != names.family:
        raise PolicyCheckpointError(
            f"{where} says {family!r}, but the tensors are those of {names.family or 'another'}"
        )
    _check_settings(config, where)
    features = Features.of(config, where)
    normalizers = read_normalizers(folder, config, features, weights)
    vocab_size = names.shape("language_model.embed_tokens.weight")[0]
    tokenizer = read_tokenizer(
        folder,
        options,
        bos=-1 if family == "smolvla" else PALIGEMMA_BOS,
        max_tokens=config.get("tokenizer_max_length", 200 if family == "pi05" else 48),
        vocab_size=vocab_size,
    )
    make = _smolvla if family == "smolvla" else _pi0
    policy_config = make(folder, config, names, features, normalizers, tokenizer, options)
    return Plan(policy_config, weights, names, _UNUSED, tokenizer, normalizers)


def save_lerobot(policy: FlowVLA, folder: Path) -> None:
    """Write `policy` as `plan_lerobot` reads it, in the layout of version 0.4 and later.

    What LeRobot has no setting for is its own there: how a sentence is cleaned, where pictures are padded, which
    dimensions bear loss. Raises PolicyCheckpointError for another class and for the tokenizer of bytes.
    """
    family = family_of_policy(policy)
    if family == "pi05" and policy.config.prompt.kind != "state":
        raise PolicyCheckpointError("LeRobot's pi0.5 always reads the state in its prompt, this one does not")
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(policy.inputs.tokenizer, folder)
    if isinstance(policy, Pi0):
        tensors = public_tensors(policy)
    else:
        tensors = {theirs(key, SMOLVLA_NAMES): value for key, value in network_state(policy).items()}
    write_tensors(folder / "model.safetensors", {PREFIX + key: value for key, value in tensors.items()})
    written = {
        STATE: lerobot_stats(policy.inputs.state_normalizer.normalizer),
        ACTION: lerobot_stats(policy.inputs.action_normalizer.normalizer),
    }
    mapping = {"VISUAL": "IDENTITY", "STATE": written[STATE][0], "ACTION": written[ACTION][0]}
    _write_json(folder / "config.json", _config_of(policy, family, mapping))
    write_backbone_config(
        folder, "smolvlm" if family == "smolvla" else "paligemma", policy.config.vision, policy.config.language
    )
    _write_pipelines(policy, folder, mapping, {feature: stats for feature, (_, stats) in written.items()})


# ------------------------------------------------------------------------------------------------------------ config
@dataclass(frozen=True)
class Features:
    """What config.json says of observation and action: sizes, and names of the cameras in order."""

    state_dim: int
    action_dim: int
    cameras: tuple[str, ...]

    @staticmethod
    def of(config: Mapping[str, Any], where: Path) -> Features:
        inputs, outputs = (required(config, f"{side}_features", where) for side in ("input", "output"))
        cameras = tuple(
            name.removeprefix(PICTURES).removeprefix("observation.")
            for name, feature in inputs.items()
            if feature.get("type") == "VISUAL" and ".empty_camera_" not in name
        )
        try:
            return Features(inputs[STATE]["shape"][0], outputs[ACTION]["shape"][0], cameras)
        except (KeyError, IndexError, TypeError) as error:
            raise PolicyCheckpointError(f"{where} has no shape of {STATE} or {ACTION}") from error


def _check_settings(config: Mapping[str, Any], where: Path) -> None:
    other = {name: config[name] for name, off in _OFF.items() if name in config and config[name] != off}
    if other:
        raise PolicyCheckpointError(f"{where}: this project has not what these settings ask for: {other}")
    visual = config.get("normalization_mapping", {}).get("VISUAL", "IDENTITY")
    if visual != "IDENTITY":
        raise PolicyCheckpointError(f"{where}: pictures are normalised by {visual}; only IDENTITY is supported")


def _pi0(
    folder: Path,
    config: Mapping[str, Any],
    names: PublicNames,
    features: Features,
    normalizers: tuple[Normalizer, Normalizer],
    tokenizer: Tokenizer,
    options: ReadOptions,
) -> Pi0Config:
    adaptive = config["type"] == "pi05"
    discrete_state = adaptive and options.discrete_state is not False
    cameras = options.cameras or features.cameras
    return pi0_config(
        names.shape,
        names.depth,
        backbone_config(folder),
        folder,
        adaptive=adaptive,
        cameras=cameras,
        num_image_slots=max(3, len(features.cameras)),
        action_horizon=options.action_horizon or required(config, "chunk_size", folder / "config.json"),
        num_steps=config.get("num_inference_steps", config.get("num_steps", 10)),
        normalizers=normalizers,
        tokenizer=tokenizer,
        prompt=PromptConfig(
            "state" if discrete_state else "line",
            clean=adaptive,
            state_width=_state_width(config, options) if discrete_state else 0,
        ),
        image_padding="top_left" if _is_early(folder) else "center",
        loss_on_padding=False,
    )


def _state_width(config: Mapping[str, Any], options: ReadOptions) -> int:
    """0.4 padded the state before it wrote it. What came after has `use_relative_actions` among its settings."""
    if options.state_width is not None:
        return options.state_width
    return 0 if "use_relative_actions" in config else config.get("max_state_dim", 32)


def _smolvla(
    folder: Path,
    config: Mapping[str, Any],
    names: PublicNames,
    features: Features,
    normalizers: tuple[Normalizer, Normalizer],
    tokenizer: Tokenizer,
    options: ReadOptions,
) -> SmolVLAConfig:
    return smolvla_config(
        names.shape,
        names.depth,
        backbone_config(folder),
        folder,
        cross_attention_every=required(config, "self_attn_every_n_layers", folder / "config.json"),
        cameras=options.cameras or features.cameras,
        action_horizon=options.action_horizon or required(config, "chunk_size", folder / "config.json"),
        num_steps=config.get("num_steps", 10),
        normalizers=normalizers,
        tokenizer=tokenizer,
    )


def _config_of(policy: FlowVLA, family: str, mapping: dict[str, str]) -> dict[str, Any]:
    """The settings that LeRobot's class of `family` has and that are not its defaults' business (training)."""
    config = policy.config
    side = config.vision.image_size
    picture = {"type": "VISUAL", "shape": [3, side, side]}
    values: dict[str, Any] = {
        "type": family,
        "n_obs_steps": 1,
        "input_features": {
            STATE: {"type": "STATE", "shape": [config.state_dim]},
            **{PICTURES + camera: picture for camera in config.cameras},
        },
        "output_features": {ACTION: {"type": "ACTION", "shape": [config.action_dim]}},
        "normalization_mapping": mapping,
        "chunk_size": config.action_horizon,
        "n_action_steps": config.action_horizon,
        "max_state_dim": config.max_state_dim,
        "max_action_dim": config.max_action_dim,
        "tokenizer_max_length": config.tokenizer.max_tokens,
    }
    if isinstance(config, SmolVLAConfig):
        return values | {
            "num_steps": config.num_steps,
            "resize_imgs_with_padding": [side, side],
            "attention_mode": "cross_attn",
            "self_attn_every_n_layers": config.expert.cross_attention_every,
            "num_vlm_layers": config.language.depth,
            "expert_width_multiplier": config.expert.width / config.language.width,
        }
    if config.adaptive and not config.prompt.state_width:
        values["use_relative_actions"] = False  # see `_state_width`
    return values | {
        "num_inference_steps": config.num_steps,
        "image_resolution": [side, side],
        "paligemma_variant": variant_of(config.language),
        "action_expert_variant": variant_of(config.expert),
    }


# --------------------------------------------------------------------------------------------------------- pipelines
def _is_early(folder: Path) -> bool:
    return not (folder / "policy_preprocessor.json").is_file()


def read_normalizers(
    folder: Path, config: Mapping[str, Any], features: Features, weights: TensorSource
) -> tuple[Normalizer, Normalizer]:
    """Of state and action: of the pipelines, or, in a folder from before 0.4, from among the weights."""
    mapping = config.get("normalization_mapping", {})
    if _is_early(folder):
        found = {
            feature: {key.removeprefix(start): weights.get(key) for key in weights.keys() if key.startswith(start)}  # noqa: SIM118
            for feature, start in _EARLY.items()
        }
        modes, eps, where = {STATE: mapping.get("STATE"), ACTION: mapping.get("ACTION")}, LEROBOT_EPS, weights.path
        return _normalizers(found, modes, features, eps, where)
    pre = _step(folder / "policy_preprocessor.json", "normalizer_processor")
    post = _step(folder / "policy_postprocessor.json", "unnormalizer_processor")
    found = {STATE: _stats(folder, pre, STATE), ACTION: _stats(folder, post, ACTION)}
    modes = {
        STATE: pre["config"].get("norm_map", mapping).get("STATE"),
        ACTION: post["config"].get("norm_map", mapping).get("ACTION"),
    }
    eps = pre["config"].get("eps", LEROBOT_EPS)
    return _normalizers(found, modes, features, eps, folder / "policy_preprocessor.json")


def _normalizers(
    found: Mapping[str, Mapping[str, Tensor]], modes: Mapping[str, Any], features: Features, eps: float, where: Path
) -> tuple[Normalizer, Normalizer]:
    dims = {STATE: features.state_dim, ACTION: features.action_dim}
    state, action = (
        lerobot_normalizer(
            found[name], str(modes[name] or "IDENTITY"), dim=dims[name], eps=eps, where=f"{where}: {name}"
        )
        for name in (STATE, ACTION)
    )
    return state, action


def _step(path: Path, name: str) -> dict[str, Any]:
    """The step `name` of a pipeline. Raises PolicyCheckpointError where there is none."""
    steps = read_json(path).get("steps", [])
    found = next((step for step in steps if step.get("registry_name") == name), None)
    if found is None:
        raise PolicyCheckpointError(f"{path} has no {name}, only {[step.get('registry_name') for step in steps]}")
    return {"config": {}, **found}


def _stats(folder: Path, step: Mapping[str, Any], feature: str) -> dict[str, Tensor]:
    """Statistics of `feature`, none where the step was saved without them. A pipeline names its file itself; only one
    beside it is read."""
    if not step.get("state_file"):
        return {}
    source = TensorSource(folder / Path(str(step["state_file"])).name)
    start = f"{feature}."
    return {key.removeprefix(start): source.get(key) for key in source.keys() if key.startswith(start)}  # noqa: SIM118


def _write_pipelines(
    policy: FlowVLA, folder: Path, mapping: dict[str, str], stats: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """The normalising steps with their statistics, and the steps around them that LeRobot runs for the family."""
    flat = {f"{feature}.{name}": value for feature, values in stats.items() for name, value in values.items()}
    features = {
        STATE: {"type": "STATE", "shape": [policy.config.state_dim]},
        ACTION: {"type": "ACTION", "shape": [policy.config.action_dim]},
    }
    settings = {"eps": LEROBOT_EPS, "features": features, "norm_map": mapping}
    normalize = {"registry_name": "normalizer_processor", "config": settings}
    for kind, steps in _pipelines(policy, normalize).items():
        for i, step in enumerate(steps):
            if "norm_map" in step["config"] and flat:
                step["state_file"] = f"policy_{kind}processor_step_{i}_{step['registry_name']}.safetensors"
                write_tensors(folder / step["state_file"], flat)
        _write_json(folder / f"policy_{kind}processor.json", {"name": f"policy_{kind}processor", "steps": steps})


def _pipelines(policy: FlowVLA, normalize: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    family, length = family_of_policy(policy), policy.config.tokenizer.max_tokens
    vocabulary = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct" if family == "smolvla" else "google/paligemma-3b-pt-224"
    tokenize = {
        "registry_name": "tokenizer_processor",
        "config": {
            "max_length": length,
            "task_key": "task",
            "padding_side": "right",
            "padding": "longest" if family == "smolvla" else "max_length",
            "truncation": True,
            "tokenizer_name": vocabulary,
        },
    }
    rename = {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}}
    batch = {"registry_name": "to_batch_processor", "config": {}}
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    if family == "pi05":
        state = {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}}
        pre = [rename, batch, normalize, state, tokenize, device]
    else:
        line = "pi0_new_line_processor" if family == "pi0" else "smolvla_new_line_processor"
        pre = [rename, batch, {"registry_name": line, "config": {}}, tokenize, device, normalize]
    return {"pre": pre, "post": [{**normalize, "registry_name": "unnormalizer_processor"}, device]}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


__all__ = ["FAMILIES", "Features", "plan_lerobot", "read_normalizers", "save_lerobot"]
