"""ManiSkill behind the contract: needs `vla-rl env install maniskill` and a Vulkan driver, else skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from vla_rl.envs import install
from vla_rl.envs.hosts import maniskill_host as host
from vla_rl.envs.maniskill import ManiSkillConfig, _mapped
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.vulkan import PROBE, driver_environment

ROOT = Path(__file__).resolve().parents[2]


@cache
def _why_not() -> str:
    if not install.is_installed("maniskill"):
        return "ManiSkill is not installed: vla-rl env install maniskill"
    done = subprocess.run([sys.executable, "-c", PROBE], env=os.environ | driver_environment(), capture_output=True)
    return "ManiSkill finds no Vulkan driver: make vulkan" if done.returncode else ""


needs_maniskill = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


# --------------------------------------------------------------------------------------------- without the simulator
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "shaped"}, "reward 'shaped' is unknown; use one of sparse, dense"),
        ({"backend": "tpu"}, "backend 'tpu' is unknown; use one of cpu, gpu"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"max_episode_steps": -1}, "max_episode_steps must be at least 1, got -1"),
        ({"batch_seeds": True}, "batch_seeds is of the GPU batch alone"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ManiSkillConfig(**options)
    with pytest.raises(ValueError, match="split 'eval' is unknown; use one of train, test"):
        ManiSkillConfig().make(1, split="eval")


def test_demonstrations_are_recorded_where_the_experts_are() -> None:
    planned = ManiSkillConfig(control="pd_joint_pos", backend="gpu", batch_seeds=True)
    assert planned.for_demos == replace(planned, backend="cpu", batch_seeds=False, max_episode_steps=300)
    scripted = ManiSkillConfig(task="PushCube-v1")
    assert scripted.for_demos == scripted
    assert planned.options()["render_backend"] == "gpu"
    assert scripted.options("PickCube-v1")["task"] == "PickCube-v1"


def test_without_the_simulator_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLA_RL_ENVS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="vla-rl env install maniskill"):
        ManiSkillConfig().make(1, split="train")


def test_the_fetched_driver_is_found_and_the_users_own_choice_stands(tmp_path: Path, monkeypatch) -> None:
    for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert driver_environment(tmp_path) == {}
    description = tmp_path / "usr/share/vulkan/icd.d/lvp_icd.x86_64.json"
    libraries = tmp_path / "usr/lib/x86_64-linux-gnu"
    description.parent.mkdir(parents=True)
    description.write_text("{}")
    libraries.mkdir(parents=True)
    found = {"VK_ICD_FILENAMES": str(description), "LD_LIBRARY_PATH": str(libraries)}
    assert driver_environment(tmp_path) == found
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    assert driver_environment(tmp_path)["LD_LIBRARY_PATH"] == f"{libraries}:/opt/lib"
    monkeypatch.setenv("VK_DRIVER_FILES", "/opt/icd.json")
    assert driver_environment(tmp_path) == {}


def test_what_an_empty_driver_gets_is_a_reason() -> None:
    """The doctor's question, asked with no driver at all: an error, never a crash or a device."""
    env = os.environ | driver_environment() | {"VK_ICD_FILENAMES": "/nowhere.json", "VK_DRIVER_FILES": "/nowhere.json"}
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Error" in done.stderr.strip().splitlines()[-1]


def test_names_and_sentences() -> None:
    joints = ["a", "b", "c"]
    assert host._names("qpos", 3, joints) == ["qpos_a", "qpos_b", "qpos_c"]
    assert host._names("goal_pos", 3, joints) == ["goal_pos_x", "goal_pos_y", "goal_pos_z"]
    assert host._names("peg_pose", 7, joints)[3:] == ["peg_pose_qw", "peg_pose_qx", "peg_pose_qy", "peg_pose_qz"]
    assert host._names("half_size", 2, joints) == ["half_size_0", "half_size_1"]
    assert host._names("is_grasped", 1, joints) == ["is_grasped"]
    assert host.instruction_of("PushCube-v1") == "push the blue cube to the target"
    assert host.instruction_of("RollBall-v1") == "roll ball"
    assert host.seed_of(5) == host.seed_of(2**32 + 5) == 5


def test_rows_of_nested_dictionaries_are_put_back() -> None:
    now, before = {"arm": {"pose": torch.zeros(3, 2)}, "q": torch.zeros(3, 1)}, {"arm": {"pose": torch.ones(3, 2)}}
    before["q"] = torch.full((3, 1), 2.0)
    rows = torch.tensor([False, True, False])
    back = _mapped(now, lambda new, old: torch.where(rows[:, None], old, new), before)
    assert back["arm"]["pose"].tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert back["q"].flatten().tolist() == [0.0, 2.0, 0.0]


# -------------------------------------------------------------------------------------- in processes, as users have it
@pytest.fixture(scope="module")
def pick() -> Iterator[ChunkedEnv]:
    env = ManiSkillConfig(task="PickCube-v1", image_size=48).make(2, split="train")
    yield env
    env.close()


def _walk(env: ChunkedEnv, seeds: list[int], steps: int = 16) -> torch.Tensor:
    """States [N, 2, S] at the begin and the end of a chunk that goes down to the table and about."""
    generator = torch.Generator().manual_seed(1)
    actions = (2 * torch.rand(1, steps, 4, generator=generator) - 1).expand(2, steps, 4).clone()
    actions[..., 2] -= 0.4
    begin = env.reset(seeds).state
    return torch.stack([begin, env.step(actions).next_obs.state], dim=1)


@needs_maniskill
def test_the_spec_is_the_registered_tasks(pick: ChunkedEnv) -> None:
    spec = pick.spec
    assert (spec.name, spec.max_episode_steps, spec.control_hz) == ("maniskill/PickCube-v1", 50, 20.0)
    assert spec.control_hz == ManiSkillConfig().control_hz
    assert spec.action.names == ("arm_x", "arm_y", "arm_z", "gripper")
    assert spec.action.low == (-1.0,) * 4
    assert [(c, s.height, s.width) for c, s in spec.cameras.items()] == [("base_camera", 48, 48)]
    assert len(set(spec.state_names)) == spec.state_dim == 42


@needs_maniskill
def test_state_and_picture_show_the_cube(pick: ChunkedEnv) -> None:
    obs = pick.reset([0, 1])
    column = pick.spec.state_names.index
    cube, tip, between = (
        obs.state[:, column(f"{key}_x") : column(f"{key}_z") + 1] for key in ("obj_pose", "tcp_pose", "tcp_to_obj_pos")
    )
    torch.testing.assert_close(cube[:, 2], torch.full((2,), 0.02))  # half of its 4 cm, on the table
    torch.testing.assert_close(between, cube - tip)
    assert obs.instruction == ("pick up the red cube and hold it at the goal",) * 2
    red, green, blue = obs.images["base_camera"].int().unbind(-1)
    seen = (red > 180) & (green < 60) & (blue < 60)
    assert seen.flatten(1).sum(1).tolist() == pytest.approx([6, 6], abs=5)
    assert not ((green > 180) & (red < 60)).any()  # the goal is for people
    assert pick.step_env.observe(torch.tensor([1]), images=False).images == {}
    assert pick.render([1]).shape == (1, 256, 256, 3)


@needs_maniskill
def test_an_episode_is_its_seeds_whatever_ran_before(pick: ChunkedEnv) -> None:
    first = _walk(pick, [3, 4])
    pick.reset([10, 11])
    for _ in range(14):  # the engine remembers a grasp, and so did the next episode's state
        pick.step(pick.step_env.expert_actions(torch.arange(2))[:, None])
    assert (pick.observe().state[:, pick.spec.state_names.index("is_grasped")] == 1.0).any()
    again = _walk(pick, [4, 3])
    assert torch.equal(first, again.flip(0))
    assert not torch.equal(first[0, 0], first[1, 0])
    large = _walk(pick, [2**62, 2**62 + 2**40], steps=1)
    assert not torch.equal(large[0, 0], large[1, 0])


@needs_maniskill
def test_the_script_solves_it_and_success_ends_the_episode(pick: ChunkedEnv) -> None:
    pick.reset([10, 11])
    pick.auto_reset = False
    rewards, ends = torch.zeros(2), {}
    for t in range(50):
        step = pick.step(pick.step_env.expert_actions(torch.arange(2))[:, None])
        rewards += step.rewards.sum(1)
        ends |= {i: (t, bool(step.terminated[i]), bool(step.success[i])) for i in step.final_ids.tolist()}
    assert rewards.tolist() == [1.0, 1.0]
    assert sorted(ends) == [0, 1]
    assert all(5 < t < 40 and terminated and success for t, terminated, success in ends.values())


@needs_maniskill
def test_time_ends_an_episode_and_a_saved_one_goes_on_bit_for_bit(pick: ChunkedEnv) -> None:
    pick.auto_reset = False
    pick.reset([7, 8])
    pick.step(torch.full((2, 30, 4), 0.1))
    saved = pick.state_dict()
    actions = torch.full((2, 25, 4), -0.1)
    on = pick.step(actions)
    assert on.truncated.tolist() == [True, True]
    assert on.end_step.tolist() == [19, 19]
    assert on.success.tolist() == on.terminated.tolist() == [False, False]
    pick.reset([1, 2])
    pick.load_state_dict(saved)
    assert torch.equal(pick.step(actions).next_obs.state, on.next_obs.state)


# ------------------------------------------------------------------------------------------- in the simulator's Python
@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tree = tmp_path_factory.mktemp("tree")
    for source in (ROOT / "vla_rl").iterdir():
        (tree / "vla_rl").mkdir(exist_ok=True)
        (tree / "vla_rl" / source.name).symlink_to(source)
    (tree / "vla_rl" / "envs").symlink_to(ROOT / "envs")
    python, script = install.simulator_python("maniskill"), Path(__file__).with_name("maniskill_in_process.py")
    environment = os.environ | driver_environment() | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([python, script, tree], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_maniskill
def test_the_gpu_batch_holds_environments_still_and_knows_its_seeds(answers: dict[str, Any]) -> None:
    """Its code runs here on ManiSkill's CPU physics with one environment; on a GPU it was not run."""
    batch = answers["batch"]
    assert batch["same_seed"]
    assert batch["through_chunks"]
    assert batch["other_stream_differs"]
    assert batch["batch_seeds"] == [True, False]
    assert batch["shown_while_still"]
    assert batch["moved_while_still"] < 1e-6
    assert batch["target_while_still"] == 0.0
    assert batch["resumed_difference"] < 0.01 < 0.1 < batch["moved_afterwards"]
    assert batch["names"] == ["arm_x", "arm_y", "arm_z", "gripper"]


@needs_maniskill
def test_the_planners_episode_is_played(answers: dict[str, Any]) -> None:
    planned = answers["planned"]
    assert planned["success"]
    assert planned["terminated"]
    assert 80 < len(planned["rewards"]) < 110
    assert planned["rewards"] == [0.0] * (len(planned["rewards"]) - 1) + [1.0]


@needs_maniskill
def test_dense_rewards_grow_to_one_and_success_goes_on(answers: dict[str, Any]) -> None:
    dense = answers["dense"]
    rewards = dense["rewards"]
    assert dense["success"]
    assert not dense["terminated"]
    assert not dense["goes_on_after"]
    assert 0 < rewards[0] < rewards[6] < rewards[-2] < rewards[-1] == 1.0


@needs_maniskill
def test_errors_name_what_there_is(answers: dict[str, Any]) -> None:
    errors = answers["errors"]
    assert errors["task"].startswith("ValueError: ManiSkill has no task 'PickCub-v1'; did you mean one of Pick")
    assert "ValueError: PickCube-v1 has no control mode 'telepathy'" in errors["control"]
    assert "pd_ee_delta_pos" in errors["control"]
    assert errors["camera"].startswith("ValueError: there is no camera front; here are base_camera")
    assert errors["expert"].startswith("NotImplementedError: there is no expert for PickCube-v1 with control 'pd_joint")


@needs_maniskill
def test_a_scene_that_is_built_anew_is_its_seeds_too(answers: dict[str, Any]) -> None:
    peg = answers["peg"]
    assert peg["same_seed"]
    assert peg["max_episode_steps"] == 100
    for length, radius, other in peg["sizes"]:
        assert 0.085 <= length <= 0.125
        assert 0.015 <= radius == other <= 0.025
    assert peg["sizes"][0] != peg["sizes"][1]
    plain = peg["plain_names"]
    assert {"tcp_pose_x", "goal_pos_z", "is_grasped"} < set(plain)
    assert not [name for name in plain if name.startswith("obj")]
