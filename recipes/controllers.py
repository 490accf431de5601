"""State that moves between steps: routers' by what was chosen, schedules by the step itself."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from layers.scheduled import Scheduled
from recipes.schema import Recipe
from routers.balance import BalanceLoss, over_ranks
from routers.expert_choice import ExpertChoiceRouter
from routers.remoe import ReMoERouter
from routers.state import Steered


def controller_callbacks(recipe: Recipe) -> list[Callback]:
    """What the recipe's layers need between steps: nothing, if none has state that moves.

    Stands before whatever evaluates or saves, so that these see the state that a step left.
    """
    layers = recipe.model.layers()
    choices = [c for c in layers if c.router_entry is not None]
    moves = any(
        issubclass(c.router_entry.module, (Steered, ReMoERouter, ExpertChoiceRouter))  # pyright: ignore
        or getattr(c.router_config, "balance_scope", "") == "global_batch"
        for c in choices
    )
    found: list[Callback] = [RouterController(recipe.trainer.max_steps)] if moves else []
    if any(issubclass(c.entry.module, Scheduled) for c in layers):
        found.append(Schedules())
    return found


class Schedules(Callback):
    """Sets the buffers of scheduled layers (`layers.scheduled`) before each optimizer step."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Once a step, before its first micro-batch."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        for module in pl_module.modules():
            if isinstance(module, Scheduled):
                module.at_step(trainer.global_step, trainer.max_steps)


class RouterController(Callback):
    """Moves routers' buffers once per optimizer step, by what the step's training batches chose.

    Counts come from the `stats` that layers return, so neither an evaluation nor a recomputed
    forward is counted, and padding is not. They are summed over micro-batches and all processes.

    - A steered router (`routers.state`: a selection bias, MoE++'s tau) moves by `update`, up to
      `bias_until` of the run.
    - ReMoE's lambda moves by `update`, all layers alike, by their mean sparsity.
    - Thresholds of expert choice move by `update`, by the mean of the step's cuts.
    - A balance loss over the global batch gets the counts of the step's earlier micro-batches.

    All that lasts is in buffers, which a checkpoint after a whole step holds: nothing to restore.
    """

    def __init__(self, max_steps: int):
        """max_steps: optimizer steps of the run."""
        self.max_steps = max_steps
        self._routers: dict[int, nn.Module] = {}  # by layer, those whose state moves
        self._running: dict[int, Tensor] = {}  # by layer, `seen` of a balance loss
        self._sums: dict[int, Tensor] = {}  # by layer, what moves it, of the step so far
        self._tokens: Tensor | int = 0  # of the step so far

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the routers."""
        model: Any = pl_module.model
        found = {i: getattr(block.ffn, "router", None) for i, block in enumerate(model.blocks)}
        self._routers = {
            i: r
            for i, r in found.items()
            if isinstance(r, (ReMoERouter, ExpertChoiceRouter))
            or (isinstance(r, Steered) and r.moves)
        }
        losses = {i: getattr(router, "balance", None) for i, router in found.items()}
        self._running = {
            i: loss.seen
            for i, loss in losses.items()
            if isinstance(loss, BalanceLoss) and loss.seen is not None
        }

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a step's counts anew."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._sums, self._tokens = {}, 0
            for seen in self._running.values():
                seen.zero_()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Add a micro-batch; move the state where it was a step's last."""
        every = enumerate(outputs["stats"])
        counts = {i: stats["counts"] for i, stats in every if stats and "counts" in stats}
        for i, router in self._routers.items():
            moved_by = counts[i]
            if isinstance(router, ExpertChoiceRouter):  # [E + 1], wide enough to add counts to
                stats = outputs["stats"][i]
                moved_by = torch.cat([stats["cuts"], stats["pools"].view(1)]).double()
            self._sums[i] = self._sums[i] + moved_by if i in self._sums else moved_by
        self._tokens += batch.tokens.numel() if batch.mask is None else batch.mask.sum()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            for i, seen in self._running.items():
                seen.add_(over_ranks(counts[i]))
            return
        if self._routers:
            self._move(progress=(trainer.global_step - 1) / self.max_steps)

    def _move(self, progress: float) -> None:
        """One all-reduce of every layer's counts, then each router by its rule."""
        layers = list(self._routers)
        tokens = torch.as_tensor(self._tokens, device=self._sums[layers[0]].device).view(1)
        parts = [self._sums[i] for i in layers] + [tokens]
        *sums, tokens = over_ranks(torch.cat(parts)).split([len(part) for part in parts])
        gates: list[tuple[ReMoERouter, Tensor]] = []
        for router, counts in zip(self._routers.values(), sums, strict=True):
            if isinstance(router, Steered):
                router.update(counts, progress=progress)
            elif isinstance(router, ReMoERouter):
                gates.append((router, counts))
            elif isinstance(router, ExpertChoiceRouter) and counts[-1] > 0:  # any real token
                router.update(counts[:-1] / counts[-1])
        if gates:
            sparsity = [1 - c.sum() / (len(c) * tokens.clamp_min(1)) for _, c in gates]
            mean = torch.cat(sparsity).mean().item()
            for router, _ in gates:
                router.update(mean)
