"""Runs that end in a second, and how they are cut short."""

import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from recipes.callbacks import SaveLast
from recipes.load import load
from recipes.metrics import evaluate
from recipes.widths import evaluate_widths

TINY = {
    "precision": "bf16",
    "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 256},
    "loss_weights": {"balance": 0.01, "z": 0.001, "importance": 0.01, "load": 0.01, "l1": 1.0},
    "data": {"corpus": "tinyshakespeare", "seq_len": 256, "batch_size": 16},
    "optim": {"lr": 1e-2},
    "trainer": {
        "max_steps": 8,
        "eval_every_steps": 4,
        "checkpoint_every_steps": 4,
        "log_every_steps": 3,
        "threads": 1,
    },
}
TINY["data"]["eval_bytes_per_domain"] = 4096  # pyright: ignore[reportArgumentType]


def tiny_recipe(ffn: Any, *overrides: str):
    """A recipe of two small layers."""
    return load({**TINY, "model": {**TINY["model"], "ffn": ffn}}, overrides)  # pyright: ignore


@contextmanager
def refused(message: str):
    """A ValueError of one line that says so."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        yield
    assert "\n" not in str(error.value)


class Killed(Exception):
    """In place of a signal."""


@contextmanager
def killed_after(monkeypatch: pytest.MonkeyPatch, step: int):
    """Training ends as if killed right after `step`, checkpoint of that step included."""
    original = SaveLast.on_train_batch_end

    def hook(self, trainer, pl_module, outputs, batch, batch_idx):
        original(self, trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == step and not (batch_idx + 1) % trainer.accumulate_grad_batches:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SaveLast, "on_train_batch_end", hook)
        try:
            yield
        except Killed:
            return
    pytest.fail("the run was not killed")


def evaluate_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last evaluation reads the thinned validation part, where its figures do not matter."""

    def short(task, data):
        return evaluate(task.model, data.val_dataloader(), data.domains)

    def short_widths(task, data):
        if task.nesting is None:
            return ()
        return evaluate_widths(task.model, task.recipe, data.val_dataloader(), data.domains)

    monkeypatch.setattr("recipes.train.final_evaluation", short)
    monkeypatch.setattr("recipes.train.final_widths", short_widths)


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what depends on the clock or on the process."""
    kept = {key: value for key, value in result.items() if key not in ("speed", "commit")}
    kept["curve"] = [{k: v for k, v in p.items() if k != "train_s"} for p in result["curve"]]
    return kept


def rows(run: Path) -> list[str]:
    """The lines of metrics.csv without its columns of time."""
    lines = (run / "metrics.csv").read_text().splitlines()
    timed = {i for i, name in enumerate(lines[0].split(",")) if name in ("train_s", "tokens_per_s")}
    return [
        ",".join(cell for i, cell in enumerate(line.split(",")) if i not in timed) for line in lines
    ]
