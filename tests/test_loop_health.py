"""Loops of held-out tokens: counted by a loop over tokens, kept by a run, shown by a report."""

from dataclasses import asdict

import pytest
import torch
from recipe_toys import evaluate_briefly, tiny_recipe
from report_data import comparison

import zoo
from recipes.batches import Batch
from recipes.loop_health import looped, predictors_of, words_of
from recipes.metrics import evaluate
from recipes.report.depth import extremes, histogram, label, tint
from recipes.report.depth_records import LayerLoops, TokenLoops, mean_loops
from recipes.report.records import Run, read_results
from recipes.report.sections import sections
from recipes.report.strict import read_as
from recipes.report.study import study as study_of
from recipes.router_rows import LOOP_KEYS
from recipes.schema import DataConfig
from recipes.train import train

SIZES = {"vocab_size": 32, "d_model": 16, "n_layers": 3, "n_heads": 2, "max_seq_len": 16}
FFN = {"name": "versatile_ffn", "d_ff": 32, "n_experts": 4, "max_loops": 3}


def model_of(**options):
    """Layers 0 and 2 loop, layer 1 is dense; predictors that tell tokens apart."""
    model = zoo.build({"model": {**SIZES, "ffn": [FFN | options, "swiglu", FFN | options]}})
    for predictor in predictors_of(model).values():
        torch.nn.init.normal_(predictor.weight, std=1.0)
    return model.eval()


def batches(n=3):
    """n batches, of two domains in turn; the last token of every row is padding."""
    made = []
    for i in range(n):
        ids = torch.randint(0, 8, (2, 9))
        mask = torch.ones(2, 8, dtype=torch.bool)
        mask[:, -1] = False
        n_bytes = torch.full((2,), 7)
        made.append(Batch(ids[:, :-1], ids[:, 1:], n_bytes=n_bytes, mask=mask, domain=i % 2))
    return made


def test_counts_by_a_loop_over_tokens():
    model, given = model_of(), batches()
    found = evaluate(model, given, ("a", "b")).loops.layers(str)
    counts = {layer: {"a": [0] * 3, "b": [0] * 3} for layer in (0, 2)}
    of_token = {layer: {} for layer in (0, 2)}
    for batch in given:
        with torch.no_grad(), looped(model) as seen:
            model(batch.tokens, mask=batch.mask)
        for layer, loops in seen.items():
            taken = loops.choice.view(2, 8) + 1
            for row in range(2):
                for place in range(7):
                    n, token = taken[row, place].item(), batch.tokens[row, place].item()
                    counts[layer]["ab"[batch.domain]][n - 1] += 1
                    of_token[layer].setdefault(token, []).append(n)
    assert [record.layer for record in found] == [0, 2]
    for record in found:
        mine = counts[record.layer]
        assert record.counts_by_domain == {d: tuple(row) for d, row in mine.items()}
        assert record.counts == tuple(a + b for a, b in zip(mine["a"], mine["b"], strict=True))
        means = {str(t): sum(of) / len(of) for t, of in of_token[record.layer].items()}
        assert record.mean == pytest.approx(sum(record.counts[i] * (i + 1) for i in range(3)) / 42)
        assert record.width == pytest.approx((3 - record.mean) / 3)
        n = len(means) // 2
        assert [t.loops for t in record.shallow] == pytest.approx(sorted(means.values())[:n])
        assert [t.loops for t in record.deep] == pytest.approx(sorted(means.values())[::-1][:n])
        for token in (*record.shallow, *record.deep):
            assert token.loops == pytest.approx(means[token.text])
            assert token.count == len(of_token[record.layer][int(token.text)])
    assert found[0].counts != found[1].counts


def test_hooks_are_gone_and_stats_say_the_same():
    model, given = model_of(), batches(1)
    found = evaluate(model, given, ("a", "b")).loops.layers()
    assert not any(p._forward_hooks for p in predictors_of(model).values())
    with torch.no_grad():
        stats = model(given[0].tokens, mask=given[0].mask).stats
    assert [list(x.counts) for x in found] == [stats[i]["loops"].tolist() for i in (0, 2)]
    assert not found[0].shallow


def test_what_does_not_predict_is_not_recorded():
    for options in ({"path": "width"}, {"path": "depth", "loops": "fixed"}):
        assert evaluate(model_of(**options), batches(), ("a", "b")).loops.layers() == ()
    average, alone = (
        evaluate(model_of(**o), batches(), ("a", "b")).loops.layers()[0].width
        for o in ({"fusion": "average"}, {"path": "depth"})
    )
    assert (average, alone) == (0.5, None)


def test_a_run_keeps_its_loops(tmp_path, monkeypatch):
    evaluate_briefly(monkeypatch)
    ffn = {"name": "versatile_ffn", "d_ff": 64, "n_experts": 4, "max_loops": 3}
    short = ["trainer.max_steps=2", "trainer.eval_every_steps=1", "model.n_layers=1"]
    result = train(tiny_recipe(ffn, *short), tmp_path)
    run = read_as(Run, result, "result")
    (layer,) = run.loops
    assert sum(layer.counts) == run.final.eval_tokens
    assert layer.width == pytest.approx((3 - layer.mean) / 3)
    assert len(layer.shallow) == len(layer.deep) == 10
    assert all(len(t.text) == 1 or t.text.startswith("#") for t in (*layer.shallow, *layer.deep))
    assert layer.shallow[0].loops <= layer.deep[0].loops
    for point in run.curve:
        assert {f"loops/{key}" for key in LOOP_KEYS} <= point.router.keys()
    assert run.curve[-1].router["loops/mean"] == pytest.approx(layer.mean)


def test_words():
    word = words_of(DataConfig())
    assert [word(ord("e")), word(ord("\n")), word(0xE2)] == ["e", "\n", "#226"]
    assert words_of(DataConfig(task="copy"))(7) == "7"


def records():
    few, many = TokenLoops(text=" ", count=90, loops=1.2), TokenLoops(text="<x>", count=9, loops=4)
    return [
        LayerLoops(layer=0, counts=(60.0, 20.0, 10.0, 10.0), width=0.575, shallow=(few,),
                   deep=(many,), counts_by_domain={"a": (60.0, 0.0, 0.0, 0.0),
                                                   "b": (0.0, 20.0, 10.0, 10.0)}),
        LayerLoops(layer=2, counts=(0.0, 0.0, 0.0, 50.0)),
    ]  # fmt: skip


def test_the_report_has_a_section():
    results = comparison(variants=("swiglu", "moe"), steps=20)
    assert "Depth" not in [s.title for s in sections(study_of(read_results(results)))]
    run = next(run for run in results["runs"] if run["variant"] == "moe")
    run["loops"] = [asdict(record) for record in records()]
    for i, point in enumerate(run["curve"]):
        point["router"] = {"loops/mean": 2.0 + 0.01 * i}
    study = study_of(read_results(results))
    (section,) = (s for s in sections(study) if s.title == "Depth")
    html = str(section.body)
    for told in ("depth-bars", "depth-tokens", "depth-lines", "once", "4 times", "in a"):
        assert told in html
    assert html.index("depth-bars") < html.index("<table")  # the picture first
    assert "<x>" not in html
    groups = [g for g in study.groups if g.first.loops]
    views = {view["rows"]: view for view in histogram(groups)["views"]}
    first = [trace["x"][0] for trace in views["layers"]["data"]]
    assert first == [0.6, 0.2, 0.1, 0.1]
    assert [trace["x"][1] for trace in views["layers"]["data"]] == [0, 0, 0, 1]
    assert views["domains"]["data"][0]["y"] == ["a", "b"]
    (ends,) = extremes(groups)["views"]
    assert ends["data"][0]["x"] == [1.2, 4]


def test_small_parts():
    assert mean_loops((60, 20, 10, 10)) == pytest.approx(1.7)
    assert (tint(1, 4), tint(4, 4), tint(1, 1)) == ("#b9cfee", "#2a4f8f", "#b9cfee")
    assert label(TokenLoops(text=" ", count=1, loops=1)) == "space"
    assert label(TokenLoops(text=" the", count=1, loops=1)) == "␣the"
    with pytest.raises(ValueError, match="counts_by_domain has 1 numbers for a and 2 in all"):
        LayerLoops(layer=0, counts=(1.0, 1.0), counts_by_domain={"a": (1.0,)})
