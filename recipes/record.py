"""What a run leaves behind, and the schema of it.

A run directory holds

    recipe.yaml          the resolved recipe; loads again as a recipe
    meta.json            id, label, seed, sha256 of the recipe, versions, commit, machine
    metrics.csv          what was logged, a row per logging interval
    probes.json          where the recipe asks: errors of the formats, operand by operand
    result.json          the finished run (`recipes.report.records.Run`); there once it is finished
    weights.safetensors  the weights, by parameter name
    checkpoints/last.ckpt  what a killed run goes on from; in shards a link to the folder step-N
    stderr-N.txt           what process N of several said, where it said something

Every file is written beside its name and moved over it, so that a reader, or a run that starts
again after being killed, never sees half of one.
"""

import fcntl
import functools
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from recipes.report.records import Run, load_json
from recipes.report.strict import read_as

PACKAGES = (
    "moe-zoo", "torch", "numpy", "einops", "lightning", "torchmetrics", "omegaconf", "tensorboard",
)  # fmt: skip


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """sha256 of a resolved recipe: two runs with the same one do the same computation."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of what decides a run's numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """The commit of this source tree, "-dirty" where files differ; None outside a checkout.

    As it was when this process, or the one that it is a fork of, first asked.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty"]
    command += ["--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def machine(threads: int) -> dict[str, Any]:
    """What the speed figures stand for."""
    return {"cpu": cpu_name(), "cores": cores(), "threads": threads, "system": platform.system()}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor as the system calls it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """The largest resident size that this process has had.

    Linux hands `ru_maxrss` on to a child as it starts, so its own mark is read instead.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to in place of `path`; moved over it when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    yield part
    with part.open("rb") as written:
        os.fsync(written.fileno())
    part.replace(path)


@contextmanager
def filling(out: Path) -> Iterator[Path]:
    """A directory to fill in place of `out`; it takes the name when the block ends well."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all. Not-a-number is refused: readers could not parse it."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_result(run: Path) -> dict[str, Any] | None:
    """result.json of a run directory, or None where the run is not finished."""
    path = run / "result.json"
    if not path.is_file():
        return None
    plain = load_json(path)
    read_as(Run, plain, str(path))
    return plain


@contextmanager
def locked(path: Path, busy: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file. The system frees it when the process ends, however it ends.

    Raises:
        ValueError: with the text `busy`, when another process still holds it after `wait_s`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise ValueError(busy) from None
                time.sleep(0.05)
        yield
