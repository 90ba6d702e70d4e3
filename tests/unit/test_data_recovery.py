"""A dataset outlives its writer: kill -9 at random moments, a full disk, half-done commits."""

import os
import random
import resource
import signal
import time

import pyarrow.parquet as pq
import pytest
import torch

from tests.unit.killable import Killable
from vla_rl.core import CameraSpec
from vla_rl.data import lerobot_format
from vla_rl.data.lerobot_format import DatasetSpec
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.data.lerobot_writer import DatasetWriteError, LeRobotWriter

torch.set_num_threads(1)
SPEC = DatasetSpec(20, ("x", "y"), ("dx",), {"agent": CameraSpec(16, 16)}, "test_arm")


def content(seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    length = 3 + seed % 5
    return {
        "state": torch.randn(length, 2, generator=g),
        "action": torch.randn(length, 1, generator=g),
        "images": {"agent": torch.randint(0, 256, (length, 16, 16, 3), generator=g, dtype=torch.uint8)},
        "reward": torch.rand(length, generator=g),
        "success": torch.arange(length) == length - 1,
        "instruction": f"task {seed % 4}",
        "extra": {"seed": seed},
    }


def add(writer, seed: int) -> None:
    writer.add_episode(**content(seed))


def write_episodes(path: str, commit: int, num: int, file_limit: int = 0) -> None:
    """What the killed process does: go on with the dataset up to `num` episodes, saying the number of each."""
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    writer = LeRobotWriter.open(path, SPEC, episodes_per_commit=commit, file_mb=0.02)
    for seed in range(writer.num_episodes, num):
        add(writer, seed)
        print(seed, flush=True)
    writer.close()
    print("complete", flush=True)


@pytest.fixture(scope="module")
def killable(tmp_path_factory):
    with Killable(__file__, tmp_path_factory.mktemp("killable")) as processes:
        yield processes


def check_whole(path, at_least: int) -> int:
    """Every episode of the table is complete and is the one with its number; returns how many there are."""
    dataset = LeRobotDataset(path)
    assert dataset.num_episodes >= at_least
    for i in range(dataset.num_episodes):
        episode, made = dataset.episode(i), content(i)
        assert episode.extra == {"seed": i}
        assert torch.equal(episode.state, made["state"])
        assert torch.equal(episode.images["agent"], made["images"]["agent"])
        assert episode.instruction == made["instruction"]
    if dataset.num_episodes:
        assert float(dataset.stats["action"]["count"]) == dataset.num_frames
    return dataset.num_episodes


@pytest.mark.parametrize("commit", [1, 3])
def test_kill_at_random_moments_loses_no_committed_episode(tmp_path, killable, commit):
    """The writer is killed at random moments; each time the dataset opens and holds what the writer said."""
    path, num, rng = tmp_path / "set", 70, random.Random(commit)
    kills = committed = 0
    complete = False
    while not complete:
        killable.start("write_episodes", str(path), commit, num)
        if kills < 6:
            killable.wait_for_line()  # the first episode of this run is in: the writer is at full speed
            time.sleep(rng.uniform(0.0, 0.08))
            killable.kill()
            kills += 1
        code, said = killable.wait(), killable.output().splitlines()
        complete = "complete" in said
        assert complete or code == -signal.SIGKILL, said
        numbers = [int(line) for line in said if line.isdigit()]
        # what was said before the kill is committed, but for the last commit's worth
        at_least = num if complete else max(committed, max(numbers, default=-1) + 1 - (commit - 1))
        committed = check_whole(path, at_least)
    assert committed == num
    assert kills >= 4
    rows = sum(pq.read_metadata(f).num_rows for f in path.glob("data/*/*.parquet"))
    assert rows == LeRobotDataset(path).num_frames  # nothing uncommitted is left in the files


@pytest.mark.parametrize("stop_at", range(12))
def test_a_commit_stopped_before_any_of_its_file_replacements(tmp_path, monkeypatch, stop_at):
    """The process dies just before its n-th file replacement: reopening gives whole episodes and goes on."""
    path = tmp_path / "set"
    replace, count = os.replace, 0

    class DiedError(BaseException):
        pass

    def dying_replace(source, target):
        nonlocal count
        if count == stop_at:
            raise DiedError
        count += 1
        replace(source, target)

    monkeypatch.setattr(lerobot_format.os, "replace", dying_replace)
    writers = []

    def write_until_death():
        writers.append(LeRobotWriter.open(path, SPEC, file_mb=0.001))
        for seed in range(10):
            add(writers[0], seed)

    with pytest.raises(DiedError):
        write_until_death()
    monkeypatch.undo()
    for writer in writers:
        writer._lock.close()  # what the kernel does for a dead process
    before = check_whole(path, 0) if (path / "meta/info.json").exists() else 0
    with LeRobotWriter.open(path, SPEC, file_mb=0.001) as again:
        assert again.num_episodes == before
        for seed in range(again.num_episodes, 10):
            add(again, seed)
    assert check_whole(path, 10) == 10
    assert not list(path.rglob("*.part"))


def test_full_disk_is_a_clear_error_and_keeps_what_is_committed(tmp_path, killable):
    """RLIMIT_FSIZE is a disk that fills in the middle of a file; a second writer then goes on."""
    path = tmp_path / "set"
    killable.start("write_episodes", str(path), 1, 400, 60_000)
    assert killable.wait() == 1
    output = killable.output()
    assert "DatasetWriteError" in output
    said = [int(line) for line in output.splitlines() if line.isdigit()]
    assert f"{len(said)} episodes" in output
    assert "are committed and intact" in output
    assert len(said) >= 3
    assert check_whole(path, len(said)) == len(said)
    assert not list(path.rglob("*.part"))
    with LeRobotWriter.open(path, SPEC) as writer:
        add(writer, writer.num_episodes)
    assert check_whole(path, len(said) + 1) == len(said) + 1


def test_commit_can_be_called_again_once_there_is_space(tmp_path, monkeypatch):
    writer = LeRobotWriter.open(tmp_path / "set", SPEC)
    add(writer, 0)
    replace = os.replace

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lerobot_format.os, "replace", full)
    with pytest.raises(
        DatasetWriteError, match=r"no space.*1 episodes \(3 frames\) are committed and intact, 1 are not"
    ):
        add(writer, 1)
    assert (writer.num_episodes, writer.num_pending) == (1, 1)
    assert check_whole(tmp_path / "set", 1) == 1
    monkeypatch.setattr(lerobot_format.os, "replace", replace)
    writer.commit()
    add(writer, 2)
    writer.close()
    assert check_whole(tmp_path / "set", 3) == 3


def test_resumed_dataset_equals_an_uninterrupted_one(tmp_path):
    with LeRobotWriter.open(tmp_path / "one", SPEC) as writer:
        for seed in range(9):
            add(writer, seed)
    for part in (range(4), range(4, 5), range(5, 9)):
        with LeRobotWriter.open(tmp_path / "two", SPEC) as writer:
            for seed in part:
                add(writer, seed)
    for name in ("meta/info.json", "meta/tasks.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = LeRobotDataset(tmp_path / "one"), LeRobotDataset(tmp_path / "two")
    assert [e.first_row for e in one.episodes] == [e.first_row for e in two.episodes]
    for feature, stats in one.stats.items():
        for name, value in stats.items():
            torch.testing.assert_close(two.stats[feature][name], value, rtol=1e-6, atol=1e-7)
