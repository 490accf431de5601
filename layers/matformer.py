"""MatFormer: an FFN whose first hidden numbers are narrower FFNs (arXiv:2310.07707, sec. 3).

The widths that training takes are a recipe's business; a forward takes any.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from layers.base import Cost, FFNOutput, WeightCost
from layers.linear import Linear
from layers.mlp import ACTIVATION_FLOPS, ACTIVATIONS
from layers.names import check_choice, check_positive
from layers.prefix import Prefixes, check_widths, default_widths, prefixes
from layers.swiglu import GATE_FLOPS, GATES, default_d_ff, glu


@dataclass(frozen=True, kw_only=True)
class MatFormerConfig:
    """Sizes of a nested FFN; the widest of its submodels is an `mlp`, where gated a `swiglu`."""

    d_model: int
    d_ff: int | None = None  # hidden width F; None: as mlp's, where gated as swiglu's
    activation: str | None = None  # as mlp's or swiglu's; None: gelu, where gated silu
    gated: bool = False  # the paper's is not
    widths: tuple[int, ...] | None = None  # rising, up to F; None: F/8, F/4, F/2, F, rounded down

    def __post_init__(self) -> None:
        if self.widths is not None:  # a recipe's YAML knows lists alone
            object.__setattr__(self, "widths", tuple(self.widths))
        check_positive(d_model=self.d_model, d_ff=self.hidden)
        kind, known = ("gated", GATES) if self.gated else ("ungated", ACTIVATIONS)
        check_choice(f"activation of {kind} matformer", self.act, known)
        check_widths(self.granularities, self.hidden)

    @property
    def hidden(self) -> int:
        """F, with the default filled in."""
        if self.d_ff is not None:
            return self.d_ff
        return default_d_ff(self.d_model) if self.gated else 4 * self.d_model

    @property
    def act(self) -> str:
        """The activation, with the default filled in."""
        if self.activation is not None:
            return self.activation
        return "silu" if self.gated else "gelu"

    @property
    def granularities(self) -> tuple[int, ...]:
        """The widths of the submodels that training takes, the narrowest first."""
        return default_widths(self.hidden) if self.widths is None else self.widths

    @property
    def inner_name(self) -> str:
        """What the first leaf is called."""
        return "gate_up" if self.gated else "up"

    @property
    def groups(self) -> int:
        """Rows of the first matrix by hidden number."""
        return 2 if self.gated else 1

    def parts(self, width: int | None) -> Prefixes:
        """What the FFN of that width takes of both leaves. None: all."""
        return prefixes(width, self.hidden, groups=self.groups)

    def cost(self, width: int | None = None) -> Cost:
        """One token's cost; of a width, that of the FFN of its hidden numbers alone."""
        self.parts(width)  # its own checks
        f = self.hidden if width is None else width
        act, n = (GATE_FLOPS if self.gated else ACTIVATION_FLOPS)[self.act], self.d_model * f

        def matrix(name: str, numbers: int, other_flops: int = 0) -> WeightCost:
            return WeightCost(
                name=f"{name}.weight", role="ffn", params=numbers, flops=2 * numbers,
                other_flops=other_flops,
            )  # fmt: skip

        return Cost((matrix(self.inner_name, self.groups * n, act * f), matrix("down", n)))


class MatFormer(nn.Module):
    """y = down[:, :m] activation(up[:m] x), or gated: down[:, :m] (act(gate[:m] x) * up[:m] x).

    The leaves are those of `mlp` and `swiglu`, name by name, so weights go from one to the other.
    A part of the weights gets a gradient of exact zeros where a width does not reach: decay and
    moments of an optimizer go on there. Delayed scales are one set for all widths.
    """

    nested = True  # forward takes a width
    gate_up: Linear  # [2F, D], gate rows first; where gated
    up: Linear  # [F, D]; where not

    def __init__(self, config: MatFormerConfig):
        super().__init__()
        c = self.config = config
        inner = Linear(c.d_model, c.groups * c.hidden, role="ffn")
        self.add_module(c.inner_name, inner)
        self.down = Linear(c.hidden, c.d_model, role="ffn")  # [D, F]

    def forward(
        self,
        x: Tensor,
        carry: Tensor | None = None,
        mask: Tensor | None = None,
        width: int | None = None,
    ) -> FFNOutput:
        """The FFN of the first `width` hidden numbers, any from 1 to F; None: of all.

        x: [B, S, D]; mask: [B, S] bool. carry is not read and not handed on.
        """
        c, parts = self.config, self.config.parts(width)
        if mask is not None:  # whatever stands there, NaN included; without biases 0 gives 0
            x = x.masked_fill(~mask[..., None], 0)
        if c.gated:
            h = glu(self.gate_up(x, parts.inner), c.act)  # [B, S, m]
        else:
            h = ACTIVATIONS[c.act](self.up(x, parts.inner))  # [B, S, m]
        return FFNOutput(self.down(h, parts.down).type_as(x))
