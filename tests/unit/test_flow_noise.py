"""Noise addressed by environment and decision: known answers, independence of the batch, and its distribution."""

import pytest
import torch

from vla_rl.flow.noise import RowNoise, draw_integers, draw_normal, philox


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers that the authors of Random123 publish for philox4x32-10
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox(key, [torch.tensor([c]) for c in counter])
    assert tuple(int(w) for w in words) == expected


def draws(streams, seed=3, window=0, decision=0, shape=(5, 3)):
    noise = RowNoise(seed, torch.tensor(streams), window, decision)
    n = len(streams)
    return noise.normal((n, *shape)), noise.integers(4, (n,)), noise.normal((n, *shape))


def test_a_row_depends_on_its_own_address_alone():
    whole = draws(list(range(37)))
    for part in ([5], [0, 36, 7], list(range(20, 30))):
        for a, b in zip(draws(part), whole, strict=True):
            assert torch.equal(a, b[part])
    first = whole[0]
    for other in (draws(list(range(37)), seed=4), draws(list(range(37)), seed=3 + 2**33), draws([50] * 37)):
        assert not torch.isclose(first, other[0]).any(dim=2).all()
    assert not torch.equal(first, draws(list(range(37)), window=1)[0])
    assert not torch.equal(first, draws(list(range(37)), decision=1)[0])
    assert not torch.equal(first, whole[2])  # the next draw of the same decision


def test_distribution():
    noise = RowNoise(0, torch.arange(2000), 0, 0)
    x = noise.normal((2000, 101)).double().flatten()
    n = len(x)
    assert x.mean().abs() < 4 / n**0.5
    assert (x.var() - 1.0).abs() < 4 * (2 / n) ** 0.5
    assert (x**4).mean().item() == pytest.approx(3.0, abs=4 * (96 / n) ** 0.5)
    steps = torch.sort(x).values
    cdf = torch.special.ndtr(steps)
    assert (cdf - torch.arange(1, n + 1) / n).abs().max() < 1.95 / n**0.5  # Kolmogorov-Smirnov, 0.001
    counts = torch.bincount(noise.integers(3, (2000, 50)).flatten(), minlength=3).double()
    assert ((counts - counts.sum() / 3) ** 2 / (counts.sum() / 3)).sum() < 13.8  # chi2, 2 degrees, 0.001
    neighbours = torch.corrcoef(noise.normal((2000, 64)))
    assert neighbours.fill_diagonal_(0.0).abs().max() < 6.5 / 64**0.5


def test_a_generator_draws_as_it_always_did():
    a, b = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    assert torch.equal(draw_normal((3, 2), a), torch.randn(3, 2, generator=b))
    assert torch.equal(draw_integers(9, (5,), a), torch.randint(9, (5,), generator=b))
    assert draw_normal((2, 2), RowNoise(0, torch.arange(2), 0, 0), dtype=torch.float64).dtype == torch.float64


def test_wrong_use_is_an_error():
    noise = RowNoise(0, torch.arange(3), 0, 0)
    with pytest.raises(ValueError, match="2 rows from the noise of 3"):
        noise.normal((2, 4))
    with pytest.raises(ValueError, match="more than a decision's noise"):
        noise.integers(2, (3, 2**26))
    for _ in range(256):
        noise.integers(2, (3,))
    with pytest.raises(ValueError, match="draw 256"):
        noise.integers(2, (3,))
