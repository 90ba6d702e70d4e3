"""The report: says what the numbers allow, shows them all, needs nothing from outside."""

from __future__ import annotations

import base64
import itertools
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from tests.unit.html_page import NEEDS_CHROMIUM, Page, in_browser
from vla_rl.evaluation.charts import Bar, Series, bar_chart, line_chart
from vla_rl.evaluation.compare import EpisodesDifferError, compare
from vla_rl.evaluation.page import PANELS, MediaBudget, curve_series, provenance_section
from vla_rl.evaluation.report import (
    Curve,
    Panel,
    ReportData,
    ReportRow,
    VideoPair,
    verdict_sentence,
    video_pairs,
    write_report,
)
from vla_rl.evaluation.result import Episode, EvalResult
from vla_rl.evaluation.statistics import wilson
from vla_rl.evaluation.video import write_video
from vla_rl.rollout.recorder import Recording
from vla_rl.train.metrics import MetricsLogger, read_metrics

SVG = "{http://www.w3.org/2000/svg}"


def result(successes: int, n: int = 200, task: str = "reach", first_seed: int = 0) -> EvalResult:
    episodes = tuple(
        Episode(task, first_seed + i, f"touch {i}", i < successes, i < successes - 3, 12, float(i < successes), True)
        for i in range(n)
    )
    return EvalResult(episodes, {"noise_seed": 0})


def rows(sft: int = 90, rl: int = 186, control: int = 92) -> tuple[ReportRow, ...]:
    return (
        ReportRow("SFT", "baseline", result(sft), "150 demonstrations"),
        ReportRow("RL", "trained", result(rl)),
        ReportRow("shuffled", "control", result(control)),
        ReportRow("expert", "expert", result(198)),
    )


def page(tmp_path, data: ReportData) -> tuple[Page, str]:
    text = write_report(tmp_path / "report.html", data).read_text(encoding="utf-8")
    return Page(text), text


# --------------------------------------------------------------------------------------------------------- verdict
def sentence(sft: int, rl: int) -> str:
    return verdict_sentence(compare(result(sft), result(rl), names=("SFT", "RL")))


def test_the_verdict_claims_only_what_the_interval_allows():
    assert sentence(90, 186).startswith("RL is better than SFT: success rises from 45.0% to 93.0% (+48.0 points, 95%")
    assert sentence(186, 90).startswith("RL is worse than SFT: success falls from 93.0% to 45.0% (\u221248.0 points")
    assert sentence(100, 103).startswith("No difference between RL and SFT can be claimed")
    assert sentence(100, 100).startswith("No difference")


def test_the_verdict_has_the_interval_of_the_comparison():
    difference = compare(result(90), result(186)).overall.difference
    assert f"95% interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f}" in sentence(90, 186)


# ------------------------------------------------------------------------------------------------------------ page
def test_every_number_of_the_table_is_there_with_its_interval(tmp_path):
    data = ReportData("A run", rows(), "make demo", provenance={"Revision": "abc123"}, stage_wall_s={"SFT": 65.0})
    html, _ = page(tmp_path, data)
    for row in data.rows:
        rate = row.result.success_once
        assert f"{rate.rate:.1%}" in html.text
        assert f"[{rate.low:.1%}, {rate.high:.1%}]" in html.text
        end = row.result.success_at_end
        assert f"[{end.low:.1%}, {end.high:.1%}]" in html.text
    for words in ("150 demonstrations", "abc123", "make demo", "1m05s", "p < 0.0001", "90 solved by both"):
        assert words in html.text
    assert "shuffled is the control: it moved by +1.0 points from SFT" in html.text


def test_the_criterion_changes_the_verdict(tmp_path):
    html, _ = page(tmp_path, ReportData("A run", rows(), "x", criterion="success_at_end"))
    assert "success rises from 43.5% to 91.5%" in html.text
    assert "Success at the last step of the episode decides" in html.text


def test_nothing_comes_from_outside(tmp_path):
    video = write_video(tmp_path / "v.mp4", torch.zeros(3, 32, 32, 3, dtype=torch.uint8), 10)
    data = ReportData("A run", rows(), "x", videos=(VideoPair(4, "touch 4", video, video, False, True),))
    html, text = page(tmp_path, data)
    for tag, attributes in html.tags:
        assert tag not in ("link", "iframe", "img")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert "@import" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_markup_in_texts_stays_text(tmp_path):
    evil = '<script>alert(1)</script> & "q" $title'
    renamed = replace(rows()[0], label=evil, note=evil)
    data = ReportData(evil, (renamed, *rows()[1:]), evil, description=evil, provenance={evil: evil + "\nline"})
    html, text = page(tmp_path, data)
    assert "<script>alert" not in text
    assert html.text.count("<script>alert(1)</script>") >= 6
    assert [tag for tag, _ in html.tags].count("script") == 1


def test_videos_are_inside_bit_for_bit_with_their_outcome(tmp_path):
    frames = torch.randint(0, 255, (5, 32, 32, 3), dtype=torch.uint8)
    before = write_video(tmp_path / "before.mp4", frames, 10)
    after = write_video(tmp_path / "after.mp4", frames.flip(0), 10)
    data = ReportData("A run", rows(), "x", videos=(VideoPair(4, "touch 4", before, after, False, True),))
    html, _ = page(tmp_path, data)
    sources = [str(attributes["src"]) for tag, attributes in html.tags if tag == "video"]
    inside = [base64.b64decode(source.removeprefix("data:video/mp4;base64,")) for source in sources]
    assert inside == [before.read_bytes(), after.read_bytes()]
    assert re.search(r"SFT · ✗ failed.*RL · ✓ solved", html.text)
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4"):
        page(tmp_path, replace(data, videos=(replace(data.videos[0], after=tmp_path / "gone.mp4"),)))


def test_pairs_are_chosen_by_seed_and_not_by_outcome(tmp_path):
    def films(seeds):
        return {s: Recording(s, tmp_path / f"{s}.mp4", "go", s % 2 == 0, 5) for s in seeds}

    pairs = video_pairs(films([9, 5, 1, 3]), films([3, 5, 7, 9]), limit=2)
    assert [(p.seed, p.before_success) for p in pairs] == [(3, False), (5, False)]


def test_curves_come_from_the_metrics(tmp_path):
    with MetricsLogger(tmp_path / "rl", tensorboard=False) as log:
        for i in range(10):
            log.log(i, {"train/success_rate": i / 10, "joint_kl": float("nan") if i == 3 else 0.01 * i})
    curves = (Curve("RL", "trained", tmp_path / "rl"),)
    html, text = page(tmp_path, ReportData("A run", rows(), "x", curves=curves))
    assert "Success in training rollouts" in html.text
    assert "KL from the behavior policy" in html.text
    assert "Explained variance" not in html.text  # no such metric: no empty chart
    lines = re.findall(r'<polyline class="curve s-trained" points="([^"]*)"', text)
    assert [len(line.split()) for line in lines] == [10, 9]
    only_kl = ReportData("A run", rows(), "x", curves=curves, panels=(Panel("KL", ("*/joint_kl",)),))
    assert "Success in training" not in page(tmp_path, only_kl)[0].text.split("Learning curves")[1].split("KL")[1]


def test_seeds_become_a_mean_in_a_band_where_all_have_a_value(tmp_path):
    for seed, slope in enumerate((0.02, 0.06, 0.1)):
        with MetricsLogger(tmp_path / f"seed_{seed}", tensorboard=False) as log:
            for i in range(10 - seed):  # the last seed has only 8 iterations
                log.log(i, {"train/success_rate": slope * i})
    folders = tuple(tmp_path / f"seed_{seed}" for seed in range(3))
    curve, runs = Curve("RL", "trained", folders), [read_metrics(folder) for folder in folders]
    series = curve_series(curve, PANELS[0], runs)
    assert series.label == "RL (3 seeds)"
    assert series.x == tuple(range(8))
    assert series.y == pytest.approx([0.06 * i for i in range(8)])
    assert series.band[0] == pytest.approx([0.02 * i for i in range(8)])
    assert series.band[1] == pytest.approx([0.1 * i for i in range(8)])
    assert curve_series(curve, PANELS[1], runs) is None
    html, _ = page(tmp_path, ReportData("A run", rows(), "x", curves=(curve,)))
    assert "Lines are means over the seeds" in html.text


def test_a_page_has_room_for_so_many_videos_and_says_how_many_it_leaves_out():
    budget = MediaBudget(4 * 1000)
    assert budget.embed(b"x" * 2000, "video/mp4") is not None  # 2668 characters of base64
    assert budget.note() == ""
    assert budget.embed(b"x" * 2000, "video/mp4") is None
    assert budget.embed(b"abc", "image/jpeg") == "data:image/jpeg;base64,YWJj"
    assert "1 video is left out" in budget.note()


def test_a_text_without_end_is_cut():
    assert len(provenance_section({"diff": "a\n" * 10_000_000})) < 250_000


def test_tasks_have_a_chart_each(tmp_path):
    many = tuple(
        replace(row, result=EvalResult.merge([row.result, result(50 + i, 100, task="push")]))
        for i, row in enumerate(rows())
    )
    html, text = page(tmp_path, ReportData("A run", many, "x"))
    charts = re.findall(r'aria-label="Success rate on (\w+): ([^"]*)"', text)
    assert [name for name, _ in charts] == ["reach", "push"]
    assert str(wilson(51, 100)) in charts[1][1]
    assert "push (n = 100)" in html.text


def test_a_report_of_other_episodes_is_refused(tmp_path):
    shifted = ReportRow("RL", "trained", result(186, first_seed=7))
    with pytest.raises(EpisodesDifferError, match="only in SFT"):
        write_report(tmp_path / "report.html", ReportData("A run", (rows()[0], shifted), "x"))
    assert list(tmp_path.iterdir()) == []


def test_bad_data_is_refused():
    with pytest.raises(ValueError, match="one baseline and one trained"):
        ReportData("A run", rows()[:1], "x")
    with pytest.raises(ValueError, match="criterion"):
        ReportData("A run", rows(), "x", criterion="reward")


# ---------------------------------------------------------------------------------------------------------- charts
def test_bars_and_whiskers_are_to_scale():
    svg = ElementTree.fromstring(bar_chart([Bar("a", wilson(50, 200), "baseline")], "t"))
    track, fill = svg.findall(f"{SVG}rect")
    full = float(track.attrib["width"])
    assert float(fill.attrib["width"]) == pytest.approx(0.25 * full, abs=0.1)
    whisker = next(p for p in svg.findall(f"{SVG}path") if p.attrib["class"] == "whisker").attrib["d"]
    low, high = (float(x) for x in re.match(r"M([\d.]+) .*M([\d.]+) [\d.]+v10$", whisker).groups())
    left = float(track.attrib["x"])
    assert low == pytest.approx(left + wilson(50, 200).low * full, abs=0.1)
    assert high == pytest.approx(left + wilson(50, 200).high * full, abs=0.1)


def test_curves_are_to_scale():
    svg = ElementTree.fromstring(
        line_chart([Series("a", "trained", (0.0, 5.0, 10.0), (0.0, 0.25, 1.0))], "t", x_label="iteration", percent=True)
    )
    (line,) = svg.findall(f"{SVG}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(0.25, abs=0.005)
    assert y2 < y0  # up is up


@pytest.mark.parametrize("values", [(3.0,), (2.0, 2.0), (0.0, 0.0), (-5.0, 1e6), (1e-7, 3e-7), (-2e-3, 5e-4)])
def test_axes_cover_any_values(values):
    xs = tuple(float(i) for i in range(len(values)))
    svg = ElementTree.fromstring(line_chart([Series("a", "trained", xs, values)], "t", x_label="x"))
    ticks = [float(t.text) for t in svg.findall(f"{SVG}text") if t.attrib["text-anchor"] == "end" and t.text != "x"]
    assert ticks == sorted(ticks)
    assert 2 <= len(ticks) <= 8
    rounding = 1e-9 * max(map(abs, values))
    assert ticks[0] <= min(values) + rounding
    assert ticks[-1] >= max(values) - rounding
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)  # so no label was rounded into another number


def test_a_chart_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no points"):
        line_chart([Series("a", "trained", (), ())], "t", x_label="x")


# --------------------------------------------------------------------------------------------------------- browser
@NEEDS_CHROMIUM
def test_a_browser_plays_the_videos(tmp_path):
    video = write_video(tmp_path / "v.mp4", torch.randint(0, 255, (20, 48, 64, 3), dtype=torch.uint8), 10)
    data = ReportData("A run", rows(), "x", videos=(VideoPair(4, "touch 4", video, video, False, True),))
    _, text = page(tmp_path, data)
    title = in_browser(
        tmp_path,
        text,
        "[...document.querySelectorAll('video')].map("
        "(v) => `${v.videoWidth}x${v.videoHeight} ${v.duration} ${v.error}`).join('; ')",
    )
    assert title == "256x192 2 null; 256x192 2 null"
