"""Figures for papers, as PNG, SVG or PDF; matplotlib, the extra `figures`, is loaded here only."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from layers.names import check_choice
from recipes.report.figures import GREY
from recipes.report.frontier import frontier_axes, pareto
from recipes.report.records import read_results
from recipes.report.study import Study, study

FORMATS = ("png", "svg", "pdf")
DASHES = {
    "solid": "-", "dash": (0, (5, 3)), "dot": (0, (1, 2)), "dashdot": (0, (5, 2, 1, 2)),
    "longdash": (0, (9, 3)), "longdashdot": (0, (9, 2, 1, 2)),
}  # fmt: skip
MARKERS = {
    "circle": "o", "diamond-open": "D", "square": "s", "triangle-up-open": "^",
    "cross": "P", "star-open": "*",
}  # fmt: skip
STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e6e8ea", "axes.axisbelow": True, "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "report", "savefig.bbox": "tight", "savefig.dpi": 200,
}  # fmt: skip


def write_figures(
    results: dict[str, Any] | Path, out_dir: Path, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Loss curves, frontiers, precision gap and expert load, one file each and format.

    Figures without data are left out.

    Args:
        results: as for `write_report`.
        out_dir: made if missing.
        formats: of FORMATS.

    Returns:
        The files, in order.

    Raises:
        ValueError: matplotlib is missing, a format is unknown, or the results are malformed.
    """
    data = study(read_results(results))

    def drawn() -> dict[str, Any]:
        return {"loss": _loss(data), "gap": _gap(data), "load": _load(data), **_frontiers(data)}

    return write_drawn(drawn, out_dir, formats)


def write_drawn(
    draw: Callable[[], Mapping[str, Any]], out_dir: Path, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """What `draw` gives by name, one file each and format, in the style of papers; None is none.

    Raises:
        ValueError: matplotlib is missing, or a format is unknown.
    """
    for name in formats:
        check_choice("figure format", name, FORMATS)
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "figures need matplotlib: install the extra, pip install 'moe-zoo[figures]'"
        ) from None
    out_dir.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with matplotlib.rc_context(STYLE):
        for name, figure in draw().items():
            if figure is not None:
                written += [save(figure, out_dir / f"{name}.{f}") for f in formats]
    return written


def save(figure: Any, path: Path) -> Path:
    """Write a figure in the format of the path's ending."""
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # same input, same file
    figure.savefig(path, metadata=undated.get(path.suffix))
    return path


def new_axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure of its own, outside pyplot: no global state, no window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _loss(s: Study) -> Any:
    """Held-out bits per byte against tokens; training batches where none was held out."""
    runs = [(g, r) for g in s.groups for r in g.runs if r.curve]
    held_out = any(p.eval_bpb is not None for _, r in runs for p in r.curve)
    column = "eval_bpb" if held_out else "train_bpb"
    if not runs:
        return None
    figure, axes = new_axes(5.2, 3.2)
    for g, run in runs:
        points = [(p.tokens, y) for p in run.curve if (y := getattr(p, column)) is not None]
        first = run is g.first
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=s.look.colours[g.variant],
            linestyle=DASHES[s.look.dashes[g.precision]],
            linewidth=1.3 if first else 0.8,
            alpha=1 if first else 0.45,
            label=g.label if first else None,
        )
    axes.set(xlabel="training tokens", ylabel="bits per byte")
    axes.xaxis.set_major_formatter(engineering())
    axes.legend(fontsize=7)
    return figure


def _frontiers(s: Study) -> dict[str, Any]:
    """One figure per cost, named after it."""
    return {
        f"frontier_{label.lower().replace(' ', '_')}": _frontier(s, title, value, more)
        for label, title, value, more in frontier_axes(s)
        if len(s.groups) > 1
    }


def _frontier(s: Study, title: str, value: Any, more: bool) -> Any:
    points = [(g, x) for g in s.groups if (x := value(g)) is not None and isfinite(g.bpb)]
    if not points:
        return None
    figure, axes = new_axes(5.2, 3.4)
    line = pareto([x for _, x in points], [g.bpb for g, _ in points], more)
    axes.step(*zip(*line, strict=True), where="post", color=GREY, linestyle=":", linewidth=1)
    for g, x in points:
        filled = not s.look.markers[g.precision].endswith("-open")
        axes.errorbar(
            [x],
            [g.bpb],
            yerr=s.half(g),
            color=s.look.colours[g.variant],
            marker=MARKERS[s.look.markers[g.precision]],
            markerfacecolor=None if filled else "none",
            linestyle="none",
            markersize=6,
            capsize=2,
            elinewidth=0.8,
            label=g.label,
        )
    axes.set(xlabel=title, ylabel="bits per byte, held-out")
    axes.xaxis.set_major_formatter(engineering())
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _gap(s: Study) -> Any:
    """Bars as on the page: hatched where not resolved."""
    groups = [g for g in s.groups if g.key in s.gaps and isfinite(s.gaps[g.key].value)]
    if not groups:
        return None
    figure, axes = new_axes(5.2, 0.9 + 0.3 * len(groups))
    for y, g in enumerate(groups):
        d, colour = s.gaps[g.key], s.look.colours[g.variant]
        axes.barh(
            y,
            d.value,
            xerr=d.half,
            height=0.62,
            facecolor=colour if d.resolved else "white",
            edgecolor=colour,
            hatch=None if d.resolved else "////",
            error_kw={"elinewidth": 0.8, "capsize": 2},
        )
    judged = [s.gaps[g.key] for g in groups]
    words = ["" if d.resolved else f" ({d.word})" for d in judged]
    names = [f"{g.label}{word}" for g, word in zip(groups, words, strict=True)]
    axes.set_yticks(range(len(groups)), names)
    axes.invert_yaxis()
    axes.axvline(0, color="#444", linewidth=0.8)
    axes.set(xlabel=f"bits per byte above {s.reference}")
    axes.grid(axis="y", visible=False)
    return figure


def _load(s: Study) -> Any:
    """Layer by expert, a panel per MoE group; 1 is the even share."""
    from matplotlib.figure import Figure

    groups = s.moe_groups()
    if not groups:
        return None
    rows = max(len(g.first.load) for g in groups)
    figure = Figure(figsize=(5.2, len(groups) * (0.75 + 0.2 * rows)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    image: Any = None
    for axes, g in zip(panels, groups, strict=True):
        width = max(len(x.experts) for x in g.first.load)
        shares = [_even_shares(x.counts, width) for x in g.first.load]
        image = axes.imshow(shares, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
        axes.set_title(g.label, fontsize=8, loc="left")
        axes.set_yticks(range(len(shares)), [f"layer {x.layer}" for x in g.first.load], fontsize=7)
        axes.set_xticks(range(width))
        axes.axvline(g.first.load[0].n_ffn_experts - 0.5, color="#222", linewidth=1)
        axes.grid(visible=False)
    panels[-1].set_xlabel("expert (right of the line: zero-computation)")
    figure.colorbar(image, ax=list(panels), label="times the even share", shrink=0.7)
    return figure


def _even_shares(counts: Sequence[float], width: int) -> list[float]:
    mean = sum(counts) / len(counts) or 1.0
    return [c / mean for c in counts] + [float("nan")] * (width - len(counts))


def engineering() -> Any:
    """Ticks as 1k, 1M."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")
