"""Plain mappings against dataclasses: every key and type checked, errors in one line."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


def check_keys(
    schema: type, plain: Any, *, what: str, path: str = "", root: type | None = None
) -> None:
    """Raise for the first key that the dataclass, or one inside it, does not have."""
    if not isinstance(plain, Mapping):
        return
    root = root or schema
    hints = typing.get_type_hints(schema)
    names = [f.name for f in dataclasses.fields(schema)]
    for key, value in plain.items():
        here = f"{path}.{key}" if path else str(key)
        if key not in names:
            raise ValueError(_unknown_key(here, names, root, what))
        inner, optional = _inner(hints[key])
        if inner and not (optional and value is None):
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"{what}: {here} must be a mapping, got {value!r}. "
                    f"Known: {', '.join(f.name for f in dataclasses.fields(inner))}"
                )
            check_keys(inner, value, what=what, path=here, root=root)


def _inner(hint: Any) -> tuple[Any, bool]:
    """The dataclass that a hint names, else None; and whether it may be left out."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = typing.get_args(hint) if union else (hint,)
    return next(filter(dataclasses.is_dataclass, parts), None), type(None) in parts


def _unknown_key(here: str, siblings: Iterable[str], root: type, what: str) -> str:
    """One line: the key, the nearest right one beside it or elsewhere, and what is known there."""
    section, _, leaf = here.rpartition(".")
    everywhere = list(_paths(root))
    elsewhere = [p for p in everywhere if p.rpartition(".")[2] == leaf]
    prefix = f"{section}." if section else ""
    near = [f"{prefix}{n}" for n in difflib.get_close_matches(leaf, list(siblings), n=1)]
    best = (near or elsewhere or difflib.get_close_matches(here, everywhere, n=1))[:1]
    hint = f" Did you mean {best[0]!r}?" if best else ""
    place = f" in {section}" if section else ""
    return f"unknown {what} key {here!r}.{hint} Known{place}: {', '.join(siblings)}"


def _paths(schema: type, prefix: str = "") -> Iterable[str]:
    """Every dotted path that the dataclass and those inside it name."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        if inner := _inner(hints[field.name])[0]:
            yield from _paths(inner, f"{prefix}{field.name}.")


def type_error(
    schema: type, error: OmegaConfBaseException, given: dict[str, Any], what: str
) -> ValueError:
    """One line from what OmegaConf says in several, or without the path: try key by key."""
    for path, value in given.items():
        alone = OmegaConf.create()
        OmegaConf.update(alone, path, value, force_add=True)
        try:
            OmegaConf.merge(schema, alone)
        except OmegaConfBaseException:
            return ValueError(f"{what}: {path} must be {_type_name(schema, path)}, got {value!r}")
    return ValueError(f"{what}: {one_line(error)}")


def _type_name(schema: type, path: str) -> str:
    """How the dataclass annotates a dotted path, as a reader would say it."""
    hint: Any = schema
    for name in path.replace("[", ".").replace("]", "").split("."):
        inner = _inner(hint)[0]
        if not inner:
            break
        hint = typing.get_type_hints(inner).get(name, Any)
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)


def one_line(error: Exception) -> str:
    """The text of an error without its line ends."""
    return " ".join(str(error).split())
