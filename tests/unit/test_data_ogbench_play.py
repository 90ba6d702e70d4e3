"""OGBench play data: an episode against the simulator, resuming, the file's layout, rewards by hand, cutting."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from vla_rl.data.ogbench_play import (
    PlayConfig,
    cut_episodes,
    generate_play,
    play_episode,
    singletask_dataset,
)

SHORT = PlayConfig(env="cube-double", num_episodes=3, episode_steps=12, seed=5)


def test_an_episode_is_what_the_simulator_does():
    """The recorded actions move a simulation that is put into the recorded first state along the recorded states."""
    import mujoco
    from ogbench.manipspace.envs.cube_env import CubeEnv  # pyright: ignore[reportMissingImports]

    arrays = play_episode(PlayConfig(episode_steps=40, seed=1), episode=2)
    assert {k: (v.shape, str(v.dtype)) for k, v in arrays.items()} == {
        "observations": ((41, 28), "float32"),
        "actions": ((41, 5), "float32"),
        "terminals": ((41,), "float32"),
        "qpos": ((41, 21), "float32"),
        "qvel": ((41, 20), "float32"),
        "segments": ((2,), "int32"),
    }
    assert arrays["terminals"].tolist() == [0.0] * 40 + [1.0]
    assert not arrays["actions"][-1].any()
    assert np.abs(arrays["actions"]).max() <= 1.0
    np.testing.assert_array_equal(arrays["observations"][:, :6], arrays["qpos"][:, :6])  # joint positions
    np.testing.assert_allclose(
        arrays["observations"][:, 19:22], (arrays["qpos"][:, 14:17] - [0.425, 0.0, 0.0]) * 10, atol=1e-5
    )
    env = CubeEnv(env_type="single", mode="data_collection", terminate_at_goal=False)
    env.reset(seed=0)
    env.data.qpos[:], env.data.qvel[:] = arrays["qpos"][0], arrays["qvel"][0]
    mujoco.mj_forward(env.model, env.data)
    for step in range(20):
        obs, *_ = env.step(arrays["actions"][step])
        np.testing.assert_allclose(obs[:6], arrays["qpos"][step + 1, :6], atol=1e-3)


def test_an_episode_depends_on_its_number_alone_and_leaves_numpys_generator_alone():
    np.random.seed(0)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    first = play_episode(SHORT, 1)
    assert np.random.random() == expected  # noqa: NPY002
    other = play_episode(SHORT, 2)
    again = play_episode(SHORT, 1)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first["observations"][0], other["observations"][0])


def test_the_oracle_reaches_its_targets():
    arrays = play_episode(PlayConfig(episode_steps=300, seed=0), 0)
    assert arrays["segments"].tolist() == [3, 3]
    moved = np.abs(np.diff(arrays["qpos"][:, 14:17], axis=0)).sum()
    assert moved > 0.3  # metres that the cube went
    assert arrays["qpos"][:, 16].max() > 0.1  # it was lifted


def test_an_interrupted_call_goes_on_and_ends_with_the_same_file(tmp_path: Path):
    class Stopped(Exception):
        pass

    def stop(done: int, of: int) -> None:
        raise Stopped

    for expected_parts in (1, 2):
        with pytest.raises(Stopped):
            generate_play(SHORT, tmp_path / "a.npz", progress=stop)
        assert len(list((tmp_path / "a.npz.parts").glob("episode_*.npz"))) == expected_parts
    with pytest.raises(ValueError, match="give another path"):
        generate_play(PlayConfig(env="cube-double", num_episodes=4, episode_steps=12, seed=5), tmp_path / "a.npz")
    calls: list[tuple[int, int]] = []
    summary = generate_play(SHORT, tmp_path / "a.npz", progress=lambda done, of: calls.append((done, of)))
    assert calls == [(3, 3)]
    assert summary.num_steps == 36
    assert summary.steps_per_second > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz"]

    generate_play(SHORT, tmp_path / "b.npz")
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert set(a.files) == {"observations", "actions", "terminals", "qpos", "qvel", "segments", "config"}
    for name in a.files:
        np.testing.assert_array_equal(a[name], b[name])
    before = (tmp_path / "a.npz").stat().st_mtime_ns
    assert generate_play(SHORT, tmp_path / "a.npz").steps_per_second == 0.0
    assert (tmp_path / "a.npz").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="give another path"):
        generate_play(PlayConfig(env="cube-single"), tmp_path / "a.npz")


@pytest.mark.slow
def test_processes_make_the_same_data(tmp_path: Path):
    generate_play(SHORT, tmp_path / "one.npz")
    generate_play(SHORT, tmp_path / "two.npz", num_processes=2)
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    for name in one.files:
        np.testing.assert_array_equal(one[name], two[name])


def test_rewards_of_a_single_task_by_hand(tmp_path: Path):
    path = tmp_path / "play.npz"
    generate_play(SHORT, path)
    with np.load(path) as file:
        arrays = dict(file)
    goals = np.array([[0.425, 0.0, 0.02], [0.425, 0.1, 0.02]])  # of cube-double task 1
    rows = np.arange(len(arrays["qpos"])) % 13 < 12
    arrays["qpos"][3, 14:17] = goals[0] + [0.03, 0.0, 0.0]
    arrays["qpos"][4, 14:17] = goals[0] + [0.05, 0.0, 0.0]
    arrays["qpos"][7, 14:17], arrays["qpos"][7, 21:24] = goals
    np.savez(path, **arrays)

    dataset = singletask_dataset(path, "cube-double-singletask-task1-v0")
    cubes = np.stack([arrays["qpos"][:, 14:17], arrays["qpos"][:, 21:24]], axis=1)
    out = (np.linalg.norm(cubes - goals, axis=2) > 0.04).sum(axis=1)[rows]
    np.testing.assert_array_equal(dataset["rewards"], -out)
    np.testing.assert_array_equal(dataset["masks"], out > 0)
    assert dataset["rewards"][[3, 4, 7]].tolist() == [-1.0, -2.0, 0.0]
    assert dataset["terminals"].tolist() == ([0.0] * 11 + [1.0]) * 3
    np.testing.assert_array_equal(dataset["next_observations"][11], arrays["observations"][12])
    np.testing.assert_array_equal(dataset["observations"][12], arrays["observations"][13])

    episodes = cut_episodes(dataset)
    assert [len(e.actions) for e in episodes] == [8, 4, 12, 12]
    assert [e.terminated for e in episodes] == [True, False, False, False]
    with pytest.raises(ValueError, match="not one of its single tasks"):
        singletask_dataset(path, "cube-single-singletask-task1-v0")


def test_cutting_keeps_every_transition_once_and_its_true_successor():
    rng = np.random.default_rng(0)
    size = 60
    dataset = {
        "observations": rng.normal(size=(size, 3)).astype(np.float32),
        "next_observations": rng.normal(size=(size, 3)).astype(np.float32),
        "actions": rng.normal(size=(size, 2)).astype(np.float32),
        "rewards": rng.normal(size=size).astype(np.float32),
        "masks": (rng.random(size) > 0.3).astype(np.float32),
        "terminals": (np.arange(size) % 20 == 19).astype(np.float32),
    }
    episodes = cut_episodes(dataset)
    np.testing.assert_array_equal(np.concatenate([e.actions for e in episodes]), dataset["actions"])
    np.testing.assert_array_equal(np.concatenate([e.rewards for e in episodes]), dataset["rewards"])
    np.testing.assert_array_equal(np.concatenate([e.states[:-1] for e in episodes]), dataset["observations"])
    end = -1
    for e in episodes:
        end += len(e.actions)
        np.testing.assert_array_equal(e.states[-1], dataset["next_observations"][end])
        assert e.terminated == (dataset["masks"][end] == 0.0)
        assert e.truncated == (not e.terminated)
        assert e.terminated or dataset["terminals"][end] == 1.0
    assert end == size - 1


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="choose one of cube-single, cube-double, cube-triple"):
        PlayConfig(env="antmaze")
    with pytest.raises(ValueError, match="must be positive"):
        PlayConfig(num_episodes=0)


def test_without_ogbench_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'vla-rl\[ogbench\]'"):
        generate_play(SHORT, tmp_path / "a.npz")
