"""A small claim, and a trainer whose made-up runs have the effects that a test plants."""

from random import Random

from study_toys import RECIPE, MadeUp

PAPER = {
    "says": "Sparse is better.", "arxiv": "1701.06538", "where": "table 1",
    "numbers": ["perplexity 34.1 against 41.2"],
}  # fmt: skip
BETTER = {"of": "moe", "against": "swiglu", "measure": "bpb", "direction": "lower"}


def small(**keys):
    """A claim that a mixture is better than a dense FFN."""
    study = {
        "recipe": RECIPE,
        "variants": [{"name": "swiglu", "d_ff": 64}, {"name": "moe", "n_experts": 4}],
        "baseline": {"variant": "swiglu"}, "multiple_of": 8, "tolerance": 0.06, "controls": [],
        **keys.pop("study", {}),
    }  # fmt: skip
    said = {"name": "small", "title": "Sparse is better", "paper": PAPER, "study": study,
            "tests": [BETTER], "limits": ["Four steps."]}  # fmt: skip
    return {**said, **keys}


class Planted(MadeUp):
    """As MadeUp, with gains by precision and noise of each precision's own."""

    def __init__(self, gains=None, *, by_precision=None, **keys):
        super().__init__(gains, **keys)
        self.by_precision = by_precision or {}

    def result(self, run):
        plain = super().result(run)
        if plain["final"]["bpb"] is not None:
            label = run.precision
            plain["final"]["bpb"] -= self.by_precision.get(label, 0.0)
            plain["final"]["bpb"] += self.noise * Random(f"{label} {run.seed}").gauss(0, 1)
        return plain
