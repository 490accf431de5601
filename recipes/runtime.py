"""Settings of the process that a run needs, put back when it ends."""

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.backends.mkldnn
import torch.utils.deterministic

from recipes.record import cores
from recipes.schema import TrainerConfig

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Settings objects that torch's stubs do not know
MATMUL: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
FILL: Any = torch.utils.deterministic

# Said by Lightning at every start, or about choices that are made on purpose here
EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # batches are cut from memory: a worker would be slower
    ".*Checkpoint directory .* exists and is not empty.*",  # a run goes on from there
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*GPU available but not used.*",
    ".*You have overridden .transfer_batch_to_device. in .LightningModule.*",  # so it is meant
    ".*isinstance.treespec, LeafSpec.. is deprecated.*",
)


@contextmanager
def settings(trainer: TrainerConfig) -> Iterator[None]:
    """Threads, determinism and the fp32 matmul path of one run; quiet logs."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = FILL.fill_uninitialized_memory
    path = MATMUL.fp32_precision
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        torch.set_num_threads(trainer.threads or max(cores() // trainer.devices, 1))
        torch.use_deterministic_algorithms(True)
        FILL.fill_uninitialized_memory = False  # costs a pass over each output
        if trainer.matmul == "auto" and trainer.accelerator == "cpu":
            use_fast_exact_matmul()
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        FILL.fill_uninitialized_memory = fill
        MATMUL.fp32_precision = path
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def use_fast_exact_matmul() -> bool:
    """Send fp32 matmuls to oneDNN where that is faster and still full fp32.

    The setting permits bf16 inside. Processors without AMX do not take the permission and compute
    in fp32, about twice as fast as the default on AMD; with AMX they would, so it stays off there.
    A small product is checked as well: a library that does round leaves the setting off.

    Returns:
        Whether the fast path is on.
    """
    capabilities = torch.cpu.get_capabilities()
    if any(capabilities.get(name) for name in ("amx_tile", "amx_bf16", "amx_fp16")):
        return False
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "bf16"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    error = ((a @ b).double() - exact).abs().max() / exact.abs().max()
    if error > 1e-5:  # fp32 has 1e-7 to 1e-6 here, bf16 about 2e-3
        MATMUL.fp32_precision = before
        return False
    return True


@contextmanager
def interruptible(trainer: "pl.Trainer") -> Iterator[None]:
    """Lightning ends the process on Ctrl-C and deafens it to the next; give both back."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, handler)
