"""What Lightning's loop, with our callbacks, costs a step over a bare loop.

The same model, optimizer, schedule, clipping, batches and loss in both; process CPU time on one
thread; rounds interleaved in one process, the difference taken inside each, medians. A model so
small that a step is a few milliseconds, since the overhead does not depend on its size.
"""

import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from recipes import record
from recipes.callbacks import SaveLast, SeedEachBatch
from recipes.curve import Curve
from recipes.data import TextData
from recipes.load import load
from recipes.runtime import settings
from recipes.task import LanguageModelTask
from recipes.train import lean_trainer

STEPS, ROUNDS = 200, 15
FFN = "{name: mlp, d_ff: 32}"
RECIPE = load("debug", [
    f"model.ffn={FFN}", "model.d_model=32", "model.n_layers=1",
    "data.seq_len=32", "data.batch_size=4",
    "trainer.threads=1", f"trainer.max_steps={STEPS}", f"trainer.eval_every_steps={10 * STEPS}",
    f"trainer.checkpoint_every_steps={10 * STEPS}", "trainer.log_every_steps=50",
])  # fmt: skip


class TrainingOnly(Curve):
    """The curve without its last evaluation, which is no step's cost."""

    def _evaluated(self, task):
        return dict.fromkeys(self._eval_keys(task))


def bare(data: TextData) -> float:
    """CPU seconds a step of the loop that one would write by hand."""
    task = LanguageModelTask(RECIPE, data.domains)
    made = task.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    batches = iter(data.train_dataloader())
    start = time.process_time()
    for step in range(STEPS):
        loss = task.training_step(next(batches), step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), RECIPE.optim.clip_norm or 1.0)
        optimizer.step()
        schedule.step()
    return (time.process_time() - start) / STEPS


def lightning(data: TextData, folder: Path) -> float:
    """CPU seconds a step of `zoo train`: seeding, curve, loggers; no checkpoint, no progress."""
    task = LanguageModelTask(RECIPE, data.domains)
    curve = TrainingOnly(data, log_every=50, eval_every=10 * STEPS, tokens=128, flops=1.0)
    save = SaveLast(folder / "last.ckpt", 10 * STEPS, curve, "")
    save.on_train_batch_end = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    clock = Clock()
    trainer = lean_trainer(RECIPE, folder, [SeedEachBatch(0), curve, save, clock])
    trainer.fit(task, data)
    return clock.seconds / STEPS


class Clock(SeedEachBatch):
    """CPU time between the start and the end of training."""

    def __init__(self):
        super().__init__(0)
        self.seconds = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Not a step's cost."""

    def on_train_start(self, trainer, pl_module):
        """Start."""
        self.seconds = -time.process_time()

    def on_train_end(self, trainer, pl_module):
        """Stop."""
        self.seconds += time.process_time()


def main() -> None:
    """Print the table."""
    data = TextData(RECIPE.data, 0)
    times: list[tuple[float, float]] = []
    with settings(RECIPE.trainer), tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS + 1):
            times.append((bare(data), lightning(data, Path(folder))))
    times = times[1:]  # the first warms up
    over = [lightning_s - bare_s for bare_s, lightning_s in times]
    versions = record.versions()
    print(f"torch {versions['torch']}, lightning {versions['lightning']}, {date.today()}")
    print(
        f"{record.cpu_name()}, one thread, CPU time, median of {ROUNDS} rounds of {STEPS} steps\n"
    )
    print("| loop | ms a step |\n|---|---|")
    without, with_it = zip(*times, strict=True)
    print(f"| bare | {1e3 * statistics.median(without):.2f} |")
    print(f"| Lightning, as `zoo train` runs it | {1e3 * statistics.median(with_it):.2f} |")
    print(f"| difference inside a round | {1e3 * statistics.median(over):.2f} |")
    print(f"| its least and largest | {1e3 * min(over):.2f} to {1e3 * max(over):.2f} |")


if __name__ == "__main__":
    main()
