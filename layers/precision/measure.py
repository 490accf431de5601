"""What a format does to one operand: counts and sums, by its definition, elements and scales apart.

The values are those that `quantize` makes, for it and this read the same parts.
"""

from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layers.precision.define import blocks_of, define_parts
from layers.precision.formats import Resolved, resolve
from layers.precision.grids import FLOAT_MAX
from layers.precision.layout import segments_of
from layers.precision.quantize import rotated
from layers.precision.random import uniform
from layers.precision.spec import QSpec

# a value that only the float32 rounding of its scale puts beyond the grid is not called clipped
ROUNDING = 2.0**-20
LEAST_EXPONENT = -149  # of a float32 above zero


class Parts(NamedTuple):
    """An operand beside what its format makes of it; all of one shape, without loose rows."""

    x: Tensor  # float64, rotated where the spec says so
    decoded: Tensor  # float64, every scale included
    at_top: Tensor  # bool: the element is the largest of its grid
    scale: Tensor | None  # float32: of the block, else the one above; None: only a cast


@torch.no_grad()
def measured(
    x: Tensor, spec: QSpec, axis: int, operand: int, *, ends: Tensor | None, key: Tensor | None,
    scale: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """Counts and float64 sums of one operand; the arguments are those of `quantize`.

    Returns:
        elements, nonzero, clipped, underflowed, nonfinite (counts), signal, noise (sums of x^2 and
        of the squared error) and scales ({exponent: non-zero elements under such a scale}).
    """
    x, decoded, at_top, scales = parts_of(x, spec, axis, operand, ends, key, scale)
    nonzero = x != 0
    clipped = at_top & (decoded != 0) & (x.abs() > decoded.abs() * (1 + ROUNDING))
    counts = {
        "elements": x.numel(),
        "nonzero": int(nonzero.sum()),
        "clipped": int(clipped.sum()),
        "underflowed": int((nonzero & (decoded == 0)).sum()),
        "scales": {} if scales is None else _exponents(scales[nonzero]),
    }
    signal, noise = _square_sum(x), _square_sum(x - decoded)
    if isfinite(signal) and isfinite(noise):
        return counts | {"nonfinite": 0, "signal": signal, "noise": noise}
    finite = x.isfinite() & decoded.isfinite()
    signal, noise = _square_sum(x[finite]), _square_sum((x - decoded)[finite])
    return counts | {"nonfinite": int((~finite).sum()), "signal": signal, "noise": noise}


def _square_sum(x: Tensor) -> float:
    x = x.reshape(-1)
    return float(torch.dot(x, x))


def parts_of(
    x: Tensor, spec: QSpec, axis: int, operand: int, ends: Tensor | None, key: Tensor | None,
    scale: Tensor | None,
) -> Parts:  # fmt: skip
    """The operand and what `quantize` makes of it. Rows past the last end are left out."""
    r = resolve(spec)
    x = x.detach()
    n_rows = x.shape[-2] if ends is None else int(ends[-1]) if len(ends) else 0
    if r.row.dtype is not None or x.numel() == 0:
        exact = x[..., :n_rows, :]
        decoded = exact if r.row.dtype is None else exact.to(r.row.dtype)
        never = torch.zeros_like(exact, dtype=torch.bool)
        return Parts(exact.double(), decoded.double(), never, None)
    x, moved = x.float(), None
    if spec.hadamard:
        x, moved = rotated(x, spec, axis, ends, key, operand // 2)
        n_rows = n_rows if ends is not None else x.shape[-2]  # whole tiles
    if moved is not None:
        ends, n_rows = moved, int(moved[-1])
    return _decoded(x, r, axis, operand, ends, key, scale, n_rows)


def _decoded(
    x: Tensor, r: Resolved, axis: int, operand: int, ends: Tensor | None, key: Tensor | None,
    scale: Tensor | None, n_rows: int,
) -> Parts:  # fmt: skip
    """x: [R, C] or [E, R, C] float32, already rotated."""
    noise = None
    if r.spec.rounding != "nearest":
        assert key is not None
        noise = uniform(key, operand, x.shape)
    (elements, block), upper = define_parts(x, r, blocks_of(r, axis), axis, ends, noise, scale)
    at_top = elements.abs() >= _top(r, elements)
    decoded = elements.double() if block is None else elements.double() * block.double()
    above = None if upper is None else _spread(upper, x, ends)
    x, decoded, at_top = (t[..., :n_rows, :] for t in (x, decoded, at_top))
    if above is not None:
        above = above[..., :n_rows, :].expand(x.shape)
        decoded = decoded * above.double()
    scales = above if block is None else block[..., :n_rows, :]
    return Parts(x.double(), decoded, at_top, scales)


def _top(r: Resolved, elements: Tensor) -> float:
    """The largest magnitude of an element; infinite where a format without scales overflows."""
    if r.row.cast is None:
        return r.row.top
    return float(r.row.cast(elements.new_full((1,), FLOAT_MAX), r.rule, None))


def _spread(upper: Tensor, x: Tensor, ends: Tensor | None) -> Tensor:
    """The float32 scale of every row and column, in a shape that expands to x's.

    upper: as `define_parts` returns it: [S], [S, R, 1] or [S, 1, C]; with ends [E], [R, 1] or
    [E, 1, C].
    """
    if ends is None:
        upper = upper[:, None, None] if upper.dim() == 1 else upper
        upper = upper if x.dim() == 3 else upper.squeeze(0)
        return upper.expand(x.shape)
    if upper.dim() == 2:
        return upper
    segment = segments_of(ends.to(torch.int64), x.shape[0]).clamp(max=len(ends) - 1)
    rows = upper[segment]
    return rows[:, None] if rows.dim() == 1 else rows.squeeze(1)


def _exponents(scales: Tensor) -> dict[int, int]:
    """How often each floor(log2) occurs; zeros, infinities and NaN have none. scales: float32."""
    usable = scales[(scales > 0) & scales.isfinite()]
    counts = (usable.frexp().exponent - 1 - LEAST_EXPONENT).bincount()
    found = counts.nonzero().flatten()
    exponents = (found + LEAST_EXPONENT).tolist()
    return dict(zip(exponents, counts[found].tolist(), strict=True))
