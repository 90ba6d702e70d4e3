"""Simulators in other processes: same results whatever the workers, deaths counted, errors told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.contract.environments import DRIFT_HOST
from vla_rl.data.demos import collect_demos
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.data.replay import ReplayBuffer, ReplayConfig
from vla_rl.data.replay_writer import EpisodeWriter
from vla_rl.envs import remote
from vla_rl.envs.hosts import protocol
from vla_rl.envs.remote import HostConfig, RemoteStepEnv, SimulatorError
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.evaluation.evaluate import evaluate_controller


def _config(**options) -> HostConfig:
    return HostConfig(sys.executable, DRIFT_HOST, options, timeout_s=20.0)


def _rollout(num_envs: int, num_workers: int, env_ids: list[int]) -> list[torch.Tensor]:
    """States and pictures that the environments of `env_ids` show, over three chunks."""
    env = ChunkedEnv(RemoteStepEnv(_config(), num_envs, num_workers=num_workers))
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(3, 4, 4, 2, generator=generator)
    seen = [env.reset(range(num_envs)).state[env_ids]]
    for chunk in actions:
        step = env.step(chunk[:num_envs])
        seen += [step.obs.state[env_ids], step.obs.images["agent"][env_ids], step.rewards[env_ids]]
    env.close()
    return seen


def test_the_number_of_workers_and_environments_changes_nothing() -> None:
    one = _rollout(4, 1, [0, 1])
    for other in (_rollout(4, 3, [0, 1]), _rollout(2, 2, [0, 1])):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_states_and_pictures_are_those_of_the_simulator() -> None:
    env = RemoteStepEnv(_config(camera=6), 3, num_workers=2)
    env.reset(torch.arange(3), torch.tensor([5, 6, 7]))
    env.step(torch.full((3, 2), 0.5), torch.tensor([True, False, True]))
    obs = env.observe(torch.tensor([2, 0]), images=True)
    for row, seed in enumerate((7, 5)):
        rng = np.random.default_rng(seed)
        x, drift = rng.uniform(-0.5, 0.5), rng.uniform(-0.2, 0.2)
        x += 0.15 + drift
        np.testing.assert_allclose(obs.state[row], [x, drift, 1], rtol=1e-6)
        assert (obs.images["agent"][row] == int(128 + 60 * x)).all()
        assert obs.instruction[row] == f"go right against {drift:.2f}"
    assert env.observe(torch.tensor([1]), images=False).images == {}
    assert env.observe(torch.tensor([1]), images=False).state[0, 2] == 0
    assert torch.equal(env.expert_actions(torch.tensor([1])), torch.tensor([[1.0, 0.0]]))
    env.close()


def test_a_chunk_is_one_question_and_the_same_as_its_steps(monkeypatch) -> None:
    calls: list[str] = []
    send = protocol.send
    monkeypatch.setattr(remote, "send", lambda channel, message, arrays=None: (
        calls.append(message["call"]), send(channel, message, arrays))[1])  # fmt: skip
    actions = torch.rand(4, 8, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    steps = {}
    for name, record in (("ahead", ()), ("recorded", range(4))):
        env = ChunkedEnv(RemoteStepEnv(_config(), 4, num_workers=2))
        env.reset(range(4))
        calls.clear()
        steps[name] = env.step(actions, record=record)
        moved = steps[name].executed
        by_step = int(moved[0::2].any(dim=0).sum() + moved[1::2].any(dim=0).sum())
        assert calls.count("run") == (2 if name == "ahead" else by_step)
        env.close()
    one, other = steps["ahead"], steps["recorded"]
    assert (one.end_step >= 0).any()  # some episodes end within it
    assert (one.end_step < 0).any()
    for field in ("rewards", "executed", "terminated", "truncated", "success", "success_at_end", "end_step"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
    for seen, too in ((one.obs, other.obs), (one.final_obs, other.final_obs)):
        assert torch.equal(seen.state, too.state)
        assert torch.equal(seen.images["agent"], too.images["agent"])


def test_what_is_seen_after_a_chunk_comes_with_it_and_is_not_asked_for_twice(monkeypatch) -> None:
    asked: list[tuple[str, list[int]]] = []
    send = protocol.send
    monkeypatch.setattr(remote, "send", lambda channel, message, arrays=None: (
        asked.append((message["call"], message.get("ids"))), send(channel, message, arrays))[1])  # fmt: skip
    simulator = RemoteStepEnv(_config(max_episode_steps=100), 4, num_workers=2)
    asked.clear()
    env = ChunkedEnv(simulator, final_images=False, auto_reset=False)
    env.reset(range(4))
    assert [call for call, _ in asked] == ["reset"] * 2 + ["observe"] * 2
    env.step(torch.zeros(4, 2, 2))
    assert [call for call, _ in asked[4:]] == ["run"] * 2
    del asked[:]
    actions = torch.zeros(4, 30, 2)
    actions[0, :, 0], actions[1:, :, 0] = 1.0, -env.observe().state[1:, 1, None] / 0.3  # one goes, the others stay
    ends = env.step(actions)
    assert ends.terminated.tolist() == [True, False, False, False]
    assert asked[2:] == [("observe", [0])] * 2  # its state, then its picture
    del asked[:]
    frozen = env.step(torch.zeros(4, 1, 2))
    assert [call for call, _ in asked] == ["run"] * 2
    assert torch.equal(frozen.obs.images["agent"][0], ends.obs.images["agent"][0])
    seen = env.observe()
    assert len(asked) == 2
    assert torch.equal(seen.state, frozen.obs.state)
    simulator.step(torch.ones(4, 2), torch.tensor([False, True, False, False]))  # not a chunk: nothing came with it
    assert not torch.equal(env.observe().state[1], seen.state[1])
    assert asked[-1] == ("observe", [0])
    env.close()


def test_streams_do_not_share_an_episode() -> None:
    seen = {}
    for stream in ((), (0,), (1,)):
        env = RemoteStepEnv(_config(), 4, stream=stream)
        env.reset(torch.arange(4), torch.arange(4))
        seen[stream] = {tuple(row.tolist()) for row in env.observe(torch.arange(4), images=False).state}
        env.close()
    assert len(set.union(*seen.values())) == 12


def _deadly(tmp_path: Path, num_envs: int = 3, **options) -> RemoteStepEnv:
    """The process of environments 0 and 2 dies once, in the third step of the episode of seed 0."""
    return RemoteStepEnv(_config(bad_seeds=[0], marker=str(tmp_path / "died"), **options), num_envs, num_workers=2)


def test_a_dead_process_costs_its_running_episodes_and_no_others(tmp_path: Path, capfd) -> None:
    remote = _deadly(tmp_path)
    env = ChunkedEnv(remote)
    env.reset([0, 1, 2])
    first = env.step(torch.zeros(3, 2, 2))
    assert not first.lost.any()
    step = env.step(torch.zeros(3, 2, 2))
    assert step.lost.tolist() == [True, False, True]
    assert step.truncated.tolist() == [True, False, True]
    assert not step.terminated.any()
    assert step.executed.tolist() == [[False, False], [True, True], [False, False]]
    assert step.rewards[[0, 2]].eq(0).all()
    assert remote.num_lost == 2
    assert torch.equal(step.final_obs.state, first.obs.state[[0, 2]])  # what the decision saw
    assert torch.equal(step.final_obs.images["agent"], first.obs.images["agent"][[0, 2]])
    assert step.obs.state[:, 2].tolist() == [0, 4, 0]  # new episodes in the new process, the other one goes on
    assert "2 running episodes are lost" in capfd.readouterr().err
    assert not env.step(torch.zeros(3, 2, 2)).lost.any()
    env.close()


def test_a_killed_process_is_noticed_wherever_it_dies(tmp_path: Path) -> None:
    remote = RemoteStepEnv(_config(), 2, num_workers=2)
    env = ChunkedEnv(remote, auto_reset=False)
    env.reset([1, 2])
    env.step(torch.zeros(2, 1, 2))
    os.kill(remote._workers[0].process.pid, signal.SIGKILL)
    shown = env.observe().state  # it died between two steps: what it showed last is still shown
    assert shown[0, 2] == 1
    step = env.step(torch.zeros(2, 1, 2))
    assert step.lost.tolist() == [True, False]
    again = env.step(torch.zeros(2, 1, 2))  # frozen until it is reset
    assert again.executed.tolist() == [[False], [True]]
    os.kill(remote._workers[0].process.pid, signal.SIGKILL)
    obs = env.reset([5], [0])  # the new episode had not begun: it begins in the next process, nothing is lost
    assert obs.state[0, 2] == 0
    assert remote.num_lost == 1
    env.close()


def test_a_hanging_process_counts_as_dead(tmp_path: Path) -> None:
    config = HostConfig(
        sys.executable,
        DRIFT_HOST,
        {"bad_seeds": [0], "at": 1, "hang": True, "marker": str(tmp_path / "hung")},
        timeout_s=1.0,
    )
    env = ChunkedEnv(RemoteStepEnv(config, 1))
    env.reset([0])
    start = time.monotonic()
    assert env.step(torch.zeros(1, 1, 2)).lost.all()
    assert time.monotonic() - start < 15
    env.close()


def test_a_process_that_keeps_dying_is_given_up() -> None:
    config = HostConfig(sys.executable, DRIFT_HOST, {"bad_seeds": [0], "at": 1}, max_restarts=2)
    env = ChunkedEnv(RemoteStepEnv(config, 1), auto_reset=False)
    for _ in range(2):
        env.reset([0])
        assert env.step(torch.zeros(1, 1, 2)).lost.all()
    env.reset([0])
    with pytest.raises(SimulatorError, match=r"died 3 times.*ended with -9(.|\n)*the simulator broke"):
        env.step(torch.zeros(1, 1, 2))
    env.close()


def test_the_simulators_own_errors_are_told() -> None:
    with pytest.raises(SimulatorError, match="ValueError: no such task"):
        RemoteStepEnv(_config(fail=True), 1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        RemoteStepEnv(HostConfig("/nowhere/python", DRIFT_HOST), 1)
    with pytest.raises(SimulatorError, match="does not start"):
        RemoteStepEnv(HostConfig("/bin/false", DRIFT_HOST), 1)


def test_nobody_is_left_when_the_parent_is_killed() -> None:
    code = (
        "import sys, time; from vla_rl.envs.remote import *\n"
        f"e = RemoteStepEnv(HostConfig(sys.executable, {str(DRIFT_HOST)!r}), 1)\n"
        "print(e._workers[0].process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < end, "the simulator's process outlives its parent"
        time.sleep(0.05)


def test_replay_ends_a_lost_episode_where_it_stood(tmp_path: Path) -> None:
    env = ChunkedEnv(_deadly(tmp_path))
    config = ReplayConfig(capacity=100, gamma=0.9)
    buffer = ReplayBuffer(config, state_dim=3, action_dim=2, num_envs=3, max_episode_steps=9)
    writer = EpisodeWriter(buffer, env.spec.action)
    obs = env.reset([0, 1, 2])
    moved = []
    for _ in range(2):
        actions = torch.zeros(3, 2, 2)
        step = env.step(actions)
        moved.append(writer.add(obs, actions, step).tolist())
        obs = step.obs
    assert moved == [[], [0, 2]]
    batch = buffer.batch(buffer.starts(2), 2)
    assert sorted(batch.obs[:, 2].tolist()) == [0, 0, 0, 2]  # the chunk that broke is not there, the other one's is
    np.testing.assert_allclose(batch.discount, 0.9**2)  # bootstrapped, not ended
    env.close()


def test_evaluation_names_what_was_lost_and_does_not_run_it_again(tmp_path: Path) -> None:
    def make(n: int) -> ChunkedEnv:
        return ChunkedEnv(_deadly(tmp_path, n), auto_reset=False)

    result = evaluate_controller(
        make, lambda env: lambda: torch.zeros(env.num_envs, 2, 2), range(6), num_envs=2, progress=False
    )
    assert result.config["lost_seeds"] == [0]
    assert [episode.seed for episode in result.episodes] == [1, 2, 3, 4, 5]


def test_demonstrations_leave_a_lost_episode_out(tmp_path: Path) -> None:
    env = ChunkedEnv(_deadly(tmp_path, 2), auto_reset=False)
    remote = env.step_env
    summary = collect_demos(
        env,
        lambda: remote.expert_actions(torch.arange(2))[:, None],
        tmp_path / "demos",
        3,
        range(6),
        progress=None,
    )
    env.close()
    assert summary.num_episodes == 3
    dataset = LeRobotDataset(tmp_path / "demos")
    drifts = {f"{np.random.default_rng(seed).uniform(-0.5, 0.5, 2)[1] * 0.4:.2f}" for seed in (1, 2, 3)}
    assert {dataset.episode(i).instruction.split()[-1] for i in range(3)} == drifts


def test_messages_carry_arrays_of_any_type_and_shape() -> None:
    import socket

    a, b = socket.socketpair()
    arrays = {"f": np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2], "b": np.array([True]), "e": np.zeros((0, 4))}
    protocol.send(a, {"call": "x", "ids": [1]}, arrays)
    message, back = protocol.receive(b)
    assert message == {"call": "x", "ids": [1]}
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    a.close()
    with pytest.raises(ConnectionError, match="gone"):
        protocol.receive(b)
    b.close()
