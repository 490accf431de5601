"""One HTML file that holds all it needs: text, data, style, script and plotly."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from recipes.report.export import results_csv, verdicts_csv
from recipes.report.headline import headline
from recipes.report.records import read_results
from recipes.report.sections import Section, sections
from recipes.report.study import Study, study
from recipes.report.text import Markup, el, join

SUFFIXES = (".html", ".htm")


def write_report(results: dict[str, Any] | Path, out: Path) -> Path:
    """Write the report of a comparison, or of runs laid side by side.

    The file needs no network and asks for none: its content policy forbids every request.

    Args:
        results: a `results.json`, its directory or its content; or what `read_runs` gave.
        out: the file to write, or a directory (no .html ending), which gets `report.html`.

    Returns:
        The path of the file.

    Raises:
        ValueError: one line, where the results are malformed.
    """
    return write_page(render(results), out)


def write_page(html: str, out: Path) -> Path:
    """Write a page to a file, or as `report.html` into a directory (no .html ending)."""
    path = out if out.suffix.lower() in SUFFIXES else out / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")  # a killed run leaves no half report
    part.write_text(html, encoding="utf-8")
    part.replace(path)
    return path


def render(results: dict[str, Any] | Path) -> str:
    """The report as text."""
    read = read_results(results)
    data = study(read)
    return compose(
        title=read.comparison.name if read.comparison else "Runs side by side",
        kicker="Comparison" if read.comparison else "Report",
        headline=headline(data),
        sections=sections(data),
        downloads=_downloads(results, data),
    )


def compose(
    *, title: str, kicker: str, headline: Markup, sections: Sequence[Section], downloads: Markup
) -> str:
    """A page of its parts, with style, script and plotly inside."""
    scripts = {"plotly": get_plotlyjs(), "script": _package_text("page.js")}
    policy = " ".join(_hash(script) for script in scripts.values())
    body = [
        el("section", el("h2", el("a", part.title, href=f"#{part.id}")), part.body, id=part.id)
        for part in sections
    ]
    links = [el("li", el("a", part.title, href=f"#{part.id}")) for part in sections]
    return Template(_package_text("page.html")).substitute(
        title=el("title", f"{title} · report"),
        heading=join(title),
        kicker=kicker,
        script_policy=policy,
        style=_package_text("page.css"),
        contents=join(*links),
        headline=headline,
        sections=join(*body),
        downloads=downloads,
        **scripts,
    )


def _downloads(results: dict[str, Any] | Path, data: Study) -> Markup:
    """The numbers of the page as files, inside the page."""
    return join(
        download("results.csv", "one row per run", results_csv(results)),
        download("verdicts.csv", "every difference with its interval", verdicts_csv(data)),
    )


def download(name: str, note: str, content: str) -> Markup:
    """A file inside the page, as an entry of its list."""
    encoded = base64.b64encode(content.encode("utf-8", "replace")).decode()
    link = el("a", name, href=f"data:text/csv;base64,{encoded}", download=name)
    return el("li", link, " ", el("span", note, class_="quiet"))


def _hash(script: str) -> str:
    """What the content policy allows to run: this text and no other."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _package_text(name: str) -> str:
    return files("recipes.report").joinpath(name).read_text(encoding="utf-8")
