"""Options at the door: which a config knows, which it lacks, whether their types fit."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from layers.names import unknown
from zoo.entry import Entry


def field_names(config: type[Any]) -> list[str]:
    """What a config class can be told."""
    return [f.name for f in fields(config)]


def construct(entry: Entry, options: Mapping[str, Any]) -> Any:
    """The entry's config from options by name.

    Raises:
        ValueError: for an option that is missing, of a wrong type, or refused by the config.
    """
    missing = [
        f.name
        for f in fields(entry.config)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in options
    ]
    if missing:
        raise ValueError(f"{entry.name} needs {', '.join(missing)}")
    for f in fields(entry.config):
        if f.name in options:
            _check_type(entry.name, f.name, options[f.name], f.type)
    return entry.config(**options)


def _check_type(owner: str, name: str, value: Any, annotation: Any) -> None:
    """Refuse a value whose type the field's annotation does not allow."""
    allowed = get_args(annotation) or (annotation,)
    if get_origin(annotation) is Literal:
        if value not in allowed:
            raise unknown(f"{owner} {name}", value, map(str, allowed))
        return
    if not set(allowed) <= {int, float, bool, str, NoneType}:
        return  # a composed type: the config's own checks speak
    if float in allowed and type(value) is int:
        return
    if type(value) not in allowed:
        names = " or ".join("None" if kind is NoneType else kind.__name__ for kind in allowed)
        raise ValueError(f"{owner}: {name} must be {names}, got {value!r}")
