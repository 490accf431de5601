"""What each method of post-training quantisation may be told: plain values, checked at once."""

from dataclasses import dataclass, field
from typing import Any, Literal

from layers.names import check_choice, check_positive, unknown
from layers.posttraining.candidates import SearchOptions
from layers.posttraining.group_scales import CONSTRAINTS, ROWS
from layers.posttraining.real_bias import SmallFloat, formats
from layers.precision.formats import format_of, resolve
from layers.precision.spec import HIGH_FORMATS, QSpec


@dataclass(frozen=True, kw_only=True)
class Rtn:
    """Round to nearest in any format of the registry; no calibration."""

    format: Any = "nvfp4"  # of the weights: a name, or options as in a policy
    activations: Any = None  # of the inputs; None: the same; bf16 or fp32: left as they are

    def __post_init__(self) -> None:
        for spec in (self.weight_spec, self.input_spec):
            if resolve(spec).given_scale or spec.is_random or spec.hadamard:
                raise ValueError(
                    f"rtn takes no static or delayed scale, no random rounding and no rotation, "
                    f"got {spec.to_plain()}"
                )

    @property
    def weight_spec(self) -> QSpec:
        """Of the weights."""
        return _spec(self.format)

    @property
    def input_spec(self) -> QSpec:
        """Of the inputs."""
        return self.weight_spec if self.activations is None else _spec(self.activations)


@dataclass(frozen=True, kw_only=True)
class LlmFp4:
    """LLM-FP4 (arXiv:2310.16836; precision.md 13.1): searched formats, biases and pre-shifts.

    A format is one by name ("fp4_e2m1") or all of as many bits ("fp4").
    """

    format: str = "fp4"  # of the weights, 3 to 8 bits
    activations: str = "fp4"  # of the inputs; bf16 or fp32: left as they are
    scaling: Literal["max", "release"] = "max"  # what a candidate scales: see search.SCALINGS
    shift: Literal["channel", "none"] = "channel"
    rounds: int = 3

    def __post_init__(self) -> None:
        self.options()

    def options(self) -> SearchOptions:
        """As the search takes them."""
        weights, inputs = named(self.format), ()
        if self.activations not in HIGH_FORMATS:
            inputs = tuple(f for f in named(self.activations) if has_row(f))
            if not inputs:
                raise ValueError(f"no format of inputs has the values of {self.activations!r}")
        return SearchOptions(
            weight_formats=weights, input_formats=inputs, scaling=self.scaling,
            shift=self.shift, rounds=self.rounds,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ZeroQuantFp:
    """ZeroQuant-FP (arXiv:2307.09782; precision.md 13.2): W4A8 with GPTQ and LoRC.

    The size of a group and M2's number of rows are ours; the paper's were not found.
    """

    format: str = "fp4_e2m1"  # of the weights
    activations: Any = field(default_factory=lambda: {"format": "fp8_e4m3", "scope": "row"})
    group: int = 64  # weights along the input that share a scale
    scales: Literal["free", "m1", "m2", "m2_up"] = "m2_up"  # see group_scales.fit_scales
    rows: int = ROWS  # that M2 ties together
    rounding: Literal["gptq", "nearest"] = "gptq"
    damping: float = 0.01
    rank: int = 8  # of LoRC; 0: none

    def __post_init__(self) -> None:
        check_positive(group=self.group, rows=self.rows, damping=self.damping)
        check_choice("scales", self.scales, CONSTRAINTS)
        if self.rank < 0:
            raise ValueError(f"rank must be 0 (no LoRC) or more, got {self.rank}")
        if len(named(self.format)) != 1:
            raise ValueError(f"zeroquant_fp takes one format by name, got {self.format!r}")
        spec = self.input_spec
        if resolve(spec).given_scale or spec.is_random or spec.hadamard:
            raise ValueError(f"activations take scales of their own, got {spec.to_plain()}")

    @property
    def input_spec(self) -> QSpec:
        """Of the inputs: a scale for each token unless said otherwise."""
        return _spec(self.activations)


def named(name: str) -> tuple[SmallFloat, ...]:
    """The formats that "fp4" or "fp4_e2m1" means."""
    every = {f.name: f for bits in range(3, 9) for f in formats(bits)}
    if name in every:
        return (every[name],)
    found = tuple(f for f in every.values() if f.name.startswith(f"{name}_"))
    if not found:
        raise unknown("format", name, [*every, *(f"fp{bits}" for bits in range(3, 9))])
    return found


def has_row(fmt: SmallFloat) -> bool:
    """Whether the registry can write inputs in it: the same values under a static scale."""
    try:
        row = format_of(fmt.name)
    except ValueError:
        return False
    if row.grid is None or "static" not in row.scopes:
        return False
    same = (row.grid.exponent_bits, row.grid.mantissa_bits) == (
        fmt.exponent_bits,
        fmt.mantissa_bits,
    )
    full = row.grid.largest * 2.0**row.grid.bias == fmt.standard_largest * 2.0**fmt.standard_bias
    return same and full


def _spec(value: Any) -> QSpec:
    if not isinstance(value, str | dict):
        raise ValueError(f"a format is a name or a mapping of its options, got {value!r}")
    return QSpec.of(value)
