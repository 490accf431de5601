"""One colour per variant, one dash and marker per precision, the same in every figure.

The colours are of middle lightness, so that they can be read on white and on near-black.
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BASELINE_COLOUR = "#7d8896"  # a quiet grey: what the others are measured against
COLOURS = (
    "#3d7fe0",  # blue
    "#e0762b",  # orange
    "#2b9f70",  # green
    "#9a62d8",  # violet
    "#d8446c",  # crimson
    "#139fb5",  # cyan
    "#bf9410",  # gold
    "#d263b3",  # pink
    "#7c9b2a",  # olive
    "#a5694a",  # brown
    "#5a61d9",  # indigo
)
ROLE_COLOURS = {
    "attention": "#6d8fb3",
    "ffn": "#c98f5a",
    "expert": "#d9ab6c",
    "router": "#b5607c",
    "embedding": "#8f9a8b",
    "head": "#6f9f93",
    "norm": "#b0b4ba",
    "constant": "#9d86b8",
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
GLYPHS = "●◇■△✚☆"  # the markers, for a legend
MARKERS = ("circle", "diamond-open", "square", "triangle-up-open", "cross", "star-open")


@dataclass(frozen=True)
class Look:
    """Looks by name."""

    colours: dict[str, str]  # variant: #rrggbb
    dashes: dict[str, str]  # precision: plotly dash
    markers: dict[str, str]  # precision: plotly symbol
    glyphs: dict[str, str]  # precision: the marker as a character
    tones: dict[tuple[str, str], str]  # variant, precision: #rrggbb; see `tones_of`


def look_of(variants: Sequence[str], precisions: Sequence[str], baseline: str) -> Look:
    """A look for every name, in the order given; the baseline variant is grey."""
    others = [v for v in variants if v != baseline]
    colours = {v: colour(i) for i, v in enumerate(others)}
    colours[baseline] = BASELINE_COLOUR
    return Look(
        colours=colours,
        dashes={p: DASHES[i % len(DASHES)] for i, p in enumerate(precisions)},
        markers={p: MARKERS[i % len(MARKERS)] for i, p in enumerate(precisions)},
        glyphs={p: GLYPHS[i % len(GLYPHS)] for i, p in enumerate(precisions)},
        tones=tones_of(colours, precisions),
    )


def tones_of(colours: Mapping[str, str], precisions: Sequence[str]) -> dict[tuple[str, str], str]:
    """A colour for each variant in each precision, where dashes alone would not tell them apart.

    The variant's; or, where there is one variant only, one per precision, the first one grey.
    """
    if len(colours) > 1:
        return {(v, p): c for v, c in colours.items() for p in precisions}
    accents = [BASELINE_COLOUR, *(colour(i) for i in range(len(precisions) - 1))]
    return {(v, p): c for v in colours for p, c in zip(precisions, accents, strict=True)}


def colour(i: int) -> str:
    """The i-th accent; beyond the table hues at the golden angle, which never repeat."""
    if i < len(COLOURS):
        return COLOURS[i]
    hue = (0.08 + 0.381966 * i) % 1
    r, g, b = colorsys.hls_to_rgb(hue, 0.48, 0.36 + 0.1 * (i % 3))
    return f"#{round(255 * r):02x}{round(255 * g):02x}{round(255 * b):02x}"


def role_colour(role: str, i: int) -> str:
    """The colour of a module role; roles that are not in the table take the next accents."""
    return ROLE_COLOURS.get(role) or colour(i)
