"""AdamW, its parameter groups, and learning-rate schedules as pure functions of the step.

Memory tables may be trained apart: recipes/table_optim.py.
"""

import math
from collections.abc import Collection
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from layers.linear import ValueTable
from layers.names import check_choice, check_positive
from recipes.schema import OptimConfig
from recipes.table_optim import (
    Together,
    check_table,
    is_sparse,
    memory_tables,
    row_optimizer,
    table_group,
    table_lr_ratio,
)

# One pass over each parameter instead of a dozen: on one CPU thread a third of the time of the
# loop and a quarter of foreach (1.0, 3.1, 3.9 ms for 1.1 M parameters; torch 2.13, medians of 60).
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
STACKED_VECTORS = ("bias", "gain", "scale")  # last word of the name of E vectors in one [E, D]


def check_optim(config: OptimConfig) -> None:
    """Raise ValueError on numbers that cannot work."""
    check_positive(lr=config.lr, eps=config.eps)
    if config.clip_norm is not None:
        check_positive(clip_norm=config.clip_norm)
    if config.weight_decay < 0:
        raise ValueError(f"weight_decay must be 0 or more, got {config.weight_decay}")
    check_choice("schedule", config.schedule, ("cosine", "wsd"))
    for beta in config.betas:
        if not 0 <= beta < 1:
            raise ValueError(f"betas must lie in [0, 1), got {tuple(config.betas)}")
    for name in ("warmup_fraction", "decay_fraction", "final_lr_ratio"):
        if not 0 <= (given := getattr(config, name)) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {given}")
    if config.schedule == "wsd" and config.warmup_fraction + config.decay_fraction > 1:
        raise ValueError(
            "warmup_fraction + decay_fraction must be at most 1, got "
            f"{config.warmup_fraction} + {config.decay_fraction}"
        )
    if config.table is not None:
        check_table(config.table)


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to: matrices, stacked ones too.

    So embedding, head and router are decayed and norms and biases are not, as in GPT-3 and its
    followers (arXiv:2005.14165, app. B; nanoGPT). The rows of a `ValueTable` (a constant expert's
    vector, a memory's values) and the biases of E experts are vectors, though many stand in one
    parameter.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, ValueTable)}
    return {
        name
        for name, p in model.named_parameters()
        if p.ndim > 2
        or (p.ndim == 2 and id(p) not in tables and not name.endswith(STACKED_VECTORS))
    }


def parameter_groups(
    model: nn.Module, weight_decay: float, apart: Collection[int] = ()
) -> list[dict]:
    """AdamW groups of every trainable parameter, decayed ones first; no group is empty.

    apart: ids of parameters that another optimizer has.
    """
    decayed = decayed_names(model)
    trainable = {
        name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in apart
    }
    matrices = [p for name, p in trainable.items() if name in decayed]
    vectors = [p for name, p in trainable.items() if name not in decayed]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    grouped = sum(p.numel() for group in groups for p in group["params"])
    assert grouped == sum(
        p.numel() for p in model.parameters() if p.requires_grad and id(p) not in apart
    )
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW over `model`, fused where torch has it for the device.

    With config.table memory tables have one of their own, together with it as one optimizer, and
    are told which form their gradients take.

    Raises:
        ValueError: the config cannot work, or the model has nothing to train.
    """
    check_optim(config)
    tables = [] if config.table is None else memory_tables(model)
    groups = parameter_groups(model, config.weight_decay, {id(m.weight) for m in tables})
    if not groups and not tables:
        raise ValueError("the model has no trainable parameter")
    if not tables:
        return _adamw(groups, config)
    t = config.table
    assert t is not None
    for m in tables:
        m.sparse = is_sparse(m, t)
    if t.optimizer == "adamw":
        groups.append({"params": [m.weight for m in tables], **table_group(t)})
        return _adamw(groups, config)
    of_tables = row_optimizer(tables, config, t)
    return Together([_adamw(groups, config), of_tables] if groups else [of_tables])


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> AdamW:
    devices = {p.device.type for group in groups for p in group["params"]}
    beta1, beta2 = config.betas
    return AdamW(
        groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps,
        fused=devices <= set(FUSED_DEVICES),
    )  # fmt: skip


def lr_ratio(step: int, max_steps: int, config: OptimConfig) -> float:
    """Learning rate of update `step` (the first is 0) as a share of `config.lr`.

    Warm-up is linear over the first part of all steps and never zero. Then `cosine` falls to
    `final_lr_ratio` at max_steps; `wsd` stays at 1 and falls over the last part of all steps as
    1 - sqrt(progress) (arXiv:2405.18392).
    """
    warmup = round(config.warmup_fraction * max_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        progress = min((step - warmup) / max(max_steps - warmup, 1), 1.0)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay = round(config.decay_fraction * max_steps)
        progress = min(max((step - (max_steps - decay)) / max(decay, 1), 0.0), 1.0)
        share = 1 - math.sqrt(progress)
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * share


def build_schedule(optimizer: Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    """The schedule, to be stepped once after each optimizer step."""
    check_positive(max_steps=max_steps)

    def of_all(step: int) -> float:
        return lr_ratio(step, max_steps, config)

    def of_tables(step: int) -> float:
        assert config.table is not None
        return table_lr_ratio(step, max_steps, config.table, of_all(step))

    groups = optimizer.param_groups
    return LambdaLR(optimizer, [of_tables if g.get("tables") else of_all for g in groups])
