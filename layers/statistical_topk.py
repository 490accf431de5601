"""Statistical top-k: about k of n entries, found by mean and deviation, no sort.

arXiv:2506.06644, eq. 3-5. For a row x of n entries, Q the quantile function of a standard normal:

    theta = mean(x) + std(x) Q(1 - k / n)      std: population, statistics in float32
    soft  : y = max(x - theta, 0)              the published operator, and Gemma 3n's
    hard  : y = x where x > theta, else 0
    -inf  : y = x where x > theta, else -inf   logits before a softmax

For normal entries the count is k on average, its variance n (p (1 - p) - phi(z)^2 (1 + z^2 / 2)),
p = k / n, z = Q(1 - p), phi their density: less than that of n independent draws. Others miss k by
as much as their tail differs, so what is kept is to be counted.

The soft form moves survivors by theta; `exact_topk` does the same with the entry after the k-th.
"""

from typing import Any

import torch
from torch import Tensor

from layers.names import check_choice
from layers.quantiles import quantile_here, quantiles

FORMS = ("soft", "hard", "-inf")


def statistical_topk(
    x: Tensor, k: float, *, form: str = "soft", mask: Tensor | None = None, dim: int = -1,
    detach_threshold: bool = False, huber: float = 0.0, keep_argmax: bool = False,
    table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """About k entries of every row along `dim`, by `form`. Rows of at most k entries stay whole.

    Args:
        x: any shape and floating dtype; statistics are of float32 (of float64 where it is that).
        k: entries to keep, at least 1.
        form: "soft", "hard" or "-inf".
        mask: as x or broadcastable to it, bool, True where an entry counts; others become 0 (-inf)
            and are read nowhere, not even where they are no numbers. n is of each row's own.
        dim: along which rows lie.
        detach_threshold: theta is a constant to the gradient (else exact; soft form alone).
        huber: delta > 0 of a kink made smooth: u^2 / (2 delta) for u = x - theta in (0, delta),
            u - delta / 2 above (theorem 3.2; one-sided by us). Soft form alone.
        keep_argmax: the largest entry of a row is kept whatever theta is, with all equal to it: a
            row with a softmax behind it must not end up empty. Not for the soft form.
        table: of `layers.quantiles.quantile_table`, read at each row's n; None: it is computed.

    Returns:
        y, shape and dtype of x.

    Raises:
        ValueError: for a k below 1, an unknown form, an option that the form does not know.
    """
    _check(k, form, huber, keep_argmax)
    if mask is None:
        n = x.shape[dim]
        if k >= n:
            return x
        z: float | Tensor = quantile_here(k, n, x.device) if table is None else table[n]
    else:
        mask = mask[(None,) * (x.dim() - mask.dim())]
        n = mask.sum(dim, keepdim=True) * (x.shape[dim] // mask.shape[dim])
        z = quantiles(k, n) if table is None else table[n]
    return above(
        x, z, form=form, mask=mask, dim=dim, detach_threshold=detach_threshold, huber=huber,
        keep_argmax=keep_argmax,
    )  # fmt: skip


def exact_topk(
    x: Tensor, k: int, *, form: str = "soft", mask: Tensor | None = None, dim: int = -1,
    detach_threshold: bool = False, huber: float = 0.0,
) -> Tensor:  # fmt: skip
    """`statistical_topk` with the (k + 1)-th largest entry as theta: k, without ties with it.

    The control of what the statistics cost or bring: shift, forms and mask are the same.
    """
    _check(k, form, huber, False)
    x_last = x.movedim(dim, -1)
    mask = None if mask is None else mask.expand_as(x).movedim(dim, -1)
    if k >= x.shape[dim]:
        return x if mask is None else _filled(x_last, mask, form).movedim(-1, dim)
    found = x_last if mask is None else x_last.masked_fill(~mask, float("-inf"))
    theta = found.topk(int(k) + 1, dim=-1).values[..., -1:]
    if form != "soft":
        keep = x_last > theta if mask is None else (x_last > theta) & mask
        return _filled(x_last, keep, form).movedim(-1, dim)
    theta = theta.detach() if detach_threshold else theta
    whole = theta.detach().isneginf()
    y = _smooth((x_last - theta.masked_fill(whole, 0)).relu(), huber)
    if mask is not None:
        y = torch.where(whole, x_last, y).masked_fill(~mask, 0)
    return y.movedim(-1, dim)


def above(
    x: Tensor, z: float | Tensor, *, form: str = "soft", mask: Tensor | None = None, dim: int = -1,
    detach_threshold: bool = False, huber: float = 0.0, keep_argmax: bool = False,
) -> Tensor:  # fmt: skip
    """`statistical_topk` by z itself: a number, or a tensor of size 1 along `dim` (or of no axes).

    Rows whose z is -inf stay whole.
    """
    _check(1, form, huber, keep_argmax)
    if isinstance(z, float) and z == float("-inf") and mask is None:
        return x
    rows = x.movedim(dim, -1)
    valid = None if mask is None else mask.expand_as(x).movedim(dim, -1)
    if isinstance(z, Tensor) and z.dim():
        z = z.movedim(dim, -1)
    if form == "soft":
        if valid is None and isinstance(z, float) and _is_one_row(rows):
            return _one_row(rows, z, huber).movedim(-1, dim)
        y = _Soft.apply(rows, z, valid, detach_threshold, huber)
        assert isinstance(y, Tensor)
        return y.movedim(-1, dim)
    with torch.no_grad():  # the forms move nothing, so theta has no gradient
        centred, _, sigma = _statistics(rows, valid)
        shift = _shift(sigma, z)
        keep = centred > shift
        if isinstance(z, Tensor):
            keep |= z.isneginf()
        if keep_argmax:
            entries = rows if valid is None else rows.masked_fill(~valid, float("-inf"))
            keep |= entries == entries.amax(-1, keepdim=True)
        if valid is not None:
            keep &= valid
    return _filled(rows, keep, form).movedim(-1, dim)


def _check(k: float, form: str, huber: float, keep_argmax: bool) -> None:
    check_choice("form of top-k", form, FORMS)
    if not k >= 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not huber >= 0:
        raise ValueError(f"huber must be at least 0, got {huber}")
    if huber and form != "soft":
        raise ValueError(f"huber={huber} smoothes the soft form, got form={form!r}: leave it at 0")
    if keep_argmax and form == "soft":
        raise ValueError("keep_argmax is for the forms 'hard' and '-inf': soft ones shift by theta")


def _filled(x: Tensor, keep: Tensor, form: str) -> Tensor:
    """x where it is kept, what the form puts elsewhere."""
    return torch.where(keep, x, float("-inf") if form == "-inf" else 0.0)


def _smooth(u: Tensor, huber: float) -> Tensor:
    """The form for u = max(x - theta, 0)."""
    return torch.where(u < huber, u.square() / (2 * huber), u - huber / 2) if huber else u


def _statistics(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x - mean (0 where not valid), mean and population deviation of each row.

    x, valid: [..., n]. Returns [..., n], [..., 1], [..., 1], float32 or float64. Two passes:
    E[x^2] - mean^2 cancels where the mean is large, and on a CPU the norm's kernel is several times
    as fast as `std`'s. A deviation within the rounding of the mean is 0.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if valid is None:
        n: int | Tensor = x.shape[-1]
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
    else:
        n = valid.sum(-1, keepdim=True).clamp_min(1)
        mean = x.masked_fill(~valid, 0).sum(-1, keepdim=True) / n
        centred = (x - mean).masked_fill(~valid, 0)
    sigma = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / n**0.5
    flat = sigma <= 4 * torch.finfo(x.dtype).eps * mean.abs()
    return centred, mean, sigma.masked_fill(flat, 0)


def _shift(sigma: Tensor, z: float | Tensor) -> Tensor:
    """theta - mean, [..., 1]. inf for a row without deviation, which keeps nothing; 0 where z is
    -inf: such rows are handled apart.
    """
    if isinstance(z, Tensor):
        z = z.to(sigma.dtype).masked_fill(z.isneginf(), 0)
    return (sigma * z).masked_fill(sigma == 0, float("inf"))


def _is_one_row(x: Tensor) -> bool:
    """Whether this is a decoding step on a CPU, where each small operation shows."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and 0 < x.numel() == x.shape[-1]


def _one_row(x: Tensor, z: float, huber: float) -> Tensor:
    """The soft form of a single row, its statistics as plain numbers: a third of the operations."""
    row = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = row.mean().item()
    u = row - mean
    sigma = torch.linalg.vector_norm(u).item() / row.numel() ** 0.5
    if not sigma > 4 * torch.finfo(row.dtype).eps * abs(mean):
        return torch.zeros_like(x) if sigma == sigma else torch.full_like(x, float("nan"))
    return _smooth(u.sub_(sigma * z).clamp_min_(0), huber).to(x.dtype)


class _Soft(torch.autograd.Function):
    """max(x - theta, 0) and its exact gradient. With a_i the slope at entry i (1 or 0, or between
    them where smooth), g upstream and S = sum over i of a_i g_i:

        dx_j = a_j g_j - S / n - S z (x_j - mean) / (n sigma)

    A row without deviation has no direction to widen in: its last term is zero, as are its a.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: float | Tensor, valid: Tensor | None, detached: bool, huber: float
    ) -> Tensor:
        u, mean, sigma = _statistics(x, valid)
        u = _smooth(u.sub_(_shift(sigma, z)).clamp_min_(0), huber)
        ctx.detached, ctx.huber = detached, huber
        ctx.z = z if isinstance(z, float) else None
        ctx.save_for_backward(x, None if isinstance(z, float) else z, valid, mean, sigma)
        if isinstance(z, Tensor):
            u = torch.where(z.isneginf(), x.to(u.dtype), u)
        if valid is not None:
            u = u.masked_fill(~valid, 0)
        return u.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # the decorator hides ctx
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, z, valid, mean, sigma = ctx.saved_tensors
        z = ctx.z if z is None else z
        centred = x.to(mean.dtype) - mean
        g = grads[0].to(mean.dtype)
        if valid is not None:
            centred, g = centred.masked_fill(~valid, 0), g.masked_fill(~valid, 0)
        shift = _shift(sigma, z)
        slope = ((centred - shift) / ctx.huber).clamp(0, 1) if ctx.huber else centred > shift
        direct = g * slope  # [..., n]
        whole = z.isneginf() if isinstance(z, Tensor) else None
        if not ctx.detached:
            n = x.shape[-1] if valid is None else valid.sum(-1, keepdim=True).clamp_min(1)
            s = direct.sum(-1, keepdim=True) / n  # [..., 1]
            tilt = (s * shift / sigma.square()).masked_fill(sigma == 0, 0)  # s z / sigma
            direct = direct.sub_(s).sub_(centred.mul_(tilt))
        if whole is not None:
            direct = torch.where(whole, g, direct)
        if valid is not None:
            direct = direct.masked_fill(~valid, 0)
        return direct.to(x.dtype), *[None] * 4
