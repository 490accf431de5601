"""The precision of a run as it moves: random streams, the policy's schedule, delayed scales."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from layers.precision import Leaf, PrecisionPolicy, leaves, update_delayed_scales
from layers.precision.operands import OPERANDS
from recipes.ranks import data_rank, largest
from recipes.schema import Recipe
from zoo.precision import policy_of, rounding_seed, set_precision


def precision_callbacks(recipe: Recipe) -> list[Callback]:
    """What the recipe's precision needs between steps: nothing, if nothing of it ever moves.

    Stands before whatever evaluates or saves, so that these see the step as it was left.
    """
    policy = policy_of(recipe.precision)
    uses = [policy.default, *(rule.use for rule in policy.rules)]
    uses += [switch.rule.use for switch in policy.schedule]
    specs = [getattr(use, operand) for use in uses for operand in OPERANDS]
    moves = any(spec.is_random or spec.scope == "delayed" for spec in specs)
    if not moves and not policy.schedule:
        return []
    seed = rounding_seed(recipe.seed, policy)
    return [LivePrecision(policy, seed=seed, max_steps=recipe.trainer.max_steps)]


class LivePrecision(Callback):
    """Random streams for each micro-batch, switches before a step, delayed scales after it.

    Streams and switches are pure functions of (seed, step, micro-batch, rank), like the batches;
    delayed scales are buffers of the model. So a resumed run has no state of this to restore.
    An evaluation after step s computes in the formats of step s (precision.md section 19) and draws
    what the first micro-batch after it will draw, however often it is asked for.
    """

    def __init__(self, policy: PrecisionPolicy, *, seed: int, max_steps: int):
        """seed: of the streams, from `zoo.precision.rounding_seed`; max_steps: of the run."""
        self.policy, self.seed, self.max_steps = policy, seed, max_steps
        self._begin = 0  # optimizer steps done when the run starts or goes on
        self._active = policy.active(0, max_steps)  # the switches that hold, as the model was built
        self._drawn: tuple[int, int] | None = None  # step and micro-batch of the streams
        self._random: list[tuple[str, Leaf]] = []
        self._delayed: list[Leaf] = []

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The trainer itself knows its step only when it trains on."""
        self._begin = checkpoint["global_step"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The state that the last step left: a run killed at its very end evaluates in it."""
        self._find(_model(pl_module))
        self._switch(pl_module, max(self._begin - 1, 0))
        self._draw(self._begin, 0, data_rank(trainer).rank)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Switch where the step begins, and set the streams."""
        step, micro_batch = trainer.global_step, batch_idx % trainer.accumulate_grad_batches
        if micro_batch == 0:
            self._switch(pl_module, step)
            for leaf in self._delayed:
                assert leaf.operand_peaks is not None
                leaf.operand_peaks.zero_()  # an evaluation's peaks are not of this step
        self._draw(step, micro_batch, data_rank(trainer).rank)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Move the delayed scales on, once an optimizer step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        for leaf in self._delayed:
            assert leaf.operand_peaks is not None
            largest(leaf.operand_peaks)
            update_delayed_scales(leaf)
        self._draw(trainer.global_step, 0, data_rank(trainer).rank)

    def _switch(self, pl_module: pl.LightningModule, step: int) -> None:
        active = self.policy.active(step, self.max_steps)
        if active != self._active:
            model = _model(pl_module)
            set_precision(model, self.policy, step=step, max_steps=self.max_steps)
            self._active = active
            self._find(model)

    def _find(self, model: nn.Module) -> None:
        """Keep the leaves that draw and those that have delayed scales, as formats stand now."""
        found = [(n, leaf, leaf.precision) for n, leaf in leaves(model).items() if leaf.precision]
        self._random = [(n, leaf) for n, leaf, p in found if p.is_random]
        self._delayed = [
            leaf for _, leaf, p in found if any(getattr(p, o).scope == "delayed" for o in OPERANDS)
        ]
        self._drawn = None

    def _draw(self, step: int, micro_batch: int, rank: int) -> None:
        if self._drawn != (step, micro_batch):
            for name, leaf in self._random:
                leaf.seed(name, self.seed, step, micro_batch, rank)
            self._drawn = step, micro_batch


def _model(pl_module: pl.LightningModule) -> nn.Module:
    model = pl_module.model
    assert isinstance(model, nn.Module)
    return model
