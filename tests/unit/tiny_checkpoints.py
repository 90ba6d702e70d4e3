"""Tiny checkpoints in the public layouts, written by hand: names, shapes and files as the other projects write them.

Nothing here calls the project's own writers, so that reading is tested against something else.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, DEPTH, ACTIONS = 340, 2, 32
VISION = {"width": 16, "mlp": 24, "heads": 2, "patch": 14, "patches": 4}
LANGUAGE = {"width": 32, "mlp": 48, "heads": 2, "kv": 1, "head_dim": 16}
EXPERT = {"width": 24, "mlp": 40, "heads": 2, "kv": 1, "head_dim": 16}
CORPUS = [
    "pick up the red block and place it in the bowl",
    "open the drawer",
    "Task: push the plate, State: 127 0 255;\nAction: ",
]
BACKBONE = {"text_config": {"head_dim": 16, "rms_norm_eps": 1e-5}, "vision_config": {"num_attention_heads": 2}}


@functools.cache
def tokenizer_model() -> bytes:
    """A sentencepiece file with the special ids of PaliGemma's: padding 0, end 1, beginning 2, unknown 3."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=file,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        split_digits=True,
        minloglevel=2,
    )
    return file.getvalue()


def write_json(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2))


# ------------------------------------------------------------------------------------------------------------ tensors
class _Tensors(dict[str, Tensor]):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, name: str, *shape: int) -> None:
        self[name] = 0.1 * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, out: int, into: int, *, bias: bool = True) -> None:
        self.add(f"{name}.weight", out, into)
        if bias:
            self.add(f"{name}.bias", out)


def _siglip(t: _Tensors, root: str) -> None:
    width, mlp, patch = VISION["width"], VISION["mlp"], VISION["patch"]
    t.add(f"{root}.embeddings.patch_embedding.weight", width, 3, patch, patch)
    t.add(f"{root}.embeddings.patch_embedding.bias", width)
    t.add(f"{root}.embeddings.position_embedding.weight", VISION["patches"], width)
    for i in range(DEPTH):
        layer = f"{root}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            t.linear(f"{layer}.self_attn.{name}", width, width)
        t.linear(f"{layer}.mlp.fc1", mlp, width)
        t.linear(f"{layer}.mlp.fc2", width, mlp)
        for name in ("layer_norm1", "layer_norm2"):
            t.add(f"{layer}.{name}.weight", width)
            t.add(f"{layer}.{name}.bias", width)
    t.add(f"{root}.post_layernorm.weight", width)
    t.add(f"{root}.post_layernorm.bias", width)


def _decoder(t: _Tensors, root: str, size: dict[str, int], *, adaptive: bool = False, cross: bool = False) -> None:
    width, keys = size["width"], size["kv"] * size["head_dim"]

    def norm(name: str) -> None:
        if adaptive:
            t.linear(f"{name}.dense", 3 * width, width)
        else:
            t.add(f"{name}.weight", width)

    for i in range(DEPTH):
        layer = f"{root}.layers.{i}"
        into = keys if cross and i % 2 else width
        t.linear(f"{layer}.self_attn.q_proj", size["heads"] * size["head_dim"], width, bias=False)
        t.linear(f"{layer}.self_attn.k_proj", keys, into, bias=False)
        t.linear(f"{layer}.self_attn.v_proj", keys, into, bias=False)
        t.linear(f"{layer}.self_attn.o_proj", width, size["heads"] * size["head_dim"], bias=False)
        t.linear(f"{layer}.mlp.gate_proj", size["mlp"], width, bias=False)
        t.linear(f"{layer}.mlp.up_proj", size["mlp"], width, bias=False)
        t.linear(f"{layer}.mlp.down_proj", width, size["mlp"], bias=False)
        norm(f"{layer}.input_layernorm")
        norm(f"{layer}.post_attention_layernorm")
    norm(f"{root}.norm")


def pi0_tensors(*, adaptive: bool, seed: int = 0, early: bool = False) -> dict[str, Tensor]:
    """openpi's names. `early`: as transformers before 4.52 nested PaliGemma, with its head under the language model."""
    t = _Tensors(seed)
    paligemma = "paligemma_with_expert.paligemma"
    root = paligemma if early else f"{paligemma}.model"
    width = EXPERT["width"]
    _siglip(t, f"{root}.vision_tower.vision_model")
    t.linear(f"{root}.multi_modal_projector.linear", LANGUAGE["width"], VISION["width"])
    _decoder(t, f"{root}.language_model" + ".model" * early, LANGUAGE)
    t.add(f"{paligemma}.language_model.lm_head.weight" if early else f"{paligemma}.lm_head.weight", VOCAB, 32)
    _decoder(t, "paligemma_with_expert.gemma_expert.model", EXPERT, adaptive=adaptive)
    t.add("paligemma_with_expert.gemma_expert.lm_head.weight", VOCAB, width)
    t.linear("action_in_proj", width, ACTIONS)
    t.linear("action_out_proj", ACTIONS, width)
    if adaptive:
        t.linear("time_mlp_in", width, width)
    else:
        t.linear("state_proj", width, ACTIONS)
        t.linear("action_time_mlp_in", width, 2 * width)
    t.linear("time_mlp_out" if adaptive else "action_time_mlp_out", width, width)
    return dict(t)


def smolvla_tensors(seed: int = 0) -> dict[str, Tensor]:
    """LeRobot's names without "model."; 4 patches become one token."""
    t = _Tensors(seed)
    vlm, width = "vlm_with_expert.vlm", EXPERT["width"]
    language, expert = {**LANGUAGE, "heads": 4, "kv": 2}, {**EXPERT, "heads": 4, "kv": 2}
    _siglip(t, f"{vlm}.model.vision_model")
    t.linear(f"{vlm}.model.connector.modality_projection.proj", 32, 4 * VISION["width"], bias=False)
    t.add(f"{vlm}.model.text_model.embed_tokens.weight", VOCAB, 32)
    _decoder(t, f"{vlm}.model.text_model", language)
    t.add(f"{vlm}.lm_head.weight", VOCAB, 32)
    _decoder(t, "vlm_with_expert.lm_expert", expert, cross=True)
    t.linear("state_proj", 32, ACTIONS)
    t.linear("action_in_proj", width, ACTIONS)
    t.linear("action_out_proj", ACTIONS, width)
    t.linear("action_time_mlp_in", width, 2 * width)
    t.linear("action_time_mlp_out", width, width)
    return dict(t)


def statistics(dim: int, seed: int) -> dict[str, Tensor]:
    """One dimension is constant, as a gripper that never moved."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(dim, generator=generator)
    std = torch.rand(dim, generator=generator) + 0.1
    std[-1] = 0.0
    q01, q99 = mean - 2 * std, mean + 3 * std
    return {"mean": mean, "std": std, "min": mean - 4 * std, "max": mean + 4 * std, "q01": q01, "q99": q99}


# ------------------------------------------------------------------------------------------------------------ folders
def write_norm_stats(folder: Path) -> None:
    kept = ("mean", "std", "q01", "q99")
    stats = {
        name: {k: v.tolist() for k, v in statistics(dim, dim).items() if k in kept}
        for name, dim in (("state", 8), ("actions", 7))
    }
    write_json(folder / "norm_stats.json", {"norm_stats": stats})


def write_openpi(folder: Path, *, adaptive: bool, tokenizer: bool = True) -> dict[str, Tensor]:
    """State of 8, actions of 7, chunk of 5. Returns the tensors."""
    folder.mkdir(parents=True)
    tensors = pi0_tensors(adaptive=adaptive)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    names = {"paligemma_variant": "dummy", "action_expert_variant": "dummy", "precision": "float32"}
    write_json(folder / "config.json", {"action_dim": ACTIONS, "action_horizon": 5, **names})
    write_json(folder / "vlm_config.json", BACKBONE)
    write_norm_stats(folder / "assets" / "tiny_robot")
    if tokenizer:
        (folder / "tokenizer.model").write_bytes(tokenizer_model())
    return tensors


def jax_tree(tensors: dict[str, Tensor], *, adaptive: bool) -> dict[str, Any]:
    """The same numbers as openpi's JAX modules keep them: `y = einsum(x, w)` instead of `y = x @ w.T`."""
    root, expert = "paligemma_with_expert.paligemma.model", "paligemma_with_expert.gemma_expert.model"
    vision = f"{root}.vision_tower.vision_model"

    def stack(name: str, shape: tuple[int, ...] = (), axes: tuple[int, ...] = ()) -> np.ndarray:
        layers = [tensors[name.format(i)].numpy() for i in range(DEPTH)]
        shaped = [x.reshape(shape or x.shape) for x in layers]
        return np.stack([x.transpose(axes) if axes else x for x in shaped])

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"kernel": tensors[f"{name}.weight"].numpy().T, "bias": tensors[f"{name}.bias"].numpy()}

    def norm(name: str, adaptive: bool) -> dict[str, Any]:
        stacked = "{}" in name
        if not adaptive:
            return {"scale": stack(f"{name}.weight") if stacked else tensors[f"{name}.weight"].numpy()}
        if not stacked:
            return {"Dense_0": linear(f"{name}.dense")}
        return {"Dense_0": {"kernel": stack(f"{name}.dense.weight", axes=(1, 0)), "bias": stack(f"{name}.dense.bias")}}

    attn: dict[str, Any] = {}
    layers: dict[str, Any] = {"attn": attn}
    llm: dict[str, Any] = {"layers": layers}
    for suffix, tower, size, is_adaptive in (
        ("", f"{root}.language_model", LANGUAGE, False),
        ("_1", expert, EXPERT, adaptive),
    ):
        layer, width, heads, kv, dim = (
            f"{tower}.layers.{{}}",
            size["width"],
            size["heads"],
            size["kv"],
            size["head_dim"],
        )
        q = stack(f"{layer}.self_attn.q_proj.weight", (heads, dim, width), (0, 2, 1))
        keys = [stack(f"{layer}.self_attn.{n}_proj.weight", (kv, dim, width), (0, 2, 1)) for n in "kv"]
        out = [tensors[f"{tower}.layers.{i}.self_attn.o_proj.weight"].numpy() for i in range(DEPTH)]
        attn[f"q_einsum{suffix}"] = {"w": q}
        attn[f"kv_einsum{suffix}"] = {"w": np.stack(keys, axis=1)}
        attn[f"attn_vec_einsum{suffix}"] = {"w": np.stack([o.T.reshape(heads, dim, width) for o in out])}
        gates = [stack(f"{layer}.mlp.{n}_proj.weight", axes=(1, 0)) for n in ("gate", "up")]
        linears = stack(f"{layer}.mlp.down_proj.weight", axes=(1, 0))
        layers[f"mlp{suffix}"] = {"gating_einsum": np.stack(gates, axis=1), "linear": linears}
        layers[f"pre_attention_norm{suffix}"] = norm(f"{layer}.input_layernorm", is_adaptive)
        layers[f"pre_ffw_norm{suffix}"] = norm(f"{layer}.post_attention_layernorm", is_adaptive)
        llm[f"final_norm{suffix}"] = norm(f"{tower}.norm", is_adaptive)
    llm["embedder"] = {"input_embedding": tensors["paligemma_with_expert.paligemma.lm_head.weight"].numpy()}
    heads, width = VISION["heads"], VISION["width"]
    layer, dim = f"{vision}.encoder.layers.{{}}", VISION["width"] // VISION["heads"]
    attention = {
        theirs: {
            "kernel": stack(f"{layer}.self_attn.{ours}.weight", (heads, dim, width), (2, 0, 1)),
            "bias": stack(f"{layer}.self_attn.{ours}.bias", (heads, dim)),
        }
        for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    }
    outs = [tensors[f"{vision}.encoder.layers.{i}.self_attn.out_proj.weight"].numpy() for i in range(DEPTH)]
    attention["out"] = {
        "kernel": np.stack([o.T.reshape(heads, dim, width) for o in outs]),
        "bias": stack(f"{layer}.self_attn.out_proj.bias"),
    }
    block: dict[str, Any] = {"MultiHeadDotProductAttention_0": attention, "MlpBlock_0": {}}
    for i in (0, 1):
        weight = stack(f"{layer}.mlp.fc{i + 1}.weight", axes=(1, 0))
        block["MlpBlock_0"][f"Dense_{i}"] = {"kernel": weight, "bias": stack(f"{layer}.mlp.fc{i + 1}.bias")}
        scale = stack(f"{layer}.layer_norm{i + 1}.weight")
        block[f"LayerNorm_{i}"] = {"scale": scale, "bias": stack(f"{layer}.layer_norm{i + 1}.bias")}
    last = {"scale": tensors[f"{vision}.post_layernorm.weight"], "bias": tensors[f"{vision}.post_layernorm.bias"]}
    patches = tensors[f"{vision}.embeddings.patch_embedding.weight"].permute(2, 3, 1, 0).numpy()
    img = {
        "embedding": {"kernel": patches, "bias": tensors[f"{vision}.embeddings.patch_embedding.bias"].numpy()},
        "pos_embedding": tensors[f"{vision}.embeddings.position_embedding.weight"].numpy()[None],
        "Transformer": {"encoderblock": block, "encoder_norm": {k: v.numpy() for k, v in last.items()}},
        "head": linear(f"{root}.multi_modal_projector.linear"),
    }
    time = ("time_mlp_in", "time_mlp_out") if adaptive else ("state_proj", "action_time_mlp_in", "action_time_mlp_out")
    heads_of_policy = {name: linear(name) for name in ("action_in_proj", "action_out_proj", *time)}
    return {"PaliGemma": {"llm": llm, "img": img}, **heads_of_policy}


def write_openpi_jax(folder: Path, *, adaptive: bool, value: bool) -> dict[str, Tensor]:
    """By orbax. `value`: each array under one more key, as a training run leaves it. Returns openpi's torch tensors."""
    import jax
    import orbax.checkpoint

    tensors = pi0_tensors(adaptive=adaptive)
    tree = jax.tree.map(np.ascontiguousarray, jax_tree(tensors, adaptive=adaptive))
    if value:
        tree = jax.tree.map(lambda x: {"value": x}, tree)
    with orbax.checkpoint.PyTreeCheckpointer() as writer:
        writer.save(folder.resolve() / "params", {"params": tree})
    write_norm_stats(folder / "assets" / "tiny_robot")
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    return tensors


def write_lerobot(
    folder: Path, family: str, *, early: bool = False, modes: tuple[str, str] | None = None
) -> dict[str, Tensor]:
    """`early`: before 0.4, with the statistics among the tensors. Returns the tensors without "model."."""
    folder.mkdir(parents=True)
    tensors = smolvla_tensors() if family == "smolvla" else pi0_tensors(adaptive=family == "pi05", early=early)
    stored = {f"model.{name}": value for name, value in tensors.items()}
    stats = {"observation.state": statistics(8, 8), "action": statistics(7, 7)}
    if early:
        for start, feature in (
            ("normalize_inputs", "observation.state"),
            ("normalize_targets", "action"),
            ("unnormalize_outputs", "action"),
        ):
            for name in ("mean", "std"):
                stored[f"{start}.buffer_{feature.replace('.', '_')}.{name}"] = stats[feature][name].clone()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    state_mode, action_mode = modes or (("QUANTILES",) * 2 if family == "pi05" else ("MEAN_STD",) * 2)
    mapping = {"VISUAL": "IDENTITY", "STATE": state_mode, "ACTION": action_mode}
    write_json(folder / "config.json", _lerobot_config(family, mapping))
    write_json(folder / "vlm_config.json", BACKBONE)
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    if early:
        return tensors
    flat = {f"{feature}.{name}": value for feature, values in stats.items() for name, value in values.items()}
    features = {"observation.state": {"type": "STATE", "shape": [8]}, "action": {"type": "ACTION", "shape": [7]}}
    for kind, step in (("pre", "normalizer_processor"), ("post", "unnormalizer_processor")):
        file = f"policy_{kind}processor_step_3_{step}.safetensors"
        save_file(flat, folder / file)
        entry = {"registry_name": step, "config": {"eps": 1e-8, "features": features, "norm_map": mapping}}
        steps = [{"registry_name": "device_processor", "config": {}}, {**entry, "state_file": file}]
        write_json(folder / f"policy_{kind}processor.json", {"name": f"policy_{kind}processor", "steps": steps})
    return tensors


def _lerobot_config(family: str, mapping: dict[str, str]) -> dict[str, object]:
    picture = {"type": "VISUAL", "shape": [3, 28, 28]}
    config: dict[str, object] = {
        "type": family,
        "n_obs_steps": 1,
        "input_features": {
            "observation.state": {"type": "STATE", "shape": [8]},
            "observation.images.front": picture,
            "observation.images.wrist": picture,
            "observation.images.empty_camera_0": picture,
        },
        "output_features": {"action": {"type": "ACTION", "shape": [7]}},
        "normalization_mapping": mapping,
        "chunk_size": 5,
        "n_action_steps": 5,
        "max_state_dim": ACTIONS,
        "max_action_dim": ACTIONS,
        "empty_cameras": 1,
        "tokenizer_max_length": 190 if family == "pi05" else 40,
    }
    if family == "smolvla":
        return config | {
            "num_steps": 4,
            "attention_mode": "cross_attn",
            "self_attn_every_n_layers": 2,
            "resize_imgs_with_padding": [28, 28],
            "add_image_special_tokens": False,
        }
    return config | {"num_inference_steps": 4, "image_resolution": [28, 28]}
