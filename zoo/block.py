"""One layer of the language model: an ordered list of residual branches.

Where later ideas go, without a change to what stands:

- another layout (FFN, attention, FFN): another list of branches; each has a name of its own, and a
  second reporting FFN gets its branch's name as a prefix of its stats;
- another token mixer: a branch with `mixes=True`, called like `zoo.heads.Heads`;
- a variant that reads the raw residual and owns its norm: a branch with `norm=None`, which a row
  of the catalogue asks for with `own_norm=True`;
- a part shared by several layers: as memory pools are (`zoo.pools`), a module of the model, handed
  to the constructors of the variants that read it and called as a module;
- a width of its own per layer: an option of that layer's choice in the plan (`zoo.plan`); the
  residual stream keeps `d_model`;
- state that is no gradient: a buffer that forward only reads; `stats` carry what moves it, and a
  callback moves it once per optimizer step.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from layers.base import FFNOutput, Later
from zoo.cache import LayerCache


class Branch(NamedTuple):
    """x + inner(norm(x))."""

    name: str  # the module's name in the block: "attention", "ffn"
    inner: nn.Module
    norm: nn.Module | None  # named "<name>_norm"; None: inner gets the raw residual stream
    mixes: bool = False  # tokens see one another: called with positions, mask and cache


class Context(NamedTuple):
    """What every block of one forward reads."""

    rope: tuple[Tensor, Tensor]  # cosines and sines of the positions, [S, h / 2] each
    mask: Tensor | None  # [B, S] bool, True where a token is real
    attention_mask: Tensor | None  # [B, 1, S, P] bool, as in `zoo.attention.Attention`


class BlockOutput(NamedTuple):
    """What one block hands on."""

    x: Tensor  # [B, S, D]
    carry: Tensor | None  # [B, S, E], the last router logits so far
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]
    later: tuple[Later, ...] = ()  # for the stream after later blocks; not in x


class Block(nn.Module):
    """x <- x + inner(norm(x)) for each branch in turn."""

    def __init__(self, branches: Sequence[Branch]):
        super().__init__()
        self.layout = tuple(branch.name for branch in branches)
        self.mixers = frozenset(branch.name for branch in branches if branch.mixes)
        for branch in branches:
            if branch.norm is not None:
                self.add_module(f"{branch.name}_norm", branch.norm)
            self.add_module(branch.name, branch.inner)

    def forward(
        self,
        x: Tensor,
        carry: Tensor | None,
        context: Context,
        cache: LayerCache | None = None,
        width: int | None = None,
        heads: int | None = None,
    ) -> BlockOutput:
        """What the block makes of x, with all of its parts or with some.

        Args:
            x: [B, S, D].
            carry: [B, S, E'], the last router logits of earlier blocks.
            context, cache: as the fields say; of this layer.
            width: the first so many hidden numbers of a nested FFN alone; None: all.
            heads: the first so many heads of the attention alone; None: all.
        """
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        later: tuple[Later, ...] = ()
        for name in self.layout:
            inner, norm = self._modules[name], self._modules.get(f"{name}_norm")
            assert inner is not None
            h = x if norm is None else norm(x)
            if name in self.mixers:
                part = {} if heads is None else {"heads": heads}
                x = x + inner(h, context.rope, context.attention_mask, cache, **part)
                continue
            part = {} if width is None else {"width": width}
            out: FFNOutput = inner(h, carry, context.mask, **part)
            x = x + out.y
            carry = carry if out.carry is None else out.carry
            losses.update(out.losses or {})
            stats.update(out.stats or {})
            later += () if out.later is None else (out.later,)
        return BlockOutput(x, carry, losses, stats, later)
