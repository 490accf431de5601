"""Post-training quantisation of a small trained model: bits per byte by method and format.

    python benchmarks/posttraining.py > benchmarks/posttraining.md

Trains one model (a dense and a mixture layer) in bf16 for less than a minute, then quantises it by
each row of CASES and evaluates the whole validation part.
"""

import contextlib
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from timing import machine, markdown

from recipes.load import load
from recipes.quantize import quantize_run
from recipes.train import train

STEPS = 400
OVERRIDES = [
    "model.d_model=64", "data.corpus=tinyshakespeare", "optim.lr=5e-3", "trainer.threads=1",
    f"trainer.max_steps={STEPS}", f"trainer.eval_every_steps={STEPS}",
    f"trainer.checkpoint_every_steps={STEPS}",
]  # fmt: skip

# what is said of it -> what `quantize_run` is told
CASES: dict[str, dict[str, Any]] = {
    "mxfp8_e4m3, W8A8": {"method": "rtn", "format": "mxfp8_e4m3"},
    "mxfp6_e2m3, W6A6": {"method": "rtn", "format": "mxfp6_e2m3"},
    "hifloat8, W8A8": {"method": "rtn", "format": "hifloat8"},
    "nvfp4, W4A16": {"method": "rtn", "format": "nvfp4", "activations": "bf16"},
    "hif4, W4A16": {"method": "rtn", "format": "hif4", "activations": "bf16"},
    "mxfp4, W4A16": {"method": "rtn", "format": "mxfp4", "activations": "bf16"},
    "nvfp4, W4A4": {"method": "rtn", "format": "nvfp4"},
    "hif4, W4A4": {"method": "rtn", "format": "hif4"},
    "mxfp4, W4A4": {"method": "rtn", "format": "mxfp4"},
    "E2M1 by row, W4A4": {"method": "rtn", "format": {"format": "fp4_e2m1", "scope": "row"}},
    "searched, W4A16": {"method": "llm_fp4", "activations": "bf16"},
    "searched, W4A4": {"method": "llm_fp4", "shift": "none"},
    "searched and shifted, W4A4": {"method": "llm_fp4"},
    "searched and shifted, W4A4, as released": {"method": "llm_fp4", "scaling": "release"},
    "nearest, W4A8": {"method": "zeroquant_fp", "rounding": "nearest", "scales": "free", "rank": 0},
    "GPTQ, W4A8": {"method": "zeroquant_fp", "scales": "free", "rank": 0},
    "GPTQ, LoRC 8, W4A8": {"method": "zeroquant_fp", "scales": "free"},
    "GPTQ, M1, LoRC 8, W4A8": {"method": "zeroquant_fp", "scales": "m1"},
    "GPTQ, M2 as written, LoRC 8, W4A8": {"method": "zeroquant_fp", "scales": "m2"},
    "GPTQ, M2 rounded up, LoRC 8, W4A8": {"method": "zeroquant_fp", "scales": "m2_up"},
}


# how far the draw of calibration rows alone moves a result
REDRAWN = ("searched and shifted, W4A4", "GPTQ, LoRC 8, W4A8", "GPTQ, M1, LoRC 8, W4A8")
DRAWS = (2, 4, 8)  # batches


def row_of(name: str, result: dict) -> list[str]:
    """Cells of one case."""
    leaves = result["leaves"]
    numbers = [math.prod(leaf["shape"]) for leaf in leaves]
    bits = sum(leaf["bits"] * n for leaf, n in zip(leaves, numbers, strict=True)) / sum(numbers)
    error = math.sqrt(sum(leaf["output_error"] ** 2 for leaf in leaves) / len(leaves))
    before, after = result["bpb"]["before"], result["bpb"]["after"]
    return [
        result["method"], name, f"{bits:.2f}", f"{after:.4f}", f"{after - before:+.4f}",
        f"{error:.1%}",
    ]  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run, rows, before, spread = Path(folder) / "run", [], 0.0, []
        with contextlib.redirect_stdout(sys.stderr):
            train(load("debug", OVERRIDES), run)
            for i, (name, options) in enumerate(CASES.items()):
                result = quantize_run(run, out=Path(folder) / str(i), **options)
                before = result["bpb"]["before"]
                rows.append(row_of(name, result))
                print(rows[-1], flush=True)
            for name in REDRAWN:
                results = [
                    quantize_run(
                        run, out=Path(folder) / f"{name}{n}", calibration_batches=n, **CASES[name]
                    )
                    for n in DRAWS
                ]
                gaps = [result["bpb"]["after"] - before for result in results]
                spread.append(f"{name}: {', '.join(f'{gap:+.4f}' for gap in gaps)}")
    print("# Post-training quantisation of a small model\n")
    print(f"{machine()}. `python benchmarks/posttraining.py`\n")
    print(
        f"Two layers of width 64 (swiglu, then 4 experts), trained {STEPS} steps in bf16 to "
        f"{before:.4f} bits per byte. Bits: per quantised weight, scales and corrections included. "
        "Layer error: ||y - y^|| / ||y|| on calibration rows, root mean square over layers.\n"
    )
    head = ["method", "what", "bits", "bits per byte", "gap to bf16", "layer error"]
    print(markdown(head, rows))
    print(f"\nGaps with 512 rows drawn from 2, 4 and 8 batches: {'; '.join(spread)}.")
    print("So differences of less than about 0.01 mean nothing here.")


if __name__ == "__main__":
    main()
