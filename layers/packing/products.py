"""What a leaf computes from a packed weight: the forward alone, its numbers those of training's.

Few rows are multiplied straight from codes, to the rounding of float32 sums. More rows meet the
decoded matrix in the same matmul as in training, bit for bit; of experts one matrix at a time, and
only those that have rows. A table decodes the rows that are looked up.
"""

import torch
from torch import Tensor

from layers.batched import expert_of_rows
from layers.grouped import grouped_mm
from layers.packing.weight import Packed, PackedWeight
from layers.precision.leaf import Leaf
from layers.precision.operands import LeafPrecision
from layers.precision.quantize import Quantized
from layers.products import epilogue, fprop

FEW = 4  # rows that are multiplied straight from codes, one pass over the matrix for all


def usable(w: Packed | PackedWeight, x: Tensor, leaf: Leaf, *, as_rows: bool) -> Packed:
    """The weight, if the leaf can compute with it now.

    Raises:
        ValueError: for a precision that asks for another format, or a pass that wants gradients.
    """
    packed = w.packed if isinstance(w, PackedWeight) else w
    p = leaf.precision
    wanted = None if p is None else p.row_spec if as_rows else p.fprop_w
    if packed.spec != wanted:
        held = None if packed.spec is None else packed.spec.to_plain()
        asked = "none" if wanted is None else wanted.to_plain()
        raise ValueError(
            f"this weight is packed as {held}, but the precision now asks for {asked}: "
            "set a precision with that fprop_w, or load the weights that were packed"
        )
    if torch.is_grad_enabled() and (x.requires_grad or leaf.training):
        raise ValueError(
            "a packed weight cannot be trained: run the model in evaluation mode under "
            "torch.no_grad(), or train the weights that were packed"
        )
    return packed


def packed_fprop(
    x: Quantized, w: Packed, counts: Tensor | None, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """y = x w^T in dtype. x: [M, K]; w: [O, K], or [E, O, K] with counts [E]. Returns [M, O].

    backend: how decoded experts are multiplied, a row of `layers.grouped.BACKENDS`. All but "auto"
    and "loop" decode the whole stack.
    """
    few = x.values.shape[0] <= FEW
    above = w.tensor_scale
    if few:
        which = None
        if counts is not None:
            which = expert_of_rows(counts, x.values.shape[0])
        return epilogue(w.multiply(x.values, which).to(dtype), x.scale, above, counts)
    if counts is None or x.values.is_cuda or backend not in ("auto", "loop"):  # no host read
        return fprop(x, Quantized(w.decode(dtype), above), counts, backend)
    y = x.values.new_empty(x.values.shape[0], w.shape[-2])
    start = 0
    for expert, size in enumerate(counts.tolist()):
        if size:
            rows, matrix = slice(start, start + size), w[expert].decode(dtype)[None]
            y[rows] = grouped_mm(x.values[rows], matrix, counts[expert : expert + 1])
            start += size
    return epilogue(y, x.scale, above, counts)


def packed_rows(w: Packed, ids: Tensor, p: LeafPrecision) -> Tensor:
    """Rows of a table, as a look-up in training makes them. ids: [R]. Returns [R, D] in p.dtype."""
    rows = w.rows(ids)
    values = rows.decode(p.product_dtype("fprop"))
    above = rows.tensor_scale
    values = values if above is None else values * above.reshape(-1, 1)
    return values.to(p.dtype)
