"""The harness: one result from any number of environments, processes and kills; suites, stop rules, whom it can ask."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.unit.harness_suites import cars, evaluate, mazes
from tests.unit.killable import Killable
from tests.unit.serving_policies import save_flow_mlp
from vla_rl.cli import main
from vla_rl.configs.suites import SUITES, get_suite, list_suites
from vla_rl.core import ActionSpec, CameraSpec, EnvSpec, Observation
from vla_rl.envs.config import EnvConfig
from vla_rl.envs.libero import LiberoConfig
from vla_rl.evaluation.harness import describe_precision, run_suite
from vla_rl.evaluation.journal import JOURNAL_FILE, Journal, JournalError
from vla_rl.evaluation.policies import FunctionPolicy, NumpyPolicy, ReadyPolicy, StoredPolicy, actor_of
from vla_rl.evaluation.result import EPISODES_FILE, EvalResult
from vla_rl.evaluation.schema import validate
from vla_rl.evaluation.stopping import StopRule
from vla_rl.evaluation.suite import Suite, SuiteCase, suite_hash, with_fields
from vla_rl.evaluation.workers import HarnessConfig, WorkerError, deal, listen

HERE = "tests.unit.harness_suites"
STRAIGHT = FunctionPolicy(f"{HERE}:straight")

__all__ = ["evaluate"]  # for `Killable`, which looks for functions in this module


def rows(folder: Path) -> dict[str, list]:
    """Every column of episodes.parquet but the clock's."""
    return pq.read_table(folder / EPISODES_FILE).drop_columns(["latency_ms"]).to_pydict()


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    return save_flow_mlp(folder, state_dim=2, action_dim=1)


@pytest.fixture(scope="module")
def reference(policy, tmp_path_factory) -> Path:
    """The policy on the cars with one environment at a time."""
    out = tmp_path_factory.mktemp("reference") / "out"
    run_suite(cars(), StoredPolicy(policy, name="car"), out, HarnessConfig(num_envs=1), progress=False)
    return out


# ------------------------------------------------------------------------------------------------------ one result
def test_the_reference_would_show_a_difference(reference):
    columns = rows(reference)
    assert len(columns["seed"]) == 48
    assert len({round(x, 9) for x in columns["episode_return"]}) > 44  # every action of every episode shows
    assert columns["condition"] == [""] * 24 + ["sensor_noise@2"] * 24
    assert columns["episode_return"][:24] != columns["episode_return"][24:]
    validate(json.loads((reference / "eval.json").read_text()))


@pytest.mark.parametrize("num_envs", [3, 16])
def test_the_number_of_environments_does_not_matter(num_envs, policy, reference, tmp_path):
    run_suite(cars(), StoredPolicy(policy, name="car"), tmp_path, HarnessConfig(num_envs=num_envs), progress=False)
    assert rows(tmp_path) == rows(reference)


def test_the_number_of_processes_does_not_matter(policy, reference, tmp_path):
    config = HarnessConfig(num_envs=5, workers=2)
    run_suite(cars(), StoredPolicy(policy, name="car"), tmp_path, config, progress=False)
    assert rows(tmp_path) == rows(reference)
    assert [int(json.loads(line)["index"]) for line in journal_lines(tmp_path)[1:]] != [*range(24), *range(24)]


def test_three_kills_lose_and_repeat_nothing(policy, reference, tmp_path):
    """SIGKILL at random moments, each time in a process with other settings of speed."""
    rng, out = random.Random(7), tmp_path / "out"
    options = ["--policy", str(policy), "--suite", f"{HERE}:cars", "--out", str(out), "--num-videos", "0", "--resume"]
    with Killable(__file__, tmp_path) as killable:
        for num_envs in (1, 3, 2):
            before = len(journal_lines(out))
            killable.start("evaluate", *options, "--num-envs", str(num_envs))
            wait_for(lambda n=before: len(journal_lines(out)) > n + rng.randint(1, 8))
            time.sleep(rng.uniform(0, 0.05))
            killable.kill()
            assert killable.wait() == -signal.SIGKILL, killable.output()
            assert before < len(journal_lines(out)) < 49
        killable.start("evaluate", *options, "--num-envs", "16")
        assert killable.wait() == 0, killable.output()
    assert rows(out) == rows(reference)
    keys = [(row["case"], row["index"]) for row in map(json.loads, journal_lines(out)[1:])]
    assert len(keys) == len(set(keys)) == 48
    assert EvalResult.load(out).timing.num_decisions == 48 * 10


def journal_lines(folder: Path) -> list[bytes]:
    file = folder / JOURNAL_FILE
    return (
        [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if file.exists() else []
    )


def wait_for(happened, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_ctrl_c_leaves_what_resume_needs(policy, reference, tmp_path, capsys, monkeypatch):
    """SIGINT to this very process while it evaluates."""
    add, count = Journal.add, []

    def interrupted(journal, *arguments):
        add(journal, *arguments)
        count.append(1)
        if len(count) == 7:
            os.kill(os.getpid(), signal.SIGINT)

    command = ["eval", "--policy", str(policy), "--suite", f"{HERE}:cars", "--out", str(tmp_path), "--num-videos", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupted)
        assert main(command) == 130
    assert "--resume goes on from there" in capsys.readouterr().err
    assert 7 <= len(journal_lines(tmp_path)) - 1 < 48
    assert main(command) == 1
    assert "add --resume to go on with it" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert rows(tmp_path) == rows(reference)
    finished = (tmp_path / EPISODES_FILE).read_bytes()
    assert main([*command, "--resume"]) == 0  # there is nothing left to do
    assert (tmp_path / EPISODES_FILE).read_bytes() == finished
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["versions"]["torch"] == torch.__version__


# ------------------------------------------------------------------------------------------------------ the journal
def test_a_torn_line_is_dropped_and_run_again(tmp_path):
    out = tmp_path / "out"
    whole = run_suite(mazes(), STRAIGHT, out, HarnessConfig(num_envs=8), progress=False)
    lines = (out / JOURNAL_FILE).read_bytes().splitlines(keepends=True)
    for keep, torn in ((40, 30), (100, -1), (121, 0), (1, 12), (0, 50)):
        (out / JOURNAL_FILE).write_bytes(b"".join(lines[:keep]) + (lines[keep] if keep < len(lines) else b"")[:torn])
        for name in (EPISODES_FILE, "eval.json"):
            (out / name).unlink(missing_ok=True)
        assert run_suite(mazes(), STRAIGHT, out, HarnessConfig(num_envs=3), resume=True, progress=False) == whole
        assert len(journal_lines(out)) == 121
    (out / JOURNAL_FILE).write_bytes(b"".join([*lines[:5], b'{"case": 0, "ind\n', *lines[6:]]))
    with pytest.raises(JournalError, match="line 6 is damaged"):
        run_suite(mazes(), STRAIGHT, out, HarnessConfig(), resume=True, progress=False)


def test_another_evaluation_is_not_mixed_in(tmp_path):
    run_suite(mazes(), STRAIGHT, tmp_path, HarnessConfig(num_envs=8), progress=False)
    before = (tmp_path / JOURNAL_FILE).read_bytes()
    with pytest.raises(JournalError, match="noise_seed was 0 and is 1"):
        run_suite(mazes(), STRAIGHT, tmp_path, HarnessConfig(noise_seed=1), resume=True, progress=False)
    fewer = Suite("mazes", 1, mazes().cases[:1])
    with pytest.raises(JournalError, match=r"suite\.hash was"):
        run_suite(fewer, STRAIGHT, tmp_path, HarnessConfig(), resume=True, progress=False)
    with pytest.raises(JournalError, match="holds 120 episodes of an evaluation already; add --resume"):
        run_suite(mazes(), STRAIGHT, tmp_path, HarnessConfig(), progress=False)
    assert (tmp_path / JOURNAL_FILE).read_bytes() == before
    (tmp_path / JOURNAL_FILE).unlink()
    with pytest.raises(JournalError, match="a result without a journal"):
        run_suite(mazes(), STRAIGHT, tmp_path, HarnessConfig(), resume=True, progress=False)


def test_a_changed_policy_is_another_evaluation(policy, tmp_path):
    one = StoredPolicy(save_flow_mlp(tmp_path / "policy", state_dim=2, action_dim=1))
    few = replace(cars(), cases=tuple(replace(case, num_episodes=2) for case in cars().cases))
    run_suite(few, one, tmp_path / "out", HarnessConfig(), progress=False)
    save_flow_mlp(tmp_path / "policy", seed=1, state_dim=2, action_dim=1)
    with pytest.raises(JournalError, match="policy_digest was"):
        run_suite(few, one, tmp_path / "out", HarnessConfig(), resume=True, progress=False)


def test_one_process_writes_a_journal(tmp_path):
    with Journal(tmp_path, {}, resume=False), pytest.raises(JournalError, match="another process"):
        Journal(tmp_path, {}, resume=True)
    Journal(tmp_path, {"other": 1}, resume=False).close()  # without an episode there is nothing to protect


# ---------------------------------------------------------------------------------------------------- stop and workers
def test_a_stop_depends_on_the_declared_order_alone(tmp_path):
    config = HarnessConfig(num_envs=1, stop=StopRule(above=0.4))
    everything = run_suite(mazes(), STRAIGHT, None, HarnessConfig(num_envs=8), progress=False)
    result = run_suite(mazes(), STRAIGHT, tmp_path / "one", config, progress=False)
    sizes = {task: part.success_once.n for task, part in result.per_task.items()}
    assert sizes["point_maze/wall_gap"] < 60 == sizes["point_maze/umaze"]  # 68% and 52% succeed
    expected = []
    for task, n in sizes.items():
        expected += [e for e in everything.episodes if e.task == task][:n]
        outcomes = [e.success_once for e in everything.episodes if e.task == task]
        assert (StopRule(above=0.4).first_stop(outcomes) or (60, ""))[0] == n
    assert list(result.episodes) == expected
    stopped = result.config["stopped"]
    assert list(stopped) == ["point_maze/wall_gap"]
    assert stopped["point_maze/wall_gap"]["reason"].startswith("the rate is above 0.4")
    for num_envs in (7, 60):
        out = tmp_path / str(num_envs)
        assert run_suite(mazes(), STRAIGHT, out, replace(config, num_envs=num_envs), progress=False) == result
        assert run_suite(mazes(), STRAIGHT, out, config, resume=True, progress=False) == result
    assert len(journal_lines(tmp_path / "60")) - 1 > len(result.episodes)  # those beyond the stop are kept apart


def test_a_worker_that_fails_or_dies_is_said_and_the_rest_is_kept(tmp_path):
    actor = FunctionPolicy(f"{HERE}:fails_after_20")
    with pytest.raises(WorkerError, match="ValueError: seen enough"):
        run_suite(mazes(), actor, tmp_path, HarnessConfig(num_envs=2, workers=2), progress=False)
    assert 1 < len(journal_lines(tmp_path)) < 40
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with ours, pytest.raises(WorkerError, match="has died; what was finished is kept, --resume goes on"):
        listen([ours], lambda case, one: False)
    with pytest.raises(ValueError, match="lives in this process"):
        run_suite(mazes(), ReadyPolicy(object()), None, HarnessConfig(workers=2), progress=False)


def test_episodes_are_dealt_in_blocks():
    todo = {0: list(range(10)), 1: [], 2: [3, 4, 7]}
    shares = deal(todo, 2, block=3)
    assert shares == [{0: [0, 1, 2, 6, 7, 8], 2: [3, 4]}, {0: [3, 4, 5, 9], 2: [7]}]
    for workers in (1, 3, 20):
        dealt = deal(todo, workers, block=4)
        assert len(dealt) == workers
        assert sorted((c, i) for share in dealt for c, part in share.items() for i in part) == sorted(
            (c, i) for c, part in todo.items() for i in part
        )


def test_progress_and_precision_are_said(tmp_path, capsys):
    run_suite(mazes(), STRAIGHT, None, HarnessConfig(num_envs=8))
    assert "mazes: 120/120 ep" in capsys.readouterr().err
    text = describe_precision(mazes())
    assert "2 cases" in text
    assert "held_out" in text
    assert "with the 60 episodes of one case" in text
    assert "with all 120 episodes" in text


# ------------------------------------------------------------------------------------------------------------- suites
def test_a_hash_is_of_the_episodes_and_of_nothing_else():
    one = get_suite("tabletop")
    assert suite_hash(one) == suite_hash(get_suite("tabletop"))
    for same in ({"cameras": ("wrist",), "image_size": 32}, {"num_threads": 1}, {"privileged_state": True}):
        assert suite_hash(with_fields(one, same)) == suite_hash(one)
    others = [
        with_fields(one, {"control": "joint_position"}),
        replace(one, version=2),
        replace(one, criterion="success_at_end"),
        replace(one, cases=one.cases[:-1]),
        replace(one, cases=tuple(replace(case, first_seed=1) for case in one.cases)),
        replace(one, cases=tuple(replace(case, num_episodes=9) for case in one.cases)),
        replace(one, cases=tuple(replace(case, split="train") for case in one.cases), protocol="train_equals_test"),
    ]
    hashes = {suite_hash(suite) for suite in [one, *others]}
    assert len(hashes) == 8
    with pytest.raises(ValueError, match="no colour"):
        with_fields(one, {"colour": 1})


def test_protocols_cannot_be_mislabelled():
    customary = LiberoConfig(init_states="customary")
    for env, split in ((customary, "test"), (EnvConfig(), "train")):
        cases = (SuiteCase("t", env, split=split),)
        with pytest.raises(ValueError, match="its protocol is 'train_equals_test'"):
            Suite("s", 1, cases)
        Suite("s", 1, cases, protocol="train_equals_test")
    case = SuiteCase("t", EnvConfig())
    with pytest.raises(ValueError, match="of different names"):
        Suite("s", 1, (case, case))
    with pytest.raises(ValueError, match="split 'tset' is unknown"):
        SuiteCase("t", EnvConfig(), split="tset")


def test_named_suites():
    suites = {name: get_suite(name) for name in SUITES}
    assert all(suite.name == name for name, suite in suites.items())
    assert len({suite_hash(suite) for suite in suites.values()}) == len(suites)
    for name, suite in suites.items():
        customary = name.endswith("_customary")
        assert suite.protocol == ("train_equals_test" if customary else "held_out"), name
    held_out, customary = suites["libero_90"], suites["libero_90_customary"]
    assert (len(held_out.cases), held_out.num_episodes, customary.num_episodes) == (90, 90 * 25, 90 * 50)
    case = held_out.cases[0]
    states = {case.initial_state(seed) for seed in case.seeds}
    assert states == {str(i) for i in range(1, 50, 2)}  # the odd ones, each once: training begins from the even
    assert len({customary.cases[0].initial_state(seed) for seed in customary.cases[0].seeds}) == 50
    axes = suites["tabletop_axes"]
    assert axes.cases[0].condition == ""
    assert len({case.condition for case in axes.cases}) + len(axes.unsupported) > 30
    assert get_suite("gym/Pendulum-v1").cases[0].task == "Pendulum-v1"
    assert get_suite(f"{HERE}:mazes") == mazes()
    assert all(name in list_suites() for name in SUITES)
    with pytest.raises(ValueError, match="did you mean 'tabletop'"):
        get_suite("tabletob")
    with pytest.raises(ValueError, match="returns NoneType, expected"):
        get_suite("gc:enable")


# ------------------------------------------------------------------------------------------------------ whom it can ask
def test_who_a_name_is(tmp_path):
    assert actor_of("ws://robot:8000").label == "ws://robot:8000"
    assert actor_of("expert").label == "expert"
    assert actor_of(str(tmp_path)) == StoredPolicy(tmp_path)
    assert actor_of("my.module:make") == FunctionPolicy("my.module:make")
    with pytest.raises(ValueError, match="there is no policy 'nowhere'"):
        actor_of("nowhere")


def test_a_numpy_function_is_a_policy():
    spec = EnvSpec("e", {"top": CameraSpec(4, 6)}, ("x",), ActionSpec((-1,) * 2, (1,) * 2, ("a", "b")), 10, 10.0)

    def act(observation):
        assert observation["images"]["top"].shape == (4, 6, 3)
        return np.full((3, 2), observation["state"][0] + len(observation["prompt"]))

    policy = NumpyPolicy(act, spec)
    obs = Observation({"top": torch.zeros(2, 4, 6, 3, dtype=torch.uint8)}, torch.tensor([[1.0], [2.0]]), ("", "go"))
    chunk = policy.act(obs, torch.zeros(2, 3, 2)).actions
    assert (chunk.shape, chunk.dtype) == ((2, 3, 2), torch.float32)
    assert chunk[:, 0, 0].tolist() == [1.0, 4.0]
    with pytest.raises(ValueError, match=r"returned actions \(3, 5\), expected \[3, 2\] for e"):
        NumpyPolicy(lambda _: np.zeros((3, 5)), spec)
    with pytest.raises(ValueError, match="cannot be loaded"):
        FunctionPolicy("tests.unit.harness_suites:nothing").open(spec)
    with pytest.raises(ValueError, match="returned int; expected a policy"):
        FunctionPolicy("operator:length_hint").open([])


def test_the_scripted_expert_and_videos(tmp_path):
    command = ["eval", "--policy", "expert", "--suite", "reach", "--episodes", "6", "--num-videos", "1"]
    assert main([*command, "--out", str(tmp_path), "--num-envs", "6"]) == 0
    result = EvalResult.load(tmp_path)
    assert result.success_once.successes == 6
    assert {(e.task, e.stage) for e in result.episodes} == {("tabletop/reach", "touched")}
    assert [bool(e.video) for e in result.episodes] == [True] + 5 * [False]
    assert (tmp_path / result.episodes[0].video).stat().st_size > 1000
    assert result.config["suite"]["name"] == "reach"
    assert result.config["suite"]["hash"] != get_suite("reach").describe()["hash"]  # of other episodes
    validate(json.loads((tmp_path / "eval.json").read_text()))


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for command, code, match in (
        (["--suite", "reach", *out], 2, "name a policy with --policy"),
        (["--policy", "expert", *out], 2, "say which episodes with --suite"),
        (["--policy", "expert", "--suite", "reach", "--recipe", "demo", *out], 2, "leave --suite or --recipe out"),
        (["--policy", "nobody", "--suite", "reach", *out], 2, "there is no policy 'nobody'"),
        (["--policy", "expert", "--suite", "reach", "--remote.num-sessions", "2", *out], 2, "expert is none"),
        (["--policy", "expert", "--suite", "gym/Pendulum-v1", *out], 1, "Pendulum-v1 has no scripted expert"),
    ):
        assert main(["eval", *command]) == code, command
        assert match in capsys.readouterr().err
    assert main(["eval", "--suite", "list"]) == 0
    assert "libero_10_customary" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ a server of others
FOREIGN_SERVER = """
# openpi's protocol in a few lines; not a line of this project
import asyncio, sys
import msgpack, numpy as np
from websockets.asyncio.server import serve

def decode(values):
    if b"__ndarray__" in values:
        return np.frombuffer(values[b"data"], values[b"dtype"]).reshape(values[b"shape"])
    return values

async def handle(ws):
    await ws.send(msgpack.packb({"name": "foreign"}))
    async for data in ws:
        x, y, goal_x, goal_y = msgpack.unpackb(data, object_hook=decode)["observation/state"]
        way = np.array([goal_x - x, goal_y - y])
        actions = np.tile(way / max(1e-9, np.abs(way).max()), (4, 1)).astype(np.float32)
        array = {b"__ndarray__": True, b"data": actions.tobytes(), b"dtype": "<f4", b"shape": actions.shape}
        await ws.send(msgpack.packb({"actions": array}))

async def run():
    async with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await asyncio.Future()

assert not any(name.startswith("vla_rl") for name in sys.modules)
asyncio.run(run())
"""


def test_a_server_that_is_not_ours_in_a_process_of_its_own(tmp_path, capsys):
    """It says what `straight` says, so it gets what `straight` gets."""
    server = subprocess.Popen([sys.executable, "-c", FOREIGN_SERVER], stdout=subprocess.PIPE, text=True)
    try:
        url = f"ws://127.0.0.1:{int(server.stdout.readline())}"
        command = ["eval", "--policy", url, "--suite", f"{HERE}:mazes", "--remote.keys", "libero", "--num-videos", "0"]
        assert main([*command, "--out", str(tmp_path), "--num-envs", "8"]) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    ours = run_suite(mazes(), STRAIGHT, None, HarnessConfig(num_envs=3), progress=False)
    theirs = EvalResult.load(tmp_path)
    assert [e.success_once for e in theirs.episodes] == [e.success_once for e in ours.episodes]
    assert [e.length for e in theirs.episodes] == [e.length for e in ours.episodes]
    assert theirs.config["policy"] == url
    assert theirs.timing.policy_ms["p50"] > 0
    assert "mazes: 120/120 ep" in capsys.readouterr().err
