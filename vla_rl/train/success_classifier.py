"""A success classifier from labelled frames: the reward where nothing but pictures says that the task is done.

A small convolutional network over one or more cameras, or an MLP over a frozen policy's features, trained with binary
cross-entropy on frames of success and of failure (as HIL-SERL does, arXiv 2410.21845, section IV-C). A threshold is
chosen on held-out frames so that at most `max_false_positives` of the failures pass it: a policy finds every picture
that is rewarded by mistake.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from vla_rl.core import Observation
from vla_rl.data.lerobot_format import atomic_write_json
from vla_rl.data.lerobot_reader import LeRobotDataset

_WEIGHTS, _CONFIG = "classifier.safetensors", "config.json"


@dataclass(frozen=True)
class SuccessClassifierConfig:
    """`cameras`: which are looked at; () for features alone. `feature_dim`: F of a policy's features, 0 for none.
    `shift`: pixels of random shift while training, against overfitting (DrQ, arXiv 2004.13649). `held_out`: share of
    the frames that choose the threshold and are never trained on."""

    cameras: tuple[str, ...] = ()
    feature_dim: int = 0
    image_size: int = 64
    width: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    num_steps: int = 300
    batch_size: int = 64
    shift: int = 3
    held_out: float = 0.25
    max_false_positives: float = 0.02

    def __post_init__(self) -> None:
        if not self.cameras and not self.feature_dim:
            raise ValueError("SuccessClassifierConfig: give cameras or feature_dim; there is nothing to look at")
        if not 0 < self.held_out < 1 or not 0 <= self.max_false_positives < 1:
            raise ValueError(
                f"SuccessClassifierConfig: held_out and max_false_positives must lie in (0, 1), got {self}"
            )


class LabelledFrames(NamedTuple):
    """`images`: camera -> uint8 [T, h, w, 3]. `features`: float32 [T, F] or None. `success`: bool [T]. `group`: int64
    [T], the episode of each frame: frames of one episode are never on both sides of the split."""

    images: Mapping[str, Tensor]
    features: Tensor | None
    success: Tensor
    group: Tensor


class ClassifierReport(NamedTuple):
    """On held-out frames: accuracy at the threshold, share of successes that pass, of failures that pass."""

    accuracy: float
    true_positives: float
    false_positives: float
    threshold: float
    num_held_out: int


class SuccessClassifier(nn.Module):
    """Callable as the `success` of `vla_rl.envs.robot.RobotParts`: an observation [1] to a bool."""

    threshold: Tensor
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: SuccessClassifierConfig) -> None:
        super().__init__()
        self.config = config
        w = config.width
        self.towers = nn.ModuleDict({camera: _tower(w) for camera in config.cameras})
        self.register_buffer("feature_mean", torch.zeros(config.feature_dim))
        self.register_buffer("feature_std", torch.ones(config.feature_dim))
        self.head = nn.Sequential(nn.Linear(16 * 2 * w * len(config.cameras) + config.feature_dim, 64), nn.SiLU(), nn.Linear(64, 1))  # fmt: skip # noqa: E501
        self.register_buffer("threshold", torch.tensor(0.0))

    def forward(self, images: Mapping[str, Tensor], features: Tensor | None = None) -> Tensor:
        """Logits [N] of uint8 pictures [N, h, w, 3] and float32 features [N, F]. Raises ValueError for what is
        missing."""
        parts = []
        for camera, tower in self.towers.items():
            if camera not in images:
                raise ValueError(f"the classifier looks at {list(self.config.cameras)}, got {sorted(images)}")
            parts.append(tower(_pixels(images[camera], self.config.image_size)))
        if self.config.feature_dim:
            if features is None or features.shape[1] != self.config.feature_dim:
                raise ValueError(f"the classifier needs features [N, {self.config.feature_dim}]")
            parts.append((features - self.feature_mean) / self.feature_std)
        return self.head(torch.cat(parts, dim=1))[:, 0]

    @torch.no_grad()
    def is_success(self, obs: Observation, features: Tensor | None = None) -> Tensor:
        """bool [N]."""
        return self(obs.images, features) > self.threshold

    def success(self, obs: Observation) -> bool:
        """Of one observation."""
        return bool(self.is_success(obs)[0])

    def save(self, folder: str | Path) -> None:
        """`classifier.safetensors` and `config.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / _WEIGHTS)
        atomic_write_json(folder / _CONFIG, asdict(self.config))

    @staticmethod
    def load(folder: str | Path) -> SuccessClassifier:
        """What `save` wrote. Raises FileNotFoundError where there is none, ValueError where the files do not fit."""
        folder = Path(folder)
        for name in (_WEIGHTS, _CONFIG):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: it is no success classifier")
        try:
            values = json.loads((folder / _CONFIG).read_text())
            model = SuccessClassifier(SuccessClassifierConfig(**values | {"cameras": tuple(values["cameras"])}))
            model.load_state_dict(load_file(folder / _WEIGHTS))
        except (TypeError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: {error}; train the classifier again") from error
        return model.eval()


def train_success_classifier(
    frames: LabelledFrames, config: SuccessClassifierConfig, generator: torch.Generator
) -> tuple[SuccessClassifier, ClassifierReport]:
    """Raises ValueError where a side of the split lacks successes or failures. Successes and failures are drawn equally
    often, however rare one is."""
    train, held_out = _split(frames, config, generator)
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = SuccessClassifier(config)
    if frames.features is not None and config.feature_dim:
        model.feature_mean.copy_(frames.features[train].mean(0))
        model.feature_std.copy_(frames.features[train].std(0).clamp(min=1e-6))
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    by_label = [train[frames.success[train] == label] for label in (False, True)]
    half = config.batch_size // 2
    labels = torch.arange(2 * half) >= half
    for _ in range(config.num_steps):
        rows = torch.cat([own[torch.randint(len(own), (half,), generator=generator)] for own in by_label])
        images = {c: _shifted(frames.images[c][rows], config.shift, generator) for c in config.cameras}
        features = None if frames.features is None or not config.feature_dim else frames.features[rows]
        loss = functional.binary_cross_entropy_with_logits(model(images, features), labels.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return model, _choose_threshold(model, frames, held_out)


def frames_of(dataset: LeRobotDataset, cameras: tuple[str, ...]) -> LabelledFrames:
    """All frames of a dataset whose `next.success` a person or a simulator has labelled. Raises ValueError for a
    dataset without that column."""
    episodes = [dataset.episode(i, cameras=cameras) for i in range(dataset.num_episodes)]
    if any(episode.success is None for episode in episodes) or not episodes:
        raise ValueError(f"{dataset.path} has no labels of success; record episodes that end with one")
    return LabelledFrames(
        {c: torch.cat([e.images[c] for e in episodes]) for c in cameras},
        None,
        torch.cat([e.success for e in episodes if e.success is not None]),
        torch.cat([torch.full((len(e),), e.index) for e in episodes]),
    )


def _split(
    frames: LabelledFrames, config: SuccessClassifierConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    groups = frames.group.unique()
    order = groups[torch.randperm(len(groups), generator=generator)]
    out = torch.isin(frames.group, order[: max(1, round(config.held_out * len(order)))])
    for name, side in (("to train on", ~out), ("held out", out)):
        labels = frames.success[side]
        if not bool(labels.any()) or bool(labels.all()):
            raise ValueError(
                f"of the {int(side.sum())} frames {name}, {int(labels.sum())} are successes; both kinds are needed on "
                "both sides: label more episodes"
            )
    return torch.nonzero(~out)[:, 0], torch.nonzero(out)[:, 0]


@torch.no_grad()
def _choose_threshold(model: SuccessClassifier, frames: LabelledFrames, rows: Tensor) -> ClassifierReport:
    config, success = model.config, frames.success[rows]
    logits = torch.cat([
        model(
            {c: frames.images[c][part] for c in config.cameras},
            None if frames.features is None or not config.feature_dim else frames.features[part],
        )
        for part in rows.split(256)
    ])  # fmt: skip
    failures = logits[~success].double().numpy()
    limit = float(np.quantile(failures, 1 - config.max_false_positives, method="higher"))
    model.threshold.fill_(max(0.0, limit))
    said = logits > model.threshold
    return ClassifierReport(
        float((said == success).float().mean()),
        float(said[success].float().mean()),
        float(said[~success].float().mean()),
        float(model.threshold),
        len(rows),
    )


def _tower(width: int) -> nn.Sequential:
    sizes = (3, width, width, 2 * width)
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
    # What lies where in the picture decides, so the places are kept: no pooling over all of it.
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())


def _pixels(images: Tensor, size: int) -> Tensor:
    """uint8 [N, h, w, 3] to float32 [N, 3, size, size] in -1 to 1."""
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    if pixels.shape[2:] != (size, size):
        pixels = functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return pixels


def _shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """The batch moved by one random number of pixels each way, the border repeated."""
    if not shift:
        return images
    padded = functional.pad(images.permute(0, 3, 1, 2).float(), (shift,) * 4, mode="replicate")
    dy, dx = torch.randint(2 * shift + 1, (2,), generator=generator).tolist()
    h, w = images.shape[1:3]
    return padded[:, :, dy : dy + h, dx : dx + w].permute(0, 2, 3, 1)


__all__ = [
    "ClassifierReport", "LabelledFrames", "SuccessClassifier", "SuccessClassifierConfig", "frames_of",
    "train_success_classifier",
]  # fmt: skip
