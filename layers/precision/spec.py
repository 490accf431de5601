"""How one operand of one matmul is written: a frozen value that YAML can hold."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from layers.names import check_choice

HIGH_FORMATS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class QSpec:
    """One operand: a format by name (a row of `layers.precision.formats.FORMATS`) and its options.

    Blocks lie along the axis that the matmul sums over.
    """

    format: str
    scale_rule: str | None = None  # None: the format's first rule
    tile: Literal["1d", "2d"] = "1d"  # 2d: square tiles share a scale (NVFP4: 16 x 16)

    @property
    def is_high(self) -> bool:
        """Whether the operand is only cast, never scaled or put on a coarse grid."""
        return self.format in HIGH_FORMATS

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
        plain = {k: v for k, v in asdict(self).items() if v not in (None, "1d")}
        return self.format if len(plain) == 1 else plain
