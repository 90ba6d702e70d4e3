"""A client whose server is silent, frozen, slow to read, or answers what was not asked: in time, and for good."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from tests.unit.serving_policies import save_flow_mlp, serving, state
from tests.unit.tcp_proxy import TcpProxy
from vla_rl.serving.client import PolicyClient, PolicyServerError, PolicyTimeoutError
from vla_rl.serving.messages import pack, unpack

OURS = {"vla_rl": {"protocol": 1}}
ACTIONS = np.zeros((4, 3), np.float32)


@contextmanager
def answering(handle: Callable[[ServerConnection], None]) -> Iterator[str]:
    """A server that does with a connection what the test says."""
    with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


def replying(reply: Callable[[dict[str, Any]], Any], metadata: Any = OURS) -> Callable[[ServerConnection], None]:
    def handle(ws: ServerConnection) -> None:
        ws.send(pack(metadata))
        for data in ws:
            answer = reply(unpack(data))
            ws.send(answer if isinstance(answer, str) else pack(answer))

    return handle


def elapsed(call: Callable[[], Any], error: type[Exception]) -> float:
    start = time.monotonic()
    with pytest.raises(error):
        call()
    return time.monotonic() - start


def test_a_host_that_never_shakes_hands() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        assert elapsed(lambda: PolicyClient(url, connect_timeout_s=0.3), PolicyTimeoutError) < 1.5


def test_a_server_without_metadata() -> None:
    gone = threading.Event()
    with answering(lambda ws: gone.wait(5) and None) as url:
        assert elapsed(lambda: PolicyClient(url, connect_timeout_s=0.3), PolicyTimeoutError) < 1.5
        gone.set()
    with answering(lambda ws: ws.send("hello")) as url, pytest.raises(PolicyServerError, match="no policy server"):
        PolicyClient(url)
    with answering(lambda ws: ws.send(pack([1, 2]))) as url, pytest.raises(PolicyServerError, match="a list"):
        PolicyClient(url)


def test_a_stopped_server_process_that_no_longer_reads(tmp_path: Path) -> None:
    """SIGSTOP: the connection lives, nobody reads, and a big message fills the socket's buffers."""
    folder = save_flow_mlp(tmp_path / "policy")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "import sys; from vla_rl.cli import main; sys.exit(main())", "serve"]
    process = subprocess.Popen([*command, "--policy", str(folder), "--port", str(port)])
    try:
        url, end = f"ws://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                client = PolicyClient(url, timeout_s=10, session=0)
                break
            except PolicyServerError:
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.2)
        expected = client.infer({"state": state()})["actions"]
        big = {"state": state(), "images": {"unused": np.zeros((2000, 2000, 3), np.uint8)}}
        os.kill(process.pid, signal.SIGSTOP)
        for message in ({"state": state()}, big):
            client.timeout_s = 0.3
            assert 0.25 < elapsed(lambda m=message: client.infer(m), PolicyTimeoutError) < 2.0
            assert not client.connected
            os.kill(process.pid, signal.SIGCONT)
            client.connect()
            client.timeout_s = 10.0
            client.reset()
            np.testing.assert_array_equal(client.infer({"state": state()})["actions"], expected)
            os.kill(process.pid, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
        with pytest.raises(PolicyServerError) as error:
            client.infer({"state": state()})
        assert error.value.code == "closed"
        client.close()
    finally:
        process.kill()
        process.wait()


def test_a_half_open_connection_is_found_out_by_its_heartbeat(tmp_path: Path) -> None:
    """Whether or not a reply is owed, and long before the time-out; afterwards the client may connect again."""
    with serving(save_flow_mlp(tmp_path / "policy")) as (server, _):
        proxy = TcpProxy(server.port)
        client = PolicyClient(f"ws://127.0.0.1:{proxy.port}", timeout_s=20.0, connect_timeout_s=20.0, heartbeat_s=0.4)
        client.infer({"state": state()})
        time.sleep(1.0)
        assert client.connected  # a server that is idle answers pings
        since = proxy.fall_silent()
        while client.connected:
            assert time.monotonic() - since < 3.0
            time.sleep(0.01)
        assert elapsed(lambda: client.infer({"state": state()}), PolicyServerError) < 0.2
        proxy.speak()
        client.connect()
        client.infer({"state": state()})
        proxy.fall_silent()
        with pytest.raises(PolicyServerError, match="no answer to a ping"):
            client.infer({"state": state()})
        assert not client.connected
        proxy.close()
        client.close()


def test_a_server_that_computes_answers_pings_and_others_are_not_asked() -> None:
    def slow(_message: dict[str, Any]) -> dict[str, Any]:
        time.sleep(1.0)
        return {"actions": ACTIONS, "vla_rl": {"id": 1}}

    with answering(replying(slow)) as url, PolicyClient(url, timeout_s=20.0, heartbeat_s=0.4) as client:
        np.testing.assert_array_equal(client.infer({"state": state()})["actions"], ACTIONS)
    with (
        answering(replying(slow, metadata={"theirs": 1})) as url,
        PolicyClient(url, timeout_s=20.0, heartbeat_s=1e-9) as client,
    ):
        np.testing.assert_array_equal(client.infer({"state": state()})["actions"], ACTIONS)


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (lambda m: {"actions": ACTIONS, "vla_rl": {"id": m["vla_rl"]["id"] - 1}}, "bad_reply"),
        (lambda m: {"actions": ACTIONS}, "bad_reply"),
        (lambda m: {"vla_rl": {"id": m["vla_rl"]["id"]}}, "bad_reply"),
        (lambda m: {"actions": ACTIONS[0], "vla_rl": {"id": m["vla_rl"]["id"]}}, "bad_reply"),
        (lambda m: {"actions": "left", "vla_rl": {"id": m["vla_rl"]["id"]}}, "bad_reply"),
        (lambda m: "Traceback: out of memory", "server"),
        (lambda m: '{"error": {"code": "bad_message", "message": "what?"}}', "bad_message"),
    ],
)
def test_replies_that_are_none_end_the_session(reply: Callable[[Any], Any], code: str) -> None:
    with answering(replying(reply)) as url, PolicyClient(url, timeout_s=5) as client:
        with pytest.raises(PolicyServerError) as error:
            client.infer({"state": state()})
        assert error.value.code == code
        assert not client.connected


def test_an_error_to_a_request_does_not_end_the_session() -> None:
    def reply(message: dict[str, Any]) -> dict[str, Any]:
        said = {"id": message["vla_rl"]["id"]}
        if message["prompt"]:
            return {"actions": ACTIONS, "vla_rl": said}
        return {"error": {"code": "bad_observation", "message": "no prompt"}, "vla_rl": said}

    with answering(replying(reply)) as url, PolicyClient(url, timeout_s=5) as client:
        with pytest.raises(PolicyServerError, match="no prompt"):
            client.infer({"prompt": ""})
        assert client.infer({"prompt": "pour"})["actions"].shape == (4, 3)


def test_what_foreign_servers_are_sent() -> None:
    """Nothing of ours, and lists of doubles are actions too."""
    received: list[dict[str, Any]] = []
    reply = lambda m: received.append(m) or {"actions": [[0.5, 1.0]]}  # noqa: E731
    with answering(replying(reply, metadata={})) as url, PolicyClient(url, timeout_s=5, session=3) as client:
        actions = client.infer({"state": state(), "prompt": "pour"})["actions"]
        assert (actions.dtype, actions.tolist()) == (np.float32, [[0.5, 1.0]])
        assert set(received[0]) == {"state", "prompt"}
        with pytest.raises(ValueError, match="neither noise nor prefix"):
            client.infer({"state": state()}, prefix=ACTIONS)
