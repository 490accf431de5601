"""What a model whose table stays on the disk takes in memory, and how fast it generates.

    python benchmarks/memory_mapped.py [--keys 1024] [--kinds fp32,mxfp4]
        > benchmarks/memory_mapped.md

A byte model of four layers, one of them product-key memory, is written to a temporary folder, as
float32 and with its table packed, and loaded and sampled from in a process of its own: into memory,
and mapped (`zoo.mapped`). Before a mapped run the file is dropped from the system's cache, so its
first text reads the disk, page by page; later texts find some of their rows there.

Resident: over that of the process before it loaded, of its own memory and of pages of the file.
Loading is by the clock. Read: what the process asked the disk for while it generated. Tokens a CPU
second, page faults included and waiting for the disk not; of the later texts the best, for other
work on the machine only slows. At last the first text again, the best of three: all its rows are in
memory by then.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from timing import machine, markdown

import zoo
from zoo.generate import generate

NEW, TEXTS = 96, 6  # tokens a text
MIB = 1 << 20
KINDS = {"fp32": None, "mxfp4": "mxfp4"}


def config(n_keys: int) -> dict:
    """The model."""
    memory = {"name": "pkm", "n_keys": n_keys, "heads": 4, "top_k": 32, "layers": "1"}
    return {
        "vocab_size": 256, "d_model": 256, "n_layers": 4, "n_heads": 4, "max_seq_len": 256,
        "ffn": [memory, {"name": "swiglu"}],
    }  # fmt: skip


def write(kind: str, n_keys: int, folder: Path) -> None:
    """Save the model, its table in the format of that kind."""
    torch.manual_seed(0)
    model = zoo.LanguageModel(zoo.ModelConfig.of(config(n_keys)))
    if (form := KINDS[kind]) is not None:
        policy = {"default": "fp32", "rules": [{"roles": "memory_values", "use": form}]}
        zoo.pack(model, policy)
    model.save_pretrained(folder)


def status(what: str, file: str = "status") -> int:
    """A figure of this process, in bytes."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    value, *unit = next(line for line in lines if line.startswith(what)).split(":")[1].split()
    return int(value) << (10 if unit else 0)


def forget(path: Path) -> None:
    """Drop a file from the system's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def settle() -> None:
    """Give back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(folder: Path, mapped: bool) -> dict[str, float]:
    """Load the model and let it generate; in a process of its own."""
    torch.set_num_threads(1)
    warm = zoo.LanguageModel(zoo.ModelConfig.of(config(32)))
    generate(warm, torch.zeros(1, 2, dtype=torch.int64), max_new_tokens=2)  # libraries come in
    del warm
    settle()
    names = ("RssAnon", "RssFile")
    before = [status(name) for name in names]
    began = time.perf_counter()
    model = zoo.LanguageModel.from_pretrained(folder, mapped=mapped)
    found = {"load_s": time.perf_counter() - began}
    settle()
    loaded = [status(name) for name in names]
    forget(folder / "model.safetensors")
    read = status("read_bytes", "io")
    speeds = []
    for seed in range(TEXTS):
        began = time.process_time()
        generate(model, torch.full((1, 1), seed), max_new_tokens=NEW, seed=seed)
        speeds.append(NEW / (time.process_time() - began))
        if not seed:
            found["read_first"] = status("read_bytes", "io") - read
    found |= {"read": status("read_bytes", "io") - read, "first": speeds[0]}
    settle()
    after = [status(name) for name in names]
    for name, *sizes in zip(names, before, loaded, after, strict=True):
        found |= {f"{name} loaded": sizes[1] - sizes[0], f"{name} after": sizes[2] - sizes[0]}
    again = []
    for _ in range(3):
        began = time.process_time()
        generate(model, torch.zeros(1, 1, dtype=torch.int64), max_new_tokens=NEW, seed=0)
        again.append(NEW / (time.process_time() - began))
    return found | {"later": max(speeds[1:]), "again": max(again)}


def row(kind: str, how: str, size: int, m: dict[str, float]) -> list[str]:
    """One line of the table."""
    own, file = ([m[f"{n} {when}"] / MIB for when in ("loaded", "after")]
                 for n in ("RssAnon", "RssFile"))  # fmt: skip
    return [
        kind, how, f"{size / MIB:,.0f}", f"{m['load_s']:.2f}",
        *(f"{a:,.1f} + {b:,.1f}" for a, b in zip(own, file, strict=True)),
        f"{m['read_first'] / MIB:.1f}", f"{m['read'] / MIB:.1f}",
        f"{m['first']:.0f}", f"{m['later']:.0f}", f"{m['again']:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, default=1024, help="of a side; squared: rows of 256")
    parser.add_argument("--kinds", type=lambda s: s.split(","), default=list(KINDS))
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        task, folder, *rest = args.child
        if task == "write":
            return write(rest[0], args.keys, Path(folder))
        return print(json.dumps(measure(Path(folder), task == "mapped")))
    rows = []
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(prefix="mapped-") as folder:
            command = [sys.executable, __file__, "--keys", str(args.keys), "--child"]
            subprocess.run([*command, "write", folder, kind], check=True)
            size = (Path(folder) / "model.safetensors").stat().st_size
            for how in ("memory", "mapped"):
                forget(Path(folder) / "model.safetensors")
                done = subprocess.run([*command, how, folder], check=True, stdout=subprocess.PIPE)
                rows.append(row(kind, how, size, json.loads(done.stdout)))
    print("# A table left on the disk\n")
    print(
        f"A table of {args.keys**2:,} rows of 256 numbers; a token reads 128 of them. {TEXTS} "
        f"texts of {NEW} tokens.\nMiB; resident: the process's own memory + pages of the file.\n"
    )
    head = ["table", "in", "file", "load, s", "resident, loaded", "resident, generated",
            "read, first", "read, all", "tokens/s: first", "later",
            "again"]  # fmt: skip
    print(markdown(head, rows))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
