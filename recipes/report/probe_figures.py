"""The figures of the probes: leaf by operand, error over steps, exponents of scales."""

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from layers.precision.operands import OPERANDS
from layers.precision.spec import HIGH_FORMATS
from recipes.report import text
from recipes.report.figures import Figure
from recipes.report.look import COLOURS
from recipes.report.probe_records import ProbedOperand, ProbedStep
from recipes.report.study import Group

MAX_STEPS = 5  # of a run that a heat map shows, the first and the last among them
MAX_LABELLED = 48  # leaves; beyond that cells are thinner and carry no numbers
# a colour for each matmul, a dash for each kind of tensor
GEMM_COLOURS = {"fprop": COLOURS[0], "dgrad": COLOURS[1], "wgrad": COLOURS[2]}
TENSOR_DASHES = {"x": "solid", "w": "dash", "dy": "dot"}
Over = Callable[[Sequence[float]], float]
Read = Callable[[ProbedOperand], float | None]
# label: how it is read, which end is the worse, axis title, format of its ticks
MEASURES: dict[str, tuple[Read, Over, str, str]] = {
    "signal to noise": (lambda r: r.snr_db, min, "signal to noise, dB", "~g"),
    "underflow": (lambda r: r.underflowed, max, "non-zero values that became zero", ".1~%"),
    "clipping": (lambda r: r.clipped, max, "values beyond the largest one", ".2~%"),
}


def words_of(operand: str) -> str:
    """An operand for a reader: "wgrad dy"."""
    return operand.replace("_", " ")


def look_of_operand(operand: str) -> tuple[str, str]:
    """Colour and dash of an operand's lines."""
    gemm, tensor = operand.split("_")
    return GEMM_COLOURS[gemm], TENSOR_DASHES[tensor]


def _probed(group: Group) -> list[ProbedStep]:
    return [step for step in group.first.probes if step.operands]


# Heat map


def heat_maps(groups: Sequence[Group]) -> Figure:
    """Leaf by operand, for a run and a step; the last step first."""
    span = _span(r for g in groups for s in _probed(g) for r in s.operands)
    views = [
        {"run": g.label, "step": f"{step.step:,}", **_heat(step, span)}
        for g in groups
        for step in reversed(_spread(_probed(g)))
    ]
    return {"views": views, "selects": ["run", "step"]}


def _spread(steps: Sequence[ProbedStep]) -> list[ProbedStep]:
    """At most MAX_STEPS, evenly taken, the first and the last among them."""
    if len(steps) <= MAX_STEPS:
        return list(steps)
    last = len(steps) - 1
    return [steps[round(i * last / (MAX_STEPS - 1))] for i in range(MAX_STEPS)]


def _span(rows: Iterable[ProbedOperand]) -> tuple[float, float]:
    """Where the colours begin and end: what low formats reach, but for the outermost 2%."""
    low = sorted(r.snr_db for r in rows if r.snr_db is not None and r.format not in HIGH_FORMATS)
    out = len(low) // 50
    ends = (low[out], low[-1 - out]) if low else (0.0, 0.0)
    return ends if ends[0] < ends[1] else (0.0, 60.0)


def _heat(step: ProbedStep, span: tuple[float, float]) -> Figure:
    found = {(r.leaf, r.operand): r for r in step.operands}
    leaves = list(dict.fromkeys(r.leaf for r in step.operands))
    present = [o for o in OPERANDS if any((leaf, o) in found for leaf in leaves)]
    cells = [[found.get((leaf, o)) for o in present] for leaf in leaves]
    labelled = len(leaves) <= MAX_LABELLED
    trace = {
        "type": "heatmap",
        "z": [[_rounded(c.snr_db if c else None) for c in row] for row in cells],
        "x": [words_of(o) for o in present],
        "y": [text.safe(leaf) for leaf in leaves],
        "customdata": [[_told(c) for c in row] for row in cells],
        "zmin": span[0],
        "zmax": span[1],
        "xgap": 2,
        "ygap": 2 if labelled else 0,
        "reversescale": True,  # little signal is warm
        "colorbar": {"thickness": 10, "outlinewidth": 0, "ticksuffix": " dB"},
        "hoverongaps": False,
        "hovertemplate": "<b>%{y}, %{x}</b><br>%{customdata[0]}: %{z:.2f} dB"
        "<br>clipped %{customdata[1]}<br>became zero %{customdata[2]}<extra></extra>",
        "meta": {"scale": "diverging"},
    }
    numbers = {"texttemplate": "%{z:.1f}", "textfont": {"size": 11}} if labelled else {}
    height = 60 + max((24 if labelled else 11) * len(leaves), 72)
    return {
        "data": [trace | numbers],
        "layout": {
            "height": height,
            "xaxis": {"side": "top", "showgrid": False, "type": "category"},
            "yaxis": {"autorange": "reversed", "showgrid": False, "type": "category"},
        },
    }


def _told(cell: ProbedOperand | None) -> list[str]:
    if cell is None:
        return ["", "", ""]
    shares = (text.percent(share, 2) for share in (cell.clipped, cell.underflowed))
    return [text.safe(cell.format), *shares]


def _rounded(number: float | None, digits: int = 2) -> float | None:
    return None if number is None else round(number, digits)


# Lines over steps


def lines(groups: Sequence[Group]) -> Figure:
    """Median and worst over the leaves of each operand, for a run and a measure."""
    views = [
        {"run": g.label, "measure": measure, **_lines(_probed(g), *MEASURES[measure])}
        for g in groups
        for measure in MEASURES
    ]
    return {"views": views, "selects": ["run", "measure"]}


def _lines(steps: Sequence[ProbedStep], read: Read, worst: Over, title: str, ticks: str) -> Figure:
    traces = []
    for operand in OPERANDS:
        rows = [
            (step.step, [v for r in step.operands if r.operand == operand
                         and (v := read(r)) is not None])
            for step in steps
        ]  # fmt: skip
        rows = [(step, values) for step, values in rows if values]
        for of, thin in ((_median, False), (worst, True)) if rows else ():
            traces.append(_line(operand, rows, of, ticks, thin))
    return {
        "data": traces,
        "layout": {
            "height": 340,
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"title": {"text": title}, "tickformat": ticks},
            "hovermode": "closest",
        },
    }


def _median(values: Sequence[float]) -> float:
    return median(values)


def _line(
    operand: str, rows: list[tuple[int, list[float]]], of: Over, ticks: str,
    thin: bool,
) -> Figure:  # fmt: skip
    colour, dash = look_of_operand(operand)
    which = "worst leaf" if thin else "median"
    return {
        "type": "scatter",
        "mode": "lines" if thin else "lines+markers",
        "name": f"{words_of(operand)}, {which}",
        "x": [step for step, _ in rows],
        "y": [_rounded(of(values), 6) for _, values in rows],
        "opacity": 0.45 if thin else 1,
        "line": {
            "color": colour,
            "dash": dash,
            "width": 1 if thin else 2,
        },
        "marker": {"size": 4},
        "hovertemplate": f"<b>{words_of(operand)}</b>, {which}<br>step %{{x:,}}"
        f"<br>%{{y:{'.3%' if '%' in ticks else '.2f'}}}<extra></extra>",
    }


# Scales


def scales(groups: Sequence[Group]) -> Figure:
    """How the values of a run's last probed step spread over the exponents of their scales."""
    found = [(g, _histograms(_probed(g)[-1])) for g in groups]
    views = [{"run": g.label, **_histogram(counts)} for g, counts in found]
    return {"views": views, "selects": ["run"]}


def _histograms(step: ProbedStep) -> dict[str, dict[int, int]]:
    """{operand: {exponent: values}}, over all leaves."""
    sums: dict[str, dict[int, int]] = {}
    for row in step.operands:
        for exponent, count in row.scales.items():
            of = sums.setdefault(row.operand, {})
            of[int(exponent)] = of.get(int(exponent), 0) + count
    return sums


def _histogram(counts: dict[str, dict[int, int]]) -> Figure:
    every = [exponent for of in counts.values() for exponent in of]
    low, high = (min(every) - 1, max(every) + 1) if every else (-1, 1)
    traces = []
    for operand in (o for o in OPERANDS if o in counts):
        colour, dash = look_of_operand(operand)
        whole = sum(counts[operand].values())
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": words_of(operand),
                "x": list(range(low, high + 1)),
                "y": [_rounded(counts[operand].get(e, 0) / whole, 6) for e in range(low, high + 1)],
                "line": {
                    "shape": "hvh",
                    "color": colour,
                    "dash": dash,
                    "width": 2,
                },
                "hovertemplate": f"<b>{words_of(operand)}</b><br>2^%{{x}}: %{{y:.1%}}"
                "<extra></extra>",
            }
        )
    return {
        "data": traces,
        "layout": {
            "height": 300,
            "xaxis": {"title": {"text": "exponent of the scale: floor of its log2"}},
            "yaxis": {"title": {"text": "share of the values"}, "tickformat": ".0%"},
            "hovermode": "closest",
        },
    }
