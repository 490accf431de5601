"""The page of a study: its own sections, then those of one comparison at its largest size."""

from dataclasses import dataclass, replace
from pathlib import Path

from recipes import record
from recipes.report.noise import compare_in_pairs
from recipes.report.page import compose, download, write_page
from recipes.report.records import SCHEMA, Comparison, Results
from recipes.report.sections import Section, sections
from recipes.report.study import study
from recipes.report.text import Markup, join
from recipes.statistics.bootstrap import DRAWS
from recipes.study.gather import gather
from recipes.study.records import RESULTS, StudyResults
from recipes.study.report import export
from recipes.study.report.controls import controls
from recipes.study.report.costs import costs
from recipes.study.report.derive import Derived
from recipes.study.report.failures import failures
from recipes.study.report.headline import headline
from recipes.study.report.judged import gaps, rule
from recipes.study.report.ladder import Ladder, ladder, training_flops, training_seconds
from recipes.study.report.markdown import verdicts
from recipes.study.report.rates import learning_rates
from recipes.study.report.rule import Ruling, rulings
from recipes.study.report.scaling import scaling
from recipes.study.report.targets import targets
from recipes.study.report.tuning import Sweep, sweeps


@dataclass(frozen=True)
class Parts:
    """What page, tables and figures share, worked out once."""

    d: Derived
    sweeps: list[Sweep]
    ladders: list[Ladder]  # over training FLOPs, by matching
    seconds: Ladder
    rulings: list[Ruling]


def parts_of(results: StudyResults, *, draws: int = DRAWS) -> Parts:
    """Derive everything. draws: of the bootstraps."""
    d = Derived(results)
    ladders = [ladder(d, hold, training_flops, draws=draws) for hold in d.plan.holds]
    seconds = ladder(d, d.flops_hold, training_seconds, draws=draws, joint=False)
    flops = next(one for one in ladders if one.hold == d.flops_hold)
    return Parts(d, sweeps(d), ladders, seconds, rulings(d, flops, seconds))


def write_study_report(
    directory: Path, figures: Path | None = None, *, to: Path | None = None, draws: int = DRAWS
) -> list[Path]:
    """Gather a study's runs and write what they say so far.

    Files: results.json, report.html, runs.csv, differences.csv, results.tex and verdicts.md.

    Args:
        directory: of a study that was run, finished or not.
        figures: where each picture goes as PDF and SVG; None: no pictures.
        to: where to publish it, without weights and checkpoints: the files and study.yaml; a
            report can be made again from there. None: into its directory.
        draws: of the bootstraps.

    Returns:
        The files, the page first.

    Raises:
        ValueError: one line, where no study was run there, a record is malformed, or figures are
            asked for without matplotlib.
    """
    parts = parts_of(gather(directory), draws=draws)
    out = directory if to is None else to
    written = [write_page(render(parts), out)]
    texts = {
        "runs.csv": export.runs_csv(parts.d),
        "differences.csv": export.differences_csv(parts.d),
        "results.tex": export.latex(parts.d),
        "verdicts.md": verdicts(parts.d),
    }
    if out != directory:
        texts |= {name: (directory / name).read_text() for name in (RESULTS, "study.yaml")}
    for name, content in texts.items():
        record.write_text(out / name, content)
        written.append(out / name)
    if figures is not None:
        from recipes.study.report.static import write_study_figures

        written += write_study_figures(parts.d, parts.sweeps, parts.ladders, figures)
    return written


def render(parts: Parts) -> str:
    """The page as text."""
    d = parts.d
    return compose(
        title=d.plan.name,
        kicker="Study",
        headline=headline(d),
        sections=[*_own(parts), *comparison_sections(d)],
        downloads=_downloads(d),
    )


def _own(parts: Parts) -> list[Section]:
    d = parts.d
    made = (
        ("Verdict rule", rule(d, parts.rulings)),
        ("Learning rates", learning_rates(d, parts.sweeps)),
        ("Ladder", scaling(d, parts.ladders, parts.seconds)),
        ("Time to target", targets(d)),
        ("Precision over sizes", gaps(d)),
        ("Controls", controls(d)),
        ("Costs and limits", costs(d)),
        ("Failures", failures(d)),
    )
    return [Section(title, body) for title, body in made if body is not None]


def comparison_sections(d: Derived) -> list[Section]:
    """The sections of one comparison: the primary matching at the largest complete size."""
    results = comparison_at(d)
    if results is None:
        return []
    judged = study(results, compared=compare_in_pairs)
    data = replace(judged, look=d.look)  # a variant has one colour on the whole page
    return [replace(part, title=f"{d.top}: {part.title}") for part in sections(data)]


def comparison_at(d: Derived) -> Results | None:
    """That cell as the results of a comparison; None where its baseline has no run."""
    size, hold, p = d.top, d.primary, d.plan
    if size is None or d.base(size) is None:
        return None
    cell = p.cell(size, hold)
    mine = [r for r in d.planned("reporting") if r.size == size and hold in r.holds]
    ids = {r.id for r in mine}
    return Results(
        schema=SCHEMA,
        comparison=Comparison(
            name=f"{p.name}, {size}",
            baseline=p.baseline,
            held_equal=hold,
            target=cell.target,
            matched=cell.matched,
            variants=cell.variants,
            precisions=p.precisions,
            seeds=tuple(sorted({r.seed for r in mine})),
        ),
        runs=tuple(d.runs[r.id] for r in mine if r.id in d.runs),
        failures={k: why for k, why in d.results.failures.items() if k in ids},
    )


def _downloads(d: Derived) -> Markup:
    return join(
        download("runs.csv", "one row per run", export.runs_csv(d)),
        download(
            "differences.csv", "every difference with its interval", export.differences_csv(d)
        ),
        download("results.tex", "the verdict table for LaTeX", export.latex(d)),
    )
