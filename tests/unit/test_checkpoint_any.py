"""Any folder is recognised, loaded, described and converted; a policy moves to another environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.unit import tiny_checkpoints as tiny
from vla_rl.cli import main
from vla_rl.core import ActionSpec, CameraSpec, EnvSpec, Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints.adapt import adapt
from vla_rl.policies.checkpoints.load_any import LAYOUTS, convert, describe, layout_of, load_any
from vla_rl.policies.checkpoints.native import PolicyCheckpointError, load_policy, save_policy
from vla_rl.policies.checkpoints.options import ReadOptions
from vla_rl.policies.flow_mlp import FlowMLPConfig
from vla_rl.policies.pi0 import Pi0, Pi0Config
from vla_rl.policies.smolvla import SmolVLA
from vla_rl.policies.tiny import TinyVLAConfig
from vla_rl.protocols import chunk_shape


def spec(state: int = 8, action: int = 7, cameras: tuple[str, ...] = ("front", "wrist")) -> EnvSpec:
    return EnvSpec(
        name="bench",
        cameras={name: CameraSpec(32, 32) for name in cameras},
        state_names=tuple(f"s{i}" for i in range(state)),
        action=ActionSpec((-1.0,) * action, (1.0,) * action, tuple(f"a{i}" for i in range(action))),
        max_episode_steps=50,
        control_hz=20.0,
    )


def write(folder: Path, layout: str) -> Path:
    if layout == "openpi":
        tiny.write_openpi(folder, adaptive=True)
    elif layout == "openpi_jax":
        tiny.write_openpi_jax(folder, adaptive=True, value=True)
        tiny.write_json(folder / "config.json", {"action_horizon": 5})
    else:
        tiny.write_lerobot(folder, "pi05")
    return folder


@pytest.mark.parametrize(
    ("layout", "targets"),
    [("openpi", ("native", "openpi_jax")), ("openpi_jax", ("lerobot",)), ("lerobot", ("openpi", "native"))],
)
def test_each_layout_is_recognised_and_converted_without_loss(
    tmp_path: Path, layout: str, targets: tuple[str, ...]
) -> None:
    folder = write(tmp_path / "c", layout)
    assert layout_of(folder) == layout
    policy = load_any(folder, cameras=("front", "wrist"), spec=spec())
    assert isinstance(policy, Pi0)
    assert not policy.training
    for target in targets:
        convert(folder, tmp_path / target, target, ReadOptions(dtype=None, cameras=("front", "wrist")))
        assert layout_of(tmp_path / target) == target
        again = load_any(tmp_path / target, cameras=() if target == "native" else ("front", "wrist"), spec=spec())
        for key, value in policy.state_dict().items():
            if "normalizer" in key:  # LeRobot's 1e-8 for what never varied is below openpi's 1e-6
                torch.testing.assert_close(again.state_dict()[key], value, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(again.state_dict()[key], value), key


def test_smolvla_is_loaded_and_has_no_place_at_openpi(tmp_path: Path) -> None:
    tiny.write_lerobot(tmp_path / "c", "smolvla")
    assert isinstance(load_any(tmp_path / "c", spec=spec()), SmolVLA)
    with pytest.raises(PolicyCheckpointError, match="openpi has no SmolVLA"):
        convert(tmp_path / "c", tmp_path / "d", "openpi")
    convert(tmp_path / "c", tmp_path / "e", "native")
    assert load_policy(tmp_path / "e").config.cameras == ("front", "wrist")
    with pytest.raises(PolicyCheckpointError, match="is not empty"):
        convert(tmp_path / "c", tmp_path / "e", "lerobot")


def test_what_a_layout_has_no_place_for_is_said(tmp_path: Path) -> None:
    tiny.write_openpi(tmp_path / "c", adaptive=False)
    told = ReadOptions(dtype=None, cameras=("front", "wrist"))
    assert convert(tmp_path / "c", tmp_path / "native", "native", told) == []
    assert convert(tmp_path / "native", tmp_path / "openpi", "openpi") == [
        "cameras ('front', 'wrist') is read back as ('base_0_rgb', 'left_wrist_0_rgb', 'right_wrist_0_rgb')"
    ]
    lost = convert(tmp_path / "native", tmp_path / "lerobot", "lerobot")
    assert [line.split()[0] for line in lost] == ["prompt", "loss_on_padding"]  # LeRobot does not clean a sentence
    with pytest.raises(PolicyCheckpointError, match="leave the options out"):
        convert(tmp_path / "native", tmp_path / "d", "lerobot", told)


def test_our_own_folder_is_one_of_them(tmp_path: Path) -> None:
    policy = build_policy(Pi0Config(), spec(), seed=0)
    save_policy(policy, tmp_path, spec=spec())
    again = load_any(tmp_path, spec=spec())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in policy.state_dict().items())
    with pytest.raises(PolicyCheckpointError, match="choose the environment"):
        load_any(tmp_path, spec=spec(state=9))
    half = load_any(tmp_path, dtype=torch.bfloat16)
    assert half.action_in_proj.weight.dtype == torch.bfloat16
    assert half.expert.norm.weight.dtype == half.inputs.state_normalizer.scale.dtype == torch.float32
    with pytest.raises(PolicyCheckpointError, match="tokenizer is that of bytes"):
        convert(tmp_path, tmp_path / "d", "openpi")


def test_a_policy_whose_buffers_are_computed_is_loaded_too(tmp_path: Path) -> None:
    policy = build_policy(FlowMLPConfig(), spec(), seed=0)
    save_policy(policy, tmp_path, spec=spec())
    again = load_any(tmp_path, spec=spec())
    obs = Observation({}, torch.randn(2, 8), ("", ""))
    noise = torch.randn(2, *chunk_shape(policy))
    assert torch.equal(policy.act(obs, noise).actions, again.act(obs, noise).actions)


def test_an_unknown_folder_is_an_error_that_lists_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(PolicyCheckpointError) as error:
        load_any(tmp_path)
    assert "it holds weights.bin" in str(error.value)
    assert all(f"\n  {layout}: " in str(error.value) for layout in LAYOUTS)
    with pytest.raises(PolicyCheckpointError, match="is no folder"):
        load_any(tmp_path / "gone")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (spec(state=9), "state has 8 dimensions, the environment 9"),
        (spec(action=6), "action has 7 dimensions, the environment 6"),
        (spec(cameras=("top",)), r"its cameras are \['front', 'wrist'\].*cameras="),
    ],
)
def test_another_environment_is_an_error_that_says_what_to_do(tmp_path: Path, wanted: EnvSpec, message: str) -> None:
    tiny.write_lerobot(tmp_path / "c", "pi0")
    with pytest.raises(PolicyCheckpointError, match=message) as error:
        load_any(tmp_path / "c", spec=wanted)
    assert "vla-rl sft RECIPE --policy" in str(error.value)


def test_options_without_an_effect_are_errors(tmp_path: Path) -> None:
    tiny.write_lerobot(tmp_path / "c", "pi0")
    with pytest.raises(PolicyCheckpointError, match=r"are for pi0\.5, this is pi0"):
        load_any(tmp_path / "c", options=ReadOptions(state_width=32))
    with pytest.raises(PolicyCheckpointError, match="is for openpi's"):
        load_any(tmp_path / "c", options=ReadOptions(asset="droid"))


# -------------------------------------------------------------------------------------------------------------- adapt
@pytest.mark.parametrize("family", ["pi0", "pi05", "smolvla"])
def test_a_policy_moves_to_another_environment(tmp_path: Path, family: str) -> None:
    tiny.write_lerobot(tmp_path / "c", family)
    policy = load_any(tmp_path / "c")
    weights = {k: v.clone() for k, v in policy.state_dict().items() if "normalizer" not in k}
    trained = {k: p.requires_grad for k, p in policy.named_parameters()}
    moved = adapt(policy, spec(state=12, action=3, cameras=("top",)))
    assert (moved.config.state_dim, moved.config.action_dim, moved.config.cameras) == (12, 3, ("top",))
    assert all(torch.equal(moved.state_dict()[k], v) for k, v in weights.items())
    assert {k: p.requires_grad for k, p in moved.named_parameters()} == trained
    assert moved.inputs.state_normalizer.normalizer.kind == "identity"
    assert moved.inputs.action_normalizer.scale.tolist() == [1.0, 1.0, 1.0]
    moved.set_normalization(Normalizer.identity(12), Normalizer.identity(3))
    obs = Observation({"top": torch.zeros(1, 28, 28, 3, dtype=torch.uint8)}, torch.randn(1, 12), ("open",))
    assert moved.act(obs, torch.randn(1, 5, 32)).actions.shape == (1, 5, 3)


def test_adapt_says_what_is_too_wide(tmp_path: Path) -> None:
    tiny.write_lerobot(tmp_path / "c", "pi0")
    policy = load_any(tmp_path / "c")
    with pytest.raises(ValueError, match=r"state 40 .* must fit into max_state_dim 32"):
        adapt(policy, spec(state=40))
    with pytest.raises(ValueError, match="has no cameras"):
        adapt(policy, spec(), cameras=("left",))
    tiny_vla = build_policy(TinyVLAConfig(), spec(cameras=("agent",)), seed=0)
    with pytest.raises(ValueError, match="its network has sizes of its environment"):
        adapt(tiny_vla, spec(state=3, cameras=("agent",)))


# ------------------------------------------------------------------------------------------------------- command line
def test_inspect_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_openpi(tmp_path / "c", adaptive=False, tokenizer=False)
    assert main(["checkpoint", "inspect", str(tmp_path / "c"), "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert (lines["family"], lines["layout"], lines["state normalisation"]) == ("pi0", "openpi", "mean_std")
    assert lines["state"] == "8 dimensions, padded to 32"
    assert lines["expert"] == "2 layers of 24, 2 heads of 16, 1 of keys"
    assert lines["tokenizer"].startswith("MISSING")
    tensors = tiny.pi0_tensors(adaptive=False)
    junk = tensors["paligemma_with_expert.gemma_expert.lm_head.weight"].numel()
    stored = sum(t.numel() for t in tensors.values())
    assert lines["stored numbers"] == f"{stored:,} of F32"
    assert lines["parameters"] == f"{stored - junk:,}"
    there = [str(tmp_path / "c"), str(tmp_path / "d"), "--layout", "native", "--cameras", "front", "wrist"]
    assert main(["checkpoint", "convert", *there]) == 1
    assert "paligemma_tokenizer.model" in capsys.readouterr().err
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.model").write_bytes(tiny.tokenizer_model())
    assert main(["checkpoint", "convert", *there, "--tokenizer", str(tmp_path / "t")]) == 0
    assert load_any(tmp_path / "d", spec=spec()).config.cameras == ("front", "wrist")
    lines = describe(tmp_path / "d")
    assert (lines["family"], lines["cameras"], lines["environment"]) == ("pi0", "front, wrist", "not stored")
    assert main(["checkpoint"]) == 2
