"""Chunk sampling against a slow reference that walks each episode frame by frame."""

import pytest
import torch

from vla_rl.core import CameraSpec
from vla_rl.data.chunks import ChunkDataset, EpochSampler
from vla_rl.data.lerobot_format import DatasetError, DatasetSpec
from vla_rl.data.lerobot_reader import LeRobotDataset
from vla_rl.data.lerobot_writer import LeRobotWriter

torch.set_num_threads(1)
LENGTHS = (5, 1, 8, 3)
SPEC = DatasetSpec(
    10, ("episode", "frame"), ("episode", "frame", "c"), {"a": CameraSpec(4, 6), "b": CameraSpec(8, 8)}, "arm"
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Every number tells which episode and frame it belongs to."""
    path = tmp_path_factory.mktemp("chunks") / "set"
    with LeRobotWriter.open(path, SPEC, episodes_per_commit=2) as writer:
        for e, t in enumerate(LENGTHS):
            frame = torch.arange(t)
            marks = torch.stack([torch.full((t,), float(e)), frame.float()], 1)
            picture = (10 * e + frame).to(torch.uint8)[:, None, None, None]
            writer.add_episode(
                state=marks,
                action=torch.cat([marks, torch.rand(t, 1)], 1),
                images={"a": picture.expand(t, 4, 6, 3), "b": 100 + picture.expand(t, 8, 8, 3)},
                reward=torch.zeros(t),
                success=torch.zeros(t, dtype=torch.bool),
                instruction=f"sentence {e}",
            )
    return LeRobotDataset(path)


@pytest.mark.parametrize("horizon", [1, 3, 8, 20])
@pytest.mark.parametrize("memory_mb", [64, 0])
def test_every_start_step_matches_a_per_step_reference(dataset, horizon, memory_mb):
    chunks = ChunkDataset(dataset, horizon, image_memory_mb=memory_mb)
    assert chunks.images_in_memory == (memory_mb > 0)
    assert len(chunks) == sum(LENGTHS)
    batch = chunks.batch(torch.arange(len(chunks)))
    row = 0
    for e, t in enumerate(LENGTHS):
        recorded = dataset.episode(e).action
        for start in range(t):
            for h in range(horizon):
                real = start + h < t
                assert bool(batch.mask[row, h]) == real
                expected = recorded[start + h] if real else recorded[-1]
                assert torch.equal(batch.actions[row, h], expected)
            assert batch.obs.state[row].tolist() == [e, start]
            assert batch.obs.instruction[row] == f"sentence {e}"
            assert (batch.obs.images["a"][row] == 10 * e + start).all()
            assert (batch.obs.images["b"][row] == 100 + 10 * e + start).all()
            row += 1
    assert batch.actions.shape == (17, horizon, 3)
    assert batch.mask[:, 0].all()


def test_images_on_demand_equal_images_in_memory_in_any_order_and_repeated(dataset):
    samples = torch.tensor([16, 0, 5, 5, 9, 2, 16, 13])
    kept = ChunkDataset(dataset, 4).batch(samples)
    decoded = ChunkDataset(dataset, 4, image_memory_mb=0).batch(samples)
    for camera in ("a", "b"):
        assert torch.equal(kept.obs.images[camera], decoded.obs.images[camera])
    assert torch.equal(kept.actions, decoded.actions)
    assert torch.equal(kept.samples, samples)


def test_a_choice_of_episodes_and_cameras(dataset):
    chunks = ChunkDataset(dataset, 4, episodes=[2, 0], cameras=["b"])
    assert len(chunks) == 13
    batch = chunks.batch(torch.tensor([0, 7, 8]))
    assert batch.obs.state.tolist() == [[2, 0], [2, 7], [0, 0]]
    assert list(batch.obs.images) == ["b"]
    assert batch.obs.images["b"][:, 0, 0, 0].tolist() == [120, 127, 100]
    assert chunks.image_bytes == 13 * 8 * 8 * 3
    assert ChunkDataset(dataset, 4, cameras=()).batch(torch.tensor([3])).obs.images == {}


def test_errors(dataset, tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        ChunkDataset(dataset, 0)
    with pytest.raises(DatasetError, match=r"no camera \['top'\]"):
        ChunkDataset(dataset, 2, cameras=["top"])
    with pytest.raises(IndexError, match=r"\[0, 17\)"):
        ChunkDataset(dataset, 2).batch(torch.tensor([17]))
    LeRobotWriter.open(tmp_path / "empty", SPEC).close()
    with pytest.raises(DatasetError, match="record demonstrations first"):
        ChunkDataset(LeRobotDataset(tmp_path / "empty"), 2)
    with pytest.raises(ValueError, match="17 samples, the dataset has 5"):
        EpochSampler(5, 2, 0).load_state_dict(EpochSampler(17, 2, 0).state_dict())


def test_the_order_depends_on_the_seed_alone_and_epochs_differ():
    a, b, c = EpochSampler(50, 50, 3), EpochSampler(50, 50, 3), EpochSampler(50, 50, 4)
    first = a.next()
    assert torch.equal(first, b.next())
    assert not torch.equal(first, c.next())
    assert not torch.equal(first, a.next())
    assert a.epoch == 1
    assert [len(x) for x, _ in zip(EpochSampler(5, 3, 0), range(4), strict=False)] == [3, 3, 3, 3]
