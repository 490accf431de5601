"""What an evaluation adds up: nats and bytes by domain, assignments by layer and domain.

Sums in float64, divided at the end, so that batches and processes may come in any shape and order.
They live outside the model: a cast of it must not reach them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from layers.base import Routing
from layers.loop_predictor import Loops
from recipes.accuracy import Accuracy
from recipes.batches import Batch
from recipes.choices import ChoiceLog
from recipes.density import Density
from recipes.health import RouterHealth, routers_of, watched
from recipes.loop_health import LoopHealth, looped
from recipes.memory_health import MemoryHealth, Search, searched
from recipes.ranks import meaned
from recipes.report.layer_records import LayerLoad
from recipes.report.records import Final
from recipes.sharpness import EPS, Sharpness

DEAD_BELOW = 0.1  # of the even share (comparison.md section 8)


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, in fp32 whatever the logits are: [B, S]."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none"
    ).view_as(targets)


class BitsPerByte(Metric):
    """Nats summed / bytes summed / ln 2, in all and by domain."""

    full_state_update = False
    nats: Tensor  # [domains] float64
    n_bytes: Tensor  # [domains] int64
    n_tokens: Tensor  # [domains] int64

    def __init__(self, domains: Sequence[str]):
        super().__init__()
        self.domains = tuple(domains)
        n = len(self.domains)
        self.add_state("nats", torch.zeros(n, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_bytes", torch.zeros(n, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.zeros(n, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, batch: Batch) -> None:
        """Add a batch of one domain. nats: [B, S] of each target; only judged ones count."""
        domain, judged = batch.domain or 0, batch.judged
        kept = nats.double() if judged is None else nats.double() * judged
        self.nats[domain] += kept.sum()
        self.n_bytes[domain] += batch.n_bytes.sum()
        self.n_tokens[domain] += nats.numel() if judged is None else judged.sum()

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """nats, bytes and tokens of each domain, over all processes."""
        return self.nats, self.n_bytes, self.n_tokens

    def final(self) -> Final:
        """The figures of everything added so far."""
        sums = self.compute()
        nats, n_bytes, n_tokens = (part.reshape(-1).tolist() for part in sums)
        by_domain = {
            domain: nats[i] / n_bytes[i] / math.log(2)
            for i, domain in enumerate(self.domains)
            if n_bytes[i]
        }
        return Final(
            bpb=sum(nats) / sum(n_bytes) / math.log(2),
            nats_per_token=sum(nats) / sum(n_tokens),
            bpb_by_domain=by_domain,
            eval_bytes=sum(n_bytes),
            eval_tokens=sum(n_tokens),
        )


class ExpertLoad(Metric):
    """Assignments by MoE layer, domain and expert, as the layers' `stats` report them."""

    full_state_update = False

    def __init__(self, domains: Sequence[str], experts: dict[int, tuple[str, ...]]):
        """experts: names of the experts of each MoE layer, FFN experts ("ffn 0", ...) first."""
        super().__init__()
        self.domains, self.experts = tuple(domains), experts
        for layer, names in experts.items():
            counts = torch.zeros(len(self.domains), len(names), dtype=torch.float64)
            self.add_state(f"counts_{layer}", counts, dist_reduce_fx="sum")

    def update(self, stats: Sequence[dict[str, Tensor] | None], domain: int | None) -> None:
        """Add one batch. stats: one mapping a layer."""
        for layer in self.experts:
            counts = (stats[layer] or {})["counts"]
            getattr(self, f"counts_{layer}")[domain or 0] += counts.double()

    def compute(self) -> dict[int, Tensor]:
        """{layer: assignments [domains, E]}, over all processes."""
        return {layer: getattr(self, f"counts_{layer}") for layer in self.experts}

    def loads(self) -> tuple[LayerLoad, ...]:
        """A record per MoE layer."""
        return tuple(
            load_of(layer, self.experts[layer], counts, self.domains)
            for layer, counts in self.compute().items()
        )


def load_of(
    layer: int, names: tuple[str, ...], counts: Tensor, domains: Sequence[str]
) -> LayerLoad:
    """The record of one layer. counts: [domains, E], FFN experts first."""
    n_ffn = sum(name.startswith("ffn") for name in names)
    counts = counts.reshape(len(domains), len(names))
    every = counts.sum(0)
    ffn = every[:n_ffn]
    share = ffn / ffn.sum().clamp(min=1)
    entropy = -torch.xlogy(share, share).sum() / math.log(n_ffn) if n_ffn > 1 else torch.ones(())
    seen = [i for i in range(len(domains)) if counts[i].sum() > 0]
    return LayerLoad(
        layer=layer,
        experts=names,
        n_ffn_experts=n_ffn,
        counts=tuple(every.tolist()),
        counts_by_domain={domains[i]: tuple(counts[i].tolist()) for i in seen},
        entropy=entropy.item(),
        largest_share=share.max().item(),
        dead=int((ffn < DEAD_BELOW * ffn.mean()).sum()) if ffn.sum() > 0 else n_ffn,
        zero_computation_share=(every[n_ffn:].sum() / every.sum().clamp(min=1)).item(),
    )


class Evaluation:
    """One pass over evaluation batches: bits per byte, sharpness, mean losses; load and health of
    routers, and their choices."""

    def __init__(
        self, model: nn.Module, domains: Sequence[str], eps: float = EPS, group: Any = None
    ):
        """eps: reach of the sharpness; group: processes whose batches count together; None: all."""
        self.bpb, self.accuracy = BitsPerByte(domains), Accuracy()
        self.sharpness = Sharpness(eps)
        names = expert_names(model)
        self.load = ExpertLoad(domains, names)
        self.health = RouterHealth(routers_of(model), {k: len(of) for k, of in names.items()})
        self.choices = ChoiceLog()
        self.memory = MemoryHealth(model, domains)
        self.loops = LoopHealth(model, domains)
        self.density = Density(model, domains)
        for metric in (
            self.bpb,
            self.accuracy,
            self.sharpness,
            self.load,
            self.health,
            self.choices,
            self.memory,
            self.loops,
            self.density,
        ):
            metric.process_group = group
        self._losses: dict[str, float] = {}
        self._tokens = 0

    def update(
        self, output: Any, batch: Batch, seen: Mapping[int, Routing] | None = None,
        searches: Mapping[int, Search] | None = None, loops: Mapping[int, Loops] | None = None,
    ) -> None:  # fmt: skip
        """Add the model's output for one batch.

        seen: what routers returned, as `recipes.health.watched` gives it; without it there is
        neither health nor choices.
        searches: of memory layers, as `recipes.memory_health.searched` gives them; without them
        there is no recall.
        loops: of layers that loop, as `recipes.loop_health.looped` gives them.
        """
        self.bpb.update(token_nats(output.logits, batch.targets), batch)
        self.accuracy.update(output.logits, batch)
        self.sharpness.update(output.logits, batch)
        self.load.update(output.stats, batch.domain)
        self.health.update(seen or {}, batch.mask)
        self.choices.update(seen or {}, batch)
        self.memory.update(output.stats, searches or {}, batch.domain, batch.mask)
        self.loops.update(loops or {}, batch)
        self.density.update(output.stats, batch.domain)
        n = batch.targets.numel() if batch.mask is None else int(batch.mask.sum())
        self._tokens += n
        for name, loss in output.losses.items():
            self._losses[name] = self._losses.get(name, 0.0) + n * loss.item()

    def final(self) -> Final:
        """The figures of everything added so far, accuracy among them where there are answers."""
        return replace(self.bpb.final(), accuracy=self.accuracy.value())

    @property
    def losses(self) -> dict[str, float]:
        """Unweighted auxiliary losses, mean over tokens, of all processes."""
        sums = meaned(self._losses | {"": float(self._tokens)})
        n_tokens = sums.pop("")
        return {name: total / (n_tokens or 1) for name, total in sums.items()}


def evaluate(
    model: nn.Module, batches: Iterable[Batch], domains: Sequence[str], eps: float = EPS,
    group: Any = None,
) -> Evaluation:  # fmt: skip
    """Run a model over batches, each of one domain. Draws no random number, changes no state.

    eps: reach of the sharpness; group: processes that evaluate the rest; None: all there are.
    """
    evaluation = Evaluation(model, domains, eps, group)
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    seeing = watched(model), searched(model), looped(model)
    with torch.no_grad(), seeing[0] as seen, seeing[1] as searches, seeing[2] as loops:
        for batch in batches:
            batch = on_device(batch, device)
            seen.clear()
            searches.clear()
            loops.clear()
            output = model(batch.tokens, mask=batch.mask)
            evaluation.update(output, batch, seen, searches, loops)
    model.train(training)
    return evaluation


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors there."""
    moved = {k: x.to(device) for k, x in batch._asdict().items() if isinstance(x, Tensor)}
    return batch._replace(**moved)


def expert_names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """{layer: names of its experts} for the layers whose FFN routes."""
    blocks = cast(Any, model).blocks
    configs = [getattr(block.ffn, "config", None) for block in blocks]
    named = {layer: getattr(config, "expert_names", ()) for layer, config in enumerate(configs)}
    return {layer: tuple(names) for layer, names in named.items() if names}
