"""Numbers as a reader wants them, and HTML in which every text is escaped."""

import html
from collections.abc import Sequence
from math import floor, isfinite, log10

DASH = "–"
MINUS = "\u2212"
_UNPRINTABLE = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n\r"}  # ␀, ␁, ...


class Markup(str):
    """HTML that is already safe; every other string is escaped by `el`."""

    __slots__ = ()


Content = str | int | None


def escape(given: object, quote: bool = True) -> str:
    """Text for HTML and for plotly's labels; what no file can hold or no reader see is shown."""
    text = str(given).encode("utf-8", "replace").decode().translate(_UNPRINTABLE)
    return html.escape(text, quote)


def safe(given: object) -> str:
    """Text for a label of plotly, which reads a few tags in there."""
    return escape(given, quote=False)


def el(tag: str, *content: Content, **attributes: object) -> Markup:
    """An element; `class_` is class, `data_value` is data-value, None and False leave one out."""
    parts = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        key = name.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{escape(value)}"')
    return Markup(f"<{' '.join(parts)}>{join(*content)}</{tag}>")


def join(*content: Content) -> Markup:
    """Pieces one after another, escaped unless they are Markup; None is nothing."""
    return Markup(
        "".join(c if isinstance(c, Markup) else escape(c) for c in content if c is not None)
    )


def lead(*content: Content) -> Markup:
    """What a section shows and how to read it."""
    return el("p", *content, class_="lead")


def swatch(colour: str) -> Markup:
    """A dot in the colour of a variant."""
    return el("i", class_="swatch", style=f"--c:{colour}")


def chip(word: str, said: str | None = None) -> Markup:
    """A verdict; said: in these words, which stand in its colour."""
    return el("span", said or word, class_=f"chip {word.replace(' ', '-')}")


def folded(shown: Sequence[Markup], rest: Sequence[Markup], what: str, class_: str) -> Markup:
    """Items in a box, and those that would make the page long in a second one, folded."""
    first = el("div", *shown, class_=class_)
    if not rest:
        return first
    more = el("details", el("summary", what), el("div", *rest, class_=class_))
    return join(first, more)


def si(number: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 1.23 M, 45.6 kB."""
    if not isfinite(number):
        return DASH
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 0.9995 * 10**power:
            return f"{_three(number / 10**power)} {prefix}{unit}"
    digits = _three(number)
    short = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return f"{short} {unit}".rstrip()


def _three(number: float) -> str:
    """Three significant digits, never an exponent."""
    rounded = float(f"{number:.3g}")
    decimals = 2 - floor(log10(abs(rounded))) if rounded else 0
    return f"{rounded:.{min(max(decimals, 0), 9)}f}"


def exact(number: float) -> str:
    """Every digit, in groups of three."""
    return f"{number:,.0f}".replace(",", "\u202f")


def seconds(s: float) -> str:
    """A duration: 41.2 s, 3 min 20 s, 2 h 05 min."""
    if not isfinite(s):
        return DASH
    if s < 90:
        return f"{s:.1f} s"
    if s < 5400:
        return f"{int(s // 60)} min {int(s % 60):02d} s"
    return f"{int(s // 3600)} h {int(s % 3600 // 60):02d} min"


def bpb(number: float, digits: int) -> str:
    """Bits per byte; a run that diverged has none."""
    return f"{number:.{digits}f}" if isfinite(number) else "diverged"


def signed(number: float, digits: int) -> str:
    """With its sign, a true minus, and no sign on a zero."""
    if not isfinite(number):
        return DASH
    text = f"{abs(number):.{digits}f}"
    if not float(text):
        return text
    return f"{'+' if number > 0 else MINUS}{text}"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{digits}f}\u00a0%" if isfinite(share) else DASH


def anchor(text: str) -> str:
    """An id for an element, from any text."""
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())
    return kept.strip("-") or "x"
