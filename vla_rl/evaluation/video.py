"""Short videos of episodes: H.264 in MP4, which every browser plays, encoded by PyAV.

Small pictures are enlarged by a whole factor without blurring, so that a report shows what the policy saw.
"""

from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import av.container
import numpy as np
import torch
from PIL import Image
from torch import Tensor

_MIN_SIDE_PIXELS = 256


class VideoWriter:
    """Encodes frames as they come; the file appears under its name only when it is complete.

    `fps`: frames a second of playback. `min_side`: smaller frames are enlarged by a whole factor to at least about this
    many pixels (never beyond twice). The first frame decides the size; others must have the same.
    Raises ValueError for frames that are not uint8 [h, w, 3].
    """

    def __init__(self, path: str | Path, fps: float, *, min_side: int = _MIN_SIDE_PIXELS, quality: int = 24) -> None:
        if not fps > 0:
            raise ValueError(f"VideoWriter: fps must be positive, got {fps}")
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._rate = Fraction(fps).limit_denominator(1000)
        self._min_side = min_side
        self._quality = quality
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None
        self._shape: tuple[int, ...] | None = None
        self.num_frames = 0

    def write(self, frames: Tensor) -> None:
        """Append `frames`, uint8 [T, h, w, 3] on any device."""
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
            raise ValueError(f"frames must be uint8 [T, h, w, 3], got {frames.dtype} {tuple(frames.shape)}")
        if not len(frames):
            return
        if self._shape is None:
            self._open(tuple(frames.shape[1:]))
        if tuple(frames.shape[1:]) != self._shape:
            raise ValueError(f"{self.path.name}: frames change size from {self._shape} to {tuple(frames.shape[1:])}")
        assert self._container is not None
        assert self._stream is not None
        for picture in frames.cpu().numpy():
            frame = av.VideoFrame.from_ndarray(self._enlarged(picture), format="rgb24")
            self._container.mux(self._stream.encode(frame))
        self.num_frames += len(frames)

    def close(self) -> None:
        """Finish the file. Without a frame there is none."""
        if self._container is None or self._stream is None:
            return
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._container = self._stream = None
        os.replace(self._partial, self.path)

    def discard(self) -> None:
        """Stop and leave nothing behind."""
        if self._container is not None:
            self._container.close()
            self._container = self._stream = None
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _open(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        factor = max(1, -(-self._min_side // max(shape[:2])))
        self._factor = factor
        container = av.open(str(self._partial), mode="w", format="mp4", options={"movflags": "+faststart"})
        self._container = container
        stream = container.add_stream("libx264", rate=self._rate)
        stream.height, stream.width = _even(shape[0] * factor), _even(shape[1] * factor)
        stream.pix_fmt = "yuv420p"  # the one chroma format that all browsers decode
        stream.options = {"crf": str(self._quality), "preset": "veryfast", "threads": "1"}
        self._stream = stream

    def _enlarged(self, picture: np.ndarray) -> np.ndarray:
        large = picture.repeat(self._factor, axis=0).repeat(self._factor, axis=1)
        rows, columns = large.shape[:2]
        return np.ascontiguousarray(
            np.pad(large, ((0, _even(rows) - rows), (0, _even(columns) - columns), (0, 0)), mode="edge")
        )


def write_video(path: str | Path, frames: Tensor, fps: float) -> Path:
    """Write `frames`, uint8 [T, h, w, 3], as an MP4 file and return its path. Raises ValueError without a frame."""
    if not len(frames):
        raise ValueError(f"write_video: no frames for {path}")
    with VideoWriter(path, fps) as writer:
        writer.write(frames)
    return Path(path)


def read_video(path: str | Path) -> Tensor:
    """All frames of a video file, uint8 [T, h, w, 3]."""
    with av.open(str(path)) as container:
        pictures = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(pictures)


def filmstrip(path: str | Path, num_frames: int = 5, height: int = 96) -> bytes:
    """`num_frames` pictures of a video side by side, from its first frame to its last, as a JPEG of `height` pixels: it
    can be printed, and is a tenth of the video. A shorter video has fewer."""
    with av.open(str(path)) as container:
        count = container.streams.video[0].frames
        wanted = set(np.linspace(0, count - 1, min(num_frames, count)).round().astype(int).tolist())
        pictures = [frame.to_image() for i, frame in enumerate(container.decode(video=0)) if i in wanted]
    if not pictures:
        raise ValueError(f"filmstrip: {path} has no frame")
    width = max(1, round(pictures[0].width * height / pictures[0].height))
    strip = Image.new("RGB", (len(pictures) * (width + 2) - 2, height), "white")
    for i, picture in enumerate(pictures):
        strip.paste(picture.resize((width, height)), (i * (width + 2), 0))
    content = io.BytesIO()
    strip.save(content, format="JPEG", quality=72)
    return content.getvalue()


def _even(pixels: int) -> int:
    """yuv420p halves the colour resolution, so both sides must be even."""
    return pixels + pixels % 2
