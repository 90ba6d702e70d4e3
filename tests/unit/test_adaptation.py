"""What is trained, with which precision: adapters, frozen parts, bfloat16, recomputed layers, on several families."""

import copy
import json
import os
import pickle
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import pytest
import torch

from tests.unit.tiny_vlms import vlm_json
from vla_rl.configs import get_recipe
from vla_rl.core import Observation
from vla_rl.envs.config import EnvConfig
from vla_rl.flow.config import FlowSamplerConfig
from vla_rl.flow.sampler import FlowSampler
from vla_rl.onpolicy import ActorConfig, PPOConfig
from vla_rl.policies.adaptation import (
    AdaptationConfig,
    LoRAConfig,
    apply_adaptation,
    layers_of,
    load_adapter,
    merge_lora,
    part_of,
    plain_state_dict,
    save_adapter,
)
from vla_rl.policies.blocks.expert import ActionExpertConfig
from vla_rl.policies.blocks.tokenizer import TokenizerConfig
from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict
from vla_rl.policies.checkpoints.native import load_policy, save_policy
from vla_rl.policies.hf_backbone import HFBackboneConfig
from vla_rl.policies.hf_vlm import HFFlowConfig, HFFlowPolicy
from vla_rl.policies.openvla import OpenVLA, OpenVLAConfig
from vla_rl.policies.openvla_oft import OpenVLAOFT, OpenVLAOFTConfig, OpenVLAOFTTokens, OpenVLAOFTTokensConfig
from vla_rl.policies.pi0 import Pi0, Pi0Config
from vla_rl.policies.smolvla import SmolVLA, SmolVLAConfig
from vla_rl.train import sft
from vla_rl.train.check import check_recipe
from vla_rl.train.loop import TrainConfig
from vla_rl.train.recipe import DemosConfig, Recipe
from vla_rl.train.sft import SFTConfig
from vla_rl.train.stages import fine_tune, record_demos, reinforce

LORA = AdaptationConfig(train=("expert",), lora=LoRAConfig(rank=4, alpha=8.0))
FIRST = "language_model.layers.0.mlp.up_proj"
MASK = torch.ones(3, 4, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def pi0():
    torch.manual_seed(0)
    return Pi0(Pi0Config(3, 2, action_horizon=4, num_steps=2)).eval()


def adaptive_pi0():
    torch.manual_seed(0)
    policy = Pi0(Pi0Config(3, 2, action_horizon=4, num_steps=2, adaptive=True)).eval()
    for name, parameter in policy.named_parameters():
        if "norm.dense" in name:  # they begin closed
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def hf(name):
    torch.manual_seed(0)
    backbone = HFBackboneConfig(vlm_json(name), image_size=56, prefix_width=32)
    expert = ActionExpertConfig(width=32, num_layers=2)
    policy = HFFlowPolicy(HFFlowConfig(3, 2, action_horizon=4, num_steps=2, backbone=backbone, expert=expert))
    torch.nn.init.normal_(policy.expert.action_out.weight, std=0.1)
    return policy.eval()


def smolvla():
    torch.manual_seed(0)
    return SmolVLA(SmolVLAConfig(3, 2, action_horizon=4, num_steps=2)).eval()


FAMILIES = [
    pytest.param(smolvla, id="smolvla"),
    pytest.param(pi0, id="pi0"),
    pytest.param(adaptive_pi0, id="pi05"),
    pytest.param(lambda: hf("paligemma"), id="paligemma"),
    pytest.param(lambda: hf("smolvlm"), id="smolvlm"),
    pytest.param(lambda: hf("qwen3_vl"), id="qwen3_vl"),
]


def observation(n=3):
    g = torch.Generator().manual_seed(1)
    images = {"agent": torch.randint(0, 256, (n, 56, 56, 3), generator=g, dtype=torch.uint8)}
    return Observation(images, torch.randn(n, 3, generator=g), ("push", "pick up the red block", "go")[:n])


def noise(policy):
    return torch.randn(3, 4, getattr(policy, "noise_dim", 2), generator=torch.Generator().manual_seed(2))


def act(policy):
    return policy.act(observation(), noise(policy)).actions


def loss(policy):
    generator = torch.Generator().manual_seed(3)
    return policy.supervised_loss(policy.preprocess(observation()), noise(policy), MASK, generator).mean()


def train(policy, steps=3, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(policy).backward()
        optimizer.step()


# ------------------------------------------------------------------------------------------------------------ adapters
@pytest.mark.parametrize("make", FAMILIES)
def test_adapters_begin_with_the_policy_and_end_as_plain_weights(make, tmp_path):
    policy, plain = make(), make()
    apply_adaptation(policy, LORA)
    assert torch.equal(act(policy), act(plain))
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    train(policy)
    after = policy.state_dict()
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    adapters = {k for k in after if ".lora_" in k}
    assert adapters
    assert adapters <= moved
    assert {part_of(k) for k in moved - adapters} == {"expert"}
    assert {part_of(k) for k in adapters} == {"language_model"}
    changed = act(policy)
    assert float((changed - act(plain)).abs().max()) > 1e-3

    save_policy(policy, tmp_path)  # in the middle of training
    torch.testing.assert_close(act(load_policy(tmp_path)), changed, atol=1e-5, rtol=0)
    assert torch.equal(act(policy), changed)
    assert plain_state_dict(policy).keys() == plain.state_dict().keys()
    merge_lora(policy)
    assert policy.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(act(policy), changed, atol=1e-5, rtol=0)
    apply_adaptation(policy, LORA)  # and again, for the next stage
    torch.testing.assert_close(act(policy), changed, atol=1e-5, rtol=0)


def test_an_adapter_adds_alpha_over_rank_times_b_a():
    policy = pi0()
    apply_adaptation(policy, LORA)
    train(policy, steps=1)
    state = policy.state_dict()
    a, b = state[f"{FIRST}.lora_A.default.weight"], state[f"{FIRST}.lora_B.default.weight"]
    assert a.shape == (4, 96)
    merged = plain_state_dict(policy)[f"{FIRST}.weight"]
    torch.testing.assert_close(merged, state[f"{FIRST}.base_layer.weight"] + 2.0 * b @ a, atol=1e-7, rtol=1e-6)
    # the last layer's feed-forward is read by nobody: no adapter waits there for a gradient
    assert not hasattr(policy.get_submodule("language_model.layers.2.mlp.up_proj"), "lora_A")
    assert hasattr(policy.get_submodule("language_model.layers.2.self_attn.k_proj"), "lora_A")


def test_adapters_are_exchanged_in_the_layout_of_peft(tmp_path):
    policy = hf("qwen3_vl")
    apply_adaptation(policy, AdaptationConfig(train=(), lora=LORA.lora))
    train(policy)
    save_adapter(policy, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", 4, 8.0)
    ours = hf("qwen3_vl")
    load_adapter(ours, tmp_path)
    assert torch.equal(act(ours), act(policy))
    theirs = hf("qwen3_vl")
    peft.PeftModel.from_pretrained(theirs, str(tmp_path))  # puts the adapters into `theirs`
    assert torch.equal(act(theirs), act(policy))
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapter(ours, tmp_path)
    with pytest.raises(ValueError, match=r"has no linear layers .*language_model"):
        load_adapter(pi0(), tmp_path)
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapter(pi0(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_adapter(pi0(), tmp_path / "none")


def test_the_first_adapters_are_those_of_the_seed():
    first, second, other = (pi0() for _ in range(3))
    for policy, seed in ((first, 0), (second, 0), (other, 1)):
        apply_adaptation(policy, LORA, seed=seed)
    weights = [p.state_dict()[f"{FIRST}.lora_A.default.weight"] for p in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# ---------------------------------------------------------------------------------------------------------- the parts
@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("train_parts", [("expert",), ("language_model",), ("vision",)])
def test_only_the_named_parts_are_trained(make, train_parts):
    policy = make()
    own = {n for n, p in policy.named_parameters() if p.requires_grad}
    apply_adaptation(policy, AdaptationConfig(train=train_parts))
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained == {n for n in own if part_of(n) in train_parts}
    assert {part_of(n) for n in trained} == set(train_parts)
    assert policy.vision_is_frozen == ("vision" not in train_parts)
    loss(policy).backward()
    assert [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None] == []


def test_off_is_off():
    policy = pi0()
    apply_adaptation(policy, AdaptationConfig())
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), pi0().parameters(), strict=True))
    assert not any(m._forward_pre_hooks for m in policy.modules())
    assert config_from_dict(AdaptationConfig, json.loads(json.dumps(config_to_dict(LORA)))) == LORA


# ----------------------------------------------------------------------------------------------------------- precision
@pytest.mark.parametrize("make", FAMILIES)
def test_bfloat16_is_for_what_is_frozen(make, tmp_path):
    policy, plain = make(), make()
    config = AdaptationConfig(train=("expert",), lora=LORA.lora, precision="bfloat16")
    apply_adaptation(policy, config)
    lower = {n for n, p in policy.named_parameters() if p.dtype == torch.bfloat16}
    assert {part_of(n) for n in lower} >= {"vision", "language_model"}
    assert not any("norm" in n or "action" in n or "state" in n or ".lora_" in n for n in lower)
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)
    assert all(b.dtype == torch.float32 for b in policy.buffers() if b.is_floating_point())

    prefix = policy.encode(policy.preprocess(observation())).detach()
    output = policy.velocity(prefix, noise(policy), torch.rand(3))
    assert prefix.pooled.dtype == output.velocity.dtype == output.hidden.dtype == act(policy).dtype == torch.float32
    assert 0.0 < float((act(policy) - act(plain)).abs().max()) < 0.02

    train(policy, steps=2)
    save_policy(policy, tmp_path)
    merged = copy.deepcopy(policy)
    merge_lora(merged)
    loaded = load_policy(tmp_path)
    assert torch.equal(act(loaded), act(merged))
    assert {n for n, p in loaded.named_parameters() if p.dtype == torch.bfloat16} == {
        n.replace(".base_layer.", ".") for n in lower
    }


@pytest.mark.parametrize("make", FAMILIES)
def test_bfloat16_ratios_are_one_at_the_first_epoch(make):
    """Drawn in one batch and scored in another: what is left of the ratio is rounding of the frozen part."""
    policy = make()
    apply_adaptation(policy, AdaptationConfig(train=("expert",), precision="bfloat16"))
    sampler = FlowSampler(policy, FlowSamplerConfig(num_steps=4, mode="full"))
    inputs = policy.preprocess(observation())
    with torch.no_grad():
        _, trace = sampler.sample(policy.encode(inputs), torch.Generator().manual_seed(0))
        rows = torch.tensor([2, 0])
        again = sampler.score(policy.encode(inputs.select(rows)), trace.select(rows))
    assert float((again.joint - trace.log_prob[rows]).abs().max()) < 1e-4


def test_small_steps_of_a_trained_weight_are_not_lost():
    policy = pi0()
    apply_adaptation(policy, AdaptationConfig(train=("expert",), precision="bfloat16"))
    weight = policy.expert.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    train(policy, steps=1, lr=1e-6)
    moved = (weight != before) & (before.abs() > 0.01)
    assert float(moved.float().sum() / (before.abs() > 0.01).sum()) > 0.95
    assert bool((weight.bfloat16() == before.bfloat16()).float().mean() > 0.95)  # in bfloat16 they would be


OPENVLA = {
    "openvla": lambda: OpenVLA(OpenVLAConfig(3, 2, action_horizon=4, chunk_dim=2)),
    "oft": lambda: OpenVLAOFT(OpenVLAOFTConfig(3, 2, action_horizon=4, chunk_dim=2)),
    "oft_tokens": lambda: OpenVLAOFTTokens(OpenVLAOFTTokensConfig(3, 2, action_horizon=4, chunk_dim=2)),
}


@pytest.mark.parametrize("name", OPENVLA)
def test_openvla_learns_by_adapters_on_all_linear_layers(name, tmp_path):
    """As OFT trains it: towers, projector and language model have adapters; heads, if any, are trained whole."""
    torch.manual_seed(0)
    policy = OPENVLA[name]().eval()
    targets = (*LoRAConfig.targets, "out_proj", "fc1", "fc2", "fc3")
    lora = LoRAConfig(4, 2.0, targets, ("vision", "projector", "language_model"))
    heads = ("expert",) if name == "oft" else ()
    before = act(policy)
    apply_adaptation(policy, AdaptationConfig(heads, lora, "bfloat16"))
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert {part_of(n) for n in trained if ".lora_" in n} == set(lora.parts)
    assert {part_of(n) for n in trained if ".lora_" not in n} == set(heads)
    lower = {part_of(n) for n, p in policy.named_parameters() if p.dtype == torch.bfloat16}
    assert lower == set(lora.parts)
    assert act(policy).dtype == before.dtype == torch.float32
    loss(policy).backward()
    without = {n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None}
    assert without <= {"std_logit"}  # which the regression has no use for
    save_policy(policy, tmp_path)
    assert torch.equal(act(load_policy(tmp_path)), act(policy))


# -------------------------------------------------------------------------------------------------- memory and speed
def gradients_and_kept_bytes(policy):
    kept = {}

    def pack(x):
        if isinstance(x, torch.Tensor) and not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    for layer in layers_of(policy):  # what a recomputed layer begins with is kept outside of autograd's sight
        layer.register_forward_pre_hook(lambda _, inputs: [pack(x) for x in inputs] and None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = loss(policy)
    total = sum(kept.values())
    value.backward()
    return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}, total


@pytest.mark.parametrize("make", FAMILIES)
def test_recomputed_layers_give_the_same_gradients_with_less_memory(make):
    policy, whole = make(), make()
    apply_adaptation(policy, AdaptationConfig(gradient_checkpointing=True))
    ours, less = gradients_and_kept_bytes(policy)
    theirs, more = gradients_and_kept_bytes(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)
    assert less < 0.6 * more, (less, more)


@pytest.mark.parametrize("make", [pi0, lambda: hf("qwen3_vl")])
def test_an_adapted_policy_is_copied_whole(make):
    """A reference policy must not share layers with the one that learns; a worker's copy only acts."""
    policy = make()
    apply_adaptation(policy, AdaptationConfig(train=("expert",), lora=LORA.lora, gradient_checkpointing=True))
    copied, sent = copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))
    before = act(policy)
    train(policy)
    assert not torch.equal(act(policy), before)
    assert torch.equal(act(copied), before)
    assert torch.equal(act(sent), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of the compiler's own modules
def test_a_compiled_expert_gives_the_same_velocity():
    policy, plain = pi0(), pi0()
    apply_adaptation(policy, AdaptationConfig(compile=True))
    torch.testing.assert_close(act(policy), act(plain), atol=1e-5, rtol=1e-4)
    assert policy.expert._compiled_call_impl is not None
    assert torch.equal(act(copy.deepcopy(policy)), act(plain))


# ------------------------------------------------------------------------------------------------------------- recipes
RECIPE = Recipe(
    env=EnvConfig(task="reach", cameras=("agent",), image_size=64, num_threads=1),
    demos=DemosConfig(num_episodes=2, num_envs=2),
    policy=Pi0Config(action_horizon=4, num_steps=2, max_state_dim=32, tokenizer=TokenizerConfig(max_tokens=80)),
    adaptation=replace(LORA, precision="bfloat16", gradient_checkpointing=True),
    sft=SFTConfig(num_updates=2, batch_size=4, warmup_updates=0, checkpoint_interval=1),
    train=TrainConfig(
        num_iterations=1,
        num_envs=2,
        algorithm=PPOConfig(num_decisions=2, critic_warmup_iterations=0, actor=ActorConfig(num_epochs=1)),
        sampler=FlowSamplerConfig(num_steps=2),
    ),
    device="cpu",
)


def test_a_recipe_with_adaptation(tmp_path):
    check_recipe(RECIPE)
    record_demos(RECIPE, tmp_path / "demos")
    assert fine_tune(RECIPE, tmp_path / "demos", tmp_path / "sft", resume=False).finished
    start = load_policy(tmp_path / "sft" / "policy")
    assert start.language_model.dtype == torch.bfloat16
    moved = {}
    for freeze in (True, False):
        recipe = replace(RECIPE, train=replace(RECIPE.train, freeze_encoder=freeze))
        folder = tmp_path / f"rl_{freeze}"
        assert reinforce(recipe, tmp_path / "sft" / "policy", folder, resume=False).finished
        (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert row["update/ratio_error_first"] < 2e-3
        end = load_policy(folder / "policy").state_dict()
        moved[freeze] = {part_of(k) for k, v in start.state_dict().items() if not torch.equal(v, end[k])}
    assert moved[True] == {"expert"}
    assert moved[False] >= {"expert", "language_model"}
    assert "vision" not in moved[False]


def test_adapted_fine_tuning_goes_on_from_its_checkpoint(tmp_path):
    record_demos(RECIPE, tmp_path / "demos")
    longer = replace(RECIPE, sft=replace(RECIPE.sft, num_updates=3))
    fine_tune(longer, tmp_path / "demos", tmp_path / "whole", resume=False)
    save = sft.save_state

    def save_and_die(path, value):
        save(path, value)
        if value["trainer"]["num_updates"] == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "save_state", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(longer, tmp_path / "demos", tmp_path / "parts", resume=False)
    fine_tune(longer, tmp_path / "demos", tmp_path / "parts", resume=True)
    whole, parts = (load_policy(tmp_path / name / "policy").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_recipes_that_cannot_be_adapted():
    own = replace(get_recipe("maze_wsrl"), adaptation=AdaptationConfig(train=("expert",)))
    assert not own.fine_tunes
    with pytest.raises(ValueError, match="trains an agent of its own"):
        check_recipe(own)
    with pytest.raises(ValueError, match="name no linear layer"):
        check_recipe(replace(RECIPE, adaptation=replace(LORA, lora=LoRAConfig(targets=("none",)))))


# -------------------------------------------------------------------------------------------------------------- errors
def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="trained whole and have adapters too"):
        AdaptationConfig(lora=LoRAConfig())
    with pytest.raises(ValueError, match="nothing would be trained"):
        AdaptationConfig(train=())
    with pytest.raises(ValueError, match="rank must be at least 1"):
        LoRAConfig(rank=0)
    with pytest.raises(ValueError, match=r"name no linear layer of .*there are \['down_proj'"):
        apply_adaptation(pi0(), AdaptationConfig(train=("expert",), lora=LoRAConfig(targets=("qkv",))))
    with pytest.raises(ValueError, match="has no effect: no matrix is frozen"):
        apply_adaptation(hf("smolvlm"), AdaptationConfig(precision="bfloat16"))
    with pytest.raises(ValueError, match=r"has no part \['expert'\] to train"):
        apply_adaptation(torch.nn.ModuleDict({"vision": torch.nn.Linear(2, 2)}), AdaptationConfig(train=("expert",)))
    with pytest.raises(ValueError, match="has no transformer layers"):
        apply_adaptation(torch.nn.Linear(2, 2), AdaptationConfig(gradient_checkpointing=True))
