"""Which of n layers a selector names: one grammar for layer plans and precision rules."""

import re
from collections.abc import Sequence
from typing import Any

SELECTORS = (
    'a layer (0, -1), "first", "last", a slice ("1:", "::2", "-2:"), a share ("last 15%") '
    "or a list of layers"
)
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?")
_SHARE = re.compile(r"(first|last) (\d+(?:\.\d+)?)%")
_NUMBER = re.compile(r"-?\d+")


def select_layers(selector: Any, n_layers: int) -> list[int]:
    """The layers that a selector means, ascending.

    Args:
        selector: see `SELECTORS`; numbers may be text.
        n_layers: layers there are.

    Raises:
        ValueError: for what is no selector, or a layer that does not exist.
    """
    layers = list(range(n_layers))
    if isinstance(selector, str):
        text = selector.strip()
        if text in ("first", "last"):
            return layers[:1] if text == "first" else layers[-1:]
        if found := _SHARE.fullmatch(text):
            share = round(n_layers * float(found[2]) / 100)
            count = min(max(share, 1), n_layers)  # a share of few layers is still one
            return layers[:count] if found[1] == "first" else layers[n_layers - count :]
        if (found := _SLICE.fullmatch(text)) and found[3] != "0":
            start, stop, step = (None if part is None else int(part) for part in found.groups())
            return sorted(layers[start:stop:step])
        if not _NUMBER.fullmatch(text):
            raise ValueError(f"layers must be {SELECTORS}, got {selector!r}")
        selector = int(text)
    numbers = selector if isinstance(selector, Sequence) else [selector]
    for number in numbers:
        if type(number) is not int:
            raise ValueError(f"layers must be {SELECTORS}, got {selector!r}")
        if not -n_layers <= number < n_layers:
            raise ValueError(f"layers={selector!r} is out of range for n_layers={n_layers}")
    return sorted({number % n_layers for number in numbers})
