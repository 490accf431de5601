"""How variants and matchings are named on a study's page."""

from recipes.report.method import BUDGETS
from recipes.report.text import Markup, el, join, swatch
from recipes.study.report.derive import Derived


def variant_name(d: Derived, variant: str) -> Markup:
    """A variant with its colour."""
    return join(swatch(d.look.colours[variant]), el("b", variant))


def legend(d: Derived, variants: tuple[str, ...]) -> Markup:
    """Variants by colour; a click hides one in every plot of the page."""
    buttons = (
        el("button", swatch(d.look.colours[v]), v, type="button", data_variant=v,
           aria_pressed="true")
        for v in variants
    )  # fmt: skip
    return el("div", *buttons, class_="legend")


def held(hold: str) -> str:
    """A matching in words."""
    return f"equal {BUDGETS[hold][0]}"
