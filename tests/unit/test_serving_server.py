"""The server over real sockets: openpi's protocol, what ours adds, and clients that misbehave."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.unit.serving_policies import (
    ACTION_DIM,
    HORIZON,
    STATE_DIM,
    observation,
    save_flow_mlp,
    save_tiny_vla,
    serving,
    state,
)
from vla_rl.core import ActionChunk, Observation
from vla_rl.evaluation.evaluate import policy_noise
from vla_rl.policies.agent import AgentPolicyConfig
from vla_rl.policies.checkpoints.load_any import load_any
from vla_rl.policies.checkpoints.native import policy_class_of, save_policy
from vla_rl.policies.gaussian import GaussianMLPConfig
from vla_rl.serving.client import PolicyClient, PolicyServerError, PolicyTimeoutError
from vla_rl.serving.config import ServerConfig
from vla_rl.serving.inference import read_policy
from vla_rl.serving.messages import pack, unpack
from vla_rl.serving.rtc import RTCConfig
from vla_rl.serving.server import PolicyServer


@pytest.fixture(scope="module")
def flow_mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flow_mlp(tmp_path_factory.mktemp("serving") / "flow_mlp")


@pytest.fixture(scope="module")
def tiny_vla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vla(tmp_path_factory.mktemp("serving") / "tiny_vla")


class HeldPolicy:
    """A policy whose answers wait for `go`: a long inference, for as long as the test wants."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.config = policy, policy.config
        self.action_horizon, self.action_dim = policy.action_horizon, policy.action_dim
        self.go, self.asked, self.num_rows = threading.Event(), threading.Event(), []

    def act(self, obs: Observation, noise: torch.Tensor) -> ActionChunk:
        self.asked.set()
        assert self.go.wait(20)
        self.num_rows.append(len(obs))
        return self.policy.act(obs, noise)


@contextmanager
def held_server(folder: Path, **config: Any) -> Iterator[tuple[HeldPolicy, str]]:
    server = PolicyServer(folder, ServerConfig(port=0, **config))
    held = HeldPolicy(server._policy.policy)
    server._policy = replace(server._policy, policy=held)
    url = server.start()
    try:
        yield held, url
    finally:
        held.go.set()
        server.stop()


def openpi_reply(url: str, message: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """What openpi's own client does: metadata, one request; msgpack alone, none of our code."""
    with connect(url, compression=None, max_size=None, proxy=None) as ws:
        metadata = msgpack.unpackb(ws.recv())
        ws.send(pack(message))
        reply = ws.recv()
        return metadata, reply if isinstance(reply, str) else unpack(reply)


# ----------------------------------------------------------------------------------------------------------- protocol
def test_openpis_protocol(tiny_vla: Path) -> None:
    with serving(tiny_vla) as (_, url):
        metadata, reply = openpi_reply(url, observation())
        assert metadata["vla_rl"]["cameras"] == ["base", "wrist"]
        assert reply["actions"].shape == (HORIZON, ACTION_DIM)
        assert reply["actions"].dtype == np.float32
        assert 0 < reply["policy_timing"]["infer_ms"] <= reply["server_timing"]["infer_ms"]
        assert reply["policy_version"] == 1
        assert "vla_rl" not in reply
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            url.replace("ws", "http") + "/healthz"
        ) as r:
            assert (r.status, r.read()) == (200, b"OK\n")


def test_errors_to_openpis_clients_are_text_and_the_end(tiny_vla: Path) -> None:
    with serving(tiny_vla) as (_, url), connect(url, compression=None, proxy=None) as ws:
        ws.recv()
        ws.send(pack({**observation(), "state": np.zeros(2, np.float32)}))
        error = json.loads(ws.recv())["error"]
        assert error == {"code": "bad_observation", "message": f"the policy needs a state of {STATE_DIM}, got 2"}
        with pytest.raises(ConnectionClosed) as closed:
            ws.recv(timeout=5)
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1011, "bad_observation")


def test_flat_keys_of_libero(tiny_vla: Path) -> None:
    native = observation()
    flat = {
        "observation/image": native["images"]["base"],
        "observation/wrist_image": native["images"]["wrist"],
        "observation/state": native["state"].astype(np.float64),
        "prompt": native["prompt"],
    }
    with serving(tiny_vla, keys="libero") as (_, url):
        with PolicyClient(url, session=0) as client:
            expected = client.infer(native)["actions"]
        with PolicyClient(url, session=0) as client:
            np.testing.assert_array_equal(client.infer(flat)["actions"], expected)


def test_actions_are_the_policys_and_a_session_is_reproduced(tiny_vla: Path) -> None:
    policy, given = load_any(tiny_vla), observation()
    images = {c: torch.tensor(image)[None] for c, image in given["images"].items()}
    obs = Observation(images, torch.tensor(given["state"])[None], (given["prompt"],))
    with serving(tiny_vla, noise_seed=3) as (_, url), PolicyClient(url, session=7) as client:
        replies = [client.infer(given)["actions"] for _ in range(2)]
        for decision, actions in enumerate(replies):
            noise = policy_noise(3, 7, decision, HORIZON, ACTION_DIM)[None]
            np.testing.assert_allclose(actions, policy.act(obs, noise).actions[0], atol=1e-6)
        client.reset()
        np.testing.assert_array_equal(client.infer(given)["actions"], replies[0])
        client.reset(session=8)
        assert not np.allclose(client.infer(given)["actions"], replies[0])
        zeros = np.zeros((HORIZON, ACTION_DIM), np.float32)
        expected = policy.act(obs, torch.zeros(1, HORIZON, ACTION_DIM)).actions[0]
        np.testing.assert_allclose(client.infer(given, noise=zeros)["actions"], expected, atol=1e-6)


def test_real_time_chunking_over_the_wire(flow_mlp: Path) -> None:
    with serving(flow_mlp) as (_, url), PolicyClient(url, session=1) as client:
        plain = client.infer({"state": state()})["actions"]
        planned = np.array([[0.5, -0.5, 0.2], [0.4, -0.4, 0.1], [0.3, -0.3, 0.0]], np.float32)
        client.reset()
        got = client.infer({"state": state()}, prefix=planned, delay=2)["actions"]
        np.testing.assert_array_equal(got[:2], planned[:2])
        client.reset()
        again = client.infer({"state": state(), "prefix": planned, "delay": 2})["actions"]
        np.testing.assert_array_equal(again, got)
        assert abs(got[2] - planned[2]).mean() < abs(plain[2] - planned[2]).mean()


@pytest.mark.parametrize(
    "config",
    [
        GaussianMLPConfig(state_dim=STATE_DIM, action_dim=ACTION_DIM, action_horizon=HORIZON),
        AgentPolicyConfig(state_dim=STATE_DIM, action_dim=ACTION_DIM, action_horizon=HORIZON),
    ],
)
def test_other_policies(tmp_path: Path, config: Any) -> None:
    """A Gaussian, an agent in JAX: served as they act, and without real-time chunking."""
    torch.manual_seed(0)
    save_policy(policy_class_of(config)(config), tmp_path)
    with serving(tmp_path) as (_, url), PolicyClient(url, timeout_s=60, session=0) as client:
        obs = Observation({}, torch.tensor(state())[None], ("",))
        expected = load_any(tmp_path).act(obs, policy_noise(0, 0, 0, HORIZON, ACTION_DIM)[None]).actions[0]
        np.testing.assert_allclose(client.infer({"state": state()})["actions"], expected, atol=1e-6)
        assert client.metadata["vla_rl"]["rtc"] is False
        with pytest.raises(PolicyServerError, match="no flow policy"):
            client.infer({"state": state()}, prefix=np.zeros((2, ACTION_DIM), np.float32))


# ------------------------------------------------------------------------------------------------------------ batches
def test_concurrent_clients_share_a_batch(flow_mlp: Path) -> None:
    with held_server(flow_mlp, batch_window_ms=0.0) as (held, url):
        clients = [PolicyClient(url, timeout_s=20, session=i) for i in range(6)]
        with ThreadPoolExecutor(6) as threads:
            first = threads.submit(clients[0].infer, {"state": state(0)})
            assert held.asked.wait(5)
            others = [threads.submit(c.infer, {"state": state(i)}) for i, c in enumerate(clients[1:], 1)]
            time.sleep(0.3)
            held.go.set()
            replies = [first.result(), *(o.result() for o in others)]
        assert held.num_rows == [1, 5]
        assert [r["vla_rl"]["num_batched"] for r in replies] == [1, 5, 5, 5, 5, 5]
        for i, reply in enumerate(replies):
            obs = Observation({}, torch.tensor(state(i))[None], ("",))
            expected = held.policy.act(obs, policy_noise(0, i, 0, HORIZON, ACTION_DIM)[None]).actions[0]
            np.testing.assert_allclose(reply["actions"], expected, atol=1e-6)
        for client in clients:
            client.close()


def test_the_batch_window_waits_for_others_but_not_for_nobody(flow_mlp: Path) -> None:
    with serving(flow_mlp, batch_window_ms=400.0) as (_, url), PolicyClient(url, timeout_s=5) as one:
        start = time.monotonic()
        one.infer({"state": state()})
        assert time.monotonic() - start < 0.3  # the only client has no one to wait for
        with PolicyClient(url, timeout_s=5) as two, ThreadPoolExecutor(2) as threads:
            replies = [threads.submit(c.infer, {"state": state()}) for c in (one, two)]
            assert [r.result()["vla_rl"]["num_batched"] for r in replies] == [2, 2]


def test_a_policys_refusal_is_one_clients(flow_mlp: Path) -> None:
    class Picky(HeldPolicy):
        def act(self, obs: Observation, noise: torch.Tensor) -> ActionChunk:
            if "broken" in obs.instruction:
                raise ValueError("this sentence is too hard")
            return super().act(obs, noise)

    server = PolicyServer(flow_mlp, ServerConfig(port=0, batch_window_ms=500))
    picky = Picky(server._policy.policy)
    picky.go.set()
    server._policy = replace(server._policy, policy=picky)
    url = server.start()
    with (
        PolicyClient(url, timeout_s=5) as good,
        PolicyClient(url, timeout_s=5) as bad,
        ThreadPoolExecutor(2) as pool,
    ):
        right = pool.submit(good.infer, {"state": state(), "prompt": "fine"})
        wrong = pool.submit(bad.infer, {"state": state(), "prompt": "broken"})
        assert right.result()["actions"].shape == (HORIZON, ACTION_DIM)
        with pytest.raises(PolicyServerError, match="too hard") as error:
            wrong.result()
        assert error.value.code == "bad_observation"
        assert bad.connected
        assert bad.infer({"state": state(), "prompt": "fine"})["policy_version"] == 1
    server.stop()


# ----------------------------------------------------------------------------------------------- deadlines, hot swaps
def test_a_request_past_its_deadline_is_not_computed(flow_mlp: Path) -> None:
    with held_server(flow_mlp) as (held, url), connect(url, compression=None, proxy=None) as late:
        late.recv()
        with PolicyClient(url, timeout_s=20) as client, ThreadPoolExecutor(1) as threads:
            first = threads.submit(client.infer, {"state": state()})
            assert held.asked.wait(5)
            late.send(pack({"state": state(), "vla_rl": {"id": 5, "deadline_ms": 50}}))
            time.sleep(0.2)
            held.go.set()
            assert first.result()["policy_version"] == 1
            reply = unpack(late.recv(timeout=5))
            assert (reply["error"]["code"], reply["vla_rl"]["id"]) == ("deadline_exceeded", 5)
        assert sum(held.num_rows) == 1


def test_the_event_loop_answers_during_an_inference(flow_mlp: Path) -> None:
    with (
        held_server(flow_mlp) as (held, url),
        PolicyClient(url, timeout_s=20) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        first = threads.submit(client.infer, {"state": state()})
        assert held.asked.wait(5)
        start = time.monotonic()
        PolicyClient(url).close()
        assert time.monotonic() - start < 2.0
        held.go.set()
        first.result()


def test_hot_swap(tmp_path: Path) -> None:
    folder = save_flow_mlp(tmp_path / "policy")
    with serving(folder) as (server, url), PolicyClient(url, timeout_s=5, session=0) as client:
        old = client.infer({"state": state()})
        save_flow_mlp(folder, seed=1)
        assert server.reload() == 2
        client.reset()
        new = client.infer({"state": state()})
        assert (old["policy_version"], new["policy_version"]) == (1, 2)
        assert not np.allclose(old["actions"], new["actions"])
        with pytest.raises(ValueError, match="start another server"):
            server.reload(save_flow_mlp(tmp_path / "other", action_horizon=HORIZON + 1))
        with pytest.raises(ValueError, match="no folder"):
            server.reload(tmp_path / "nowhere")
        client.reset()
        again = client.infer({"state": state()})
        assert again["policy_version"] == 2
        np.testing.assert_array_equal(again["actions"], new["actions"])
        with PolicyClient(url) as later:
            assert later.metadata["vla_rl"]["policy_version"] == 2
            assert later.metadata["vla_rl"]["policy_digest"] != client.metadata["vla_rl"]["policy_digest"]


def test_a_policy_that_was_not_read_from_a_folder(flow_mlp: Path, tmp_path: Path) -> None:
    stored = read_policy(flow_mlp, 1, device="cpu", rtc=RTCConfig())
    server = PolicyServer(stored, ServerConfig(port=0))
    url = server.start()
    try:
        with PolicyClient(url, timeout_s=5, session=0) as client, serving(flow_mlp) as (_, other):
            with PolicyClient(other, timeout_s=5, session=0) as expected:
                for _ in range(3):  # the noise of the next decision is drawn before it is asked for
                    actions = client.infer({"state": state()})["actions"]
                    np.testing.assert_array_equal(actions, expected.infer({"state": state()})["actions"])
            with pytest.raises(ValueError, match="was not read from a folder"):
                server.reload()
            assert server.reload(save_flow_mlp(tmp_path / "new", seed=1)) == 2
            assert client.infer({"state": state()})["policy_version"] == 2
    finally:
        server.stop()


# ------------------------------------------------------------------------------------------------------------- limits
def test_api_key(flow_mlp: Path) -> None:
    with serving(flow_mlp, api_key="sesame") as (_, url):
        for wrong in (None, "", "sesam", "sésame"):
            with pytest.raises(PolicyServerError) as error:
                PolicyClient(url, api_key=wrong)
            assert error.value.code in ("unauthorized", "refused")
        with PolicyClient(url, api_key="sesame", timeout_s=5) as client:
            client.infer({"state": state()})


def test_too_many_clients(flow_mlp: Path) -> None:
    with serving(flow_mlp, max_clients=2) as (_, url), PolicyClient(url), PolicyClient(url) as last:
        with pytest.raises(PolicyServerError, match="503"):
            PolicyClient(url)
        assert last.connected


def test_a_client_is_read_no_faster_than_its_limit(flow_mlp: Path) -> None:
    with serving(flow_mlp, max_requests_per_s=10.0) as (_, url), PolicyClient(url, timeout_s=5) as client:
        start = time.monotonic()
        for _ in range(15):
            client.infer({"state": state()})
        assert time.monotonic() - start > 0.35  # ten at once, and five of the next half second


def test_huge_messages_end_a_session_and_no_other(flow_mlp: Path) -> None:
    with serving(flow_mlp, max_message_bytes=100_000) as (_, url), PolicyClient(url, timeout_s=5) as good:
        with connect(url, compression=None, proxy=None) as ws:
            ws.recv()
            ws.send(b"x" * 200_000)
            with pytest.raises(ConnectionClosed) as closed:
                ws.recv(timeout=5)
            assert closed.value.rcvd.code == 1009
            assert "limit" in closed.value.rcvd.reason
        good.infer({"state": state()})


def test_who_does_not_read_is_cut_off(tmp_path: Path) -> None:
    """Replies of half a megabyte, which no socket's buffer holds for long."""
    folder = save_flow_mlp(tmp_path / "long", action_horizon=2048, action_dim=64, width=2, num_layers=1, num_steps=1)
    with serving(folder, write_timeout_s=0.3) as (server, url), PolicyClient(url, timeout_s=10) as good:
        with connect(url, compression=None, max_size=None, proxy=None, max_queue=1, close_timeout=0.1) as slow:
            slow.recv()
            for _ in range(40):
                slow.send(pack({"state": state()}))
            assert len(server._clients) == 2
            end = time.monotonic() + 10
            while len(server._clients) == 2 and time.monotonic() < end:
                good.infer({"state": state()})
            assert len(server._clients) == 1
        good.infer({"state": state()})


# ------------------------------------------------------------------------------------------------------------- client
def test_after_a_timeout_no_stale_reply_is_used(flow_mlp: Path) -> None:
    with held_server(flow_mlp) as (held, url):
        client = PolicyClient(url, timeout_s=0.3, session=0)
        start = time.monotonic()
        with pytest.raises(PolicyTimeoutError, match=r"0\.3 s"):
            client.infer({"state": state(0)})
        assert time.monotonic() - start < 1.0
        assert not client.connected
        with pytest.raises(PolicyServerError, match=r"call connect\(\)"):
            client.infer({"state": state(0)})
        held.go.set()
        client.connect()
        client.timeout_s = 5.0
        obs = Observation({}, torch.tensor(state(1))[None], ("",))
        expected = held.policy.act(obs, policy_noise(0, 0, 0, HORIZON, ACTION_DIM)[None]).actions[0]
        np.testing.assert_allclose(client.infer({"state": state(1)})["actions"], expected, atol=1e-6)
        client.close()
        client.close()


def test_the_client_needs_no_torch() -> None:
    code = (
        "import sys, vla_rl.serving.client, vla_rl.serving.broker, vla_rl.serving.messages, vla_rl.serving.requests;"
        "assert not {'torch', 'jax', 'mujoco', 'tyro'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
