"""Messages are openpi's, byte for byte, and no bytes do more than raise MessageError."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from vla_rl.serving.messages import MAX_ITEMS, MessageError, pack, unpack

# float32 [1, 2] as openpi's client writes it
GOLDEN = "84c40b5f5f6e6461727261795f5fc3c40464617461c4080000803f00000040c4056474797065a33c6634c40573686170659102"


def array_map(data: object, dtype: object, shape: object) -> bytes:
    return msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape})  # pyright: ignore[reportReturnType]


def test_an_array_has_openpis_bytes() -> None:
    assert pack(np.array([1, 2], np.float32)).hex() == GOLDEN
    read = unpack(bytes.fromhex(GOLDEN))
    assert read.dtype == np.float32
    assert read.tolist() == [1.0, 2.0]
    assert not read.flags.writeable


def test_a_scalar_has_openpis_bytes() -> None:
    packed = pack(np.float32(0.5))
    assert packed == msgpack.packb({b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"})
    assert unpack(packed) == np.float32(0.5)
    assert unpack(packed).dtype == np.float32


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<f2", "|u1", "<i8", ">i4", "|b1", "<U3", "|S4"])
def test_round_trip(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    message = {"images": {"base": array, "turned": array.T}, "prompt": "pick", "n": [1, None, True, 2.5]}
    read = unpack(pack(message))
    assert read["images"]["base"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(read["images"]["base"], array)
    np.testing.assert_array_equal(read["images"]["turned"], array.T)
    assert (read["prompt"], read["n"]) == ("pick", [1, None, True, 2.5])


def test_empty_and_zero_dimensional_arrays() -> None:
    assert unpack(pack(np.zeros((0, 3), np.float32))).shape == (0, 3)
    assert unpack(pack(np.array(3.0))).shape == ()


@pytest.mark.parametrize(
    "value",
    [np.array([None]), np.zeros(2, "f4,f4"), np.zeros(2, complex), np.complex64(1), object(), {1, 2}, 2**70],
)
def test_what_is_not_sent(value: object) -> None:
    with pytest.raises(MessageError, match="cannot be sent"):
        pack({"x": value})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        pack("a") + b"x",
        array_map(b"12345678", "|O8", [1]),
        array_map(b"12345678", "<c8", [1]),
        array_map(b"12345678", "|V8", [1]),
        array_map(b"12345678", "f4,f4", [1]),
        array_map(b"12345678", "<f4", [3]),
        array_map(b"12345678", "<f4", [-1, -2]),
        array_map(b"", "<f4", [2**62, 0, 4.0]),
        array_map(b"12345678", "<f4", [1] * 65),
        array_map("12345678", "<f4", [2]),
        array_map(b"12345678", "<f3", [2]),
        array_map(b"", "<f4", None),
        msgpack.packb({b"__ndarray__": True}),
        msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
        msgpack.packb({b"__npgeneric__": True, b"data": {}, b"dtype": "<f4"}),
        msgpack.packb(msgpack.ExtType(4, b"abc")),
        msgpack.packb(msgpack.Timestamp(1, 2)),
        b"\x81\x01\x02",  # a key that is a number
        b"\xdd\x7f\xff\xff\xff",  # a list of two thousand million
        b"\x91" * 40 + b"\x01",
        b"\x91" * 5000 + b"\x01",
    ],
)
def test_broken_messages(data: bytes) -> None:
    with pytest.raises(MessageError):
        unpack(data)


def test_limits() -> None:
    assert unpack(pack("x" * 100), max_bytes=102) == "x" * 100
    with pytest.raises(MessageError, match="at most 101"):
        unpack(pack("x" * 100), max_bytes=101)
    many = [[{} for _ in range(1000)] for _ in range(MAX_ITEMS // 1000)]
    with pytest.raises(MessageError, match=f"more than {MAX_ITEMS}"):
        unpack(pack(many))
