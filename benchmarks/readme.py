"""README's tables, each between two marks that name the script which writes it."""

from pathlib import Path

from recipes import record

README = Path(__file__).resolve().parents[1] / "README.md"


def put(script: str, block: str) -> None:
    """Write README with that table in its place."""
    record.write_text(README, with_block(README.read_text(), script, block))


def with_block(text: str, script: str, block: str) -> str:
    """A README's text with that table between the script's marks.

    Raises:
        ValueError: where the marks are not there.
    """
    begin, end = f"<!-- benchmarks/{script}.py writes this -->", f"<!-- end of {script}.py -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"README has no {begin} with an {end} after it")
    return f"{before}{begin}\n\n{block.strip()}\n\n{end}{after}"
