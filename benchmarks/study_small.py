"""The small study: every family of the catalogue at equal FLOPs and at equal parameters.

`python benchmarks/study_small.py` trains what is missing of `zoo study run small` (about an hour
and a half on two cores), publishes it in benchmarks/study_small/ and writes README's table from it;
`--publish` does the last two from what there is.
"""

import argparse
from pathlib import Path

import readme

from recipes.study import plan as planning
from recipes.study import show
from recipes.study.gather import gather
from recipes.study.report.markdown import verdicts
from recipes.study.report.page import parts_of, write_study_report
from recipes.study.run import run_study
from recipes.study.schema import read_study

PUBLISHED = Path(__file__).resolve().parent / "study_small"


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
    readme.put("study_small", table())


def table() -> str:
    """README's, from what was published."""
    return verdicts(parts_of(gather(PUBLISHED)).d)


if __name__ == "__main__":
    main()
