"""Health of memory layers: closed forms, loops over tokens and pairs, and a run that keeps it."""

import math
from dataclasses import asdict

import pytest
import torch
from memory_toys import rms
from recipe_toys import evaluate_briefly, tiny_recipe
from report_data import comparison

import zoo
from layers.memory import TuckerKeys, TuckerKeysConfig
from layers.memory.tucker import core_gap
from recipes.batches import Batch
from recipes.memory_health import (
    MemoryHealth,
    Search,
    concentration,
    domain_information,
    search_again,
    searched,
)
from recipes.metrics import evaluate
from recipes.report.health_figures import lines
from recipes.report.layer_records import LayerMemory
from recipes.report.memory import MEASURES
from recipes.report.memory import concentration as concentration_figure
from recipes.report.records import Run, read_results
from recipes.report.sections import sections
from recipes.report.strict import read_as
from recipes.report.study import study as study_of
from recipes.router_rows import MEMORY_KEYS, means
from recipes.train import train

SIZES = {"vocab_size": 32, "d_model": 16, "n_layers": 3, "n_heads": 2, "max_seq_len": 16}
PLUS = {"name": "memory_plus", "n_keys": 4, "heads": 2, "top_k": 2, "d_key": 4}
V2 = {
    "name": "ultramem_v2", "d_ff": 96, "n_keys": 4, "top_k": 4, "d_key": 8, "depth": 3,
    "share": 0.5, "pool": "ring",
}  # fmt: skip


def model_of(ffn):
    return zoo.build({"model": {**SIZES, "ffn": ffn}})


def batches(n=2, domains=2):
    """n batches of a domain each; the last token of every row is padding."""
    made = []
    for i in range(n):
        ids = torch.randint(0, 32, (2, 9))
        mask = torch.ones(2, 8, dtype=torch.bool)
        mask[:, -1] = False
        n_bytes = torch.full((2,), 7)
        made.append(Batch(ids[:, :-1], ids[:, 1:], n_bytes=n_bytes, mask=mask, domain=i % domains))
    return made


def keys_of(rank=2, cores=2, search="positive", heads=2):
    return TuckerKeys(
        TuckerKeysConfig(
            heads=heads, n_keys=5, d_key=3, top_k=4, rank=rank, n_cores=cores, search=search
        )
    )


# What is read


def test_reads_by_a_loop_over_tokens():
    model = model_of(PLUS).eval()
    given = batches(3)
    found = evaluate(model, given, ("a", "b"))
    counts = [{"a": [0] * 16, "b": [0] * 16} for _ in range(3)]

    def count(layer, domain, mask):
        def hook(keys, args, hits):
            for token, real in enumerate(mask.flatten().tolist()):
                for slot in hits.slots[token].flatten().tolist():
                    counts[layer][domain][slot] += real

        return hook

    for batch in given:
        hooks = [
            block.ffn.memory.keys.register_forward_hook(count(i, "ab"[batch.domain], batch.mask))
            for i, block in enumerate(model.blocks)
        ]
        with torch.no_grad():
            model(batch.tokens, mask=batch.mask)
        for hook in hooks:
            hook.remove()
    records = found.memory.layers()
    assert [r.layer for r in records] == [0, 1, 2]
    for record, of in zip(records, counts, strict=True):
        every = [a + b for a, b in zip(of["a"], of["b"], strict=True)]
        assert record.reads == sum(every) == 3 * 14 * 4
        assert record.n_rows == 16
        assert record.used == sum(n > 0 for n in every) / 16
        shares = [n / sum(every) for n in every]
        kl = math.log(16) + sum(p * math.log(p) for p in shares if p)
        assert record.kl == pytest.approx(kl, abs=1e-12)
        assert record.used_by_domain == {
            name: sum(n > 0 for n in reads) / 16 for name, reads in of.items()
        }
        assert record.recall is None
        assert record.core_gap is None
        assert record.pool is None


def test_rows_are_those_of_a_layers_window():
    model = model_of(V2).eval()
    metric = MemoryHealth(model, ("all",))
    windows = [block.ffn.config.window for block in model.blocks]
    assert {w.visible for w in windows} == {16}
    for i, window in enumerate(windows):
        slots = torch.zeros(48, dtype=torch.int64)
        for place in range(16):
            slots[(window.offset + place) % 48] = 1
        stats = [{"slots": torch.zeros(48, dtype=torch.int64)} for _ in range(3)]
        stats[i] = {"slots": slots}
        metric.update(stats, {}, 0, None)
    for record in metric.layers():
        assert (record.n_rows, record.reads, record.used) == (16, 16, 1)
        assert record.kl == pytest.approx(0, abs=1e-12)
        assert record.pool == "ring"


def test_concentration_and_information_at_their_ends():
    even, one = torch.ones(64).double(), torch.eye(64).double()[5]
    assert concentration(even) == pytest.approx([i / 32 for i in range(33)])
    assert concentration(one) == pytest.approx([0] + [1] * 32)
    assert domain_information(torch.stack([even, 3 * even])) == pytest.approx(0, abs=1e-12)
    apart = torch.stack([even * (torch.arange(64) < 32), even * (torch.arange(64) >= 32)])
    assert domain_information(apart) == pytest.approx(1)
    assert domain_information(torch.stack([even, 0 * even])) == 0


def test_the_share_of_the_most_read_rows():
    record = LayerMemory(layer=0, n_rows=64, reads=1.0, used=1.0, kl=0.0,
                         concentration=(0.0, 0.5, 0.75, 1.0, 1.0))  # fmt: skip
    assert [record.top(x) for x in (0, 0.125, 0.25, 0.5, 0.75, 1)] == [0, 0.25, 0.5, 0.75, 1, 1]


# What is found


@pytest.mark.parametrize(("rank", "cores"), [(1, 1), (2, 2), (3, 2)])
def test_the_exhaustive_search_by_a_loop_over_pairs(rank, cores):
    keys = keys_of(rank, cores).double()
    queries = torch.randn(6, 2 * rank, 3, dtype=torch.float64)
    best = keys.exhaustive(queries)
    gain = keys.norm.weight
    for t in range(6):
        for h in range(2):

            def projected(side, a, i, t=t, h=h):
                return rms(keys.weight[side, a, h, i], gain) @ queries[t, side * rank + a]

            scores = {}
            for i in range(5):
                for j in range(5):
                    core = keys.cores[:, h].sum(0)
                    scores[i * 5 + j] = sum(
                        (core[a, b] * projected(0, a, i) * projected(1, b, j)).item()
                        for a in range(rank) for b in range(rank)
                    )  # fmt: skip
            expected = sorted(scores, key=lambda slot: -scores[slot])[:4]
            assert best[t, h].tolist() == expected


def test_recall_is_the_share_of_the_best_slots_that_were_kept():
    keys = keys_of()
    queries = torch.randn(40, 4, 3)
    hits = keys(queries)
    found = search_again(keys, queries, hits)
    best = keys.exhaustive(queries)
    assert found.tokens.tolist() == [0, 10, 20, 30]
    assert found.slots == 8
    for token, n in zip(found.tokens.tolist(), found.found.tolist(), strict=True):
        assert n == sum(
            len(set(best[token, h].tolist()) & set(hits.slots[token, h].tolist())) for h in range(2)
        )
    perfect = search_again(keys, queries, hits._replace(slots=best))
    assert perfect.found.tolist() == [8] * 4


def test_recall_of_a_core_of_rank_one_misses_pairs_of_two_negatives_alone():
    """Both quadrants of a rank-one core are exact; one is about half (memory.md 5.3)."""
    queries = torch.randn(64, 4, 3)
    shares = {}
    for search in ("positive", "signed"):
        torch.manual_seed(3)
        keys = keys_of(search=search)
        keys.cores.data.fill_(1.0)
        hits = keys(queries)
        best = keys.exhaustive(queries)
        found = (best[..., :, None] == hits.slots[..., None, :]).any(-1)
        shares[search] = found.float().mean().item()
        assert core_gap(keys.cores.sum(0)).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert shares["signed"] == 1
    assert 0.3 < shares["positive"] < 0.8


def test_the_gap_of_a_core_is_that_of_its_singular_values():
    core = torch.diag(torch.tensor([4.0, -1.0, 0.5]))[None]
    assert core_gap(core).tolist() == pytest.approx([0.75])
    assert core_gap(torch.eye(2)[None]).tolist() == pytest.approx([0.0])
    assert core_gap(torch.tensor([[[3.0]]])).tolist() == [1.0]


def test_padding_is_not_searched():
    metric = MemoryHealth(model_of(V2), ("all",))
    stats = [{"slots": torch.ones(48, dtype=torch.int64)}] * 3
    search = Search(torch.tensor([0, 2]), torch.tensor([1.0, 4.0]).double(), 4, torch.tensor(0.5))
    metric.update(stats, {1: search}, 0, torch.tensor([[True, True], [False, True]]))
    records = metric.layers()
    assert [(r.recall, r.recall_slots) for r in records] == [(None, 0), (0.25, 4), (None, 0)]
    assert records[1].core_gap == 0.5


def test_watching_changes_nothing_and_goes_away():
    model = model_of(V2).eval()
    ids = torch.randint(0, 32, (2, 8))
    with torch.no_grad():
        plain = model(ids).logits
        with searched(model) as seen:
            watched = model(ids).logits
            assert sorted(seen) == [0, 1, 2]
        assert torch.equal(plain, watched)
        seen.clear()
        model(ids)
    assert seen == {}


def test_models_without_a_memory_have_no_record():
    model = model_of("swiglu")
    assert evaluate(model, batches(1), ("a", "b")).memory.layers() == ()


# In a run


@pytest.mark.parametrize("ffn", [{**PLUS, "pool": "shared"}, V2], ids=["memory_plus", "v2"])
def test_a_run_keeps_curve_and_records(ffn, tmp_path, monkeypatch):
    evaluate_briefly(monkeypatch)
    monkeypatch.setattr("recipes.train.SAMPLE_TOKENS", 1)
    result = train(tiny_recipe({**ffn, "n_keys": 8}, "trainer.max_steps=4"), tmp_path / "run")
    run = read_as(Run, result, "result")
    assert [r.layer for r in run.memory] == [0, 1]
    assert {r.pool for r in run.memory} == {ffn["pool"]}
    last = run.curve[-1].router
    tucker = ffn is V2
    known = {key for key in MEMORY_KEYS if tucker or key not in ("recall", "core_gap")}
    assert {key for key in last if key.startswith("memory/")} == {f"memory/{k}" for k in known}
    assert last == pytest.approx({k: v for k, v in means("memory", MEMORY_KEYS, run.memory).items()
                                  if v is not None})  # fmt: skip
    for record in run.memory:
        assert 0 < record.used <= 1
        assert 0 <= record.kl <= math.log(record.n_rows)
        assert len(record.concentration) == 33
        assert (record.recall is not None) == tucker
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    assert "memory/used" in header
    old = {key: value for key, value in asdict(run).items() if key != "memory"}
    assert read_as(Run, old, "result").memory == ()


# In the report


def remembered(run, layers, tucker):
    """A made-up run with memories in some layers."""
    curve = [0.0] + [1 - 2.0**-i for i in range(1, 33)]
    found = [
        asdict(
            LayerMemory(
                layer=layer, pool="ring" if tucker else None, n_rows=4096, reads=8192.0, used=0.5,
                kl=0.25, concentration=tuple(curve), used_by_domain={"drama": 0.125},
                recall=0.75 if tucker else None, recall_slots=64, core_gap=0.5 if tucker else None,
            )
        )
        for layer in layers
    ]  # fmt: skip
    figures = {"memory/used": 0.5} | ({"memory/recall": 0.75} if tucker else {})
    return {**run, "memory": found, "curve": [{**p, "router": figures} for p in run["curve"]]}


def test_a_report_shows_memories_alone_and_only_what_they_have():
    results = comparison(("swiglu", "mlp", "moe"), ("bf16",), baseline_seeds=2, steps=20)
    assert "Memory" not in [s.title for s in sections(study_of(read_results(results)))]
    runs = [
        remembered(r, (0, 2), True) if r["variant"] == "mlp"
        else remembered(r, (2,), False) if r["variant"] == "moe" else r
        for r in results["runs"]
    ]  # fmt: skip
    study = study_of(read_results({**results, "runs": runs}))
    (section,) = [s for s in sections(study) if s.title == "Memory"]
    html = str(section.body)
    summary, rest = html.split("<details>")
    by_layer = rest.split("</details>")[0]
    assert summary.count("<tr>") == 3
    assert by_layer.count("<tr>") == 4
    assert "swiglu" not in summary
    for shown in ("4,096", "50.0", "0.250", "75.0"):
        assert shown in summary
    assert "12.5" in by_layer
    assert by_layer.count("ring") == 2
    figure = concentration_figure(study, [g for g in study.groups if g.first.memory])
    drawn = {v["layer"]: len(v["data"]) for v in figure["views"]}
    assert drawn == {"layer 0": 2, "layer 2": 3}  # the even line among them
    trained = lines(study, study.groups, MEASURES)
    assert trained is not None
    assert [v["label"] for v in trained["views"]] == ["Rows used", "Recall"]
    assert "memory-even" in html
    assert "memory-lines" in html
