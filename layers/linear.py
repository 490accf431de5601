"""The leaves: the only matmuls and look-ups that a precision policy applies to."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.batched import expert_of_rows
from layers.matmul import expert_linear, linear, lookup
from layers.names import check_positive
from layers.precision.leaf import Leaf
from layers.prefix import Part

if TYPE_CHECKING:
    from layers.posttraining.correction import Correction


class Linear(Leaf):
    """y = x w^T (+ bias), every operand in the format that the policy gives its role.

    Weight [out, in], normal(0, 1 / sqrt(in)); bias [out], zero, only where asked for.
    """

    def __init__(self, d_in: int, d_out: int, *, role: str, bias: bool = False):
        super().__init__()
        check_positive(d_in=d_in, d_out=d_out)
        self.role = role
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.correction: Correction | None = None  # what post-training quantisation adds
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=fan_in_std(self.weight))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, part: Part | None = None) -> Tensor:
        """x: [..., in]. Returns [..., out], in the policy's compute dtype (else the input's).

        part: the rows and columns that run, as a leaf of these alone would; None: all.
        """
        w, bias, c = self.weight, self.bias, self.correction
        if part is not None:
            w, bias = _cut(part, w, bias, c)
        if c is None:
            return linear(x, w, bias, self)
        return c.corrected(linear(c.shifted(x), w, bias, self), x)

    def extra_repr(self) -> str:
        d_out, d_in = self.weight.shape
        return f"{d_in}, {d_out}, role={self.role!r}"


class ExpertLinear(Leaf):
    """y_n = x_n w_e^T (+ bias_e) for each row n of expert e. Weight [E, out, in], as `Linear`'s.

    Bias [E, out], zero, only where asked for.
    """

    def __init__(self, n_experts: int, d_in: int, d_out: int, *, role: str, bias: bool = False):
        super().__init__()
        check_positive(n_experts=n_experts, d_in=d_in, d_out=d_out)
        self.role = role
        self.weight = nn.Parameter(torch.empty(n_experts, d_out, d_in))
        self.bias = nn.Parameter(torch.empty(n_experts, d_out)) if bias else None
        self.correction: Correction | None = None  # what post-training quantisation adds
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=fan_in_std(self.weight))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        counts: Tensor,
        bias_weights: Tensor | None = None,
        backend: str = "auto",
        part: Part | None = None,
    ) -> Tensor:
        """Each row times its expert's matrix.

        x: [N, in], rows sorted by expert; counts: [E] int64, rows of each; bias_weights: [N, 1],
        what multiplies the bias of each row, None: 1; backend: how the products run, a row of
        `layers.grouped.BACKENDS`; part: as `Linear`'s, of every matrix. Returns [N, out].
        """
        w, bias, c = self.weight, self.bias, self.correction
        if part is not None:
            w, bias = _cut(part, w, bias, c)
        if c is None:
            y = expert_linear(x, w, counts, self, backend)
        else:
            y = c.corrected(
                expert_linear(c.shifted(x, counts), w, counts, self, backend), x, counts
            )
        if bias is None:
            return y
        bias = F.embedding(expert_of_rows(counts, y.shape[0]), bias)
        return y + (bias if bias_weights is None else bias * bias_weights).to(y.dtype)

    def one(
        self,
        x: Tensor,
        expert: int,
        bias_weights: Tensor | None = None,
        part: Part | None = None,
    ) -> Tensor:
        """Rows of one expert. x: [N, in]; bias_weights: [N, 1]. Returns [N, out]."""
        w = self.weight[expert]
        bias = None if self.bias is None else self.bias[expert]
        c = None if self.correction is None else self.correction.of(expert)
        if part is not None:
            w, bias = _cut(part, w, bias, c)
        if c is None:
            y = linear(x, w, None, self, expert)
        else:
            y = c.corrected(linear(c.shifted(x), w, None, self, expert), x)
        if bias is None:
            return y
        return y + (bias if bias_weights is None else bias * bias_weights).to(y.dtype)

    def weight_sets(self) -> int:
        """One for each expert."""
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        n_experts, d_out, d_in = self.weight.shape
        return f"{n_experts}, {d_in}, {d_out}, role={self.role!r}"


class ValueTable(Leaf):
    """y_t = sum over k of weights[t, k] * weight[ids[t, k]]. Weight [M, D], normal(0, 1 / sqrt(D)).

    A low format is applied after the gather and row by row, which equals gathering from a quantised
    table and costs only the rows touched (precision.md section 10).

    sparse: the gradient is a sparse COO tensor of the rows that were read, summed in the table's
    dtype (`layers.sparse_rows`), which no step has to fill, norm or clear M rows of. It may be set
    at any time, and takes an optimizer that knows such gradients (`recipes.row_optim`, SparseAdam).
    """

    multiplies = False

    def __init__(self, n_rows: int, d_out: int, *, role: str, sparse: bool = False):
        super().__init__()
        check_positive(n_rows=n_rows, d_out=d_out)
        self.role, self.sparse = role, sparse
        self.weight = nn.Parameter(torch.empty(n_rows, d_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.normal_(self.weight, std=fan_in_std(self.weight))

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        """ids: [T, K] int64; weights: [T, K]. Returns [T, D]."""
        return lookup(self.weight, ids, weights, self, sparse=self.sparse)

    def extra_repr(self) -> str:
        n_rows, d_out = self.weight.shape
        return f"{n_rows}, {d_out}, role={self.role!r}"


def _cut(
    part: Part, w: Tensor, bias: Tensor | None, correction: "Correction | None"
) -> tuple[Tensor, Tensor | None]:
    """The rows and columns of a weight that run, and their biases."""
    if correction is not None:
        raise ValueError(
            "a weight with a correction (pre-shift, low-rank factors) does not run in part: "
            "extract the narrower model, then quantise that"
        )
    return part.of_weight(w), None if bias is None else part.of_rows(bias)


def fan_in_std(weight: Tensor) -> float:
    """1 / sqrt(in): outputs start with the variance of their inputs, whatever the width.

    The papers' fixed 0.02 is this at a width of 2500; at the widths of a laptop it starts every
    FFN near zero. One rule for every variant, each factor by its own fan-in (comparison.md 3).
    """
    return weight.shape[-1] ** -0.5
