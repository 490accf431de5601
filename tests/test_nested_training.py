"""Which granularities a step trains, what their losses come to, and how submodels are measured."""

import json
from dataclasses import replace

import pytest
import torch
from recipe_toys import evaluate_briefly, killed_after, refused, rows, timeless, tiny_recipe
from report_data import comparison
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from recipes.batches import Batch
from recipes.costing import submodel_cost, training_flops, whole_model_cost
from recipes.load import load, to_plain
from recipes.nested import Nesting
from recipes.report.records import read_results
from recipes.report.study import study
from recipes.report.widths import places, quality, widths
from recipes.schema import NestedConfig
from recipes.task import LanguageModelTask
from recipes.train import train
from recipes.widths import Consistency, evaluate_widths, submodels
from zoo.consistency import next_token_kl
from zoo.extract import extract
from zoo.model import LanguageModel

FFN = {"name": "matformer", "d_ff": 64}
WIDTHS = (8, 16, 32, 64)
MOE = {"name": "moe", "n_experts": 4, "top_k": 2, "d_expert": 32}


def recipe_of(mode="sample", *overrides, ffn=FFN):
    return tiny_recipe(ffn, "precision=fp32", f"nested.mode={mode}", *overrides)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (2, 17), generator=generator)
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 16, dtype=torch.int64), None, None)


def eval_batch():
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 9:] = False
    return batch()._replace(mask=mask, n_bytes=mask.long())


def gradients(recipe, step=0, monkeypatch=None):
    """The loss and gradients of a task's step."""
    task = LanguageModelTask(recipe, ("all",))
    monkeypatch.setattr(LanguageModelTask, "global_step", step)
    done = task.training_step(batch(), 0)
    done["loss"].backward()
    found = {name: p.grad for name, p in task.model.named_parameters()}
    return done, found


def single(recipe, width, monkeypatch):
    """The same of one granularity alone: a layer list that has no other."""
    given = [width, 64] if width < 64 else [64]
    chances = "[0.999999,0.000001]" if width < 64 else "[1.0]"
    ffn = {**FFN, "widths": given}
    alone = recipe_of("sample", f"nested.probabilities={chances}", ffn=ffn)
    assert Nesting(alone).chosen(0) == (0,)
    return gradients(replace(alone, seed=recipe.seed), 0, monkeypatch)


# What a step trains


def test_a_sampled_step_is_a_function_of_seed_and_step():
    nesting, again, other = (Nesting(recipe_of("sample", f"seed={n}")) for n in (0, 0, 1))
    drawn = [nesting.chosen(step) for step in range(4000)]
    assert drawn[::-1] == [again.chosen(step) for step in reversed(range(4000))]
    assert [other.chosen(step) for step in range(4000)] != drawn
    counts = torch.tensor(drawn).flatten().bincount(minlength=4)
    assert_close(counts / 4000, torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_probabilities_are_those_of_the_recipe():
    nesting = Nesting(recipe_of("sample", "nested.probabilities=[0.44,0.31,0.15,0.10]"))
    counts = torch.tensor([nesting.chosen(s) for s in range(4000)]).flatten().bincount(minlength=4)
    assert_close(counts / 4000, torch.tensor([0.44, 0.31, 0.15, 0.10]), atol=0.03, rtol=0)


def test_a_sandwich_has_both_ends_and_one_between():
    nesting = Nesting(recipe_of("sandwich"))
    drawn = [nesting.chosen(step) for step in range(200)]
    assert {(first, last) for first, _, last in drawn} == {(3, 0)}
    assert {middle for _, middle, _ in drawn} == {1, 2}
    two = Nesting(recipe_of("sandwich", ffn={**FFN, "widths": [16, 64]}))
    assert two.chosen(0) == (1, 0)
    assert Nesting(recipe_of("joint")).chosen(7) == (3, 2, 1, 0)


def test_a_sampled_step_is_that_of_the_width_alone(monkeypatch):
    """Gradients beyond the width are zeros; those of what all widths share are not."""
    recipe = recipe_of()
    nesting = Nesting(recipe)
    for width, granularity in ((8, 0), (32, 2)):
        step = next(s for s in range(100) if nesting.chosen(s) == (granularity,))
        done, found = gradients(recipe, step, monkeypatch)
        alone, expected = single(recipe, width, monkeypatch)
        assert_close(done["loss"], alone["loss"], rtol=0, atol=0)
        assert_close(found, expected, rtol=0, atol=0)
        for block in range(2):
            assert not found[f"blocks.{block}.ffn.up.weight"][width:].any()
            assert not found[f"blocks.{block}.ffn.down.weight"][:, width:].any()
        assert found["embedding.weight"].any()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_joint_gradients_are_the_sum_or_mean_of_single_ones(reduction, monkeypatch):
    recipe = recipe_of("joint", f"nested.reduction={reduction}")
    done, found = gradients(recipe, 0, monkeypatch)
    each = [single(recipe, width, monkeypatch) for width in WIDTHS]
    parts = 4 if reduction == "mean" else 1
    for name, gradient in found.items():
        assert_close(gradient, sum(g[name] for _, g in each) / parts)
    assert_close(done["loss"], sum(d["loss"] for d, _ in each) / parts)
    assert_close(done["nats"], each[-1][0]["nats"], rtol=0, atol=0)  # the widest's are told


def test_distillation_adds_the_divergence_from_the_widest(monkeypatch):
    recipe = recipe_of("joint", "nested.distill=0.5")
    done, found = gradients(recipe, 0, monkeypatch)
    plain, without = gradients(recipe_of("joint"), 0, monkeypatch)
    model = LanguageModelTask(recipe, ("all",)).model
    with torch.no_grad():
        logits = [model(batch().tokens, widths=[w, w]).logits.double() for w in WIDTHS]
    wide = logits[-1].softmax(-1)
    added = sum((wide * (wide.log() - x.log_softmax(-1))).sum(-1).mean() for x in logits[:-1])
    assert_close(done["loss"] - plain["loss"], (0.5 * added).float(), rtol=1e-3, atol=1e-5)
    # the widest is the teacher, and learns nothing from its pupils
    beyond = (slice(32, None),)
    assert_close(found["blocks.1.ffn.up.weight"][beyond], without["blocks.1.ffn.up.weight"][beyond])
    assert not torch.equal(found["embedding.weight"], without["embedding.weight"])


def test_mixtures_train_by_granularity_and_count_every_pass(monkeypatch):
    recipe = recipe_of("joint", ffn=MOE)
    done, found = gradients(recipe, 0, monkeypatch)
    assert all(g is not None and g.isfinite().all() for g in found.values())
    counts = done["stats"][0]["counts"]
    assert counts.sum() == 4 * 2 * 16 * 2  # passes, batch, top 2
    sampled = replace(recipe, nested=NestedConfig())
    step = next(s for s in range(100) if Nesting(sampled).chosen(s) == (1,))
    _, one = gradients(sampled, step, monkeypatch)
    down = one["blocks.0.ffn.experts.down.weight"]  # [E, D, F]
    assert down[:, :, :8].any()
    assert not down[:, :, 8:].any()
    assert found["blocks.0.ffn.experts.down.weight"][:, :, 8:].any()


# A run


def test_half_and_half_is_the_whole(tmp_path, monkeypatch):
    """With micro-batches, which train the same granularity; recomputing changes nothing either."""
    evaluate_briefly(monkeypatch)
    small = ["data.batch_size=4", "data.seq_len=64", "data.eval_bytes_per_domain=1024"]
    recipe = recipe_of("sample", "trainer.accumulate=2", "precision=nvfp4", *small)
    expected = train(recipe, tmp_path / "whole")
    with killed_after(monkeypatch, 4):
        train(recipe, tmp_path / "cut")
    assert timeless(train(recipe, tmp_path / "cut")) == timeless(expected)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    trainer = replace(recipe.trainer, activation_checkpointing=True)
    again = train(replace(recipe, trainer=trainer), tmp_path / "recomputed")
    assert again["widths"] == expected["widths"]
    assert [s["widths"] for s in expected["widths"] if s["trained"]] == [[w, w] for w in WIDTHS]
    flops = training_flops(recipe)
    assert expected["cost"]["training_flops_per_token"] == flops
    assert expected["curve"][-1]["flops"] == pytest.approx(expected["tokens"] * flops)
    assert expected["cost"]["flops_per_token"] == whole_model_cost(recipe).flops
    assert json.dumps(to_plain(load(expected["recipe"]))) == json.dumps(to_plain(recipe))


def test_compiled_training_has_a_graph_for_each_width(monkeypatch):
    torch.compiler.reset()
    counter, original = CompileCounterWithBackend("aot_eager"), LanguageModel.compile
    monkeypatch.setattr(
        LanguageModel, "compile", lambda self, **options: original(self, backend=counter, **options)
    )
    recipe = recipe_of("sample")
    compiled = replace(recipe, trainer=replace(recipe.trainer, compile=True))
    tasks = [LanguageModelTask(each, ("all",)) for each in (recipe, compiled)]
    drawn = [Nesting(recipe).chosen(step) for step in range(40)]
    graphs = []
    for step in [drawn.index((i,)) for i in (0, 0, 1, 2, 3, 1, 3, 0, 2)]:
        monkeypatch.setattr(LanguageModelTask, "global_step", step)
        eager, other = (task.training_step(batch(), 0)["loss"] for task in tasks)
        assert_close(other, eager)
        graphs.append(counter.frame_count)
    first = graphs[1]  # the very first call may see state in the making
    assert graphs[2:] == [first + n for n in (1, 2, 3, 3, 3, 3, 3)]
    evaluate_widths(tasks[1].model, compiled, [eval_batch()], ("all",))
    assert counter.frame_count == graphs[-1]  # mixtures run as they are


def test_training_flops_are_those_of_the_passes():
    of = [3 * submodel_cost(recipe_of(), [w, w]).flops for w in WIDTHS]
    recipe = recipe_of("sample", "trainer.max_steps=9")
    drawn = [Nesting(recipe).chosen(step)[0] for step in range(9)]
    assert training_flops(recipe) == pytest.approx(sum(of[i] for i in drawn) / 9)
    assert training_flops(recipe_of("joint")) == sum(of)
    assert of[-1] == training_flops(tiny_recipe(FFN))


def test_submodels_are_granularities_and_what_lies_between():
    recipe = recipe_of()
    found = submodels(recipe.model)
    assert list(found) == [(8, 8), (8, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    assert [w for w, trained in found.items() if trained] == [(w, w) for w in WIDTHS]
    plan = [{"name": "swiglu", "layers": "first"}, MOE]
    mixed = recipe_of("sample", ffn=plan)
    assert list(submodels(mixed.model)) == [(None, w) for w in (4, 8, 16, 32)]


def test_a_submodel_is_measured_as_its_extract_is():
    recipe = recipe_of()
    model = LanguageModelTask(recipe, ("all",)).model
    one = eval_batch()
    found = evaluate_widths(model, recipe, [one], ("all",))
    wide = model(one.tokens, mask=one.mask).logits.double()
    for submodel in found:
        own = extract(model, submodel.widths)
        logits = own(one.tokens, mask=one.mask).logits.double()
        nats = -logits.log_softmax(-1).gather(-1, one.targets[..., None])[..., 0]
        bits = nats[one.mask].sum().item() / one.n_bytes.sum().item() / torch.tensor(2).log().item()
        assert submodel.bpb == pytest.approx(bits, rel=1e-5)
        same = (logits.argmax(-1) == wide.argmax(-1))[one.mask].double().mean().item()
        assert submodel.agreement == pytest.approx(same)
        cost = own.cost(recipe.data.seq_len)
        assert submodel.params == sum(p.numel() for p in own.parameters()) == cost.params
        assert submodel.flops_per_token == cost.flops
    assert (found[-1].agreement, found[-1].kl) == (1.0, 0.0)
    assert found[0].kl > found[-2].kl > 0


def test_consistency_by_hand():
    wide = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [5.0, 0.0]]]).log_softmax(-1)
    narrow = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 0.0]]]).log_softmax(-1)
    judged = torch.tensor([[True, True, False]])
    consistency = Consistency()
    consistency.update(narrow, wide, judged)
    p = wide[0, 0].exp()
    expected = (p * (p.log() - narrow[0, 0])).sum()
    assert consistency.value() == pytest.approx((0.5, expected.item() / 2))
    assert_close(next_token_kl(wide, wide), torch.zeros(1, 3))


# Errors


@pytest.mark.parametrize(
    ("ffn", "overrides", "message"),
    [
        ("swiglu", [], "nested needs layers whose FFN has granularities (matformer, or moe"),
        ({**MOE, "n_shared": 1}, [], "nested needs layers whose FFN has granularities"),
        ({**MOE, "d_expert": 4}, [], "a layer is too narrow to have an eighth of its width"),
        ([FFN, {**FFN, "widths": [8, 64]}], [], "equally many granularities, got [2, 4]"),
        (FFN, ["nested.probabilities=[0.5,0.5]"], "one for each of 4 granularities, got 2"),
        (FFN, ["nested.probabilities=[0.5,0.6]"], "must be positive and sum to 1"),
        (FFN, ["nested.probabilities=[1.0,0.0]"], "must be positive and sum to 1"),
        (FFN, ["nested.distill=1.0"], "nested.distill needs the widest in every step"),
        (FFN, ["nested.mode=all"], "nested.mode must be one of sample, joint, sandwich"),
        (FFN, ["nested.mode=joint", "nested.probabilities=[1.0]"], "no use in mode joint"),
    ],
)
def test_what_is_refused(ffn, overrides, message):
    with refused(message):
        tiny_recipe(ffn, *(overrides or ["nested.mode=sample"]))


# The report


def nested_study():
    results = comparison(("mlp", "swiglu"), ("bf16",), 2)
    base = results["runs"][0]["cost"]
    for run in results["runs"]:
        if run["variant"] == "swiglu":
            run["widths"] = [
                {"widths": [w, v], "trained": w == v, "params": 100 * (w + v),
                 "active_params": 100.0 * (w + v), "nonembedding_params": 50 * (w + v),
                 "flops_per_token": base["flops_per_token"] * (w + v) / 64, "bpb": 3 - v / 64,
                 "agreement": v / 32, "kl": None if w == 8 else 0.1}
                for w, v in ((8, 8), (8, 16), (16, 16), (16, 32), (32, 32))
            ]  # fmt: skip
    return study(read_results(results))


def test_the_report_draws_submodels_beside_models_trained_alone():
    found = nested_study()
    alone, nested = found.groups
    assert [p.label for p in places(nested)] == [
        "8", "mixture 1 × 8 + 1 × 16", "16", "mixture 1 × 16 + 1 × 32", "32",
    ]  # fmt: skip
    view = quality(found)["views"][0]
    assert view["data"][0]["x"] == [alone.first.cost.flops_per_token]
    assert view["data"][1]["y"] == [3 - v / 64 for v in (8, 16, 16, 32, 32)]
    open_ones = [symbol.endswith("-open") for symbol in view["data"][1]["marker"]["symbol"]]
    assert open_ones == [False, True, False, True, False]
    page = widths(found, "")
    assert page is not None
    assert page.index("plot-widths") < page.index("<table")  # the picture first
    gap = 3 - 32 / 64 - alone.bpb
    assert f'data-value="{gap!r}" title="against mlp · bf16"' in page


def test_no_section_where_nothing_is_nested():
    assert widths(study(read_results(comparison())), "") is None
