"""The divergence between policies against closed forms and Monte Carlo; forgetting from evaluations; its chart."""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ET

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from tests.unit.test_token_sampler import TinyTokens
from vla_rl.core import Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.envs.two_way_reach import CHUNK, make_two_way_reach
from vla_rl.evaluation.compare import EpisodesDifferError
from vla_rl.evaluation.evaluate import evaluate
from vla_rl.evaluation.forgetting import (
    Divergence,
    mean_divergence,
    measure_forgetting,
    policy_kl,
    visited_states,
)
from vla_rl.evaluation.forgetting_report import forgetting_chart
from vla_rl.evaluation.result import Episode, EvalResult
from vla_rl.flow import FlowSamplerConfig
from vla_rl.flow.kernels import kernel_table
from vla_rl.onpolicy import FPOConfig, TokenSampler, TokenSamplerConfig
from vla_rl.onpolicy.build import GaussianSamplerConfig, build_sampler
from vla_rl.policies.flow_mlp import FlowMLP, FlowMLPConfig
from vla_rl.policies.gaussian import GaussianMLP, GaussianMLPConfig

FULL = FlowSamplerConfig(kernel="flow_sde", mode="full")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _flow() -> FlowMLP:
    return FlowMLP(FlowMLPConfig(state_dim=5, action_dim=2, action_horizon=CHUNK, width=32)).eval()


def _observations(n: int) -> Observation:
    return Observation({}, torch.randn(n, 5), ("go",) * n)


def _nudged(policy, scale: float):
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn_like(parameter)
    return other


# ---------------------------------------------------------------------------------------------------------- divergence
@pytest.mark.parametrize(("kernel", "horizon"), [("flow_sde", None), ("flow_sde", 2), ("ou", None), ("cps", None)])
def test_flow_kl_of_a_constant_velocity_change_is_the_sum_over_steps(kernel, horizon):
    # The mean of step k moves by velocity_weight_k * c whatever the state, so the KL is exact without any sampling.
    config = FlowSamplerConfig(kernel=kernel, mode="full", scored_horizon=horizon)
    policy, shift = _flow(), 0.3
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.output.bias += shift
    table = kernel_table(kernel, config.num_steps, config.level)
    steps = list(config.stochastic_steps)
    per_number = ((table.velocity_weight[steps] * shift) ** 2 / (2 * table.std[steps] ** 2)).sum().item()
    expected = per_number * (horizon or CHUNK) * 2
    kl = policy_kl(policy, other, _observations(7), config, batch_size=3)
    torch.testing.assert_close(kl, torch.full((7,), expected), rtol=1e-4, atol=0)


def test_flow_kl_is_the_mean_log_ratio_of_chains_from_the_first():
    policy = _flow()
    other = _nudged(policy, 0.05)
    obs = _observations(1)
    many = obs.select(torch.zeros(6000, dtype=torch.int64))
    ours, theirs = (build_sampler(p, FULL, seed=0) for p in (policy, other))
    with torch.no_grad():
        prefix = policy.encode(policy.preprocess(many))
        _, trace = ours.sample(prefix, torch.Generator().manual_seed(5))
        log_ratio = ours.score(prefix, trace).joint - theirs.score(prefix, trace).joint
    closed = policy_kl(policy, other, many, FULL)
    assert 0.05 < closed.mean().item() < 5.0
    error = 4 * (log_ratio.std() / 6000**0.5).item()
    assert closed.mean().item() == pytest.approx(log_ratio.mean().item(), abs=error)
    assert closed.std() < 0.5 * log_ratio.std()  # what the closed form of each step is for
    assert policy_kl(policy, policy, obs, FULL).item() == 0.0


def test_gaussian_kl_equals_torch():
    policy = GaussianMLP(GaussianMLPConfig(state_dim=5, action_dim=2, action_horizon=CHUNK)).eval()
    other, obs = _nudged(policy, 0.05), _observations(6)
    with torch.no_grad():
        first, second = (Independent(Normal(*p.distribution(p.encode(p.preprocess(obs)))), 2) for p in (policy, other))
    torch.testing.assert_close(
        policy_kl(policy, other, obs, GaussianSamplerConfig()), kl_divergence(first, second), rtol=1e-4, atol=1e-5
    )


def test_token_kl_is_exact_by_enumeration():
    policy = TinyTokens(num_bins=3, steps=2, dims=1)
    other, obs = _nudged(policy, 0.3), _observations(1)
    bins = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    with torch.no_grad():
        prefix = policy.encode(policy.preprocess(obs.select(torch.zeros(9, dtype=torch.int64))))
        joint = [
            torch.log_softmax(p.token_logits(prefix, bins), -1).gather(2, bins[..., None]).sum((1, 2))
            for p in (policy, other)
        ]
    exact = (joint[0].exp() * (joint[0] - joint[1])).sum().item()
    many = obs.select(torch.zeros(4000, dtype=torch.int64))
    kl = policy_kl(policy, other, many, TokenSamplerConfig())
    assert kl.mean().item() == pytest.approx(exact, abs=4 * (kl.std() / 4000**0.5).item() + 1e-5)
    assert TokenSampler(policy, TokenSamplerConfig()).has_transitions


def test_policy_kl_refuses_what_has_no_kl_of_chunks():
    policy, obs = _flow(), _observations(2)
    for config in (FlowSamplerConfig(mode="hybrid"), FlowSamplerConfig(kernel="flow_noise", mode="full")):
        with pytest.raises(ValueError, match='mode="full"'):
            policy_kl(policy, policy, obs, config)
    with pytest.raises(ValueError, match="no likelihood"):
        policy_kl(policy, policy, obs, FPOConfig())
    with pytest.raises(TypeError, match="GaussianPolicy"):
        policy_kl(policy, policy, obs, GaussianSamplerConfig())
    other = copy.deepcopy(policy)
    other.set_normalization(Normalizer.identity(5), Normalizer.mean_std(torch.zeros(2), torch.full((2,), 0.5)))
    with pytest.raises(ValueError, match="normalise actions differently"):
        policy_kl(policy, other, obs, FULL)
    with pytest.raises(ValueError, match="differ"):
        policy_kl(policy, FlowMLP(FlowMLPConfig(state_dim=5, action_dim=2, action_horizon=8)), obs, FULL)


def test_mean_divergence_counts_episodes_not_states():
    kl = torch.tensor([1.0] * 90 + [3.0] * 10)
    episode = torch.tensor([0] * 90 + [1] * 10)
    found = mean_divergence(kl, episode)
    assert found.value == pytest.approx(2.0)  # the mean of two episodes, not of a hundred states
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(3.0))
    assert (found.num_states, found.num_episodes) == (100, 2)


def test_visited_states_are_those_of_the_evaluated_episodes():
    policy, seeds = _flow(), range(50, 58)
    states = visited_states(policy, lambda n: make_two_way_reach(n, auto_reset=False), seeds, execution_horizon=CHUNK)
    result = evaluate(
        policy, lambda n: make_two_way_reach(n, auto_reset=False), seeds, execution_horizon=CHUNK, num_envs=8,
        policy_batch_size=8, progress=False,
    )  # fmt: skip
    decisions = [-(-episode.length // CHUNK) for episode in result.episodes]
    assert torch.bincount(states.episode).tolist() == decisions
    assert len(states) == len(states.observations) == sum(decisions)
    first = make_two_way_reach(8, auto_reset=False).reset(list(seeds))
    torch.testing.assert_close(states.observations.state[:8], first.state)


# ---------------------------------------------------------------------------------------------------------- forgetting
def _result(successes: dict[str, list[bool]]) -> EvalResult:
    return EvalResult(
        tuple(
            Episode(task, seed, "go", success_once=s, success_at_end=s, length=5, episode_return=0.0, terminated=s)
            for task, outcomes in successes.items()
            for seed, s in enumerate(outcomes)
        ),
        {},
    )


def _forgetting():
    base = _result({"new": [True] + [False] * 9, "old a": [True] * 10, "old b": [True] * 8 + [False] * 2})
    tuned = _result({"new": [True] * 9 + [False], "old a": [True] * 4 + [False] * 6, "old b": [False] * 10})
    kl = Divergence(2.0, 1.5, 2.5, 100, 10)
    return base, tuned, kl, measure_forgetting(
        {"tuned": tuned, "before": base}, {"tuned": kl}, {"tuned": "sft", "before": "base"}, new_tasks=["new"],
        sampler="Flow-SDE",
    )  # fmt: skip


def test_forgetting_by_hand():
    *_, result = _forgetting()
    base, tuned = result.policies  # the base comes first
    assert (base.name, base.divergence, base.change) == ("before", None, None)
    assert (base.new.successes, base.old.successes, base.old.n) == (1, 18, 20)
    assert (tuned.new.rate, tuned.old.rate, tuned.old_tasks["old a"].rate) == (0.9, 0.2, 0.4)
    assert (tuned.change.only_first, tuned.change.only_second, tuned.change.both) == (14, 0, 4)
    assert tuned.change.difference.value == pytest.approx(-0.7)
    assert tuned.change.difference.high < 0
    assert tuned.change.p_value == pytest.approx(2 / 2**14)
    assert result.old_tasks == ("old a", "old b")
    saved = result.as_dict()["policies"][1]
    assert saved["divergence"]["value"] == 2.0
    assert saved["change"]["difference"] == pytest.approx(-0.7)
    assert "tuned" in result.format_table()
    assert "2 [1.5, 2.5]" in result.format_table()


def test_forgetting_refuses_what_does_not_belong_together():
    base, tuned, kl, _ = _forgetting()
    both, roles = {"before": base, "tuned": tuned}, {"before": "base", "tuned": "sft"}
    with pytest.raises(ValueError, match="a divergence for"):
        measure_forgetting(both, {}, roles, new_tasks=["new"], sampler="")
    with pytest.raises(ValueError, match="one of them base"):
        measure_forgetting(both, {"tuned": kl}, {"before": "sft", "tuned": "sft"}, new_tasks=["new"], sampler="")
    for tasks in ([], ["newer"], ["new", "old a", "old b"]):
        with pytest.raises(ValueError, match="not all"):
            measure_forgetting(both, {"tuned": kl}, roles, new_tasks=tasks, sampler="")
    fewer = {**both, "tuned": _result({"new": [True] * 10, "old a": [True] * 9, "old b": [True] * 10})}
    with pytest.raises(EpisodesDifferError, match="old a"):
        measure_forgetting(fewer, {"tuned": kl}, roles, new_tasks=["new"], sampler="")


def test_chart_is_an_svg_with_every_policy_and_its_numbers_in_words():
    *_, result = _forgetting()
    svg = ET.fromstring(forgetting_chart(result, "Forgetting <of> tasks"))
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"before", "tuned", "base policy", "supervised fine-tuning"} <= set(texts)
    assert svg.attrib["aria-label"].startswith("Forgetting <of> tasks: base policy before at 0: 0.900")
    marks = [e for e in svg.iter() if "dot" in e.attrib.get("class", "")]
    assert len(marks) == 2 + 2  # the points and the legend's
    whiskers = [e.attrib["d"] for e in svg.iter() if e.attrib.get("class") == "whisker thin"]
    assert len(whiskers) == 2
    left, right = whiskers[1].removeprefix("M").split(" ")[0], whiskers[1].split("H")[1].split("M")[0]
    assert float(left) < float(right)  # from 1.5 to 2.5 nats


def test_chart_labels_points_by_what_sets_their_names_apart():
    base, tuned, kl, _ = _forgetting()
    names = ("SFT 30", "SFT 300")
    result = measure_forgetting(
        {"base": base} | dict.fromkeys(names, tuned), dict.fromkeys(names, kl),
        {"base": "base"} | dict.fromkeys(names, "sft"), new_tasks=["new"], sampler="",
    )  # fmt: skip
    svg = ET.fromstring(forgetting_chart(result))
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"30", "300", "base"} <= set(texts)
