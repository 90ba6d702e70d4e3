"""Episodes as mp4 video, for datasets whose pictures are not kept as PNG."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

_KEYFRAME_EVERY = 2  # any frame is at most one frame behind a seek point
_QUALITY = "18"  # H.264 constant rate factor: visually lossless


def encode_mp4(images: Tensor, fps: float) -> bytes:
    """H.264 video of `images` uint8 [T, h, w, 3] (even sizes), frame t at t / fps seconds."""
    h, w = images.shape[1:3]
    out = io.BytesIO()
    rate = Fraction(fps).limit_denominator(1000)
    with av.open(out, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": _QUALITY, "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
        stream.gop_size = _KEYFRAME_EVERY
        stream.time_base = 1 / rate
        for i, picture in enumerate(images.contiguous().cpu().numpy()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def decode_mp4(path: Path, timestamps: Tensor, fps: float, height: int, width: int) -> Tensor:
    """The frames of `path` at `timestamps` (float64 [M] seconds, ascending) as uint8 [M, height, width, 3].

    Raises ValueError where the video is damaged, of another size, or has no frame within half a period of a timestamp.
    """
    wanted = timestamps.double().numpy()
    out = np.empty((len(wanted), height, width, 3), np.uint8)
    tolerance = 0.5 / fps
    found = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if stream.time_base is None:
                raise ValueError(f"{path} has no time base; its frames cannot be found by time")
            container.seek(max(0, int((wanted[0] - tolerance) / stream.time_base)), stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.time is None or frame.time < wanted[found] - tolerance:
                    continue
                while found < len(wanted) and abs(frame.time - wanted[found]) <= tolerance:
                    pixels = frame.to_ndarray(format="rgb24")
                    if pixels.shape != (height, width, 3):
                        raise ValueError(
                            f"{path} has {pixels.shape[0]}x{pixels.shape[1]} frames, expected {height}x{width}"
                        )
                    out[found] = pixels
                    found += 1
                if found == len(wanted) or frame.time > wanted[found] + tolerance:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be decoded ({error}); the video is damaged or of an unknown codec") from error
    if found < len(wanted):
        raise ValueError(f"{path} has no frame at {wanted[found]:.3f} s (+- {tolerance:.3f} s); the video is too short")
    return torch.from_numpy(out)
