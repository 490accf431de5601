"""What `result.json` keeps of each submodel of a run that trained nested FFNs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Submodel:
    """One submodel on the held-out text: what it is, what it costs, how good it is."""

    widths: tuple[int | None, ...]  # of each layer; None: a layer that is not nested
    trained: bool  # it is one of the granularities that steps trained; else a mixture of two
    params: int  # of the submodel alone
    active_params: float
    nonembedding_params: int
    flops_per_token: float  # forward, matmuls
    bpb: float | None  # None: no number
    accuracy: float | None = None  # of a task's answers
    agreement: float  # share of the positions whose likeliest token is the widest model's
    kl: float | None  # KL(widest || this) of the next token, nats, mean over positions

    @property
    def label(self) -> str:
        """Its widths in words: one, or how many layers have which."""
        widths = [w for w in self.widths if w is not None]
        if len(set(widths)) == 1:
            return str(widths[0])
        return " + ".join(f"{widths.count(w)} \u00d7 {w}" for w in dict.fromkeys(widths))
