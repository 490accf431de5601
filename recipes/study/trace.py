"""Matmul FLOPs as a counter sees them, to hold the counted cost against (comparison.md 2.2)."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from recipes import record
from recipes.report.records import Run, load_json
from recipes.report.strict import read_as
from recipes.study.records import Trace

FILE = "traces.json"  # in a study's directory
SEQUENCES = 2
AGREES = 0.01  # relative distance up to which counted and traced FLOPs are the same


def traces_of(directory: Path, runs: Mapping[str, Run]) -> dict[str, Trace]:
    """A trace of each model, kept from before where it was traced.

    Args:
        directory: of the study, for traces.json.
        runs: one run of each model, by the model's key.
    """
    path = directory / FILE
    found = read_as(dict[str, Trace], load_json(path), str(path)) if path.is_file() else {}
    for key, run in runs.items():
        if key not in found:
            found[key] = traced(run)
            record.write_json(path, {k: asdict(t) for k, t in found.items()})
    return {key: found[key] for key in runs}


def traced(run: Run) -> Trace:
    """The forward of a run's model on random tokens, in evaluation, with a gradient to come.

    In float32: a format's own arithmetic is not the model's. Why where the model does not run.
    """
    # a report whose models are traced already need not wait for these
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from recipes import load
    from recipes.task import build_model

    try:
        recipe = load.load(run.recipe, {"precision": "fp32", "init_from": None})
        recipe = replace(recipe, trainer=replace(recipe.trainer, accelerator="cpu"))
        with torch.random.fork_rng(devices=[]):
            model = build_model(recipe).eval()
            shape = (SEQUENCES, recipe.data.seq_len)
            tokens = torch.randint(recipe.model.vocab_size, shape)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                model(tokens)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return Trace(why=f"{type(error).__name__}: {error}".splitlines()[0])
    return Trace(flops_per_token=counter.get_total_flops() / tokens.numel())
