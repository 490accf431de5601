"""One token through its chosen gated experts in one call of decode.cpp.

Decoding is bound by reading weights. The kernel reads the chosen matrices once, where they lie, and
casts as it reads, where torch would first write a cast copy of each.
"""

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from layers.linear import ExpertLinear
from layers.native import Source

KERNEL = Source(Path(__file__).with_name("decode.cpp"), ("-ffp-contract=fast",))
ACTIVATIONS = {"silu": 0, "gelu": 1, "relu": 2, "identity": 3}  # enum Activation of decode.cpp
DTYPES = (torch.float32, torch.bfloat16)  # what decode.cpp reads and writes
# Weights, some 0.2 ms of reading. For less, a busy machine would mostly wait: a thread whose core
# is taken holds up all others, at two barriers.
NUMBERS_PER_THREAD = 1 << 20


class Job(ctypes.Structure):
    """One call: struct MoeZooToken of decode.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "experts", "weights", "keep")),
        *((name, ctypes.c_void_p) for name in ("gate_up", "down", "y")),
        *((name, ctypes.c_int64) for name in ("d_model", "d_expert", "n_experts", "top_k")),
        ("x_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("x_bf16", "gate_up_bf16", "down_bf16")),
        *((name, ctypes.c_int32) for name in ("gate_up_in_bf16", "down_in_bf16")),
        *((name, ctypes.c_int32) for name in ("activation", "threads")),
    )


class Computes(NamedTuple):
    """The dtypes in which the two leaves multiply, and hand on what they computed."""

    gate_up: torch.dtype
    down: torch.dtype


def native_dtypes(
    token: Tensor, gate_up: ExpertLinear, down: ExpertLinear, activation: str
) -> Computes | None:
    """What `run_token` would compute in; None where torch has to: formats, float64, no compiler."""
    if activation not in ACTIVATIONS:
        return None
    first = _compute_dtype(token.dtype, gate_up)
    second = _compute_dtype(first, down)
    stored = (token.dtype, gate_up.weight.dtype, down.weight.dtype)
    known = all(dtype in DTYPES for dtype in (first, second, *stored))
    if first is None or second is None or not known or not KERNEL.wanted():
        return None
    contiguous = gate_up.weight.is_contiguous() and down.weight.is_contiguous()
    return Computes(first, second) if contiguous else None


def _compute_dtype(given: torch.dtype | None, leaf: ExpertLinear) -> torch.dtype | None:
    """That of a leaf which only casts what it is given; None for one that does more."""
    p = leaf.precision
    if given is None or leaf.correction is not None or not (p is None or p.is_cast):
        return None
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return given if p is None else p.dtype


def run_token(
    token: Tensor, routed: Tensor, weights: Tensor, keep: Tensor | None, gate_up: Tensor,
    down: Tensor, activation: str, computes: Computes,
) -> Tensor:  # fmt: skip
    """The sum over the kept choices of down(weight * activation(gate(x)) * up(x)).

    Args:
        token: [1, D], any stride.
        routed: [1, K] int64.
        weights: [1, K].
        keep: [1, K] bool, the choices to run; None: all.
        gate_up: [E, 2F, D], gate rows first, contiguous.
        down: [E, D, F], contiguous.
        activation: a key of ACTIVATIONS.
        computes: of `native_dtypes`. In bfloat16, what is rounded is what torch ops would round.

    Returns:
        [1, D] in the dtype in which `down` computes.

    Raises:
        ValueError: an expert that does not exist.
    """
    return torch.ops.moe_zoo.run_token(
        token, routed, weights, keep, gate_up, down, activation, *computes
    )


def _run_token(
    token: Tensor, routed: Tensor, weights: Tensor, keep: Tensor | None, gate_up: Tensor,
    down: Tensor, activation: str, gate_up_dtype: torch.dtype, down_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    (n_experts, d_model, d_expert), top_k = down.shape, routed.shape[1]
    routed, weights = routed.contiguous(), weights.to(torch.float32).contiguous()
    keep = None if keep is None else keep.contiguous()
    y, half = token.new_empty(token.shape, dtype=down_dtype), torch.bfloat16
    numbers = 3 * top_k * d_model * d_expert
    job = Job(
        token.data_ptr(), routed.data_ptr(), weights.data_ptr(),
        None if keep is None else keep.data_ptr(), gate_up.data_ptr(), down.data_ptr(),
        y.data_ptr(), d_model, d_expert, n_experts, top_k, token.stride(1),
        token.dtype is half, gate_up.dtype is half, down.dtype is half,
        gate_up_dtype is half, down_dtype is half, ACTIVATIONS[activation],
        min(torch.get_num_threads(), 1 + numbers // NUMBERS_PER_THREAD),
    )  # fmt: skip
    if KERNEL.call("moe_zoo_token", job):
        raise ValueError(f"experts must be in [0, {n_experts}), got {routed.tolist()[0]}")
    return y


# One operator, so that modes see it: FLOPs are counted, fakes have a shape.

_library = torch.library.Library("moe_zoo", "FRAGMENT")
_library.define(
    "run_token(Tensor token, Tensor routed, Tensor weights, Tensor? keep, Tensor gate_up, "
    "Tensor down, str activation, ScalarType gate_up_dtype, ScalarType down_dtype) -> Tensor"
)
_library.impl("run_token", _run_token, "CPU")


@torch.library.register_fake("moe_zoo::run_token", lib=_library)
def _(token, routed, weights, keep, gate_up, down, activation, gate_up_dtype, down_dtype):
    return token.new_empty(token.shape, dtype=down_dtype)


@register_flop_formula(torch.ops.moe_zoo.run_token, get_raw=True)
def _flops(token, routed, weights, keep, gate_up, down, *_, **__) -> int:
    chosen = routed.numel() if keep is None else int(keep.sum())
    return 2 * chosen * (gate_up[0].numel() + down[0].numel())
