"""Errors at the door: what was given, what is allowed, the nearest right name."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, given: object, known: Iterable[str]) -> ValueError:
    """The error for a name that no table holds.

    Args:
        kind: what was looked for, as a reader would say it ("FFN variant", "option of moe").
        given: what was given.
        known: every right name.

    Returns:
        A ValueError to raise, one line long.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {given!r}.{hint} Known: {', '.join(names) or 'none'}")


def check_choice(what: str, given: str, allowed: Iterable[str]) -> None:
    """Raise unless `given` is one of `allowed`."""
    if given not in allowed:
        raise unknown(what, given, allowed)


def check_positive(**numbers: int | float) -> None:
    """Raise unless every number given by name is above zero."""
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")
