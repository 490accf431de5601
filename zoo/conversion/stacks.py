"""Expert weights from the weights of one dense gated FFN: pure functions of tensors.

A hidden neuron is a row of gate, the same row of up and the same column of down. Permuting the
neurons, or adding up the outputs of a partition of them, changes nothing.

F is the dense width, f an expert's, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from layers.names import check_positive


class DenseFFN(NamedTuple):
    """y = down (activation(gate x) * up x)."""

    gate: Tensor  # [F, D]
    up: Tensor  # [F, D]
    down: Tensor  # [D, F]


class ExpertStacks(NamedTuple):
    """The weights of `layers.moe.MoE`'s experts."""

    gate_up: Tensor  # [E, 2f, D], gate rows first
    down: Tensor  # [E, D, f]


def sparse_upcycle(dense: DenseFFN, n_experts: int, *, scale: float = 1.0) -> ExpertStacks:
    """Every expert a copy (arXiv:2212.05055, sec. 3; moe.md 12).

    y = (sum of the chosen weights) * scale * dense(x), whichever experts are chosen: exact when
    that factor is 1. Raises ValueError where the shapes are no gated FFN's.
    """
    return granular_upcycle(dense, n_experts, 1, scale=scale)


def granular_upcycle(
    dense: DenseFFN, n_copies: int, n_slices: int, *, scale: float = 1.0
) -> ExpertStacks:
    """R copies cut into G slices each; expert e is slice e % G of copy e // G (arXiv:2410.07524).

    With weights that are equal within a copy and whole copies chosen, y = dense(x) times scale and
    the sum of the chosen copies' weights. Published code spreads the scale as its cube root over
    gate, up and down, which silu makes approximate; here all of it is on down, which is linear.

    Args:
        dense: the FFN to cut.
        n_copies: R.
        n_slices: G; must divide F.
        scale: factor on down, see `mixing_scale`.

    Returns:
        R * G experts, F / G wide.
    """
    check_positive(n_copies=n_copies, n_slices=n_slices)
    width = _width(dense)
    if width % n_slices:
        raise ValueError(f"d_ff={width} does not split into {n_slices} equal parts")
    groups = torch.arange(width, device=dense.up.device).view(n_slices, -1)
    return split_neurons(dense, groups.repeat(n_copies, 1), scale=scale)


def split_neurons(dense: DenseFFN, groups: Tensor, *, scale: float = 1.0) -> ExpertStacks:
    """Expert e owns the neurons groups[e]; groups: [E, f] int64 (arXiv:2408.11855; moe.md 10).

    Where the groups hold every neuron once, the experts' outputs add up to scale * dense(x).
    """
    width = _width(dense)
    if groups.ndim != 2 or groups.numel() == 0:
        raise ValueError(f"groups must be [E, f] numbers of neurons, got {list(groups.shape)}")
    if not 0 <= int(groups.min()) <= int(groups.max()) < width:
        raise ValueError(f"groups must name neurons below d_ff={width}")
    gate_up = torch.cat((dense.gate[groups], dense.up[groups]), dim=1)  # [E, 2f, D]
    down = dense.down[:, groups].transpose(0, 1) * scale  # [E, D, f]
    return ExpertStacks(gate_up.contiguous(), down.contiguous())


def drop_upcycle(
    dense: DenseFFN,
    n_experts: int,
    fraction: float,
    generator: torch.Generator,
    *,
    scale: float = 1.0,
) -> ExpertStacks:
    """Copies of which each has a random share of its neurons drawn anew (arXiv:2502.19261, sec. 3).

    The numbers of the dropped neurons are drawn for each expert and are the same in its three
    matrices; each matrix's new numbers are normal with mean and deviation of those that they
    replace. fraction: in [0, 1]; 0 gives `sparse_upcycle`. 0.5 is the paper's best.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    width = _width(dense)
    stacks, n_dropped = sparse_upcycle(dense, n_experts, scale=scale), round(fraction * width)
    if n_dropped == 0:
        return stacks
    for gate_up, down in zip(*stacks, strict=True):  # views: written in place
        dropped = torch.randperm(width, generator=generator)[:n_dropped].to(down.device)
        for matrix, rows in ((gate_up, dropped), (gate_up, dropped + width), (down.t(), dropped)):
            matrix[rows] = _drawn_like(matrix[rows], generator)
    return stacks


def with_noise(stacks: ExpertStacks, noise: float, generator: torch.Generator) -> ExpertStacks:
    """Each matrix plus normal noise of `noise` times its root mean square, to tell copies apart."""
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    if noise == 0:
        return stacks
    return ExpertStacks(*(w + noise * _rms(w) * _normal(w, generator) for w in stacks))


def mixing_scale(n_copies: int, n_slices: int, top_k: int, *, renormalize: bool) -> float:
    """The factor that keeps the output when R copies of G slices are mixed by a softmax router.

    G where the chosen weights sum to one: each slice gets 1 / G of its copy's weight. Else
    R G^2 / K, right where the router is uniform: K weights of 1 / (R G) each (moe.md 12).
    With distinct slices (R = 1) of which K of G run it is N / K on weights of 1, FactorLLM's.
    """
    return n_slices if renormalize else n_copies * n_slices**2 / top_k


def _width(dense: DenseFFN) -> int:
    """F. Raises ValueError where the three matrices do not fit."""
    gate, up, down = dense
    if up.ndim != 2 or gate.shape != up.shape or down.shape != up.shape[::-1]:
        shapes = ", ".join(f"{name} {list(w.shape)}" for name, w in dense._asdict().items())
        raise ValueError(f"a gated FFN has gate [F, D], up [F, D], down [D, F], got {shapes}")
    return up.shape[0]


def _drawn_like(old: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers with the mean and the deviation of `old`."""
    return _normal(old, generator) * old.std(correction=0) + old.mean()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn on the CPU: the same numbers on every device."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _rms(w: Tensor) -> Tensor:
    """[E, 1, 1]: the root mean square of each expert's matrix."""
    return w.square().mean((1, 2), keepdim=True).sqrt()
