"""A few tokens through the chosen neurons of an FFN alone: rows gathered, rows summed in bags.

The up matrix [F, D'] lies by neuron as it is; the down matrix [D, F] is laid so in place by
`lay_by_neuron`, which changes where its numbers lie and nothing else. Gathering columns of a matrix
that lies by output takes longer than the whole product (benchmarks/spark.md).

"gather" is one native call where that builds (`layers.spark_native`). In torch ops:

    gather  for each token, its rows of up are copied side by side and multiplied; rows of down are
            summed by `embedding_bag`, which never writes them anywhere
    bag     up as a whole, all tokens in one product; rows of down in bags
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.linear import Linear
from layers.packing.weight import Packed, PackedWeight

BACKENDS = ("auto", "dense", "gather", "bag")
# Rows of down that all tokens read together, as a share of the neurons, up to which a backend is
# the fastest on a CPU (benchmarks/spark.md).
GATHER_UP_TO, BAG_UP_TO = 1.3, 5.2
BY_OUTPUT = "down lies by output: call pack_for_decode() first"  # an obstacle
ROOM = 1.5  # of the scratch, over what is asked: rows differ from token to token


class _Scratch(threading.local):
    """Rooms of one thread, by dtype, device and width of a row."""

    def __init__(self):
        self.rooms: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}


_scratch = _Scratch()


class Rows(NamedTuple):
    """The part of a leaf that some neurons are (`layers.prefix.Part`). Without gradients.

    Rows are copied to a scratch of the thread, which the next call overwrites: a fresh block of
    that size would cost more in page faults than the products.
    """

    ids: Tensor  # [k] int64

    def of_weight(self, w: Tensor) -> Tensor:
        """w: [F, D']. Returns [k, D']."""
        room = _room(len(self.ids), w)
        return torch.index_select(w, 0, self.ids, out=room)

    def of_rows(self, t: Tensor) -> Tensor:
        """t: [..., F]. Returns [..., k]."""
        return t[..., self.ids]


def _room(n: int, like: Tensor) -> Tensor:
    """[n, D'] to be written, of the dtype and device of [F, D']."""
    rooms, key = _scratch.rooms, (like.dtype, like.device, like.shape[1])
    if key not in rooms or len(rooms[key]) < n:
        with torch.inference_mode(False):  # else only inference could write to it
            size = int(ROOM * n), like.shape[1]
            rooms[key] = torch.empty(size, dtype=like.dtype, device=like.device)
    return rooms[key][:n]


def lay_by_neuron(down: Linear) -> bool:
    """Lay a weight [D, F] so that a neuron's numbers are one run of memory, in place.

    Name, shape and numbers stay, and with them a `state_dict`; whatever reads it goes on to, as
    training does (but FSDP, which takes no such parameter). Returns False for a packed weight,
    which stays as it is.
    """
    weight = down.weight
    if isinstance(weight, Packed | PackedWeight):
        return False
    with torch.inference_mode(False):  # else training could not go on with it
        weight.data = weight.data.t().contiguous().t()
    return True


def obstacle(up: Linear, down: Linear) -> str | None:
    """Why neurons of these leaves cannot be run alone; None where they can."""
    for leaf in (up, down):
        p = leaf.precision
        if isinstance(leaf.weight, Packed | PackedWeight):
            return "packed weights lie in blocks of several neurons"
        if leaf.correction is not None:
            return "a quantised leaf's correction is of the whole product"
        if p is not None and not p.is_cast:
            return f"the precision {p.label} quantises blocks of several neurons"
    if not down.weight.t().is_contiguous():
        return BY_OUTPUT
    return None


def chosen_backend(n_tokens: int, density: float) -> str:
    """The fastest on a CPU for so many tokens of which each runs that share of the neurons."""
    read = n_tokens * density
    return "gather" if read <= GATHER_UP_TO else "bag" if 0 < read <= BAG_UP_TO else "dense"


def run_neurons(
    kept: Tensor, x: Tensor, up: Linear, down: Linear, activation: Callable[[Tensor], Tensor],
    backend: str,
) -> Tensor:  # fmt: skip
    """down(activation(kept) * up(x)) over the neurons that `kept` is not zero for.

    Args:
        kept: [T, F], T >= 1.
        x: [T, D'], what up reads.
        up, down: leaves without an `obstacle`.
        activation: element-wise, 0 at 0.
        backend: "gather" or "bag".

    Returns:
        [T, D] in the dtype that up computes in.
    """
    n_tokens, n_neurons = kept.shape
    flat = kept.flatten().nonzero().squeeze(1)  # [N] ascending
    firsts = torch.arange(0, kept.numel(), n_neurons, device=kept.device)  # [T]
    starts = torch.searchsorted(flat, firsts) if n_tokens > 1 else firsts
    neurons = flat % n_neurons if n_tokens > 1 else flat
    gate = activation(kept.flatten()[flat])
    if backend == "bag":
        value = up(x).flatten()[flat]
    else:
        ends = [*starts[1:].tolist(), len(flat)]
        rows = torch.tensor_split(neurons, ends[:-1]) if n_tokens > 1 else [neurons]
        value = torch.cat([up(x[t : t + 1], Rows(ids))[0] for t, ids in enumerate(rows)])
    h, table = gate * value, down.weight.t()
    y = F.embedding_bag(neurons, table, starts, per_sample_weights=h.to(table), mode="sum")
    return y.to(h.dtype)
