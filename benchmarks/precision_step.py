"""A training step of one leaf under a precision policy, against the plain step of the same size.

    python benchmarks/precision_step.py > benchmarks/precision_step.md

Linear 1024 x 1024 at 4096 tokens, and ExpertLinear with 8 experts of as many rows each in the
mean; forward and backward, all six operands as the preset has them; fp32 master weights
throughout. "bf16" multiplies in bf16, "fp32" in fp32 on the fast exact path (oneDNN).
"""

import resource
from collections.abc import Callable

import torch
from timing import interleaved, machine, markdown, ratio
from torch.profiler import ProfilerActivity, profile

from layers.linear import ExpertLinear, Linear
from layers.precision import PRESETS

TOKENS, WIDTH, EXPERTS = 4096, 1024, 8
NAMES = ("fp32", "bf16", "mxfp4", "nvfp4", "nvfp4_4over6", "hif4", "mxfp8", "fp8_tensor",
         "fp8_row", "fp8_block128", "quartet2", "quartet")  # fmt: skip
LIMITS = {("mxfp4", "bf16"): 1.6, ("mxfp4", "fp32"): 0.75, ("nvfp4", "bf16"): 2.2}


def counts() -> torch.Tensor:
    """Rows of each expert: uneven, no multiple of a block, one expert without any."""
    shares = torch.tensor([0.0, 0.31, 0.05, 0.14, 0.2, 0.1, 0.09])
    rows = (shares * TOKENS).long()
    return torch.cat([rows, TOKENS - rows.sum(0, keepdim=True)])


def step(precision: str, experts: bool = False) -> Callable[[], None]:
    """One forward and backward; activations arrive as a model of that precision hands them on."""
    torch.manual_seed(0)
    leaf = ExpertLinear(EXPERTS, WIDTH, WIDTH, role="ffn") if experts else None
    leaf = leaf or Linear(WIDTH, WIDTH, role="ffn")
    leaf.precision = PRESETS[precision].default
    leaf.seed("leaf", seed=0, step=0)
    x = torch.randn(TOKENS, WIDTH, dtype=leaf.precision.dtype, requires_grad=True)
    dy = torch.randn(TOKENS, WIDTH, dtype=leaf.precision.dtype)
    rest = [counts()] if experts else []

    def run() -> None:
        x.grad = leaf.weight.grad = None
        leaf(x, *rest).backward(dy)

    return run


def table(experts: bool) -> str:
    """Steps of every preset, interleaved."""
    times = interleaved({name: step(name, experts) for name in NAMES}, rounds=9)
    rows = []
    for name in NAMES:
        cells = [name, f"{sorted(times[name])[len(times[name]) // 2] * 1e3:.0f}"]
        for base in ("bf16", "fp32"):
            limit = LIMITS.get((name, base))
            goal = f" (at most {limit})" if limit else ""
            cells.append(f"{ratio(times, name, base):.2f}{goal}")
        rows.append(cells)
    return markdown(["precision", "ms", "time / bf16 step", "time / fp32 step"], rows)


def shares(precision: str) -> list[str]:
    """Where the time of a Linear's step goes, in percent; and MiB of memory newly touched."""
    run = step(precision)
    run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(5):
            run()
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    whole = sum(times.values())
    parts = [times.get(key, 0.0) for key in ("aten::mm", "moe_zoo::quantize", "aten::mul_")]
    parts.append(whole - sum(parts))
    megabytes = faults * resource.getpagesize() / 2**20
    return [precision, *(f"{100 * part / whole:.0f}" for part in parts), f"{megabytes:.0f}"]


def main() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # oneDNN; full fp32 without AMX
    print(f"# Training step of {WIDTH} x {WIDTH}, {TOKENS} tokens\n")
    print(f"{machine()}. `python benchmarks/precision_step.py`\n")
    print(f"## Linear\n\n{table(experts=False)}\n")
    print(f"## ExpertLinear, {EXPERTS} experts, rows {counts().tolist()}\n")
    print(f"{table(experts=True)}\n")
    print("## Where the time of a Linear's step goes, in percent\n")
    print(markdown(PARTS, [shares(name) for name in NAMES]))
    print(f"\n{NOTE}")


PARTS = ["precision", "matmul", "quantise", "scale the product", "rest", "MiB newly touched"]
NOTE = """
The matmuls bind: each runs as long as in the bf16 step, so what the formats add is their share of
quantising, rotation and random bits included. `fp8_block128` multiplies in float32, for its values
under float32 block scales are not exact in bf16; so does `quartet`, whose scales hold a 4/3, and
its masks of clipped values are torch ops.
""".strip()


if __name__ == "__main__":
    main()
