"""What happens around the steps of a run: seeding, checkpoints, progress."""

import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint

from layers.precision.random import mixed as key_of
from recipes.curve import Curve
from recipes.ranks import data_rank
from recipes.record import replacing
from recipes.sharded import check_files, put_together, read_meta, sweep

LINE_EVERY_S = 15.0  # where the output is no terminal
BAR_EVERY_S = 0.2


class SeedEachBatch(Callback):
    """Random numbers as a pure function of (seed, micro-batch, rank), like the batches.

    So a resumed run draws what an uninterrupted one draws with no generator state to carry, and
    an evaluation more or less changes nothing.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators of the processor and of the device trained on.

        Not `torch.manual_seed`: without a GPU that takes 0.5 ms, and keeps a stack trace each time.
        """
        k = trainer.accumulate_grad_batches
        micro_batch = trainer.global_step * k + batch_idx % k
        seed = mixed(self.seed, micro_batch, data_rank(trainer).rank)
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)


def mixed(*numbers: int) -> int:
    """A 32-bit seed from several numbers, unlike that of their neighbours."""
    return key_of(*numbers) >> 32 & 0xFFFFFFFF


class SaveLast(Checkpoint):
    """checkpoints/last.ckpt every so many optimizer steps, after the row of that step."""

    def __init__(self, path: Path, every_steps: int, curve: Curve, fingerprint: str):
        self.path, self.every_steps = path, every_steps
        self.curve, self.fingerprint = curve, fingerprint

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Save where one is due, and at the end."""
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if step % self.every_steps == 0 or step == trainer.max_steps:
            self.curve.pause()
            trainer.save_checkpoint(self.path)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say which recipe this is of."""
        checkpoint["recipe_sha256"] = self.fingerprint


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or not there, and that load as plain tensors and numbers."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Written straight to disk beside `path`, then moved over it."""
        with replacing(Path(path)) as part:
            torch.save(checkpoint, part)
        sweep(Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint, read with weights_only.

        Raises:
            ValueError: when the file is damaged.
        """
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, read with weights_only; one in shards is put together.

    Raises:
        ValueError: when the file is missing, cut short or otherwise damaged.
    """
    if not path.exists():
        raise ValueError(f"no checkpoint {path}")
    try:
        if path.is_dir():
            check_files(path)
            return put_together(path.resolve())
        with zipfile.ZipFile(path) as archive:  # torch.load itself reads on over flipped bits
            broken = archive.testzip()
        if broken:
            raise ValueError(f"wrong checksum of {broken}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        complete = {"state_dict", "loops", "callbacks", "optimizer_states"} <= checkpoint.keys()
    except Exception as error:  # torch, zip and pickle raise a dozen kinds
        raise _damaged(path, error) from None
    if not complete:
        raise ValueError(f"checkpoint {path} is not of a run: delete it to train from the start")
    return checkpoint


def check_checkpoint(path: Path, fingerprint: str) -> bool:
    """Whether there is a checkpoint to go on from.

    Raises:
        ValueError: when it is damaged, or of another recipe than that of the fingerprint.
    """
    if not path.exists():
        if path.is_symlink():
            raise _damaged(path, "its folder is gone")
        return False
    if path.is_dir():
        try:
            check_files(path)
            found = read_meta(path)
        except Exception as error:
            raise _damaged(path, error) from None
    else:
        found = read_checkpoint(path)
    if found.get("recipe_sha256") != fingerprint:
        raise ValueError(
            f"checkpoint {path} is of another recipe: delete it to train from the start"
        )
    return True


def _damaged(path: Path, error: Exception | str) -> ValueError:
    reason = " ".join(str(error).split())[:80]
    return ValueError(f"checkpoint {path} is damaged ({reason}): delete it to train from the start")


class Progress(Callback):
    """A bar on a terminal; elsewhere a line at the start, one every so often, one at the end."""

    def __init__(self, name: str, curve: Curve):
        self.name, self.curve = name, curve
        self._bar: Any = None
        self._task: Any = None
        self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar, or write the first line."""
        self._last = time.monotonic()
        if not sys.stdout.isatty():
            print(f"{self.name}: step {trainer.global_step}/{trainer.max_steps}", flush=True)
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")]
        self._bar = Progress(*columns, TimeRemainingColumn(), auto_refresh=False)
        self._task = self._bar.add_task(
            self.name, total=trainer.max_steps, completed=trainer.global_step, text=""
        )
        self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Move the bar, or write a line where one is due."""
        now = time.monotonic()
        if trainer.global_step == trainer.max_steps:
            return  # on_train_end shows it
        if now - self._last < (BAR_EVERY_S if self._bar else LINE_EVERY_S):
            return
        self._last = now
        self._show(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last state of the run."""
        self._show(trainer)
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal as it was."""
        self._close()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _show(self, trainer: pl.Trainer) -> None:
        step, total = trainer.global_step, trainer.max_steps
        text = describe(self.curve)
        if self._bar:
            self._bar.update(self._task, completed=step, text=text, refresh=True)
        else:
            print(f"{self.name}: step {step}/{total}{text and ', '}{text}", flush=True)


def describe(curve: Curve) -> str:
    """The last row in words."""
    if not curve.rows:
        return ""
    row = curve.rows[-1]
    evaluated = [r["eval_bpb"] for r in curve.rows if r["eval_bpb"] is not None]
    words = [f"train {row['train_bpb']:.3f} bits/byte"]
    words += [f"validation {evaluated[-1]:.3f}"] if evaluated else []
    right = [r["eval_accuracy"] for r in curve.rows if r.get("eval_accuracy") is not None]
    words += [f"accuracy {right[-1]:.3f}"] if right else []
    return ", ".join([*words, f"{row['tokens_per_s']:,.0f} tokens/s"])
