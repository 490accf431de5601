"""What formats do to the operands of leaves: measured beside training, which they do not change.

Every operand is measured as it is quantised: rotated where its spec says so, with the scale, the
segments and the random stream of that very call (precision.md section 19, must-have 6).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from math import log10
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from layers.names import check_choice, unknown
from layers.precision.apply import block_of, leaves
from layers.precision.leaf import Leaf
from layers.precision.measure import measured
from layers.precision.operands import OPERANDS, LeafPrecision
from layers.precision.policy import Rule
from layers.precision.spec import QSpec


@dataclass(frozen=True, kw_only=True)
class Probed:
    """One operand of one leaf, summed over the calls that were probed.

    Rows that belong to no segment are left out; where experts' rows are rotated, the zero rows
    that fill their tiles count as elements.
    """

    leaf: str  # qualified name
    role: str
    operand: str  # of OPERANDS
    format: str
    elements: int = 0
    nonzero: int = 0  # of the elements, before
    clipped: int = 0  # beyond the largest value that the element can hold under its scale
    underflowed: int = 0  # of those that were not zero: zero afterwards
    nonfinite: int = 0  # infinite or NaN, before or after; in neither of the sums
    signal: float = 0.0  # sum of x^2, in float64
    noise: float = 0.0  # sum of (x - decoded x)^2
    # non-zero elements by the exponent of their block's scale: floor(log2); where blocks have no
    # scale, of the float32 scale; none for a format that is only a cast
    scales: dict[int, int] = field(default_factory=dict)

    @property
    def snr_db(self) -> float | None:
        """10 log10(signal / noise); None where there was no error, or nothing but zeros."""
        return 10 * log10(self.signal / self.noise) if self.signal and self.noise else None

    @property
    def clip_fraction(self) -> float:
        """Share of the elements that were clipped."""
        return self.clipped / max(self.elements, 1)

    @property
    def underflow_fraction(self) -> float:
        """Share of the non-zero elements that became zero."""
        return self.underflowed / max(self.nonzero, 1)

    def __add__(self, other: "Probed") -> "Probed":
        """Both together. They must be of the same leaf, operand and format."""
        sums = {k: getattr(self, k) + getattr(other, k) for k in _COUNTED}
        scales = dict(self.scales)
        for exponent, count in other.scales.items():
            scales[exponent] = scales.get(exponent, 0) + count
        return Probed(**{k: getattr(self, k) for k in _NAMING}, **sums, scales=scales)

    def to_plain(self) -> dict[str, Any]:
        """For JSON: the fields, and what follows from them for a reader."""
        plain = {key: getattr(self, key) for key in (*_NAMING, *_COUNTED, *_DERIVED)}
        return plain | {"scales": {str(e): self.scales[e] for e in sorted(self.scales)}}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Probed":
        """From what `to_plain` gave."""
        known = [f.name for f in fields(cls)]
        for key in plain:
            check_choice("field of a probed operand", key, (*known, *_DERIVED))
        scales = {int(e): n for e, n in plain.get("scales", {}).items()}
        return cls(**{k: plain[k] for k in (*_NAMING, *_COUNTED)}, scales=scales)


_NAMING = ("leaf", "role", "operand", "format")
_COUNTED = ("elements", "nonzero", "clipped", "underflowed", "nonfinite", "signal", "noise")
_DERIVED = ("snr_db", "clip_fraction", "underflow_fraction")


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """What was measured: one row for each leaf and operand, in the order of the module."""

    operands: tuple[Probed, ...]

    def to_plain(self) -> dict[str, Any]:
        """The plain mapping that `of` reads back, for JSON."""
        return {"operands": [row.to_plain() for row in self.operands]}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "ProbeReport":
        """From what `to_plain` gave."""
        return cls(operands=tuple(Probed.of(row) for row in plain["operands"]))

    def __str__(self) -> str:
        head = f"{'leaf':32s} {'operand':9s} {'format':11s} {'SNR dB':>7s} {'clip':>8s} underflow"
        rows = [
            f"{r.leaf:32s} {r.operand:9s} {r.format:11s} "
            f"{'exact' if r.snr_db is None else f'{r.snr_db:.2f}':>7s} "
            f"{r.clip_fraction:8.3%} {r.underflow_fraction:9.3%}"
            for r in self.operands
        ]
        return "\n".join([head, *rows])


class Probe:
    """What `probing` collects; `report` may be asked at any time."""

    def __init__(self, chosen: Mapping[str, Leaf], operands: Iterable[str]):
        self.chosen, self.operands = chosen, tuple(operands)
        self.open = True
        self._found: dict[tuple[str, str, str], Probed] = {}

    def observer(self, name: str, role: str) -> Callable[..., None]:
        """What the leaf of that name calls just before it quantises an operand."""

        def observe(
            operand: str, x: Tensor, spec: QSpec, axis: int, given: Mapping[str, Any]
        ) -> None:
            # compiling, or run eagerly from inside a compiled function
            if torch.compiler.is_compiling() or get_eval_frame_callback() is not None:
                what = name or "the leaf"
                raise ValueError(f"{what} is compiled, and probes work in eager mode only")
            if not self.open or operand not in self.operands:
                return  # a backward pass may come after the block has ended
            new = Probed(
                leaf=name, role=role, operand=operand, format=spec.format,
                **measured(x, spec, axis, OPERANDS.index(operand), **given),
            )  # fmt: skip
            key = (name, operand, spec.format)
            self._found[key] = self._found[key] + new if key in self._found else new

        return observe

    def report(self) -> ProbeReport:
        """Everything seen so far."""
        order = {name: i for i, name in enumerate(self.chosen)}
        rows = sorted(
            self._found.values(), key=lambda r: (order[r.leaf], OPERANDS.index(r.operand))
        )
        return ProbeReport(operands=tuple(rows))


@contextmanager
def probing(
    module: nn.Module,
    where: str = "*",
    roles: Iterable[str] = (),
    operands: Iterable[str] = OPERANDS,
    layers: str | None = None,
) -> Iterator[Probe]:
    """Measure the operands of the chosen leaves at every forward and backward of the block.

    Calls add up, so micro-batches may follow one another; a recomputed forward counts twice, which
    changes no ratio. Nothing that is trained changes: the same bits with and without. A leaf that
    only casts quantises nothing and is not measured.

    Args:
        module: any module with leaves, not compiled.
        where: glob over the leaves' qualified names, as in a rule of a policy.
        roles: those of the leaves; empty: any.
        operands: of `OPERANDS`.
        layers: blocks, as in a rule ("last 15%"); None: any, and what is in none.

    Yields:
        A `Probe`; its `report()` may be asked inside the block or after.

    Raises:
        ValueError: when nothing matches, an operand is unknown, a leaf is already probed, or the
            module is compiled.
    """
    operands = (operands,) if isinstance(operands, str) else tuple(operands)
    for operand in operands:
        check_choice("operand", operand, OPERANDS)
    chosen = chosen_leaves(module, where, roles, layers)
    _refuse(module, chosen)
    probe = Probe(chosen, operands)
    try:
        for name, leaf in chosen.items():
            leaf.observer = probe.observer(name, leaf.role)
        yield probe
    finally:
        probe.open = False
        for leaf in chosen.values():
            leaf.__dict__.pop("observer", None)


def chosen_leaves(
    module: nn.Module, where: str = "*", roles: Iterable[str] = (), layers: str | None = None
) -> dict[str, Leaf]:
    """The leaves that the selectors of a rule match, by name. Raises ValueError where none does."""
    roles = (roles,) if isinstance(roles, str) else tuple(roles)
    rule = Rule(use=LeafPrecision.of("fp32"), roles=roles, name=where, layers=layers)
    named = leaves(module)
    there = {leaf.role for leaf in named.values()}
    for role in roles:
        if role not in there:
            raise unknown("role to probe", role, there)
    blocks = {name: block_of(name) for name in named}
    n_layers = 1 + max((b for b in blocks.values() if b is not None), default=-1)
    found = {
        name: leaf
        for name, leaf in named.items()
        if rule.matches(name=name, role=leaf.role, layer=blocks[name], n_layers=n_layers)
    }
    if not found:
        raise ValueError(
            f"where={where!r}, roles={list(roles)}, layers={layers!r} match no leaf, so nothing "
            f"would be probed. Leaves: {', '.join(named) or 'none'}"
        )
    return found


def _refuse(module: nn.Module, chosen: Mapping[str, Leaf]) -> None:
    for name, part in module.named_modules():
        if part._compiled_call_impl is not None or "_orig_mod" in part._modules:
            what = name or type(part).__name__
            raise ValueError(f"{what} is compiled, and probes work in eager mode only")
    for name, leaf in chosen.items():
        if leaf.observer is not None:
            raise ValueError(f"{name or 'the leaf'} is already probed: end that block first")
