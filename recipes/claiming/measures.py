"""What a test may read off a finished run."""

from collections.abc import Callable, Iterable
from math import isfinite, nan
from statistics import fmean
from typing import NamedTuple

from recipes.report.records import Run
from recipes.report.width_records import Submodel

Read = Callable[[Run, Run | Submodel, int], float | None]


class Measure(NamedTuple):
    """One figure of a run."""

    words: str
    read: Read  # of the run, of it or its submodel, tokens at once; None: no such figure there
    form: str  # how a value is written
    exact: bool = False  # counted, not measured: without noise
    loss: bool = False  # a run that diverged has infinitely much of it
    untrained: bool = False  # known before the first step: a run that diverges has it too


def _mean(values: Iterable[float | None]) -> float | None:
    """None where there is none, or one is missing."""
    found = list(values)
    known = [x for x in found if x is not None]
    return fmean(known) if known and len(known) == len(found) else None


def _bpb(run: Run, part: Run | Submodel, n: int) -> float | None:
    return part.final.bpb if isinstance(part, Run) else part.bpb


def _accuracy(run: Run, part: Run | Submodel, n: int) -> float | None:
    return part.final.accuracy if isinstance(part, Run) else part.accuracy


def _cost(name: str) -> Read:
    def read(run: Run, part: Run | Submodel, n: int) -> float | None:
        return getattr(part.cost if isinstance(part, Run) else part, name)

    return read


def _start(run: Run, part: Run | Submodel, n: int) -> float | None:
    return run.curve[0].eval_bpb if run.curve and run.curve[0].step == 0 else None


def _dropped(run: Run, part: Run | Submodel, n: int) -> float | None:
    rows = [point.router["load/dropped"] for point in run.curve if "load/dropped" in point.router]
    return rows[-1] if rows else None


def _loads(name: str) -> Read:
    return lambda run, part, n: _mean(getattr(layer, name) for layer in run.load)


MEASURES: dict[str, Measure] = {
    "bpb": Measure("bits per byte", _bpb, ".4f", loss=True),
    "nats": Measure(
        "nats per token", lambda run, part, n: run.final.nats_per_token, ".4f", loss=True
    ),
    "accuracy": Measure("share of right answers", _accuracy, ".3f"),
    "start_bpb": Measure("bits per byte before the first step", _start, ".4f", untrained=True),
    "tokens_per_s": Measure(
        "tokens/s in training", lambda run, part, n: run.speed.tokens_per_s, ",.0f"
    ),
    "train_s": Measure("seconds of training", lambda run, part, n: run.speed.train_s, ",.0f"),
    "training_flops": Measure(
        "FLOPs of the training",
        lambda run, part, n: run.curve[-1].flops if run.curve else None,
        ".3g",
        exact=True,
    ),
    "flops_per_token": Measure(
        "FLOPs per token, forward",
        _cost("flops_per_token"),
        ",.0f",
        exact=True,
        untrained=True,
    ),
    "params": Measure("parameters", _cost("params"), ",.0f", exact=True, untrained=True),
    "active_params": Measure(
        "active parameters", _cost("active_params"), ",.0f", exact=True, untrained=True
    ),
    "weight_bytes_per_token": Measure(
        "weight bytes read per token",
        lambda run, part, n: run.cost.weight_bytes_per_token.get(str(n)),
        ",.0f",
        exact=True,
        untrained=True,
    ),
    "max_violation": Measure(
        "largest load over the mean, less 1, mean over layers", _loads("max_violation"), ".3f"
    ),
    "zero_computation_share": Measure(
        "share of assignments that run no FFN, mean over layers",
        _loads("zero_computation_share"),
        ".3f",
    ),
    "dead": Measure("dead experts a layer", _loads("dead"), ".2f"),
    "dropped": Measure("share of assignments over capacity, last logged", _dropped, ".3f"),
    "density": Measure(
        "share of neurons that a token runs, mean over layers",
        lambda run, part, n: _mean(layer.active for layer in run.density),
        ".4f",
    ),
    "loops": Measure(
        "loops of a token, mean over layers",
        lambda run, part, n: _mean(layer.mean for layer in run.loops),
        ".2f",
    ),
}


def value_of(run: Run, measure: str, width: int | None, tokens: int) -> float | None:
    """The figure; None where the run has none.

    A run that ended in no finite loss has NaN of all that training makes, where it recorded nothing
    too: left out, its seed would count for nothing, and the variant by the seeds that went well.

    Args:
        run: finished.
        measure: a row of MEASURES.
        width: of the submodel to read, which has it in all its nested layers; None: the run itself.
        tokens: processed together.
    """
    if not (MEASURES[measure].untrained or isfinite(run.final.bpb)):
        return nan
    part: Run | Submodel | None = run
    if width is not None:
        widths = {width, None}
        part = next((s for s in run.widths if {*s.widths, None} == widths), None)
    return None if part is None else MEASURES[measure].read(run, part, tokens)
