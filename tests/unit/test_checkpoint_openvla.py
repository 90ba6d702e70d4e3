"""Folders of OpenVLA and OpenVLA-OFT, written by hand as the public code leaves them: read, written back, and refused
with a reason where something is wrong."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit import openvla_public as public
from vla_rl.core import Observation
from vla_rl.policies.checkpoints.load_any import describe
from vla_rl.policies.checkpoints.native import PolicyCheckpointError, load_policy, save_policy
from vla_rl.policies.checkpoints.openvla import OpenVLAOptions, is_openvla, read_openvla, write_openvla
from vla_rl.policies.checkpoints.options import ReadOptions
from vla_rl.policies.openvla import OpenVLA
from vla_rl.policies.openvla_oft import OpenVLAOFT, OpenVLAOFTTokens

torch.set_num_threads(1)


def observation(n=2, state_dim=3):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (n, 28, 28, 3), dtype=torch.uint8, generator=generator)
    sentences = ("Open the drawer", "stack")[:n]
    return Observation({"agent": images}, torch.randn(n, state_dim, generator=generator), sentences)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    tensors = public.model_tensors()
    public.write_folder(tmp_path / "base", tensors)
    return tmp_path / "base", tensors


def oft_folder(path, film=False):
    """Merged weights, a regression head, a state projector and, with FiLM, towers whose adapter is not merged."""
    torch.manual_seed(1)
    tensors, head, proprio = public.model_tensors(film), public.head_tensors(), public.proprio_tensors()
    shards = {k: v for k, v in tensors.items() if ".scale." not in k and ".shift." not in k}
    public.write_folder(path, shards, norm_stats=None)
    (path / "dataset_statistics.json").write_text(json.dumps(public.STATISTICS))
    towers = film_towers(tensors) if film else None
    public.write_heads(path, head, proprio, towers)
    return tensors, head, proprio


def film_towers(tensors):
    """`vision_backbone--*.pt`: blocks are wrapped, one matrix has a LoRA update, which is added in `tensors`."""
    towers = {}
    for key, value in tensors.items():
        if key.startswith("vision_backbone."):
            film = ".scale." in key or ".shift." in key
            towers[key if film else re.sub(r"(blocks\.\d+)\.", r"\1.block.", key)] = value
    name = "vision_backbone.featurizer.blocks.1.block.attn.proj"
    down, up = public.random(4, 32), public.random(32, 4)
    towers |= {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
    towers |= {f"{name}.base_layer.{kind}": towers.pop(f"{name}.{kind}") for kind in ("weight", "bias")}
    key = "vision_backbone.featurizer.blocks.1.attn.proj.weight"
    tensors[key] = tensors[key] + up @ down  # min(rank, 16) / rank is 1
    return towers


def test_every_parameter_comes_from_its_tensor(base):
    folder, tensors = base
    assert is_openvla(folder)
    policy = read_openvla(folder)
    assert isinstance(policy, OpenVLA)
    assert (policy.action_horizon, policy.action_dim, policy.noise_dim) == (1, 7, 7)
    state = policy.state_dict()
    root = "vision_backbone.featurizer."
    assert torch.equal(state["vlm.vision.featurizer.extra_tokens"][0], tensors[f"{root}cls_token"][0, 0])
    assert torch.equal(state["vlm.vision.featurizer.extra_tokens"][1:], tensors[f"{root}reg_token"][0])
    qkv = tensors[f"{root}blocks.1.attn.qkv.weight"]
    assert torch.equal(state["vlm.vision.featurizer.layers.1.self_attn.k_proj.weight"], qkv[32:64])
    assert torch.equal(state["vlm.vision.featurizer.layers.1.scale2"], tensors[f"{root}blocks.1.ls2.scale_factor"])
    assert "vlm.vision.featurizer.layers.2.mlp.fc1.weight" not in state  # the last block makes no feature
    assert torch.equal(state["vlm.lm_head.weight"], tensors["language_model.lm_head.weight"])


def test_actions_are_unnormalised_as_the_public_code_does(base):
    policy = read_openvla(base[0])
    chunk = torch.tensor([[[-1.0, 1.0, 0.0, 0.5, -0.5, 0.25, 0.75]]])
    low, high = torch.tensor(public.Q01), torch.tensor(public.Q99)
    expected = 0.5 * (chunk + 1) * (high - low + 1e-8) + low
    expected[..., 6] = 0.75  # the mask leaves the gripper as it is
    torch.testing.assert_close(policy.unnormalize_actions(chunk), expected, rtol=0, atol=1e-6)
    bounds = read_openvla(base[0], openvla=OpenVLAOptions(bounds="min_max"))
    assert bounds.unnormalize_actions(chunk)[0, 0, 0].item() == pytest.approx(-1.5)


@pytest.mark.parametrize("film", [False, True])
def test_oft_round_trip_is_bit_equal(tmp_path, film):
    oft_folder(tmp_path / "a", film)
    policy = read_openvla(tmp_path / "a")
    assert isinstance(policy, OpenVLAOFT)
    assert policy.vlm.config.film == film
    assert (policy.action_horizon, policy.config.state_dim, policy.config.body.proprio) == (8, 3, True)
    write_openvla(policy, tmp_path / "b", max_shard_bytes=40_000)
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 3
    again = read_openvla(tmp_path / "b")
    save_policy(again, tmp_path / "c")
    native = load_policy(tmp_path / "c")
    assert policy.config == again.config == native.config
    for other in (again, native):
        assert policy.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(a, other.state_dict()[k]) for k, a in policy.state_dict().items())
    obs, noise = observation(), torch.zeros(2, 8, 7)
    assert torch.equal(policy.act(obs, noise).actions, native.act(obs, noise).actions)


def test_what_is_written_has_all_public_tensors(base, tmp_path):
    folder, tensors = base
    write_openvla(read_openvla(folder), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    shipped = {k for k in tensors if "attn_pool" not in k}
    assert shipped <= written.keys()
    assert all(written[k].shape == tensors[k].shape for k in shipped)
    used = {
        k for k in shipped if "blocks.2." not in k and "er.norm." not in k and "fused_featurizer.blocks.1." not in k
    }
    assert all(torch.equal(written[k], tensors[k]) for k in used)


def test_tokens_are_decoded_in_parallel_on_request(base):
    policy = read_openvla(base[0], openvla=OpenVLAOptions(decoding="parallel", action_horizon=2))
    assert isinstance(policy, OpenVLAOFTTokens)
    assert (policy.action_horizon, policy.config.body.inputs.center_crop) == (2, 0.9)


def test_a_policy_of_two_pictures_asks_for_two_cameras(tmp_path):
    oft_folder(tmp_path / "a")
    cameras = ReadOptions(cameras=("front", "wrist"))
    policy = read_openvla(tmp_path / "a", cameras)
    assert policy.config.cameras == ("front", "wrist")
    write_openvla(policy, tmp_path / "b")
    assert read_openvla(tmp_path / "b", cameras).config == policy.config
    with pytest.raises(PolicyCheckpointError, match="takes 2 pictures: name as many cameras"):
        read_openvla(tmp_path / "b")


def write_adapter(folder, tensors, scale_by_root=False):
    """Rank 2, alpha 6; the sum in `tensors`."""
    folder.mkdir(parents=True)
    (folder / "lora_adapter").mkdir()
    factors = {}
    for name in ("language_model.model.layers.1.mlp.up_proj", "vision_backbone.featurizer.blocks.0.attn.qkv"):
        rows, columns = tensors[f"{name}.weight"].shape
        down, up = public.random(2, columns), public.random(rows, 2)
        factors[f"base_model.model.{name}.lora_A.weight"], factors[f"base_model.model.{name}.lora_B.weight"] = down, up
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + (6 / 2**0.5 if scale_by_root else 3.0) * up @ down
    save_file(factors, folder / "lora_adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_rslora": scale_by_root, "bias": "none"}
    (folder / "lora_adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "openvla/openvla-7b"})
    )
    (folder / "dataset_statistics.json").write_text(json.dumps(public.STATISTICS))


@pytest.mark.parametrize("root", [False, True])
def test_an_adapter_is_added_to_its_base(base, tmp_path, root):
    folder, tensors = base
    write_adapter(tmp_path / "tuned", tensors, scale_by_root=root)
    assert is_openvla(tmp_path / "tuned")
    with pytest.raises(PolicyCheckpointError, match=r"openvla/openvla-7b.*base="):
        read_openvla(tmp_path / "tuned")
    policy = read_openvla(tmp_path / "tuned", openvla=OpenVLAOptions(base=folder))
    state = policy.state_dict()
    up = tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    q = tensors["vision_backbone.featurizer.blocks.0.attn.qkv.weight"][:32]
    torch.testing.assert_close(state["vlm.decoder.layers.1.mlp.up_proj.weight"], up, rtol=0, atol=1e-6)
    torch.testing.assert_close(state["vlm.vision.featurizer.layers.0.self_attn.q_proj.weight"], q, rtol=0, atol=1e-6)


def test_adapters_that_are_not_plain_lora_are_refused(base, tmp_path):
    write_adapter(tmp_path / "tuned", base[1])
    file = tmp_path / "tuned" / "lora_adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    with pytest.raises(PolicyCheckpointError, match="use_dora"):
        read_openvla(tmp_path / "tuned", openvla=OpenVLAOptions(base=base[0]))


def test_several_statistics_ask_for_a_choice(base):
    folder, tensors = base
    two = {"bridge": public.STATISTICS["toy"], "fractal": public.STATISTICS["toy"]}
    public.write_folder(folder, tensors, norm_stats=two)
    with pytest.raises(PolicyCheckpointError, match=r"\['bridge', 'fractal'\]; choose"):
        read_openvla(folder)
    with pytest.raises(PolicyCheckpointError, match="'berkeley' is not among them"):
        read_openvla(folder, openvla=OpenVLAOptions(unnorm_key="berkeley"))
    assert read_openvla(folder, ReadOptions(asset="bridge")).action_dim == 7
    public.write_folder(folder, tensors, norm_stats=None)
    with pytest.raises(PolicyCheckpointError, match=r"no dataset_statistics.json"):
        read_openvla(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("language_model.model.layers.1.self_attn.k_proj.weight"),
            "missing language_model.model.layers.1",
        ),
        (lambda t: t.pop("vision_backbone.featurizer.blocks.1.attn.qkv.bias"), "missing vision_backbone.*qkv.bias"),
        (lambda t: t.update({"language_model.extra.weight": torch.zeros(2)}), "unknown language_model.extra.weight"),
        (lambda t: t.update({"projector.fc3.bias": torch.zeros(5)}), r"fc3.bias.*shape \(5,\), expected \(32,\)"),
        (lambda t: t.pop("vision_backbone.fused_featurizer.pos_embed"), "no fused OpenVLA"),
    ],
)
def test_tensors_that_do_not_fit_are_named(base, change, message):
    folder, tensors = base
    change(tensors)
    public.write_shards(folder, tensors)
    with pytest.raises(PolicyCheckpointError, match=message):
        read_openvla(folder)


def test_missing_layers_are_not_taken_for_a_smaller_model(base):
    folder, tensors = base
    public.write_shards(folder, {k: v for k, v in tensors.items() if "model.layers.1." not in k})
    with pytest.raises(PolicyCheckpointError, match=r"missing language_model.model.layers.1"):
        read_openvla(folder)


def test_shards_that_are_cut_short_or_missing(base):
    folder, _ = base
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PolicyCheckpointError, match=r"00002-of-00003.*truncated"):
        read_openvla(folder)
    shard.unlink()
    with pytest.raises(PolicyCheckpointError, match="missing: model-00002-of-00003"):
        read_openvla(folder)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_pickles_with_code_are_not_executed(tmp_path, capsys):
    oft_folder(tmp_path)
    head = tmp_path / "action_head--150000_checkpoint.pt"
    content = head.read_bytes()
    torch.save({"model.fc1.weight": Payload()}, head)
    with pytest.raises(PolicyCheckpointError, match="something else than tensors"):
        read_openvla(tmp_path)
    head.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(PolicyCheckpointError, match="something else than tensors"):
        read_openvla(tmp_path)
    assert "executed" not in capsys.readouterr().out
    head.write_bytes(content[: len(content) // 2])
    with pytest.raises(PolicyCheckpointError, match="cut short"):
        read_openvla(tmp_path)


def test_heads_that_do_not_fit(tmp_path):
    _, head, _ = oft_folder(tmp_path)
    public.write_heads(tmp_path, {k: v for k, v in head.items() if "fc2" not in k})
    with pytest.raises(PolicyCheckpointError, match=r"no action_head\.model\.fc2\.bias"):
        read_openvla(tmp_path)
    public.write_heads(tmp_path, public.head_tensors(5))
    with pytest.raises(ValueError, match="7 action dimensions, the model at most 5"):
        read_openvla(tmp_path)


def test_several_steps_of_a_head_ask_for_a_choice(tmp_path):
    oft_folder(tmp_path)
    torch.save(public.head_tensors(), tmp_path / "action_head--50000_checkpoint.pt")
    with pytest.raises(PolicyCheckpointError, match="choose one of their steps"):
        read_openvla(tmp_path)
    assert isinstance(read_openvla(tmp_path, openvla=OpenVLAOptions(step="150000")), OpenVLAOFT)


def test_descriptions(base, tmp_path):
    assert describe(base[0])["statistics of"] == "toy"
    oft_folder(tmp_path / "oft")
    lines = describe(tmp_path / "oft")
    assert lines["family"] == "OpenVLA-OFT"
    assert "action_head--150000_checkpoint.pt" in lines["beside the shards"]
    write_adapter(tmp_path / "tuned", base[1])
    assert "openvla/openvla-7b" in describe(tmp_path / "tuned")["adapter of"]


def test_half_precision_shards_with_an_adapter_stay_in_half_precision(base, tmp_path):
    folder, tensors = base
    public.write_shards(folder, {key: value.bfloat16() for key, value in tensors.items()})
    write_adapter(tmp_path / "tuned", tensors)
    policy = read_openvla(tmp_path / "tuned", ReadOptions(dtype=None), OpenVLAOptions(base=folder))
    assert {m.weight.dtype for m in policy.modules() if isinstance(m, torch.nn.Linear)} == {torch.bfloat16}
    assert policy.act(observation(), torch.zeros(2, 1, 7)).actions.dtype == torch.float32


def test_other_folders_are_not_openvla(tmp_path):
    assert not is_openvla(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "paligemma"}')
    assert not is_openvla(tmp_path)


def test_another_robot_and_another_head_are_refused(base, tmp_path):
    with pytest.raises(PolicyCheckpointError, match=r"7 dimensions, the environment 4: another robot"):
        read_openvla(base[0], ReadOptions(action_dim=4))
    oft_folder(tmp_path / "oft")
    with pytest.raises(PolicyCheckpointError, match="states of 3 dimensions, the environment has 9"):
        read_openvla(tmp_path / "oft", ReadOptions(state_dim=9))
    (tmp_path / "oft" / "noisy_action_projector--1_checkpoint.pt").write_bytes(b"")
    with pytest.raises(PolicyCheckpointError, match="diffusion head"):
        read_openvla(tmp_path / "oft")


def test_half_precision_keeps_norms_and_actions_in_float32(tmp_path):
    oft_folder(tmp_path)
    policy = read_openvla(tmp_path, ReadOptions(dtype=torch.bfloat16))
    assert policy.vlm.decoder.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert policy.vlm.decoder.norm.weight.dtype == torch.float32
    mean, std = policy.distribution(policy.encode(policy.preprocess(observation())))
    assert mean.dtype == std.dtype == torch.float32
    full = read_openvla(tmp_path)
    exact, _ = full.distribution(full.encode(full.preprocess(observation())))
    assert (mean - exact).abs().max() < 0.2 * exact.abs().max()
