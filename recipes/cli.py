"""The command `zoo`. Nothing heavy is imported before a command needs it."""

import importlib.util
import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from recipes.claiming.cli import claims
from recipes.environment import prepare
from recipes.study.cli import app as study

PACKAGES = ("layers", "routers", "zoo", "recipes")
EXIT_ERROR = 2  # a known error, in one line on stderr
EXIT_INTERRUPTED = 130
STDERR = 2

app = typer.Typer(
    name="zoo",
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(study, name="study")
app.command()(claims)


@app.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    """Feed-forward and mixture-of-experts variants by name, in any precision, compared fairly."""
    if context.invoked_subcommand is None:
        print(context.get_help())


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="What differs from the file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help='A glob, e.g. "moe*".')] = "*",
    as_json: AsJson = False,
) -> None:
    """Variants, routers and precisions."""
    from recipes import show

    show.catalogue(pattern, as_json)


@app.command()
def describe(name: Annotated[str, typer.Argument()], as_json: AsJson = False) -> None:
    """The card of a variant or router, the policy of a precision, the options of a format."""
    from recipes import show

    show.card(name, as_json)


@app.command()
def cost(name: Annotated[str, typer.Argument()], options: Overrides = None,
         as_json: AsJson = False) -> None:  # fmt: skip
    """What one token costs in a variant: zoo cost moe d_model=512 n_experts=64 precision=nvfp4."""
    from recipes import load, show

    show.cost(name, load.parse(options or []), as_json)


@app.command()
def train(recipe: Annotated[str, typer.Argument(help="A file, or a shipped one's name.")],
          overrides: Overrides = None, as_json: AsJson = False) -> None:  # fmt: skip
    """Train one recipe; out=DIR says where (default runs/RECIPE)."""
    from recipes import load

    said = load.parse(overrides or [])
    out = said.pop("out", None) or f"runs/{Path(recipe).stem}"
    settled = load.load(recipe, said)
    from recipes.train import train as run

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        result = run(settled, str(out))
    if as_json:
        print(json.dumps(result))


@app.command()
def compare(comparison: Annotated[str, typer.Argument(help="A file, or a shipped one's name.")],
            overrides: Overrides = None, as_json: AsJson = False) -> None:  # fmt: skip
    """Train the runs of a comparison that are missing, and write the report."""
    from recipes import compare as comparing
    from recipes import show
    from recipes.comparison import read_comparison
    from recipes.planning import plan

    settled = plan(*read_comparison(comparison, overrides or []))
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        show.plan(settled)
        report = comparing.compare(settled, child_stdout=STDERR if as_json else None)
    if as_json:
        print((settled.out / "results.json").read_text(), end="")
    else:
        show.results(settled.out / "results.json")
        print(f"report: {report}", flush=True)
    comparing.check_failures(settled)


@app.command()
def report(
    dirs: Annotated[list[Path], typer.Argument(help="Runs or comparisons.")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the first.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Figures too (PNG, SVG, PDF).")] = None,
    as_json: AsJson = False,
) -> None:
    """Lay finished runs side by side in one HTML file."""
    from recipes.report.page import write_report
    from recipes.report.runs import read_runs
    from recipes.report.static import write_figures

    results = read_runs(dirs)
    written = [write_report(results, out or dirs[0] / "report.html")]
    if figures:
        written += write_figures(results, figures)
    if as_json:
        print(json.dumps([str(path) for path in written]))
    else:
        for path in written:
            print(f"report: {path}" if path.suffix == ".html" else f"figure: {path}")


@app.command()
def quantize(
    run: Annotated[Path, typer.Argument(help="A finished run's directory.")],
    options: Annotated[list[str] | None, typer.Argument(
        metavar="KEY=VALUE...", help="method=rtn|llm_fp4|zeroquant_fp format=NAME out=DIR ...",
    )] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Quantise a finished run's weights and inputs into a directory of its own."""
    from recipes import load
    from recipes import quantize as quantizing

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        result = quantizing.quantize_run(run, **load.parse(options or []))
    print(json.dumps(result)) if as_json else quantizing.show(result)


@app.command()
def convert(
    run: Annotated[Path, typer.Argument(help="A finished dense run's directory.")],
    options: Annotated[list[str] | None, typer.Argument(
        metavar="KEY=VALUE...",
        help="to=upcycle|granular|drop|factor_llm|spt|versatile|spark out=DIR n_experts=8 ...",
    )] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Convert a finished dense run's layers, with a receipt, in its own directory."""
    from recipes import convert as converting
    from recipes import load

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        result = converting.convert_run(run, **load.parse(options or []))
    print(json.dumps(result)) if as_json else converting.show(result)


@app.command()
def extract(
    run: Annotated[Path, typer.Argument(help="A finished nested run's directory.")],
    options: Annotated[list[str] | None, typer.Argument(
        metavar="KEY=VALUE...",
        help="widths=64, widths=[32,64,64], hidden|params|flops=N; heads=N out=DIR",
    )] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Take a submodel out of a finished nested run, as a plain run in its own directory."""
    from recipes import extract as extracting
    from recipes import load

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        result = extracting.extract_run(run, **load.parse(options or []))
    print(json.dumps(result)) if as_json else extracting.show(result)


@app.command()
def pack(
    run: Annotated[Path, typer.Argument(help="A finished run's directory.")],
    options: Annotated[list[str] | None, typer.Argument(
        metavar="KEY=VALUE...", help="precision=NAME out=DIR",
    )] = None,
) -> None:  # fmt: skip
    """Store a finished run's low weights as codes and scales, in a directory of its own."""
    from layers.names import check_choice
    from recipes import load
    from recipes.pack import pack_run

    said = load.parse(options or [])
    for key in said:
        check_choice("option of pack", key, ("precision", "out"))
    print(pack_run(run, **said))


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A finished run's directory.")],
    prompt: Annotated[str, typer.Option(help="What to go on with.")] = "The ",
    tokens: Annotated[int, typer.Option(help="How many to add.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    mapped: Annotated[
        bool, typer.Option("--mapped", help="Leave memory tables on the disk.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Text from a trained model."""
    from recipes.sample import continue_text

    text = continue_text(
        run, prompt, max_new_tokens=tokens, temperature=temperature, top_k=top_k, seed=seed,
        mapped=mapped,
    )  # fmt: skip
    print(json.dumps({"prompt": prompt, "text": text}) if as_json else prompt + text)


def check_installation() -> None:
    """Raise where one of the packages comes from elsewhere than this one.

    Their names are common words, so a folder of the same name on the path can stand in front.
    """
    root = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places: list[Any] = [] if spec is None else list(spec.submodule_search_locations or [])
        places = places or [spec.origin if spec else None]
        place = Path(places[0]).resolve() if places[0] else None
        if place is None or place.parent != root:
            raise ValueError(
                f"package {name!r} comes from {place}, not from {root / name}: rename that folder, "
                "leave the directory that it is in, or take that off PYTHONPATH"
            )


def main() -> None:
    """Entry point: a known error is one line on stderr and exit status 2, without a traceback."""
    try:
        check_installation()
        prepare()
        status = app(standalone_mode=False)
    except (ValueError, OSError) as error:
        _end(str(error), EXIT_ERROR)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own: a wrong command, option, argument
            raise
        _end(error.format_message(), EXIT_ERROR)  # pyright: ignore[reportAttributeAccessIssue]
    if status == EXIT_INTERRUPTED:
        _end("stopped; the same command goes on from the last checkpoint", EXIT_INTERRUPTED)
    sys.exit(status or 0)


def _end(message: str, status: int) -> NoReturn:
    print(f"zoo: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
