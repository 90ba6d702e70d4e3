"""The report of one evaluation, from its folder alone."""

from __future__ import annotations

import base64
import re
from dataclasses import replace

import pytest

from tests.unit.eval_folders import SUITE, eval_folder
from tests.unit.html_page import NEEDS_CHROMIUM, Page, in_browser
from vla_rl.evaluation.conditions_table import must_not_succeed
from vla_rl.evaluation.eval_report import eval_sentence, write_eval_report
from vla_rl.evaluation.gallery import failure_gallery
from vla_rl.evaluation.page import MediaBudget
from vla_rl.evaluation.result import EvalResult
from vla_rl.evaluation.statistics import wilson

CONDITIONS = {"light@1": 14, "light@3": 6, "camera@1": 10, "light@2+camera@2": 5, "wrong_instruction@1": 1}


def page(folder, **options) -> tuple[Page, str]:
    text = write_eval_report(folder, **options).read_text(encoding="utf-8")
    return Page(text), text


def test_the_verdict_has_rate_interval_and_counts():
    assert eval_sentence("rl", wilson(18, 20), "success_once") == (
        "rl succeeds in 90.0% of its episodes (95% interval 69.9% to 97.2%, 18 of 20)."
    )
    assert "and holds it to the end (" in eval_sentence("rl", wilson(18, 20), "success_at_end")


def test_everything_that_was_measured_is_on_the_page(tmp_path):
    folder = eval_folder(tmp_path / "rl", 18, conditions=CONDITIONS, unsupported_conditions={"physics@1": "no masses"})
    (folder / "source.diff").write_text("+ changed = True\n- changed = False\n")
    html, text = page(folder)
    assert "+ changed = True" in html.text
    assert html.text.count("rl succeeds in 90.0% of its episodes") == 1  # nominal: 54 of 120 otherwise
    for successes in (18, *CONDITIONS.values()):
        rate = wilson(successes, 20)
        assert f"{rate.rate:.1%}" in html.text
        assert f"[{rate.low:.1%}, {rate.high:.1%}]" in html.text
    for words in (
        "Held out", "reach_axes, version 3, hash 0123456789abcdef", "physics@1 no masses", "abc123", "torch 2.13",
        "vla-rl eval --policy rl", "0 to 19", "1 a second", "light, camera at level 2", "there, lower is better",
    ):  # fmt: skip
        assert words in html.text, words
    assert re.search(r"policy call, of one batch 4\s?ms 8\.5\s?ms 8\.9\s?ms 9\s?ms", html.text)
    assert re.search(r"cycle time of successes 0\.6\s?s", html.text)
    html.assert_nothing_comes_from_outside(text)


@pytest.mark.parametrize("lost", [[4, 5, 6, 9], {"reach light@1": [4, 5, 6, 9]}])
def test_what_was_stopped_or_lost_is_said_at_the_top(tmp_path, lost):
    rule = {"reach": {"n": 20, "reason": "surely above 0.5"}}
    html, _ = page(eval_folder(tmp_path / "rl", 18, filmed=0, lost_seeds=lost, stopped=rule))
    verdict = html.text.split("By task")[0]
    assert "reach was stopped after 20 episodes by the rule stated before the run: surely above 0.5." in verdict
    assert f"4 episodes {'of reach light@1 ' if isinstance(lost, dict) else ''}were lost" in verdict
    assert "seeds 4 to 6, 9." in verdict


def test_axes_are_in_the_order_of_reports_and_levels_are_columns(tmp_path):
    html, _ = page(eval_folder(tmp_path / "rl", 18, conditions={"camera@2": 3, "light@3": 4, "position@1": 5}))
    part = html.text.split("Generalisation")[1].split("Where it failed")[0]
    assert re.findall(r"level \d", part) == ["level 1", "level 2", "level 3"]
    assert part.index("position") < part.index("light") < part.index("camera")
    assert part.count("not asked") == 6


def test_the_criterion_is_that_of_the_suite(tmp_path):
    folder = eval_folder(tmp_path / "rl", 18, suite=SUITE | {"criterion": "success_at_end"})
    assert "holds it to the end" in page(folder)[0].text
    assert "holds it to the end" not in page(folder, criterion="success_once")[0].text
    with pytest.raises(ValueError, match="criterion"):
        write_eval_report(folder, criterion="reward")


def test_train_equals_test_cannot_be_overlooked(tmp_path):
    html, _ = page(eval_folder(tmp_path / "rl", 18, suite=SUITE | {"protocol": "train_equals_test"}))
    (banner,) = [a for tag, a in html.tags if tag == "p" and "banner" in (a.get("class") or "")]
    assert banner["class"] == "banner warn"
    assert html.text.index("TRAIN = TEST:") < html.text.index("rl succeeds")
    assert "banner" not in str(page(eval_folder(tmp_path / "own", 18, suite=None))[0].tags)


def test_failures_are_grouped_by_stage_in_its_order(tmp_path):
    folder = eval_folder(tmp_path / "rl", 14, conditions={"wrong_instruction@1": 0})
    html, _ = page(folder)
    part = html.text.split("Where it failed")[1]
    assert "6 of 20 episodes failed" in part  # those with a wrong instruction are meant to
    places = [
        part.index(w) for w in ("before the first stage 2 of 6", "as far as: near 2 of 6", "far as: grasped 2 of 6")
    ]
    assert places == sorted(places)
    assert "lifted" not in part.split("Provenance")[0]
    assert part.count("None of them was filmed") == 1
    assert "reach seed 1" in part
    assert must_not_succeed("light@1+wrong_instruction@2")
    assert not must_not_succeed("light@1+paraphrase@2")


def test_videos_and_filmstrips_are_inside_and_the_budget_is_kept(tmp_path):
    folder = eval_folder(tmp_path / "rl", 0, n=12, filmed=12)
    html, text = page(folder)
    videos = [str(a["src"]) for tag, a in html.tags if tag == "video"]
    assert len(videos) == 12  # 4 of each of 3 stages
    inside = [base64.b64decode(v.removeprefix("data:video/mp4;base64,")) for v in videos]
    assert inside[0] == (folder / "videos/episode_0.mp4").read_bytes()
    assert [tag for tag, _ in html.tags].count("img") == 12
    assert all(a["alt"] for tag, a in html.tags if tag == "img")
    small, small_text = page(folder, media_bytes=150_000)
    assert len(small_text) < 150_000 + len(re.sub(r"base64,[^\"]*", "", text))
    shown = [tag for tag, _ in small.tags].count("video")
    assert 0 < shown < 12
    assert re.search(r"\d+ (video is|videos are) left out, so that this page stays under 20 MB", small.text)


def test_a_gallery_without_failures_stages_or_videos(tmp_path):
    assert failure_gallery(tmp_path, [], "success_once", budget=MediaBudget()) == ""
    result = EvalResult.load(eval_folder(tmp_path / "rl", 20))
    assert failure_gallery(tmp_path, result.episodes, "success_once", budget=MediaBudget()) == ""
    failed = [replace(e, success_once=False, stage="", video="gone.mp4") for e in result.episodes]
    shown = failure_gallery(tmp_path, failed, "success_once", budget=MediaBudget())
    assert "The environment names no stages" in shown
    assert "None of them was filmed" in shown


def test_markup_in_what_others_wrote_stays_text(tmp_path):
    evil = "<script>alert(1)</script>"
    folder = eval_folder(
        tmp_path / "rl", 10, label=evil, suite=SUITE | {"name": evil}, unsupported_conditions={evil: evil}
    )
    html, text = page(folder)
    assert "<script>alert" not in text
    assert html.text.count(evil) >= 6
    assert [tag for tag, _ in html.tags].count("script") == 1


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_shows_it_without_scrolling_sideways_and_sorts(tmp_path, width):
    _, text = page(eval_folder(tmp_path / "rl", 12, conditions=CONDITIONS))
    expression = (
        "(() => { const d = document.documentElement; const t = document.querySelector('table.sortable');"
        "t.querySelector('th button').click(); const v = document.querySelector('video');"
        "return [d.scrollWidth <= d.clientWidth, t.querySelector('th').getAttribute('aria-sort'), v.videoWidth,"
        "document.querySelector('.strip').naturalWidth > 300, v.error].join(' '); })()"
    )
    assert in_browser(tmp_path, text, expression, width=width) == "true ascending 256 true "


@NEEDS_CHROMIUM
def test_a_name_as_long_as_a_sentence_does_not_push_the_numbers_out(tmp_path):
    task = "libero_spatial/pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate"
    html, text = page(eval_folder(tmp_path / "rl", 12, task=task))
    assert task in html.text
    expression = (
        "(() => { const t = document.querySelector('table.sortable');"
        "return t.parentElement.scrollWidth <= t.parentElement.clientWidth; })()"
    )
    assert in_browser(tmp_path, text, expression, width=1000) == "true"
