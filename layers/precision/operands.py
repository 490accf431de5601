"""The six operands of one leaf, each in a format (precision.md 10).

With y[M, N] = x[M, K] w[N, K]^T: fprop multiplies x and w, dgrad multiplies dy and w, wgrad
multiplies dy and x. Each operand is written along the axis that its matmul sums over; gradients
pass straight through the rounding.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from layers.names import check_choice
from layers.precision.formats import check_spec, resolve
from layers.precision.spec import HIGH_FORMATS, QSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

OPERANDS = ("fprop_x", "fprop_w", "dgrad_dy", "dgrad_w", "wgrad_dy", "wgrad_x")
BACKENDS = ("emulated", "hardware")
GEMMS = {"fprop": OPERANDS[0:2], "dgrad": OPERANDS[2:4], "wgrad": OPERANDS[4:6]}


_DERIVED: dict[str, Any] = {"init": False, "repr": False, "compare": False}


@dataclass(frozen=True, kw_only=True)
class LeafPrecision:
    """The six operands of one leaf.

    A `ValueTable` reads its rows through `fprop_w` alone, never rotated: a look-up has no second
    operand to cancel a rotation.
    """

    fprop_x: QSpec
    fprop_w: QSpec
    dgrad_dy: QSpec
    dgrad_w: QSpec
    wgrad_dy: QSpec
    wgrad_x: QSpec
    compute: Literal["bf16", "fp32"] = "bf16"  # decoded operands are multiplied and handed on in it
    # what the backward pass quantises: the tensors themselves, or what the forward made of them
    saved: Literal["original", "quantized"] = "original"
    # whose gradient passes the rounding: every value's, or none where a value was clipped
    straight_through: Literal["all", "unclipped"] = "all"
    # who multiplies low operands: matmuls of decoded ones, or the device's scaled instructions
    backend: Literal["emulated", "hardware"] = "emulated"

    # what is asked at every call of a leaf, worked out once; a cached property does not compile
    is_cast: bool = field(**_DERIVED)  # whether every operand is only cast to `compute`
    is_random: bool = field(**_DERIVED)  # whether an operand draws from the leaf's random stream
    given_scales: tuple[str, ...] = field(**_DERIVED)  # operands whose float32 scale the leaf holds
    row_spec: QSpec = field(**_DERIVED)  # of a looked-up row: `fprop_w`, by itself and not rotated
    _product_dtypes: dict[str, torch.dtype] = field(**_DERIVED)

    def __post_init__(self) -> None:
        check_choice("compute dtype", self.compute, DTYPES)
        check_choice("saved", self.saved, ("original", "quantized"))
        check_choice("backend", self.backend, BACKENDS)
        check_choice("straight_through", self.straight_through, ("all", "unclipped"))
        if self.straight_through == "unclipped" and self.saved != "quantized":
            raise ValueError("straight_through 'unclipped' needs saved 'quantized': it masks those")
        for operand in OPERANDS:
            check_spec(getattr(self, operand))
        for gemm in GEMMS:
            a, b = (getattr(self, operand) for operand in GEMMS[gemm])
            if (a.hadamard, a.signs) != (b.hadamard, b.signs) and (a.hadamard or b.hadamard):
                raise ValueError(
                    f"{gemm} rotates its operands differently ({a.hadamard} {a.signs}, "
                    f"{b.hadamard} {b.signs}): give both the same hadamard and signs"
                )
        for name, value in self._derive().items():
            object.__setattr__(self, name, value)

    def _derive(self) -> dict[str, Any]:
        specs = {o: getattr(self, o) for o in OPERANDS}
        exact = {gemm: all(resolve(specs[o]).exact_in_bf16 for o in GEMMS[gemm]) for gemm in GEMMS}
        return {
            "is_cast": all(spec == QSpec(format=self.compute) for spec in specs.values()),
            "is_random": any(spec.is_random for spec in specs.values()),
            "given_scales": tuple(o for o in OPERANDS if resolve(specs[o]).given_scale),
            "row_spec": self.fprop_w.but(hadamard=0, tile="1d"),
            "_product_dtypes": {g: self.dtype if exact[g] else torch.float32 for g in GEMMS},
        }

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which decoded operands are multiplied and results handed on."""
        return DTYPES[self.compute]

    def product_dtype(self, gemm: str) -> torch.dtype:
        """In which decoded operands are multiplied: float32 where bfloat16 would round one."""
        return self._product_dtypes[gemm]

    def replacing(self, gemms: tuple[str, ...], by: "LeafPrecision") -> "LeafPrecision":
        """This one with the operands of some matmuls taken from another."""
        if set(gemms) == set(GEMMS):
            return by
        taken = {o: getattr(by, o) for gemm in gemms for o in GEMMS[gemm]}
        return replace(self, **taken)

    @property
    def label(self) -> str:
        """One word where all operands share a format, all formats otherwise."""
        return "/".join(dict.fromkeys(getattr(self, o).format for o in OPERANDS))

    @classmethod
    def of(cls, value: Any) -> "LeafPrecision":
        """From a format name (all six operands), a mapping, or a LeafPrecision.

        A mapping may give `all` for the operands that it does not name.
        """
        if isinstance(value, LeafPrecision):
            return value
        given: dict[str, Any] = {"all": value} if isinstance(value, str) else dict(value)
        others = ("compute", "saved", "straight_through", "backend")
        allowed = ("all", *others, *OPERANDS)
        for key in given:
            check_choice("field of a leaf's precision", key, allowed)
        rest = given.pop("all", None)
        said = {key: given.pop(key) for key in others if key in given}
        missing = [o for o in OPERANDS if o not in given]
        if rest is None and missing:
            raise ValueError(f"a leaf's precision lacks {', '.join(missing)}: name them, or 'all'")
        specs = {o: QSpec.of(given.get(o, rest)) for o in OPERANDS}  # pyright: ignore
        said.setdefault("compute", rest if rest in HIGH_FORMATS else "bf16")
        return cls(**said, **specs)  # pyright: ignore[reportArgumentType] # checked by itself

    def to_plain(self) -> str | dict[str, Any]:
        """The shortest plain value that `of` reads back."""
        specs = {o: getattr(self, o).to_plain() for o in OPERANDS}
        first = specs["fprop_x"]
        same = all(spec == first for spec in specs.values())
        plain: dict[str, Any] = {"all": first} if same else specs
        usual = first if same and first in HIGH_FORMATS else "bf16"
        rest = {"compute": usual, "saved": "original", "straight_through": "all"}
        rest |= {"backend": "emulated"}
        said = {key: getattr(self, key) for key in rest if getattr(self, key) != rest[key]}
        if said:
            return plain | said
        return first if same and isinstance(first, str) else plain
