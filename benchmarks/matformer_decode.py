"""One token at a time through a nested model, its slices and its extracted submodels; speculation.

    python benchmarks/matformer_decode.py [RUN] > benchmarks/matformer_decode.md

RUN is a finished MatFormer run (`zoo train matformer`), whose drafts are then measured too. All
other weights are random. A decoding step reads a cache of 64 tokens.
"""

import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import interleaved, machine, markdown, ratio
from torch import Tensor
from torch.nn.functional import linear

import zoo
from zoo.generate import generate
from zoo.speculative import SpeculationRecord, speculative_generate

D, F, LAYERS, HELD = 1024, 4096, 2, 64
WIDTHS = (F // 4, F // 2)
DOWN = (2048, 8192)  # the down-projection measured alone
COPIES = 4  # of it, so that none waits in a cache
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NEW = 32  # tokens that a generation adds
SHRUNK = (0.0, 0.05, 0.1)  # of the numbers that a draft leaves out, see `shrunk`
N_DRAFT = (3, 6)
Runs = dict[str, Callable[[], object]]


def lm(ffn: dict) -> zoo.LanguageModel:
    """A model of the size measured."""
    config = zoo.ModelConfig(
        vocab_size=256, d_model=D, n_layers=LAYERS, n_heads=8, max_seq_len=256, ffn=ffn,
        tie_embeddings=False,
    )  # fmt: skip
    return zoo.LanguageModel(config).eval()


def step(model: zoo.LanguageModel, widths: list[int | None] | None = None) -> Callable[[], Tensor]:
    """One token after HELD others, again and again."""
    cache, token = model.new_cache(HELD + 1), torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def run() -> Tensor:
        cache.truncate(min(cache.length, HELD))
        if cache.length < HELD:
            model(torch.zeros(1, HELD, dtype=torch.long), cache=cache)
        return model(token, cache=cache, widths=widths).logits

    return run


def submodel_table(gated: bool) -> str:
    """Milliseconds a token: nested slice, extracted submodel, a plain model of that width."""
    plain = "swiglu" if gated else "mlp"
    rows: list[list[str]] = []
    for name, dtype in DTYPES.items():
        model = lm({"name": "matformer", "d_ff": F, "gated": gated}).to(dtype)
        for width in WIDTHS:
            made = zoo.extract(model, width)
            own = lm({"name": plain, "d_ff": width}).to(dtype)
            runs: Runs = {
                "slice": step(model, [width] * LAYERS), "extracted": step(made), "plain": step(own),
                "whole": step(model),
            }  # fmt: skip
            times = interleaved(runs, rounds=7, repeats=3)
            rows.append(
                [
                    name,
                    str(width),
                    *(f"{statistics.median(times[run]) * 1e3:.2f}" for run in runs),
                    f"{ratio(times, 'extracted', 'plain'):.2f}",
                    f"{ratio(times, 'slice', 'extracted'):.2f}",
                ]
            )
    head = ["dtype", "width", "slice, ms", "extracted, ms", "plain, ms", f"whole ({F}), ms"]
    return markdown([*head, "extracted / plain", "slice / extracted"], rows)


def down_table() -> str:
    """One token through the down-projection alone, each matrix in copies taken in turn."""
    rows: list[list[str]] = []
    for name, dtype in DTYPES.items():
        for width in (DOWN[1] // 8, DOWN[1] // 4):
            wide = [torch.randn(DOWN).to(dtype) for _ in range(COPIES)]
            narrow = [w[:, :width].contiguous() for w in wide]
            h = torch.randn(1, width).to(dtype)
            slices, copies = itertools.cycle([w[:, :width] for w in wide]), itertools.cycle(narrow)
            runs: Runs = {
                "slice": lambda h=h, s=slices: linear(h, next(s)),
                "copy": lambda h=h, c=copies: linear(h, next(c)),
            }
            times = interleaved(runs, rounds=9, repeats=4 * COPIES)
            middle = [f"{statistics.median(times[run]) * 1e3:.3f}" for run in runs]
            rows.append([name, str(width), *middle, f"{ratio(times, 'slice', 'copy'):.2f}"])
    return markdown(["dtype", "width", "slice, ms", "copy, ms", "slice / copy"], rows)


@torch.no_grad()
def shrunk(model: zoo.LanguageModel, width: int, scale: float) -> zoo.LanguageModel:
    """The model with all FFN outputs but those of the first `width` hidden numbers scaled down.

    Random weights have no submodel that says nearly the same: this sets by hand how often a draft
    is kept.
    """
    for block in model.blocks:
        block.ffn.down.weight[:, width:] *= scale
    return model


def speculation_rows(
    model: zoo.LanguageModel, width: int, prompt: Tensor, what: str, n_drafts: tuple[int, ...]
) -> list[list[str]]:
    """Greedy decoding with the model's first numbers as drafts, beside plain greedy decoding."""
    say = {"max_new_tokens": NEW, "temperature": 0.0}
    widths = [width] * model.config.n_layers
    plain = zoo.extract(model, width)  # a cache of its own, but weights in one piece
    want, rows = generate(model, prompt, **say), []
    for n in n_drafts:
        kinds = {"shared cache": widths, "extracted draft": plain}
        records: dict[str, SpeculationRecord] = {}
        runs: Runs = {"greedy": lambda: generate(model, prompt, **say)}
        for kind, draft in kinds.items():
            options = {**say, "draft": draft, "n_draft": n}
            tokens, records[kind] = speculative_generate(model, prompt, **options)
            assert tokens.equal(want), "speculation must give the greedy output"
            runs[kind] = lambda options=options: speculative_generate(model, prompt, **options)
        times = interleaved(runs, rounds=3)
        for kind, record in records.items():
            rows.append(
                [
                    what, str(n), kind, f"{record.acceptance_rate:.2f}",
                    f"{record.tokens_per_verification:.2f}",
                    f"{statistics.median(times['greedy']) * 1e3 / NEW:.2f}",
                    f"{1 / ratio(times, kind, 'greedy'):.2f}",
                ]
            )  # fmt: skip
    return rows


def trained_rows(run: Path) -> list[list[str]]:
    """Drafts of a finished run's narrowest granularity, on a prompt of its own kind."""
    from recipes.quantize import read_model
    from recipes.text import tokenizer

    task = read_model(run)
    width = task.recipe.model.layers()[0].config.granularities[0]
    prompt = tokenizer(task.recipe.data.tokenizer).encode("The king of the ")[None]
    model = task.model.eval()
    zoo.set_precision(model, "fp32")
    d, n_layers = model.config.d_model, model.config.n_layers
    return speculation_rows(
        model, width, prompt, f"trained, d_model {d}, {n_layers} layers", (2, 4)
    )


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("# Decoding a nested model\n")
    print(
        f"d_model {D}, d_ff {F}, {LAYERS} layers, one token a forward after {HELD} others, random"
    )
    print("weights. Times are of whole forwards: attention, norms and head are in them. A gated")
    print("slice copies its rows of gate and up in every forward; a down-projection's is a view.\n")
    for gated in (False, True):
        print(f"## {'Gated' if gated else 'Ungated'}\n\n{submodel_table(gated)}\n")
    print(f"## The down-projection alone, {DOWN[0]} x {DOWN[1]}\n\n{down_table()}\n")
    rows = []
    for scale in SHRUNK:
        model = shrunk(lm({"name": "matformer", "d_ff": F, "activation": "relu2"}), F // 8, scale)
        prompt = torch.randint(256, (1, 16))
        rows += speculation_rows(model, F // 8, prompt, f"rest times {scale:g}", N_DRAFT)
    if len(sys.argv) > 1:
        rows += trained_rows(Path(sys.argv[1]))
    print("## Speculative greedy decoding, fp32\n")
    print(f'The first {F // 8} of {F} hidden numbers draft. "Rest times s": what the draft leaves')
    print("out is scaled by s, which sets by hand how many drafts are kept. Speed-up over greedy")
    print("decoding of the same model, which gives the same tokens.\n")
    head = ["model", "n_draft", "draft", "kept", "tokens a verification", "greedy, ms a token"]
    print(markdown([*head, "speed-up"], rows))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
