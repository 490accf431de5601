"""Evaluation of a VersatileFFN: early exit by token against the released batch-maximum loop.

    OMP_NUM_THREADS=1 python benchmarks/versatile_exit.py [--write]

The released rule (adaptive_ffn.md 5.5) is written out here on the same weights: as many loops as
the token of most loops asks for, for every token, then a gather; and the experts' sum by a loop
over experts on the rows of the tokens that chose them, for those whose lambda is above 0.
"""

import argparse
from pathlib import Path

import torch
from timing import interleaved, machine, markdown, ratio
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zoo
from layers.swiglu import glu
from layers.versatile_ffn import VersatileFFN

D, WIDTH, TOKENS = 512, 2048, 512
PAGE = Path(__file__).with_suffix(".md")
BAR = 1.6
# shares of the tokens that loop 1, 2, 3, 4 times
MIXES = {
    "1.5": (0.7, 0.15, 0.1, 0.05),
    "2.5": (0.25, 0.25, 0.25, 0.25),
    "3.0": (0.1, 0.2, 0.3, 0.4),
    "3.5": (0.0, 0.1, 0.3, 0.6),
}


def layer_of(mix: tuple[float, ...]) -> tuple[VersatileFFN, Tensor]:
    """A layer and inputs [1, T, D] of which so many tokens loop so often."""
    torch.manual_seed(0)
    layer = zoo.create("versatile_ffn", d_model=D, d_ff=WIDTH).eval()
    assert isinstance(layer, VersatileFFN)
    assert layer.loop_predictor is not None
    x, weight = torch.randn(TOKENS, D), layer.loop_predictor.weight
    loops = torch.multinomial(torch.tensor(mix), TOKENS, replacement=True)
    x[:, :4] = 0  # four directions tell the loops, the rest is noise
    x[torch.arange(TOKENS), loops] = 4.0
    with torch.no_grad():
        weight.zero_()[:, :4] = torch.eye(4)
    return layer, x[None]


def released(layer: VersatileFFN, x: Tensor) -> Tensor:
    """Y - H as the released evaluation computes it, in its own order. x: [1, T, D]."""
    c, h = layer.config, x[0]
    assert layer.loop_predictor is not None
    assert layer.router is not None
    loops = layer.loop_predictor(h).choice[:, 0] + 1
    states = [h]
    for _ in range(int(loops.max())):
        u = glu(layer.gate_up(layer.norm(states[-1])), c.activation)
        states.append(states[-1] + layer.down(u))
    deep = torch.stack(states)[loops, torch.arange(len(h))]
    share = ((c.max_loops - loops) / c.max_loops)[:, None]
    some = (share[:, 0] > 1e-6).nonzero()[:, 0]
    return (share * (_experts(layer, h, some) - h) + (1 - share) * (deep - h))[None]


def _experts(layer: VersatileFFN, h: Tensor, some: Tensor) -> Tensor:
    """H + sum of w_j E_j(H) for some tokens, H for the others: a loop over slices."""
    c = layer.config
    assert layer.router is not None
    routing = layer.router(h[some])
    normed, out = layer.norm(h[some]), torch.zeros(len(some), D)
    gate, up = layer.gate_up.weight.chunk(2)
    for j, start in enumerate(c.starts):
        rows, place = (routing.experts == j).nonzero(as_tuple=True)
        own = slice(start, start + c.expert)
        z = normed[rows]
        u = torch.nn.functional.silu(z @ gate[own].t()) * (z @ up[own].t())
        out.index_add_(
            0, rows, routing.weights[rows, place, None] * (u @ layer.down.weight[:, own].t())
        )
    return h.index_add(0, some, out)


def flops_of(run: object) -> int:
    with FlopCounterMode(display=False) as counter:
        run()  # pyright: ignore[reportCallIssue]
    return counter.get_total_flops()


@torch.no_grad()
def rows_of(name: str, mix: tuple[float, ...], rounds: int) -> tuple[list[str], float]:
    """A row of the table, and the ratio."""
    layer, x = layer_of(mix)
    dense = zoo.create("swiglu", d_model=D, d_ff=WIDTH)
    counts = layer(x).stats["loops"].double()
    mean = (counts * torch.arange(1, 5)).sum().item() / TOKENS
    candidates = {
        "dense": lambda: dense(x),
        "released": lambda: released(layer, x),
        "training's": lambda: layer._every_loop(x[0], *_choices(layer, x[0])),
        "early exit": lambda: layer(x),
    }
    torch.testing.assert_close(layer(x).y, released(layer, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x).y[0], candidates["training's"](), rtol=1e-4, atol=1e-4)
    times = interleaved(candidates, rounds=rounds)
    dense_ms = 1e3 * sorted(times["dense"])[rounds // 2]
    faster = ratio(times, "released", "early exit")
    in_dense = [f"{ratio(times, n, 'dense'):.2f}" for n in ("released", "training's", "early exit")]
    work = flops_of(candidates["early exit"]) / flops_of(candidates["released"])
    return [
        f"{mean:.2f}",
        f"{dense_ms:.1f}",
        *in_dense,
        f"{faster:.2f}x",
        f"{1 / work:.2f}x",
    ], faster


def _choices(layer: VersatileFFN, h: Tensor) -> tuple[Tensor, object]:
    assert layer.loop_predictor is not None
    assert layer.router is not None
    routing = layer.router(h)
    weights = torch.zeros(len(h), layer.config.n_experts).scatter(
        1, routing.experts, routing.weights
    )
    return weights, layer.loop_predictor(h)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    said = parser.parse_args()
    rows, ratios = [], {}
    for name, mix in MIXES.items():
        row, ratios[name] = rows_of(name, mix, said.rounds)
        rows.append(row)
    header = ["mean loops", "dense FFN, ms", "released", "all loops, shared hidden", "early exit",
              "released / early exit", "FLOPs, released / early exit"]  # fmt: skip
    page = f"""# Early exit of VersatileFFN

{machine()}.
{TOKENS} tokens, d {D}, m {WIDTH}, 8 experts of which 2 run, 4 loops, float32. Times in dense FFNs
of the same size, medians of ratios inside {said.rounds} interleaved rounds. Made by
`benchmarks/versatile_exit.py`.

{markdown(header, rows)}

*released*: as many loops as the token of most loops needs, for every token, experts one after
another on gathered rows. *all loops, shared hidden*: what training computes. *early exit*: tokens
sorted by their loops, each loop run for those that go on, the width in the down projection of the
last. All three give the same outputs, which is checked before they are timed.
The bar is {BAR}x at 2.5 mean loops; reached: {ratios["2.5"]:.2f}x.
"""
    print(page)
    if said.write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
