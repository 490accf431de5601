"""The papers' claims: `zoo claims` (about an hour on two cores), and README's table of verdicts.

Writes benchmarks/claims.md and claims.json; `--publish` trains nothing.
"""

import argparse
import json
import shutil
from pathlib import Path

import readme

from recipes.claiming.go import chosen, try_claims
from recipes.claiming.page import summary

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publish", action="store_true", help="train nothing")
    parser.add_argument("said", nargs="*", help="as of zoo claims")
    said = parser.parse_args()
    trials, out = chosen(said.said)
    try_claims(trials, out, train=not said.publish)
    for name in ("claims.md", "claims.json"):
        shutil.copyfile(out / name, HERE / name)
    readme.put("claims", table())


def table() -> str:
    """README's, from what was published."""
    return summary(json.loads((HERE / "claims.json").read_text())["claims"], "benchmarks/claims.md")


if __name__ == "__main__":
    main()
