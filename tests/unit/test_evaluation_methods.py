"""Methods with several training runs each: what may be claimed, the page, and the command."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from tests.unit.eval_folders import eval_folder
from tests.unit.html_page import NEEDS_CHROMIUM, Page, in_browser
from vla_rl.cli import main
from vla_rl.evaluation.aggregate import stratified_bootstrap
from vla_rl.evaluation.charts import SeedsRow, seeds_chart
from vla_rl.evaluation.compare import EpisodesDifferError
from vla_rl.evaluation.methods import compare_methods
from vla_rl.evaluation.profiles import profiles_section
from vla_rl.evaluation.result import Episode, EvalResult

SVG = "{http://www.w3.org/2000/svg}"


def _result(successes: dict[str, list[bool]], conditions: int = 0) -> EvalResult:
    """`conditions` more episodes of each task that fail under "light@1"."""
    episodes = [
        Episode(task, seed, "go", success_once=s, success_at_end=s, length=5, episode_return=0.0, terminated=s)
        for task, outcomes in successes.items()
        for seed, s in enumerate(outcomes)
    ]
    episodes += [
        Episode(task, i, "go", False, False, 5, 0.0, False, condition="light@1")
        for task in successes
        for i in range(conditions)
    ]
    return EvalResult(tuple(episodes), {})


def _runs(*counts: tuple[int, int]) -> list[EvalResult]:
    """A run for each (solved of 10 in `a`, of 20 in `b`)."""
    return [
        _result({"a": [i < first for i in range(10)], "b": [i < second for i in range(20)]}, conditions=2)
        for first, second in counts
    ]


def test_methods_by_hand():
    found = compare_methods({"SFT": _runs((2, 10), (4, 10)), "RL": _runs((8, 20), (10, 20), (9, 16))})
    sft, rl = found.methods
    assert (found.tasks, found.num_episodes) == (("a", "b"), 30)  # the nominal episodes
    assert sft.runs == pytest.approx((0.35, 0.45))
    assert (sft.mean.value, rl.mean.value) == (pytest.approx(0.4), pytest.approx((0.9 + 1.0 + 0.85) / 3))
    assert rl.iqm == stratified_bootstrap(np.array([[0.8, 1.0], [1.0, 1.0], [0.9, 0.8]]))
    (against,) = found.against_first
    assert against.difference.value == pytest.approx(rl.mean.value - 0.4)
    assert (against.claim, against.difference.num_runs, against.difference.confidence) == ("better", 2, 0.95)
    turned = compare_methods({"RL": _runs((8, 20), (10, 20)), "SFT": _runs((2, 10), (4, 10))})
    assert turned.against_first[0].claim == "worse"
    assert found.under(0.9, "rate") == ()
    assert found.under(0.95, "rate") == ("RL",)
    assert "RL - SFT: +0.517" in found.format_table()
    assert found.as_dict()["methods"][1]["runs"] == pytest.approx([0.9, 1.0, 0.85])


def test_intervals_of_several_methods_hold_together():
    groups = {name: _runs((2, 10), (4, 12)) for name in "abcd"}
    found = compare_methods(groups)
    assert [one.difference.confidence for one in found.against_first] == [pytest.approx(1 - 0.05 / 3)] * 3
    assert [one.claim for one in found.against_first] == ["not told apart"] * 3


def test_one_run_is_no_sample_of_a_method():
    found = compare_methods({"SFT": _runs((0, 0), (0, 0)), "RL": _runs((10, 20))})
    assert found.against_first[0].difference.low > 0.9  # for this run
    assert found.against_first[0].claim == "not told apart"


def test_runs_that_did_not_play_the_same_episodes_are_refused():
    with pytest.raises(EpisodesDifferError, match="only in run 0 of SFT") as error:
        compare_methods({"SFT": _runs((1, 1)), "RL": [*_runs((1, 1)), _result({"a": [True] * 10})]})
    assert error.value.__notes__ == ["run 1 of RL was compared with run 0 of SFT"]
    with pytest.raises(ValueError, match="two methods"):
        compare_methods({"SFT": _runs((1, 1), (2, 2))})
    with pytest.raises(ValueError, match="criterion"):
        compare_methods({"SFT": _runs((1, 1)), "RL": _runs((1, 1))}, criterion="success")


# ------------------------------------------------------------------------------------------------------------- charts
def test_every_training_run_is_a_dot_in_its_place():
    svg = ET.fromstring(seeds_chart([SeedsRow("RL", "trained", (0.5, 1.0), 0.75, 0.5, 1.0)], "Runs"))
    x = [float(e.attrib["cx"]) for e in svg.iter(f"{SVG}circle")]
    ticks = {e.text: float(e.attrib["x"]) for e in svg.iter(f"{SVG}text")}
    assert x == pytest.approx([ticks["50%"], ticks["100%"]])
    assert svg.attrib["aria-label"] == "Runs: RL 0.750 [0.500, 1.000], seeds 0.500, 1.000"


def test_a_profile_counts_the_scores_above():
    section = profiles_section({"RL": np.array([[0.25, 0.75, 0.75]])}, {"RL": "trained"})
    svg = ET.fromstring(section[section.index("<svg") : section.index("</svg>") + 6])
    (line,) = [e.attrib["points"] for e in svg.iter(f"{SVG}polyline")]
    points = [tuple(map(float, p.split(","))) for p in line.split()]
    top, bottom = points[0][1], points[-1][1]
    share = [(bottom - y) / (bottom - top) for _, y in points]
    assert len(points) == 101
    assert [share[i] for i in (0, 24, 25, 74, 75, 100)] == pytest.approx([1, 1, 2 / 3, 2 / 3, 0, 0], abs=0.01)
    assert "polygon" not in section  # one run has no band
    assert "another seed may draw another curve" in section
    assert "polygon" in profiles_section({"RL": np.array([[0.2, 0.7], [0.4, 0.9]])}, {"RL": "trained"})
    assert profiles_section({"RL": np.array([[0.2, 0.7]])}, {"RL": "trained"}) == ""


# --------------------------------------------------------------------------------------------------- page and command
@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two methods of three runs, and their names."""
    places = [eval_folder(tmp_path / f"sft_{i}", 4 + i, label="sft") for i in range(3)]
    places += [eval_folder(tmp_path / f"rl_{i}", 16 + i, label="rl") for i in range(3)]
    return [*map(str, places), "--names", *["SFT"] * 3, *["RL"] * 3]


def test_the_command_compares_methods_where_folders_share_a_name(tmp_path, folders, capsys):
    assert main(["compare", *folders, "--out", str(tmp_path / "m.html"), "--fail-under", "0.9"]) == 3
    shown = capsys.readouterr()
    assert "RL - SFT: +0.600" in shown.out
    assert "RL: the lower end of its interval is under 0.9" in shown.err
    text = (tmp_path / "m.html").read_text(encoding="utf-8")
    page = Page(text)
    page.assert_nothing_comes_from_outside(text)
    assert "RL is better than SFT: mean success goes from 25.0% to 85.0%" in page.text
    assert "Few runs are few" in page.text
    assert "Performance profiles: SFT ends at 0, RL ends at 0" in text
    assert len(re.findall("Provenance of RL, ", page.text)) == 3
    assert main(["compare", *folders, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["methods"][1]["mean"]["value"] == pytest.approx(0.85)
    assert main(["compare", *folders, "--markdown"]) == 0
    assert "| RL | 3 | 85.0% [" in capsys.readouterr().out
    assert main(["compare", *folders[:3], "--names", "SFT", "SFT", "SFT"]) == 2
    assert main(["compare", folders[0], folders[0], folders[3], "--names", "SFT", "SFT", "RL"]) == 2
    assert "training runs of one method" in capsys.readouterr().err


@NEEDS_CHROMIUM
def test_the_page_fits_a_phone(tmp_path, folders):
    assert main(["compare", *folders, "--out", str(tmp_path / "m.html")]) == 0
    text = (tmp_path / "m.html").read_text(encoding="utf-8")
    expression = (
        "(() => { const d = document.documentElement; const s = [...document.querySelectorAll('figure svg')];"
        "return [d.scrollWidth <= d.clientWidth, s.length, s.every(e => e.getBoundingClientRect().height > 100)]"
        ".join(' '); })()"
    )
    assert in_browser(tmp_path, text, expression, width=500) == "true 2 true"
