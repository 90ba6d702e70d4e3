"""How far an episode got: stages of the tabletop's tasks, in their order, over an episode and across a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from vla_rl.envs.tabletop import TabletopConfig, TabletopEnv
from vla_rl.envs.vector import ChunkedEnv
from vla_rl.sim.experts import ScriptedExpert
from vla_rl.sim.tasks.base import TaskStatus
from vla_rl.sim.tasks.reach import Reach
from vla_rl.sim.view import SceneView

torch.set_num_threads(1)
BUILT_IN = ("close_drawer", "open_drawer", "pick", "place", "press", "push", "reach", "stack", "store")


def _env(task: str, n: int) -> tuple[TabletopEnv, ChunkedEnv]:
    env = TabletopEnv(task, n, TabletopConfig(split="test", num_threads=1))
    return env, ChunkedEnv(env, auto_reset=False)


@pytest.mark.parametrize("task", BUILT_IN)
def test_an_expert_goes_through_all_stages_in_order(task: str) -> None:
    env, chunked = _env(task, 8)
    chunked.reset(range(8))
    expert = ScriptedExpert(chunked)
    assert env.furthest_stage() == [-1] * 8
    history, success = [env.furthest_stage()], torch.zeros(8, dtype=torch.bool)
    while not bool(chunked.ended.all()):
        success |= chunked.step(expert()).success
        history.append(env.furthest_stage())
    last = len(env.stage_names) - 1
    # Contact is chaotic: which pushed block slips away differs from one processor to the next (4 of 256 do here).
    assert int(success.sum()) >= 7
    for i, episode in enumerate(zip(*history, strict=True)):
        assert list(episode) == sorted(episode)  # never back
        if success[i]:
            assert episode[-1] == last
            assert len(set(episode)) >= last  # one at most is passed within a step
        else:
            assert episode[-1] < last
    ended = env.furthest_stage()
    chunked.reset([20, 21], env_ids=[0, 3])
    assert env.furthest_stage() == [-1, *ended[1:3], -1, *ended[4:]]
    env.close()


@pytest.mark.parametrize("task", BUILT_IN)
def test_who_rests_gets_nowhere(task: str) -> None:
    env, chunked = _env(task, 6)
    chunked.reset(range(6))
    rest = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(6, 20, 4)
    chunked.step(rest)
    assert env.furthest_stage() == [-1] * 6
    env.close()


def test_a_resumed_episode_keeps_its_stage() -> None:
    env, chunked = _env("pick", 2)
    chunked.reset([0, 1])
    expert = ScriptedExpert(chunked)
    while 2 not in env.furthest_stage():  # lifted
        chunked.step(expert())
    state, furthest = chunked.state_dict(), env.furthest_stage()
    other, resumed = _env("pick", 2)
    resumed.load_state_dict(state)
    assert other.furthest_stage() == furthest
    drop = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(2, 10, 4)
    for one in (chunked, resumed):
        one.step(drop)
    assert other.furthest_stage() == env.furthest_stage()
    assert 2 in env.furthest_stage()  # the block lies on the table again; what was reached stays
    env.close()
    other.close()


class _Plain(Reach):
    """A task of an author who knows nothing of stages."""

    name = "plain"
    stage_names: tuple[str, ...] = ()

    def evaluate(self, view: SceneView, variables: Mapping[str, torch.Tensor]) -> TaskStatus:
        return replace(super().evaluate(view, variables), stages=None)


def test_a_task_without_stages_has_none() -> None:
    env = TabletopEnv(_Plain(), 2, TabletopConfig(num_threads=1))
    chunked = ChunkedEnv(env, auto_reset=False)
    chunked.reset([0, 1])
    chunked.step(torch.zeros(2, 2, 4))
    assert env.furthest_stage() == [-1, -1]
    env.close()
