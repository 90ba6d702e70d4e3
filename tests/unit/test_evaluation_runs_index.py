"""The index of a folder of runs."""

from __future__ import annotations

import json
import re

import pytest

from tests.unit.eval_folders import SUITE, eval_folder
from tests.unit.html_page import NEEDS_CHROMIUM, Page, in_browser
from vla_rl.cli import main
from vla_rl.evaluation.eval_report import write_eval_report
from vla_rl.evaluation.runs_index import scan, write_runs_index
from vla_rl.train.metrics import MetricsLogger


def run(folder, rates, metric="eval/success_rate", **config):
    with MetricsLogger(folder, tensorboard=False) as log:
        for i, rate in enumerate(rates):
            log.log(i, {metric: rate})
    if config:
        (folder / "config.json").write_text(json.dumps(config))
        origin = {
            "command": "vla-rl train demo --run-dir x",
            "started": "2026-11-20T08:30:00+0000",
            "revision": "abc1234567",
        }
        (folder / "provenance.json").write_text(json.dumps(origin))
    return folder


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "runs"
    for seed in range(3):
        run(root / f"method/seed_{seed}/rl", [0.1 * seed, 0.2 * seed, 0.4])
    run(root / "one", [0.3, 0.9, 0.6], train={"lr": 1, "seed": 4}, seed=4)
    run(root / "two", [0.3, 0.8], train={"lr": 1, "seed": 5}, seed=5)
    run(root / "other", [0.5], "train/success_rate", train={"lr": 2, "seed": 5}, seed=5)
    write_eval_report(eval_folder(root / "eval & co", 18, conditions={"light@1": 3}))
    eval_folder(root / "custom", 5, suite=SUITE | {"protocol": "train_equals_test"}, filmed=0)
    (root / "old").mkdir()
    (root / "old/eval.json").write_text('{"n": 5}')
    (root / "broken").mkdir()
    (root / "broken/eval.json").write_text("{")
    run(root / "one/policy/inside", [1.0])  # a checkpoint's folder is not looked into
    return root


def test_runs_that_differ_in_their_seed_alone_are_one_method(root):
    runs, evaluations = scan(root)
    assert [row.name for row in runs] == [*(f"method/seed_{i}/rl" for i in range(3)), "one", "other", "two"]
    methods = {row.name: (row.place, row.method) for row in runs}
    assert len({methods[f"method/seed_{i}/rl"] for i in range(3)}) == 1
    assert methods["method/seed_0/rl"] == ("method", "rl")
    assert methods["one"] == methods["two"] != methods["other"]
    problems = {row.name: row.problem for row in evaluations}
    assert problems["eval & co"] == problems["custom"] == ""
    assert "lacks 'success_once'" in problems["old"]
    assert "Expecting" in problems["broken"]


def test_the_page_lists_links_and_draws(root, capsys):
    assert main(["runs", str(root)]) == 0
    assert capsys.readouterr().out.strip() == str(root / "index.html")
    text = (root / "index.html").read_text(encoding="utf-8")
    html = Page(text)
    assert "6 training runs and 4 evaluations" in html.text
    assert "2 not readable" in html.text
    links = [a["href"] for tag, a in html.tags if tag == "a"]
    assert links == ["eval%20%26%20co/report.html"]
    assert "90.0% [69.9%, 97.2%]" in html.text  # nominal; its condition has 15%
    assert "reach_axes v3 (train = test)" in html.text
    row = html.text.split("Training runs")[1].split("one train demo")[1].split("other")[0]
    assert "2026-11-20 08:30 abc12345" in row
    assert "60.0% 90.0%" in row
    assert text.count('class="spark"') == 6
    assert "Seeds of method" in html.text
    assert "rl (3 seeds)" in text
    assert "one (2 seeds)" in text
    html.assert_nothing_comes_from_outside(text)


def test_an_empty_or_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        write_runs_index(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        write_runs_index(tmp_path / "gone")


@NEEDS_CHROMIUM
def test_columns_sort_by_number_in_a_browser(root, tmp_path):
    text = write_runs_index(root).read_text(encoding="utf-8")
    expression = (
        "(() => { const t = document.querySelectorAll('table.sortable')[1];"
        "const b = t.querySelectorAll('th button')[4]; b.click(); b.click();"
        "return [...t.tBodies[0].rows].map((r) => r.cells[4].textContent).join(' '); })()"
    )
    found = in_browser(tmp_path, text, expression)
    values = [float(v) for v in re.findall(r"([\d.]+)%", found)]
    assert values == sorted(values, reverse=True) == [80.0, 60.0, 50.0, 40.0, 40.0, 40.0]
