"""How good the submodels of a nested model are: each granularity, and mixtures between two.

Widths of mixtures are those of Mix'n'Match (arXiv:2310.07707, 3.3); consistency with the widest
model as there, sec. 4: agreement of the likeliest token, and KL of the next token.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from recipes.accuracy import Accuracy
from recipes.batches import Batch
from recipes.costing import run_cost, submodel_cost
from recipes.data import TextData
from recipes.metrics import BitsPerByte, on_device, token_nats
from recipes.nested import Widths, granularities
from recipes.ranks import data_group
from recipes.report.width_records import Submodel
from recipes.schema import Recipe
from recipes.task import LanguageModelTask
from zoo.consistency import next_token_kl
from zoo.mixnmatch import least_slope
from zoo.model import LanguageModel, ModelConfig


class Consistency(Metric):
    """How often, and how nearly, a submodel says what the widest model says."""

    full_state_update = False
    agreed: Tensor  # int64
    nats: Tensor  # float64
    n: Tensor  # int64

    def __init__(self) -> None:
        super().__init__()
        for name, dtype in {"agreed": torch.int64, "nats": torch.float64, "n": torch.int64}.items():
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def update(self, logits: Tensor, widest: Tensor, judged: Tensor | None) -> None:
        """Add a batch. logits, widest: [B, S, V]; judged: [B, S] bool, None: all positions."""
        same = logits.argmax(-1) == widest.argmax(-1)
        kl = next_token_kl(widest, logits).double()
        self.agreed += same.sum() if judged is None else (same & judged).sum()
        self.nats += kl.sum() if judged is None else (kl * judged).sum()
        self.n += same.numel() if judged is None else judged.sum()

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions that agree, summed KL and positions, over all processes."""
        return self.agreed, self.nats, self.n

    def value(self) -> tuple[float, float]:
        """Agreement in [0, 1], and KL(widest || submodel) in nats, means over positions."""
        agreed, nats, n = self.compute()
        return int(agreed) / int(n), float(nats) / int(n)


def submodels(config: ModelConfig) -> dict[Widths, bool]:
    """{widths: whether it is a granularity}, the narrowest first.

    Between two granularities stands the mixture at the middle of their hidden numbers; of an odd
    number of layers the wider half is the smaller.
    """
    trained = granularities(config)
    found: dict[Widths, bool] = {}
    for narrow, wide in zip(trained, (*trained[1:], None), strict=True):
        found[narrow] = True
        if wide is not None:
            hidden = sum(sum(w or 0 for w in widths) for widths in (narrow, wide)) // 2
            found.setdefault(least_slope(config, hidden=hidden), False)
    return found | dict.fromkeys(trained, True)


def final_widths(task: LanguageModelTask, data: TextData) -> tuple[Submodel, ...]:
    """Every submodel of a run on its last evaluation's text; none where training was not nested."""
    if task.nesting is None:
        return ()
    loader = data.eval_loader("validation", data.config.final_bytes_per_domain)
    return evaluate_widths(task.model, task.recipe, loader, data.domains, data_group(data.trainer))


def evaluate_widths(
    model: LanguageModel, recipe: Recipe, batches: Iterable[Batch], domains: Sequence[str],
    group: Any = None,
) -> tuple[Submodel, ...]:  # fmt: skip
    """Every submodel on the same batches, in eager mode whatever the training ran in.

    group: processes that evaluate the rest; None: all there are.
    """
    found = submodels(recipe.model)
    measured = {widths: (BitsPerByte(domains), Accuracy(), Consistency()) for widths in found}
    for metric in (m for metrics in measured.values() for m in metrics):
        metric.process_group = group
    training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.no_grad(), _eager(recipe):
        for batch in batches:
            batch = on_device(batch, device)
            widest = model(batch.tokens, mask=batch.mask).logits
            for widths, (bpb, accuracy, consistency) in measured.items():
                logits = model(batch.tokens, mask=batch.mask, widths=widths).logits
                bpb.update(token_nats(logits, batch.targets), batch)
                accuracy.update(logits, batch)
                consistency.update(logits, widest, batch.judged)
    model.train(training)
    return tuple(_record(recipe, w, found[w], *metrics) for w, metrics in measured.items())


def _eager(recipe: Recipe) -> Any:
    """A compiled model would be compiled for each mixture and shape once more."""
    return torch.compiler.set_stance("force_eager") if recipe.trainer.compile else nullcontext()


def _record(
    recipe: Recipe, widths: Widths, trained: bool, bpb: BitsPerByte, accuracy: Accuracy,
    consistency: Consistency,
) -> Submodel:  # fmt: skip
    cost = run_cost(submodel_cost(recipe, widths), tied=recipe.model.tie_embeddings)
    agreement, kl = consistency.value()
    return Submodel(
        widths=widths, trained=trained, params=cost.params, active_params=cost.active_params,
        nonembedding_params=cost.nonembedding_params, flops_per_token=cost.flops_per_token,
        bpb=_known(bpb.final().bpb), accuracy=accuracy.value(), agreement=agreement, kl=_known(kl),
    )  # fmt: skip


def _known(x: float) -> float | None:
    return x if isfinite(x) else None
