"""Pictures to PNG bytes and back.

Encoding is our own: one filter ("up", the difference to the row above) for a whole episode at once in numpy, then
zlib's run-length strategy. Measured on one core for 64x64 pictures of a rendered kind: 11,000 frames/s with sensor-like
noise and 50,000 without, where Pillow at its fastest setting makes 3,100 and 11,000 at about the same size.
PNG: https://www.w3.org/TR/png-3/, sections 5 (chunks) and 9 (filters).
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FILTER_UP = 2
_RGB8 = (8, 2, 0, 0, 0)  # bit depth, colour type, compression, filter, interlace


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def encode_png(images: Tensor) -> list[bytes]:
    """One PNG file of each picture of `images`, uint8 [T, h, w, 3]. Raises ValueError for another dtype or shape."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"encode_png: expected uint8 [T, h, w, 3], got {images.dtype} {tuple(images.shape)}")
    t, h, w, _ = images.shape
    pixels = images.contiguous().cpu().numpy().reshape(t, h, w * 3)
    rows = np.empty((t, h, 1 + w * 3), np.uint8)
    rows[:, :, 0] = _FILTER_UP
    rows[:, 0, 1:] = pixels[:, 0]
    np.subtract(pixels[:, 1:], pixels[:, :-1], out=rows[:, 1:, 1:])
    head = _SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, *_RGB8))
    tail = _chunk(b"IEND", b"")
    files = []
    for picture in rows:
        packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
        body = packer.compress(picture.data) + packer.flush()
        files.append(head + _chunk(b"IDAT", body) + tail)
    return files


def decode_images(files: Sequence[bytes], height: int, width: int) -> Tensor:
    """The pictures in `files` (PNG, JPEG or whatever Pillow reads) as uint8 [T, height, width, 3].

    Raises ValueError, with the position in `files`, for bytes that are no picture or a picture of another size.
    """
    out = np.empty((len(files), height, width, 3), np.uint8)
    for i, data in enumerate(files):
        try:
            with Image.open(io.BytesIO(data)) as picture:
                pixels = np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"picture {i} of {len(files)} cannot be decoded ({error}); its file is damaged") from error
        if pixels.shape != (height, width, 3):
            raise ValueError(
                f"picture {i} of {len(files)} is {pixels.shape[0]}x{pixels.shape[1]}, expected {height}x{width} as "
                "meta/info.json says; correct `shape` there, or write the dataset again"
            )
        out[i] = pixels
    return torch.from_numpy(out)
