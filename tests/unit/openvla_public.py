"""Tiny OpenVLA folders written by hand, and what the public code computes from them: plain functions and transformers'
Llama. Nothing of the project's models or writers is used here."""

import io
import json
import os

import sentencepiece
import torch
from safetensors.torch import save_file
from torch.nn import functional

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MEAN, STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
WIDTH, VOCAB, FIRST_ACTION, PATCHES = 32, 650, 330, 4
DINO = {"root": "vision_backbone.featurizer.", "width": 32, "depth": 3, "heads": 2, "mlp": 64}
SIGLIP = {"root": "vision_backbone.fused_featurizer.", "width": 24, "depth": 2, "heads": 3, "mlp": 40}
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 649,
}
CORPUS = ["In: What action should the robot take to pick up the red block?\nOut:", "open the drawer", "stack cubes"]
Q01, Q99 = [-0.5, -1.0, 0.0, -0.2, -0.3, -0.4, 0.0], [0.5, 2.0, 0.25, 0.2, 0.3, 0.1, 1.0]
STATISTICS = {
    "toy": {
        "action": {"q01": Q01, "q99": Q99, "min": [x - 1 for x in Q01], "max": Q99, "mask": [True] * 6 + [False]},
        "proprio": {"q01": [-1.0, 0.0, 2.0], "q99": [1.0, 0.5, 6.0], "min": [-2.0] * 3, "max": [8.0] * 3},
        "num_transitions": 10,
        "num_trajectories": 2,
    }
}


def tokenizer_bytes():
    """A sentencepiece model with Llama's special ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def random(*shape):
    return torch.randn(*shape) * 0.3


def linear(name, rows, columns, bias=True):
    weight = torch.randn(rows, columns) * columns**-0.5
    return {f"{name}.weight": weight} | ({f"{name}.bias": random(rows)} if bias else {})


def norm(name, width):
    return {f"{name}.weight": 1 + random(width), f"{name}.bias": random(width)}


def tower_tensors(spec, dino, film):
    root, width = spec["root"], spec["width"]
    t = {f"{root}patch_embed.proj.weight": random(width, 3, 14, 14) / 7, f"{root}patch_embed.proj.bias": random(width)}
    t[f"{root}pos_embed"] = random(1, PATCHES, width)
    if dino:
        t |= {f"{root}cls_token": random(1, 1, width), f"{root}reg_token": random(1, 2, width)}
    else:
        t |= {f"{root}attn_pool.latent": random(1, 1, width), **linear(f"{root}attn_pool.q", width, width)}
    for i in range(spec["depth"]):
        block = f"{root}blocks.{i}."
        t |= norm(f"{block}norm1", width) | norm(f"{block}norm2", width)
        t |= linear(f"{block}attn.qkv", 3 * width, width) | linear(f"{block}attn.proj", width, width)
        t |= linear(f"{block}mlp.fc1", spec["mlp"], width) | linear(f"{block}mlp.fc2", width, spec["mlp"])
        if dino:
            t |= {f"{block}ls1.scale_factor": random(width), f"{block}ls2.scale_factor": random(width)}
        if film:
            t |= linear(f"{block}scale", width, WIDTH) | linear(f"{block}shift", width, WIDTH)
    return t | norm(f"{root}norm", width)


def model_tensors(film=False):
    t = tower_tensors(DINO, True, film) | tower_tensors(SIGLIP, False, film)
    fused = DINO["width"] + SIGLIP["width"]
    t |= linear("projector.fc1", 4 * fused, fused) | linear("projector.fc2", WIDTH, 4 * fused)
    t |= linear("projector.fc3", WIDTH, WIDTH)
    root = "language_model.model."
    t |= {f"{root}embed_tokens.weight": random(VOCAB, WIDTH), f"{root}norm.weight": 1 + random(WIDTH)}
    t |= linear("language_model.lm_head", VOCAB, WIDTH, bias=False)
    for i in range(2):
        layer = f"{root}layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", 32, 32),
            ("self_attn.k_proj", 16, 32),
            ("self_attn.v_proj", 16, 32),
            ("self_attn.o_proj", 32, 32),
            ("mlp.gate_proj", 48, 32),
            ("mlp.up_proj", 48, 32),
            ("mlp.down_proj", 32, 48),
        ):
            t |= linear(layer + name, rows, columns, bias=False)
        t |= {
            f"{layer}input_layernorm.weight": 1 + random(32),
            f"{layer}post_attention_layernorm.weight": 1 + random(32),
        }
    return t


def head_tensors(dims=7):
    t = norm("model.layer_norm1", dims * WIDTH) | linear("model.fc1", WIDTH, dims * WIDTH)
    for i in range(2):
        block = f"model.mlp_resnet_blocks.{i}.ffn."
        t |= norm(f"{block}0", WIDTH) | linear(f"{block}1", WIDTH, WIDTH)
    return t | norm("model.layer_norm2", WIDTH) | linear("model.fc2", dims, WIDTH)


def proprio_tensors(dims=3):
    return linear("fc1", WIDTH, dims) | linear("fc2", WIDTH, WIDTH)


def write_shards(folder, tensors, num=3):
    names = sorted(tensors)
    weight_map = {}
    for i in range(num):
        file = f"model-{i + 1:05d}-of-{num:05d}.safetensors"
        save_file({n: tensors[n].contiguous() for n in names[i::num]}, folder / file)
        weight_map |= dict.fromkeys(names[i::num], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_folder(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is not None:
        write_shards(folder, tensors)
    model = tokenizer_bytes()
    (folder / "tokenizer.model").write_bytes(model)
    end = sentencepiece.SentencePieceProcessor(model_proto=model).piece_to_id("▁")
    values = {
        "model_type": "openvla",
        "text_config": TEXT,
        "image_resize_strategy": "resize-naive",
        "vision_layers_heads": [[t["depth"], t["heads"]] for t in (DINO, SIGLIP)],
        "prompt_end_id": end,
        "norm_stats": STATISTICS,
    }
    (folder / "config.json").write_text(json.dumps(values | config))
    pixels = {"means": [MEAN, [0.5] * 3], "stds": [STD, [0.5] * 3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))


def write_heads(folder, head=None, proprio=None, film=None):
    """As DistributedDataParallel leaves them."""
    for name, tensors in (("action_head", head), ("proprio_projector", proprio)):
        if tensors is not None:
            torch.save({f"module.{k}": v for k, v in tensors.items()}, folder / f"{name}--150000_checkpoint.pt")
    if film is not None:
        torch.save(film, folder / "vision_backbone--150000_checkpoint.pt")


# ---------------------------------------------------------------------------------------------- the public computation
def dense(t, name, x):
    return functional.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))


def layer_norm(t, name, x, eps):
    return functional.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def tower(t, spec, pixels, sentence=None):
    """The output of the second-to-last block, without class token and registers."""
    root, heads = spec["root"], spec["heads"]
    x = functional.conv2d(pixels, t[f"{root}patch_embed.proj.weight"], t[f"{root}patch_embed.proj.bias"], stride=14)
    x = x.flatten(2).transpose(1, 2) + t[f"{root}pos_embed"]
    extra = [t[root + n].expand(len(x), -1, -1) for n in ("cls_token", "reg_token") if root + n in t]
    x = torch.cat([*extra, x], dim=1)
    for i in range(spec["depth"] - 1):
        block = f"{root}blocks.{i}."
        qkv = dense(t, f"{block}attn.qkv", layer_norm(t, f"{block}norm1", x, 1e-6))
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        y = dense(t, f"{block}attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        x = x + y * t.get(f"{block}ls1.scale_factor", 1.0)
        if sentence is not None:
            x = x * (1 + dense(t, f"{block}scale", sentence)[:, None]) + dense(t, f"{block}shift", sentence)[:, None]
        y = dense(t, f"{block}mlp.fc1", layer_norm(t, f"{block}norm2", x, 1e-6))
        x = x + dense(t, f"{block}mlp.fc2", functional.gelu(y)) * t.get(f"{block}ls2.scale_factor", 1.0)
    return x[:, sum(e.shape[1] for e in extra) :]


def image_tokens(t, images, sentence=None):
    """uint8 [N, 28, 28, 3] -> [N, 4, 32]."""
    unit = images.permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    fused = torch.cat(
        [tower(t, DINO, (unit - mean) / std, sentence), tower(t, SIGLIP, (unit - 0.5) / 0.5, sentence)], -1
    )
    x = functional.gelu(dense(t, "projector.fc1", fused))
    return dense(t, "projector.fc3", functional.gelu(dense(t, "projector.fc2", x)))


def llama(t):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    state = {k.removeprefix("language_model."): v for k, v in t.items() if k.startswith("language_model.")}
    model.load_state_dict(state, strict=True)
    return model


def prompt_ids(folder, sentence):
    config = json.loads((folder / "config.json").read_text())
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = [1, *encoder.encode(f"In: What action should the robot take to {sentence.lower()}?\nOut:")]
    return ids if ids[-1] == config["prompt_end_id"] else [*ids, config["prompt_end_id"]]
