"""Evaluation through a server: of ours as of the folder itself, and of any server that speaks openpi's protocol."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from websockets.asyncio.server import serve

from tests.unit.serving_policies import save_flow_mlp, serving
from vla_rl.cli import main
from vla_rl.core import Observation
from vla_rl.envs.two_way_reach import TwoWayReachEnv
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.evaluation.evaluate import evaluate
from vla_rl.evaluation.result import EvalResult
from vla_rl.policies.checkpoints.load_any import load_any
from vla_rl.serving.client import PolicyServerError
from vla_rl.serving.config import RemoteConfig, read_api_key
from vla_rl.serving.remote_policy import RemotePolicy, write_observation
from vla_rl.serving.requests import FLAT_KEYS

SPEC = TwoWayReachEnv(1).spec


def make_env(n: int) -> ChunkedEnv:
    return ChunkedEnv(TwoWayReachEnv(n), images=False, auto_reset=False)


def score(policy: Any) -> list[tuple[int, bool, int, float]]:
    result = evaluate(policy, make_env, range(6), execution_horizon=4, num_envs=3, policy_batch_size=3, progress=False)
    return [(e.seed, e.success_once, e.length, round(e.episode_return, 4)) for e in result.episodes]


# a server that shares no code with the project: websockets, msgpack and the layout of openpi's arrays
def foreign_decode(values: dict[Any, Any]) -> Any:
    if b"__ndarray__" in values:
        return np.frombuffer(values[b"data"], values[b"dtype"]).reshape(values[b"shape"])
    return values


@contextmanager
def foreign_server(act: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    received: list[dict[str, Any]] = []
    address: list[int] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    async def handle(ws: Any) -> None:
        await ws.send(msgpack.packb({"reset_pose": [0.0]}))
        async for data in ws:
            received.append(msgpack.unpackb(data, object_hook=foreign_decode))
            a = act(received[-1]).astype(np.float32)
            array = {b"__ndarray__": True, b"data": a.tobytes(), b"dtype": a.dtype.str, b"shape": a.shape}
            await ws.send(msgpack.packb({"actions": array}))

    async def run() -> None:
        async with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
            address.append(next(iter(server.sockets)).getsockname()[1])
            ready.set()
            await stop.wait()

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    ready.wait(10)
    try:
        yield f"ws://127.0.0.1:{address[0]}", received
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def test_ours_is_evaluated_as_its_folder(tmp_path: Path) -> None:
    folder = save_flow_mlp(tmp_path / "policy", action_dim=2)
    with serving(folder, max_requests_per_s=1e4) as (_, url):
        policy = RemotePolicy(url, SPEC, RemoteConfig(num_sessions=2))
        assert (policy.action_horizon, policy.action_dim, policy.noise_dim) == (4, 2, 2)
        assert score(policy) == score(load_any(folder))
        policy.close()


def test_a_foreign_server_gets_what_it_understands() -> None:
    def towards_the_goal(message: dict[str, Any]) -> np.ndarray:
        """Right, up beside the disc, then to the goal; steps of 0.12."""
        x, y, goal_x, goal_y, _ = message["observation/state"]
        way = np.array([1.0, 0.0]) if x < 0.45 else np.array([0.0, 1.0])
        if y >= 0.5:
            way = np.clip(np.array([goal_x - x, goal_y - y]) / 0.48, -1, 1)
        return np.tile(way, (4, 1))

    with foreign_server(towards_the_goal) as (url, received):
        policy = RemotePolicy(url, SPEC, RemoteConfig(keys="libero", num_sessions=2))
        assert (policy.action_horizon, policy.action_dim) == (4, 2)
        assert policy.metadata == {"reset_pose": [0.0]}
        results = score(policy)
        policy.close()
    assert sum(row[1] for row in results) >= 5
    assert len(received) > 6
    assert set(received[1]) == {"observation/state", "prompt"}
    assert received[1]["prompt"] == "go around the disc to the goal"
    env = make_env(3)
    first = env.reset([0, 1, 2]).state
    sent = np.stack([m["observation/state"] for m in received[1:4]])
    np.testing.assert_allclose(sent[np.lexsort(sent.T)], first.numpy()[np.lexsort(first.numpy().T)])


def test_flat_keys_split_the_state_and_name_the_cameras() -> None:
    pictures = {c: torch.full((1, 2, 2, 3), i, dtype=torch.uint8) for i, c in enumerate(("front", "hand"))}
    obs = Observation(pictures, torch.arange(8.0)[None], ("pour",))
    message = write_observation(obs, 0, FLAT_KEYS["droid"])
    assert message["observation/joint_position"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert message["observation/gripper_position"].tolist() == [7]
    assert message["observation/exterior_image_1_left"].max() == 0
    assert message["observation/wrist_image_left"].min() == 1
    assert message["prompt"] == "pour"


def test_a_server_that_is_not_there_or_says_no(tmp_path: Path) -> None:
    with pytest.raises(PolicyServerError, match="no policy server"):
        RemotePolicy("ws://127.0.0.1:9", SPEC)
    other = save_flow_mlp(tmp_path / "policy", state_dim=7)
    with serving(other) as (_, url), pytest.raises(PolicyServerError, match="needs a state of 7, got 5"):
        RemotePolicy(url, SPEC)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="one line"):
        read_api_key(tmp_path / "empty")


def test_the_eval_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`vla-rl eval --policy ws://...` finds what `vla-rl eval --policy DIR` finds, and asks for a recipe."""
    folder = save_flow_mlp(tmp_path / "policy", state_dim=4, action_dim=2, action_horizon=1)
    (tmp_path / "key").write_text("sesame\n")
    options = ["--recipe", "maze_smoke", "--evaluation.num-episodes", "4", "--evaluation.num-videos", "0"]
    with serving(folder, api_key="sesame", max_requests_per_s=1e4) as (_, url):
        key = ["--remote.api-key-file", str(tmp_path / "key"), "--remote.num-sessions", "2"]
        assert main(["eval", "--policy", url, *options, *key, "--out", str(tmp_path / "remote")]) == 0
        assert main(["eval", "--policy", url, *options, "--out", str(tmp_path / "none")]) == 1
        assert "unauthorized" in capsys.readouterr().err
        assert main(["eval", "--policy", url, "--out", str(tmp_path / "none")]) == 2
    assert main(["eval", "--policy", str(folder), *options, "--out", str(tmp_path / "local")]) == 0
    remote, local = EvalResult.load(tmp_path / "remote"), EvalResult.load(tmp_path / "local")
    assert [(e.seed, e.length, e.success_once) for e in remote.episodes] == [
        (e.seed, e.length, e.success_once) for e in local.episodes
    ]
    assert remote.config["policy"] == url
