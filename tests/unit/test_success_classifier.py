"""The success classifier on synthetic frames, against its control: the same frames with shuffled labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vla_rl.core import CameraSpec, Observation
from vla_rl.data.lerobot_format import DatasetSpec
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.data.lerobot_writer import LeRobotWriter
from vla_rl.train.success_classifier import (
    LabelledFrames,
    SuccessClassifier,
    SuccessClassifierConfig,
    frames_of,
    train_success_classifier,
)

CONFIG = SuccessClassifierConfig(cameras=("front",), image_size=24, width=16, num_steps=120, batch_size=32, shift=1)


def draw(count: int, seed: int) -> LabelledFrames:
    """A red block of 5 pixels at a random place, over noise of random brightness; success: in the right third."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 90, (count, 24, 24, 3), generator=g, dtype=torch.uint8)
    images += torch.randint(0, 60, (count, 1, 1, 1), generator=g, dtype=torch.uint8)
    x, y = torch.randint(0, 20, (2, count), generator=g)
    for i in range(count):
        images[i, y[i] : y[i] + 5, x[i] : x[i] + 5] = torch.tensor([230, 20, 20], dtype=torch.uint8)
    return LabelledFrames({"front": images}, None, x >= 14, torch.arange(count) // 4)


def test_comes_back_from_its_folder(tmp_path):
    frames = draw(80, 0)
    model, _ = train(frames, replace(CONFIG, num_steps=5))
    model.save(tmp_path / "classifier")
    again = SuccessClassifier.load(tmp_path / "classifier")
    assert again.config == model.config
    assert torch.equal(again(frames.images), model(frames.images))
    assert again.threshold == model.threshold
    with pytest.raises(FileNotFoundError, match="it is no success classifier"):
        SuccessClassifier.load(tmp_path)
    config = tmp_path / "classifier" / "config.json"
    config.write_text(config.read_text().replace('"width": 16', '"width": 32'))
    with pytest.raises(ValueError, match="train the classifier again"):
        SuccessClassifier.load(tmp_path / "classifier")


def shuffled(frames: LabelledFrames) -> LabelledFrames:
    order = torch.randperm(len(frames.success), generator=torch.Generator().manual_seed(9))
    return frames._replace(success=frames.success[order])


def train(frames: LabelledFrames, config: SuccessClassifierConfig = CONFIG):
    return train_success_classifier(frames, config, torch.Generator().manual_seed(0))


def test_finds_success_on_new_frames_and_shuffled_labels_teach_nothing():
    frames, new = draw(400, 0), draw(200, 1)
    obs = Observation(new.images, torch.zeros(200, 1), ("put it right",) * 200)
    model, report = train(frames)
    said = model.is_success(obs)
    true, false = float(said[new.success].float().mean()), float(said[~new.success].float().mean())
    assert report.false_positives <= 0.02
    assert true > 0.8
    assert false < 0.05

    control, _ = train(shuffled(frames))
    said = control.is_success(obs)
    right, wrong = float(said[new.success].float().mean()), float(said[~new.success].float().mean())
    assert abs(right - wrong) < 0.15
    assert right < 0.3


def test_threshold_keeps_the_promise_on_held_out_failures():
    frames = draw(200, 2)
    strict = SuccessClassifierConfig(**{**CONFIG.__dict__, "max_false_positives": 0.0, "num_steps": 10})
    model, report = train(frames, strict)
    assert report.false_positives == 0.0
    assert report.threshold == float(model.threshold) >= 0.0
    assert 0 < report.num_held_out < 100


def test_same_seed_same_classifier():
    frames = draw(80, 3)
    config = SuccessClassifierConfig(**{**CONFIG.__dict__, "num_steps": 5})
    a, b = (train(frames, config)[0].state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_features_of_a_policy_alone():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=g)
    features = features[(features[:, 2] - 0.6).abs() > 0.3]
    frames = LabelledFrames({}, features, features[:, 2] > 0.6, torch.arange(len(features)))
    model, report = train(frames, SuccessClassifierConfig(feature_dim=6, num_steps=200))
    assert report.true_positives > 0.7
    assert report.false_positives <= 0.02
    with pytest.raises(ValueError, match=r"needs features \[N, 6\]"):
        model({}, torch.zeros(1, 5))


def test_frames_come_from_recorded_episodes_and_it_says_what_is_missing(tmp_path: Path):
    drawn = draw(24, 4)
    spec = DatasetSpec(10.0, ("a",), ("a",), {"front": CameraSpec(24, 24)}, "arm")
    with LeRobotWriter.open(tmp_path / "frames", spec) as writer:
        for rows in torch.arange(24).split(6):
            writer.add_episode(
                state=torch.zeros(6, 1), action=torch.zeros(6, 1), images={"front": drawn.images["front"][rows]},
                reward=torch.zeros(6), success=drawn.success[rows], instruction="put it right",
            )  # fmt: skip
    frames = frames_of(LeRobotDataset(tmp_path / "frames"), ("front",))
    assert torch.equal(frames.images["front"], drawn.images["front"])
    assert torch.equal(frames.success, drawn.success)
    assert frames.group.tolist() == [i // 6 for i in range(24)]

    model = SuccessClassifier(CONFIG)
    with pytest.raises(ValueError, match=r"looks at \['front'\], got \['wrist'\]"):
        model({"wrist": drawn.images["front"]})
    with pytest.raises(ValueError, match="0 are successes"):
        train(drawn._replace(success=torch.zeros(24, dtype=torch.bool)))
    with pytest.raises(ValueError, match="nothing to look at"):
        SuccessClassifierConfig()
