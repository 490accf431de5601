"""A training step of one Linear under a precision policy, against the plain step of the same size.

    python benchmarks/precision_step.py > benchmarks/precision_step.md

Linear 1024 x 1024 at 4096 tokens, forward and backward, all six operands quantised; fp32 master
weights throughout. "bf16" multiplies in bf16, "fp32" in fp32 on the fast exact path (oneDNN).
"""

import torch
from timing import interleaved, machine, markdown, ratio

from layers.linear import Linear
from layers.precision import PRESETS

TOKENS, WIDTH = 4096, 1024
LIMITS = {("mxfp4", "bf16"): 1.6, ("mxfp4", "fp32"): 0.75, ("nvfp4", "bf16"): 2.2}


def step(precision: str):
    """One forward and backward; activations arrive as a model of that precision hands them on."""
    torch.manual_seed(0)
    layer = Linear(WIDTH, WIDTH, role="ffn")
    layer.precision = PRESETS[precision].default
    x = torch.randn(TOKENS, WIDTH, dtype=layer.precision.dtype, requires_grad=True)
    dy = torch.randn(TOKENS, WIDTH, dtype=layer.precision.dtype)

    def run():
        x.grad = layer.weight.grad = None
        layer(x).backward(dy)

    return run


def main() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # oneDNN; full fp32 without AMX
    names = ("fp32", "bf16", "mxfp4", "nvfp4")
    times = interleaved({name: step(name) for name in names}, rounds=9)
    rows = []
    for name in names:
        cells = [name]
        for base in ("bf16", "fp32"):
            limit = LIMITS.get((name, base))
            goal = f" (at most {limit})" if limit else ""
            cells.append(f"{ratio(times, name, base):.2f}{goal}")
        rows.append(cells)
    print(f"# Training step of Linear {WIDTH} x {WIDTH}, {TOKENS} tokens\n")
    print(f"{machine()}. `python benchmarks/precision_step.py`\n")
    print(markdown(["precision", "time / bf16 step", "time / fp32 step"], rows))


if __name__ == "__main__":
    main()
