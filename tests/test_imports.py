"""Imports run one way, every file is in a table, and the names resolve to this repository."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.catalogue import FFNS, ROUTERS

ROOT = Path(__file__).parent.parent
ORDER = ["layers", "routers", "zoo", "recipes"]
PARTS = {  # files that hold parts or interfaces, not a row of the catalogue
    "layers": {
        "base",
        "batched",
        "capacity",
        "decode",
        "dispatch",
        "experts",
        "fixed_plan",
        "grouped",
        "linear",
        "loop_predictor",
        "matmul",
        "names",
        "native",
        "norm",
        "parallel",
        "prefix",
        "products",
        "quantiles",
        "replay",
        "row_dots",
        "scheduled",
        "selection",
        "sparse_rows",
        "spark_config",
        "spark_decode",
        "spark_native",
        "statistical_topk",
    },
    "routers": {"balance", "conventions", "groups", "importance", "scores", "state"},
}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    later = set(ORDER[ORDER.index(package) + 1 :])
    for path in files:
        assert not imported(path) & later, f"{path} imports against the one direction"
        if package != "recipes":
            assert not imported(path) & {"lightning", "torchmetrics"}, f"{path} imports lightning"


@pytest.mark.parametrize(("package", "rows"), [("layers", FFNS), ("routers", ROUTERS)])
def test_every_file_is_in_a_table(package, rows):
    files = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    listed = {entry.module.__module__.split(".")[1] for entry in rows}
    assert listed
    assert files - PARTS[package] == listed


@pytest.mark.parametrize("package", ORDER)
def test_each_import_resolves_to_this_repository(package):
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert Path(spec.origin or "").parent == ROOT / package


def test_importing_the_zoo_does_not_import_lightning():
    heavy = {"lightning", "pytorch_lightning", "transformers", "torch._dynamo"}
    code = f"import sys, zoo; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
