"""What moves between steps: the keys of random streams, and delayed scales."""

import torch
from torch import Tensor, nn

from layers.precision.formats import resolve
from layers.precision.leaf import Leaf
from layers.precision.operands import OPERANDS
from layers.precision.spec import QSpec


def seed_rounding(
    module: nn.Module, seed: int, step: int, *, micro_batch: int = 0, rank: int = 0
) -> None:
    """Set the random streams of every leaf for one micro-batch; before its forward.

    Streams are a pure function of these numbers and the leaf's qualified name, so a resumed or
    recomputed pass draws the same bits, and an evaluation draws nothing from them.
    """
    for name, leaf in module.named_modules():
        if isinstance(leaf, Leaf):
            leaf.seed(name, seed, step, micro_batch, rank)


def update_delayed_scales(module: nn.Module) -> None:
    """Move every delayed scale on by one step: after the optimizer's (precision.md section 7).

    The scale comes from the largest magnitude of the last `history` steps, this one included. A
    magnitude of zero or infinity leaves the scale as it was; the first step uses 1.
    """
    for leaf in module.modules():
        if isinstance(leaf, Leaf) and leaf.precision is not None and leaf.peak_history is not None:
            _update(leaf)


@torch.no_grad()
def _update(leaf: Leaf) -> None:
    history, peaks, scales = leaf.peak_history, leaf.operand_peaks, leaf.operand_scales
    assert history is not None
    assert peaks is not None
    assert scales is not None
    history.copy_(torch.cat((peaks[None], history[:-1])))
    peaks.zero_()
    for i, operand in enumerate(OPERANDS):
        spec = getattr(leaf.precision, operand)
        if spec.scope == "delayed":
            scales[i] = _delayed(history[: spec.history, i].amax(0), scales[i], spec)


def _delayed(peak: Tensor, before: Tensor, spec: QSpec) -> Tensor:
    row = resolve(spec).row
    assert row.upper is not None
    assert row.grid is not None
    decode = row.upper(peak, row.grid, resolve(spec).rule).decode * 2.0**spec.margin
    usable = (peak > 0) & peak.isfinite()
    return torch.where(usable, decode, before)
