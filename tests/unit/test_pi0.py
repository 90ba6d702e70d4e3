"""pi0 and pi0.5: parity with transformers' PI0, masks, the prefix cache, sizes, training and log-probabilities."""

import dataclasses
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch.nn import functional
from transformers import PI0Config, PI0ForConditionalGeneration

from tests.transformers_pi0 import names_of_ours, same_weights, their_inputs, transformers_pi0
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
from vla_rl.policies.blocks.decoder import DecoderConfig, block_mask, positions_of
from vla_rl.policies.blocks.flow_matching import FlowMatchingConfig
from vla_rl.policies.blocks.prefix_cache import make_prefix
from vla_rl.policies.blocks.tokenizer import TokenizerConfig
from vla_rl.policies.blocks.vision_transformer import VisionTransformerConfig
from vla_rl.policies.blocks.vla_inputs import PromptConfig
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.native import load_policy, save_policy
from vla_rl.policies.pi0 import Pi0, Pi0Config, gemma, pi0_size
from vla_rl.protocols import FlowPolicy, HasSupervisedLoss, HasVisionTokens, LearnsFromPrefix, chunk_shape, require

torch.set_num_threads(1)

SMALL = Pi0Config(
    state_dim=6,
    action_dim=4,
    cameras=("base", "wrist"),
    action_horizon=5,
    max_state_dim=8,
    max_action_dim=7,
    vision=VisionTransformerConfig(width=32, depth=2, mlp_width=64, num_heads=2, image_size=28, patch_size=14),
    language=DecoderConfig(64, 2, 128, 4, 1, 16, vocab_size=300, embedding_scale=8.0),
    expert=DecoderConfig(32, 2, 64, 4, 1, 16),
    tokenizer=TokenizerConfig(max_tokens=12),
)
PI05 = dataclasses.replace(
    SMALL,
    adaptive=True,
    prompt=PromptConfig("state"),
    tokenizer=TokenizerConfig(max_tokens=60),
)
BOTH = pytest.mark.parametrize("config", [SMALL, PI05], ids=["pi0", "pi05"])


def make(config, seed=0):
    torch.manual_seed(seed)
    return scatter(Pi0(config))


def observation(n=3, size=28):
    return any_observation(n, size=size)


# ------------------------------------------------------------------------------------------------------------- parity
@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    theirs = scatter(transformers_pi0(SMALL), 0.05)
    return same_weights(theirs, SMALL), theirs


def test_parity_with_transformers(pair):
    """Ragged prompts, a camera of three missing: ten Euler steps, the velocity, and its gradients through the cache."""
    ours, theirs = pair
    inputs = ours.preprocess(observation())
    assert (inputs.tokens != 0).sum(1).tolist() == [6, 9, 6]
    noise, time = torch.randn(3, 5, 7), torch.tensor([0.9, 0.31, 0.02])
    with torch.no_grad():
        expected = theirs.sample_actions(**their_inputs(ours, inputs), noise=noise, num_steps=10)
        sampled = ode(ours, ours.encode(inputs), noise, 10)
    difference = (sampled - expected).abs().max().item()
    assert difference < 1e-5, difference

    out = theirs(**their_inputs(ours, inputs), noise=noise, timestep=time).logits
    velocity = ours.velocity(ours.encode(inputs), noise, time).velocity
    assert (velocity - out).abs().max() < 1e-5, (velocity - out).abs().max()
    out.square().sum().backward()
    velocity.square().sum().backward()
    gradients = names_of_ours({k: p.grad for k, p in theirs.named_parameters() if p.grad is not None})
    checked = 0
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None and name in gradients:
            scale = gradients[name].abs().max()
            assert (parameter.grad - gradients[name]).abs().max() <= 1e-4 * scale + 1e-6, name
            checked += 1
    assert checked == len([p for p in ours.parameters() if p.requires_grad])


def rms(x, weight, condition=None):
    """RMSNorm of Gemma, or adaRMS from `weight` (matrix, bias): normed and gate."""
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    if condition is None:
        return normed * (1 + weight), 1.0
    scale, shift, gate = (condition @ weight[0].T + weight[1])[:, None].chunk(3, dim=-1)
    return normed * (1 + scale) + shift, gate


def turn(x, positions):
    """Rotary positions by complex numbers. `x [N, L, heads, D]`."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * 10_000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def joint_velocity(policy, inputs, x_t, flow_time):
    """One pass over prefix and suffix together, as the paper writes it: each layer has one softmax over both towers."""
    w, config = policy.state_dict(), policy.config
    seen = policy.with_image_tokens(inputs).image_tokens
    prefix = torch.cat([seen, 8.0 * w["language_model.embed_tokens.weight"][inputs.tokens]], dim=1)
    period = 4e-3 * 1000.0 ** torch.linspace(0, 1, 16, dtype=torch.float64)
    angle = 2 * torch.pi * flow_time.double()[:, None] / period
    time = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    suffix, condition = policy.action_in_proj(x_t), None
    starts = [0] * prefix.shape[1]
    if config.adaptive:
        condition = functional.silu(policy.time_mlp_out(functional.silu(policy.time_mlp_in(time))))
    else:
        both = torch.cat([suffix, time[:, None].expand_as(suffix)], dim=2)
        suffix = policy.action_time_mlp_out(functional.silu(policy.action_time_mlp_in(both)))
        state = policy.state_proj(functional.pad(inputs.state, (0, 2)))[:, None]
        suffix, starts = torch.cat([state, suffix], dim=1), [*starts, 1]
    block = torch.tensor([*starts, 1, 0, 0, 0, 0]).cumsum(0)
    counts = torch.cat([torch.ones(seen.shape[:2]) > 0, inputs.tokens != 0, torch.ones(suffix.shape[:2]) > 0], dim=1)
    looks = (block[None] <= block[:, None]) & counts[:, None]
    positions, split = counts.cumsum(1) - 1, [prefix.shape[1], suffix.shape[1]]
    xs = {"language_model": prefix, "expert": suffix}

    def norm(tower, name):
        key = f"{tower}.{name}"
        adaptive = tower == "expert" and config.adaptive
        weight = (w[f"{key}.dense.weight"], w[f"{key}.dense.bias"]) if adaptive else w[f"{key}.weight"]
        return rms(xs[tower], weight, condition if adaptive else None)

    for i in range(config.language.depth):
        q, k, v, gates = [], [], [], []
        for tower in xs:
            normed, gate = norm(tower, f"layers.{i}.input_layernorm")
            gates.append(gate)
            for parts, name in ((q, "q"), (k, "k"), (v, "v")):
                parts.append((normed @ w[f"{tower}.layers.{i}.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, 16)))
        q, k = turn(torch.cat(q, dim=1), positions), turn(torch.cat(k, dim=1), positions)
        scores = torch.einsum("nqhd,nkd->nhqk", q, k[:, :, 0]) / 4.0
        weights = scores.masked_fill(~looks[:, None], -torch.inf).softmax(-1)
        out = torch.einsum("nhqk,nkd->nqhd", weights, torch.cat(v, dim=1)[:, :, 0]).flatten(2).split(split, dim=1)
        for tower, y, gate in zip(xs, out, gates, strict=True):
            xs[tower] = xs[tower] + gate * (y @ w[f"{tower}.layers.{i}.self_attn.o_proj.weight"].T)
            normed, gate = norm(tower, f"layers.{i}.post_attention_layernorm")
            gate_proj, up, down = (w[f"{tower}.layers.{i}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
            hidden = functional.gelu(normed @ gate_proj.T, approximate="tanh") * (normed @ up.T)
            xs[tower] = xs[tower] + gate * (hidden @ down.T)
    return policy.action_out_proj(norm("expert", "norm")[0][:, -5:])


@BOTH
def test_the_cached_velocity_equals_one_joint_pass(config):
    policy = make(config)
    inputs, x_t, time = policy.preprocess(observation()), torch.randn(3, 5, 7), torch.tensor([1.0, 0.4, 0.0])
    with torch.no_grad():
        out = policy.velocity(policy.encode(inputs), x_t, time)
        expected = joint_velocity(policy, inputs, x_t, time)
    assert expected.std() > 0.2
    difference = (out.velocity - expected).abs().max().item()
    assert difference < 2e-6 * expected.abs().max(), difference
    torch.testing.assert_close(policy.action_out_proj(out.hidden), out.velocity)
    assert out.hidden.shape == (3, 5, policy.hidden_dim)


# ------------------------------------------------------------------------------------------------------------- inputs
def test_leaving_out_a_missing_camera_is_exact():
    """The public model computes a black picture and masks its tokens; they take no position, so they are left out."""
    policy = make(SMALL)
    inputs, x_t, time = policy.preprocess(observation()), torch.randn(3, 5, 7), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        seen = policy.with_image_tokens(inputs).image_tokens
        black = policy.projector(policy.vision(torch.full((3, 3, 28, 28), -1.0)))
        text = policy.language_model.embed(inputs.tokens)
        counts = torch.cat([torch.ones(3, 8) > 0, torch.zeros(3, 4) > 0, inputs.tokens != 0], dim=1)
        mask = block_mask(counts, torch.zeros(24) > 0)
        hidden, layers = policy.language_model.prefill(torch.cat([seen, black, text], 1), positions_of(counts), mask)
        padded, ours = make_prefix(hidden, layers, counts, inputs.state), policy.encode(inputs)
        assert padded.mask.shape[1] == ours.mask.shape[1] + 4
        velocity = policy.velocity(ours, x_t, time).velocity
        assert (velocity - policy.velocity(padded, x_t, time).velocity).abs().max() < 1e-6
    torch.testing.assert_close(ours.pooled, padded.pooled)


def test_who_knows_the_state():
    """pi0 by a token, pi0.5 by its prompt, the public LIBERO checkpoint of pi0.5 not at all."""
    blind = dataclasses.replace(PI05, prompt=PromptConfig())
    noise, changes = torch.randn(3, 5, 7), []
    for config in (SMALL, PI05, blind):
        policy, obs = make(config), observation()
        other = dataclasses.replace(obs, state=obs.state + 0.3)
        changes.append((policy.act(obs, noise).actions - policy.act(other, noise).actions).abs().max().item())
    assert min(changes[:2]) > 1e-3
    assert changes[2] == 0.0


@BOTH
def test_image_tokens_stand_for_pictures(config):
    policy = make(config)
    inputs = policy.preprocess(observation())
    seen = policy.with_image_tokens(inputs)
    assert (dict(seen.images), tuple(seen.image_tokens.shape)) == ({}, (3, 8, 64))
    ours, again = policy.encode(inputs), policy.encode(policy.with_image_tokens(seen).select(torch.tensor([2, 0, 1])))
    order = torch.tensor([1, 2, 0])
    torch.testing.assert_close(again.select(order).pooled, ours.pooled, rtol=1e-5, atol=1e-6)
    same = policy.encode(seen)
    assert torch.equal(same.pooled, ours.pooled)
    assert equal_layers(same, ours)


@BOTH
def test_prefix_and_pooled(config):
    policy = make(config)
    require(policy, FlowPolicy, HasVisionTokens, HasSupervisedLoss, LearnsFromPrefix, by="test")
    inputs = policy.preprocess(observation())
    prefix = policy.encode(inputs)
    assert prefix.tokens.shape == (*inputs.tokens.shape[:1], 8 + inputs.tokens.shape[1], 0)
    assert prefix.mask.sum(1).tolist() == (8 + (inputs.tokens != 0).sum(1)).tolist()
    assert prefix.pooled.shape == (3, policy.feature_dim)
    assert torch.equal(prefix.pooled[:, 64:], inputs.state)
    assert chunk_shape(policy) == (5, 7)
    assert prefix.layers[0].keys.shape == (3, 1, prefix.mask.shape[1], 16)


def test_actions_are_normalised_then_padded():
    policy = make(SMALL)
    scale = Normalizer("mean_std", torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.full((4,), 2.0))
    policy.set_normalization(Normalizer("identity", torch.zeros(6), torch.ones(6)), scale)
    actions = torch.randn(2, 5, 4)
    chunk = policy.normalize_actions(actions)
    torch.testing.assert_close(chunk[..., :4], (actions - torch.tensor([1.0, 2.0, 3.0, 4.0])) / 2.0)
    assert not chunk[..., 4:].any()
    torch.testing.assert_close(policy.unnormalize_actions(chunk), actions)
    obs, noise = observation(), torch.randn(3, 5, 7)
    chunk = ode(policy, policy.encode(policy.preprocess(obs)), noise, 10)[..., :4]
    torch.testing.assert_close(policy.act(obs, noise).actions, chunk * 2.0 + torch.tensor([1.0, 2.0, 3.0, 4.0]))


# ----------------------------------------------------------------------------------------------------------- training
def test_what_is_frozen():
    policy = make(SMALL)
    assert not policy.encoder_is_frozen
    assert not policy.vision_is_frozen
    policy.vision.requires_grad_(False)
    assert not policy.vision_is_frozen  # the projector is part of what is cached
    policy.freeze_encoder()
    assert policy.encoder_is_frozen
    assert policy.vision_is_frozen
    learning = {name.split(".")[0] for name, p in policy.named_parameters() if p.requires_grad}
    heads = {"action_in_proj", "action_out_proj", "state_proj", "action_time_mlp_in", "action_time_mlp_out"}
    assert learning == heads | {"expert"}
    assert not any(x.requires_grad for kv in policy.encode(policy.preprocess(observation())).layers for x in kv)


@BOTH
def test_every_parameter_that_is_not_frozen_learns(config):
    policy = make(config)
    inputs, actions = policy.preprocess(observation()), policy.normalize_actions(torch.randn(3, 5, 4))
    policy.supervised_loss(inputs, actions, torch.ones(3, 5) > 0, torch.Generator().manual_seed(0)).sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("loss_on_padding", [True, False])
def test_supervised_loss_by_hand(loss_on_padding):
    flow_matching = FlowMatchingConfig(num_draws=2)
    policy = make(dataclasses.replace(SMALL, loss_on_padding=loss_on_padding, flow_matching=flow_matching))
    inputs, actions = policy.preprocess(observation()), policy.normalize_actions(torch.randn(3, 5, 4))
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    with torch.no_grad():
        loss = policy.supervised_loss(inputs, actions, mask, torch.Generator().manual_seed(3))
        g = torch.Generator().manual_seed(3)
        time = 0.001 + 0.999 * torch.rand(6, generator=g) ** (2 / 3)
        noise, expected = torch.randn(6, 5, 7, generator=g), torch.zeros(3)
        for i in range(3):
            length = int(mask[i].sum())
            held = torch.cat([actions[i, :length], actions[i, length - 1].expand(5 - length, 7)])
            prefix = policy.encode(inputs.select(torch.tensor([i])))
            for row in (i, 3 + i):
                x_t = time[row] * noise[row] + (1 - time[row]) * held
                velocity = policy.velocity(prefix, x_t[None], time[row : row + 1]).velocity[0]
                error = (velocity - (noise[row] - held)).square()[:length, : 7 if loss_on_padding else 4]
                expected[i] += error.mean() / 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@BOTH
def test_training_reduces_the_loss(config):
    torch.manual_seed(0)
    check_training(Pi0(config), observation(8))


@pytest.mark.parametrize("low_precision", [(), ("vision", "projector", "language_model")], ids=["float32", "bf16_vlm"])
def test_ratio_is_one_at_the_first_epoch(low_precision):
    """Measured: 2e-5 with both."""
    torch.manual_seed(0)
    policy = scatter(Pi0(Pi0Config(state_dim=6, action_dim=4, cameras=("base", "wrist"))))
    for name in low_precision:
        policy.get_submodule(name).to(torch.bfloat16)
    check_ratios(policy, observation(8, size=64), torch.bfloat16 if low_precision else torch.float32)


@BOTH
def test_float32_norms_beside_bfloat16_matrices(config):
    """As openpi keeps them. Actions, velocities and pooled features are float32 all the same."""
    policy = make(config)
    inputs, x_t, time = policy.preprocess(observation()), torch.randn(3, 5, 7), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        expected = policy.velocity(policy.encode(inputs), x_t, time)
        for part in (policy.vision.layers, policy.projector, policy.language_model, policy.expert):
            for name, module in part.named_modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and "norm" not in name:
                    module.to(torch.bfloat16)
        prefix = policy.encode(inputs)
        out = policy.velocity(prefix, x_t, time)
    assert {out.velocity.dtype, out.hidden.dtype, prefix.pooled.dtype, prefix.tokens.dtype} == {torch.float32}
    assert prefix.layers[1].values.dtype == torch.bfloat16
    difference = (out.velocity - expected.velocity).abs().max() / expected.velocity.std()
    assert 0 < difference < 0.05, difference


def test_velocity_has_no_branch_on_data():
    check_no_branch_on_data(make(PI05), observation())


# ---------------------------------------------------------------------------------------------------- files and sizes
@BOTH
def test_saved_and_loaded_bit_for_bit(config, tmp_path):
    policy = make(config)
    policy.set_normalization(
        Normalizer("mean_std", torch.randn(6), torch.rand(6) + 0.5),
        Normalizer("quantiles", torch.randn(4), torch.rand(4) + 0.5),
    )
    save_policy(policy, tmp_path)
    again = load_policy(tmp_path)
    assert again.config == config
    obs, noise = observation(), torch.randn(3, 5, 7)
    assert torch.equal(again.act(obs, noise).actions, policy.act(obs, noise).actions)


def test_built_for_an_environment():
    policy = build_policy(Pi0Config(), ARM, seed=0)
    assert sum(p.numel() for p in policy.parameters()) < 600_000
    obs = any_observation(2, cameras=("front",), size=48, state_dim=3)
    assert policy.act(obs, torch.randn(2, 50, 32)).actions.shape == (2, 50, 2)


def test_real_sizes():
    """Of every parameter that a checkpoint fills; transformers also has the expert's unused embedding of words."""

    def count(module):
        return sum(p.numel() for p in module.parameters())

    sizes = {variant: dataclasses.replace(pi0_size(variant), state_dim=8, action_dim=7) for variant in ("pi0", "pi05")}
    with torch.device("meta"):
        pi0, pi05, theirs = Pi0(sizes["pi0"]), Pi0(sizes["pi05"]), PI0ForConditionalGeneration(PI0Config())
    assert count(pi0) == 3_238_048_528 == count(theirs) - count(theirs.model.dit.embed_tokens)
    assert count(pi0.vision) + count(pi0.projector) + count(pi0.language_model) == 2_923_335_408  # PaliGemma 3B
    assert count(pi05) == 3_353_433_872
    assert pi0.config.vision.num_patches == 256


def test_configs_that_cannot_be():
    for message, changes in {
        "cameras must be at most 3": {"cameras": ("a", "b", "c", "d")},
        "must fit into": {"state_dim": 9},
        "head_dim 8 != 16": {"expert": dataclasses.replace(SMALL.expert, head_dim=8)},
        "a state in the prompt is pi0.5's": {"prompt": PromptConfig("state")},
        "leave it at 0": {"expert": dataclasses.replace(SMALL.expert, condition_width=32)},
    }.items():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match="unknown Gemma variant 'gemma_7b'"):
        gemma("gemma_7b")
