"""The pages on concepts and on adding a policy, an algorithm, a robot: their code is complete and works as it stands.

A `python` listing runs as it is; on the how-to pages it is a module. A `py` listing uses that module, and runs here
with smaller numbers. docs/add_a_task.md has a test of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from vla_rl.cli import main
from vla_rl.envs.tabletop import make_tabletop
from vla_rl.evaluation.evaluate import evaluate
from vla_rl.evaluation.result import EvalResult
from vla_rl.flow.sampler import GaussianSampler
from vla_rl.onpolicy import PPO, PPOConfig
from vla_rl.policies.checkpoints import native, outside
from vla_rl.policies.checkpoints.native import load_policy, save_policy
from vla_rl.policies.gaussian import GaussianMLP, GaussianMLPConfig
from vla_rl.protocols import GaussianPolicy, HasSupervisedLoss, PolicyInputs, chunk_shape
from vla_rl.real_robot.interfaces import Arm, ArmSpec, Command, HardwareError
from vla_rl.real_robot.modes import Event, Mode
from vla_rl.real_robot.safety import SafetyConfig
from vla_rl.real_robot.supervisor import Guard
from vla_rl.rollout.collector import RolloutCollector
from vla_rl.train.loop import TrainConfig, run_iterations
from vla_rl.train.metrics import read_metrics

torch.set_num_threads(1)

DOCS = Path(__file__).parents[2] / "docs"


def listings(page: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no {language} listing"
    return found


def run_listing(code: str, where: str, changes: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    """The names that the listing makes. `changes`: what stands on the page, and what takes its place here."""
    for said, here in changes:
        assert said in code, f"{where} no longer says {said!r}"
        code = code.replace(said, here)
    names: dict[str, Any] = {"__name__": "listing"}
    exec(compile(code, where, "exec"), names)
    return names


Import = Callable[[str, str], ModuleType]


@pytest.fixture
def import_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    """Saves the first listing of a page as a module and imports it, as its reader would, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(native, "_REGISTRY", dict(native._REGISTRY))

    def load(page: str, name: str) -> ModuleType:
        code = listings(page, "python")[0]
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
        exec(compile(code, page, "exec"), module.__dict__)
        return module

    return load


# ------------------------------------------------------------------------------------------------- listings as they are
@pytest.mark.parametrize("page", ["concepts/chunk_contract.md", "concepts/likelihoods.md", "concepts/warm_start.md"])
def test_concepts_hold_as_written(page: str, capsys: pytest.CaptureFixture[str]):
    run_listing("\n".join(listings(page, "python")), page)
    if page.endswith("likelihoods.md"):
        clips = re.findall(r" ([0-9.]+)$", capsys.readouterr().out, flags=re.MULTILINE)
        assert [round(float(clip), 6) for clip in clips] == [0.2, 0.8, 22.4]  # which the page says


def test_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    run_listing(listings("index.md", "python")[0], "index.md")
    assert "32 of 32, 95% interval [0.89, 1.00]" in capsys.readouterr().out
    assert len(EvalResult.load(tmp_path / "runs" / "expert").episodes) == 32


# ------------------------------------------------------------------------------------------------------ add_a_policy.md
@pytest.fixture
def policy(import_listing: Import) -> Any:
    module = import_listing("add_a_policy.md", "primitive")
    spec = make_tabletop("reach", 1, privileged_state=True, num_threads=1).spec
    torch.manual_seed(0)
    return module.Primitive(module.PrimitiveConfig(spec.state_dim, spec.action.dim))


def test_policy_has_the_capabilities_that_its_page_names(policy: Any):
    assert isinstance(policy, GaussianPolicy)
    assert isinstance(policy, HasSupervisedLoss)


def test_policy_fits_and_ignores_padding(policy: Any):
    n, (h, d) = 64, chunk_shape(policy)
    state = torch.randn(n, policy.feature_dim, generator=torch.Generator().manual_seed(1))
    inputs = PolicyInputs({}, torch.zeros(n, 0, dtype=torch.int64), state)
    # a straight line in time, whose slope the state says
    actions = state[:, :1, None] * torch.linspace(0.0, 1.0, h)[None, :, None].expand(n, h, d)
    mask = torch.ones(n, h, dtype=torch.bool)
    mask[:, h // 2 :] = False
    spoiled = torch.where(mask[..., None], actions, 99.0)
    optimizer, losses = torch.optim.Adam(policy.parameters(), lr=3e-3), []
    for _ in range(200):
        loss = policy.supervised_loss(inputs, spoiled, mask, torch.Generator()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_policy_comes_back_as_saved_and_is_evaluated_the_same_with_any_number_of_environments(
    policy: Any, tmp_path: Path
):
    def make(n: int) -> Any:
        return make_tabletop("reach", n, privileged_state=True, auto_reset=False, max_episode_steps=12, num_threads=1)

    save_policy(policy, tmp_path / "policy", spec=make(1).spec)
    stored = load_policy(tmp_path / "policy", spec=make(1).spec)
    few, many = (
        evaluate(who, make, range(6), execution_horizon=4, num_envs=n, policy_batch_size=4, progress=False)
        for who, n in ((policy, 1), (stored, 4))
    )
    assert few.episodes == many.episodes


def test_policy_is_scored_as_it_was_drawn(policy: Any):
    env = make_tabletop("reach", 4, privileged_state=True, num_threads=1)
    sampler = GaussianSampler(policy, scored_horizon=4)
    ppo = PPO(sampler, PPOConfig(num_decisions=3, critic_warmup_iterations=0))
    metrics = ppo.iterate(RolloutCollector(env, sampler, execution_horizon=4, seed=0))
    assert metrics["update/ratio_error_first"] < 1e-5
    assert metrics["update/actor_steps"] > 0


SMALLER = (
    ("num_episodes=50", "num_episodes=4, num_envs=4"),
    ("num_updates=300, batch_size=64", "num_updates=60, batch_size=16"),
    ("num_iterations=20", "num_iterations=1"),
    ("num_envs=64", "num_envs=4"),
    ("PPOConfig(", "PPOConfig(num_decisions=2, "),
    ("num_episodes=64", "num_episodes=4, num_videos=0"),
)


@pytest.fixture
def primitive_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Both listings as files in the working folder, the recipe with smaller numbers; nothing of them is imported."""
    recipe = listings("add_a_policy.md", "py")[0]
    for said, here in SMALLER:
        assert said in recipe
        recipe = recipe.replace(said, here)
    importlib.import_module("vla_rl.data.demos")  # a default of it is the sys.stderr of now, and not one of capsys
    (tmp_path / "primitive.py").write_text(listings("add_a_policy.md", "python")[0])
    (tmp_path / "primitive_recipe.py").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(native, "_REGISTRY", dict(native._REGISTRY))
    monkeypatch.setattr(outside, "_CONFIGS", {})
    monkeypatch.setenv(outside.IMPORTS, "")
    yield tmp_path
    for name in ("primitive", "primitive_recipe"):
        sys.modules.pop(name, None)


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    native._REGISTRY.pop("primitive", None)
    outside._CONFIGS.clear()
    for name in ("primitive", "primitive_recipe"):
        sys.modules.pop(name, None)
    monkeypatch.setenv(outside.IMPORTS, "")


def test_the_commands_of_the_policy(
    primitive_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = (DOCS / "add_a_policy.md").read_text()
    whole, wider, evaluated = re.findall(r"^    vla-rl (.*)$", page, flags=re.MULTILINE)
    assert main(whole.split()) == 0
    losses = [row["sft/loss"] for row in read_metrics(Path("runs/primitive/sft"))]
    assert losses[-1] < 0.7 * losses[0]
    stored = json.loads(Path("runs/primitive/config.json").read_text())["policy"]
    assert stored["class"] == "primitive:PrimitiveConfig"
    assert json.loads(Path("runs/primitive/rl/policy/config.json").read_text())["module"] == "primitive"
    assert main([*whole.split(), "--resume"]) == 0
    assert main([*whole.split(), "--resume", "--policy.num-bumps", "5"]) == 1
    assert "policy.num_bumps was 3 and is 5" in capsys.readouterr().err
    assert main(wider.split()) == 0
    assert native.load_policy("runs/more_bumps/rl/policy").config.num_bumps == 5  # pyright: ignore

    _forget(monkeypatch)
    asked = evaluated.split()
    without = [word for word in asked if word not in ("--import", "primitive")]
    assert main(without) == 1
    assert "--import primitive on the command line" in capsys.readouterr().err
    assert main(["checkpoint", "inspect", "runs/primitive/rl/policy"]) == 1
    assert "unknown policy class 'primitive'" in capsys.readouterr().err
    assert "primitive" not in sys.modules  # naming is not importing
    assert main(asked) == 0
    assert os.environ[outside.IMPORTS] == "primitive"  # which the processes of a command inherit
    result = EvalResult.load(Path("runs/eval"))
    assert result.episodes == EvalResult.load(Path("runs/primitive/evaluation/rl")).episodes


def test_reinforcement_of_the_policy_goes_on_in_a_new_process(primitive_files: Path, monkeypatch: pytest.MonkeyPatch):
    assert main(["demos", "primitive_recipe:reach", "--out", "demos"]) == 0
    assert main(["sft", "primitive_recipe:reach", "--dataset", "demos", "--run-dir", "sft"]) == 0
    command = ["train", "primitive_recipe:reach", "--policy", "sft/policy"]
    assert main([*command, "--run-dir", "once", "--train.num-iterations", "3"]) == 0
    assert main([*command, "--run-dir", "twice", "--train.num-iterations", "1"]) == 0
    _forget(monkeypatch)
    assert main([*command, "--run-dir", "twice", "--train.num-iterations", "3", "--resume"]) == 0
    once, twice = (native.load_policy(f"{name}/policy").state_dict() for name in ("once", "twice"))
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value, rtol=0, atol=0)


@pytest.mark.slow
def test_the_processes_of_an_evaluation_know_the_policy(primitive_files: Path):
    """Nothing but the option names the module, here and in both of its workers."""
    code = "import sys, torch, primitive as p; from vla_rl.policies.checkpoints.native import save_policy as save\n"
    code += "from vla_rl.envs.tabletop import make_tabletop as make\n"
    code += "spec = make('reach', 1, privileged_state=True, num_threads=1).spec\n"
    code += "save(p.Primitive(p.PrimitiveConfig(spec.state_dim, spec.action.dim)), 'policy', spec=spec)\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=primitive_files)
    cli = [sys.executable, "-c", "import sys; from vla_rl.cli import main; sys.exit(main())"]
    asked = ["eval", "--import", "primitive", "--policy", "policy", "--suite", "reach", "--privileged-state", "True"]
    few = ["--episodes", "4", "--num-envs", "2", "--workers", "2", "--num-videos", "0", "--out", "out"]
    done = subprocess.run([*cli, *asked, *few], cwd=primitive_files, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(EvalResult.load(primitive_files / "out").episodes) == 4


# -------------------------------------------------------------------------------------------------- add_an_algorithm.md
@pytest.fixture
def trainer(import_listing: Import) -> Callable[[int], Any]:
    """Of the page's second listing, which is not run to its end."""
    import_listing("add_an_algorithm.md", "rloo")
    code = listings("add_an_algorithm.md", "py")[0]
    names = run_listing(code.split("result = run_iterations")[0], "add_an_algorithm.md")

    def make(num_envs: int) -> Any:
        torch.manual_seed(0)
        return names["RLOOTrainer"](num_envs)

    return make


def test_algorithm_learns(trainer: Callable[[int], Any]):
    made = trainer(16)
    rows = [made.iterate() for _ in range(20)]
    assert max(row["update/ratio_error_first"] for row in rows) < 1e-5
    returns = [row["rollout/episode_return"] for row in rows]
    assert np.mean(returns[-4:]) > np.mean(returns[:4]) + 0.1  # 0.23 to 0.30 with three seeds


def test_advantages_of_the_algorithm_are_against_the_others(import_listing: Import, monkeypatch: pytest.MonkeyPatch):
    """Two episodes from each start: the advantages of a pair are opposite, and the loss is the mean over decisions."""
    rloo = import_listing("add_an_algorithm.md", "rloo")
    env = make_tabletop("reach", 4, privileged_state=True, reward="dense", max_episode_steps=8, num_threads=1)
    torch.manual_seed(0)
    sampler = GaussianSampler(GaussianMLP(GaussianMLPConfig(env.spec.state_dim, env.spec.action.dim, action_horizon=4)))
    learner = rloo.RLOO(sampler, rloo.RLOOConfig(group_size=2, gamma=1.0))
    collector = RolloutCollector(env, sampler, execution_horizon=4, seed=0)
    kept: list[Any] = []
    collect = collector.collect_episodes
    monkeypatch.setattr(
        collector, "collect_episodes", lambda seeds: kept.append((seeds, collect(seeds))) or kept[-1][1]
    )
    metrics = learner.iterate(collector)
    (seeds, batch) = kept[0]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    total = batch.rewards.sum(dim=(0, 2))
    by_hand = torch.stack([total[0] - total[1], total[1] - total[0], total[2] - total[3], total[3] - total[2]])
    per_decision = by_hand.expand(batch.valid.shape)[batch.valid]
    joint = batch.trace.log_prob.unflatten(0, batch.valid.shape)[batch.valid]
    assert metrics["update/policy_loss"] == pytest.approx(float(-(per_decision * joint).mean()), rel=1e-4, abs=1e-6)


def test_algorithm_resumes_bit_for_bit(trainer: Callable[[int], Any], tmp_path: Path):
    whole, begun, resumed = trainer(8), trainer(8), trainer(8)
    run_iterations(whole, tmp_path / "whole", TrainConfig(num_iterations=4), label="rloo", tensorboard=False)
    run_iterations(begun, tmp_path / "two", TrainConfig(num_iterations=2), label="rloo", tensorboard=False)
    more = TrainConfig(num_iterations=4)
    run_iterations(resumed, tmp_path / "two", more, label="rloo", resume=True, tensorboard=False)
    policies = [load_policy(tmp_path / run / "policy").state_dict() for run in ("whole", "two")]
    assert all(torch.equal(a, b) for a, b in zip(policies[0].values(), policies[1].values(), strict=True))
    rows = [
        [{k: v for k, v in r.items() if k != "time_s"} for r in read_metrics(tmp_path / x)] for x in ("whole", "two")
    ]
    assert rows[0] == rows[1]


# ------------------------------------------------------------------------------------------------------- add_a_robot.md
class Controller:
    """What the driver of the page speaks to: answers with the state as told, and keeps every request."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.state = {"q_deg": [90.0, -45.0], "dq_deg_s": [180.0, 0.0], "width_mm": 40.0, "error": ""}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self._connection: socket.socket | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with self._listener:
            self._connection, _ = self._listener.accept()
        with self._connection, self._connection.makefile("r") as lines:
            for line in lines:
                self.requests.append(json.loads(line))
                self._connection.sendall(json.dumps(self.state).encode() + b"\n")

    def die(self) -> None:
        assert self._connection is not None
        self._connection.shutdown(socket.SHUT_RDWR)

    def told(self, key: str) -> list[Any]:
        return [request[key] for request in self.requests if key in request]


ONE = np.ones(2)
SPEC = ArmSpec("line arm", ("shoulder", "elbow"), -2 * ONE, 2 * ONE, ONE, 5 * ONE, 50 * ONE, (0.0, 0.08), 50.0, 0 * ONE)


@pytest.fixture
def driver(import_listing: Import) -> Any:
    return import_listing("add_a_robot.md", "line_arm").LineArm


def test_driver_speaks_si_units(driver: Any):
    controller = Controller()
    arm = driver(*controller.address, SPEC)
    assert isinstance(arm, Arm)
    arm.connect()
    state = arm.read()
    assert state.position == pytest.approx([np.pi / 2, -np.pi / 4])
    assert state.velocity == pytest.approx([np.pi, 0.0])
    assert state.gripper == pytest.approx(0.04)
    applied = arm.send(Command(np.array([0.1, -0.2]), 0.5, sequence=7))
    assert applied.gripper == 0.08  # as wide as it opens
    assert applied.sequence == 7
    assert controller.told("servo_deg") == [pytest.approx([5.7296, -11.4592], abs=1e-4)]
    assert controller.told("width_mm") == [80.0]
    with pytest.raises(ValueError, match="expected 2 finite joint targets"):
        arm.send(Command(np.array([0.1, np.nan]), 0.04))
    arm.stop("enough")
    arm.close()
    assert controller.told("hold") == ["enough", "close"]


def test_driver_without_a_controller(driver: Any):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = listener.getsockname()
    arm = driver(*nobody, SPEC)
    with pytest.raises(HardwareError, match="no controller at"):
        arm.connect()
    with pytest.raises(HardwareError, match=r"call connect\(\)"):
        arm.read()
    arm.stop("nothing is connected")
    arm.close()


def test_driver_whose_controller_dies_stops_the_guard(driver: Any):
    controller = Controller()
    controller.state |= {"q_deg": [0.0, 0.0], "dq_deg_s": [0.0, 0.0]}
    arm = driver(*controller.address, SPEC)
    arm.connect()
    guard = Guard(arm, SafetyConfig(max_state_age_s=2.0))
    guard.fire(Event.START)
    assert guard.apply(Command(np.array([0.01, 0.0]), 0.04, sequence=1)).stop_reason == ""
    controller.die()
    time.sleep(2.0 / SPEC.rate_hz)  # a command that comes too early is not sent at all
    applied = guard.apply(Command(np.array([0.01, 0.0]), 0.04, sequence=2))
    assert "does not answer" in applied.stop_reason
    assert guard.modes.mode is Mode.ESTOP
    arm.close()


def test_use_of_the_driver(import_listing: Import, capsys: pytest.CaptureFixture[str]):
    """The arm of the second listing arrives. A measurement may be older here, on a machine that does other work."""
    import_listing("add_a_robot.md", "line_arm")
    slower = (("speed_scale=0.5", "speed_scale=0.5, max_state_age_s=5.0"),)
    names = run_listing(listings("add_a_robot.md", "py")[0], "add_a_robot.md", slower)
    assert names["applied"].command.position == pytest.approx([0.4, -0.3], abs=1e-6)
    assert "wanted [ 0.4 -0.3]" in capsys.readouterr().out
    assert names["guard"].modes.mode is Mode.ESTOP
