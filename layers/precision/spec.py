"""How one operand of one matmul is written: a frozen value that YAML can hold."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from layers.names import check_choice

HIGH_FORMATS = ("fp32", "bf16")
Rounding = Literal["nearest", "stochastic", "eden"]
Signs = Literal["fixed", "step", "none"]


@dataclass(frozen=True, kw_only=True)
class QSpec:
    """One operand: a format by name (a row of `layers.precision.formats.FORMATS`) and its options.

    Blocks lie along the axis that the matmul sums over; so do the tiles that `hadamard` rotates.
    """

    format: str
    scale_rule: str | None = None  # None: the format's first rule
    tile: Literal["1d", "2d"] = "1d"  # 2d: square tiles share a scale (NVFP4: 16 x 16)
    scope: str | None = None  # what one float32 scale spans; None: the format's first
    rounding: Rounding = "nearest"  # of the elements; eden: nearest, and the scales stochastic
    hadamard: int = 0  # width of the rotated tiles, a power of two; 0: no rotation
    signs: Signs = "fixed"  # of the rotation; step: drawn anew each step, for both operands alike
    history: int = 1024  # scope delayed: steps whose largest magnitude counts
    margin: int = 0  # scope delayed: powers of two of headroom

    def __post_init__(self) -> None:
        check_choice("tile", self.tile, ("1d", "2d"))
        check_choice("rounding", self.rounding, get_args(Rounding))
        check_choice("signs", self.signs, get_args(Signs))
        d = self.hadamard
        if d and (d < 2 or d & (d - 1)):
            raise ValueError(f"hadamard must be 0 or a power of two from 2 on, got {d}")
        if d and self.is_high:
            raise ValueError(f"hadamard={d} has no place in the high format {self.format!r}")
        if self.history < 1:
            raise ValueError(f"history must be at least 1 step, got {self.history}")

    @property
    def is_high(self) -> bool:
        """Whether the operand is only cast, never scaled or put on a coarse grid."""
        return self.format in HIGH_FORMATS

    @property
    def is_random(self) -> bool:
        """Whether it draws from the random stream of its leaf."""
        return self.rounding != "nearest" or (self.hadamard > 0 and self.signs == "step")

    def but(self, **options: Any) -> "QSpec":
        """This spec with some options replaced. Unlike `dataclasses.replace` it compiles."""
        said = {name: getattr(self, name) for name in _FIELDS}
        return QSpec(**(said | options))

    @classmethod
    def of(cls, value: "QSpec | str | dict[str, Any]") -> "QSpec":
        """A spec from a format name, a mapping of fields, or a spec."""
        if isinstance(value, QSpec):
            return value
        if isinstance(value, str):
            return cls(format=value)
        known = [f.name for f in fields(cls)]
        for key in value:
            check_choice("option of a format", key, known)
        if "format" not in value:
            raise ValueError(f"a format's options need 'format', got {sorted(value)}")
        return cls(**value)

    def to_plain(self) -> str | dict[str, Any]:
        """The shortest plain value that `of` reads back."""
        usual = {f.name: f.default for f in fields(self)}
        plain = {k: v for k, v in asdict(self).items() if v != usual[k]}
        return self.format if len(plain) == 1 else plain


_FIELDS = tuple(f.name for f in fields(QSpec))
