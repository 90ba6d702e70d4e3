"""The pages and charts of forgetting: what stands where, from the experiment's own numbers and by hand."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.html_page import NEEDS_CHROMIUM, Page, in_browser
from tests.unit.serving_policies import HORIZON, save_flow_mlp
from vla_rl.cli import main
from vla_rl.evaluation.charts import Point, scatter_chart
from vla_rl.evaluation.forgetting import Divergence, ForgettingResult, measure_forgetting
from vla_rl.evaluation.forgetting_report import forgetting_sentence, read_forgetting, tradeoff_chart
from vla_rl.evaluation.result import Episode, EvalResult
from vla_rl.evaluation.statistics import wilson
from vla_rl.flow import FlowSamplerConfig
from vla_rl.flow.kernels import kernel_table
from vla_rl.policies.checkpoints.native import load_policy, save_policy

MEASURED = Path(__file__).parents[1] / "experiments" / "results" / "forgetting.json"
SVG = "{http://www.w3.org/2000/svg}"


def _result(new: int, old: int) -> EvalResult:
    """So many of 10 new and of 20 old episodes succeed."""
    counts = {"reach": (new, 10), "press": (old, 20)}
    return EvalResult(
        tuple(
            Episode(task, i, "go", i < solved, i < solved, 5, 0.0, i < solved)
            for task, (solved, n) in counts.items()
            for i in range(n)
        ),
        {},
    )


def _forgetting() -> ForgettingResult:
    results = {"base": _result(1, 20), "SFT 10": _result(5, 18), "SFT 20": _result(9, 6), "RL": _result(9, 20)}
    kl = {"SFT 10": 1.0, "SFT 20": 4.0, "RL": 2.0}
    return measure_forgetting(
        results,
        {name: Divergence(value, value / 2, value * 2, 10, 5) for name, value in kl.items()},
        {"base": "base", "SFT 10": "sft", "SFT 20": "sft", "RL": "rl"},
        new_tasks=["reach"],
        sampler="Flow-SDE",
    )


def _marks(svg: str) -> dict[str, list[tuple[float, float, float]]]:
    """Style -> middle and half width of its marks, without those of the legend."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for e in ET.fromstring(svg).iter():
        kind = e.attrib.get("class", "")
        if kind.startswith("dot"):
            if e.tag == f"{SVG}circle":
                x, y, half = (float(e.attrib[k]) for k in ("cx", "cy", "r"))
            else:
                corners = [tuple(map(float, p.split(","))) for p in e.attrib["points"].split()]
                xs, ys = zip(*corners, strict=True)
                x, y, half = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, (max(xs) - min(xs)) / 2
            found.setdefault(kind.removeprefix("dot s-"), []).append((x, y, half))
    return {style: marks[:-1] for style, marks in found.items()}


def test_marks_stand_at_both_rates_and_grow_with_the_divergence():
    svg = tradeoff_chart(_forgetting())
    marks = _marks(svg)
    (base,), sft, (rl,) = marks["other"], marks["baseline"], marks["trained"]
    ticks = {e.text: float(e.attrib["x"]) for e in ET.fromstring(svg).iter(f"{SVG}text")}
    across = (ticks["100%"] - ticks["0%"]) if "0%" in ticks else None
    assert across is not None
    assert [(x - ticks["0%"]) / across for x, _, _ in (base, *sft, rl)] == pytest.approx([0.1, 0.5, 0.9, 0.9], abs=0.01)
    assert base[1] == rl[1] < sft[0][1] < sft[1][1]  # all old episodes, 18 and 6 of 20
    assert base[2] < sft[0][2] < sft[1][2]
    area = [(half / 0.9) ** 2 for _, _, half in sft]  # of squares; 1 and 4 nats of at most 4
    assert area[1] - area[0] == pytest.approx(0.75 * (9**2 - 4**2), abs=2)
    lines = [e.attrib["points"].split() for e in ET.fromstring(svg).iter(f"{SVG}polyline")]
    assert [len(line) for line in lines] == [3, 2]  # from the base through each group
    assert lines[0][0] == lines[1][0] == f"{base[0]:.1f},{base[1]:.1f}"


def test_labels_never_cover_each_other():
    rate = wilson(90, 100)
    crowd = [Point(f"label {i}", "a", "trained", 0.9 + i * 1e-3, 0.9, 1.0, rate) for i in range(12)]
    svg = ET.fromstring(scatter_chart(crowd, "crowd", x_label="x", x_is_rate=True))
    labels = [e for e in svg.iter(f"{SVG}text") if e.attrib["class"] == "tick over"]
    assert 1 <= len(labels) < 12
    assert "label 11" in [e.text for e in labels]  # the last one comes first
    boxes = []
    for e in labels:
        x, y, width = float(e.attrib["x"]), float(e.attrib["y"]), 6.4 * len(e.text or "")
        x -= width if e.attrib["text-anchor"] == "end" else 0
        boxes.append((x, x + width, y - 9, y + 1))
    for i, a in enumerate(boxes):
        assert all(a[1] < b[0] or b[1] < a[0] or a[3] < b[2] or b[3] < a[2] for b in boxes[:i])


def test_sentences_claim_what_the_intervals_allow():
    result = _forgetting()
    _, _, tuned, rl = result.policies
    assert forgetting_sentence(result, tuned).startswith(
        "SFT 20: reach from 10.0% to 90.0%; on press it forgets, \u221270.0 points (95% interval \u2212"
    )
    assert "at 4 nats from the base" in forgetting_sentence(result, tuned)
    assert "no forgetting can be claimed, +0.0 points" in forgetting_sentence(result, rl)
    with pytest.raises(ValueError, match="base is the base"):
        forgetting_sentence(result, result.policies[0])


def test_a_result_survives_its_file(tmp_path):
    result = _forgetting()
    file = tmp_path / "one.json"
    file.write_text(json.dumps(result.as_dict()))
    assert read_forgetting(file) == {"": result}
    measured = read_forgetting(MEASURED)
    assert json.loads(json.dumps(measured["0"].as_dict())) == json.loads(MEASURED.read_text())["seeds"]["0"]
    for wrong in ("{}", "[]", "{", json.dumps({"seeds": {"0": {"policies": [{"name": "x"}]}}})):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=re.escape(str(file))):
            read_forgetting(file)


def test_the_command_makes_a_page_of_the_experiment(tmp_path, capsys):
    file = tmp_path / "forgetting.json"
    first = json.loads(MEASURED.read_text())["seeds"]["0"]
    file.write_text(json.dumps({"seeds": {"0": first, "1": first}}))
    assert main(["report", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "forgetting.html")
    text = (tmp_path / "forgetting.html").read_text(encoding="utf-8")
    page = Page(text)
    page.assert_nothing_comes_from_outside(text)
    assert "RL, no KL 40: reach from 75.4% to 98.8%; on press, close_drawer it forgets" in page.text
    assert page.text.count("SFT 300") == 2  # a row for each seed
    assert text.count("<svg") == 4
    assert "Training seed 1." in page.text


def test_a_comparison_draws_new_tasks_against_the_others(tmp_path, capsys):
    places = []
    for name, result in (("base", _result(1, 20)), ("RL", _result(9, 18))):
        replace(result, config={"policy": name}).save(tmp_path / name)
        places.append(str(tmp_path / name))
    out = tmp_path / "c.html"
    assert main(["compare", *places, "--out", str(out), "--new-tasks", "reach"]) == 0
    text = out.read_text(encoding="utf-8")
    assert "Forgetting" in Page(text).text
    assert "base at 10.0%: 1.000" in text
    assert "RL at 90.0%: 0.900" in text
    assert main(["compare", *places, "--out", str(out), "--new-tasks", "reach", "press"]) == 1
    assert "name some of these tasks, and not all" in capsys.readouterr().err
    assert main(["compare", *places, "--new-tasks", "reach"]) == 2


def test_the_command_measures_the_divergence_on_what_the_base_visits(tmp_path, capsys):
    """Shifted by a constant velocity, the policy's KL is the same at all states, and in closed form."""
    shift = 0.3
    base = save_flow_mlp(tmp_path / "base", state_dim=4, action_dim=2)
    policy: Any = load_policy(base)
    with torch.no_grad():
        policy.output.bias += shift
    save_policy(policy, tmp_path / "rl")
    suite = ["--suite", "tests.unit.harness_suites:mazes"]
    for name in ("base", "rl"):
        told = ["--policy", str(tmp_path / name), "--out", str(tmp_path / f"{name}_eval"), "--num-videos", "0"]
        assert main(["eval", *told, *suite, "--episodes", "5"]) == 0
    out = tmp_path / "new" / "forgetting.json"
    places = [str(tmp_path / "base_eval"), str(tmp_path / "rl_eval")]
    task = ["--new-tasks", "point_maze/umaze", "--roles", "rl", "--names", "base", "RL", "--out", str(out)]
    capsys.readouterr()
    assert main(["forgetting", *places, *task, *suite, "--episodes", "3", "--noise-level", "0.8"]) == 0
    assert f"report: {out.with_suffix('.html')}" in capsys.readouterr().err
    (result,) = read_forgetting(out).values()
    before, after = result.policies
    assert (result.new_tasks, result.old_tasks) == (("point_maze/umaze",), ("point_maze/wall_gap",))
    assert (before.role, after.role, after.old.n, after.divergence.num_episodes) == ("base", "rl", 5, 3)
    assert "noise level 0.8" in result.sampler
    config = FlowSamplerConfig(mode="full", noise_level=0.8)
    table, steps = kernel_table("flow_sde", config.num_steps, config.level), list(config.stochastic_steps)
    a_number = ((table.velocity_weight[steps] * shift) ** 2 / (2 * table.std[steps] ** 2)).sum().item()
    assert after.divergence.value == pytest.approx(a_number * HORIZON * 2, rel=1e-3)

    assert main(["forgetting", *places, *task]) == 1  # of a function, which the evaluation does not name
    assert "there is no suite 'mazes'" in capsys.readouterr().err
    assert main(["forgetting", *places, *task, *suite, "--new-tasks", "fly"]) == 2
    assert "fly is not in" in capsys.readouterr().err
    assert main(["forgetting", *places[:1], *task]) == 2
    save_policy(load_policy(base), tmp_path / "rl")
    assert main(["forgetting", *places, *task, *suite]) == 2
    assert "no folder with those weights" in capsys.readouterr().err


@NEEDS_CHROMIUM
def test_the_page_fits_a_phone(tmp_path):
    file = tmp_path / "forgetting.json"
    file.write_text(MEASURED.read_text())
    assert main(["report", str(file)]) == 0
    expression = (
        "(() => { const d = document.documentElement; const s = [...document.querySelectorAll('figure svg')];"
        "return [d.scrollWidth <= d.clientWidth, s.every(e => e.getBoundingClientRect().height > 200)].join(' '); })()"
    )
    text = file.with_suffix(".html").read_text(encoding="utf-8")
    assert in_browser(tmp_path, text, expression, width=500) == "true true"
