"""OpenVLA-OFT against an assembly of plain towers and transformers' Llama with a bidirectional mask; its heads, and
training."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional

from tests.unit import openvla_public as public
from tests.unit.test_checkpoint_openvla import oft_folder
from tests.unit.test_openvla import fit, observation, spec
from vla_rl.flow.sampler import GaussianSampler
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.native import load_policy, save_policy
from vla_rl.policies.checkpoints.openvla import OpenVLAOptions, read_openvla
from vla_rl.policies.openvla_oft import (
    OpenVLAOFT,
    OpenVLAOFTConfig,
    OpenVLAOFTTokens,
    OpenVLAOFTTokensConfig,
    ParallelConfig,
    parallel_7b,
)
from vla_rl.protocols import GaussianPolicy, HasSupervisedLoss, HasVisionTokens, LearnsFromPrefix, TokenPolicy, require

torch.set_num_threads(1)


# --------------------------------------------------------------------------------------------------------------- parity
def public_slots(folder, tensors, obs, row, *, num_slots, proprio=None, film=False):
    """Hidden states that the public code reads for the slots of one observation: [num_slots, width]."""
    llama = public.llama(tensors)
    words = llama.get_input_embeddings()
    ids = public.prompt_ids(folder, obs.instruction[row])
    embedded = words(torch.tensor([ids]))
    stop = words(torch.tensor([[2]]))
    sentence = torch.cat([embedded, stop], dim=1).mean(1) if film else None
    seen = [public.image_tokens(tensors, obs.images["agent"][row : row + 1], sentence)]
    if proprio is not None:
        low, high = (torch.tensor(public.STATISTICS["toy"]["proprio"][name]) for name in ("q01", "q99"))
        state = (2 * (obs.state[row] - low) / (high - low + 1e-8) - 1).clamp(-1, 1)
        seen.append(public.dense(proprio, "fc2", functional.gelu(public.dense(proprio, "fc1", state)))[None, None])
    x = torch.cat([embedded[:, :1], *seen, embedded[:, 1:], torch.zeros(1, num_slots, public.WIDTH), stop], dim=1)
    everything = torch.zeros(1, 1, x.shape[1], x.shape[1])  # additive: nothing is masked
    hidden = llama.model(inputs_embeds=x, attention_mask=everything).last_hidden_state[0]
    start = sum(part.shape[1] for part in seen) + len(ids) - 1
    return hidden[start : start + num_slots], llama


def public_head(head, x):
    x = functional.relu(public.dense(head, "model.fc1", public.layer_norm(head, "model.layer_norm1", x, 1e-5)))
    for i in range(2):
        block = f"model.mlp_resnet_blocks.{i}.ffn."
        x = x + functional.relu(public.dense(head, f"{block}1", public.layer_norm(head, f"{block}0", x, 1e-5)))
    return public.dense(head, "model.fc2", public.layer_norm(head, "model.layer_norm2", x, 1e-5))


@torch.no_grad()
@pytest.mark.parametrize("film", [False, True])
def test_regressed_chunks_are_those_of_the_public_model(tmp_path, film):
    tensors, head, proprio = oft_folder(tmp_path, film)
    policy = read_openvla(tmp_path, openvla=OpenVLAOptions(center_crop=1.0))
    obs = observation()
    mean, _ = policy.distribution(policy.encode(policy.preprocess(obs)))
    for row in range(3):
        hidden, _ = public_slots(tmp_path, tensors, obs, row, num_slots=56, proprio=proprio, film=film)
        expected = public_head(head, hidden.reshape(8, 7 * public.WIDTH))
        torch.testing.assert_close(mean[row], expected, rtol=0, atol=1e-5)
    assert torch.equal(policy.act(obs, torch.zeros(3, 8, 7)).actions, policy.unnormalize_actions(mean))


@torch.no_grad()
def test_token_logits_are_those_of_the_public_model(tmp_path):
    torch.manual_seed(0)
    tensors = public.model_tensors()
    public.write_folder(tmp_path, tensors)
    policy = read_openvla(tmp_path, openvla=OpenVLAOptions(decoding="parallel", action_horizon=2, center_crop=1.0))
    require(policy, TokenPolicy, HasVisionTokens, HasSupervisedLoss, LearnsFromPrefix, by="the test")
    obs = observation()
    prefix = policy.encode(policy.preprocess(obs))
    logits = policy.token_logits(prefix, torch.zeros(3, 14, dtype=torch.int64))
    assert logits.shape == (3, 14, 256)
    for row in range(3):
        hidden, llama = public_slots(tmp_path, tensors, obs, row, num_slots=14)
        expected = llama.lm_head(hidden)[:, public.FIRST_ACTION : public.FIRST_ACTION + 256].flip(-1)
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-5)
    positions = []

    def draw(scores, position):
        torch.testing.assert_close(scores, logits[:, position], rtol=0, atol=1e-5)
        positions.append(position)
        return scores.argmax(-1)

    bins = policy.sample_tokens(prefix, draw)
    assert positions == list(range(14))
    greedy = policy.act(obs, torch.randn(3, 2, 7)).actions
    assert torch.equal(greedy, policy.unnormalize_actions(policy.actions_of_bins(bins)))


# ---------------------------------------------------------------------------------------------------------------- heads
@pytest.mark.parametrize("family", ["gaussian", "laplace"])
def test_noise_becomes_the_family_around_the_regressed_chunk(family):
    policy = build_policy(OpenVLAOFTConfig(noise_family=family, initial_std=0.2), spec(), seed=0)
    assert GaussianSampler(policy).family == family  # what is explored is what is deployed
    require(policy, GaussianPolicy, HasVisionTokens, HasSupervisedLoss, LearnsFromPrefix, by="the test")
    assert not isinstance(policy, TokenPolicy)
    obs, noise = observation(), torch.zeros(3, 8, 7)
    mean, std = policy.distribution(policy.encode(policy.preprocess(obs)))
    torch.testing.assert_close(std, torch.full((3, 8, 7), 0.2))
    torch.testing.assert_close(policy.act(obs, noise).actions, mean[..., :4].detach())
    noise[:, 0, 0] = 1.0
    # The quantile Phi(1) = 0.8413447 of a Laplace density of scale b is -b ln(2 (1 - 0.8413447)).
    expected = 0.2 if family == "gaussian" else 0.2 / 2**0.5 * 1.147874
    moved = policy.act(obs, noise).actions - mean[..., :4].detach()
    torch.testing.assert_close(moved[:, 0, 0], torch.full((3,), expected), rtol=0, atol=1e-5)
    assert moved[:, 1:].abs().max() < 1e-6


def test_drawn_and_scored_log_probabilities_agree_and_gradients_reach_the_deviation():
    policy = build_policy(OpenVLAOFTConfig(action_horizon=3), spec(), seed=0)
    sampler = GaussianSampler(policy)
    prefix = policy.encode(policy.preprocess(observation()))
    _, trace = sampler.sample(prefix, torch.Generator().manual_seed(0))
    score = sampler.score(prefix, trace)
    assert (torch.exp(score.joint - trace.log_prob) - 1).abs().max() < 1e-5
    score.joint.sum().backward()
    deviation = policy.get_parameter("std_logit").grad
    assert deviation[:, :4].abs().min() > 0
    assert deviation[:, 4:].abs().max() == 0  # padding is not scored
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)
    assert policy.vlm.vision.featurizer.patch_embedding.weight.grad.abs().max() > 0


def test_deviations_and_families_are_checked():
    with pytest.raises(ValueError, match="std_min < initial_std < std_max"):
        OpenVLAOFTConfig(initial_std=2.0)
    with pytest.raises(ValueError, match="family is 'cauchy'"):
        OpenVLAOFTConfig(noise_family="cauchy")


# ------------------------------------------------------------------------------------------------- prefix and training
@torch.no_grad()
def test_the_state_is_one_token_between_pictures_and_prompt():
    torch.manual_seed(0)
    policy = OpenVLAOFT(OpenVLAOFTConfig(3, 4, body=ParallelConfig(clip_state=True)))
    obs = observation()
    inputs = policy.preprocess(obs)
    prefix = policy.encode(inputs)
    assert prefix.tokens.dtype == torch.float32
    assert not prefix.layers
    far = dataclasses.replace(inputs, state=torch.where(inputs.state.abs() > 1, 5 * inputs.state, inputs.state))
    assert torch.equal(policy.encode(far).tokens, prefix.tokens)  # beyond the published range nothing changes
    other = policy.encode(dataclasses.replace(inputs, state=-inputs.state))
    changed = (other.tokens - prefix.tokens).abs().amax((0, 2)) > 0
    assert changed.nonzero().flatten().tolist() == [1 + 16]
    assert torch.equal(prefix.tokens[:, 0], policy.vlm.decoder.embed(inputs.tokens)[:, 0])
    blind = OpenVLAOFT(OpenVLAOFTConfig(3, 4, body=ParallelConfig(proprio=False)))
    assert blind.encode(blind.preprocess(obs)).tokens.shape[1] == prefix.tokens.shape[1] - 1


@torch.no_grad()
def test_every_slot_depends_on_every_token_and_on_no_padding():
    torch.manual_seed(0)
    policy = OpenVLAOFTTokens(OpenVLAOFTTokensConfig(3, 4, action_horizon=2, chunk_dim=4))
    prefix = policy.encode(policy.preprocess(observation()))
    slots = policy.body.slots(prefix)
    for token in (0, 1, 17, 30):
        tokens = prefix.tokens.clone()
        tokens[:, token] += 1.0
        difference = policy.body.slots(dataclasses.replace(prefix, tokens=tokens)) - slots
        assert difference.abs().amax(2).min() > 1e-6
    padded = torch.where(prefix.mask.unsqueeze(-1), prefix.tokens, 7.0)
    assert torch.equal(policy.body.slots(dataclasses.replace(prefix, tokens=padded)), slots)


@pytest.mark.parametrize("kind", [OpenVLAOFTConfig, OpenVLAOFTTokensConfig])
def test_supervised_loss_falls_with_a_frozen_encoder(kind):
    policy = build_policy(kind(action_horizon=2), spec(), seed=0)
    policy.freeze_encoder()
    assert policy.encoder_is_frozen
    assert policy.vision_is_frozen
    obs = observation()
    before = policy.encode(policy.preprocess(obs))
    actions = policy.normalize_actions(torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    losses = fit(policy, obs, actions, steps=80)
    assert losses[-1] < 0.25 * losses[0]
    assert torch.equal(before.tokens, policy.encode(policy.preprocess(obs)).tokens)
    error = policy.act(obs, torch.zeros(3, 2, 7)).actions - policy.unnormalize_actions(actions)
    assert error.abs().mean() < 0.1


def test_padded_steps_bear_no_loss():
    policy = build_policy(OpenVLAOFTConfig(action_horizon=2), spec(), seed=0)
    inputs, actions = policy.preprocess(observation()), torch.rand(3, 2, 7)
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    mean, _ = policy.distribution(policy.encode(inputs))
    loss = policy.supervised_loss(inputs, actions, mask, torch.Generator())
    error = (mean - actions).abs().mean(2)
    torch.testing.assert_close(loss, torch.stack([error[0].mean(), error[1, 0], torch.zeros(())]))


def test_with_film_the_sentence_is_part_of_the_vision():
    torch.manual_seed(0)
    body = ParallelConfig(vlm=ParallelConfig().vlm.with_film())
    policy = OpenVLAOFT(OpenVLAOFTConfig(3, 4, body=body))
    inputs = policy.preprocess(observation())
    seen = policy.with_image_tokens(inputs)
    torch.testing.assert_close(policy.encode(seen).tokens, policy.encode(inputs).tokens)
    swapped = dataclasses.replace(inputs, tokens=inputs.tokens.flip(0))
    assert not torch.allclose(policy.with_image_tokens(swapped).image_tokens[0], seen.image_tokens[0], atol=1e-4)
    policy.vlm.vision.requires_grad_(False)
    policy.vlm.projector.requires_grad_(False)
    assert not policy.vision_is_frozen  # the embedding of the sentence still moves
    policy.vlm.decoder.embed_tokens.requires_grad_(False)
    assert policy.vision_is_frozen


@pytest.mark.parametrize("config", [OpenVLAOFTConfig(), OpenVLAOFTTokensConfig()])
def test_round_trip_in_the_projects_own_layout(tmp_path, config):
    policy = build_policy(config, spec(), seed=0)
    save_policy(policy, tmp_path)
    assert "body" in json.loads((tmp_path / "config.json").read_text())["config"]
    again = load_policy(tmp_path)
    assert again.config == policy.config
    assert all(torch.equal(a, again.state_dict()[k]) for k, a in policy.state_dict().items())


def test_size_of_the_published_model():
    with torch.device("meta"):
        policy = OpenVLAOFT(OpenVLAOFTConfig(8, 7, body=parallel_7b()))
    head = sum(p.numel() for p in policy.action_head.parameters())
    # LayerNorm of 28,672, to 4096, two blocks of 4096, LayerNorm, to 7; and the state's projector, 8 to 4096 to 4096
    assert head == 2 * 28_672 + (28_672 + 1) * 4096 + 2 * (2 * 4096 + 4097 * 4096) + 2 * 4096 + 4097 * 7
    assert sum(p.numel() for p in policy.body.proprio_projector.parameters()) == 9 * 4096 + 4097 * 4096
    assert sum(p.numel() for p in policy.vlm.parameters()) == 7_498_156_704
