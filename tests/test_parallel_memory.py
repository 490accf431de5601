"""Memory tables cut over two processes (gloo, CPU) beside one process."""

import json
import shutil
from typing import Any

import memory_ranks
import pytest
from memory_ranks import KINDS, SIZES
from parallel_toys import MODEL, brief, ranks
from recipe_toys import refused
from safetensors.torch import load_file
from torch.testing import assert_close

from recipes.load import load
from recipes.train import train

STEPS = 8
PEER = {"name": "peer", **SIZES}
CASES = [f"{kind} {cut}" for kind in KINDS for cut in ("rows", "columns")]


def recipe_of(ffn: Any = PEER, *, precision: Any = "fp32", **trainer: Any) -> dict[str, Any]:
    return {
        "precision": precision,
        "model": MODEL | {"ffn": ffn},
        "data": {
            "corpus": "tinyshakespeare", "seq_len": 32, "batch_size": 4,
            "eval_bytes_per_domain": 512, "final_bytes_per_domain": 512,
        },
        "optim": {"lr": 1e-2},
        "trainer": {
            "max_steps": STEPS, "eval_every_steps": 4, "checkpoint_every_steps": 5,
            "log_every_steps": 2, "threads": 1,
        } | trainer,
    }  # fmt: skip


def cut(how: str) -> dict[str, Any]:
    return {"devices": 2, "expert_parallel": 2, "table_parallel": how}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with all runs."""
    root = tmp_path_factory.mktemp("memory")
    with brief():
        train(load(recipe_of()), root / "one")
    checks = ("tables", "integers", "precisions", "nothing", "compact")
    ranks(root, [
        *((name, None, None, None) for name in checks),
        ("rows", recipe_of(**cut("rows")), "rows", None),
        ("cut columns", recipe_of(**cut("columns")), "columns", 6),
    ], script=memory_ranks.__file__)  # fmt: skip
    with brief():
        train(load(recipe_of()), root / "columns")  # and the rest on one process
    yield root
    shutil.rmtree(root)


@pytest.mark.slow
def test_both_axes_at_once(tmp_path):
    """Four processes: two share each part of a table, two its layer's tables."""
    ranks(tmp_path, [("tables", None, None, None)], world=4, script=memory_ranks.__file__)
    found = told(tmp_path, "tables")
    assert sorted(found) == sorted(CASES)
    assert [case for case in found if found[case]["far"]] == []


def told(root, name):
    return json.loads((root / f"{name}.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case, runs):
    found = told(runs, "tables")[case]
    one, many = found["losses"]
    assert many == pytest.approx(one, rel=1e-6)
    assert found["far"] == []
    if case in ("pkm columns", "ultramem columns"):  # no sum in another order before the loss
        assert many == one
        assert "blocks.1.ffn.memory.pool.values.weight" not in found["unequal"]


def test_where_order_is_nothing_all_is_equal_to_the_bit(runs):
    """Tables of values and of neurons, one pool for two layers, a rank without any hit."""
    found = told(runs, "integers")
    assert len(found) == 8
    assert found == {case: [] for case in found}


@pytest.mark.parametrize("case", ["bf16 rows", "bf16 columns", "mxfp4 rows"])
def test_in_low_precision_the_numbers_are_near(case, runs):
    one, many, error = told(runs, "precisions")[case]
    assert many == pytest.approx(one, rel=5e-3)
    assert error < 0.1  # fp4 puts a small difference on another point of its grid


def test_no_token_is_no_trouble(runs):
    assert told(runs, "nothing") == {"rows": [0, 8], "columns": [0, 8]}


def test_compact_gradients_are_refused(runs):
    assert "takes no compact gradients" in told(runs, "compact")["said"]


@pytest.mark.parametrize("run", ["rows", "columns"])
def test_two_processes_end_where_one_does(run, runs):
    """`columns` went on from step 5 on one process."""
    a, b = (json.loads((runs / name / "result.json").read_text()) for name in ("one", run))
    assert (a["steps"], a["tokens"]) == (b["steps"], b["tokens"])
    assert len(a["curve"]) == len(b["curve"]) == STEPS // 2
    for before, after in zip(a["curve"], b["curve"], strict=True):
        assert after["train_bpb"] == pytest.approx(before["train_bpb"], rel=1e-5)
    assert b["final"]["bpb"] == pytest.approx(a["final"]["bpb"], rel=1e-5)
    weights = [load_file(runs / name / "weights.safetensors") for name in ("one", run)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert_close(weights[1][name], weight, rtol=1e-3, atol=2e-4, msg=name)


ULTRA = KINDS["ultramem"]


@pytest.mark.parametrize(
    ("ffn", "said", "message"),
    [
        (PEER, {"devices": 2, "table_parallel": "rows"}, "set that to how many, got 1"),
        (PEER, {"table_parallel": "rows"}, "set that to how many, got 1"),
        (PEER | {"n_keys": 5}, cut("rows"), "need n_rows to be a multiple of 2, got 25"),
        (ULTRA | {"d_value": 6}, cut("columns"), "d_value / 2 cores to be a multiple of 2, got 3"),
        ("mlp", cut("rows"), "table_parallel='rows' needs a memory layer"),
        (PEER, cut("rows") | {"table_parallel": "none"}, "or cut memory tables with"),
        (PEER, cut("rows") | {"strategy": "ddp"}, "needs trainer.strategy fsdp2 or auto"),
        (PEER, cut("depth"), "trainer.table_parallel"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_door(ffn, said, message, tmp_path):
    with refused(message):
        train(load(recipe_of(ffn, **said)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


RANDOM = {"default": {"all": {"format": "nvfp4", "rounding": "stochastic"}}}
DELAYED = {"default": {"all": {"format": "fp8_e4m3", "scope": "delayed"}}}


@pytest.mark.parametrize(
    ("precision", "how", "message"),
    [
        (RANDOM, "rows", "rounds at random"),
        (DELAYED, "rows", "keeps scales between steps"),
        ("mxfp4", "columns", "has blocks of 32 numbers under a scale, which parts of 8 columns"),
        ({"default": "nvfp4"}, "columns", "has a scale of scope 'tensor', which spans the columns"),
    ],
)
def test_a_precision_that_parts_would_change_is_refused(precision, how, message):
    with refused(message):
        load(recipe_of(precision=precision, **cut(how)))


@pytest.mark.parametrize(
    ("precision", "how"),
    [("bf16", "rows"), ("bf16", "columns"), ("mxfp4", "rows"), ({"default": "nvfp4"}, "rows")],
)
def test_a_precision_that_parts_keep_is_taken(precision, how):
    load(recipe_of(precision=precision, **cut(how)))
