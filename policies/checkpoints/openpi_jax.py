"""openpi's JAX checkpoints of pi0 and pi0.5: <step>/params (orbax) and <step>/assets/<asset>/norm_stats.json.

Layers are stacked along the first dimension. Matrices of attention have heads as a dimension of their own, and all
matrices multiply from the right (`x @ kernel`), where ours multiply from the left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vla_rl.policies.checkpoints.assemble import Plan, family_of_policy, network_state, required
from vla_rl.policies.checkpoints.native import PolicyCheckpointError
from vla_rl.policies.checkpoints.openpi import read_parts, write_norm_stats
from vla_rl.policies.checkpoints.options import ReadOptions, write_tokenizer
from vla_rl.policies.checkpoints.orbax import OrbaxSource, params_folder, write_orbax
from vla_rl.policies.checkpoints.tensors import Recipe, names_in, planned_shape, read_json
from vla_rl.policies.pi0 import Pi0

_LLM, _IMG = "PaliGemma.llm", "PaliGemma.img"
_BLOCK = f"{_IMG}.Transformer.encoderblock"
_ATTENTION = f"{_BLOCK}.MultiHeadDotProductAttention_0"


class Turn(NamedTuple):
    """How an array becomes our tensor, and back."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


SAME = Turn(lambda x: x, lambda x: x)
TRANSPOSED = Turn(lambda x: x.T, lambda x: x.T)
POSITIONS = Turn(lambda x: x[0], lambda x: x[None])
CONVOLUTION = Turn(lambda x: x.permute(3, 2, 0, 1), lambda x: x.permute(2, 3, 1, 0))  # h w in out <-> out in h w


def _heads_in_out(num: int) -> Turn:
    """[heads, width, head_dim] <-> [heads * head_dim, width]."""
    return Turn(lambda x: x.transpose(1, 2).flatten(0, 1), lambda x: x.unflatten(0, (num, -1)).transpose(1, 2))


def _in_heads_out(num: int) -> Turn:
    """[width, heads, head_dim] <-> [heads * head_dim, width]."""
    return Turn(lambda x: x.flatten(1).T, lambda x: x.T.unflatten(1, (num, -1)))


def _from_heads(num: int) -> Turn:
    """[heads, head_dim, width] <-> [width, heads * head_dim]."""
    return Turn(lambda x: x.flatten(0, 1).T, lambda x: x.T.unflatten(0, (num, -1)))


def _bias_heads(num: int) -> Turn:
    return Turn(lambda x: x.flatten(), lambda x: x.unflatten(0, (num, -1)))


@dataclass(frozen=True)
class Rule:
    """Array `source` holds `ours`, one tensor for each layer where there is "{i}" in the name; several names are its
    second dimension."""

    source: str
    ours: tuple[str, ...]
    turn: Turn

    @property
    def index_rank(self) -> int:
        return int("{i}" in self.ours[0]) * (1 + int(len(self.ours) > 1))


@dataclass(frozen=True)
class Heads:
    """How many there are: in the vision tower, of queries and of keys in the language model and the expert."""

    vision: int
    queries: int
    keys: int


def rules(heads: Heads, *, adaptive: bool) -> list[Rule]:
    """All arrays of a checkpoint."""
    return [
        *_vision_rules(heads.vision),
        Rule(f"{_IMG}.head.kernel", ("projector.weight",), TRANSPOSED),
        Rule(f"{_IMG}.head.bias", ("projector.bias",), SAME),
        Rule(f"{_LLM}.embedder.input_embedding", ("language_model.embed_tokens.weight",), SAME),
        *_decoder_rules("", "language_model", heads, adaptive=False),
        *_decoder_rules("_1", "expert", heads, adaptive=adaptive),
        *(
            Rule(f"{name}.{theirs}", (f"{name}.{ours}",), turn)
            for name in ("action_in_proj", "action_out_proj", *(_ADAPTIVE if adaptive else _PLAIN))
            for theirs, ours, turn in (("kernel", "weight", TRANSPOSED), ("bias", "bias", SAME))
        ),
    ]


_ADAPTIVE = ("time_mlp_in", "time_mlp_out")
_PLAIN = ("state_proj", "action_time_mlp_in", "action_time_mlp_out")


def _vision_rules(num_heads: int) -> list[Rule]:
    layer = "vision.layers.{i}"
    found = [
        Rule(f"{_IMG}.embedding.kernel", ("vision.patch_embedding.weight",), CONVOLUTION),
        Rule(f"{_IMG}.embedding.bias", ("vision.patch_embedding.bias",), SAME),
        Rule(f"{_IMG}.pos_embedding", ("vision.position_embedding",), POSITIONS),
        Rule(f"{_IMG}.Transformer.encoder_norm.scale", ("vision.post_layernorm.weight",), SAME),
        Rule(f"{_IMG}.Transformer.encoder_norm.bias", ("vision.post_layernorm.bias",), SAME),
        Rule(f"{_ATTENTION}.out.kernel", (f"{layer}.self_attn.out_proj.weight",), _from_heads(num_heads)),
        Rule(f"{_ATTENTION}.out.bias", (f"{layer}.self_attn.out_proj.bias",), SAME),
    ]
    for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        found += [
            Rule(f"{_ATTENTION}.{theirs}.kernel", (f"{layer}.self_attn.{ours}.weight",), _in_heads_out(num_heads)),
            Rule(f"{_ATTENTION}.{theirs}.bias", (f"{layer}.self_attn.{ours}.bias",), _bias_heads(num_heads)),
        ]
    for i in (0, 1):
        found += [
            Rule(f"{_BLOCK}.MlpBlock_0.Dense_{i}.kernel", (f"{layer}.mlp.fc{i + 1}.weight",), TRANSPOSED),
            Rule(f"{_BLOCK}.MlpBlock_0.Dense_{i}.bias", (f"{layer}.mlp.fc{i + 1}.bias",), SAME),
            Rule(f"{_BLOCK}.LayerNorm_{i}.scale", (f"{layer}.layer_norm{i + 1}.weight",), SAME),
            Rule(f"{_BLOCK}.LayerNorm_{i}.bias", (f"{layer}.layer_norm{i + 1}.bias",), SAME),
        ]
    return found


def _decoder_rules(suffix: str, tower: str, heads: Heads, *, adaptive: bool) -> list[Rule]:
    """`suffix` of its arrays: openpi keeps the weights of both towers in one module."""
    theirs, ours = f"{_LLM}.layers", f"{tower}.layers.{{i}}"
    keys_values = tuple(f"{ours}.self_attn.{name}_proj.weight" for name in "kv")
    gate_up = tuple(f"{ours}.mlp.{name}_proj.weight" for name in ("gate", "up"))
    found = [
        Rule(f"{theirs}.attn.q_einsum{suffix}.w", (f"{ours}.self_attn.q_proj.weight",), _heads_in_out(heads.queries)),
        Rule(f"{theirs}.attn.kv_einsum{suffix}.w", keys_values, _heads_in_out(heads.keys)),
        Rule(
            f"{theirs}.attn.attn_vec_einsum{suffix}.w",
            (f"{ours}.self_attn.o_proj.weight",),
            _from_heads(heads.queries),
        ),
        Rule(f"{theirs}.mlp{suffix}.gating_einsum", gate_up, TRANSPOSED),
        Rule(f"{theirs}.mlp{suffix}.linear", (f"{ours}.mlp.down_proj.weight",), TRANSPOSED),
    ]
    norms = (
        (f"{theirs}.pre_attention_norm{suffix}", f"{ours}.input_layernorm"),
        (f"{theirs}.pre_ffw_norm{suffix}", f"{ours}.post_attention_layernorm"),
        (f"{_LLM}.final_norm{suffix}", f"{tower}.norm"),
    )
    for name, norm in norms:
        if adaptive:
            found.append(Rule(f"{name}.Dense_0.kernel", (f"{norm}.dense.weight",), TRANSPOSED))
            found.append(Rule(f"{name}.Dense_0.bias", (f"{norm}.dense.bias",), SAME))
        else:
            found.append(Rule(f"{name}.scale", (f"{norm}.weight",), SAME))
    return found


# --------------------------------------------------------------------------------------------------- read and write
def plan_openpi_jax(folder: Path, options: ReadOptions) -> Plan:
    """`folder`: a step, with params and assets in it. The length of the chunk is in no file of openpi's:
    `options.action_horizon` gives it. Raises PolicyCheckpointError and FileNotFoundError as `plan_openpi`."""
    params = params_folder(folder)
    if params is None:
        raise PolicyCheckpointError(f"{folder} has no params of orbax; it holds {names_in(folder)}")
    ranks = {
        rule.source: rule.index_rank for adaptive in (False, True) for rule in rules(Heads(1, 1, 1), adaptive=adaptive)
    }
    source = OrbaxSource(params, ranks)
    heads = Heads(
        vision=source.array_shape(f"{_ATTENTION}.query.kernel")[2],
        queries=source.array_shape(f"{_LLM}.layers.attn.q_einsum.w")[1],
        keys=source.array_shape(f"{_LLM}.layers.attn.kv_einsum.w")[2],
    )
    adaptive = "time_mlp_in.kernel" in source.names
    recipes, depths = _recipes(source, rules(heads, adaptive=adaptive))

    def shape(ours: str) -> tuple[int, ...]:
        found = planned_shape(recipes[ours], source)
        if isinstance(found, str):
            raise PolicyCheckpointError(f"{params}: {ours} has shape {found}")
        return found

    config, tokenizer, normalizers = read_parts(
        folder,
        options,
        shape,
        depths.__getitem__,
        adaptive=adaptive,
        action_horizon=_action_horizon(folder, options),
        backbone={"vision_config": {"num_attention_heads": heads.vision}},
    )
    return Plan(config, source, recipes.__getitem__, (), tokenizer, normalizers)


def save_openpi_jax(policy: Pi0, folder: Path, *, asset: str = "vla_rl") -> None:
    """Write `policy` as a step that `plan_openpi_jax`, and openpi, read. Raises PolicyCheckpointError for another class
    and for the tokenizer of bytes."""
    if family_of_policy(policy) == "smolvla":
        raise PolicyCheckpointError("openpi has no SmolVLA; convert to 'lerobot'")
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(policy.inputs.tokenizer, folder)
    config, state = policy.config, network_state(policy)
    heads = Heads(config.vision.num_heads, config.language.num_heads, config.language.num_kv_heads)
    depths = {"vision": config.vision.depth, "language_model": config.language.depth, "expert": config.expert.depth}
    arrays: dict[str, Tensor] = {}
    for rule in rules(heads, adaptive=config.adaptive):
        if not rule.index_rank:
            arrays[rule.source] = rule.turn.write(state[rule.ours[0]])
            continue
        layers = range(depths[rule.ours[0].split(".", 1)[0]])
        parts = [torch.stack([rule.turn.write(state[name.format(i=i)]) for i in layers]) for name in rule.ours]
        arrays[rule.source] = parts[0] if len(parts) == 1 else torch.stack(parts, dim=1)
    write_orbax(folder / "params", arrays)
    write_norm_stats(policy, folder / "assets" / asset)
    horizon = {"action_horizon": config.action_horizon}  # for `plan_openpi_jax`; openpi has it in its code
    (folder / "config.json").write_text(json.dumps(horizon, indent=2) + "\n", encoding="utf-8")


def _recipes(source: OrbaxSource, all_rules: list[Rule]) -> tuple[dict[str, Recipe], dict[str, int]]:
    """For each of our keys; and the layers of each tower, as `shape` and `depth` of `pi0_config` want them."""
    recipes: dict[str, Recipe] = {}
    depths: dict[str, int] = {}
    for rule in all_rules:
        if not rule.index_rank:
            recipes[rule.ours[0]] = Recipe((rule.source,), rule.turn.read)
            continue
        layers = source.array_shape(rule.source)[0]
        depths.setdefault(rule.ours[0].split("{i}")[0], layers)
        for i in range(layers):
            for part, name in enumerate(rule.ours):
                index = f"{i},{part}" if rule.index_rank > 1 else f"{i}"
                recipes[name.format(i=i)] = Recipe((f"{rule.source}[{index}]",), rule.turn.read)
    return recipes, depths


def _action_horizon(folder: Path, options: ReadOptions) -> int:
    if options.action_horizon:
        return options.action_horizon
    if (folder / "config.json").is_file():
        return required(read_json(folder / "config.json"), "action_horizon", folder / "config.json")
    if not options.require_tokenizer:  # it is only looked at
        return 1
    raise PolicyCheckpointError(
        f"{folder}: no file of this layout says how many actions a chunk has; pass action_horizon= (--action-horizon): "
        "50 for pi0_base and pi05_base, 10 for pi0_droid and pi05_libero, 15 for pi05_droid"
    )


__all__ = ["Heads", "plan_openpi_jax", "rules", "save_openpi_jax"]
