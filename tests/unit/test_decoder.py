"""The decoder against transformers' Gemma and Llama, and its prefix cache against one joint pass."""

import dataclasses
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import GemmaConfig, GemmaModel, LlamaConfig, LlamaModel

from vla_rl.policies.blocks.decoder import Decoder, DecoderConfig, block_mask, positions_of

torch.set_num_threads(1)

GEMMA = DecoderConfig(
    width=32, depth=3, mlp_width=64, num_heads=4, num_kv_heads=1, head_dim=16, vocab_size=50, embedding_scale=32**0.5
)
LLAMA = DecoderConfig(
    width=32,
    depth=3,
    mlp_width=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=50,
    norm_offset=False,
    norm_eps=1e-5,
    activation="silu",
)


def reference(config):
    common = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "intermediate_size": config.mlp_width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "pad_token_id": 0,
    }
    model = GemmaModel(GemmaConfig(**common)) if config.norm_offset else LlamaModel(LlamaConfig(**common))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # their own start would hide a wrong weight
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    "config", [GEMMA, LLAMA, dataclasses.replace(LLAMA, rope_base=100_000.0)], ids=["gemma", "llama", "rope_base"]
)
def test_equals_transformers_with_ragged_rows(config):
    torch.manual_seed(0)
    model = reference(config)
    ours = Decoder(config)
    ours.load_state_dict(model.state_dict())
    tokens = torch.randint(1, 50, (3, 9))
    counts = torch.arange(9) < torch.tensor([[9], [6], [2]])
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=counts.long()).last_hidden_state
        causal = block_mask(counts, torch.ones(9, dtype=torch.bool))
        hidden, kept = ours(ours.embed(tokens), positions_of(counts), causal)
        difference = (hidden - expected)[counts].abs().max()
        assert difference < 1e-5, difference
    assert len(kept) == config.depth
    assert kept[0].keys.shape == (3, config.num_kv_heads, 9, config.head_dim)


@pytest.mark.parametrize("config", [GEMMA, LLAMA], ids=["gemma", "llama"])
def test_a_cached_prefix_equals_one_joint_pass_in_value_and_gradient(config):
    torch.manual_seed(1)
    decoder = Decoder(dataclasses.replace(config, vocab_size=0)).double()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    counts = torch.tensor([[True, True, False, True, True, True, True], [True] * 7])
    starts = torch.tensor([True, False, False, False, True, True, False])
    mask, positions = block_mask(counts, starts), positions_of(counts)

    def gradient(hidden):
        decoder.zero_grad()
        hidden.square().sum().backward()
        return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}

    joint, _ = decoder(x, positions, mask)
    expected = gradient(joint[:, 4:])
    _, prefix = decoder.prefill(x[:, :4], positions[:, :4], mask[:, :4, :4])
    untouched = [kv.keys.detach().clone() for kv in prefix]
    cached, _ = decoder(x[:, 4:], positions[:, 4:], mask[:, 4:], prefix=prefix)
    torch.testing.assert_close(cached, joint[:, 4:], rtol=0, atol=1e-5)  # rotary angles are float32
    for name, value in gradient(cached).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before, kv.keys) for before, kv in zip(untouched, prefix, strict=True))


def test_what_prefill_does_not_read_is_what_gets_frozen():
    torch.manual_seed(2)
    decoder = Decoder(GEMMA)
    hidden, layers = decoder.prefill(decoder.embed(torch.randint(1, 50, (2, 5))), torch.arange(5)[None])
    (hidden.sum() + sum(kv.keys.sum() + kv.values.sum() for kv in layers)).backward()
    unread = {name for name, p in decoder.named_parameters() if p.grad is None}
    decoder.freeze_unread()
    assert unread == {name for name, p in decoder.named_parameters() if not p.requires_grad}
    assert "norm.weight" in unread
    assert len(unread) == 7


def test_adaptive_norms_scale_shift_and_gate():
    """With all dense weights zero, a bias (scale, shift, gate) gives gates of 0: the decoder is its last norm."""
    torch.manual_seed(4)
    decoder = Decoder(dataclasses.replace(GEMMA, condition_width=6))
    x, condition = torch.randn(2, 4, 32), torch.randn(2, 6)
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    hidden, _ = decoder(x, torch.arange(4)[None], condition=condition)
    torch.testing.assert_close(hidden, rms)
    with torch.no_grad():
        weights = dict(decoder.named_parameters())
        weights["norm.dense.weight"][:32, 0] = 1.0  # scale = condition[0]
        weights["norm.dense.bias"][32:64] = 0.5
    hidden, _ = decoder(x, torch.arange(4)[None], condition=condition)
    torch.testing.assert_close(hidden, rms * (1 + condition[:, None, :1]) + 0.5)


def test_masks_and_positions_by_hand():
    counts = torch.tensor([[True, False, True, True]])
    starts = torch.tensor([False, False, True, False])  # a block of two, of which one counts, and a second block
    assert block_mask(counts, starts).int().tolist() == [[[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 1], [1, 0, 1, 1]]]
    assert positions_of(counts).tolist() == [[0, 0, 1, 2]]
    assert positions_of(torch.tensor([[False, True, True]])).tolist() == [[0, 0, 1]]


def test_bad_sizes_are_errors():
    with pytest.raises(ValueError, match="num_kv_heads 3"):
        dataclasses.replace(GEMMA, num_kv_heads=3)
    with pytest.raises(ValueError, match="head_dim 7 is odd"):
        dataclasses.replace(GEMMA, head_dim=7)
