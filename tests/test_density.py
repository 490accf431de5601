"""How many neurons tokens ran: counted by hand, written down by a run, drawn by the report."""

from typing import Any

import pytest
import torch
from recipe_toys import evaluate_briefly, tiny_recipe
from report_data import comparison

import zoo
from recipes.batches import Batch
from recipes.density import Density, sparse_layers
from recipes.metrics import evaluate
from recipes.report import text
from recipes.report.density import against_quality, by_layer, ran
from recipes.report.density_records import LayerDensity
from recipes.report.records import Run, read_results
from recipes.report.sections import sections
from recipes.report.strict import read_as
from recipes.report.study import study as study_of
from recipes.train import train

SIZES = {"vocab_size": 32, "d_model": 16, "n_layers": 3, "n_heads": 2, "max_seq_len": 16}
SPARK = {"name": "spark_ffn", "d_ff": 48, "density": 0.2}


def test_counts_by_a_loop_over_tokens():
    """Layers 0 and 2 choose neurons, layer 1 runs all; the last token of every row is padding."""
    every = {"name": "spark_ffn", "d_ff": 48, "selection": "none"}
    model = zoo.build({"model": {**SIZES, "ffn": [SPARK, every, SPARK]}}).eval()
    assert list(sparse_layers(model)) == [0, 2]
    counts = {0: [0, 0], 2: [0, 0]}
    tokens = [0, 0]
    given, hooks = [], []
    for i in range(3):
        ids, mask = torch.randint(0, 32, (2, 9)), torch.ones(2, 8, dtype=torch.bool)
        mask[:, -1] = False
        n_bytes = torch.full((2, 8), 1)
        given.append(Batch(ids[:, :-1], ids[:, 1:], n_bytes=n_bytes, mask=mask, domain=i % 2))
        tokens[i % 2] += 14
    now = 0
    for layer in (0, 2):
        ffn: Any = model.blocks[layer].ffn

        def count(module, args, scores, layer=layer, ffn=ffn):
            for token in ffn.select(scores)[:, :-1].flatten(0, 1):
                counts[layer][now] += sum(x > 0 for x in token.tolist())

        hooks.append(ffn.predictor.register_forward_hook(count))
    for batch in given:
        now = batch.domain or 0
        with torch.no_grad():
            model(batch.tokens, mask=batch.mask)
    for hook in hooks:
        hook.remove()
    found = evaluate(model, given, ("a", "b")).density.layers()
    assert [record.layer for record in found] == [0, 2]
    for record in found:
        mine = counts[record.layer]
        assert record.active == pytest.approx(sum(mine) / 42 / 48)
        assert record.active_by_domain == pytest.approx(
            {"a": mine[0] / tokens[0] / 48, "b": mine[1] / tokens[1] / 48}
        )
        assert (record.n_neurons, record.target) == (48, 0.2)
        assert record.over_target == pytest.approx(record.active / 0.2)


def test_nothing_seen_is_no_record():
    metric = Density(zoo.build({"model": {**SIZES, "ffn": SPARK}}), ("a",))
    metric.update([None] * 3, 0)  # a decoding step tells nothing
    assert metric.layers() == ()
    with pytest.raises(ValueError, match=r"active must be in \[0, 1\], got 2"):
        LayerDensity(layer=0, n_neurons=4, target=0.5, active=2)


def test_a_run_keeps_it_and_its_curve(tmp_path, monkeypatch):
    evaluate_briefly(monkeypatch)
    short = ["trainer.max_steps=4", "trainer.eval_every_steps=2"]
    run = read_as(Run, train(tiny_recipe(SPARK, *short), tmp_path / "run"), "result")
    assert [record.layer for record in run.density] == [0, 1]
    assert all(0.1 < record.active < 0.3 for record in run.density)
    known = [point.router for point in run.curve if "density/active" in point.router]
    assert len(known) == 2
    assert known[-1]["density/over_target"] == pytest.approx(
        known[-1]["density/active"] / run.density[0].target
    )
    dense = read_as(Run, train(tiny_recipe("swiglu", *short), tmp_path / "dense"), "result")
    assert dense.density == ()


def test_the_report_has_a_section():
    data = comparison(variants=("swiglu", "mlp", "mlp_2"), precisions=("bf16",))
    assert "Density" not in [s.title for s in sections(study_of(read_results(data)))]
    for run in data["runs"]:
        if run["variant"] == "swiglu":
            continue
        share = 0.08 if run["variant"] == "mlp" else 0.03
        run["density"] = [
            {"layer": i, "n_neurons": 100, "target": share, "active": share * (1 + i / 10),
             "active_by_domain": {"drama": share, "<b>": share}}
            for i in range(2)
        ]  # fmt: skip
    study = study_of(read_results(data))
    (section,) = (s for s in sections(study) if s.title == "Density")
    groups = [g for g in study.groups if g.first.density]
    assert [ran(g) for g in groups] == pytest.approx([0.084, 0.0315])
    html = str(section.body)
    assert html.index("density-quality") < html.index("density-layers") < html.index("<table")
    assert text.percent(0.084, 2) in html
    assert "in <b>" not in html
    points = against_quality(study, groups)["views"][0]["data"]
    assert [p["x"] for p in points[:2]] == [[pytest.approx(0.084)], [pytest.approx(0.0315)]]
    assert points[2]["line"]["dash"] == "dot"  # swiglu, which runs all
    shares, over = by_layer(study, groups)["views"]
    assert shares["data"][0]["y"] == pytest.approx([0.08, 0.088])
    assert over["data"][1]["y"] == pytest.approx([1.0, 1.1])
