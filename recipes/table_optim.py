"""Memory tables trained apart from the rest of a model (`OptimConfig.table`).

By an optimizer whose step costs the rows that were touched, at their own learning rate, clipped by
their own norm. It stands together with AdamW as one optimizer, so that a run has one schedule and
one state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from layers.linear import ValueTable
from layers.names import check_choice, check_positive
from recipes.row_optim import RowAdagrad, RowAdam, RowOptimizer, clip_tables, keep_dtypes
from recipes.schema import OptimConfig, Recipe, TableConfig

SPARSE_FROM = 1 << 15  # rows; for less a dense gradient is as fast (benchmarks/memory_step.md)


def check_table(t: TableConfig) -> None:
    """Raise ValueError on numbers and choices that cannot work."""
    check_positive(**{"table.lr_scale": t.lr_scale, "table.decay_fraction": t.decay_fraction})
    if t.clip_norm is not None:
        check_positive(**{"table.clip_norm": t.clip_norm})
    if t.decay_fraction > 1:
        raise ValueError(f"table.decay_fraction must be at most 1, got {t.decay_fraction}")
    if t.weight_decay < 0:
        raise ValueError(f"table.weight_decay must be 0 or more, got {t.weight_decay}")
    for name, given, allowed in (
        ("table.optimizer", t.optimizer, ("row_adam", "row_adagrad", "adamw")),
        ("table.second_moment", t.second_moment, ("element", "row")),
        ("table.moments", t.moments, ("lazy", "decayed")),
        ("table.bias_correction", t.bias_correction, ("row", "global")),
        ("table.sparse", t.sparse, ("auto", "always", "never")),
        ("table.schedule", t.schedule, ("decay", "scheduled", "constant")),
    ):
        check_choice(name, given, allowed)
    if t.optimizer == "adamw" and t.sparse == "always":
        raise ValueError(
            "table.optimizer 'adamw' takes no sparse gradients: leave out table.sparse, or choose "
            "row_adam or row_adagrad"
        )


def check_tables(recipe: Recipe) -> None:
    """Raise ValueError where tables cannot be trained apart, or not with sparse gradients."""
    table, t = recipe.optim.table, recipe.trainer
    if table is None:
        return
    if t.devices > 1:
        raise ValueError(
            f"optim.table works on one device only, got trainer.devices={t.devices}: leave out one"
        )
    if t.compile and table.optimizer != "adamw" and table.sparse != "never":
        raise ValueError(
            "torch.compile makes no sparse gradients: set optim.table.sparse=never, or leave out "
            "trainer.compile"
        )


def memory_tables(model: nn.Module) -> list[ValueTable]:
    """The trainable tables of memory layers and pools, each once."""
    return [
        m
        for m in model.modules()
        if isinstance(m, ValueTable) and m.role == "memory_values" and m.weight.requires_grad
    ]


def is_sparse(table: ValueTable, config: TableConfig) -> bool:
    """Whether its gradients are to hold touched rows alone."""
    if config.optimizer == "adamw" or config.sparse == "never":
        return False
    return config.sparse == "always" or table.weight.shape[0] >= SPARSE_FROM


def row_optimizer(tables: list[ValueTable], config: OptimConfig, t: TableConfig) -> RowOptimizer:
    """The row-wise optimizer of the tables, at the run's learning rate; the schedule scales it."""
    group = {"params": [m.weight for m in tables], **table_group(t)}
    if t.optimizer == "row_adagrad":
        return RowAdagrad([group], lr=config.lr, eps=config.eps, second_moment=t.second_moment)
    beta1, beta2 = config.betas
    return RowAdam(
        [group], lr=config.lr, betas=(beta1, beta2), eps=config.eps,
        second_moment=t.second_moment, moments=t.moments, bias_correction=t.bias_correction,
    )  # fmt: skip


def table_group(t: TableConfig) -> dict[str, Any]:
    """What an optimizer's group of tables says; `tables` tells it from other groups."""
    return {"weight_decay": t.weight_decay, "tables": True}


class Together(Optimizer):
    """Several optimizers as one: it holds the groups and the state of all, and steps each."""

    def __init__(self, parts: list[Optimizer]):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on the groups and the state that stand here."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(  # pyright: ignore[reportIncompatibleMethodOverride] # torch's overloads
        self, closure: Callable[[], Any] | None = None
    ) -> Any:
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def settle(self) -> None:
        """Bring the rows of tables up to now (`RowOptimizer.settle`)."""
        for part in self.parts:
            if isinstance(part, RowOptimizer):
                part.settle()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state that all of them saved as one."""
        super().load_state_dict(state_dict)
        keep_dtypes(self, state_dict)
        self._share()


def clip_apart(optimizer: Optimizer, config: OptimConfig) -> None:
    """Clip the tables' gradients by their norm, and all others by theirs, which leaves out tables.

    A table's norm would dominate the others' (memory.md 12, pitfall 10).
    """
    assert config.table is not None
    tables = [p for g in optimizer.param_groups if g.get("tables") for p in g["params"]]
    others = [p for g in optimizer.param_groups if not g.get("tables") for p in g["params"]]
    if config.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(others, config.clip_norm)
    if config.table.clip_norm is not None:
        clip_tables(tables, config.table.clip_norm)


def table_lr_ratio(step: int, max_steps: int, t: TableConfig, run_ratio: float) -> float:
    """Learning rate of memory tables at update `step` as a share of `OptimConfig.lr`.

    `decay`: (1 + (lr_scale - 1) * max(0, 1 - step / (decay_fraction * max_steps))) * run_ratio
    (UltraMemV2, arXiv:2508.18756, its released code); `scheduled`: lr_scale * run_ratio (Memory+);
    `constant`: lr_scale (PKM). run_ratio: that of all other parameters, `recipes.optim.lr_ratio`.
    """
    if t.schedule == "constant":
        return t.lr_scale
    if t.schedule == "scheduled":
        return t.lr_scale * run_ratio
    left = max(0.0, 1 - step / (t.decay_fraction * max_steps))
    return (1 + (t.lr_scale - 1) * left) * run_ratio
