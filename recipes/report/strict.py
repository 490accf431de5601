"""From plain JSON data to dataclasses: every key and type checked, every error one line."""

import types
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from math import nan
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from layers.names import unknown

T = TypeVar("T")
Measured = Annotated[float, "null where it is no number"]  # JSON has no NaN; read as one


def read_as(kind: type[T], data: object, where: str) -> T:
    """`data` as a `kind`: a dataclass, a plain type, or a list, tuple, dict or union of them.

    Args:
        kind: a dataclass; its fields without a default are required, no other key is allowed.
        data: what `json.load` gave.
        where: the place of `data` in its file, for the error ("results.json: runs[3]").

    Raises:
        ValueError: naming the place, what is there and what is expected.
    """
    return _read(kind, data, where)


def _read(kind: Any, data: Any, where: str) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return data
    if origin is Annotated:
        return nan if data is None else _read(float, data, where)
    if origin in (Union, types.UnionType):
        return _read_optional(kind, data, where)
    if origin is tuple:
        item = get_args(kind)[0]
        listed = _expect(list | tuple, data, where, "a list")
        return tuple(_read(item, x, f"{where}[{i}]") for i, x in enumerate(listed))
    if origin is dict:
        value = get_args(kind)[1]
        mapping = _expect(dict, data, where, "an object")
        return {str(k): _read(value, x, f"{where}.{k}") for k, x in mapping.items()}
    if is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    return _read_plain(kind, data, where)


def _read_optional(kind: Any, data: Any, where: str) -> Any:
    """`X | None`; the only union that a record has."""
    (some,) = (arg for arg in get_args(kind) if arg is not type(None))
    return None if data is None else _read(some, data, where)


def _read_dataclass(kind: Any, data: Any, where: str) -> Any:
    given = _expect(dict, data, where, "an object")
    hints = _hints(kind)
    known = {f.name: f for f in fields(kind)}
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: {unknown('key', key, known)}")
    for name, f in known.items():
        required = f.default is MISSING and f.default_factory is MISSING
        if required and name not in given:
            raise ValueError(f"{where}: key {name!r} is missing, needs {', '.join(known)}")
    try:
        return kind(**{k: _read(hints[k], x, f"{where}.{k}") for k, x in given.items()})
    except ValueError as error:  # the dataclass's own check, or one from deeper down
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields; evaluating them anew for each record is most of the time."""
    return get_type_hints(kind, include_extras=True)


def _read_plain(kind: type, data: Any, where: str) -> Any:
    """str, bool, int or float; a whole float passes for an int, an int for a float."""
    if kind is int:
        number = _expect(int | float, data, where, "a whole number")
        if isinstance(number, bool) or number != number or number % 1:
            raise ValueError(f"{where}: expected a whole number, got {data!r}")
        return int(number)
    if kind is float:
        number = _expect(int | float, data, where, "a number")
        if isinstance(number, bool):
            raise ValueError(f"{where}: expected a number, got {data!r}")
        return float(number)
    return _expect(kind, data, where, {str: "a string", bool: "true or false"}[kind])


def _expect(kind: Any, data: Any, where: str, words: str) -> Any:
    if isinstance(data, kind):
        return data
    shown = repr(data)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise ValueError(f"{where}: expected {words}, got {shown.splitlines()[0]}")
