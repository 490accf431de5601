"""Relative mean square errors of every number format, beside those of precision.md section 3.

    python benchmarks/format_errors.py > benchmarks/format_errors.md

E[(x - q)^2] / E[x^2] on numbers from N(0, 1) and from Student's t with 3 degrees of freedom.
"""

import math
from collections.abc import Iterator

import torch
from timing import markdown
from torch import Tensor

from layers.precision import FORMATS, fake_quantize

ROWS, COLS = 1024, 4096
# spec -> (relative error on N(0, 1), dB there, dB on t(3)), None where the page has none
PAGE = {
    ("mxfp4", "floor", "1d"): (0.01320, 18.79, 16.95),
    ("mxfp4", "rceil", "1d"): (0.01334, 18.75, 16.39),
    ("mxfp4", "ceil", "1d"): (0.02079, 16.82, 14.09),
    ("mxfp4", "even", "1d"): (0.01252, 19.03, 17.11),
    ("nvfp4", "max", "1d"): (0.00906, 20.43, 20.87),
    ("nvfp4", "4over6", "1d"): (0.00757, 21.21, 21.22),
    ("nvfp4", "max", "2d"): (0.01240, 19.06, 14.80),
    ("hif4", None, "1d"): (0.00687, 21.63, 20.55),
    ("int4", "max", "1d"): (0.00725, 21.39, 18.95),
    ("mxfp6_e2m3", "floor", "1d"): (0.0008, 30.95, 29.2),
    ("mxfp6_e3m2", "rceil", "1d"): (0.0028, 25.5, None),  # the page does not say which rule
    ("mxfp8_e4m3", "floor", "1d"): (0.00086, 30.65, 29.61),
    ("mxfp8_e4m3", "rceil", "1d"): (0.00071, 31.51, 31.62),
    ("fp8_e4m3", "max", "1d"): (0.00070, 31.56, None),
    ("fp8_e5m2", "max", "1d"): (0.00277, 25.57, None),
}
Key = tuple[str, str | None, str]


def numbers(kind: str) -> Tensor:
    """[ROWS, COLS] float32: Gaussian, or a Gaussian over the root of a mean of three squares."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLS, generator=g)
    if kind == "t":
        squares = torch.randn(3, ROWS, COLS, generator=g).square().mean(0)
        x = x / squares.sqrt()
    return x


def every() -> Iterator[Key]:
    """Each format with its rules and tiles, those of the page first."""
    yield from PAGE
    for row in FORMATS:
        for rule in row.scale_rules or (None,):
            for tile in row.tiles:
                key = (row.name, rule, tile)
                if row.dtype is None and key not in PAGE and rule != "eden":
                    yield key


def errors(kind: str) -> dict[Key, float]:
    """Relative mean square errors of every format on the same numbers."""
    x = numbers(kind)
    power = x.double().square().mean().item()
    found: dict[Key, float] = {}
    for name, rule, tile in every():
        q = fake_quantize(x, name, scale_rule=rule, tile=tile)
        found[name, rule, tile] = (q - x).double().square().mean().item() / power
    return found


def decibels(error: float) -> float:
    """Signal over noise."""
    return -10 * math.log10(error)


def deviation(ours: float, page: float | None, relative: bool) -> str:
    if page is None:
        return ""
    return f"{100 * (ours / page - 1):+.1f}%" if relative else f"{ours - page:+.2f}"


def main() -> None:
    """Print the table."""
    gauss, student = errors("gauss"), errors("t")
    print(
        f"# Errors of number formats\n\nE[(x - q)^2] / E[x^2], {ROWS * COLS / 1e6:.1f}M numbers "
        f"from N(0, 1) and as many from t(3), in tensors of {ROWS} x {COLS}; blocks along rows, "
        "the first scope of each format.\nThe page's figures carry the digits shown there; its "
        "t(3) numbers are another sample, whose few largest decide.\n"
    )
    rows = []
    for key, ours in gauss.items():
        name, rule, tile = key
        page, _, page_t = PAGE.get(key, (None, None, None))
        ours_t = decibels(student[key])
        rows.append(
            [
                *(name, rule or "", tile, f"{ours:.3g}", "" if page is None else f"{page:.3g}"),
                *(deviation(ours, page, True), f"{decibels(ours):.2f}", f"{ours_t:.2f}"),
                *("" if page_t is None else f"{page_t}", deviation(ours_t, page_t, False)),
            ]
        )
    header = ["format", "rule", "tile", "N(0,1)", "page", "off by", "dB", "t(3), dB", "page"]
    print(markdown([*header, "off by, dB"], rows))
    hif4 = gauss["hif4", None, "1d"]
    ratios = [gauss[n, r, "1d"] / hif4 for n, r in (("nvfp4", "max"), ("mxfp4", "floor"))]
    print(f"\nHiF4 : NVFP4 : MXFP4 = 1 : {ratios[0]:.2f} : {ratios[1]:.2f} (page: 1 : 1.3 : 1.9)")


if __name__ == "__main__":
    main()
