"""ROS 2 messages without a ROS installation: built from plain values, written and read as CDR by rosbags."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from vla_rl.real_robot.interfaces import HardwareError

DISTROS = ("humble", "iron", "jazzy", "kilted")

_NUMPY = {"bool": "?", "byte": "u1", "char": "u1", "octet": "u1", "float32": "f4", "float64": "f8"} | {
    f"{sign}int{bits}": f"{sign[:1] or 'i'}{bits // 8}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def _import_packages() -> None:
    try:
        import cyclonedds.core  # noqa: F401
        import rosbags.typesys  # noqa: F401
    except ImportError as error:
        raise HardwareError(
            f"ROS 2 topics need the packages cyclonedds and rosbags ({error}): pip install 'vla-rl[robot]'"
        ) from error


class MessageTypes:
    """The messages of one ROS 2 distribution: built from plain values, written and read as CDR (XCDR1)."""

    def __init__(self, distro: str) -> None:
        _import_packages()
        from rosbags.typesys import Stores, get_typestore

        if distro not in DISTROS:
            raise ValueError(f"ROS 2 distribution {distro!r} is unknown; use one of {', '.join(DISTROS)}")
        self.distro = distro
        self.store = get_typestore(Stores[f"ROS2_{distro.upper()}"])
        self._samples: dict[str, type] = {}

    def register(self, type_name: str, definition: str) -> None:
        """Add a message type from the text of its .msg file."""
        from rosbags.typesys import get_types_from_msg

        self.store.register(get_types_from_msg(definition, type_name))

    def message(self, type_name: str, fields: Mapping[str, Any]) -> Any:
        """A message with `fields` set and the others zero or empty; nested messages may be given as mappings. Raises
        ValueError for a type or a field that does not exist."""
        definition = dict(self._fields(type_name))
        unknown = sorted(fields.keys() - definition.keys())
        if unknown:
            raise ValueError(f"{type_name} has no field {', '.join(unknown)}; it has {', '.join(definition)}")
        return self.store.types[type_name](*(self._value(d, fields.get(name)) for name, d in definition.items()))

    def serialize(self, message: Any) -> bytes:
        return bytes(self.store.serialize_cdr(message, message.__msgtype__))

    def deserialize(self, data: bytes, type_name: str) -> Any:
        return self.store.deserialize_cdr(data, type_name)

    def type_hash(self, type_name: str) -> str | None:
        """As in REP 2011, "RIHS01_" and 64 hex digits; None in Humble, which has none."""
        return None if self.distro == "humble" else self.store.hash_rihs01(type_name)

    def sample_class(self, type_name: str) -> type:
        """The IdlStruct that cyclonedds makes a topic of. cyclonedds calls `serialize` on what is written and
        `deserialize` on what came in: both pass on bytes, so that its coder in Python, a thousand times slower on a
        picture, is never run. So does the notice that a writer is gone, which has a key and no data."""
        if type_name not in self._samples:
            sample = self._idl(type_name, {})

            def from_bytes(cls: type, data: bytes) -> Any:
                received = cls()
                received.cdr = data
                return received

            def to_bytes(self: Any, use_version_2: bool | None) -> bytes:  # noqa: ARG001 (a writer is of one version)
                return self.cdr

            sample.serialize = to_bytes  # type: ignore[attr-defined]
            sample.deserialize = classmethod(from_bytes)  # type: ignore[attr-defined]
            sample.deserialize_key = classmethod(from_bytes)  # type: ignore[attr-defined]
            self._samples[type_name] = sample
        return self._samples[type_name]

    def _fields(self, type_name: str) -> list[tuple[str, Any]]:
        if type_name not in self.store.fielddefs:
            raise ValueError(
                f"message type {type_name!r} is not in ROS 2 {self.distro}; write package/msg/Name, or register it"
            )
        return self.store.fielddefs[type_name][1]

    def _value(self, description: Any, value: Any) -> Any:
        """`value` as the field wants it; None: zero or empty."""
        kind, detail = description[0].name, description[1]
        if kind == "NAME":
            return value if hasattr(value, "__msgtype__") else self.message(detail, value or {})
        if kind == "BASE":
            default: Any = "" if "string" in detail[0] else np.zeros((), _NUMPY[detail[0]]).item()
            return default if value is None else type(default)(value)
        element, length = detail
        if element[0].name == "BASE" and "string" not in element[1][0]:
            default = np.zeros(length if kind == "ARRAY" else 0, _NUMPY[element[1][0]])
            return default if value is None else np.ascontiguousarray(value, default.dtype)
        default = [None] * (length if kind == "ARRAY" else 0)
        return [self._value(element, item) for item in (default if value is None else value)]

    def _idl(self, type_name: str, made: dict[str, type]) -> type:
        from cyclonedds.idl import make_idl_struct

        if type_name not in made:
            package, _, name = type_name.split("/")
            fields = {field: self._idl_type(d, made) for field, d in self._fields(type_name)}
            made[type_name] = make_idl_struct(name, f"{package}.msg.dds_.{name}_", fields, dataclassify=False)
        return made[type_name]

    def _idl_type(self, description: Any, made: dict[str, type]) -> Any:
        from cyclonedds.idl import types

        kind, detail = description[0].name, description[1]
        if kind == "NAME":
            return self._idl(detail, made)
        if kind == "ARRAY":
            return types.array[self._idl_type(detail[0], made), detail[1]]
        if kind == "SEQUENCE":
            bound = (detail[1],) if 0 < detail[1] < 2**16 else ()
            return types.sequence[(self._idl_type(detail[0], made), *bound)]
        name, limit = detail
        if name == "string":
            return types.bounded_str[limit] if limit else str
        if name == "bool":
            return bool
        if name not in _NUMPY:
            raise ValueError(f"cyclonedds cannot carry a field of type {name}")
        return getattr(types, "uint8" if _NUMPY[name] == "u1" else name)


@lru_cache
def message_types(distro: str = "jazzy") -> MessageTypes:
    return MessageTypes(distro)


__all__ = ["DISTROS", "MessageTypes", "message_types"]
