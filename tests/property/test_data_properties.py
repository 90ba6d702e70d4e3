"""Round trips of normalisation, pictures and chunks, for whatever input."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_rl.data.chunks import EpochSampler
from vla_rl.data.lerobot_stats import combine_stats, image_stats, vector_stats
from vla_rl.data.normalization import KINDS, Normalizer
from vla_rl.data.png import decode_images, encode_png

torch.set_num_threads(1)
finite = st.floats(-1e6, 1e6, width=32)
QUICK = settings(max_examples=150, deadline=None)


@QUICK
@given(kind=st.sampled_from(KINDS), rows=st.lists(st.tuples(finite, finite), min_size=1, max_size=12))
def test_normalisation_inverts_within_float32_rounding(kind, rows):
    x = torch.tensor(rows, dtype=torch.float32)
    stats = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in vector_stats(x.numpy()).items()}
    n = Normalizer.from_stats(stats, kind)
    back = n.unnormalize(n.normalize(x))
    tolerance = 4 * 2**-23 * (x.abs() + n.offset.abs())
    assert bool(((back - x).abs() <= tolerance + 1e-37).all())


@QUICK
@given(
    low=finite,
    width=st.floats(2**-10, 2**10, width=32),
    fraction=st.floats(0, 1),
    eps=st.sampled_from([0.0, 1e-8, 1e-6]),
)
def test_bounds_map_into_the_unit_interval(low, width, fraction, eps):
    a, b = torch.tensor([low]), torch.tensor([low]) + width
    n = Normalizer.bounds(a, b, eps=eps)
    x = a + fraction * (b - a)
    slack = 8 * 2**-23 * (abs(low) + width) / float(n.scale) + 2e-6 + 2 * eps / float(n.scale)
    assert abs(float(n.normalize(x))) <= 1 + slack


@settings(max_examples=60, deadline=None)
@given(
    t=st.integers(1, 4), h=st.integers(1, 20), w=st.integers(1, 20), seed=st.integers(0, 2**31), smooth=st.booleans()
)
def test_pictures_survive_png(t, h, w, seed, smooth):
    rng = np.random.default_rng(seed)
    high = 3 if smooth else 256
    images = torch.from_numpy(rng.integers(0, high, (t, h, w, 3)).astype(np.uint8))
    assert torch.equal(decode_images(encode_png(images), h, w), images)


@QUICK
@given(parts=st.lists(st.lists(st.tuples(finite, finite), min_size=1, max_size=6), min_size=1, max_size=5))
def test_combined_statistics_are_those_of_the_whole(parts):
    arrays = [np.array(p, np.float64) for p in parts]
    whole, combined = vector_stats(np.concatenate(arrays)), combine_stats([vector_stats(a) for a in arrays])
    for name in ("min", "max", "mean", "std", "count"):
        scale = max(1.0, float(np.abs(np.concatenate(arrays)).max()))
        np.testing.assert_allclose(combined[name], whole[name], rtol=1e-6, atol=1e-6 * scale)


@settings(max_examples=60, deadline=None)
@given(t=st.integers(1, 5), seed=st.integers(0, 2**31), high=st.integers(1, 256))
def test_image_statistics_match_numpy(t, seed, high):
    images = np.random.default_rng(seed).integers(0, high, (t, 6, 5, 3)).astype(np.uint8)
    ours, pixels = image_stats(torch.from_numpy(images)), images.reshape(-1, 3) / 255.0
    for name, expected in {
        "min": pixels.min(0),
        "max": pixels.max(0),
        "mean": pixels.mean(0),
        "std": pixels.std(0),
    }.items():
        np.testing.assert_allclose(ours[name].reshape(3), expected, atol=1e-9)
    lower = np.quantile(pixels, [0.01, 0.5, 0.99], axis=0, method="lower")
    upper = np.quantile(pixels, [0.01, 0.5, 0.99], axis=0, method="higher")
    for i, name in enumerate(("q01", "q50", "q99")):
        assert (ours[name].reshape(3) >= lower[i] - 1e-9).all()
        assert (ours[name].reshape(3) <= upper[i] + 1e-9).all()


@QUICK
@given(
    n=st.integers(1, 30),
    batch=st.integers(1, 40),
    calls=st.integers(1, 12),
    stop=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_sampler_sees_every_sample_once_an_epoch_and_resumes_exactly(n, batch, calls, stop, seed):
    sampler = EpochSampler(n, batch, seed)
    drawn = []
    state, rest_from = sampler.state_dict(), 0
    for i in range(calls):
        if i == stop:
            state, rest_from = sampler.state_dict(), i
        drawn.append(sampler.next())
    everything = torch.cat(drawn).tolist()
    for epoch in range(math.ceil(len(everything) / n)):
        part = everything[epoch * n : (epoch + 1) * n]
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(n))
    again = EpochSampler(n, batch, seed + 1)
    again.load_state_dict(state)
    for i in range(rest_from, calls):
        assert torch.equal(again.next(), drawn[i])
