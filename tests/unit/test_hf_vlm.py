"""Flow and token heads on models of transformers, each family tiny and with random weights."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers.models import BPE
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.unit.tiny_vlms import VLMS, vlm_json
from vla_rl.core import Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.flow.sampler import FlowSampler
from vla_rl.onpolicy.tokens import TokenSampler, TokenSamplerConfig
from vla_rl.policies.blocks.expert import ActionExpertConfig
from vla_rl.policies.checkpoints.native import load_policy, save_policy
from vla_rl.policies.hf_backbone import HFBackboneConfig, _patches
from vla_rl.policies.hf_vlm import HFFlowConfig, HFFlowPolicy, HFTokenConfig, HFTokenPolicy, TokenHeadConfig
from vla_rl.protocols import FlowPolicy, HasSupervisedLoss, HasVisionTokens, LearnsFromPrefix, TokenPolicy, require

CAMERAS = ("agent", "wrist")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def backbone(name, **changes):
    return HFBackboneConfig(vlm_json(name), image_size=56, prefix_width=32, **changes)


def flow_policy(name):
    torch.manual_seed(0)
    expert = ActionExpertConfig(width=32, num_layers=2)
    config = HFFlowConfig(3, 2, CAMERAS, action_horizon=4, num_steps=2, backbone=backbone(name), expert=expert)
    policy = HFFlowPolicy(config)
    torch.nn.init.normal_(policy.expert.action_out.weight, std=0.1)
    return policy.eval()


def token_policy(name, decoding="parallel"):
    torch.manual_seed(0)
    head = TokenHeadConfig(num_bins=16, decoding=decoding, width=32, num_layers=2)
    policy = HFTokenPolicy(HFTokenConfig(3, 2, CAMERAS, action_horizon=3, backbone=backbone(name), head=head))
    torch.nn.init.normal_(policy.action_head.logits_out.weight, std=0.3)
    return policy.eval()


def observation(n=3):
    g = torch.Generator().manual_seed(1)
    images = {c: torch.randint(0, 256, (n, 56, 56, 3), generator=g, dtype=torch.uint8) for c in CAMERAS}
    sentences = ("push", "pick up the red block", "go home")
    return Observation(images, torch.randn(n, 3, generator=g), tuple(sentences[i % 3] for i in range(n)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------- the same as theirs
@pytest.mark.parametrize("name", VLMS)
def test_hidden_states_are_those_of_transformers(name):
    """Where the state's token is that of a word, the sequence is one that their own forward can take."""
    policy = flow_policy(name)
    part = policy.encoder.backbone
    inputs = policy.preprocess(observation())
    words = part.vlm.get_input_embeddings()
    torch.nn.init.zeros_(part.state_in.weight)
    part.state_in.bias.data.copy_(words(torch.tensor(7)))
    ours, mask = part.hidden(inputs, part.image_tokens(inputs.images, CAMERAS))

    n = len(inputs)
    pictures = torch.tensor(part._picture_ids()).expand(n, -1)
    ids = torch.cat([pictures, inputs.tokens, torch.full((n, 1), 7)], dim=1)
    stacked = torch.stack([inputs.images[c] for c in CAMERAS], dim=1).float() / 127.5 - 1.0
    options = {"attention_mask": mask.long(), "input_ids": ids}
    if name.startswith("qwen"):
        pixels, grid = _patches(stacked.flatten(0, 1), part.vlm.config.vision_config)
        options |= {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == 299).int()}
    elif name == "paligemma":  # their positions count padding, ours do not
        positions = mask.long().cumsum(1).clamp_min(1)
        options |= {"pixel_values": stacked.flatten(0, 1), "token_type_ids": torch.zeros_like(ids)}
        options |= {"position_ids": positions}
    else:
        options |= {"pixel_values": stacked, "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
    theirs = part.vlm(**options).last_hidden_state
    assert mask.sum(dim=1).unique().numel() > 1
    torch.testing.assert_close(ours[mask], theirs[mask], atol=2e-6, rtol=1e-5)


def test_pictures_are_those_of_their_processors():
    image = torch.randint(0, 256, (3, 56, 56), dtype=torch.uint8, generator=generator())
    pixels = image[None].float() / 127.5 - 1.0
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "return_tensors": "pt"}
    siglip = SiglipImageProcessorPil(size={"height": 56, "width": 56})(image.numpy(), **half)["pixel_values"]
    torch.testing.assert_close(pixels, siglip, atol=1e-6, rtol=0)
    size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    theirs = Qwen2VLImageProcessorPil(size=size)(image.numpy(), **half)
    vision = AutoConfig.for_model("qwen3_vl", **VLMS["qwen3_vl"]).vision_config
    ours, grid = _patches(pixels, vision)
    torch.testing.assert_close(ours, theirs["pixel_values"], atol=1e-6, rtol=0)
    assert torch.equal(grid, theirs["image_grid_thw"])


# ------------------------------------------------------------------------------------------------------- every family
@pytest.mark.parametrize("name", VLMS)
def test_flow_head(name, tmp_path):
    policy, obs = flow_policy(name), observation()
    require(policy, FlowPolicy, HasVisionTokens, HasSupervisedLoss, LearnsFromPrefix, by="the test")
    inputs = policy.preprocess(obs)
    prefix = policy.encode(inputs)
    seen = policy.with_image_tokens(inputs)
    assert prefix.tokens.dtype == prefix.pooled.dtype == torch.float32
    assert prefix.pooled.shape == (3, policy.feature_dim)
    assert seen.images == {}
    assert torch.equal(policy.encode(seen).tokens, prefix.tokens)
    assert not torch.equal(prefix.tokens[0], policy.encode(policy.preprocess(observation(1)).select([0])).tokens * 0)

    sampler = FlowSampler(policy, FlowSamplerConfig(num_steps=2, mode="full"))
    with torch.no_grad():
        _, trace = sampler.sample(prefix.detach(), generator())
        ratio = torch.exp(sampler.score(prefix.detach(), trace).joint - trace.log_prob)
    torch.testing.assert_close(ratio, torch.ones(3), atol=1e-5, rtol=0)

    policy.set_normalization(
        Normalizer("mean_std", torch.ones(3), torch.full((3,), 2.0)),
        Normalizer("min_max", torch.zeros(2), torch.full((2,), 3.0)),
    )
    save_policy(policy, tmp_path)
    noise = torch.randn(3, 4, 2, generator=generator())
    assert torch.equal(load_policy(tmp_path).act(obs, noise).actions, policy.act(obs, noise).actions)


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
@pytest.mark.parametrize("name", VLMS)
def test_token_head(name, decoding, tmp_path):
    policy, obs = token_policy(name, decoding), observation()
    require(policy, TokenPolicy, HasVisionTokens, HasSupervisedLoss, LearnsFromPrefix, by="the test")
    prefix = policy.encode(policy.preprocess(obs)).detach()
    sampler = TokenSampler(policy, TokenSamplerConfig(temperature=1.3))
    actions, trace = sampler.sample(prefix, generator())
    assert actions.shape == (3, 3, 2)
    assert trace.bins.unique().numel() > 4
    with torch.no_grad():
        ratio = torch.exp(sampler.score(prefix, trace).joint - trace.log_prob)
    torch.testing.assert_close(ratio, torch.ones(3), atol=2e-5, rtol=0)
    assert torch.equal(policy.bins_of_actions(actions), trace.bins)

    changed = trace.bins.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 16
    difference = (policy.token_logits(prefix, changed) - policy.token_logits(prefix, trace.bins)).abs().amax(dim=(0, 2))
    assert bool((difference[:3] == 0).all())
    assert bool((difference[3:] > 0).all()) == (decoding == "autoregressive")
    save_policy(policy, tmp_path)
    noise = torch.zeros(3, 3, 2)
    assert torch.equal(load_policy(tmp_path).act(obs, noise).actions, policy.act(obs, noise).actions)


@pytest.mark.parametrize("name", VLMS)
def test_gradients_reach_every_part_that_learns(name):
    """With one backward pass, and none of it where the encoder is frozen."""
    policy = flow_policy(name)
    inputs, actions = policy.preprocess(observation()), torch.randn(3, 4, 2, generator=generator())
    mask = torch.ones(3, 4, dtype=torch.bool)
    policy.supervised_loss(inputs, actions, mask, generator()).mean().backward()
    without = [n for n, p in policy.encoder.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert not without
    assert not policy.encoder_is_frozen
    assert not policy.vision_is_frozen
    policy.zero_grad()
    policy.freeze_encoder()
    policy.supervised_loss(inputs, actions, mask, generator()).mean().backward()
    assert policy.encoder_is_frozen
    assert policy.vision_is_frozen
    assert all(p.grad is None for p in policy.encoder.parameters())


@pytest.mark.parametrize("make", [flow_policy, token_policy])
@pytest.mark.parametrize("name", ["paligemma", "smolvlm", "qwen2_5_vl", "qwen3_vl"])
def test_supervised_loss_falls(name, make):
    """On actions that only the sentence tells apart."""
    policy, obs = make(name).train(), observation()
    inputs, horizon = policy.preprocess(obs), policy.action_horizon
    actions = torch.tensor([-0.8, 0.0, 0.8])[:, None, None].expand(3, horizon, 2)
    mask = torch.ones(3, horizon, dtype=torch.bool)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        loss = policy.supervised_loss(inputs, actions, mask, generator()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.35 * losses[0], (losses[0], losses[-1])


def test_padding_has_no_effect():
    """What comes after a shorter prompt, and a longer limit of it, change neither tokens nor actions."""
    policy = flow_policy("qwen3_vl")
    inputs = policy.preprocess(observation())
    prefix = policy.encode(inputs)
    more = functional.pad(inputs.tokens, (0, 5))
    longer = policy.encode(type(inputs)(inputs.images, more, inputs.state))
    torch.testing.assert_close(longer.pooled, prefix.pooled, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(longer.tokens[:, -1], prefix.tokens[:, -1], atol=2e-6, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("name", VLMS)
def test_a_folder_of_transformers(name, tmp_path):
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **VLMS[name]))
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4] * 3})
    )
    words = TokenizersTokenizer(BPE(vocab={"<pad>": 0, "g": 1, "o": 2, "\n": 3, "go": 4}, merges=[("g", "o")]))
    words.save(str(tmp_path / "tokenizer.json"))
    config = HFFlowConfig(3, 2, CAMERAS, action_horizon=4, backbone=HFBackboneConfig(image_size=56, prefix_width=32))
    policy = HFFlowPolicy.from_folder(tmp_path, config)
    own = policy.encoder.backbone.vlm.state_dict()
    theirs = {k.removeprefix("model."): v for k, v in model.state_dict().items() if k.startswith("model.")}
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[k], theirs[k]) for k in own)
    assert policy.config.backbone.image_mean == (0.1, 0.2, 0.3)
    assert policy.encoder.inputs.tokenizer.ids("go\n") == [1, 4, 3]
    save_policy(policy, tmp_path / "ours")
    obs = Observation(observation(1).images, observation(1).state, ("go",))
    noise = torch.randn(1, 4, 2, generator=generator())
    assert torch.equal(load_policy(tmp_path / "ours").act(obs, noise).actions, policy.act(obs, noise).actions)

    fewer = HFFlowPolicy.from_folder(tmp_path, config, num_layers=1)
    assert len(fewer.encoder.backbone.language_model.layers) == 1
    assert torch.equal(
        fewer.encoder.backbone.language_model.norm.weight, policy.encoder.backbone.language_model.norm.weight
    )


def test_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="model_type None"):
        HFFlowPolicy(HFFlowConfig(3, 2))
    with pytest.raises(ValueError, match=r"one of .*'qwen3_vl'"):
        HFFlowPolicy(HFFlowConfig(3, 2, backbone=HFBackboneConfig(json.dumps({"model_type": "llama"}))))
    with pytest.raises(ValueError, match="multiples of 28"):
        HFFlowPolicy(HFFlowConfig(3, 2, backbone=HFBackboneConfig(vlm_json("qwen3_vl"), image_size=60)))
    few = VLMS["smolvlm"] | {"text_config": VLMS["smolvlm"]["text_config"] | {"vocab_size": 200}, "image_token_id": 199}
    with pytest.raises(ValueError, match="gives 259 ids, the model knows 200"):
        HFFlowPolicy(HFFlowConfig(3, 2, backbone=HFBackboneConfig(json.dumps(few | {"model_type": "smolvlm"}))))
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        HFFlowPolicy.from_folder(tmp_path, HFFlowConfig(3, 2))
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("paligemma", **VLMS["paligemma"]))
    state = {k: v for k, v in model.state_dict().items() if "multi_modal_projector" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"missing or of another shape: .*multi_modal_projector"):
        HFFlowPolicy.from_folder(tmp_path, HFFlowConfig(3, 2))
