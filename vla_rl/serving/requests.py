"""What a client asks, checked: its observation, and the envelope of our own clients. numpy, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_rl.serving.client import ENVELOPE

_MAX_PIXELS = 4096
_MAX_PROMPT = 4096
_LIMIT = 2**63


class RequestError(ValueError):
    """A request that gets an error for an answer. `code`: one of those of docs/serving.md."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class FlatKeys:
    """A robot's flat keys. `images`: for the policy's cameras, in their order. `state`: joined in this order."""

    images: tuple[str, ...]
    state: tuple[str, ...]
    prompt: str = "prompt"


FLAT_KEYS = {
    "libero": FlatKeys(("observation/image", "observation/wrist_image"), ("observation/state",)),
    "droid": FlatKeys(
        ("observation/exterior_image_1_left", "observation/wrist_image_left"),
        ("observation/joint_position", "observation/gripper_position"),
    ),
}


@dataclass(frozen=True)
class RequestShapes:
    """What a policy takes: `cameras` (None: any), `state_dim` (None: any), noise [H, D] and actions of `action_dim`."""

    cameras: tuple[str, ...] | None
    state_dim: int | None
    noise: tuple[int, int]
    action_dim: int


@dataclass(frozen=True)
class Request:
    """`images`: camera -> uint8 [h, w, 3]. `state`: float32 [S].

    From the envelope: `deadline_ms` from now, None for none; `session` and `decision` address the noise, None: the
    server counts; `noise` float32 [H, D] in its place; `prefix` float32 [P, A] and `delay` for real-time chunking.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    prompt: str
    deadline_ms: float | None = None
    session: int | None = None
    decision: int | None = None
    noise: NDArray[np.float32] | None = None
    prefix: NDArray[np.float32] | None = None
    delay: int = 0


def envelope_of(message: Any) -> Mapping[str, Any] | None:
    """The envelope of a message of our own client, which answers carry the id of; None of any other."""
    envelope = message.get(ENVELOPE) if isinstance(message, dict) else None
    return envelope if isinstance(envelope, dict) and type(envelope.get("id")) is int else None


def read_request(message: Any, shapes: RequestShapes, keys: FlatKeys | None = None) -> Request:
    """Raises RequestError "bad_observation" or "bad_request", which says what was expected."""
    if not isinstance(message, dict):
        raise RequestError("bad_observation", f"a request is a map, got a {type(message).__name__}")
    flat = keys is not None and "images" not in message
    images = _flat_images(message, shapes, keys) if flat and keys else message.get("images", {})
    if not isinstance(images, dict) or len(images) > 16:
        raise RequestError("bad_observation", "images must be a map of at most 16 cameras to pictures")
    for camera in shapes.cameras if shapes.cameras is not None else ():
        if camera not in images:
            raise RequestError(
                "bad_observation",
                f"the policy needs images of {list(shapes.cameras or ())}, got {sorted(map(str, images))[:16]}",
            )
    taken = {c: _picture(c, image) for c, image in images.items() if shapes.cameras is None or c in shapes.cameras}
    state = _flat_state(message, keys) if flat and keys else message.get("state")
    prompt = message.get(keys.prompt if flat and keys else "prompt", "")
    if not isinstance(prompt, str) or len(prompt) > _MAX_PROMPT:
        raise RequestError("bad_observation", f"the prompt must be text of at most {_MAX_PROMPT} characters")
    return Request(taken, _state(state, shapes), str(prompt), **_envelope(message.get(ENVELOPE), shapes))


def _flat_images(message: Mapping[str, Any], shapes: RequestShapes, keys: FlatKeys) -> dict[str, Any]:
    cameras = shapes.cameras if shapes.cameras is not None else keys.images
    return {c: message[key] for c, key in zip(cameras, keys.images, strict=False) if key in message}


def _flat_state(message: Mapping[str, Any], keys: FlatKeys) -> Any:
    missing = [key for key in keys.state if key not in message]
    if missing:
        raise RequestError("bad_observation", f"the observation lacks {missing}")
    return np.concatenate([_vector(message[key], key) for key in keys.state])


def _picture(camera: Any, image: Any) -> NDArray[np.uint8]:
    good = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    if not good or not 1 <= min(image.shape[:2]) <= max(image.shape[:2]) <= _MAX_PIXELS:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise RequestError("bad_observation", f"images[{camera!r:.40}] must be uint8 [h, w, 3], got {got}")
    return image


def _vector(value: Any, what: str) -> NDArray[np.float32]:
    """What comes as it should takes the short way: of code that runs ten times a second nothing is in the caches."""
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        vector = value
    else:
        vector = _floats(value)
    # the sum of float32 in double precision is finite if they all are, in far less code than numpy's
    if vector.ndim != 1 or not math.isfinite(sum(vector.tolist())):
        raise RequestError("bad_observation", f"{what} must be a list or array of finite numbers")
    return vector


def _floats(value: Any) -> NDArray[np.float32]:
    """[nan] for what is no list of numbers."""
    try:
        vector = np.atleast_1d(np.asarray(value))
    except ValueError:  # a list of lists of several lengths
        vector = np.empty(0, object)
    if vector.dtype.kind not in "biuf":
        return np.full(1, np.nan, np.float32)
    with np.errstate(over="ignore"):
        return vector.astype(np.float32)


def _state(value: Any, shapes: RequestShapes) -> NDArray[np.float32]:
    if value is None and not shapes.state_dim:
        return np.zeros(0, np.float32)
    state = _vector(value, "state")
    if shapes.state_dim is not None and len(state) != shapes.state_dim:
        raise RequestError("bad_observation", f"the policy needs a state of {shapes.state_dim}, got {len(state)}")
    return state


def _envelope(envelope: Any, shapes: RequestShapes) -> dict[str, Any]:
    if envelope is None:
        return {}
    if not isinstance(envelope, dict) or type(envelope.get("id")) is not int:
        raise RequestError("bad_request", f"{ENVELOPE} must be a map with an id that is an integer")
    found: dict[str, Any] = {
        name: _natural(envelope[name], name) for name in ("session", "decision", "delay") if name in envelope
    }
    if "deadline_ms" in envelope:
        deadline = envelope["deadline_ms"]
        if type(deadline) not in (int, float) or not 0 <= deadline < 1e9:
            raise RequestError("bad_request", "deadline_ms must be a number of milliseconds")
        found["deadline_ms"] = float(deadline)
    for name, rows, columns in (("noise", shapes.noise[0], shapes.noise[1]), ("prefix", None, shapes.action_dim)):
        if name in envelope:
            found[name] = _matrix(envelope[name], name, rows, columns)
    return found


def _natural(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:
        raise RequestError("bad_request", f"{name} must be an integer >= 0")
    return value


def _matrix(value: Any, name: str, rows: int | None, columns: int) -> NDArray[np.float32]:
    good = isinstance(value, np.ndarray) and value.dtype == np.float32 and value.ndim == 2
    if not good or value.shape[1] != columns or len(value) != (rows or len(value)) or not np.isfinite(value).all():
        raise RequestError("bad_request", f"{name} must be finite float32 [{rows or 'P'}, {columns}]")
    return value


__all__ = ["FLAT_KEYS", "FlatKeys", "Request", "RequestError", "RequestShapes", "envelope_of", "read_request"]
