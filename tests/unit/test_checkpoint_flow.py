"""openpi's and LeRobot's folders of pi0, pi0.5 and SmolVLA, which `tiny_checkpoints` writes by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit import tiny_checkpoints as tiny
from vla_rl.core import Observation
from vla_rl.policies.checkpoints.assemble import FlowVLA, assemble
from vla_rl.policies.checkpoints.lerobot import plan_lerobot, save_lerobot
from vla_rl.policies.checkpoints.native import PolicyCheckpointError
from vla_rl.policies.checkpoints.openpi import plan_openpi, save_openpi
from vla_rl.policies.checkpoints.options import ReadOptions
from vla_rl.policies.checkpoints.sizes import gemma_sizes, smollm_sizes, vision_sizes
from vla_rl.policies.checkpoints.tensors import on_meta, read_json
from vla_rl.policies.pi0 import Pi0, pi0_size
from vla_rl.policies.smolvla import SmolVLA, SmolVLAConfig, smolvla_size

EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
TWO = ReadOptions(cameras=("front", "wrist"))


def openpi(folder: Path, options: ReadOptions = TWO) -> FlowVLA:
    return assemble(plan_openpi(folder, options), options)


def lerobot(folder: Path, options: ReadOptions = ReadOptions()) -> FlowVLA:  # noqa: B008
    return assemble(plan_lerobot(folder, options), options)


def assert_same(first: FlowVLA, second: FlowVLA) -> None:
    """Bit for bit, and in all that is configured."""
    assert first.config == second.config
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    for name in ("state_normalizer", "action_normalizer"):
        assert first.inputs.get_submodule(name).kind == second.inputs.get_submodule(name).kind


def observation(seed: int = 0) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    images = {c: torch.randint(0, 256, (2, 20, 28, 3), dtype=torch.uint8, generator=generator) for c in TWO.cameras}
    return Observation(images, torch.randn(2, 8, generator=generator), ("open the drawer", "pick_up the block"))


# ------------------------------------------------------------------------------------------------------------- openpi
@pytest.mark.parametrize("adaptive", [False, True])
def test_openpi_tensors_are_where_they_belong(tmp_path: Path, adaptive: bool) -> None:
    tensors = tiny.write_openpi(tmp_path / "c", adaptive=adaptive)
    policy = openpi(tmp_path / "c")
    state = policy.state_dict()
    root = "paligemma_with_expert.paligemma.model"
    norm = "input_layernorm.dense.weight" if adaptive else "input_layernorm.weight"
    for ours, theirs in {
        "vision.patch_embedding.weight": f"{root}.vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision.position_embedding": f"{root}.vision_tower.vision_model.embeddings.position_embedding.weight",
        "vision.layers.1.self_attn.out_proj.bias": (
            f"{root}.vision_tower.vision_model.encoder.layers.1.self_attn.out_proj.bias"
        ),
        "vision.post_layernorm.weight": f"{root}.vision_tower.vision_model.post_layernorm.weight",
        "projector.weight": f"{root}.multi_modal_projector.linear.weight",
        "language_model.embed_tokens.weight": "paligemma_with_expert.paligemma.lm_head.weight",
        "language_model.layers.1.mlp.up_proj.weight": f"{root}.language_model.layers.1.mlp.up_proj.weight",
        f"expert.layers.0.{norm}": f"paligemma_with_expert.gemma_expert.model.layers.0.{norm}",
        "action_in_proj.bias": "action_in_proj.bias",
    }.items():
        assert torch.equal(state[ours], tensors[theirs]), ours
    heads = 2  # of the experts, which the policy leaves out: it writes no text
    assert len([k for k in state if not k.startswith("inputs.")]) == len(tensors) - heads + 1
    config = policy.config
    assert (config.adaptive, config.prompt.kind == "state") == (adaptive, adaptive)
    assert (config.state_dim, config.action_dim, config.action_horizon, config.num_steps) == (8, 7, 5, 10)
    assert (config.language.num_heads, config.language.head_dim, config.vision.num_heads) == (2, 16, 2)
    assert config.tokenizer.max_tokens == (200 if adaptive else 48)
    assert policy.act(observation(), torch.randn(2, 5, 32)).actions.shape == (2, 5, 7)


@pytest.mark.parametrize("adaptive", [False, True])
def test_openpi_normalises_with_its_own_epsilon(tmp_path: Path, adaptive: bool) -> None:
    tiny.write_openpi(tmp_path / "c", adaptive=adaptive)
    policy = openpi(tmp_path / "c")
    x, stats = torch.randn(3, 8), tiny.statistics(8, 8)
    if adaptive:
        expected = (x - stats["q01"]) / (stats["q99"] - stats["q01"] + 1e-6) * 2 - 1
    else:
        expected = (x - stats["mean"]) / (stats["std"] + 1e-6)
    torch.testing.assert_close(policy.inputs.state_normalizer.normalize(x), expected, rtol=1e-4, atol=1e-5)
    chunk, stats = torch.randn(3, 5, 32), tiny.statistics(7, 7)
    if adaptive:
        expected = (chunk[..., :7] + 1) / 2 * (stats["q99"] - stats["q01"] + 1e-6) + stats["q01"]
    else:
        expected = chunk[..., :7] * (stats["std"] + 1e-6) + stats["mean"]
    torch.testing.assert_close(policy.unnormalize_actions(chunk), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_openpi_round_trip(tmp_path: Path, adaptive: bool) -> None:
    tensors = tiny.write_openpi(tmp_path / "c", adaptive=adaptive)
    policy = openpi(tmp_path / "c")
    save_openpi(policy, tmp_path / "again")
    assert_same(policy, openpi(tmp_path / "again"))
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in tensors.items()}  # openpi is strict
    assert [k for k in tensors if not torch.equal(written[k], tensors[k])] == [EXPERT_HEAD]
    assert read_json(tmp_path / "again" / "config.json")["action_horizon"] == 5
    stats = read_json(tmp_path / "again" / "assets" / "vla_rl" / "norm_stats.json")["norm_stats"]
    name = "q01" if adaptive else "mean"
    torch.testing.assert_close(torch.tensor(stats["actions"][name]), tiny.statistics(7, 7)[name])


def test_a_bfloat16_checkpoint_keeps_its_bits_and_its_norms_in_float32(tmp_path: Path) -> None:
    tensors = tiny.write_openpi(tmp_path / "c", adaptive=False)
    halved = {k: v.bfloat16() for k, v in tensors.items()}
    save_file(halved, tmp_path / "c" / "model.safetensors")
    policy = openpi(tmp_path / "c", replace(TWO, dtype=None))
    assert policy.action_out_proj.weight.dtype == torch.bfloat16
    assert torch.equal(policy.action_out_proj.weight, halved["action_out_proj.weight"])
    for name in ("expert.norm.weight", "vision.position_embedding", "inputs.state_normalizer.scale"):
        assert policy.state_dict()[name].dtype == torch.float32
    actions = policy.act(observation(), torch.zeros(2, 5, 32)).actions
    assert actions.dtype == torch.float32
    full = openpi(tmp_path / "c").act(observation(), torch.zeros(2, 5, 32)).actions
    assert (actions - full).abs().max() < 0.05
    save_openpi(policy, tmp_path / "again")
    assert_same(policy, openpi(tmp_path / "again", replace(TWO, dtype=None)))


def test_the_embedding_may_lie_under_its_other_name(tmp_path: Path) -> None:
    tensors = tiny.write_openpi(tmp_path / "c", adaptive=False)
    expected = openpi(tmp_path / "c")
    name = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    tensors[name] = tensors.pop("paligemma_with_expert.paligemma.lm_head.weight")
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    assert_same(openpi(tmp_path / "c"), expected)


def test_pi05_without_the_state_in_its_prompt(tmp_path: Path) -> None:
    """As pi05_libero was trained."""
    tiny.write_openpi(tmp_path / "c", adaptive=True)
    blind = openpi(tmp_path / "c", replace(TWO, discrete_state=False))
    obs = observation()
    moved = replace(obs, state=obs.state + 1.0)
    noise = torch.zeros(2, 5, 32)
    assert torch.equal(blind.act(obs, noise).actions, blind.act(moved, noise).actions)
    seeing = openpi(tmp_path / "c")
    assert not torch.equal(seeing.act(obs, noise).actions, seeing.act(moved, noise).actions)


def test_statistics_of_several_robots_must_be_chosen(tmp_path: Path) -> None:
    tiny.write_openpi(tmp_path / "c", adaptive=False)
    tiny.write_norm_stats(tmp_path / "c" / "assets" / "org" / "other")
    with pytest.raises(PolicyCheckpointError, match=r"org/other.*tiny_robot.*asset="):
        openpi(tmp_path / "c")
    assert openpi(tmp_path / "c", replace(TWO, asset="org/other")).config.action_dim == 7


def test_without_statistics_it_is_a_base_model(tmp_path: Path) -> None:
    tiny.write_openpi(tmp_path / "c", adaptive=False)
    (tmp_path / "c" / "assets" / "tiny_robot" / "norm_stats.json").unlink()
    policy = openpi(tmp_path / "c")
    assert policy.inputs.action_normalizer.kind == "identity"
    assert (policy.config.state_dim, policy.config.action_dim) == (32, 32)


def test_zeros_that_pad_statistics_are_cut(tmp_path: Path) -> None:
    tiny.write_openpi(tmp_path / "c", adaptive=False)
    file = tmp_path / "c" / "assets" / "tiny_robot" / "norm_stats.json"
    stats = json.loads(file.read_text())
    for name in ("mean", "std", "q01", "q99"):
        stats["norm_stats"]["actions"][name] += [0.0] * 25
    file.write_text(json.dumps(stats))
    assert openpi(tmp_path / "c").config.action_dim == 32
    assert openpi(tmp_path / "c", replace(TWO, action_dim=7)).config.action_dim == 7
    with pytest.raises(PolicyCheckpointError, match="another robot"):
        openpi(tmp_path / "c", replace(TWO, action_dim=6))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    tensors = tiny.write_openpi(folder, adaptive=False, tokenizer=False)
    with pytest.raises(FileNotFoundError, match=r"paligemma_tokenizer\.model, named tokenizer\.model"):
        openpi(folder)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.model").write_bytes(tiny.tokenizer_model())
    brought = replace(TWO, tokenizer=tmp_path / "t")
    assert openpi(folder, brought).inputs.tokenizer.num_ids == 320
    (folder / "vlm_config.json").unlink()
    with pytest.raises(PolicyCheckpointError, match=r"vision tower of width 16 .* vlm_config\.json"):
        openpi(folder, brought)
    tiny.write_json(folder / "vlm_config.json", tiny.BACKBONE)
    tensors["surplus"] = tensors.pop("action_in_proj.bias")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PolicyCheckpointError, match=r"missing action_in_proj\.bias .*\n.*unknown surplus"):
        openpi(folder, brought)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tensors = tiny.write_openpi(tmp_path / "c", adaptive=False)
    head = "paligemma_with_expert.paligemma.lm_head.weight"
    save_file(tensors | {head: tensors[head][:300].clone()}, tmp_path / "c" / "model.safetensors")
    with pytest.raises(PolicyCheckpointError, match="320 tokens, the model embeds 300"):
        openpi(tmp_path / "c")


def test_a_tokenizer_may_have_tokens_that_no_sentence_gives(tmp_path: Path) -> None:
    """PaliGemma's tokenizer.json has one more than its models embed: the place of a picture."""
    tensors = tiny.write_openpi(tmp_path / "c", adaptive=False, tokenizer=False)
    letters = {chr(97 + i): i for i in range(tiny.VOCAB)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(tmp_path / "c" / "tokenizer.json"))
    assert openpi(tmp_path / "c").inputs.tokenizer.num_ids == tiny.VOCAB + 1
    head = "paligemma_with_expert.paligemma.lm_head.weight"
    save_file(tensors | {head: tensors[head][1:].clone()}, tmp_path / "c" / "model.safetensors")
    with pytest.raises(PolicyCheckpointError, match="has 340 tokens, the model embeds 339"):
        openpi(tmp_path / "c")


@pytest.mark.parametrize("variant", ["pi0", "pi05", "smolvla"])
def test_published_sizes_are_known_from_their_shapes(variant: str) -> None:
    """Shapes as the published models have them; how many heads there are is not among them."""
    sizes = smolvla_size() if variant == "smolvla" else pi0_size(variant)
    expected = replace(sizes, state_dim=8, action_dim=7)
    policy = on_meta(lambda: SmolVLA(expected) if isinstance(expected, SmolVLAConfig) else Pi0(expected))
    shapes = {key: tuple(value.shape) for key, value in policy.state_dict().items()}

    def depth(start: str) -> int:
        return len({key.removeprefix(start).split(".")[0] for key in shapes if key.startswith(start)})

    where = Path("published")
    assert vision_sizes(shapes.__getitem__, depth("vision.layers."), {}, where) == expected.vision
    towers = {"language_model": expected.language, "expert": expected.expert}
    for tower, size in towers.items():
        layers, vocab = depth(f"{tower}.layers."), tower == "language_model"
        if variant == "smolvla":
            every = 0 if vocab else 2
            found = smollm_sizes(shapes.__getitem__, tower, layers, {}, where, vocab=vocab, cross_every=every)
        else:
            found = gemma_sizes(shapes.__getitem__, tower, layers, vocab=vocab)
        assert found == size
    millions = sum(p.numel() for p in policy.parameters()) / 1e6
    assert round(millions) == {"pi0": 3238, "pi05": 3353, "smolvla": 403}[variant]


# ------------------------------------------------------------------------------------------------------------ LeRobot
@pytest.mark.parametrize("family", ["pi0", "pi05", "smolvla"])
def test_lerobot_round_trip(tmp_path: Path, family: str) -> None:
    tensors = tiny.write_lerobot(tmp_path / "c", family)
    policy = lerobot(tmp_path / "c")
    config = policy.config
    assert (config.cameras, config.action_horizon, config.num_steps) == (("front", "wrist"), 5, 4)
    assert (config.state_dim, config.action_dim) == (8, 7)
    assert config.tokenizer.bos == (-1 if family == "smolvla" else 2)
    assert config.prompt.clean == (family == "pi05")
    save_lerobot(policy, tmp_path / "again")
    assert_same(policy, lerobot(tmp_path / "again"))
    written = load_file(tmp_path / "again" / "model.safetensors")
    unread = "vlm_with_expert.vlm.lm_head.weight" if family == "smolvla" else EXPERT_HEAD
    for key, value in tensors.items():
        assert key == unread or torch.equal(value, written[f"model.{key}"]), key
    assert set(written) | {f"model.{unread}"} == {f"model.{key}" for key in tensors}
    assert policy.act(observation(), torch.zeros(2, 5, 32)).actions.shape == (2, 5, 7)


def test_openpi_and_lerobot_hold_the_same_network(tmp_path: Path) -> None:
    """The same tensors give the same velocity; prompts and statistics are each project's own."""
    tiny.write_openpi(tmp_path / "o", adaptive=False)
    tiny.write_lerobot(tmp_path / "l", "pi0")
    first, second = openpi(tmp_path / "o"), lerobot(tmp_path / "l")
    inputs = first.preprocess(observation())
    x_t, time = torch.randn(2, 5, 32), torch.tensor([0.3, 0.9])
    ours, theirs = (p.velocity(p.encode(inputs), x_t, time).velocity for p in (first, second))
    assert torch.equal(ours, theirs)
    assert ours.abs().max() > 0.01


@pytest.mark.parametrize(
    ("modes", "kind"),
    [(("MEAN_STD",) * 2, "mean_std"), (("MIN_MAX",) * 2, "min_max"), (("QUANTILES", "IDENTITY"), "quantiles")],
)
def test_lerobot_normalisation(tmp_path: Path, modes: tuple[str, str], kind: str) -> None:
    tiny.write_lerobot(tmp_path / "c", "smolvla", modes=modes)
    policy = lerobot(tmp_path / "c")
    x, stats = torch.randn(3, 8), tiny.statistics(8, 8)
    low, high = {"mean_std": ("mean", "std"), "min_max": ("min", "max"), "quantiles": ("q01", "q99")}[kind]
    width = stats[high] - stats[low]
    width = torch.where(width == 0, 1e-8, width)
    expected: Tensor = (x - stats["mean"]) / (stats["std"] + 1e-8)
    if kind != "mean_std":
        expected = 2 * (x - stats[low]) / width - 1
    assert policy.inputs.state_normalizer.kind == kind
    found = policy.inputs.state_normalizer.normalize(x)
    torch.testing.assert_close(found[:, :-1], expected[:, :-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-3, atol=1.0)  # of the order of 1e8
    save_lerobot(policy, tmp_path / "again")
    assert_same(policy, lerobot(tmp_path / "again"))


@pytest.mark.parametrize("family", ["pi0", "smolvla"])
def test_lerobot_before_0_4(tmp_path: Path, family: str) -> None:
    """Statistics among the weights; PaliGemma nested as it was then, and pictures padded above and to the left."""
    tiny.write_lerobot(tmp_path / "early", family, early=True)
    tiny.write_lerobot(tmp_path / "now", family)
    early, now = lerobot(tmp_path / "early"), lerobot(tmp_path / "now")
    assert early.config.image_padding == "top_left"
    assert replace(early.config, image_padding=now.config.image_padding) == now.config
    assert all(torch.equal(value, now.state_dict()[key]) for key, value in early.state_dict().items())


def test_lerobot_0_4_padded_the_state_of_the_prompt(tmp_path: Path) -> None:
    tiny.write_lerobot(tmp_path / "c", "pi05")
    assert lerobot(tmp_path / "c").config.prompt.state_width == 32
    assert lerobot(tmp_path / "c", ReadOptions(state_width=0)).config.prompt.state_width == 0
    config = read_json(tmp_path / "c" / "config.json")
    tiny.write_json(tmp_path / "c" / "config.json", config | {"use_relative_actions": False})
    policy = lerobot(tmp_path / "c")
    assert policy.config.prompt.state_width == 0
    save_lerobot(policy, tmp_path / "again")
    assert_same(policy, lerobot(tmp_path / "again"))


def test_the_tokenizer_may_lie_in_a_folder_of_its_own(tmp_path: Path) -> None:
    tiny.write_lerobot(tmp_path / "c", "pi0")
    (tmp_path / "c" / "tokenizer").mkdir()
    (tmp_path / "c" / "tokenizer.model").rename(tmp_path / "c" / "tokenizer" / "tokenizer.model")
    assert lerobot(tmp_path / "c").inputs.tokenizer.num_ids == 320


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_relative_actions": True}, "use_relative_actions"),
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha"),
        ({"normalization_mapping": {"VISUAL": "MEAN_STD"}}, "pictures are normalised"),
        ({"type": "smolvla"}, "says 'smolvla', but the tensors are those of pi0"),
        ({"output_features": {}}, "no shape of"),
        ({"output_features": {"action": {"type": "ACTION", "shape": [6]}}}, "statistics of 7 dimensions"),
        ({"output_features": {"action": {"type": "ACTION", "shape": [40]}}}, "statistics of 7 dimensions"),
    ],
)
def test_settings_that_cannot_be_followed(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    tiny.write_lerobot(tmp_path / "c", "pi0")
    config = read_json(tmp_path / "c" / "config.json")
    tiny.write_json(tmp_path / "c" / "config.json", config | changes)
    with pytest.raises(PolicyCheckpointError, match=message):
        lerobot(tmp_path / "c")


def test_a_pipeline_without_its_normaliser(tmp_path: Path) -> None:
    tiny.write_lerobot(tmp_path / "c", "pi0")
    tiny.write_json(tmp_path / "c" / "policy_preprocessor.json", {"steps": [{"registry_name": "device_processor"}]})
    with pytest.raises(PolicyCheckpointError, match="has no normalizer_processor"):
        lerobot(tmp_path / "c")
