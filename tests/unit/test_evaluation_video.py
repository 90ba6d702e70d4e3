"""Videos: what is written is what is read back, within what H.264 loses."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vla_rl.evaluation.video import VideoWriter, filmstrip, read_video, write_video
from vla_rl.rollout.recorder import EpisodeRecorder


def moving_square(frames: int = 12, side: int = 64) -> torch.Tensor:
    video = torch.full((frames, side, side, 3), 230, dtype=torch.uint8)
    for t in range(frames):
        video[t, 16:32, 4 * t : 4 * t + 12] = torch.tensor([20, 60, 200], dtype=torch.uint8)
    return video


def test_frames_come_back_enlarged_and_in_order(tmp_path):
    frames = moving_square()
    path = write_video(tmp_path / "a.mp4", frames, fps=20)
    back = read_video(path)
    assert back.shape == (12, 256, 256, 3)
    expected = frames.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    error = (back.float() - expected.float()).abs().mean(dim=(1, 2, 3))
    assert float(error.max()) < 4
    still = (back[0].float() - back[11].float()).abs().mean()
    assert float(still) > 3 * float(error.max())  # the square has moved by more than the loss of the codec


def test_the_file_is_what_browsers_play(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_square(30), fps=12.5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 12.5
        assert float(stream.duration * stream.time_base) == pytest.approx(30 / 12.5)  # pyright: ignore[reportOperatorIssue]
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before all of it is there
    assert len(content) < 40_000


@pytest.mark.parametrize(("height", "width"), [(15, 21), (100, 75), (301, 255)])
def test_odd_sizes_are_padded(tmp_path, height, width):
    frames = torch.randint(0, 255, (3, height, width, 3), dtype=torch.uint8)
    back = read_video(write_video(tmp_path / "a.mp4", frames, fps=10))
    factor = max(1, -(-256 // max(height, width)))
    assert back.shape[1] in (height * factor, height * factor + 1)
    assert back.shape[2] in (width * factor, width * factor + 1)
    assert back.shape[1] % 2 == back.shape[2] % 2 == 0


def test_an_error_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", 10) as writer:  # noqa: PT012
        writer.write(moving_square(3))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_bad_frames_are_refused(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 10) as writer:
        writer.write(moving_square(2))
        with pytest.raises(ValueError, match="uint8"):
            writer.write(moving_square(2).float())
        with pytest.raises(ValueError, match="change size"):
            writer.write(moving_square(2, side=48))
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "b.mp4", torch.zeros(0, 8, 8, 3, dtype=torch.uint8), 10)
    with pytest.raises(ValueError, match="fps"):
        VideoWriter(tmp_path / "c.mp4", 0)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_the_recorder_keeps_episodes_apart(tmp_path):
    recorder = EpisodeRecorder(tmp_path, [3, 8], control_hz=10, speed=2)
    assert [recorder.wants(seed) for seed in (3, 4, 8)] == [True, False, True]
    video = moving_square(10)
    recorder.add(3, video[:4])
    recorder.add(8, video[:2])
    recorder.add(3, video[4:])
    recorder.finish(3, instruction="touch it", success=True)
    recorder.finish(4, instruction="never filmed", success=False)
    with pytest.raises(ValueError, match="episode 3"):
        recorder.add(3, video)
    recorder.discard()
    assert list(recorder.recordings) == [3]
    recording = recorder.recordings[3]
    assert (recording.num_frames, recording.success, recording.instruction) == (10, True, "touch it")
    assert len(read_video(recording.path)) == 10
    assert [p.name for p in tmp_path.iterdir()] == ["episode_3.mp4"]


def test_planned_chunks_lie_beside_the_video(tmp_path):
    recorder = EpisodeRecorder(tmp_path, [3, 8], control_hz=10)
    video, chunks = moving_square(10), torch.arange(12.0).reshape(2, 3, 2)
    recorder.add(3, video[:2], chunks[0])
    recorder.add(3, video[2:3], chunks[1])
    recorder.add(8, video)
    for seed in (3, 8):
        recorder.finish(seed, instruction="go", success=True, action_names=("x", "grip"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["episode_3.mp4", "episode_3.npz", "episode_8.mp4"]
    with np.load(tmp_path / "episode_3.npz") as stored:
        assert np.array_equal(stored["chunks"], chunks.numpy())
        assert stored["executed"].tolist() == [2, 1]
        assert stored["names"].tolist() == ["x", "grip"]


def test_a_filmstrip_goes_from_the_first_frame_to_the_last(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_square(12), fps=10)
    strip = np.asarray(Image.open(io.BytesIO(filmstrip(path, num_frames=3, height=64)))).astype(int)
    assert strip.shape == (64, 3 * 66 - 2, 3)
    blue = (strip[24, :, 2] - strip[24, :, 0]) > 60  # the row through the moving square
    starts = [int(np.flatnonzero(blue[66 * i : 66 * i + 64])[0]) for i in range(3)]
    assert starts == pytest.approx([0, 4 * 6, 4 * 11], abs=2)
    assert Image.open(io.BytesIO(filmstrip(path, num_frames=50))).width == 12 * 98 - 2
