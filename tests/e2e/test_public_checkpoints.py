"""sft, train and eval on a public checkpoint's folder, in each layout, to the end; and back into the layout."""

import copy
import json
from pathlib import Path

import pytest
import torch

from tests.unit import openvla_public, tiny_checkpoints
from vla_rl.cli import main
from vla_rl.evaluation.result import EvalResult
from vla_rl.policies.checkpoints.load_any import layout_of, load_any

ENV = ["--env.image-size", "32", "--env.num-threads", "1"]
SFT = ["--sft.num-updates", "2", "--sft.batch-size", "4", "--sft.warmup-updates", "1"]
RL = [
    *("--train.num-iterations", "2", "--train.num-envs", "2", "--train.algorithm.num-decisions", "3"),
    *("--train.algorithm.critic-warmup-iterations", "0", "--train.eval-interval", "0"),
]
EVAL = ["--evaluation.num-episodes", "2", "--evaluation.num-envs", "2", "--evaluation.policy-batch-size", "2"]
STATE_DIM, ACTION_DIM = 30, 4  # of the tabletop with the goal in its state


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos") / "demos"
    assert main(["demos", "pi0", "--out", str(folder), *ENV, "--demos.num-episodes", "2", "--demos.num-envs", "2"]) == 0
    return folder


def write_oft(folder: Path) -> None:
    torch.manual_seed(0)
    statistics = copy.deepcopy(openvla_public.STATISTICS)
    proprio = {"q01": [-1.0] * STATE_DIM, "q99": [1.0] * STATE_DIM}
    statistics["toy"]["proprio"] = proprio | {"min": [-2.0] * STATE_DIM, "max": [2.0] * STATE_DIM}
    openvla_public.write_folder(folder, openvla_public.model_tensors(), norm_stats=statistics)
    openvla_public.write_heads(folder, openvla_public.head_tensors(), openvla_public.proprio_tensors(STATE_DIM))
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))


def write_openvla(folder: Path) -> None:
    torch.manual_seed(0)
    openvla_public.write_folder(folder, openvla_public.model_tensors())


# LeRobot keeps the number of denoising steps in its config (4 here), openpi does not (10)
OPENPI = ["--train.sampler.num-steps", "10"]
ONE_STEP = ["--train.execution-horizon", "1"]
LAYOUTS = {
    "openpi-pi0": ("pi0", "openpi", lambda f: tiny_checkpoints.write_openpi(f, adaptive=False), OPENPI),
    "openpi-pi05": ("pi05", "openpi", lambda f: tiny_checkpoints.write_openpi(f, adaptive=True), OPENPI),
    "openpi_jax-pi0": (
        "pi0",
        "openpi_jax",
        lambda f: tiny_checkpoints.write_openpi_jax(f, adaptive=False, value=True),
        OPENPI,
    ),
    "lerobot-pi0": ("pi0", "lerobot", lambda f: tiny_checkpoints.write_lerobot(f, "pi0"), []),
    "lerobot-smolvla": ("smolvla", "lerobot", lambda f: tiny_checkpoints.write_lerobot(f, "smolvla"), []),
    "openvla": ("openvla", "openvla", write_openvla, ONE_STEP),
    "openvla-oft": ("openvla_oft", "openvla", write_oft, []),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_public_checkpoint_goes_through_all_commands(name, demos, tmp_path, capsys):
    recipe, layout, write, options = LAYOUTS[name]
    folder = tmp_path / "public"
    write(folder)
    assert layout_of(folder) == layout
    if layout == "openpi_jax":  # whose files do not say how long a chunk is
        named = str(tmp_path / "named")
        assert main(["checkpoint", "convert", str(folder), named, "--layout", "openpi", "--action-horizon", "5"]) == 0
        folder, layout = Path(named), "openpi"
    sft, rl, back = (str(tmp_path / x) for x in ("sft", "rl", "back"))
    command = ["sft", recipe, "--policy", str(folder), "--dataset", str(demos), "--run-dir", sft]
    assert main([*command, *ENV, *SFT, *options]) == 0, capsys.readouterr().err
    command = ["train", recipe, "--policy", f"{sft}/policy", "--run-dir", rl]
    assert main([*command, *ENV, *RL, *options]) == 0, capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["update/ratio_error_first"] < 1e-3

    assert main(["checkpoint", "convert", f"{rl}/policy", back, "--layout", layout]) == 0, capsys.readouterr().err
    command = ["eval", "--policy", back, "--recipe", recipe, "--out", str(tmp_path / "eval")]
    assert main([*command, *ENV, *EVAL]) == 0, capsys.readouterr().err
    assert len(EvalResult.load(tmp_path / "eval").episodes) == 2
    ours, theirs = load_any(tmp_path / "rl" / "policy"), load_any(back)
    assert ours.config.action_dim == theirs.config.action_dim == ACTION_DIM
    assert ours.config.state_dim == STATE_DIM


def test_a_checkpoint_of_another_robot_says_what_to_do(tmp_path, capsys):
    tiny_checkpoints.write_openpi(tmp_path / "public", adaptive=False)
    command = ["eval", "--policy", str(tmp_path / "public"), "--recipe", "pi0", "--out", str(tmp_path / "eval")]
    assert main([*command, *ENV]) == 1
    error = capsys.readouterr().err
    assert "statistics of 8 dimensions, the environment has 30" in error
    assert "vla-rl sft" in error


def test_what_a_folder_of_openvla_does_not_say_is_an_option(tmp_path, capsys):
    write_openvla(tmp_path / "public")
    command = ["checkpoint", "convert", str(tmp_path / "public"), str(tmp_path / "ours"), "--layout", "native"]
    more = ["--openvla.action-horizon", "2", "--openvla.gripper.kind", "closed_is_one", "--cameras", "agent"]
    assert main([*command, *more]) == 0, capsys.readouterr().err
    config = load_any(tmp_path / "ours").config
    assert config.action_horizon == 2
    assert config.inputs.gripper.kind == "closed_is_one"
    tiny_checkpoints.write_openpi(tmp_path / "pi0", adaptive=False)
    assert main([*command[:2], str(tmp_path / "pi0"), str(tmp_path / "again"), *command[4:], *more[:4]]) == 1
    assert "is no folder of OpenVLA" in capsys.readouterr().err
