"""A few tokens through the neurons that each of them runs, in one call of spark_decode.cpp.

Decoding is bound by reading weights: the predictor once, then the rows of the chosen neurons where
they lie. torch's own products of a single row read at a half (bfloat16) to nine tenths (float32) of
what one thread can (benchmarks/spark.md), and it copies rows before it multiplies them.
"""

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from layers.linear import Linear
from layers.native import Source

KERNEL = Source(Path(__file__).with_name("spark_decode.cpp"), ("-ffp-contract=fast", "-Wno-psabi"))
ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "silu": 2, "relu": 3}  # enum Activation
DTYPES = (torch.float32, torch.bfloat16)  # what spark_decode.cpp reads and writes
PLAIN = (nn.Parameter, Tensor)  # no tensor that stands for another, as DTensor does
# By what is computed in, on a CPU (benchmarks/spark.md): rows that all tokens read together, as a
# share of the neurons, up to which this takes less time than all neurons, whatever the density; and
# tokens up to which the predictor is read here rather than by its leaf.
NATIVE_UP_TO = {torch.float32: 10.0, torch.bfloat16: 2.5}
PREDICTOR_UP_TO = {torch.float32: 16, torch.bfloat16: 4}
NUMBERS_PER_THREAD = 1 << 20  # of the predictor, some 0.2 ms of reading


class Job(ctypes.Structure):
    """One call: struct MoeZooSparkTokens of spark_decode.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "predictor", "scores", "up", "down", "y")),
        ("active", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tokens", "d_model", "d_ff", "r", "d_value")),
        *((name, ctypes.c_float) for name in ("z", "huber")),
        *((name, ctypes.c_int32) for name in ("chosen", "x_bf16", "stored_bf16", "in_bf16")),
        *((name, ctypes.c_int32) for name in ("activation", "threads")),
    )


class Threshold(NamedTuple):
    """Where a token's neurons begin: z deviations above the mean of its scores."""

    z: float
    huber: float = 0.0  # as `layers.statistical_topk.above` has it


def native_dtype(x: Tensor, *leaves: Linear) -> torch.dtype | None:
    """What `run_tokens` would compute in, rounding where torch would.

    None where torch has to do it: no compiler, leaves that do more than cast or differ in what they
    cast to, other dtypes and kinds of tensors, hooks or modes that would miss what is passed over.
    """
    if any(type(t) not in PLAIN or not t.is_cpu for t in (x, *(leaf.weight for leaf in leaves))):
        return None
    first = leaves[0]
    computes, stored = _compute_dtype(x.dtype, first), first.weight.dtype
    if computes not in DTYPES or stored not in DTYPES or x.dtype not in DTYPES:
        return None
    for leaf in leaves:
        if leaf.weight.dtype != stored or leaf.bias is not None:
            return None
        if leaf.observer is not None or leaf._forward_hooks or leaf._forward_pre_hooks:
            return None
        if leaf.correction is not None or _compute_dtype(x.dtype, leaf) != computes:
            return None
        if leaf.precision is None and computes != stored and not torch.is_autocast_enabled("cpu"):
            return None  # which torch refuses
    up, down = leaves[-2:]
    lie = first.weight.is_contiguous() and up.weight.is_contiguous()
    if not (lie and down.weight.t().is_contiguous()):
        return None
    return None if is_in_torch_dispatch_mode() or not KERNEL.wanted() else computes


def _compute_dtype(given: torch.dtype, leaf: Linear) -> torch.dtype | None:
    """That of a leaf which only casts what it is given; None for one that does more."""
    p = leaf.precision
    if p is not None and not p.is_cast:
        return None
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return given if p is None else p.dtype


def run_tokens(
    x: Tensor, computes: torch.dtype, predictor: Linear, up: Linear, down: Linear, activation: str,
    how: Threshold | None, scores: Tensor | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """`down(act(select(predictor(q1))) * up(q2))` by the neurons that are selected.

    Args:
        x: [T, D], T >= 1: q1 is its first numbers, as many as the predictor reads, q2 its last.
        computes: of `native_dtype`.
        predictor, up, down: weights [F, r], [F, D'] and, by neuron, [D, F].
        activation: a key of ACTIVATIONS.
        how: what selects; None: `scores` are selected already, 0 where a neuron does not run.
        scores: [T, F] of `predictor`, which is then not read; needed where `how` is None.

    Returns:
        y [T, D] in `computes`, and how many neurons ran, over all tokens.
    """
    x, half = x.contiguous(), torch.bfloat16
    if scores is not None:
        scores = scores.to(torch.float32).contiguous()
    y = torch.empty(x.shape, dtype=computes)
    (d_ff, r), active = predictor.weight.shape, ctypes.c_int64()
    z, huber = how or (0.0, 0.0)
    job = Job(
        x.data_ptr(), predictor.weight.data_ptr() if scores is None else None,
        None if scores is None else scores.data_ptr(), up.weight.data_ptr(),
        down.weight.data_ptr(), y.data_ptr(), ctypes.addressof(active), x.shape[0], x.shape[1],
        d_ff, r, up.weight.shape[1], z, huber, how is None, x.dtype is half,
        predictor.weight.dtype is half, computes is half, ACTIVATIONS[activation],
        min(torch.get_num_threads(), 1 + d_ff * r // NUMBERS_PER_THREAD),
    )  # fmt: skip
    KERNEL.call("moe_zoo_spark_tokens", job)
    return y, active.value
