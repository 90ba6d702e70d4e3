"""docs/add_a_task.md: the task on the page is complete, short, and works as it stands."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from vla_rl.envs.tabletop import make_tabletop
from vla_rl.sim.experts import ScriptedExpert
from vla_rl.sim.tasks import TASKS, get_task

torch.set_num_threads(1)

PAGE = Path(__file__).parents[2] / "docs" / "add_a_task.md"


def _code(language: str) -> str:
    code = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)[0]
    return code


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's task, imported from a file as its reader would, in a registry that is put back afterwards."""
    monkeypatch.setattr("vla_rl.sim.tasks.base.TASKS", dict(TASKS))
    path = tmp_path / "move_aside.py"
    path.write_text(_code("python"))
    spec = importlib.util.spec_from_file_location("move_aside", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "move_aside", module)
    spec.loader.exec_module(module)


def test_a_task_is_about_sixty_lines() -> None:
    assert len(_code("python").splitlines()) <= 70


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("split", ["train", "test", "ood"])
def test_its_expert_succeeds(split: str) -> None:
    env = make_tabletop("move_aside", 40, split=split, auto_reset=False, num_threads=1)
    obs = env.reset(range(40))
    assert {"left" in s for s in obs.instruction} == {True, False}
    expert, success = ScriptedExpert(env), torch.zeros(40, dtype=torch.bool)
    for _ in range(env.spec.max_episode_steps or 0):
        success |= env.step(expert()).success
    assert success.float().mean() >= 0.95


@pytest.mark.usefixtures("registered")
def test_its_sentence_matters() -> None:
    env = make_tabletop("move_aside", 40, auto_reset=False, num_threads=1)
    env.reset(range(40))
    side = env.step_env.variables["side"]
    told, truth = 1 - side, side.clone()
    expert = ScriptedExpert(env)
    success, failure = torch.zeros(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)
    for _ in range(env.spec.max_episode_steps or 0):
        side.copy_(told)
        actions = expert()
        side.copy_(truth)
        step = env.step(actions)
        success |= step.success
        failure |= step.terminated & ~step.success
    assert not success.any()
    assert failure.float().mean() >= 0.95


@pytest.mark.usefixtures("registered")
def test_the_use_that_the_page_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second listing, with fewer environments, steps and no cameras to be quick."""
    code = _code("py").replace("64", "4").replace("range(100)", "range(3)").replace('cameras={"agent": 4}, ', "")
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert names["step"].executed.all()  # type: ignore[attr-defined]
    assert get_task("move_aside").name == "move_aside"
