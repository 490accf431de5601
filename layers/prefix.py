"""A part of a layer's matrices: of an FFN's, what belongs to its first so many hidden numbers.

The leaves take one beside their input, so that a part runs in the precision of the whole.
"""

from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Part(Protocol):
    """What of a matrix runs."""

    def of_weight(self, w: Tensor) -> Tensor:
        """w: [..., out, in]. Raises ValueError for a packed weight, whose codes are not cut."""
        ...

    def of_rows(self, t: Tensor) -> Tensor:
        """What has a number for each row. t: [..., out]."""
        ...


class Prefix(NamedTuple):
    """The first rows, or the first columns, of a matrix [out, in] or of each in a stack."""

    rows: int | None = None  # of each group of rows; None: all
    columns: int | None = None
    groups: int = 1  # equal parts of the rows that are cut alike: 2 where gate and up are one

    def of_weight(self, w: Tensor) -> Tensor:
        """As `Part` says. Columns, and rows of one group, are a view; rows of more are copied."""
        _refuse_packed(w)
        if self.rows is not None:
            w = w.unflatten(-2, (self.groups, -1))[..., : self.rows, :].flatten(-3, -2)
        return w if self.columns is None else w[..., : self.columns]

    def of_rows(self, t: Tensor) -> Tensor:
        """As `Part` says."""
        if self.rows is None:
            return t
        return t.unflatten(-1, (self.groups, -1))[..., : self.rows].flatten(-2)


class Spans(NamedTuple):
    """Some spans of rows, one behind the other, with all of their columns. Copied."""

    ends: tuple[tuple[int, int], ...]  # start and end of each

    def of_weight(self, w: Tensor) -> Tensor:
        """As `Part` says."""
        _refuse_packed(w)
        return torch.cat([w[..., start:end, :] for start, end in self.ends], dim=-2)

    def of_rows(self, t: Tensor) -> Tensor:
        """As `Part` says."""
        return torch.cat([t[..., start:end] for start, end in self.ends], dim=-1)


def _refuse_packed(w: object) -> None:
    if not isinstance(w, Tensor):
        raise ValueError(
            "a packed weight does not run in part: extract the narrower model, then pack that"
        )


class Prefixes(NamedTuple):
    """What a narrower FFN takes of the leaf before its activation and of the one behind it."""

    inner: Prefix | None = None  # None: all of it
    down: Prefix | None = None


WHOLE = Prefixes()


def prefixes(width: int | None, hidden: int, *, groups: int = 1) -> Prefixes:
    """The parts of the leaves of an FFN that runs its first `width` hidden numbers alone.

    Args:
        width: None: all, as `hidden` is.
        hidden: F, how many there are.
        groups: rows of the first matrix by hidden number: 2 where gate and up are one.

    Raises:
        ValueError: for a width that the FFN does not have.
    """
    if width is None or width == hidden:
        return WHOLE
    if not 1 <= width <= hidden:
        raise ValueError(f"width must be in [1, {hidden}], what the layer has, got {width}")
    return Prefixes(Prefix(rows=width, groups=groups), Prefix(columns=width))


def default_widths(hidden: int) -> tuple[int, ...]:
    """MatFormer's granularities: an eighth, a quarter, a half and all, rounded down."""
    return tuple(hidden // part for part in (8, 4, 2, 1))


def check_widths(widths: tuple[int, ...], hidden: int) -> None:
    """Raise unless the widths rise strictly from 1 or more to `hidden`."""
    rising = all(a < b for a, b in pairwise(widths))
    if not widths or widths[0] < 1 or not rising or widths[-1] != hidden:
        raise ValueError(
            f"widths must rise strictly from 1 or more to the layer's width {hidden}, "
            f"got {list(widths)}"
        )
