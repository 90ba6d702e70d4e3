"""Tensors of checkpoints: what is wrong with a file is said at once and completely, and memory holds one copy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vla_rl.policies.blocks.transformer import RMSNorm
from vla_rl.policies.checkpoints.native import PolicyCheckpointError
from vla_rl.policies.checkpoints.tensors import Recipe, TensorSource, give_values, load_into, on_meta


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = RMSNorm(3)
        self.register_buffer("table", torch.zeros(2, dtype=torch.uint8))
        self.linear.bias.requires_grad_(False)


def write(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {
        "a.weight": torch.randn(4, 3),
        "a.bias": torch.randn(3),
        "n.weight": torch.randn(3),
        "head.weight": torch.zeros(2),
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


RECIPES = {"linear.weight": Recipe(("a.weight",), torch.t), "linear.bias": "a.bias", "norm.weight": "n.weight"}
GIVEN = {"table": torch.tensor([7, 9], dtype=torch.uint8)}


def test_values_names_and_precisions(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    source = TensorSource.of_folder(tmp_path)
    module = load_into(on_meta(Small), source, RECIPES, given=GIVEN, unused=("head\\..*",), dtype=torch.bfloat16)
    assert torch.equal(module.linear.weight, tensors["a.weight"].T.bfloat16())
    assert module.linear.weight.is_contiguous()
    assert module.norm.weight.dtype == torch.float32
    assert torch.equal(module.norm.weight, tensors["n.weight"])
    assert module.table.tolist() == [7, 9]
    assert module.table.dtype == torch.uint8
    assert module.linear.weight.requires_grad
    assert not module.linear.bias.requires_grad
    stored = load_into(on_meta(Small), source, RECIPES, given=GIVEN, unused=("head\\..*",), dtype=None)
    assert stored.linear.weight.dtype == torch.float32


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    write(tmp_path)
    recipes = {"linear.weight": "a.weight", "linear.bias": "gone.bias"}
    with pytest.raises(PolicyCheckpointError) as error:
        load_into(on_meta(Small), TensorSource.of_folder(tmp_path), recipes, given=GIVEN, unused=("a.bias",))
    text = str(error.value)
    for part in (
        "linear.weight (from a.weight) has shape (4, 3), expected (3, 4)",
        "missing gone.bias (for linear.bias (3,))",
        "missing norm.weight (3,)",
        "unknown head.weight (2,)",
        "unknown n.weight (3,)",
    ):
        assert part in text
    assert "unknown a.bias" not in text


def test_only_twenty_problems_are_shown(tmp_path: Path) -> None:
    save_file({f"x{i:02}": torch.zeros(1) for i in range(30)}, tmp_path / "model.safetensors")
    with pytest.raises(PolicyCheckpointError, match="and 10 more") as error:
        load_into(on_meta(nn.Identity), TensorSource.of_folder(tmp_path), {})
    assert str(error.value).count("unknown") == 20


def test_a_recipe_for_other_dimensions_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    recipes = RECIPES | {"linear.weight": Recipe(("a.weight",), lambda x: x.permute(2, 1, 0))}
    with pytest.raises(PolicyCheckpointError, match="other dimensions"):
        load_into(on_meta(Small), TensorSource.of_folder(tmp_path), recipes, given=GIVEN, unused=(".*",))


def test_shards_are_one_source(tmp_path: Path) -> None:
    first, second = {"a": torch.arange(3.0)}, {"b": torch.ones(2, 2, dtype=torch.bfloat16)}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = TensorSource.of_folder(tmp_path)
    assert sorted(source.keys()) == ["a", "b"]
    assert source.shape("b") == (2, 2)
    assert source.dtype("b") == "BF16"
    assert torch.equal(source.get("b", torch.float32), torch.ones(2, 2))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(PolicyCheckpointError, match="missing: model-00002-of-00002"):
        TensorSource.of_folder(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "pointer", "empty", "absent"])
def test_damaged_files_are_errors_that_say_so(tmp_path: Path, damage: str) -> None:
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    if damage == "absent":
        file.unlink()
        with pytest.raises(PolicyCheckpointError, match=r"neither model\.safetensors nor"):
            TensorSource.of_folder(tmp_path)
        return
    content = {
        "truncated": file.read_bytes()[:-5],
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "empty": b"",
    }[damage]
    file.write_bytes(content)
    with pytest.raises(PolicyCheckpointError, match=f"truncated or no safetensors .*{len(content)} bytes"):
        TensorSource.of_folder(tmp_path)


def test_a_module_with_unsaved_tensors_is_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(2), persistent=False)

    with pytest.raises(TypeError, match="table"):
        give_values(on_meta(Hidden), {})


MEMORY = """
import json, sys, torch
from pathlib import Path
from torch import nn
from vla_rl.policies.checkpoints.tensors import TensorSource, load_into, on_meta

def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024

def build():
    return nn.ModuleList(nn.Linear(1024, 1024) for _ in range(50))

source = TensorSource.of_folder(Path(sys.argv[1]))
warm = TensorSource(Path(sys.argv[1]) / "warm.safetensors")
load_into(on_meta(lambda: nn.Linear(1, 1)), warm, {"weight": "w", "bias": "b"})
open("/proc/self/clear_refs", "w").write("5")
before = peak()
module = load_into(on_meta(build), source, {k: k for k in source.keys()}, dtype=getattr(torch, sys.argv[2]))
size = sum(p.numel() * p.element_size() for p in module.parameters())
print(json.dumps([size, peak() - before]))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_little_more_memory_than_the_model(tmp_path: Path, dtype: str) -> None:
    """200 MB of float32 on disk."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is measured through /proc of Linux")
    module = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(50))
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    save_file({"w": torch.zeros(1, 1), "b": torch.zeros(1)}, tmp_path / "warm.safetensors")
    command = [sys.executable, "-c", MEMORY, str(tmp_path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    size, growth = json.loads(done.stdout)
    assert size == 50 * 1024 * 1025 * (4 if dtype == "float32" else 2)
    assert 0.9 * size < growth <= 1.2 * size, f"{growth / size:.2f} times the model"
