"""The methods of post-training quantisation by name: what each makes of one leaf.

A method is a row of `METHODS`. The weight that it returns is already rounded; how inputs are
rounded at run time is a format like any other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layers.names import unknown
from layers.posttraining.calibration import share_rows
from layers.posttraining.correction import Correction
from layers.posttraining.gptq import gptq, hessian, round_groups
from layers.posttraining.group_scales import group_fit
from layers.posttraining.lorc import low_rank
from layers.posttraining.options import LlmFp4, Rtn, ZeroQuantFp, named
from layers.posttraining.outcome import Outcome
from layers.posttraining.search import fold, search, search_rows
from layers.precision.formats import format_of, resolve, storage_bits
from layers.precision.quantize import quantize
from layers.precision.spec import QSpec

SCALE_BITS = 32


def _rtn(weight: Tensor, rows: list[Tensor], options: Rtn, is_table: bool) -> Outcome:
    spec = options.weight_spec
    values = _rounded(weight, spec, is_table)
    # most formats give their own values back, so the leaf may name the format and be packed
    same = torch.equal(_rounded(values, spec, is_table), values)
    r = resolve(spec)
    spans = {"row": weight.shape[-1], "block": r.row.block ** (2 if spec.tile == "2d" else 1)}
    return Outcome(
        weight=values,
        weights=None if spec.is_high or not same else spec,
        inputs=None if is_table or options.input_spec.is_high else options.input_spec,
        bits=storage_bits(spec) + SCALE_BITS / spans.get(r.scope, float("inf")),
        format=spec.format,
    )


def _rounded(weight: Tensor, spec: QSpec, is_table: bool) -> Tensor:
    """The weight in a format, all scales included, as a leaf would read it: a table by rows."""
    ends = torch.arange(1, len(weight) + 1) if is_table else None
    values, scale, _ = quantize(weight, spec, axis=-1, dtype=torch.float32, ends=ends)
    if scale is None:
        return values
    if scale.dim() < values.dim():
        scale = scale.reshape(-1, *[1] * (values.dim() - 1))
    return values * scale


def _llm_fp4(weight: Tensor, rows: list[Tensor], options: LlmFp4, is_table: bool) -> Outcome:
    wanted, n_in = options.options(), weight.shape[-1]
    if is_table:
        values, fmt, _ = search_rows(weight, wanted)
        return Outcome(weight=values, bits=fmt.bits + SCALE_BITS / n_in, format=fmt.name)
    stack = weight if weight.dim() == 3 else weight[None]
    found = search(stack, share_rows(rows), wanted)
    fmt, spec, scale, correction = found.input_format, None, None, None
    bits = found.weight_format.bits + SCALE_BITS / n_in
    if fmt is not None:
        spec = QSpec(format=fmt.name, scope="static")
        grid = format_of(fmt.name).grid
        assert grid is not None
        scale = fmt.largest(found.input_bias) / grid.largest
        scale = scale if weight.dim() == 3 else scale[0]
    if found.shift.any():
        assert fmt is not None
        shift = torch.exp2(found.shift)
        correction = Correction(shift=shift if weight.dim() == 3 else shift[0])
        bits += fmt.exponent_bits / weight.shape[-2]
    return Outcome(
        weight=fold(found.weight, found.shift).reshape(weight.shape),
        inputs=spec,
        bits=bits,
        format=found.weight_format.name,
        input_scale=scale,
        correction=correction,
    )


def _zeroquant_fp(
    weight: Tensor, rows: list[Tensor], options: ZeroQuantFp, is_table: bool
) -> Outcome:
    (grid,), group = named(options.format), min(options.group, weight.shape[-1])
    fit = group_fit(grid, options.scales, options.rows)
    # a constrained scale is an exponent, of M2 beside one real factor for several rows
    shared = {"free": SCALE_BITS, "m1": 8}.get(options.scales, 8 + SCALE_BITS / options.rows)
    bits = grid.bits + shared / group
    if is_table:
        return Outcome(weight=round_groups(weight, fit, group), bits=bits, format=grid.name)
    stack = weight if weight.dim() == 3 else weight[None]
    if options.rounding == "gptq":
        done = [
            gptq(w, hessian(x), fit, group=group, damping=options.damping)
            for w, x in zip(stack, share_rows(rows), strict=True)
        ]
    else:
        done = [round_groups(w, fit, group) for w in stack]
    values, correction = torch.stack(done).reshape(weight.shape), None
    if options.rank:
        a, b = (t.bfloat16() for t in low_rank(weight - values, options.rank))
        correction = Correction(a=a, b=b)
        bits += 16 * (a.numel() + b.numel()) / weight.numel()
    inputs = None if options.input_spec.is_high else options.input_spec
    return Outcome(weight=values, inputs=inputs, bits=bits, format=grid.name, correction=correction)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row: a method, its options, and what it does to a leaf."""

    name: str
    options: type
    # weight [N, K], [E, N, K] or, of a table, [M, D], float32; the inputs of each matrix; options
    quantize: Callable[[Tensor, list[Tensor], Any, bool], Outcome]


METHODS: tuple[Method, ...] = (
    Method(name="rtn", options=Rtn, quantize=_rtn),
    Method(name="llm_fp4", options=LlmFp4, quantize=_llm_fp4),
    Method(name="zeroquant_fp", options=ZeroQuantFp, quantize=_zeroquant_fp),
)


def method_of(name: str) -> Method:
    """The row of that name. Raises ValueError with the nearest one."""
    for row in METHODS:
        if row.name == name:
            return row
    raise unknown("method of quantisation", name, [row.name for row in METHODS])
