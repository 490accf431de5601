"""The inputs that leaves see while a model runs over a few batches."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from layers.names import check_positive
from layers.precision import Leaf


def collect(
    run: Callable[[Any], object],
    batches: Iterable[Any],
    leaves: Mapping[str, Leaf],
    *,
    rows: int,
) -> dict[str, list[Tensor]]:
    """Rows that reach each matrix, evenly spaced over each batch: no random number is drawn.

    Args:
        run: one forward pass of the model over a batch.
        batches: what to run it over; all of them count alike.
        leaves: whose inputs to keep.
        rows: the most to keep for each matrix, an expert being one.

    Returns:
        For each leaf one tensor [T <= rows, K] float32 per matrix: E for stacked experts, else one.
        T is 0 where nothing came, and for a table, which is looked up.
    """
    check_positive(rows=rows)
    batches = list(batches)
    check_positive(batches=len(batches))
    share = -(-rows // len(batches))
    kept: dict[str, list[list[Tensor]]] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, leaf in leaves.items():
            kept[name] = [[] for _ in range(leaf.weight_sets() or 1)]
            hook = leaf.register_forward_pre_hook(_keeper(kept[name], share))
            hooks.callback(hook.remove)
        for batch in batches:
            run(batch)
    found = {}
    for name, sets in kept.items():
        weight = leaves[name].weight
        assert isinstance(weight, Tensor)
        none = weight.new_zeros(0, weight.shape[-1], dtype=torch.float32)
        found[name] = [torch.cat([none, *parts])[:rows] for parts in sets]
    return found


def share_rows(sets: list[Tensor]) -> list[Tensor]:
    """Matrices that saw nothing borrow the rows of all others.

    Raises:
        ValueError: when none saw anything.
    """
    every = torch.cat(sets)
    if not len(every):
        raise ValueError("no calibration batch reached this layer: give more, or quantise by rtn")
    return [x if len(x) else every for x in sets]


def _keeper(sets: list[list[Tensor]], share: int) -> Callable[..., None]:
    """A forward pre-hook that keeps up to `share` rows of each matrix."""

    def keep(leaf: Leaf, args: tuple[Tensor, ...]) -> None:
        if not args[0].is_floating_point():
            return  # rows of a table by number
        x = args[0].detach().flatten(0, -2)
        parts = (x,) if leaf.weight_sets() is None else x.split(args[1].tolist())
        for found, part in zip(sets, parts, strict=True):
            found.append(_spaced(part, share).float())

    return keep


def _spaced(x: Tensor, most: int) -> Tensor:
    """At most that many rows, evenly spaced."""
    if len(x) <= most:
        return x
    return x[(2 * torch.arange(most, device=x.device) + 1) * len(x) // (2 * most)]
