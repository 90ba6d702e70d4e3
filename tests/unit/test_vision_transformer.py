"""The vision tower against transformers' SigLIP and DINOv2 with registers."""

import dataclasses
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vla_rl.policies.blocks.vision_transformer import VisionTransformer, VisionTransformerConfig

torch.set_num_threads(1)

SIGLIP = VisionTransformerConfig(width=32, depth=3, mlp_width=64, num_heads=4, image_size=28, patch_size=7)
DINO = dataclasses.replace(
    SIGLIP,
    activation="gelu",
    num_registers=4,
    class_token=True,
    layer_scale=True,
    num_unused_layers=1,
    final_norm=False,
)


def scatter(model):
    """Numbers that no part starts with, so that a missing part shows."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def test_siglip():
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        vision_use_head=False,
    )
    reference, ours = scatter(SiglipVisionModel(config)), VisionTransformer(SIGLIP)
    names = {
        "embeddings.patch_embedding": "patch_embedding",
        "embeddings.position_embedding.weight": "position_embedding",
        "encoder.layers": "layers",
    }
    state = {}
    for name, value in reference.state_dict().items():
        for theirs, own in names.items():
            name = name.replace(theirs, own)
        state[name.removeprefix("vision_model.")] = value
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        difference = (ours(images) - reference(images).last_hidden_state).abs().max()
    assert difference < 1e-5, difference


def dino_weights(reference):
    """Of transformers' names; the position embedding of its class token is the one that timm's variant lacks."""
    state = {}
    theirs = reference.state_dict()
    assert not theirs["embeddings.position_embeddings"][:, 0].any()
    state["position_embedding"] = theirs["embeddings.position_embeddings"][0, 1:]
    state["extra_tokens"] = torch.cat([theirs["embeddings.cls_token"], theirs["embeddings.register_tokens"]], dim=1)[0]
    for kind in ("weight", "bias"):
        state[f"patch_embedding.{kind}"] = theirs[f"embeddings.patch_embeddings.projection.{kind}"]
    parts = {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attention.q_proj": "self_attn.q_proj",
        "attention.k_proj": "self_attn.k_proj",
        "attention.v_proj": "self_attn.v_proj",
        "attention.o_proj": "self_attn.out_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for i in range(2):
        layer = f"encoder.layer.{i}"
        for their_name, own in parts.items():
            for kind in ("weight", "bias"):
                state[f"layers.{i}.{own}.{kind}"] = theirs[f"{layer}.{their_name}.{kind}"]
        for j in (1, 2):
            state[f"layers.{i}.scale{j}"] = theirs[f"{layer}.layer_scale{j}.lambda1"]
    return state


def test_dinov2_with_registers_up_to_the_second_to_last_block():
    torch.manual_seed(1)
    config = Dinov2WithRegistersConfig(
        hidden_size=32,
        mlp_ratio=2,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        num_register_tokens=4,
    )
    reference = scatter(Dinov2WithRegistersModel(config))
    with torch.no_grad():
        reference.embeddings.position_embeddings[:, 0] = 0.0
    ours = VisionTransformer(DINO)
    ours.load_state_dict(dino_weights(reference))
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = reference(images, output_hidden_states=True).hidden_states[2][:, 5:]
        seen = ours(images)
    assert seen.shape == (2, 16, 32)
    assert (seen - expected).abs().max() < 1e-5, (seen - expected).abs().max()


def test_film_scales_and_shifts_between_attention_and_feed_forward():
    torch.manual_seed(2)
    plain, film = VisionTransformer(SIGLIP), VisionTransformer(dataclasses.replace(SIGLIP, film_width=5))
    film.load_state_dict(plain.state_dict(), strict=False)
    images, sentence = torch.randn(2, 3, 28, 28), torch.randn(2, 5)
    layer = film.layers[0]
    x = torch.randn(2, 16, 32)
    attended = x + layer.self_attn(layer.layer_norm1(x))
    moved = attended * (1 + layer.film_scale(sentence)[:, None]) + layer.film_shift(sentence)[:, None]
    torch.testing.assert_close(layer(x, sentence), moved + layer.mlp(layer.layer_norm2(moved)))
    assert not torch.allclose(film(images, sentence), plain(images), atol=1e-3)
    for block in film.layers:
        for linear in (block.film_scale, block.film_shift):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    assert torch.equal(film(images, sentence), plain(images))


def test_bad_sizes_are_errors():
    with pytest.raises(ValueError, match=r"takes \[N, 3, 28, 28\], got \(1, 3, 14, 28\)"):
        VisionTransformer(SIGLIP)(torch.zeros(1, 3, 14, 28))
    with pytest.raises(ValueError, match="not a multiple of patch_size"):
        dataclasses.replace(SIGLIP, image_size=30)
    with pytest.raises(ValueError, match="not a multiple of num_heads"):
        dataclasses.replace(SIGLIP, num_heads=5)
