"""Results as CSV: one row per run, and one row per judged difference."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from recipes.report.records import Run, read_results
from recipes.report.study import Study
from recipes.statistics.verdicts import Difference

Cell = str | int | float | None


def results_csv(results: dict[str, Any] | Path) -> str:
    """One row per run, flat numbers at full precision; a number that a run lacks is empty."""
    return csv_text(run_row(run) for run in read_results(results).runs)


def verdicts_csv(study: Study) -> str:
    """Every difference that the report draws or names, with its interval and verdict."""
    b = study.baseline
    against = [(key, f"{b.variant} {b.precision}", d) for key, d in study.verdicts.items()]
    gaps = [(key, f"{key[0]} {study.reference}", d) for key, d in study.gaps.items()]
    return csv_text(difference_row(*row) for row in (*against, *gaps))


def run_row(run: Run) -> dict[str, Cell]:
    """Flat numbers of a run."""
    cost, final, speed = run.cost, run.final, run.speed
    row: dict[str, Cell] = {
        name: getattr(run, name)
        for name in ("id", "variant", "ffn", "precision", "seed", "steps", "tokens")
    }
    row |= {
        "lr": run.lr,
        "bpb": final.bpb,
        "accuracy": final.accuracy,
        "diverged": run.diverged,
        "diverged_step": run.diverged_step,
        "spikes": len(run.spike_steps),
        "sharpness": run.sharpness,
        "nats_per_token": final.nats_per_token,
        "eval_bytes": final.eval_bytes,
        "eval_tokens": final.eval_tokens,
        "params": cost.params,
        "active_params": cost.active_params,
        "nonembedding_params": cost.nonembedding_params,
        "flops_per_token": cost.flops_per_token,
        "training_flops_per_token": cost.training_flops_per_token,
        "other_flops_per_token": cost.other_flops_per_token,
        "tokens_per_s": speed.tokens_per_s,
        "train_s": speed.train_s,
        "peak_memory_bytes": speed.peak_memory_bytes,
        "commit": run.commit,
    }
    row |= {f"weight_bytes_per_token_{n}": x for n, x in cost.weight_bytes_per_token.items()}
    row |= {f"bpb_{domain}": x for domain, x in final.bpb_by_domain.items()}
    row |= {f"flops_{role}": x for role, x in cost.flops_by_role.items()}
    row |= {f"params_{role}": x for role, x in cost.params_by_role.items()}
    row |= {f"loss_{name}": x for name, x in run.losses.items()}
    if run.load:
        row |= {
            "load_entropy": fmean(layer.entropy for layer in run.load),
            "load_largest_share": max(layer.largest_share for layer in run.load),
            "load_dead": sum(layer.dead for layer in run.load),
            "zero_computation_share": fmean(x.zero_computation_share for x in run.load),
        }
    return row


def difference_row(key: tuple[str, str], to: str, d: Difference) -> dict[str, Cell]:
    """A judged difference. key: variant and precision; to: what it is a difference to."""
    low, high = d.interval or (None, None)
    return {
        "variant": key[0],
        "precision": key[1],
        "against": to,
        "bpb_difference": d.value,
        "low_95": low,
        "high_95": high,
        "p": d.p,
        "p_holm": d.p_holm,
        "degrees_of_freedom": d.df,
        "verdict": d.word,
        "how": d.how,
    }


def csv_text(rows: Iterable[dict[str, Cell]]) -> str:
    """CSV with the union of the columns, in the order in which they first come."""
    listed = list(rows)
    columns = list(dict.fromkeys(name for row in listed for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(listed)
    return out.getvalue()
