"""A single token through a memory layer in two calls of decode.cpp: what it finds, what it reads.

Decoding a token, a memory layer is many small operations on a few numbers, and torch takes longer
to start them than to run them. Projections stay with the leaves, and so do tables that are packed
or in a low format; keys and norms are float32 under every policy (memory.md 10), so the search is
native under every policy too. The numbers are those of the ordinary path up to the order of sums.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from layers.linear import ValueTable
from layers.memory.native import MOST_KEYS, as_places
from layers.memory.norms import MaskedBatchNorm, VectorNorm
from layers.memory.pool import Pool
from layers.memory.query import Query
from layers.memory.readout import Readout
from layers.memory.retriever import Hits, ProductKeys
from layers.memory.selection import pairs
from layers.memory.tucker import TuckerKeys, leading_pair
from layers.native import Source

KERNEL = Source(Path(__file__).with_name("decode.cpp"), ("-ffp-contract=fast",))
WEIGHTINGS = {"softmax": 0, "raw": 1, "relu": 2, "sigmoid": 3}  # enum Weighting of decode.cpp
ACTIVATIONS = {"silu": 0, "gelu": 1, "relu": 2, "identity": 3}  # enum Activation
PLAIN = (nn.Parameter, Tensor)  # no tensor that stands for another, as DTensor does
NUMBERS_PER_THREAD = 1 << 20  # of keys, some 0.2 ms of reading


class FindJob(ctypes.Structure):
    """One call: struct MoeZooMemoryFind of decode.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "query_gain", "query_bias")),
        *((name, ctypes.c_void_p) for name in ("query_mean", "query_var")),
        *((name, ctypes.c_void_p) for name in ("keys", "key_gain", "key_bias")),
        *((name, ctypes.c_void_p) for name in ("cores", "leading", "places", "slots", "scores")),
        *((name, ctypes.c_int64) for name in ("n_queries", "d", "n", "heads", "key_blocks")),
        *((name, ctypes.c_int64) for name in ("k", "m", "pairs", "rank", "n_cores")),
        *((name, ctypes.c_int32) for name in ("both_signs", "threads")),
    )


class ReadJob(ctypes.Structure):
    """One call: struct MoeZooMemoryRead of decode.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("slots", "scores", "sigma", "x")),
        *((name, ctypes.c_void_p) for name in ("inputs", "values", "rows", "y")),
        *((name, ctypes.c_int64) for name in ("hits", "k", "n_cores", "n_rows")),
        *((name, ctypes.c_int64) for name in ("d_input", "d_value", "groups")),
        *((name, ctypes.c_int64) for name in ("n_slots", "visible", "offset")),
        *((name, ctypes.c_int32) for name in ("weighting", "activation")),
    )


def find(token: Tensor, query: Query, keys: ProductKeys | TuckerKeys) -> Hits | None:
    """`keys(query(token))` in one call. token: [1, D] on a CPU, no gradients wanted.

    None where torch has to do it: no compiler, other dtypes or kinds of tensors, a convolution, a
    batch norm in training, hooks on what would be passed over, a mode that watches operators.
    """
    norm = query.norm
    if token.dtype == torch.float64 or query.conv is not None:
        return None
    if type(keys) not in (ProductKeys, TuckerKeys) or not _ready(query, norm, keys, keys.norm):
        return None
    mean = var = None
    if isinstance(norm, MaskedBatchNorm):
        if norm.training:
            return None
        mean, var = norm.running_mean, norm.running_var
    of_query, of_keys = _gains(norm), _gains(keys.norm)
    c, weight = keys.config, keys.weight
    cores = keys.cores if isinstance(keys, TuckerKeys) else None
    if not _plain(weight, cores, *of_query, *of_keys, mean, var) or c.n_keys >= MOST_KEYS:
        return None

    queries = query.proj(token).to(torch.float32)
    slots = torch.empty(1, c.heads, c.top_k, dtype=torch.int64)
    scores = torch.empty(1, c.cores, c.heads, c.top_k)
    leading = places = None
    rank = n_pairs = signed = 0
    if isinstance(keys, TuckerKeys):
        rank, signed = keys.config.rank, keys.config.search == "signed"
        leading = _leading(tuple(keys.cores.flatten().tolist()), keys.cores.shape)
    else:
        places = as_places(pairs(c.looks_at, c.top_k, keys.config.combine))
        n_pairs = places.shape[1]
    numbers = c.queries * c.n_keys * c.d_key
    job = FindJob(
        *_addresses(queries, *of_query, mean, var, weight, *of_keys, cores, leading, places),
        slots.data_ptr(), scores.data_ptr(), c.queries, c.d_key, c.n_keys, c.heads,
        weight.numel() // (c.n_keys * c.d_key), c.top_k, c.looks_at, n_pairs, rank, c.cores,
        signed, min(torch.get_num_threads(), 1 + numbers // NUMBERS_PER_THREAD),
    )  # fmt: skip
    KERNEL.call("moe_zoo_memory_find", job)
    return Hits(slots, scores)


def read(token: Tensor, hits: Hits, readout: Readout, pool: Pool) -> tuple[Tensor, Tensor] | None:
    """`readout(token, hits, pool)` with all between its projections in one call.

    None where torch has to do it, as in `find`, and for tables that are packed, sharded or in a low
    format.

    Raises:
        IndexError: a slot that is none.
    """
    c, p = readout.config, pool.config
    inputs, values, expansion = pool.inputs, pool.values, readout.expansion
    if type(pool) is not Pool or not _ready(readout, expansion, pool, inputs, values):
        return None
    if not (_is_high(values) and (inputs is None or _is_high(inputs, handing_on=torch.float32))):
        return None
    table = None if inputs is None else inputs.weight
    if not _plain(values.weight, table, hits.scores):
        return None

    x = None
    if inputs is not None:
        x = token if readout.input is None else readout.input(token)
        x = x.to(torch.float32).contiguous()
    n_hits = hits.slots.numel()
    rows = torch.empty(1, n_hits, dtype=torch.int64)
    y = torch.empty(1, c.groups * p.d_value)
    sigma = None if expansion is None else expansion.sigma
    window = (0, 0, 0)
    if expansion is not None:
        of = expansion.config
        window = (of.n_slots, of.window.visible, of.window.offset)
    job = ReadJob(
        *_addresses(hits.slots, hits.scores, sigma, x, table, values.weight, rows, y),
        n_hits, hits.slots.shape[-1], p.cores, p.n_rows, p.d_input, p.d_value, c.groups, *window,
        WEIGHTINGS[c.weights], ACTIVATIONS[p.activation],
    )  # fmt: skip
    if KERNEL.call("moe_zoo_memory_read", job):
        raise IndexError(f"slots and rows must be in range, got slots {hits.slots.tolist()}")
    precision = values.precision
    return readout.finish(token, y if precision is None else y.to(precision.dtype)), rows


def _ready(*modules: nn.Module | None) -> bool:
    """Whether nothing looks on that would miss a forward: hooks, a mode that watches operators."""
    for m in modules:
        if m is not None and (m._forward_hooks or m._forward_pre_hooks):
            return False
    return not is_in_torch_dispatch_mode() and KERNEL.wanted()


def _plain(*tensors: Tensor | None) -> bool:
    """Whether all are float32 numbers on a CPU, one after the other, and no kind of their own."""
    for t in tensors:
        if t is None:
            continue
        if type(t) not in PLAIN or t.dtype != torch.float32:
            return False
        if not (t.is_cpu and t.is_contiguous()):
            return False
    return True


def _is_high(table: ValueTable, handing_on: torch.dtype | None = None) -> bool:
    """Whether a table's rows are read as they are, and handed on in that dtype."""
    p = table.precision
    return p is None or (p.fprop_w.is_high and handing_on in (None, p.dtype))


def _gains(norm: nn.Module | None) -> tuple[Any, Any]:
    """Gain and bias of a norm."""
    if norm is None:
        return None, None
    assert isinstance(norm, VectorNorm | MaskedBatchNorm)
    return norm.weight, norm.bias


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


@functools.lru_cache(maxsize=256)
def _leading(cores: tuple[float, ...], shape: torch.Size) -> Tensor:
    """[2, H, r], u and t of the sum of cores, kept by their numbers: an SVD takes 50 µs."""
    total = torch.tensor(cores, device="cpu").view(shape).sum(0)
    return torch.stack(leading_pair(total))
