"""LIBERO behind the contract: needs `vla-rl env install libero` (found through VLA_RL_ENVS), and its scene assets in
VLA_RL_LIBERO_ASSETS, else skipped."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_rl.envs import install
from vla_rl.envs.libero import HORIZONS, LiberoConfig
from vla_rl.envs.remote import SimulatorError
from vla_rl.envs.vector import ChunkedEnv

needs_libero = pytest.mark.skipif(
    not (install.is_installed("libero") and os.environ.get("VLA_RL_LIBERO_ASSETS")),
    reason="LIBERO is not installed (vla-rl env install libero), or VLA_RL_LIBERO_ASSETS does not name its assets",
)
SOUP = LiberoConfig(task="libero_object/0", cameras=(), privileged_state=True)
HOSTS = Path(install.__file__).parent / "hosts"


@pytest.fixture(scope="module")
def soup() -> Iterator[ChunkedEnv]:
    env = SOUP.make(2, split="train")
    yield env
    env.close()


def _expert_episode(env: ChunkedEnv, seed: int) -> tuple[bool, int, float]:
    """Success, length and sum of rewards of the expert's episode in environment 0."""
    env.reset([seed], [0])
    total = 0.0
    for step in range(1, 601):
        actions = torch.zeros(env.num_envs, 1, 7)
        actions[0, 0] = env.step_env.expert_actions(torch.tensor([0]))[0]
        out = env.step(actions)
        total += float(out.rewards[0].sum())
        if out.ended[0]:
            return bool(out.success[0]), step, total
    raise AssertionError("the episode has no end")


def _run_in_libero(code: str, path: Path) -> None:
    """Run `code` in LIBERO's Python; its arguments are `path`, the file that it is to write, and the assets."""
    configuration = Path(install.environments_folder()) / "libero" / "config"
    subprocess.run(
        [install.simulator_python("libero"), "-c", code, path, os.environ["VLA_RL_LIBERO_ASSETS"]],
        check=True,
        env={**os.environ, "MUJOCO_GL": "egl", "LIBERO_CONFIG_PATH": str(configuration)},
    )


@needs_libero
def test_spec_and_language(soup: ChunkedEnv) -> None:
    spec = soup.spec
    assert spec.name == "libero_object/pick_up_the_alphabet_soup_and_place_it_in_the_basket"
    assert (spec.max_episode_steps, spec.control_hz) == (280, 20.0)
    assert spec.action.names == ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
    assert spec.state_names[:8] == (
        "eef_x", "eef_y", "eef_z", "eef_rx", "eef_ry", "eef_rz", "finger_left", "finger_right",
    )  # fmt: skip
    assert "alphabet_soup_1_x" in spec.state_names
    obs = soup.reset([0, 1])
    assert obs.instruction[0] == "pick up the alphabet soup and place it in the basket"
    assert abs(abs(obs.state[0, 3].item()) - np.pi) < 0.05  # the gripper points down
    assert torch.allclose(obs.state[0, 6:8], torch.tensor([0.04, -0.04]), atol=2e-3)  # open


@needs_libero
def test_a_seed_is_an_episode_whatever_ran_before(soup: ChunkedEnv) -> None:
    actions = torch.rand(1, 6, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first = soup.reset([3, 3])
    moved = soup.step(actions.expand(2, -1, -1))
    assert torch.equal(first.state[0], first.state[1])
    assert torch.equal(moved.obs.state[0], moved.obs.state[1])
    assert _expert_episode(soup, 8)[0]
    again = soup.reset([3], [0])
    assert torch.equal(again.state[0], first.state[0])
    assert torch.equal(soup.step(actions.expand(2, -1, -1)).obs.state[0], moved.obs.state[0])


@needs_libero
@pytest.mark.parametrize("task", ["libero_spatial/0", "libero_goal/0"])
def test_physics_is_liberos_own_to_the_last_bit(task: str, tmp_path: Path) -> None:
    """The host computes a substep's positions once (`_once_a_substep`), robosuite three times: two noisy episodes of
    its script each way, grasp and drawer included, have the same states, velocities, rewards and ends."""
    code = f"""
import pathlib, sys, numpy as np
sys.path.insert(0, {str(HOSTS)!r})
import serve
host = serve.load_host(pathlib.Path({str(HOSTS)!r}, "libero_host.py"))
def episodes():
    env = host.build(dict(task={task!r}, assets=sys.argv[2], cameras={{}}, rotate_180=True, init_state_ids=[0, 1],
        settle_steps=10, max_episode_steps=220, privileged_state=True, fast_pictures=True, render_size=[64, 64]))
    rows = []
    for seed in (0, 1):
        env.reset(seed)
        for step in range(220):
            noise = np.random.default_rng(step).normal(0, 0.1, 7)
            reward, done, *_ = env.step(np.clip(env.expert_action() + noise, -1, 1))
            data = env._env.sim.data
            rows.append([*data.qpos, *data.qvel, *env.observe(False)[0], reward, done])
            if done:
                break
    return np.array(rows)
ours, host._once_a_substep = episodes(), lambda sim: None
np.savez(sys.argv[1], ours=ours, own=episodes())
"""
    _run_in_libero(code, tmp_path / "rows.npz")
    with np.load(tmp_path / "rows.npz") as rows:
        assert rows["own"][-1, -2:].tolist() == [1.0, 1.0]  # it succeeds: the arm has touched what it moves
        np.testing.assert_array_equal(rows["ours"], rows["own"])


@needs_libero
def test_furniture_stands_where_the_seed_says() -> None:
    """The init states do not say where cabinets are; LIBERO draws that, and here the seed decides it alone."""
    config = LiberoConfig(task="libero_spatial/4", cameras=(), privileged_state=True, init_states="customary")
    env = config.make(1, split="test")
    try:
        assert env.spec.max_episode_steps == 220
        columns = [i for i, n in enumerate(env.spec.state_names) if n.startswith("wooden_cabinet_1_")]
        first = env.reset([1]).state[0]
        other = env.reset([51]).state[0]  # the same init state, another draw
        assert torch.allclose(first[:8], other[:8], atol=1e-3)
        assert not torch.equal(first[columns], other[columns])
        assert torch.equal(env.reset([1]).state[0], first)
    finally:
        env.close()


@needs_libero
def test_expert_succeeds_and_success_ends_the_episode(soup: ChunkedEnv) -> None:
    success, length, total = _expert_episode(soup, 0)
    assert (success, total) == (True, 1.0)
    assert 50 < length < 200


@needs_libero
@pytest.mark.parametrize(("task", "longest"), [("libero_goal/0", 120), ("libero_goal/7", 120), ("libero_10/7", 300)])
def test_expert_opens_drawers_turns_knobs_and_follows_goals_of_more_parts(task: str, longest: int) -> None:
    env = LiberoConfig(task=task, cameras=()).make(1, split="train")
    try:
        success, length, _ = _expert_episode(env, 0)
    finally:
        env.close()
    assert success
    assert length < longest


@needs_libero
def test_a_goal_without_a_script_is_refused_each_time() -> None:
    env = LiberoConfig(task="libero_10/3", cameras=()).make(1, split="train")
    try:
        env.reset([0])
        for _ in range(2):
            with pytest.raises(SimulatorError, match="this goal has close white_cabinet_1_bottom_region"):
                env.step_env.expert_actions(torch.tensor([0]))
    finally:
        env.close()


@needs_libero
def test_seeds_walk_through_the_init_states_of_their_split(soup: ChunkedEnv) -> None:
    """Seed 25 begins as seed 0 does: train has 25 states. No scene of `test` is one of `train`."""
    columns = [i for i, name in enumerate(soup.spec.state_names) if name.endswith(("_1_x", "_1_y"))]
    first, again = soup.reset([0, 25]).state[:, columns]
    assert torch.allclose(first, again, atol=1e-4)
    train = torch.cat([soup.reset([s, s + 1]).state[:, columns] for s in range(0, 8, 2)])
    env = SOUP.make(2, split="test")
    try:
        test = torch.cat([env.reset([s, s + 1]).state[:, columns] for s in range(0, 8, 2)])
    finally:
        env.close()
    apart = (train[:, None] - test[None]).abs().amax(dim=2)
    assert apart.min() > 1e-3
    assert torch.cdist(test, test).fill_diagonal_(1.0).min() > 1e-3


@needs_libero
def test_pictures_are_liberos_own() -> None:
    """Ours, turned as the literature does, against robosuite's renderer turned by 180 degrees."""
    config = LiberoConfig(task="libero_spatial/0", image_size=64)
    env = config.make(1, split="train")
    try:
        ours = env.reset([0]).images
    finally:
        env.close()
    code = f"""
import pathlib, sys, numpy as np
sys.path.insert(0, {str(HOSTS)!r})
import serve
host = serve.load_host(pathlib.Path({str(HOSTS)!r}, "libero_host.py"))
env = host.build(dict(task="libero_spatial/0", assets=sys.argv[2], cameras={{}}, rotate_180=True,
    init_state_ids=[0], settle_steps=10, max_episode_steps=220, privileged_state=False, fast_pictures=False,
    render_size=[64, 64]))
env.reset(0)
from robosuite.utils.binding_utils import MjRenderContextOffscreen
sim = env._env.sim
context = MjRenderContextOffscreen(sim, device_id=-1); sim.add_render_context(context)
context.vopt.geomgroup[0], context.vopt.geomgroup[1] = 0, 1
cameras = ("agentview", "robot0_eye_in_hand")
np.savez(sys.argv[1], **{{c: sim.render(64, 64, camera_name=c)[::-1, ::-1] for c in cameras}})
"""
    path = Path(install.environments_folder()) / "libero" / "native_pictures.npz"
    _run_in_libero(code, path)
    with np.load(path) as native:
        for camera in config.cameras:
            difference = np.abs(native[camera].astype(int) - ours[camera][0].numpy().astype(int))
            assert native[camera].std() > 20
            assert (difference > 8).mean() < 0.01, camera
    path.unlink()


@needs_libero
@pytest.mark.slow
@pytest.mark.parametrize("task", ["libero_object/3", "libero_spatial/2", "libero_goal/8", "libero_90/40"])
def test_other_tasks_run(task: str) -> None:
    env = LiberoConfig(task=task, image_size=32).make(1, split="test", auto_reset=True)
    try:
        assert env.reset([0]).images["robot0_eye_in_hand"].float().std() > 10
        out = env.step(torch.zeros(1, 4, 7))
        assert out.executed.all()
        assert env.spec.max_episode_steps == HORIZONS[task.split("/")[0]]
    finally:
        env.close()


@needs_libero
def test_what_libero_does_not_know() -> None:
    with pytest.raises(
        SimulatorError, match=re.escape("task 'libero_goal/juggle' is unknown; libero_goal has 10 tasks")
    ):
        LiberoConfig(task="libero_goal/juggle").make(1, split="train")


def test_splits_of_the_init_states() -> None:
    config = LiberoConfig()
    train, test = config.init_state_ids("train"), config.init_state_ids("test")
    assert sorted(train + test) == list(range(50))
    customary = LiberoConfig(init_states="customary")
    assert customary.init_state_ids("train") == customary.init_state_ids("test") == list(range(50))
    with pytest.raises(ValueError, match="split 'exam' is unknown"):
        config.init_state_ids("exam")
    with pytest.raises(ValueError, match="init_states 'all' is unknown"):
        LiberoConfig(init_states="all").make(1, split="train")


def test_bad_configurations_are_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="suite 'libero_moon' is unknown"):
        LiberoConfig(task="libero_moon/0").make(1, split="train")
    with pytest.raises(FileNotFoundError, match="there are no scene assets in"):
        LiberoConfig(assets=str(tmp_path)).make(1, split="train")
    monkeypatch.setenv("VLA_RL_ENVS", str(tmp_path))
    monkeypatch.delenv("VLA_RL_LIBERO_ASSETS", raising=False)
    with pytest.raises(FileNotFoundError, match="vla-rl env install libero"):
        LiberoConfig().make(1, split="train")


@needs_libero
def test_missing_assets_are_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VLA_RL_LIBERO_ASSETS")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        SimulatorError, match=r"scene assets are not on this machine .* set VLA_RL_LIBERO_ASSETS"
    ) as told:
        LiberoConfig(cameras=()).make(1, split="test")
    assert not hasattr(told.value, "__notes__")  # no traceback: nothing of it helps


def test_init_state_files_may_hold_arrays_only(tmp_path: Path) -> None:
    """The reader of LIBERO's torch archives unpickles numpy arrays and refuses anything else."""
    source = (HOSTS / "libero_host.py").read_text()
    begin, end = source.index("_ARRAY_PARTS = ("), source.index("class LiberoEnv")
    code = "import io, pickle, zipfile, sys, os\nimport numpy as np\nfrom typing import Any\nfrom pathlib import Path\n"
    code += source[begin:end] + "\nprint(read_init_states(Path(sys.argv[1])).shape)\n"
    states = np.arange(12.0).reshape(3, 4)
    payloads = {"good": pickle.dumps(states, protocol=2), "bad": pickle.dumps(os.getcwd, protocol=2)}
    for name, payload in payloads.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("archive/data.pkl", payload.replace(b"numpy._core.", b"numpy.core."))
    run = [sys.executable, "-W", "ignore", "-c", code]
    good = subprocess.run([*run, tmp_path / "good"], capture_output=True, text=True)
    assert good.stdout.strip() == "(3, 4)", good.stderr
    bad = subprocess.run([*run, tmp_path / "bad"], capture_output=True, text=True)
    assert "init states must be plain arrays, found posix.getcwd" in bad.stderr
