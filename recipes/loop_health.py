"""How often held-out tokens go through layers that loop: by layer, by domain, by token.

A hook on each loop predictor keeps what it chose in the last forward, during evaluation alone, as
`recipes.health` does with routers: training pays nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from layers.loop_predictor import LoopPredictor, Loops
from layers.versatile_ffn import VersatileFFNConfig
from recipes.batches import Batch
from recipes.hooks import seen_in
from recipes.report.depth_records import LayerLoops, TokenLoops
from recipes.schema import DataConfig
from recipes.text import tokenizer

FREQUENT = 256  # tokens of the vocabulary that the extremes are taken from, at most
RARE = 1 / 2000  # of all places: below it a token's mean would be noise
EXTREMES = 10  # of them at either end


def predictors_of(model: nn.Module) -> dict[int, LoopPredictor]:
    """{layer: its FFN's loop predictor} for the layers that have one."""
    found = (getattr(block.ffn, "loop_predictor", None) for block in cast(Any, model).blocks)
    return {layer: each for layer, each in enumerate(found) if isinstance(each, LoopPredictor)}


def looped(model: nn.Module) -> AbstractContextManager[dict[int, Loops]]:
    """{layer: the loops of its tokens}, as `recipes.hooks.seen_in`."""
    return seen_in(model, predictors_of(model), lambda module, args, loops: loops)


class LoopHealth(Metric):
    """Sums over the real tokens of an evaluation, by layer that loops."""

    full_state_update = False

    def __init__(self, model: nn.Module, domains: Sequence[str]):
        super().__init__()
        self.domains = tuple(domains)
        self.configs: dict[int, VersatileFFNConfig] = {}
        predictors = predictors_of(model)
        for layer, predictor in predictors.items():
            self.configs[layer] = cast(Any, model).blocks[layer].ffn.config
            counts = torch.zeros(len(self.domains), len(predictor.weight), dtype=torch.float64)
            self.add_state(f"counts_{layer}", counts, dist_reduce_fx="sum")
        if predictors:  # loops of each token of the vocabulary, and how often it stood there
            n = cast(Any, model).embedding.weight.shape[0]
            loops = torch.zeros(len(predictors), n, dtype=torch.float64)
            self.add_state("by_token", loops, dist_reduce_fx="sum")
            self.add_state("n_tokens", torch.zeros(n, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, seen: Mapping[int, Loops], batch: Batch) -> None:
        """Add one batch. seen: as `looped` gives it; without it nothing is added."""
        if not seen or not self.configs:
            return
        real = slice(None) if batch.mask is None else batch.mask.flatten()
        tokens = batch.tokens.flatten()[real]
        sums, n_tokens = cast(Tensor, self.by_token), cast(Tensor, self.n_tokens)
        n_tokens += tokens.bincount(minlength=len(n_tokens)).to(n_tokens)
        for row, layer in enumerate(self.configs):
            loops = seen[layer].choice.flatten()[real]
            counts = getattr(self, f"counts_{layer}")
            counts[batch.domain or 0] += loops.bincount(minlength=counts.shape[1]).to(counts)
            weights = (loops + 1).double()
            sums[row] += tokens.bincount(weights, minlength=len(n_tokens)).to(sums)

    def compute(self) -> tuple[dict[int, Tensor], Tensor | None, Tensor | None]:
        """{layer: tokens [domains, L]}, loops by layer and token, tokens; over all processes."""
        counts = {layer: getattr(self, f"counts_{layer}") for layer in self.configs}
        if not self.configs:
            return counts, None, None
        return counts, cast(Tensor, self.by_token), cast(Tensor, self.n_tokens)

    def layers(self, words: Callable[[int], str] | None = None) -> tuple[LayerLoops, ...]:
        """A record per layer that was seen. words: how a token is read; None: no tokens in it."""
        counts, by_token, n_tokens = self.compute()
        records = []
        for row, (layer, of) in enumerate(counts.items()):
            of = of.reshape(len(self.domains), -1)
            if not of.sum():
                continue
            extremes: dict[str, Any] = {}
            if words is not None and by_token is not None and n_tokens is not None:
                sums = by_token.reshape(len(self.configs), -1)[row]
                extremes = _extremes(sums, n_tokens.reshape(-1), words)
            records.append(self._record(layer, of, extremes))
        return tuple(records)

    def _record(self, layer: int, of: Tensor, extremes: dict[str, Any]) -> LayerLoops:
        c, counts = self.configs[layer], of.sum(0)
        loops = torch.arange(1, len(counts) + 1, dtype=counts.dtype, device=counts.device)
        width = None if not c.routes else 0.5
        if c.routes and c.fusion == "difficulty":
            width = 1 - ((counts * loops).sum() / counts.sum()).item() / c.max_loops
        named = zip(self.domains, of, strict=True)
        return LayerLoops(
            layer=layer,
            counts=tuple(counts.tolist()),
            counts_by_domain={name: tuple(row.tolist()) for name, row in named if row.sum()},
            width=width,
            **extremes,
        )


def _extremes(
    sums: Tensor, n_tokens: Tensor, words: Callable[[int], str]
) -> dict[str, tuple[TokenLoops, ...]]:
    """Of the most frequent tokens those of fewest and of most loops. sums, n_tokens: [V]."""
    common = n_tokens.sort(descending=True, stable=True).indices[:FREQUENT]
    common = common[n_tokens[common] > RARE * n_tokens.sum()]
    order = common[(sums[common] / n_tokens[common]).sort(stable=True).indices].tolist()
    n = min(EXTREMES, len(order) // 2)

    def told(ids: list[int]) -> tuple[TokenLoops, ...]:
        of = ((i, int(n_tokens[i])) for i in ids)
        return tuple(TokenLoops(text=words(i), count=k, loops=sums[i].item() / k) for i, k in of)

    return {"shallow": told(order[:n]), "deep": told(order[::-1][:n])}


def words_of(data: DataConfig) -> Callable[[int], str]:
    """How a token of a recipe's data is read; a task's, or a part of a character, by its number."""
    if data.task is not None:
        return str
    encoder = tokenizer(data.tokenizer)

    def word(token: int) -> str:
        text = encoder.decode([token])
        return f"#{token}" if "\ufffd" in text else text

    return word
