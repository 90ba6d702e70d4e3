"""Statistics of datasets: min, max, mean, std, count and quantiles of every feature, as LeRobot v3.0 keeps them.

Numbers of vector features are exact over the frames that they are computed from (population std, linear quantiles).
Pictures: per channel, in [0, 1], shape [3, 1, 1], exact over a sample of at most `MAX_IMAGES` evenly spaced frames of
an episode; over a dataset their quantiles are the frame-weighted mean of the episodes' (all else is combined exactly).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
STAT_NAMES = ("min", "max", "mean", "std", "count", *QUANTILES)
MAX_IMAGES = 100

FeatureStats = dict[str, np.ndarray]


def vector_stats(values: np.ndarray) -> FeatureStats:
    """Of `values [T, D]` (numbers or bools): each statistic float64 [D], `count` int64 [1]. T must be >= 1."""
    x = values.astype(np.float64, copy=False)
    quantiles = np.quantile(x, list(QUANTILES.values()), axis=0)
    return {
        "min": x.min(axis=0),
        "max": x.max(axis=0),
        "mean": x.mean(axis=0),
        "std": x.std(axis=0),
        "count": np.array([len(x)], np.int64),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def image_stats(images: Tensor) -> FeatureStats:
    """Of `images` uint8 [T, h, w, 3]: each statistic float64 [3, 1, 1] in [0, 1], `count` int64 [1] sampled frames."""
    t = images.shape[0]
    sample = images
    if t > MAX_IMAGES:
        sample = images[torch.linspace(0, t - 1, MAX_IMAGES).round().long()]
    pixels = sample.reshape(-1, 3).cpu().numpy()
    counts = np.stack([np.bincount(pixels[:, c], minlength=256) for c in range(3)])  # [3, 256]
    level = np.arange(256)
    total = pixels.shape[0]
    mean = counts @ level / total
    std = np.sqrt(np.maximum(counts @ level**2 / total - mean**2, 0.0))
    cumulated = counts.cumsum(axis=1)
    out = {
        "min": (counts > 0).argmax(axis=1),
        "max": 255 - (counts[:, ::-1] > 0).argmax(axis=1),
        "mean": mean,
        "std": std,
    }
    for name, q in QUANTILES.items():
        out[name] = (cumulated > q * (total - 1)).argmax(axis=1)
    scaled = {name: (value / 255.0).reshape(3, 1, 1) for name, value in out.items()}
    return {**scaled, "count": np.array([len(sample)], np.int64)}


def combine_stats(parts: Sequence[Mapping[str, np.ndarray]]) -> FeatureStats:
    """One feature's statistics over several episodes, from those of each. min, max, mean, std, count are exact;
    quantiles, where every part has them, are the count-weighted mean."""
    count = np.array([int(np.ravel(p["count"])[0]) for p in parts], np.float64)

    def stack(name: str) -> np.ndarray:
        return np.stack([np.asarray(p[name], np.float64) for p in parts])

    mean_of = stack("mean")
    weight = (count / count.sum()).reshape(-1, *([1] * (mean_of.ndim - 1)))
    mean = (weight * mean_of).sum(axis=0)
    variance = (weight * (stack("std") ** 2 + (mean_of - mean) ** 2)).sum(axis=0)
    out: FeatureStats = {
        "min": stack("min").min(axis=0),
        "max": stack("max").max(axis=0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": np.array([int(count.sum())], np.int64),
    }
    for name in QUANTILES:
        if all(name in p for p in parts):
            out[name] = (weight * stack(name)).sum(axis=0)
    return out


def to_tensors(stats: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, Tensor]]:
    """Statistics as float32 tensors; pictures keep [3, 1, 1], vectors [D]."""
    return {
        feature: {name: torch.as_tensor(np.asarray(value), dtype=torch.float32) for name, value in values.items()}
        for feature, values in stats.items()
    }
