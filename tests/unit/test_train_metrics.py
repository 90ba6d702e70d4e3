"""The metrics log, its survival of a kill and of a resume, and the progress line."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vla_rl.progress import Progress, format_duration
from vla_rl.train.metrics import METRICS_FILE, MetricsLogger, read_metrics


def log(run_dir, iterations, resume_after=None, scale=1.0):
    with MetricsLogger(run_dir, resume_after=resume_after, tensorboard=False) as logger:
        for i in iterations:
            logger.log(i, {"train/loss": scale / (i + 1), "train/samples": i})


def values(run_dir):
    return [(row["iteration"], row["train/loss"]) for row in read_metrics(run_dir)]


def test_what_is_logged_is_read_back(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(0, {"a": 1, "b": torch.tensor(0.1, dtype=torch.float64), "c": 1e-300})
        logger.log(5, {"a": 2.5})
    first, second = read_metrics(tmp_path)
    assert (first["a"], first["b"], first["c"]) == (1.0, 0.1, 1e-300)
    assert (second["iteration"], second["a"]) == (5, 2.5)
    assert 0 <= first["time_s"] <= second["time_s"]
    assert read_metrics(tmp_path / METRICS_FILE) == [first, second]


def test_not_a_number_is_kept_and_stays_json(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(0, {"a": math.nan, "b": -math.inf})
    text = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word))["a"] == "nan"
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"])
    assert row["b"] == -math.inf


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    log(tmp_path / "whole", range(10))
    log(tmp_path / "resumed", range(7), scale=1.0)
    log(tmp_path / "resumed", range(5, 10), resume_after=4)  # the checkpoint was older than the last line
    assert values(tmp_path / "resumed") == values(tmp_path / "whole")
    rows = read_metrics(tmp_path / "resumed")
    assert [row["time_s"] for row in rows] == sorted(row["time_s"] for row in rows)
    assert not list((tmp_path / "resumed").glob("*.partial"))


def test_a_half_written_line_is_dropped_on_resume(tmp_path):
    log(tmp_path, range(4))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"iteration": 4, "train/lo')
    assert [i for i, _ in values(tmp_path)] == [0, 1, 2, 3]
    log(tmp_path, range(4, 6), resume_after=3)
    assert [i for i, _ in values(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    log(tmp_path, range(3))
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    lines[1] = lines[1][:9]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path)
    with pytest.raises(FileNotFoundError, match="no metrics here"):
        read_metrics(tmp_path / "elsewhere")


def test_an_existing_log_is_not_overwritten(tmp_path):
    log(tmp_path, range(3))
    with pytest.raises(FileExistsError, match="resume that run"):
        MetricsLogger(tmp_path, tensorboard=False)
    assert len(read_metrics(tmp_path)) == 3


def test_bad_rows_are_refused(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(3, {"a": 1.0})
        with pytest.raises(ValueError, match="must increase"):
            logger.log(3, {"a": 1.0})
        with pytest.raises(ValueError, match=r"'a' must be one number.*\(2,\)"):
            logger.log(4, {"a": torch.zeros(2)})
        with pytest.raises(ValueError, match="rename yours"):
            logger.log(4, {"time_s": 1.0})
    assert len(read_metrics(tmp_path)) == 1


def test_a_killed_process_leaves_all_its_lines(tmp_path):
    script = (
        "import sys, itertools\nfrom vla_rl.train.metrics import MetricsLogger\n"
        f"logger = MetricsLogger({str(tmp_path)!r}, tensorboard=False)\n"
        "for i in itertools.count():\n    logger.log(i, {'a': i})\n    print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(200)][-1]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    iterations = [int(row["iteration"]) for row in read_metrics(tmp_path)]
    assert iterations == list(range(len(iterations)))
    assert iterations[-1] >= told


def test_tensorboard_has_the_same_numbers_and_forgets_what_was_purged(tmp_path):
    with MetricsLogger(tmp_path) as logger:
        for i in range(4):
            logger.log(i, {"train/loss": 1.0 / (i + 1)})
    time.sleep(1.1)  # event files are named by the second; the later one must sort after the earlier
    with MetricsLogger(tmp_path, resume_after=1) as logger:
        logger.log(2, {"train/loss": 7.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("train/loss")] == [(0, 1.0), (1, 0.5), (2, 7.0)]


# -------------------------------------------------------------------------------------------------------- progress
class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_a_line_every_interval_and_the_last():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, "demos", unit="ep", stream=stream, log_interval_s=10, clock=clock)
    for done in range(1, 101):
        clock.now = float(done)
        progress.update(done, success=0.5)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "demos: 10/100 ep  1m30s left  1 ep/s  success 0.5"
    assert lines[-1] == "demos: 100/100 ep  in 1m40s  1 ep/s  success 0.5"


def test_a_terminal_gets_one_line_that_is_rewritten():
    stream, clock = Terminal(), Clock()
    progress = Progress(10, "sft", stream=stream, clock=clock)
    progress.update(1, note="a rather long remark")
    clock.now = 1.0
    progress.update(2, note="a rather long remark")
    clock.now = 2.0
    progress.update(4)
    clock.now = 5.0
    progress.update(10)
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text.count("\r") == 3  # the first came too soon
    shown = text.split("\r")
    assert len(shown[2]) >= len(shown[1])  # what stood there before is wiped


def test_time_left_after_a_resume_counts_only_new_work():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, "ppo", initial=80, stream=stream, log_interval_s=1, clock=clock)
    clock.now = 10.0
    progress.update(90)
    assert "10s left  1 it/s" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7650, "2h07m"), (3599.7, "1h00m")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_progress_needs_something_to_do():
    with pytest.raises(ValueError, match="total"):
        Progress(0, "nothing")
