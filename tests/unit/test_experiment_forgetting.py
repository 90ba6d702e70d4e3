"""The parts of the forgetting experiment: one state for all tasks, shares of a batch, a chart file."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
import torch

from tests.experiments.forgetting import (
    CHUNK,
    NEW,
    OLD,
    TASKS,
    MixedSampler,
    demonstrations,
    evaluate_all,
    make_env,
    over_seeds,
    write_chart,
)
from vla_rl.evaluation.forgetting import Divergence, measure_forgetting
from vla_rl.evaluation.forgetting_report import forgetting_chart
from vla_rl.evaluation.result import Episode, EvalResult
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.sim.experts import ExpertConfig


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_all_tasks_share_one_state_that_says_which_it_is():
    names = set()
    for i, task in enumerate(TASKS):
        env = make_env(task, 3, "test")
        obs = env.reset([1, 2, 3])
        some = env.step_env.observe(torch.tensor([2]), True)
        goal = env.step_env.task.goal(env.step_env.view, env.step_env.variables).float()
        names.add(env.spec.state_names)
        assert obs.state.shape[1] == len(env.spec.state_names)
        assert obs.state[:, -3:].tolist() == [[float(i == j) for j in range(3)]] * 3
        torch.testing.assert_close(obs.state[:, 12 : 12 + goal.shape[1]], goal)
        torch.testing.assert_close(some.state[0], obs.state[2])
        env.close()
    assert len(names) == 1


def test_a_batch_has_equal_shares_and_goes_on_where_it_stopped(tmp_path):
    parts = [demonstrations(tmp_path / task, task, 3, ExpertConfig()) for task in (NEW, OLD[0])]
    sampler = MixedSampler(parts, 8, seed=1)
    obs, actions, mask = sampler.batch()
    assert obs.state[:, -3:].sum(dim=0).tolist() == [4.0, 4.0, 0.0]
    assert (actions.shape, mask.shape) == ((8, CHUNK, 4), (8, CHUNK))
    again = MixedSampler(parts, 8, seed=1)
    again.load_state_dict(sampler.state_dict())
    torch.testing.assert_close(again.batch()[1], sampler.batch()[1])


def test_evaluation_of_all_tasks_is_one_result():
    env = make_env(NEW, 1, "test")
    policy = FlowMLP(FlowMLPConfig(env.spec.state_dim, 4, action_horizon=CHUNK, width=16)).eval()
    env.close()
    result = evaluate_all(policy, 2)
    assert [(e.task, e.seed) for e in result.episodes] == [(task, seed) for task in TASKS for seed in (0, 1)]


def test_summary_over_seeds_and_chart_file(tmp_path):
    def result(successes: int) -> EvalResult:
        return EvalResult(
            tuple(
                Episode(task, i, "go", i < successes, i < successes, 5, 0.0, terminated=True)
                for task in TASKS
                for i in range(10)
            ),
            {},
        )

    seeds = [
        measure_forgetting(
            {"base": result(10), "SFT": result(n)}, {"SFT": Divergence(float(n), 0.5, 9.0, 50, 5)},
            {"base": "base", "SFT": "sft"}, new_tasks=[NEW], sampler="",
        )
        for n in (2, 4)
    ]  # fmt: skip
    summary = over_seeds(seeds)
    assert summary["base"]["old"]["value"] == 1.0
    assert summary["SFT"]["old"]["value"] == pytest.approx(0.3)
    assert (summary["SFT"]["old"]["num_runs"], summary["SFT"]["old"]["num_tasks"]) == (2, 2)
    assert summary["SFT"]["kl"] == [2.0, 4.0]
    write_chart(forgetting_chart(seeds[0]), tmp_path / "chart.svg")
    root = ET.parse(tmp_path / "chart.svg").getroot()
    assert root.tag.endswith("svg")
    assert ".dot.s-trained" in (next(root.iter("{http://www.w3.org/2000/svg}style")).text or "")
