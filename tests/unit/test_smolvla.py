"""SmolVLA against its equations token by token, its pictures against transformers' SmolVLM, and its training."""

import dataclasses
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch.nn import functional
from transformers import SmolVLMConfig, SmolVLMModel

from tests.unit.flow_vlas import (
    ARM,
    check_no_branch_on_data,
    check_ratios,
    check_training,
    equal_layers,
    scatter,
)
from tests.unit.flow_vlas import observation as any_observation
from vla_rl.data.normalization import Normalizer
from vla_rl.flow.sampling import ode
from vla_rl.policies.blocks.images import to_unit_range
from vla_rl.policies.blocks.tokenizer import TokenizerConfig
from vla_rl.policies.blocks.vision_transformer import VisionTransformerConfig
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.native import load_policy, save_policy
from vla_rl.policies.smolvla import SmolVLA, SmolVLAConfig, smollm, smolvla_size
from vla_rl.protocols import FlowPolicy, HasSupervisedLoss, HasVisionTokens, LearnsFromPrefix, chunk_shape, require

torch.set_num_threads(1)

SMALL = SmolVLAConfig(
    state_dim=6,
    action_dim=4,
    cameras=("base", "wrist"),
    action_horizon=5,
    max_state_dim=8,
    max_action_dim=7,
    vision=VisionTransformerConfig(width=32, depth=2, mlp_width=64, num_heads=2, image_size=56, patch_size=14),
    pixel_shuffle=2,
    language=smollm(64, 4, 128, (4, 2, 16), vocab_size=300),
    expert=smollm(48, 4, 96, (4, 2, 16)),
    tokenizer=TokenizerConfig(max_tokens=12),
)


def make(config=SMALL, seed=0):
    torch.manual_seed(seed)
    return scatter(SmolVLA(config))


def observation(n=3, size=56):
    return any_observation(n, size=size)


# ------------------------------------------------------------------------------------------------------------- parity
class ByToken:
    """The arithmetic of one sample, one token after the other: no masks, what does not count is not there."""

    def __init__(self, policy):
        self.w = policy.state_dict()

    def norm(self, name, x):
        return self.w[f"{name}.weight"] * x / (x.square().mean() + 1e-5).sqrt()

    def heads(self, name, x):
        return (self.w[f"{name}.weight"] @ x).view(-1, 16)

    def turned(self, heads, position):
        out = torch.empty_like(heads)
        for i in range(8):
            angle = position * 10_000.0 ** (-i / 8)
            c, s = math.cos(angle), math.sin(angle)
            out[:, i] = heads[:, i] * c - heads[:, i + 8] * s
            out[:, i + 8] = heads[:, i + 8] * c + heads[:, i] * s
        return out

    def attend(self, name, x, queries, pairs):
        """`x` plus what its four query heads, two on each key head, see of `pairs` (key, value)."""
        seen = []
        for head in range(4):
            scores = torch.stack([queries[head] @ key[head // 2] / 4.0 for key, _ in pairs]).softmax(0)
            seen.append(sum(p * value[head // 2] for p, (_, value) in zip(scores, pairs, strict=True)))
        return x + self.w[f"{name}.o_proj.weight"] @ torch.cat(seen)

    def feed_forward(self, layer, x):
        y = self.norm(f"{layer}.post_attention_layernorm", x)
        gate, up, down = (self.w[f"{layer}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        return x + down @ (functional.silu(gate @ y) * (up @ y))

    def prefix(self, tokens):
        """-> for each layer the (key, value) of each token. The last token, the state, is seen by itself alone."""
        kept = []
        for i in range(4):
            layer = f"language_model.layers.{i}"
            attention = f"{layer}.self_attn"
            normed = [self.norm(f"{layer}.input_layernorm", x) for x in tokens]
            pairs = [
                (self.turned(self.heads(f"{attention}.k_proj", y), p), self.heads(f"{attention}.v_proj", y))
                for p, y in enumerate(normed)
            ]
            kept.append(pairs)
            after = []
            for p, (x, y) in enumerate(zip(tokens, normed, strict=True)):
                queries = self.turned(self.heads(f"{attention}.q_proj", y), p)
                looks = pairs if p + 1 == len(tokens) else pairs[:-1]
                after.append(self.feed_forward(layer, self.attend(attention, x, queries, looks)))
            tokens = after
        return kept

    def expert(self, actions, kept):
        length = len(kept[0])
        for i in range(4):
            layer = f"expert.layers.{i}"
            attention = f"{layer}.self_attn"
            own, after = [], []
            if i % 2:  # the prefix alone, its keys and values projected once more, positions from zero
                own = [
                    (self.heads(f"{attention}.k_proj", k.flatten()), self.heads(f"{attention}.v_proj", v.flatten()))
                    for k, v in kept[i]
                ]
            for j, x in enumerate(actions):
                y = self.norm(f"{layer}.input_layernorm", x)
                queries = self.heads(f"{attention}.q_proj", y)
                if i % 2:
                    x = self.attend(attention, x, self.turned(queries, j), own)
                else:  # the prefix, and the actions up to this one
                    key = self.turned(self.heads(f"{attention}.k_proj", y), length + j)
                    own.append((key, self.heads(f"{attention}.v_proj", y)))
                    x = self.attend(attention, x, self.turned(queries, length + j), kept[i] + own)
                after.append(self.feed_forward(layer, x))
            actions = after
        return torch.stack([self.norm("expert.norm", x) for x in actions])


def velocity_by_token(policy, inputs, x_t, flow_time, row):
    w, core = policy.state_dict(), ByToken(policy)
    words = [w["language_model.embed_tokens.weight"][t] * 8.0 for t in inputs.tokens[row] if t != 0]
    pictures = [token * 8.0 for token in policy.with_image_tokens(inputs).image_tokens[row]]
    state = policy.state_proj(functional.pad(inputs.state[row], (0, 2)))
    angles = [2 * math.pi * float(flow_time[row]) / (4e-3 * 1000 ** (i / 23)) for i in range(24)]
    time = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    actions = []
    for x in x_t[row]:
        both = torch.cat([policy.action_in_proj(x), time])
        actions.append(policy.action_time_mlp_out(functional.silu(policy.action_time_mlp_in(both))))
    return policy.action_out_proj(core.expert(actions, core.prefix([*pictures, *words, state])))


def test_equals_its_equations_token_by_token():
    policy = make()
    inputs, x_t, time = policy.preprocess(observation()), torch.randn(3, 5, 7), torch.tensor([1.0, 0.37, 0.02])
    assert (inputs.tokens != 0).sum(1).tolist() == [6, 9, 6]
    with torch.no_grad():
        out = policy.velocity(policy.encode(inputs), x_t, time)
        for row in range(3):
            expected = velocity_by_token(policy, inputs, x_t, time, row)
            difference = (out.velocity[row] - expected).abs().max().item()
            assert difference < 1e-5, difference
            assert expected.std() > 0.2
    assert out.hidden.shape == (3, 5, policy.hidden_dim)
    torch.testing.assert_close(policy.action_out_proj(out.hidden), out.velocity)


def test_image_tokens_equal_those_of_transformers():
    """Tower, pixel shuffle and connector of SmolVLM."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "vocab_size": 300, "pad_token_id": 0}
    config = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, image_token_id=299, pad_token_id=0)
    theirs, ours = SmolVLMModel(config).eval(), make()
    state = {"connector.weight": theirs.connector.modality_projection.proj.weight}
    for name, value in theirs.vision_model.state_dict().items():
        name = name.replace("embeddings.position_embedding.weight", "position_embedding")
        state[f"vision.{name.replace('embeddings.', '').replace('encoder.', '')}"] = value
    unread, unknown = ours.load_state_dict(state, strict=False)
    assert not unknown
    assert not [name for name in unread if name.startswith(("vision", "connector"))]
    inputs = ours.preprocess(observation())
    with torch.no_grad():
        pixels = torch.stack([to_unit_range(inputs.images[c]) for c in ("base", "wrist")], dim=1)
        expected = torch.stack(list(theirs.get_image_features(pixels).pooler_output)).reshape(3, 8, 64)
        difference = (ours.with_image_tokens(inputs).image_tokens - expected).abs().max().item()
    assert difference < 1e-5, difference


# --------------------------------------------------------------------------------------------------------- the prefix
def test_actions_are_causal_and_the_state_is_seen_by_itself_and_by_actions():
    policy, obs = make(), observation()
    inputs, x_t, time = policy.preprocess(obs), torch.randn(3, 5, 7), torch.full((3,), 0.5)
    prefix = policy.encode(inputs)
    other = x_t.clone()
    other[:, 3] += 1.0
    before, after = (policy.velocity(prefix, x, time).velocity for x in (x_t, other))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 4], after[:, 4], atol=1e-4)
    moved = policy.encode(dataclasses.replace(inputs, state=inputs.state + 0.5))
    for ours, theirs in zip(prefix.layers, moved.layers, strict=True):
        assert torch.equal(ours.keys[:, :, :-1], theirs.keys[:, :, :-1])
        assert not torch.allclose(ours.values[:, :, -1], theirs.values[:, :, -1])
    assert not torch.allclose(before, policy.velocity(moved, x_t, time).velocity, atol=1e-4)


def test_marks_around_pictures():
    """Two ids before and one after each picture: embedded, but unlike words and pictures not scaled."""
    policy = make()
    marked = SmolVLA(dataclasses.replace(SMALL, image_start=(290, 291), image_end=(290,)))
    marked.load_state_dict(policy.state_dict())
    inputs = policy.preprocess(observation())
    ours, table = marked._pictures(inputs), marked.language_model.embed_tokens.weight
    assert ours.shape == (3, 2 * (4 + 3), 64)
    torch.testing.assert_close(ours[1, 7:10], torch.stack([table[290], table[291], ours[1, 9]]))
    torch.testing.assert_close(ours[1, 13], table[290])
    torch.testing.assert_close(ours[:, 2:6], 8.0 * policy.with_image_tokens(inputs).image_tokens[:, :4])
    assert marked.encode(inputs).mask.shape[1] == policy.encode(inputs).mask.shape[1] + 6


def test_image_tokens_stand_for_pictures():
    policy = make()
    require(policy, FlowPolicy, HasVisionTokens, HasSupervisedLoss, LearnsFromPrefix, by="test")
    inputs = policy.preprocess(observation())
    seen = policy.with_image_tokens(inputs)
    assert (dict(seen.images), tuple(seen.image_tokens.shape)) == ({}, (3, 8, 64))
    same, ours = policy.encode(seen), policy.encode(inputs)
    assert torch.equal(same.pooled, ours.pooled)
    assert equal_layers(same, ours)
    assert ours.pooled.shape == (3, policy.feature_dim)
    assert torch.equal(ours.pooled[:, 64:], inputs.state)
    assert chunk_shape(policy) == (5, 7)


# ----------------------------------------------------------------------------------------------------------- training
def test_every_parameter_that_is_not_frozen_learns_through_the_cache():
    policy = make()
    inputs, actions = policy.preprocess(observation()), policy.normalize_actions(torch.randn(3, 5, 4))

    def learning():
        policy.zero_grad()
        generator = torch.Generator().manual_seed(0)
        policy.supervised_loss(inputs, actions, torch.ones(3, 5) > 0, generator).sum().backward()
        for name, parameter in policy.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        return {name.split(".")[0] for name, p in policy.named_parameters() if p.requires_grad}

    heads = {"action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out", "expert"}
    assert learning() == heads | {"vision", "connector", "language_model", "state_proj"}
    assert not policy.vision_is_frozen
    policy.freeze_encoder()
    assert policy.encoder_is_frozen
    assert policy.vision_is_frozen
    assert learning() == heads


def test_training_reduces_the_loss():
    torch.manual_seed(0)
    check_training(SmolVLA(SMALL), observation(8))


@pytest.mark.parametrize("low_precision", [(), ("vision", "connector", "language_model")], ids=["float32", "bf16_vlm"])
def test_ratio_is_one_at_the_first_epoch(low_precision):
    policy = make(SmolVLAConfig(state_dim=6, action_dim=4, cameras=("base", "wrist")))
    for name in low_precision:
        policy.get_submodule(name).to(torch.bfloat16)
    check_ratios(policy, observation(8, size=64), torch.bfloat16 if low_precision else torch.float32)


def test_velocity_has_no_branch_on_data():
    check_no_branch_on_data(make(), observation())


# ---------------------------------------------------------------------------------------------------- files and sizes
def test_saved_and_loaded_bit_for_bit(tmp_path):
    policy = make(dataclasses.replace(SMALL, image_start=(290, 291), image_end=(290,)))
    offset, scale = torch.randn(4), torch.rand(4) + 0.5
    policy.set_normalization(
        Normalizer("mean_std", torch.randn(6), torch.rand(6) + 0.5), Normalizer("mean_std", offset, scale)
    )
    save_policy(policy, tmp_path)
    again = load_policy(tmp_path)
    assert again.config == policy.config
    obs, noise = observation(), torch.randn(3, 5, 7)
    actions = policy.act(obs, noise).actions
    assert torch.equal(again.act(obs, noise).actions, actions)
    chunk = ode(policy, policy.encode(policy.preprocess(obs)), noise, 10)
    torch.testing.assert_close(actions, chunk[..., :4] * scale + offset)


def test_built_for_an_environment():
    policy = build_policy(SmolVLAConfig(), ARM, seed=0)
    assert sum(p.numel() for p in policy.parameters()) < 800_000
    obs = any_observation(2, cameras=("front",), size=48, state_dim=3)
    assert policy.act(obs, torch.randn(2, 50, 32)).actions.shape == (2, 50, 2)


def test_real_size():
    """The published 450 million count an output matrix of words, of 49280 x 960, that no action needs."""
    with torch.device("meta"):
        policy = SmolVLA(dataclasses.replace(smolvla_size(), state_dim=6, action_dim=6))
    size = sum(p.numel() for p in policy.parameters())
    assert size == 402_737_376
    assert size + 49_280 * 960 == 450_046_176
    side = policy.config.vision.image_size // policy.config.vision.patch_size // policy.config.pixel_shuffle
    assert side**2 == 64


def test_configs_that_cannot_be():
    for message, changes in {
        "must fit into": {"action_dim": 8},
        "depth 2 != 4": {"expert": dataclasses.replace(SMALL.expert, depth=2)},
        "4 x 4 patches do not divide by pixel_shuffle 3": {"pixel_shuffle": 3},
    }.items():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match="at least one, with different names"):
        SmolVLA(dataclasses.replace(SMALL, cameras=("a", "a")))
