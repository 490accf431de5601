"""Number formats by name, and specs resolved against them.

`FORMATS` are this package's rows. Other packages add theirs with `register_format`, or through the
entry-point group that variants use, whose objects may be a `Format` or hold some. So look formats
up with `format_of`, and list them with `every_format`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

from layers.names import check_choice, unknown
from layers.precision.row import Format
from layers.precision.rows import FORMATS
from layers.precision.spec import QSpec

__all__ = [
    "FORMATS",
    "Format",
    "Resolved",
    "check_spec",
    "every_format",
    "format_of",
    "register_format",
    "resolve",
    "storage_bits",
]

ENTRY_POINTS = "moe_zoo.entries"  # as zoo.registry reads it
_table: dict[str, Format] = {row.name: row for row in FORMATS}


def register_format(row: Format) -> Format:
    """Add a row for the rest of the process, and hand it back.

    Do so where the package is imported, before a model that names it is compiled.

    Raises:
        ValueError: when there is a format of that name.
    """
    if row.name in _table:
        raise ValueError(f"two formats are named {row.name!r}: rename one")
    _table[row.name] = row
    return row


@cache
def _read_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        loaded = point.load()
        for row in loaded if isinstance(loaded, Iterable) else (loaded,):
            if isinstance(row, Format):
                register_format(row)


def every_format() -> tuple[Format, ...]:
    """Every row, other packages' included."""
    _read_entry_points()
    return tuple(_table.values())


def format_of(name: str) -> Format:
    """The row of that name. Raises ValueError with the nearest one."""
    if name not in _table:
        _read_entry_points()
    if name not in _table:
        raise unknown("format", name, _table)
    return _table[name]


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A spec with its row, and every option that it left open settled."""

    spec: QSpec
    row: Format
    rule: str  # "" where the row has none
    scope: str  # "" where the row has none

    @property
    def exact_in_bf16(self) -> bool:
        """Whether bfloat16 holds the values that `quantize` returns."""
        own_scale = self.scope == "block" and self.rule != "p2"
        return self.row.exact_in_bf16 and self.rule not in self.row.inexact_rules and not own_scale

    @property
    def given_scale(self) -> bool:
        """Whether the float32 scale comes from the leaf instead of from the tensor."""
        return self.scope in ("static", "delayed")


def resolve(spec: QSpec) -> Resolved:
    """A spec with its row. Raises ValueError on what the format lacks, with the nearest name."""
    row = format_of(spec.format)
    if spec.scale_rule is not None:
        check_choice(f"scale rule of {row.name}", spec.scale_rule, row.scale_rules)
    check_choice(f"tile of {row.name}", spec.tile, row.tiles)
    check_choice(f"rounding of {row.name}", spec.rounding, row.roundings)
    if spec.scope is not None:
        check_choice(f"scope of {row.name}", spec.scope, row.scopes)
    first = row.scale_rules[0] if row.scale_rules else ""
    rule = spec.scale_rule or ("eden" if spec.rounding == "eden" else first)
    scope = spec.scope or (row.scopes[0] if row.scopes else "")
    _check_together(spec, row, rule, scope)
    return Resolved(spec=spec, row=row, rule=rule, scope=scope)


def _check_together(spec: QSpec, row: Format, rule: str, scope: str) -> None:
    """Options that exist but exclude one another."""
    if scope == "row" and spec.tile == "2d":
        raise ValueError(f"{row.name}: a scale by row cannot span the rows of a tile: say tile 1d")
    if rule == "mask" and spec.rounding != "nearest":
        raise ValueError(f"{row.name}: rule mask cuts digits off, so it takes no {spec.rounding}")
    if spec.rounding != "eden":
        return
    if rule != "eden":
        raise ValueError(
            f"rounding eden leaves room in its scales: say scale_rule eden, not {rule}"
        )
    if spec.tile == "2d":
        raise ValueError("rounding eden corrects the tiles of a rotation along rows: say tile 1d")
    if spec.hadamard < row.block:
        raise ValueError(
            f"rounding eden is unbiased over rotations: hadamard must be at least {row.block}, "
            f"got {spec.hadamard}"
        )


def check_spec(spec: QSpec) -> None:
    """Raise ValueError, with the nearest name, unless the format and all its options exist."""
    resolve(spec)


def storage_bits(spec: QSpec) -> float:
    """Bits per number in store, block scales included; a tensor's or row's scale does not count."""
    r = resolve(spec)
    if r.scope != "block":
        return r.row.bits
    return r.row.bits + 32 / r.row.block ** (2 if spec.tile == "2d" else 1)
