"""The paired report and the command that writes it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.unit.eval_folders import SUITE, eval_folder
from tests.unit.html_page import NEEDS_CHROMIUM, Page, in_browser
from vla_rl.cli import main
from vla_rl.evaluation.action_curves import Plan, action_curves, read_plan, shared_range
from vla_rl.evaluation.compare import compare_all
from vla_rl.evaluation.compare_report import write_comparison
from vla_rl.evaluation.result import EvalResult
from vla_rl.evaluation.statistics import mcnemar_exact, wilson
from vla_rl.train.metrics import MetricsLogger

CONDITIONS = {"light@1": 5}


@pytest.fixture
def folders(tmp_path):
    return {
        "SFT": eval_folder(tmp_path / "sft", 8, label="sft", conditions=CONDITIONS),
        "RL": eval_folder(tmp_path / "rl", 18, label="rl", conditions={"light@1": 14}),
        "control": eval_folder(tmp_path / "control", 7, label="control", conditions=CONDITIONS, filmed=1),
    }


def page(tmp_path, folders, **options) -> tuple[Page, str]:
    results = {name: (folder, EvalResult.load(folder)) for name, folder in folders.items()}
    comparisons = compare_all({name: result for name, (_, result) in results.items()})
    text = write_comparison(tmp_path / "c.html", comparisons, results, **options).read_text(encoding="utf-8")
    return Page(text), text


# ------------------------------------------------------------------------------------------------------------ chunks
def test_executed_actions_are_the_beginnings_of_the_chunks(tmp_path):
    plan = read_plan(eval_folder(tmp_path / "rl", 1) / "videos/episode_0.mp4")
    assert plan.starts.tolist() == [0, 2, 4]
    assert plan.actions[:, 0].tolist() == [0.0, 2.0, 8.0, 10.0, 16.0, 18.0]
    assert plan.names == ("dx", "grip")
    assert read_plan(tmp_path / "rl/videos/episode_9.mp4") is None
    np.savez(tmp_path / "bad.npz", chunks=np.zeros((2, 3, 1)), executed=np.ones(3), names=np.array(["x"]))
    with pytest.raises(ValueError, match="do not fit"):
        read_plan(tmp_path / "bad.mp4")


def test_action_curves_are_to_scale():
    chunks = np.array([[[0.0], [1.0], [4.0]], [[2.0], [3.0], [4.0]]], dtype=np.float32)
    plan = Plan(chunks, np.array([2, 1]), ("x",))
    low, high, steps = shared_range([plan, Plan(chunks - 4, np.array([3, 3]), ("x",))])
    assert (low.item(), high.item(), steps) == (-4.0, 4.0, 6)
    svg = action_curves(plan, low, high, steps)
    lines = {
        kind: [[tuple(map(float, p.split(","))) for p in points.split()] for points in found]
        for kind in ("planned", "executed")
        if (found := re.findall(f'class="{kind}" points="([^"]*)"', svg))
    }
    (executed,) = lines["executed"]
    assert [x for x, _ in executed] == [0.0, 40.0, 80.0]  # 240 for 6 steps
    heights = [y for _, y in executed]  # of 0, 1, 2 between -4 and 4
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    assert [len(line) for line in lines["planned"]] == [3, 3]
    assert lines["planned"][1][0] == pytest.approx(executed[2])  # a new plan begins where it is executed
    assert 'data-width="120.0"' in svg  # 3 of 6 steps


def test_a_long_episode_has_few_curves():
    plan = Plan(np.zeros((900, 50, 20), dtype=np.float32), np.ones(900, dtype=np.int64), tuple("abcdefghijklmnopqrst"))
    svg = action_curves(plan, *shared_range([plan]))
    assert svg.count("planned") <= 8 * 41
    assert len(svg) < 400_000
    assert "and 12 more dimensions" in svg


# -------------------------------------------------------------------------------------------------------------- page
def test_every_policy_stands_against_the_first_and_every_pair_is_tested(tmp_path, folders):
    html, text = page(tmp_path, folders, command="vla-rl compare ...")
    assert "RL is better than SFT: success rises from 40.0% to 90.0% (+50.0 points" in html.text
    assert "No difference between control and SFT can be claimed" in html.text
    pairs = html.text.split("Every pair")[1].split("Generalisation")[0]
    assert "Holm's method over all 3 tests" in pairs
    assert f"p = {mcnemar_exact(0, 10):.2g} p = {2 * mcnemar_exact(0, 10):.2g} differ" in pairs
    assert f"p = {mcnemar_exact(1, 0):.2g} p = {mcnemar_exact(1, 0):.2g} not told apart" in pairs
    changed = html.text.split("Generalisation")[1].split("side by side")[0]
    assert [f"{wilson(n, 20).rate:.1%}" in changed for n in (5, 14)] == [True, True]
    for name in folders:
        assert f"Provenance of {name}" in html.text
    html.assert_nothing_comes_from_outside(text)


def test_the_same_episode_is_side_by_side_with_its_chunks(tmp_path, folders):
    del folders["control"]
    html, text = page(tmp_path, folders)
    videos = [attributes for tag, attributes in html.tags if tag == "video"]
    pairs = videos[:4]
    assert [v["aria-label"] for v in pairs] == ["SFT", "RL", "SFT", "RL"]
    part = html.text.split("side by side")[1].split("Where it failed")[0]
    assert re.findall(r"seed (\d+)", part) == ["0", "1"]
    assert "SFT · ✗ failed · 6 steps" in part
    assert text.count('class="actions"') == 4
    assert part.count("dx 0 to 22") == 2  # one scale for both
    plain = page(tmp_path, folders)[1]
    for folder in folders.values():
        for file in (folder / "videos").glob("*.npz"):
            file.unlink()
    without = page(tmp_path, folders)[1]
    assert "Curves:" in plain
    assert "Curves:" not in without
    assert 'class="actions"' not in without


def test_only_episodes_that_both_were_filmed_in_are_shown(tmp_path, folders):
    html, _ = page(tmp_path, folders)  # the last one has filmed the first episode alone
    assert re.findall(r"seed (\d+)", html.text.split("side by side")[1].split("Where it failed")[0]) == ["0"]


# ----------------------------------------------------------------------------------------------------------- command
def test_the_command_prints_writes_and_has_an_exit_code(tmp_path, folders, capsys):
    places = [str(folders[name]) for name in ("SFT", "RL")]
    names = ["--names", "SFT", "RL"]
    low = wilson(18, 20).low
    assert main(["compare", *places, *names, "--fail-under", f"{low - 0.001}"]) == 0
    assert "solved by both 8, only by SFT 0, only by RL 10" in capsys.readouterr().out
    assert main(["compare", *places, *names, "--fail-under", f"{low + 0.001}"]) == 3
    assert "RL: the lower end of its interval is under 0.69" in capsys.readouterr().err
    assert main(["compare", *places, *names, "--fail-under", "0.9", "--fail-on", "rate"]) == 0
    assert main(["compare", *places, *names, "--fail-under", "90"]) == 2
    capsys.readouterr()
    assert main(["compare", *places, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["pairs"][0]["only_second"] == 10
    assert document["names"] == ["sft", "rl"]  # the ends of the paths tell them apart
    assert main(["compare", *places, *names, "--markdown"]) == 0
    assert "| RL \u2212 SFT | 20 | +50.0 |" in capsys.readouterr().out
    assert main(["compare", *places, *names, "--latex"]) == 0
    assert r"\toprule" in capsys.readouterr().out
    for seed in range(2):
        with MetricsLogger(tmp_path / f"seed_{seed}", tensorboard=False) as log:
            log.log(0, {"eval/success_rate": 0.5})
            log.log(1, {"eval/success_rate": 0.7})
    curves = ["--curves", str(tmp_path / "seed_0"), str(tmp_path / "seed_1")]
    assert main(["compare", *places, *names, "--out", str(tmp_path / "c.html"), *curves]) == 0
    text = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "Success on evaluation episodes: RL (2 seeds) ends at 0.7" in text
    assert "vla-rl compare" in Page(text).text


def test_wrong_command_lines_say_what_is_right(tmp_path, folders, capsys):
    place = str(folders["SFT"])
    assert main(["compare", place]) == 2
    assert main(["compare", place, place]) == 2
    assert main(["compare", place, str(folders["RL"]), "--names", "one"]) == 2
    assert "each with a name" in capsys.readouterr().err
    other = eval_folder(tmp_path / "other", 5, suite=SUITE | {"hash": "fedcba"}, conditions=CONDITIONS)
    assert main(["compare", place, str(other)]) == 1
    assert "--across-suites compares the episodes they share" in capsys.readouterr().err
    assert main(["compare", place, str(other), "--across-suites", "--out", str(tmp_path / "x.html")]) == 0
    assert "ACROSS SUITES" in Page((tmp_path / "x.html").read_text(encoding="utf-8")).text


def test_a_report_once_more(tmp_path, folders, capsys):
    assert main(["report", str(folders["RL"])]) == 0
    assert (folders["RL"] / "report.html").is_file()
    assert capsys.readouterr().out.strip().endswith("report.html")
    assert main(["report", str(folders["RL"]), "--markdown"]) == 0
    assert "| nominal | 20 | 90.0% | [69.9%, 97.2%] |" in capsys.readouterr().out
    assert main(["report", str(folders["RL"]), "--latex"]) == 0
    assert r"light@1 & 20 & 70.0\% &" in capsys.readouterr().out
    assert main(["report", str(folders["RL"].parent), "--latex"]) == 2


@NEEDS_CHROMIUM
def test_in_a_browser_the_line_in_the_curves_follows_the_video(tmp_path, folders):
    del folders["control"]
    _, text = page(tmp_path, folders)
    expression = (
        "(() => { const d = document.documentElement; const v = document.querySelector('video'); v.pause();"
        "v.currentTime = v.duration / 2; v.dispatchEvent(new Event('seeked'));"
        "const heads = document.querySelectorAll('.playhead');"
        "return [d.scrollWidth <= d.clientWidth, heads.length,"
        "Math.round(heads[0].transform.baseVal[0].matrix.e)].join(' '); })()"
    )
    assert in_browser(tmp_path, text, expression, width=500) == "true 4 120"  # half of 240
