"""openpi's JAX checkpoints: what orbax writes is read, and what is written orbax reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit import tiny_checkpoints as tiny
from vla_rl.policies.checkpoints.assemble import assemble
from vla_rl.policies.checkpoints.native import PolicyCheckpointError
from vla_rl.policies.checkpoints.openpi import plan_openpi
from vla_rl.policies.checkpoints.openpi_jax import plan_openpi_jax, save_openpi_jax
from vla_rl.policies.checkpoints.options import ReadOptions
from vla_rl.policies.checkpoints.orbax import OrbaxSource, write_orbax
from vla_rl.policies.pi0 import Pi0

jax = pytest.importorskip("jax")
checkpoint = pytest.importorskip("orbax.checkpoint")

FIVE = ReadOptions(action_horizon=5)


def load(folder: Path, options: ReadOptions = FIVE) -> Pi0:
    policy = assemble(plan_openpi_jax(folder, options), options)
    assert isinstance(policy, Pi0)
    return policy


@pytest.mark.parametrize(("adaptive", "value"), [(False, False), (True, True)])
def test_jax_and_torch_checkpoints_are_one_policy(tmp_path: Path, adaptive: bool, value: bool) -> None:
    tiny.write_openpi_jax(tmp_path / "jax", adaptive=adaptive, value=value)
    tiny.write_openpi(tmp_path / "torch", adaptive=adaptive)
    ours = load(tmp_path / "jax")
    options = ReadOptions()
    theirs = assemble(plan_openpi(tmp_path / "torch", options), options)
    assert ours.config == theirs.config
    first, second = ours.state_dict(), theirs.state_dict()
    assert list(first) == list(second)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_projections_do_what_the_einsums_do(tmp_path: Path) -> None:
    """Against openpi's equations, not against a table of transposes."""
    tiny.write_openpi_jax(tmp_path / "c", adaptive=False, value=False)
    tree = tiny.jax_tree(tiny.pi0_tensors(adaptive=False), adaptive=False)["PaliGemma"]
    policy = load(tmp_path / "c")
    rows = np.random.default_rng(0).standard_normal((6, 32))
    x = torch.from_numpy(rows)
    layer, attn = policy.language_model.layers[1].double(), tree["llm"]["layers"]["attn"]
    q = np.einsum("td,ndh->tnh", rows, attn["q_einsum"]["w"][1])
    k, v = np.einsum("sd,ckdh->cskh", rows, attn["kv_einsum"]["w"][1])
    out = np.einsum("tnh,nhd->td", q, attn["attn_vec_einsum"]["w"][1])
    with torch.no_grad():
        projected = layer.self_attn.q_proj(x)
        np.testing.assert_allclose(projected, q.reshape(6, -1), rtol=1e-6)
        np.testing.assert_allclose(layer.self_attn.k_proj(x), k.reshape(6, -1), rtol=1e-6)
        np.testing.assert_allclose(layer.self_attn.v_proj(x), v.reshape(6, -1), rtol=1e-6)
        np.testing.assert_allclose(layer.self_attn.o_proj(projected), out, rtol=1e-6, atol=1e-12)
        mlp = tree["llm"]["layers"]["mlp"]
        np.testing.assert_allclose(layer.mlp.gate_proj(x), rows @ mlp["gating_einsum"][1, 0], rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(layer.mlp.up_proj(x), rows @ mlp["gating_einsum"][1, 1], rtol=1e-6, atol=1e-12)
        vision = policy.vision.layers[0].double().self_attn
        query = tree["img"]["Transformer"]["encoderblock"]["MultiHeadDotProductAttention_0"]["query"]
        expected = np.einsum("td,dnh->tnh", rows[:, :16], query["kernel"][0]) + query["bias"][0]
        np.testing.assert_allclose(vision.q_proj(x[:, :16]), expected.reshape(6, -1), rtol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_round_trip_and_reading_by_orbax(tmp_path: Path, adaptive: bool) -> None:
    tiny.write_openpi_jax(tmp_path / "c", adaptive=adaptive, value=True)
    policy = load(tmp_path / "c")
    save_openpi_jax(policy, tmp_path / "again")
    again = load(tmp_path / "again", ReadOptions())
    assert again.config == policy.config
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in policy.state_dict().items())
    with checkpoint.PyTreeCheckpointer() as reader:
        tree = reader.restore((tmp_path / "again" / "params").resolve())["params"]
    expected = tiny.jax_tree(tiny.pi0_tensors(adaptive=adaptive), adaptive=adaptive)
    assert jax.tree.all(jax.tree.map(np.array_equal, tree, expected))


def test_bfloat16_arrays_keep_their_bits(tmp_path: Path) -> None:
    stacked = torch.randn(2, 3, 4).bfloat16()
    write_orbax(tmp_path / "params", {"a.b": stacked, "zeros": torch.zeros(3)})
    source = OrbaxSource(tmp_path / "params", {"a.b": 1})
    assert sorted(source.keys()) == ["a.b[0]", "a.b[1]", "zeros"]
    assert source.shape("a.b[1]") == (3, 4)
    assert source.dtype("a.b[1]") == "bfloat16"
    assert torch.equal(source.view("a.b[1]"), stacked[1])
    assert source.view("zeros").tolist() == [0.0, 0.0, 0.0]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyCheckpointError, match="no params of orbax; it holds nothing"):
        load(tmp_path)
    tiny.write_openpi_jax(tmp_path / "c", adaptive=False, value=False)
    with pytest.raises(PolicyCheckpointError, match="50 for pi0_base"):
        load(tmp_path / "c", ReadOptions())
    arrays = OrbaxSource(tmp_path / "c" / "params", {})
    kept = {name: arrays.view(name) for name in arrays.keys() if "state_proj.bias" not in name}  # noqa: SIM118
    write_orbax(tmp_path / "d" / "params", kept | {"lora_a": torch.zeros(2)})
    (tmp_path / "d" / "tokenizer.model").write_bytes(tiny.tokenizer_model())
    with pytest.raises(PolicyCheckpointError, match=r"(?s)missing state_proj\.bias.*unknown lora_a"):
        load(tmp_path / "d")


def test_damaged_arrays_are_errors_that_say_so(tmp_path: Path) -> None:
    write_orbax(tmp_path / "params", {"a": torch.randn(64, 64)})
    biggest = max((tmp_path / "params" / "d").iterdir(), key=lambda file: file.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[:100])
    with pytest.raises(PolicyCheckpointError, match="copy it again"):
        OrbaxSource(tmp_path / "params", {}).view("a")
