"""FactorLLM's router taught while it trains: its loss of labels, added to the run's own.

L = cross-entropy + 0.05 * the sum over layers of `pa_loss` + 0.01 * the balance term (moe.md 10).
The published teacher path is not the dense model's own; here the frozen dense FFN of each layer
reads the student's current input.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from layers.base import FFNOutput
from layers.moe import MoE
from layers.swiglu import SwiGLU
from recipes.schema import Recipe
from zoo.conversion.prior import layer_pa_loss
from zoo.model import LanguageModel

LOSS = "prior"  # its name in loss_weights; mean over layers, nats


def prior_callbacks(recipe: Recipe) -> list[Callback]:
    """The teacher that the recipe's `prior_teacher` names; nothing, if it names none.

    Raises:
        ValueError: where the model is compiled or sharded, or there is no run to read.
    """
    if recipe.prior_teacher is None:
        return []
    if recipe.trainer.compile:
        raise ValueError(
            "prior_teacher works in eager mode only: leave out prior_teacher or trainer.compile"
        )
    if recipe.trainer.strategy == "fsdp2" or recipe.trainer.expert_parallel > 1:
        raise ValueError(
            "prior_teacher reads whole experts: train without strategy fsdp2 and expert_parallel, "
            "or say prior_teacher=null"
        )
    run = Path(recipe.prior_teacher)
    if not (run / "recipe.yaml").is_file() or not (run / "weights.safetensors").is_file():
        raise ValueError(
            f"prior_teacher={recipe.prior_teacher}: no recipe.yaml and weights.safetensors there: "
            "give the dense run that was converted, or prior_teacher=null to train without labels"
        )
    return [PriorTeacher(run)]


class PriorTeacher(Callback):
    """Adds `layer_pa_loss` as the loss `prior` to every mixture that stands for a dense FFN.

    In training alone; the teacher's weights are read at the start and are in no checkpoint.
    """

    def __init__(self, run: Path):
        """run: of the dense model; `swiglu` in the layers to teach."""
        self.run = run
        self._handles: list[RemovableHandle] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the teacher and stand behind each layer that it teaches."""
        from recipes.quantize import read_model  # which builds tasks, as what calls this does

        student, teacher = pl_module.model, read_model(self.run).model
        assert isinstance(student, LanguageModel)
        teacher.requires_grad_(False).eval().to(pl_module.device)
        pairs = [
            (new.ffn, old.ffn)
            for new, old in zip(student.blocks, teacher.blocks, strict=False)
            if isinstance(new.ffn, MoE) and isinstance(old.ffn, SwiGLU)
        ]
        if not pairs:
            raise ValueError(
                f"prior_teacher={self.run}: none of its dense layers is a mixture in this model"
            )
        for moe, ffn in pairs:
            _check_widths(moe, ffn, self.run)
            self._handles.append(moe.register_forward_hook(_Taught(ffn)))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Taught:
    """A forward hook: the output with the loss of the layer's labels."""

    def __init__(self, teacher: SwiGLU):
        self.teacher = teacher

    def __call__(self, moe: Any, args: tuple[Any, ...], output: FFNOutput) -> FFNOutput | None:
        if not moe.training:
            return None
        x: Tensor = args[0].flatten(0, 1).to(self.teacher.down.weight.dtype)
        mask = args[2] if len(args) > 2 else None
        mask = None if mask is None else mask.flatten()
        loss = layer_pa_loss(moe, self.teacher, x, mask)
        return output._replace(losses={**(output.losses or {}), LOSS: loss})


def _check_widths(moe: MoE, ffn: SwiGLU, run: Path) -> None:
    split = moe.config.n_experts * moe.config.hidden
    if (moe.config.d_model, split) != (ffn.config.d_model, ffn.config.hidden):
        raise ValueError(
            f"prior_teacher={run}: {moe.config.n_experts} experts of {moe.config.hidden} neurons "
            f"are no split of its FFN of {ffn.config.hidden}"
        )
