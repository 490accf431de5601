"""The command `zoo`, as a user or a program meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from recipes import cli

ROOT = Path(__file__).resolve().parents[1]


def run(capsys, monkeypatch, *words):
    """Exit status, stdout, stderr of one command, in this process."""
    monkeypatch.setattr(sys, "argv", ["zoo", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code, out, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lst"], "No such command 'lst'"),
        (["list", "--jsn"], "No such option: --jsn"),
        (["list", "xyz*"], "unknown variant or router 'xyz*'"),
        (["describe"], "Missing argument"),
        (["describe", "moo"], "unknown FFN variant or router 'moo'. Did you mean 'moe'?"),
        (["cost", "moe", "n_expert=8"], "'n_expert'. Did you mean 'n_experts'?"),
        (["cost", "moe", "n_experts=many"], "n_experts must be int, got 'many'"),
        (["cost", "moe", "top_k=9", "n_experts=8"], "top_k must be at most n_experts=8, got 9"),
        (["cost", "moe", "precision=fp5"], "unknown precision 'fp5'"),
        (["cost", "moe", "n_experts"], "expected key=value, got 'n_experts'"),
        (["train", "debgu"], "Did you mean 'debug'?"),
        (["train", "debug", "trainer.max_stepss=1"], "Did you mean 'trainer.max_steps'?"),
        (["train", "debug", "trainer.max_steps=x"], "trainer.max_steps must be int, got 'x'"),
        (["train", "debug", "out=/dev/null"], "/dev/null"),
        (["compare", "quik"], "Did you mean 'quick'?"),
        (["compare", "quick", "hold=flop"], "hold must be one of active_flops"),
        (["compare", "quick", "seed=3"], "say seeds=[0,1] instead"),
        (["compare", "quick", "tolerance=0.00001", "multiple_of=32"], "no width comes within"),
        (["report", "/nowhere"], "no result.json or results.json"),
        (["generate", "/nowhere"], "is it a finished run?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_known_error_is_one_line_and_status_2(words, message, capsys, monkeypatch):
    status, out, err = run(capsys, monkeypatch, *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("zoo: ")
    assert "Traceback" not in out + err


def test_an_unexpected_error_keeps_its_traceback(capsys, monkeypatch):
    monkeypatch.setattr("zoo.describe", lambda name: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["zoo", "describe", "moe"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_list(capsys, monkeypatch):
    status, out, _ = run(capsys, monkeypatch, "list", "--json")
    told = json.loads(out)
    assert status == 0
    assert [entry["name"] for entry in told["ffns"]] == zoo.names()
    assert told["precisions"] == zoo.precisions()
    _, out, _ = run(capsys, monkeypatch, "list", "moe*")
    assert "moe_plus_plus" in out
    assert "swiglu" not in out


def test_describe_and_cost(capsys, monkeypatch):
    _, out, _ = run(capsys, monkeypatch, "describe", "moe++", "--json")
    assert json.loads(out)["name"] == "moe_plus_plus"
    _, out, _ = run(capsys, monkeypatch, "cost", "moe", "d_model=64", "n_experts=4", "--json")
    told = json.loads(out)
    expected = zoo.cost("moe", d_model=64, n_experts=4)
    assert (told["params"], told["flops_per_token"]) == (expected.params, expected.flops)
    _, out, _ = run(capsys, monkeypatch, "cost", "moe", "d_model=64", "n_experts=4")
    assert f"{expected.params:,}" in out


def test_train_report_generate(capsys, monkeypatch, tmp_path):
    """The main path, each command on what the last one left."""

    def zoo_(*words):
        return run(capsys, monkeypatch, *words)

    a, page = f"{tmp_path}/a", f"{tmp_path}/r.html"
    train = ["train", "debug", "trainer.max_steps=2", "trainer.threads=1", f"out={a}"]
    train += ["data.corpus=tinyshakespeare"]
    status, out, err = zoo_(*train, "--json")
    assert (status, json.loads(out)["steps"]) == (0, 2)  # nothing but JSON
    assert "step 2/2" in err
    status, out, _ = zoo_(*train)
    assert (status, "already finished" in out) == (0, True)
    assert zoo_("report", a, "--out", page)[:2] == (0, f"report: {page}\n")
    assert Path(page).is_file()
    texts = [json.loads(zoo_("generate", a, "--json", "--tokens", "9")[1]) for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0]["prompt"] == "The "
    status, _, err = zoo_("generate", a, "--tokens", "9999")
    assert (status, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "module", ["", "raise RuntimeError('imported')"], ids=["namespace", "package"]
)
def test_a_foreign_folder_in_front_is_named(module, tmp_path):
    (tmp_path / "layers").mkdir()
    if module:
        (tmp_path / "layers" / "__init__.py").write_text(module)
    code = "import sys; sys.argv = ['zoo', 'list']; from recipes.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(tmp_path)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    shadowed = done.returncode == 2
    assert shadowed, done.stderr
    assert str(tmp_path / "layers") in done.stderr
    assert str(ROOT / "layers") in done.stderr
    assert done.stderr.count("\n") == 1


def test_light_commands_import_no_lightning(tmp_path):
    code = (
        "import sys; sys.argv = ['zoo', 'list', '--json']; from recipes.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'lightning', 'torchmetrics', 'plotly', 'scipy', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
