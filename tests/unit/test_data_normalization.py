"""Normalisation against the formulas that public checkpoints are made with."""

import json

import pytest
import torch
from safetensors.torch import load, save

from vla_rl.data.normalization import Normalizer

STATS = {
    "min": torch.tensor([-2.0, 0.0, 5.0]),
    "max": torch.tensor([2.0, 1.0, 5.0]),
    "mean": torch.tensor([0.5, 0.25, 5.0]),
    "std": torch.tensor([2.0, 0.5, 0.0]),
    "q01": torch.tensor([-1.0, 0.0, 5.0]),
    "q99": torch.tensor([1.0, 0.5, 5.0]),
}


def test_hand_computed_values_of_every_kind():
    x = torch.tensor([[1.0, 0.5, 5.0]])
    expected = {
        "identity": [[1.0, 0.5, 5.0]],
        "mean_std": [[0.25, 0.5, 0.0]],
        "quantiles": [[1.0, 1.0, 0.0]],
        "min_max": [[0.5, 0.0, 0.0]],
    }
    for kind, values in expected.items():
        torch.testing.assert_close(
            Normalizer.from_stats(STATS, kind).normalize(x), torch.tensor(values), rtol=0, atol=1e-7
        )


def test_openpi_quantile_formula_is_reproduced_on_a_constant_too():
    low, high = torch.tensor([-0.3, 2.0]), torch.tensor([0.9, 2.0])
    x = torch.tensor([[0.1, 2.0], [0.9, 2.0]])
    ours = Normalizer.bounds(low, high, eps=1e-6, min_range=0.0).normalize(x)
    theirs = (x - low) / (high - low + 1e-6) * 2 - 1
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=0, atol=1e-6)
    assert theirs[:, 1].tolist() == [-1.0, -1.0]
    # float32 cannot hold 2 + 5e-7 exactly: half a step of 2.4e-7 over a scale of 5e-7
    torch.testing.assert_close(ours[:, 1], theirs[:, 1], rtol=0, atol=0.25)


def test_openpi_and_lerobot_mean_std_epsilons():
    x = torch.tensor([[3.0, -1.0]])
    mean, std = torch.tensor([1.0, 0.0]), torch.tensor([0.1, 3.0])
    for eps in (1e-6, 1e-8):
        ours = Normalizer.mean_std(mean, std, eps=eps).normalize(x)
        torch.testing.assert_close(ours, (x - mean) / (std + eps), rtol=2e-7, atol=0)


def test_constant_dimensions_are_left_in_their_units():
    n = Normalizer.from_stats(STATS, "quantiles")
    assert n.normalize(torch.tensor([[0.0, 0.0, 5.25]]))[0, 2] == 0.25
    assert n.unnormalize(torch.tensor([[0.0, 0.0, 0.0]]))[0, 2] == 5.0


def test_kept_dimensions_are_untouched():
    n = Normalizer.from_stats(STATS, "min_max").keep([1])
    x = torch.tensor([0.0, 0.7, 5.0])
    assert n.normalize(x)[1] == x[1]
    assert n.unnormalize(x)[1] == x[1]
    assert n.scale[0] == 2.0


def test_json_and_safetensors_keep_every_bit():
    torch.manual_seed(0)
    n = Normalizer.mean_std(torch.randn(5) * 1e-3, torch.rand(5) + 0.1)
    again = Normalizer.from_dict(json.loads(json.dumps(n.to_dict())))
    stored = Normalizer.from_tensors(load(save({"other": torch.zeros(1), **n.to_tensors("action")})), "action")
    for other in (again, stored):
        assert other.kind == "mean_std"
        assert torch.equal(other.offset, n.offset)
        assert torch.equal(other.scale, n.scale)


def test_leading_dimensions_and_device_move():
    n = Normalizer.from_stats(STATS, "mean_std").to("cpu")
    x = torch.randn(4, 8, 3)
    assert n.normalize(x).shape == (4, 8, 3)
    torch.testing.assert_close(n.normalize(x)[2, 5], n.normalize(x[2, 5]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Normalizer.from_stats(STATS, "z-score"), ValueError, "must be one of identity"),
        (lambda: Normalizer.from_stats({"mean": torch.zeros(2)}, "quantiles"), KeyError, "q01"),
        (lambda: Normalizer.identity(2).normalize(torch.zeros(3)), ValueError, "another robot"),
        (lambda: Normalizer("mean_std", torch.zeros(2), torch.zeros(2)), ValueError, "positive"),
        (lambda: Normalizer("mean_std", torch.zeros(2), torch.ones(3)), ValueError, "alike"),
        (lambda: Normalizer.bounds(torch.ones(1), torch.zeros(1)), ValueError, "below"),
        (lambda: Normalizer.mean_std(torch.tensor([float("nan")]), torch.ones(1)), ValueError, "finite"),
        (lambda: Normalizer.from_dict({"kind": "identity"}), KeyError, "offset"),
        (lambda: Normalizer.from_tensors({}, "state"), KeyError, "state"),
        (lambda: Normalizer("other", torch.zeros(1), torch.ones(1)), ValueError, "kind"),
    ],
)
def test_bad_input_is_named(make, error, text):
    with pytest.raises(error, match=text):
        make()
