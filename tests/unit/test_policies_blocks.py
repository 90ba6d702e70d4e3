"""Shared blocks: attention against an explicit softmax, norms and time features against formulas, text, vision."""

import math

import pytest
import torch

from vla_rl.policies.blocks.attention import Attention, attention_mask
from vla_rl.policies.blocks.flow_matching import (
    FlowMatchingConfig,
    draw_flow_time,
    flow_matching_loss,
    hold_last,
    masked_mean,
)
from vla_rl.policies.blocks.heads import mlp
from vla_rl.policies.blocks.text import PAD, TextEncoder, detokenize_bytes, tokenize_bytes, word_hashes
from vla_rl.policies.blocks.time_embedding import time_embedding
from vla_rl.policies.blocks.transformer import AdaptiveRMSNorm, AdaptiveTransformerBlock, RMSNorm
from vla_rl.policies.blocks.vision import ImageEncoder, SpatialAttentionPool, pixel_coordinates


def explicit_attention(layer, x, prefix, mask):
    """One query at a time, one head at a time."""
    n, length, _ = x.shape
    q, k, v = layer.qkv(x).split(layer._split, dim=-1)
    head = layer.head_dim
    group = layer.num_heads // layer.num_kv_heads
    out = torch.zeros(n, length, layer.num_heads * head)
    for i in range(n):
        for h in range(layer.num_heads):
            kv = h // group
            keys, values = k[i, :, kv * head : (kv + 1) * head], v[i, :, kv * head : (kv + 1) * head]
            if prefix is not None:
                keys = torch.cat([prefix.keys[i, kv], keys])
                values = torch.cat([prefix.values[i, kv], values])
            for t in range(length):
                score = keys @ q[i, t, h * head : (h + 1) * head] / math.sqrt(head)
                if mask is not None:
                    score = torch.where(mask[i, 0, 0], score, -torch.inf)
                out[i, t, h * head : (h + 1) * head] = score.softmax(0) @ values
    return layer.out(out)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_an_explicit_softmax(num_kv_heads, with_prefix, masked):
    torch.manual_seed(0)
    layer = Attention(16, 4, num_kv_heads=num_kv_heads, context_width=6)
    x = torch.randn(3, 5, 16)
    prefix = layer.project_context(torch.randn(3, 2, 6)) if with_prefix else None
    token_mask = torch.rand(3, 5) > 0.4
    token_mask[:, 0] = True
    num_prefix = 2 if with_prefix else 0
    mask = attention_mask(None, token_mask, num_prefix, 5) if masked else None
    with torch.no_grad():
        torch.testing.assert_close(layer(x, prefix, mask), explicit_attention(layer, x, prefix, mask))


def test_attention_leaves_its_prefix_alone_and_masks_it():
    torch.manual_seed(0)
    layer = Attention(8, 2, context_width=8)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    prefix = layer.project_context(context)
    before = prefix.keys.clone(), prefix.values.clone()
    mask = attention_mask(torch.tensor([[True, True, False, False]] * 2), None, 4, 3)
    y = layer(x, prefix, mask)
    assert torch.equal(prefix.keys, before[0])
    assert torch.equal(prefix.values, before[1])
    torch.testing.assert_close(y, layer(x, layer.project_context(context[:, :2])))
    assert attention_mask(None, None, 4, 3) is None


def test_attention_errors():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        Attention(10, 4)
    with pytest.raises(ValueError, match="num_kv_heads"):
        Attention(16, 4, num_kv_heads=3)
    with pytest.raises(ValueError, match="context_width"):
        Attention(16, 4).project_context(torch.zeros(1, 1, 16))
    assert Attention(10, 4, head_dim=8)(torch.zeros(2, 3, 10)).shape == (2, 3, 10)


def test_norms_follow_their_formulas():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8) * 5
    norm = RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight)
    torch.testing.assert_close(norm(x), expected)

    adaptive = AdaptiveRMSNorm(8, 4, initial_gate=1.0)
    normed, gate = adaptive(x, torch.randn(2, 4))
    torch.testing.assert_close(normed, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert torch.equal(gate, torch.ones(2, 1, 8))
    torch.nn.init.normal_(adaptive.dense.weight)
    condition = torch.randn(2, 4)
    scale, shift, gate_expected = adaptive.dense(condition)[:, None].chunk(3, dim=-1)
    y, gate = adaptive(x, condition)
    torch.testing.assert_close(y, normed * (1 + scale) + shift)
    torch.testing.assert_close(gate, gate_expected)


def test_a_gate_of_zero_makes_a_block_the_identity():
    block = AdaptiveTransformerBlock(16, 4, 32, condition_width=8, context_width=6)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 3, 6)
    assert not torch.allclose(block(x, context, torch.zeros(2, 8)), x)
    for norm in (block.attention_norm, block.feed_forward_norm):
        torch.nn.init.zeros_(norm.dense.bias)
    assert torch.equal(block(x, context, torch.randn(2, 8)), x)


def test_time_embedding_values():
    e = time_embedding(torch.tensor([0.0, 0.5]), 8)
    assert e.dtype == torch.float32
    assert torch.equal(e[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    periods = [4e-3, 4e-2, 0.4, 4.0]
    expected = [math.sin(2 * math.pi * 0.5 / p) for p in periods] + [math.cos(2 * math.pi * 0.5 / p) for p in periods]
    torch.testing.assert_close(e[1], torch.tensor(expected), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="even"):
        time_embedding(torch.zeros(1), 7)


def test_mlp_can_start_at_zero():
    assert torch.equal(mlp(3, [5], 2, zero_output=True)(torch.randn(4, 3)), torch.zeros(4, 2))
    assert mlp(3, [], 2)(torch.randn(4, 3)).shape == (4, 2)


# -------------------------------------------------------------------------------------------------------------- text
def test_tokens_round_trip_and_fit():
    sentences = ("Pick up the red block ", "grüß den würfel")
    tokens = tokenize_bytes(sentences, 32)
    assert tokens.shape == (2, 32)
    assert detokenize_bytes(tokens[0]) == "pick up the red block"
    assert detokenize_bytes(tokens[1]) == "grüß den würfel"
    assert int(tokens.max()) < 259
    assert bool((tokens[0, len("pick up the red block") + 2 :] == PAD).all())
    with pytest.raises(ValueError, match="at most 8 fit"):
        tokenize_bytes(sentences, 8)


def test_a_sentence_means_the_same_in_any_batch_and_padding():
    torch.manual_seed(0)
    encoder = TextEncoder(16, 2, 12, max_text_tokens=64)
    alone = encoder(tokenize_bytes(["push the red block"], 64))
    batch = encoder(
        tokenize_bytes(["open the drawer and then close it again", "push the red block", "push the red block"], 64)
    )
    assert batch[0].shape == (3, 2, 12)
    for a, b in zip(alone, batch, strict=True):
        torch.testing.assert_close(a[0], b[1])
        assert torch.equal(b[1], b[2])
    shorter = encoder(tokenize_bytes(["push the red block"], 32))
    torch.testing.assert_close(alone[1], shorter[1])


def test_text_knows_order():
    torch.manual_seed(0)
    encoder = TextEncoder(16, 2, 12, max_text_tokens=64)
    _, pooled = encoder(tokenize_bytes(["put red on blue", "put blue on red"], 64))
    assert float((pooled[0] - pooled[1]).detach().abs().max()) > 1e-3


def test_an_empty_instruction_has_finite_features():
    encoder = TextEncoder(16, 2, 12, max_text_tokens=16)
    tokens, pooled = encoder(torch.zeros(2, 16, dtype=torch.int64))
    assert bool(torch.isfinite(tokens).all())
    assert bool(torch.isfinite(pooled).all())


# ------------------------------------------------------------------------------------------------------------ vision
def test_pixel_coordinates():
    assert pixel_coordinates(2, 3).tolist() == [[-1, -1], [0, -1], [1, -1], [-1, 1], [0, 1], [1, 1]]


def test_spatial_attention_finds_the_peak():
    """A feature map with one bright cell and a query along it: the read coordinates are those of the cell."""
    pool = SpatialAttentionPool(4, 3, num_tokens=1, heads=1, out_width=2)
    with torch.no_grad():
        pool.base_queries.copy_(torch.tensor([[1.0, 0, 0, 0]]))
        torch.nn.init.zeros_(pool.text_queries.weight)
        torch.nn.init.zeros_(pool.text_queries.bias)
        pool.log_sharpness.fill_(math.log(20.0))
        pool.out.weight.copy_(torch.eye(2))
        torch.nn.init.zeros_(pool.out.bias)
        features = torch.zeros(2, 4, 5, 5)
        features[0, 0, 1, 3] = 1.0
        features[1, 0, 4, 0] = 1.0
        out = pool(features, torch.zeros(2, 3))
    torch.testing.assert_close(out[:, 0], torch.tensor([[0.5, -0.5], [-1.0, 1.0]]), atol=1e-4, rtol=0)


def test_spatial_attention_reads_features_where_it_looks():
    """With value channels, what is read is the mean of the projected features under the same heat map."""
    torch.manual_seed(0)
    pool = SpatialAttentionPool(4, 3, num_tokens=2, heads=3, out_width=7, value_channels=5)
    features, condition = torch.randn(2, 4, 3, 3), torch.randn(2, 3)
    keys = pool.norm(features).flatten(2)
    queries = pool.base_queries + pool.text_queries(condition).view(2, 6, 4)
    weights = torch.einsum("nqc,ncp->nqp", queries * pool.log_sharpness.exp(), keys).softmax(-1)
    read = torch.cat([weights @ pixel_coordinates(3, 3), weights @ pool.values(keys.transpose(1, 2))], dim=-1)  # pyright: ignore[reportOptionalCall]
    torch.testing.assert_close(pool(features, condition), pool.out(read.view(2, 2, 21)))


@pytest.mark.parametrize(("size", "grid"), [(64, 16), (96, 12), (128, 16), (224, 14)])
def test_image_encoder_grids(size, grid):
    encoder = ImageEncoder(size, 8, 1, condition_width=4, num_tokens=2, heads=2, out_width=6)
    image = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    assert encoder.stem(image.float()).shape == (2, 8, grid, grid)
    assert encoder(image, torch.randn(2, 4)).shape == (2, 2, 6)


def test_image_encoder_errors():
    with pytest.raises(ValueError, match="multiple of 4"):
        ImageEncoder(62, 8, 1, condition_width=4, num_tokens=1, heads=1, out_width=4)
    with pytest.raises(ValueError, match="channels"):
        ImageEncoder(64, 10, 1, condition_width=4, num_tokens=1, heads=1, out_width=4)


# ----------------------------------------------------------------------------------------------------- flow matching
def test_flow_time_laws():
    g = torch.Generator().manual_seed(0)
    beta = draw_flow_time(200_000, FlowMatchingConfig("beta"), g)
    uniform = draw_flow_time(200_000, FlowMatchingConfig("uniform"), g)
    assert float(beta.min()) >= 0.001
    assert float(beta.max()) <= 1.0
    assert abs(float(beta.mean()) - (0.001 + 0.999 * 0.6)) < 2e-3  # Beta(1.5, 1) has mean 0.6
    assert abs(float(uniform.mean()) - 0.5005) < 2e-3
    quantile = (torch.quantile(beta[:100_000], 0.25) - 0.001) / 0.999
    assert abs(float(quantile) - 0.25 ** (2 / 3)) < 3e-3


def test_flow_matching_loss_by_hand():
    """With velocity 0 the loss is the mean of (noise - action)^2 over the real steps, averaged over the draws."""
    actions = torch.randn(3, 4, 2)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    config = FlowMatchingConfig(num_draws=2)
    loss = flow_matching_loss(lambda x, t: torch.zeros_like(x), actions, mask, config, torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    draw_flow_time(6, config, g)
    noise = torch.randn(6, 4, 2, generator=g).view(2, 3, 4, 2)
    error = (noise - actions).square().mean(dim=3)
    expected = torch.stack([error[:, 0].mean(), error[:, 1, :2].mean(), torch.tensor(0.0)])
    torch.testing.assert_close(loss, expected)


def test_padding_holds_the_last_real_action():
    actions = torch.arange(12.0).view(3, 4, 1)
    mask = torch.tensor([[True, True, False, False], [False, True, False, True], [False] * 4])
    assert hold_last(actions, mask)[..., 0].tolist() == [[0, 1, 1, 1], [5, 5, 5, 7], [0, 0, 0, 0]]


def test_the_true_velocity_of_a_gaussian_beats_others():
    """Actions N(m, s^2): E[noise - action | x_t] is linear in x_t; the loss is least at that velocity."""
    m, s, n = 0.7, 0.2, 40_000
    actions = m + s * torch.randn(n, 1, 1, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(n, 1, dtype=torch.bool)

    def velocity(x, t, gain=1.0):
        t = t[:, None, None]
        variance = t**2 + (1 - t) ** 2 * s**2
        return -m + gain * (t - (1 - t) * s**2) / variance * (x - (1 - t) * m)

    def loss(gain):
        g = torch.Generator().manual_seed(1)
        return float(
            flow_matching_loss(
                lambda x, t: velocity(x, t, gain), actions, mask, FlowMatchingConfig(num_draws=1), g
            ).mean()
        )

    assert loss(1.0) < loss(0.97)
    assert loss(1.0) < loss(1.03)


def test_masked_mean_and_config_errors():
    error = torch.tensor([[[1.0, 3.0], [100.0, 100.0]]])
    assert masked_mean(error, torch.tensor([[True, False]])).tolist() == [2.0]
    with pytest.raises(ValueError, match="num_draws"):
        FlowMatchingConfig(num_draws=0)
    with pytest.raises(ValueError, match="time_distribution"):
        FlowMatchingConfig(time_distribution="normal")


def test_word_hashes_know_words_wherever_they_stand():
    tokens = tokenize_bytes(["go to the red cube", "red cube now", "cube"], 24)
    hashes = word_hashes(tokens, 2048)
    red, cube = int(hashes[1, 1]), int(hashes[1, 5])
    assert red != cube
    assert hashes[0, 11:14].tolist() == [red] * 3
    assert hashes[0, 15:19].tolist() == [cube] * 4
    assert hashes[2, 1:5].tolist() == [cube] * 4
    names = ["red", "green", "blue", "yellow", "orange", "purple", "block", "cube", "push", "onto", "the", "into"]
    assert len({int(h) for h in word_hashes(tokenize_bytes(names, 10), 2048)[:, 1]}) == len(names)
