"""The small study: every family of the catalogue at equal FLOPs and at equal parameters.

`python benchmarks/study_small.py` trains what is missing of `zoo study run small` (about an hour
and a half on two cores), publishes it in benchmarks/study_small/ and writes README's table from it;
`--publish` does the last two from what there is.
"""

import argparse
from pathlib import Path

from recipes import record
from recipes.study import plan as planning
from recipes.study import show
from recipes.study.gather import gather
from recipes.study.report.markdown import verdicts
from recipes.study.report.page import parts_of, write_study_report
from recipes.study.run import run_study
from recipes.study.schema import read_study

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE / "study_small"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks/study_small.py writes from here -->", "<!-- to here -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publish", action="store_true", help="train nothing")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of zoo study")
    said = parser.parse_args()
    found = planning.plan(*read_study("small", said.overrides))
    if not said.publish:
        with show.live() as shown:
            run_study(found, show=shown)
    for path in write_study_report(found.out, PUBLISHED / "figures", to=PUBLISHED):
        print(path)
    record.write_text(README, with_table(README.read_text(), table()))


def table() -> str:
    """README's table, from what was published."""
    return verdicts(parts_of(gather(PUBLISHED)).d)


def with_table(text: str, block: str) -> str:
    """README with that table in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{block}{END}{after}"


if __name__ == "__main__":
    main()
