"""Configs and policies from outside of the project: written with their name, read when registered, and never imported
because a file says so."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vla_rl.cli import main
from vla_rl.core import ActionSpec, EnvSpec
from vla_rl.policies.build import build_policy
from vla_rl.policies.checkpoints import native, outside
from vla_rl.policies.checkpoints.config_json import config_from_dict, config_to_dict
from vla_rl.policies.checkpoints.native import load_policy, register_policy, save_policy
from vla_rl.policies.flow_mlp import FlowMLPConfig
from vla_rl.train.recipe import Recipe

SPEC = EnvSpec("table", {}, ("x", "y"), ActionSpec((-1.0,), (1.0,), ("dx",)), 50, 20.0)


@dataclasses.dataclass(frozen=True)
class OwnConfig:
    """The fields of `GaussianMLPConfig` that it needs: its keys alone would not tell it apart."""

    state_dim: int = 0
    action_dim: int = 0
    width: int = 3


@dataclasses.dataclass(frozen=True)
class Holder:
    """Open, closed, and exactly its own."""

    opened: FlowMLPConfig | OwnConfig | Any = OwnConfig()
    exact: OwnConfig = OwnConfig()
    closed: FlowMLPConfig | None = None


class OwnPolicy(nn.Module):
    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.Linear(config.state_dim, config.action_dim)


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_REGISTRY", dict(native._REGISTRY))
    monkeypatch.setattr(outside, "_CONFIGS", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(outside.IMPORTS, "")


def test_a_recipe_with_a_policy_from_outside_survives_its_file():
    recipe = Recipe(policy=OwnConfig(width=7))
    with pytest.raises(TypeError, match="call register_policy"):
        build_policy(recipe.policy, SPEC, seed=0)
    register_policy("own", OwnPolicy, OwnConfig)
    stored = json.loads(json.dumps(config_to_dict(recipe)))
    assert stored["policy"] == {"class": f"{__name__}:OwnConfig", "state_dim": 0, "action_dim": 0, "width": 7}
    assert config_from_dict(Recipe, stored) == recipe
    assert build_policy(recipe.policy, SPEC, seed=0).config == OwnConfig(2, 1, 7)
    stored["policy"]["widht"] = 3
    with pytest.raises(ValueError, match="did you mean 'width'"):
        config_from_dict(Recipe, stored)
    ours = json.loads(json.dumps(config_to_dict(Recipe(policy=FlowMLPConfig()))))
    assert "class" not in ours["policy"]
    assert config_from_dict(Recipe, ours).policy == FlowMLPConfig()


def test_the_name_stands_wherever_such_a_config_does_and_opens_nothing_else():
    register_policy("own", OwnPolicy, OwnConfig)
    held = Holder(opened=OwnConfig(width=1), exact=OwnConfig(width=2))
    stored = json.loads(json.dumps(config_to_dict(held)))
    assert config_from_dict(Holder, stored) == held
    stored["closed"] = stored["opened"]
    with pytest.raises(ValueError, match="unknown key 'class'"):
        config_from_dict(Holder, stored)
    stored["closed"], stored["exact"]["class"] = None, "other:OwnConfig"
    with pytest.raises(ValueError, match="unknown key 'class'"):
        config_from_dict(Holder, stored)


@pytest.mark.parametrize("name", ["hostile:Config", "os:system", "hostile", "", 3, ["hostile"], "__main__:Config"])
def test_a_file_cannot_make_anything_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any):
    (tmp_path / "hostile.py").write_text("raise SystemExit('code of a file was run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"config\.policy: .* is not registered") as error:
        config_from_dict(Recipe, {"policy": {"class": name}})
    assert ("--import hostile" in str(error.value)) == str(name).startswith("hostile")
    assert ("defined in a script" in str(error.value)) == str(name).startswith("__main__")
    assert "hostile" not in sys.modules


def test_a_policy_folder_names_its_module_and_is_read_after_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "own_family.py").write_text(
        f"from {__name__} import OwnConfig, OwnPolicy\n"
        "from vla_rl.policies.checkpoints.native import register_policy\n"
        "register_policy('own', OwnPolicy, OwnConfig)\n"
    )
    register_policy("own", OwnPolicy, OwnConfig)
    policy = OwnPolicy(OwnConfig(2, 1))
    save_policy(policy, tmp_path / "policy", spec=SPEC)
    described = native.read_description(tmp_path / "policy")
    assert (described["class"], described["module"]) == ("own", __name__)
    del native._REGISTRY["own"]
    with pytest.raises(native.PolicyCheckpointError, match=f"--import {__name__} on the command line"):
        load_policy(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(outside.IMPORTS, "own_family")  # as a process of a command finds it
    try:
        assert torch.equal(load_policy(tmp_path / "policy").layer.weight, policy.layer.weight)
    finally:
        sys.modules.pop("own_family", None)


def test_the_option_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (tmp_path / "first_family.py").write_text("")
    (tmp_path / "second_family.py").write_text("import a_module_that_is_missing")
    monkeypatch.chdir(tmp_path)
    try:
        assert main(["recipes", "--import", "first_family", "--import", "json"]) == 0
        assert os.environ[outside.IMPORTS] == "first_family,json"
        assert outside.import_options() == ["--import", "first_family", "--import", "json"]
        assert main(["recipes", "--import"]) == 2
        assert main(["recipes", "--import", "--help"]) == 2
        capsys.readouterr()
        assert main(["recipes", "--import", "no_family"]) == 1
        assert "--import no_family: No module named 'no_family'" in capsys.readouterr().err
        monkeypatch.setenv(outside.IMPORTS, "")
        assert main(["recipes", "--import", "second_family"]) == 1
        assert "No module named 'a_module_that_is_missing'" in capsys.readouterr().err
    finally:
        sys.modules.pop("first_family", None)
