"""JSON files that are read back as the dataclasses they were written from, with every type checked.

So what a damaged or a hostile file can do ends here: whoever has a record may rely on it. For what
others read, `strict` sees to numbers that JSON can't say.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
NAMES = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}
NAMES |= {dict: "an object", tuple: "a list", list: "a list"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, or ValueError for anything else than one."""
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {content!r:.40}")
    return content


def strict(value: Any) -> Any:
    """The same for JSON: null in the place of every number, however deep, that isn't finite.

    Python would write Infinity and NaN, which other readers refuse (RFC 8259, section 6).
    """
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_record(cls: type[Record], content: object) -> Record:
    """The dataclass that `dataclasses.asdict` made this of.

    Raises ValueError, with the field's name, for what is missing, unknown or of another type.
    """
    return _as(cls, content, cls.__name__.lower())


def _as(kind: Any, value: Any, name: str) -> Any:
    """`value` as a `kind`, which may be what a dataclass's annotations may say."""
    if kind in (object, Any):
        return value
    if is_dataclass(kind):
        return _as_dataclass(kind, value, name)
    if isinstance(kind, UnionType):  # X | None
        (inner,) = (arm for arm in get_args(kind) if arm is not NoneType)
        return None if value is None else _as(inner, value, name)
    outer, inner = get_origin(kind) or kind, get_args(kind)
    fits = (float, int) if outer is float else ({tuple: list}.get(outer, outer),)
    if type(value) not in fits or (outer is float and not _is_finite(value)):
        raise ValueError(f"{name} is {value!r:.40}, expected {NAMES[outer]}")
    if outer is float:
        return float(value)
    if outer is tuple:
        return tuple(_as(inner[0], item, f"{name}[{at}]") for at, item in enumerate(value))
    if outer is dict:
        return {key: _as(inner[1], item, f"{name}.{key:.40}") for key, item in value.items()}
    return value


def _is_finite(number: float) -> bool:
    """Whether a float, or a whole number of any size, is a finite float."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _as_dataclass(cls: type[Record], value: object, name: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r:.40}, expected an object")
    known, hints = {item.name: item for item in fields(cls)}, get_type_hints(cls)
    for key in value:
        if key not in known:
            raise ValueError(f"{name} has an unknown field {key!r:.40}")
    for key, item in known.items():
        if key not in value and item.default is MISSING:
            raise ValueError(f"{name} lacks {key}")
    return cls(**{key: _as(hints[key], item, f"{name}.{key}") for key, item in value.items()})
