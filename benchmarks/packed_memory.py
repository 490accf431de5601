"""What a packed model takes on disk, in memory and at the peak of generating, in bytes.

    python benchmarks/packed_memory.py > benchmarks/packed_memory.md

Each model is written to a folder, then loaded and sampled from in a process of its own. Memory is
the resident set over that of the process before it loaded; Linux counts its peak anew when asked.
"""

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from timing import machine, markdown

import zoo
from zoo.generate import generate
from zoo.packing import pack

CONFIG = {
    "vocab_size": 1024, "d_model": 512, "n_layers": 8, "n_heads": 8, "max_seq_len": 256,
    "ffn": {"name": "swiglu", "d_ff": 2048}, "tie_embeddings": False,
}  # fmt: skip
ROWS = ("fp32", "bf16", "mxfp4", "nvfp4")
PROMPT, NEW = 64, 32
MIB = 1 << 20


def policy(name: str) -> dict:
    """All low but the head."""
    return {"default": name, "rules": [{"roles": "head", "use": "bf16"}]}


def write(name: str, folder: Path) -> dict[str, float]:
    """Save the model as `name` says; bits per number of what is packed, if anything is."""
    torch.manual_seed(0)
    model = zoo.LanguageModel(zoo.ModelConfig.of(CONFIG))
    if name in ("fp32", "bf16"):
        model.to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[name]))
        model.save_pretrained(folder)
        return {}
    report = pack(model, policy(name))
    model.save_pretrained(folder)
    numbers = sum(leaf.numbers for leaf in report.leaves)
    return {"bits": 8 * sum(leaf.bytes for leaf in report.leaves) / numbers}


def resident(what: str) -> int:
    """Bytes now (VmRSS) or at the peak since the last reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) << 10


def settle() -> None:
    """Give back what is free, and start counting the peak from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, folder: Path) -> dict[str, int]:
    """Load the model and let it generate; in a process of its own."""
    torch.set_num_threads(1)
    warm = zoo.build({"model": {**CONFIG, "d_model": 64, "n_layers": 1, "n_heads": 2},
                      "precision": "bf16" if name == "bf16" else None})  # fmt: skip
    prompt = torch.randint(0, CONFIG["vocab_size"], (1, PROMPT))
    if name not in ("fp32", "bf16"):
        pack(warm, policy(name))
    generate(warm, prompt, max_new_tokens=2)  # libraries and kernels come into memory once
    del warm
    settle()
    before = resident("VmRSS")
    model = zoo.LanguageModel.from_pretrained(folder)
    if name == "bf16":
        model.to(torch.bfloat16)
    settle()
    loaded = resident("VmRSS") - before
    generate(model, prompt, max_new_tokens=NEW)
    held = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return {"tensors": sum(held.values()), "loaded": loaded, "peak": resident("VmHWM") - before}


def row(name: str, folder: Path) -> list[str]:
    """One model."""
    packed = write(name, folder)
    out = subprocess.run(
        [sys.executable, __file__, name, str(folder)], check=True, capture_output=True, text=True
    ).stdout
    found = json.loads(out.splitlines()[-1])
    disk = (folder / "model.safetensors").stat().st_size
    sizes = (disk, found["tensors"], found["loaded"], found["peak"])
    bits = f"{packed['bits']:.3f}" if packed else "-"
    return [name, *(f"{size / MIB:.1f}" for size in sizes), bits]


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
        return
    rows = []
    for name in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, Path(folder)))
    numbers = sum(p.numel() for p in zoo.LanguageModel(zoo.ModelConfig.of(CONFIG)).parameters())
    print("# Memory of a packed model\n")
    print(f"{numbers / 1e6:.1f}M parameters; {PROMPT} tokens of prompt, {NEW} more drawn. MiB.")
    print("Embedding, norms and head are not packed: float32, the head bfloat16.\n")
    header = ["weights", "on disk", "tensors", "resident, loaded", "resident, peak of generating",
              "bits per packed number"]  # fmt: skip
    print(markdown(header, rows))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
