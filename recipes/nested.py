"""Training of nested FFNs: which granularities a step runs, and what their losses come to.

MatFormer, arXiv:2310.07707, 3.2. A granularity is one width for every nested layer, the same place
in each layer's own list. The paper samples one a step; its released code runs all on the same batch
and sums their losses; a sandwich runs the widest, the narrowest and one between (arXiv:1903.05134).

What is sampled is a function of (seed, step) alone: ranks agree, a resumed run goes on alike, and
the micro-batches of a step train the same.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any, NamedTuple
from zlib import crc32

from torch import Tensor

from layers.precision.random import mixed
from recipes.schema import Recipe
from zoo.model import LanguageModel, ModelConfig

STREAM = crc32(b"nested")  # of the random numbers of a seed
Widths = tuple[int | None, ...]  # one for each layer; None: a layer that is not nested


class Pass(NamedTuple):
    """One forward of a step: what it minimises, and what is told of it."""

    loss: Tensor
    logits: Tensor  # [B, S, V]
    nats: Tensor  # [B, S], 0 where a target is not judged; detached
    losses: dict[str, Tensor]  # unweighted, detached
    stats: Sequence[dict[str, Tensor] | None]  # of each layer


class Nesting:
    """The granularities of a recipe's model, the narrowest first, and what each step trains."""

    def __init__(self, recipe: Recipe):
        """recipe: with `nested`.

        Raises:
            ValueError: for a model without nested FFNs, or probabilities that do not fit them.
        """
        assert recipe.nested is not None
        self.config, self.seed = recipe.nested, recipe.seed
        self.widths = granularities(recipe.model)
        n, given = len(self.widths), self.config.probabilities
        if given and len(given) != n:
            raise ValueError(
                f"nested.probabilities must name one for each of {n} granularities, "
                f"got {len(given)}"
            )
        self.probabilities = tuple(given) or (1 / n,) * n

    def chosen(self, step: int) -> tuple[int, ...]:
        """The granularities that a step trains, the widest first."""
        n, mode = len(self.widths), self.config.mode
        every = tuple(reversed(range(n)))
        if mode == "joint" or (mode == "sandwich" and n < 3):
            return every
        if mode == "sample":
            return (self._drawn(step, range(n)),)
        between = range(1, n - 1)
        return (n - 1, self._drawn(step, between), 0)

    def _drawn(self, step: int, among: Sequence[int]) -> int:
        """One of them by their probabilities."""
        u = (mixed(self.seed, step, STREAM) >> 32 & 0xFFFFFFFF) / 2**32
        upto = list(accumulate(self.probabilities[i] for i in among))
        place = sum(u * upto[-1] >= p for p in upto[:-1])
        return among[place]

    def run(self, step: int, forward: Callable[..., Pass]) -> Pass:
        """The passes of a step as one.

        The loss is their sum or mean; nats are those of the widest, losses the mean over passes,
        stats their sum.

        Args:
            step: optimizer steps already taken.
            forward: called with `widths`, and for narrower passes with the `teacher` logits of the
                widest, [B, S, V] detached, where they are to be distilled from it.
        """
        first, *rest = self.chosen(step)
        passes = [forward(widths=self.widths[first])]
        teacher = {"teacher": passes[0].logits.detach()} if self.config.distill else {}
        passes += [forward(widths=self.widths[i], **teacher) for i in rest]
        loss = sum((p.loss for p in passes[1:]), start=passes[0].loss)
        mean = {
            name: sum((p.losses[name] for p in passes[1:]), start=value) / len(passes)
            for name, value in passes[0].losses.items()
        }
        return passes[0]._replace(
            loss=loss / len(passes) if self.config.reduction == "mean" else loss,
            losses=mean,
            stats=[_added([p.stats[i] for p in passes]) for i in range(len(passes[0].stats))],
        )

    def mean_over_steps(self, of: Sequence[float], steps: int) -> float:
        """What steps come to, summed over the granularities that each trains, their mean.

        of: [granularities], e.g. FLOPs; steps: of the whole run, its very draws.
        """
        if len(self.chosen(0)) == len(self.widths):
            return sum(of)
        return fmean(sum(of[i] for i in self.chosen(step)) for step in range(steps))

    def compile(self, model: LanguageModel) -> None:
        """A graph for each granularity: a width that is a symbol would be slower in all."""
        import torch._dynamo.config as dynamo

        dynamo.recompile_limit = max(dynamo.recompile_limit, 8 + len(self.widths))
        model.compile(dynamic=False)


def granularities(config: ModelConfig) -> tuple[Widths, ...]:
    """The widths of all layers at each granularity, the narrowest first.

    Raises:
        ValueError: where no layer is nested, one is too narrow, or layers have different numbers.
    """
    tables = [tuple(getattr(choice.config, "granularities", ())) for choice in config.layers()]
    sizes = {len(table) for table in tables if table}
    if not sizes:
        names = ", ".join(dict.fromkeys(choice.entry.name for choice in config.layers()))
        raise ValueError(
            f"nested needs layers whose FFN has granularities (matformer, or moe without shared "
            f"experts), got {names}"
        )
    if len(sizes) > 1:
        raise ValueError(
            f"nested layers must have equally many granularities, got {sorted(sizes)}: give widths"
        )
    if any(table and table[0] < 1 for table in tables):
        raise ValueError("nested: a layer is too narrow to have an eighth of its width: widen it")
    return tuple(tuple(table[i] if table else None for table in tables) for i in range(sizes.pop()))


def check_nested(recipe: Recipe) -> None:
    """Raise for a model, or probabilities, that no nested training could use."""
    if recipe.nested is not None:
        Nesting(recipe)


def _added(stats: Sequence[dict[str, Tensor] | None]) -> dict[str, Any] | None:
    """Stats are sums, so those of several passes add."""
    first = stats[0]
    if first is None:
        return None
    return {name: sum((s or {})[name] for s in stats) for name in first}
