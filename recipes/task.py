"""A recipe as a LightningModule: build the model, sum the losses. Everything else is a callback."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import AdamW

import zoo
from recipes.batches import Batch
from recipes.metrics import Evaluation, on_device, token_nats
from recipes.nested import Nesting, Pass
from recipes.optim import build_optimizer, build_schedule
from recipes.parallel import LocalAdamW, clip_gradients
from recipes.schema import Recipe
from recipes.table_optim import Together, clip_apart
from zoo.consistency import next_token_kl
from zoo.parallel import parallelize


def build_model(recipe: Recipe) -> zoo.LanguageModel:
    """The recipe's language model with weights drawn from its seed, in its precision."""
    torch.manual_seed(recipe.seed)
    model = zoo.build(recipe)
    model.activation_checkpointing = recipe.trainer.activation_checkpointing
    return model


def weighted(losses: dict[str, Tensor], weights: dict[str, float]) -> list[Tensor]:
    """Each loss times its weight.

    Raises:
        ValueError: for a loss that no weight is given for; nothing is left out in silence.
    """
    missing = sorted(losses.keys() - weights.keys())
    if missing:
        raise ValueError(
            f"loss_weights names no weight for {missing}: add one, 0.0 turns a loss off"
        )
    return [weights[name] * loss for name, loss in losses.items() if weights[name]]


class LanguageModelTask(pl.LightningModule):
    """Next-token prediction: mean cross-entropy in fp32 + sum of weight * auxiliary loss.

    The mean is over the targets that a batch judges: all of a text, the answers of a task.

    With accumulation the auxiliary losses are means of those of each micro-batch.
    """

    def __init__(self, recipe: Recipe, domains: tuple[str, ...]):
        super().__init__()
        self.recipe, self.domains = recipe, domains
        self.model = build_model(recipe)
        self.nesting = None if recipe.nested is None else Nesting(recipe)
        if recipe.trainer.compile and self.nesting is not None:
            self.nesting.compile(self.model)
        elif recipe.trainer.compile:
            self.model.compile()
        self._sharded = False
        self._evaluation: Evaluation | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """`loss` to minimise; detached: `nats` summed, `losses` unweighted, `stats` by layer."""
        if self.nesting is None:
            done = self._pass(batch)
        else:
            done = self.nesting.run(self.global_step, lambda **part: self._pass(batch, **part))
        return {
            "loss": done.loss,
            "nats": done.nats.sum(dtype=torch.float64),
            "losses": done.losses,
            "stats": done.stats,
        }

    def _pass(self, batch: Batch, teacher: Tensor | None = None, **part: Any) -> Pass:
        """One forward and its loss; part: as the model takes it; teacher: logits to learn from."""
        output = self.model(batch.tokens, mask=batch.mask, **part)
        nats, judged = token_nats(output.logits, batch.targets), batch.judged  # [B, S]

        def mean(x: Tensor) -> Tensor:
            return x.mean() if judged is None else (x * judged).sum() / judged.sum()

        loss = sum(weighted(output.losses, self.recipe.loss_weights), start=mean(nats))
        if teacher is not None:
            assert self.recipe.nested is not None
            loss = loss + self.recipe.nested.distill * mean(next_token_kl(teacher, output.logits))
        detached = {name: value.detach() for name, value in output.losses.items()}
        nats = nats.detach() if judged is None else nats.detach() * judged
        return Pass(loss, output.logits, nats, detached, output.stats)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """On a CPU there is nothing to move, and Lightning's walk through a batch takes 0.1 ms."""
        return batch if device.type == "cpu" else on_device(batch, device)

    def on_validation_epoch_start(self) -> None:
        """Start sums anew."""
        self._evaluation = Evaluation(self.model, self.domains)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """For `Trainer.validate`; a run evaluates by the callback, at its own steps."""
        assert self._evaluation is not None
        self._evaluation.update(self.model(batch.tokens, mask=batch.mask), batch)

    def on_validation_epoch_end(self) -> None:
        """Log bits per byte, in all and by domain, and the accuracy of a task."""
        assert self._evaluation is not None
        final = self._evaluation.final()
        self.log("eval_bpb", final.bpb)
        if final.accuracy is not None:
            self.log("eval_accuracy", final.accuracy)
        self.log_dict({f"eval_bpb/{domain}": bpb for domain, bpb in final.bpb_by_domain.items()})

    def configure_model(self) -> None:
        """Shard the model where the run's strategy has a mesh to shard it over."""
        if self.device_mesh is not None and not self._sharded:
            parallelize(self.model, self.device_mesh, self.recipe.trainer.table_parallel)
            self._sharded = True

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:  # fmt: skip
        """By one norm over all parameters, sharded or not; tables trained apart have their own."""
        if self.recipe.optim.table is not None:
            clip_apart(optimizer, self.recipe.optim)
        elif not self._sharded:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val is not None:
            clip_gradients(self.model.parameters(), gradient_clip_val)

    def on_fit_end(self) -> None:
        """Rows of tables wait for their weight decay until they are touched: no longer."""
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, Together):
                optimizer.settle()

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepped once per optimizer step."""
        recipe = self.recipe
        optimizer = build_optimizer(self.model, recipe.optim)
        if self._sharded:
            assert isinstance(optimizer, AdamW)
            optimizer = LocalAdamW.of(optimizer)
        schedule = build_schedule(optimizer, recipe.optim, recipe.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
