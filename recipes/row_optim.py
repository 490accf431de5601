"""Optimizers for large tables of which a step touches few rows: their cost is that of those rows.

A gradient is taken as `layers.sparse_rows` makes it, or dense, of which the rows that are not all
zero count as touched, so that both forms mean the same. For each touched row i, with its gradient
g_i, step t, and T_i = t - (the step at which it was last touched):

    weight decay   w_i *= prod over the T_i steps of (1 - lr_s * weight_decay): what AdamW's would
                   have made of the row by now, all of it when the row is touched
    RowAdam        m_i = b1 m_i + (1 - b1) g_i;  v_i = b2 v_i + (1 - b2) g_i^2
                   w_i -= lr * (m_i / (1 - b1^n)) / (sqrt(v_i / (1 - b2^n)) + eps)
    RowAdagrad     a_i += g_i^2;  w_i -= lr * g_i / (sqrt(a_i) + eps)

    second_moment    "element"  v and a as written, one for each number
                     "row"      one for each row, of the mean of g_i^2: half the memory of Adam's
                                state, and next to none for Adagrad (memory.md 8)
    moments          "lazy"     those of untouched rows stay, as torch's SparseAdam has it
                     "decayed"  m_i *= b1^(T_i - 1) and v_i *= b2^(T_i - 1) first: AdamW's moments
    bias_correction  "row"      n is how often row i was touched: right for "lazy" moments
                     "global"   n is t, as SparseAdam has it: right for "decayed" moments

AdamW goes on moving a row by its momentum when it is no longer touched; nothing here does. All
agree with AdamW where every row is touched at every step. State has the size of the table; it is
made at the first step, and rows never touched keep zero pages where the system gives such.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from layers.names import check_choice, check_positive
from layers.sparse_rows import merged
from recipes.row_rules import AdamFactors, adagrad, adam

SECOND_MOMENTS = ("element", "row")
MOMENTS = ("lazy", "decayed")
BIAS_CORRECTIONS = ("row", "global")


class RowOptimizer(Optimizer, ABC):
    """What the row-wise optimizers share: which rows, and the weight decay that waits for them.

    A table without a gradient has no row touched. Groups hold `steps`, and `log_decay`, the sum
    over steps of log(1 - lr * weight_decay), so that a learning rate may change at every step.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        check_positive(lr=defaults["lr"], eps=defaults["eps"])
        check_choice("second_moment", defaults["second_moment"], SECOND_MOMENTS)
        super().__init__(params, {**defaults, "steps": 0, "log_decay": 0.0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; tables alone.

        Raises:
            ValueError: for what is not [M, D], or a negative weight decay.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.dim() != 2:
                raise ValueError(f"a table must have the shape [M, D], got {tuple(p.shape)}")
        if group["weight_decay"] < 0:
            raise ValueError(f"weight_decay must be 0 or more, got {group['weight_decay']}")

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] # torch's overloads
        self, closure: Callable[[], Any] | None = None
    ) -> Any:
        """One update of the rows that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
            if group["weight_decay"]:
                group["log_decay"] += _log_of_decay(group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                rows, g = touched(p.grad)
                if len(rows):
                    self._update(p, rows, g, self._kept(p, rows, group), group)
                    torch.autograd.graph.increment_version(p)  # a kernel may have written it
        return loss

    @abstractmethod
    def _update(
        self, p: Tensor, rows: Tensor, g: Tensor, keep: Tensor, group: dict[str, Any]
    ) -> None:
        """Update rows. p: [M, D]; rows: [U]; g: [U, D]; keep: [U], what decay leaves of them."""

    def _kept(self, p: Tensor, rows: Tensor, group: dict[str, Any]) -> Tensor:
        """What the weight decay that has gathered leaves of each row, from now on settled. [U]"""
        if not group["log_decay"]:
            return torch.ones(len(rows), dtype=p.dtype, device=p.device)
        seen = _numbers(self.state[p], "log_decay", p, torch.float64)
        waiting = group["log_decay"] - seen.index_select(0, rows)
        seen.index_fill_(0, rows, group["log_decay"])
        return waiting.exp_().to(p.dtype)

    @torch.no_grad()
    def settle(self) -> None:
        """Bring every row's weight decay up to now, as for an evaluation. It reads whole tables."""
        for group in self.param_groups:
            for p in group["params"] if group["log_decay"] else ():
                seen = _numbers(self.state[p], "log_decay", p, torch.float64)
                p.mul_((group["log_decay"] - seen).exp_().to(p.dtype)[:, None])
                seen.fill_(group["log_decay"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but that numbers of rows keep their dtype, which torch makes the table's."""
        super().load_state_dict(state_dict)
        keep_dtypes(self, state_dict)


class RowAdam(RowOptimizer):
    """Adam of the touched rows with AdamW's weight decay; see the module."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0, *, second_moment: str = "element",
        moments: str = "lazy", bias_correction: str = "row",
    ):  # fmt: skip
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas must lie in [0, 1), got {tuple(betas)}")
        check_choice("moments", moments, MOMENTS)
        check_choice("bias_correction", bias_correction, BIAS_CORRECTIONS)
        super().__init__(params, {
            "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
            "second_moment": second_moment, "moments": moments, "bias_correction": bias_correction,
        })  # fmt: skip

    def _update(
        self, p: Tensor, rows: Tensor, g: Tensor, keep: Tensor, group: dict[str, Any]
    ) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if "moments" not in state:
            # [m | v] of a row side by side: read and written at once
            width = p.shape[1] + (1 if group["second_moment"] == "row" else p.shape[1])
            state["moments"] = p.new_zeros(p.shape[0], width)
        ones = torch.ones(len(rows), dtype=torch.float64, device=p.device)
        # of steps, that the moments fade for, and that the bias correction counts
        faded = self._faded(p, rows, group["steps"]) if group["moments"] == "decayed" else ones
        counts = group["bias_correction"] == "row"
        n = self._counted(p, rows).double() if counts else ones * group["steps"]
        factors = AdamFactors(
            keep=keep,
            m_keep=(beta1**faded).to(p.dtype),
            v_keep=(beta2**faded).to(p.dtype),
            step=(group["lr"] / (1 - beta1**n)).to(p.dtype),
            v_scale=(1 / (1 - beta2**n)).to(p.dtype),
        )
        adam(p, state["moments"], rows, g, factors, (beta1, beta2), group["eps"])

    def _faded(self, p: Tensor, rows: Tensor, step: int) -> Tensor:
        """Steps since each row was touched, this one included. [U] float64."""
        last = _numbers(self.state[p], "last", p, torch.int32)
        before = last.index_select(0, rows).double()
        last.index_fill_(0, rows, step)
        return step - before

    def _counted(self, p: Tensor, rows: Tensor) -> Tensor:
        """How often each row was touched, now included. [U] int32."""
        touches = _numbers(self.state[p], "touches", p, torch.int32)
        now = touches.index_select(0, rows).add_(1)
        touches.index_copy_(0, rows, now)
        return now


class RowAdagrad(RowOptimizer):
    """Adagrad of the touched rows with AdamW's weight decay; see the module."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, eps: float = 1e-10,
        weight_decay: float = 0.0, *, second_moment: str = "element",
    ):  # fmt: skip
        super().__init__(params, {
            "lr": lr, "eps": eps, "weight_decay": weight_decay, "second_moment": second_moment,
        })  # fmt: skip

    def _update(
        self, p: Tensor, rows: Tensor, g: Tensor, keep: Tensor, group: dict[str, Any]
    ) -> None:
        state = self.state[p]
        if "sum" not in state:
            width = 1 if group["second_moment"] == "row" else p.shape[1]
            state["sum"] = p.new_zeros(p.shape[0], width)
        adagrad(p, state["sum"], rows, g, keep, group["lr"], group["eps"])


def touched(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that a gradient [M, D] touches, [U] ascending, and their gradients, [U, D]."""
    if grad.layout == torch.sparse_coo:
        grad = merged(grad)
        return grad._indices()[0], grad._values()
    rows = (grad != 0).any(1).nonzero().squeeze(1)
    return rows, grad.index_select(0, rows)


@torch.no_grad()
def clip_tables(tables: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the tables' gradients so that their common norm is at most max_norm.

    As torch.nn.utils.clip_grad_norm_, of the touched rows alone. Returns [] the norm before.
    """
    values: list[Tensor] = []
    for p in tables:
        if p.grad is not None and p.grad.layout == torch.sparse_coo:
            p.grad = merged(p.grad)
            values.append(p.grad._values())
        elif p.grad is not None:
            values.append(p.grad)
    norm = torch.nn.utils.get_total_norm(values)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in values:
        g.mul_(factor.to(g.device))
    return norm


def keep_dtypes(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Put back the integers and float64s of a loaded state that torch cast to the table's dtype."""
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(saved, params, strict=True):
        for name, value in state_dict["state"].get(i, {}).items():
            here = optimizer.state[p][name]
            if isinstance(value, Tensor) and value.dtype != here.dtype:
                optimizer.state[p][name] = value.to(here.device, copy=True)


def _log_of_decay(group: dict[str, Any]) -> float:
    shrunk = group["lr"] * group["weight_decay"]
    if shrunk >= 1:
        raise ValueError(
            f"lr * weight_decay must be below 1, got {group['lr']} * {group['weight_decay']}"
        )
    return math.log1p(-shrunk)


def _numbers(state: dict[str, Any], name: str, p: Tensor, dtype: torch.dtype) -> Tensor:
    """A number for each row of p, zero at first. [M]"""
    if name not in state:
        state[name] = torch.zeros(p.shape[0], dtype=dtype, device=p.device)
    return state[name]
