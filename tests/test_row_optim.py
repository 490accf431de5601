"""Row-wise optimizers against AdamW, torch's sparse ones, loops over rows and closed forms."""

import copy
import io
import math

import pytest
import torch
from recipe_toys import evaluate_briefly, killed_after, refused, rows, timeless, tiny_recipe
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from layers.linear import Linear, ValueTable
from recipes.optim import build_optimizer, build_schedule, check_optim, lr_ratio
from recipes.row_optim import RowAdagrad, RowAdam, clip_tables, touched
from recipes.row_rules import KERNEL
from recipes.schema import OptimConfig, TableConfig
from recipes.table_optim import SPARSE_FROM, Together, clip_apart, memory_tables
from recipes.train import train

M, D = 12, 5
LRS = [0.02, 0.05, 0.03, 0.01, 0.04, 0.02, 0.05]


def table(n_rows=M, d=D, dtype=torch.float32):
    return nn.Parameter(torch.randn(n_rows, d, dtype=dtype))


def sparse(found, values, n_rows=M):
    return torch.sparse_coo_tensor(
        torch.as_tensor(found)[None], values, (n_rows, values.shape[1]), check_invariants=True
    )


def some_steps(seed=0, n_rows=M, d=D, dtype=torch.float32):
    """[(lr, rows, gradients)]: row 0 always touched, the last never, others now and then."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for lr in LRS:
        some = torch.rand(n_rows - 2, generator=generator) < 0.4
        found = [0, *(1 + some.nonzero().flatten()).tolist()]
        g = torch.randn(len(found), d, generator=generator, dtype=dtype)
        steps.append((lr, found, g))
    return steps


def run(optimizer, p, steps):
    for lr, found, g in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr
        p.grad = sparse(found, g, p.shape[0])
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("moments", ["lazy", "decayed"])
@pytest.mark.parametrize("bias_correction", ["row", "global"])
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_it_is_adamw_where_every_row_is_touched(moments, bias_correction, form):
    p = table()
    dense = nn.Parameter(p.detach().clone())
    options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}
    ours = RowAdam([p], **options, moments=moments, bias_correction=bias_correction)
    theirs = torch.optim.AdamW([dense], **options)
    for lr in LRS:
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = lr
        dense.grad = torch.randn(M, D)
        p.grad = dense.grad.clone() if form == "dense" else sparse(list(range(M)), dense.grad)
        ours.step()
        theirs.step()
        assert_close(p, dense, rtol=1e-6, atol=1e-6)


def test_lazy_moments_and_global_bias_correction_are_sparse_adam():
    p = table(dtype=torch.float64)
    other = nn.Parameter(p.detach().clone())
    # SparseAdam scales eps by the bias correction, so that only a small one means the same
    ours = RowAdam([p], betas=(0.8, 0.9), eps=1e-14, bias_correction="global")
    theirs = torch.optim.SparseAdam([other], betas=(0.8, 0.9), eps=1e-14)
    for optimizer, q in ((ours, p), (theirs, other)):
        run(optimizer, q, some_steps(dtype=torch.float64))
    assert_close(p, other, rtol=1e-10, atol=1e-12)


def test_decayed_moments_are_those_of_adamw():
    """Where a row is touched its moments are what AdamW, fed zeros meanwhile, has there."""
    p = table(dtype=torch.float64)
    dense = nn.Parameter(p.detach().clone())
    ours = RowAdam([p], betas=(0.8, 0.9), moments="decayed", bias_correction="global")
    theirs = torch.optim.AdamW([dense], betas=(0.8, 0.9), weight_decay=0)
    for _, found, g in some_steps(dtype=torch.float64):
        p.grad = sparse(found, g)
        dense.grad = p.grad.to_dense()
        ours.step()
        theirs.step()
        m, v = ours.state[p]["moments"][found].chunk(2, dim=1)
        assert_close(m, theirs.state[dense]["exp_avg"][found])
        assert_close(v, theirs.state[dense]["exp_avg_sq"][found])


def test_adagrad_by_element_is_torchs():
    p = table()
    other = nn.Parameter(p.detach().clone())
    run(RowAdagrad([p]), p, some_steps())
    with torch.sparse.check_sparse_tensor_invariants():  # it warns where one has not chosen
        run(torch.optim.Adagrad([other]), other, some_steps())
    assert_close(p, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adam", "adagrad"])
def test_one_second_moment_a_row_and_lazy_decay_against_a_loop_over_rows(name):
    """memory.md 8, written for one row at a time, with AdamW's decay applied at every step."""
    p, wd, eps, b1, b2 = table(dtype=torch.float64), 0.5, 1e-3, 0.8, 0.9
    w = p.detach().clone().tolist()
    state = [{"t": 0, "m": [0.0] * D, "v": 0.0} for _ in range(M)]
    for lr, found, g in some_steps(dtype=torch.float64):
        for i in range(M):
            w[i] = [x * (1 - lr * wd) for x in w[i]]
        for i, g_i in zip(found, g.tolist(), strict=True):
            s = state[i]
            s["t"] += 1
            mean = math.fsum(x * x for x in g_i) / D
            if name == "adagrad":
                s["v"] += mean
                step = [x / (math.sqrt(s["v"]) + eps) for x in g_i]
            else:
                s["m"] = [b1 * m + (1 - b1) * x for m, x in zip(s["m"], g_i, strict=True)]
                s["v"] = b2 * s["v"] + (1 - b2) * mean
                root = math.sqrt(s["v"] / (1 - b2 ** s["t"])) + eps
                step = [m / (1 - b1 ** s["t"]) / root for m in s["m"]]
            w[i] = [x - lr * y for x, y in zip(w[i], step, strict=True)]
    options = {"eps": eps, "weight_decay": wd, "second_moment": "row"}
    ours = (
        RowAdagrad([p], **options) if name == "adagrad" else RowAdam([p], betas=(b1, b2), **options)
    )
    steps = some_steps(dtype=torch.float64)
    run(ours, p, steps)
    want = torch.tensor(w, dtype=torch.float64)
    last = steps[-1][1]
    assert_close(p[last].detach(), want[last])
    assert (p[-1] - want[-1]).abs().min() > 1e-3  # never touched: its decay waits
    ours.settle()
    assert_close(p.detach(), want)
    ours.settle()
    assert_close(p.detach(), want)


def test_an_untouched_row_keeps_its_bytes_and_is_decayed_in_closed_form_when_touched():
    p = table()
    before = p.detach().clone()
    optimizer = RowAdam([p], lr=0.1, weight_decay=0.2)
    for _ in range(9):
        p.grad = sparse([2, 3], torch.randn(2, D))
        optimizer.step()
    others = [i for i in range(M) if i not in (2, 3)]
    assert torch.equal(p[others], before[others])
    p.grad = sparse([7], torch.full((1, D), 1e-30))  # which moves it by nothing but its decay
    optimizer.param_groups[0]["eps"] = 1.0
    optimizer.step()
    assert_close(p[7].detach(), before[7] * (1 - 0.1 * 0.2) ** 10, rtol=1e-6, atol=1e-7)


def test_a_table_that_no_layer_read_is_left_as_it_is():
    p, q = table(), table()
    before = q.detach().clone()
    optimizer = RowAdam([p, q], weight_decay=0.1)
    p.grad = sparse([1], torch.randn(1, D))
    q.grad = sparse([], torch.zeros(0, D))
    optimizer.step()
    q.grad = None
    optimizer.step()
    assert torch.equal(q, before)


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("kind", [RowAdam, RowAdagrad])
def test_the_native_update_is_torchs_but_for_rounding(monkeypatch, kind, second_moment):
    if KERNEL.library() is None:
        pytest.skip("row_rules.cpp is not built here")
    found = {}
    start = table(60, 37)
    for way in ("native", "torch"):
        monkeypatch.setenv("MOE_ZOO_KERNELS", way)
        p = nn.Parameter(start.detach().clone())
        optimizer = kind([p], eps=1e-3, weight_decay=0.5, second_moment=second_moment)
        run(optimizer, p, some_steps(n_rows=60, d=37))
        found[way] = [p.detach(), *optimizer.state[p].values()]
    assert_close(*found.values(), rtol=2e-6, atol=1e-6)
    assert not torch.equal(found["native"][0], start)


def test_threads_change_no_bit(monkeypatch):
    monkeypatch.setattr("recipes.row_rules.NUMBERS_PER_THREAD", 1)
    monkeypatch.setattr("layers.row_dots.NUMBERS_PER_THREAD", 1)
    start, ids, dy = table(60, 37), torch.randint(60, (9, 5)), torch.randn(9, 37)
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            leaf = ValueTable(60, 37, role="memory_values", sparse=True)
            leaf.weight.data.copy_(start)
            weights = torch.ones(9, 5, requires_grad=True)
            optimizer = RowAdam([leaf.weight], second_moment="row")
            leaf(ids, weights).backward(dy)
            optimizer.step()
            found.append((leaf.weight.detach(), weights.grad))
    finally:
        torch.set_num_threads(before)
    assert_close(*found, rtol=0, atol=0)


MAKERS = {
    "adam": lambda p: RowAdam([p], weight_decay=0.1),
    "adam decayed": lambda p: RowAdam([p], moments="decayed", second_moment="row"),
    "adagrad": lambda p: RowAdagrad([p], weight_decay=0.1),
}


@pytest.mark.parametrize("name", MAKERS)
def test_it_goes_on_bit_for_bit_from_its_saved_state(name):
    p, steps = table(), some_steps()
    whole = MAKERS[name](p)
    run(whole, p, steps[:4])
    file = io.BytesIO()
    torch.save((p.detach().clone(), whole.state_dict()), file)
    run(whole, p, steps[4:])

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = nn.Parameter(weights)
    other = MAKERS[name](again)
    other.load_state_dict(state)
    run(other, again, steps[4:])
    assert torch.equal(p, again)
    for key, value in whole.state[p].items():
        assert value.dtype == other.state[again][key].dtype
        assert torch.equal(value, other.state[again][key])


class Sizes(TorchDispatchMode):
    """Notes the operators that make, or go through, as many numbers as a table has rows."""

    # these touch only the rows that they are given
    BY_ROW = ("index_select", "index_copy_", "index_add_", "index_fill_", "embedding", "detach",
              "_embedding_bag", "sparse_coo", "_indices", "_values", "coalesced")  # fmt: skip

    def __init__(self, n_rows):
        super().__init__()
        self.n_rows, self.found = n_rows, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor) and not t.is_sparse]
        name = func.name().removeprefix("aten::")
        dots = ("moe_zoo::row_dots", "moe_zoo::bag_dweights")
        by_row = name.startswith(self.BY_ROW) or name in dots
        if any(t.numel() >= self.n_rows for t in tensors) and not by_row:
            self.found.add(name)
        return out


@pytest.mark.parametrize("is_compact", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_a_step_does_nothing_of_the_size_of_the_table(name, is_compact):
    """Backward, clipping, optimizer and clearing; dense gradients show that it would be seen."""
    n_rows = 1 << 12
    leaf = ValueTable(n_rows, 4, role="memory_values", sparse=is_compact)
    ids, weights = torch.randint(n_rows, (8, 4)), torch.randn(8, 4, requires_grad=True)
    optimizer = MAKERS[name](leaf.weight)

    def step():
        leaf(ids, weights).square().sum().backward()
        clip_tables([leaf.weight], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # which makes the state
    with Sizes(n_rows) as sizes:
        step()
    assert bool(sizes.found) != is_compact, sizes.found


def test_tables_are_clipped_by_the_norm_of_their_rows():
    p, q = table(), table()
    p.grad = sparse([3, 1, 3], torch.tensor([[3.0] * D, [2.0] * D, [1.0] * D]))  # not merged yet
    q.grad = torch.ones(M, D)
    dense = [p.grad.to_dense(), q.grad.clone()]
    norm = clip_tables([p, q, table()], 2.0)
    want = torch.cat(dense).norm()
    assert_close(norm, want)
    for t, before in zip((p, q), dense, strict=True):
        assert t.grad is not None
        assert_close(t.grad.to_dense(), before * 2 / want)
    found, values = touched(p.grad)
    clip_tables([p], 1e6)
    assert found.tolist() == [1, 3]
    assert torch.equal(p.grad._values(), values)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: RowAdam([table()], betas=(1.0, 0.9)), "betas must lie in [0, 1), got (1.0, 0.9)"),
    (lambda: RowAdam([table()], lr=0.0), "lr must be positive, got 0.0"),
    (lambda: RowAdam([table()], moments="kept"), "unknown moments 'kept'"),
    (lambda: RowAdam([table()], bias_correction="rows"),
     "unknown bias_correction 'rows'. Did you mean 'row'?"),
    (lambda: RowAdagrad([table()], second_moment="column"), "unknown second_moment 'column'"),
    (lambda: RowAdagrad([table()], weight_decay=-1.0), "weight_decay must be 0 or more, got -1.0"),
    (lambda: RowAdam([nn.Parameter(torch.zeros(3))]), "a table must have the shape [M, D]"),
])  # fmt: skip
def test_what_cannot_work_is_refused(make, message):
    with refused(message):
        make()


def test_a_decay_that_would_turn_signs_is_refused():
    optimizer = RowAdam([table()], lr=2.0, weight_decay=0.5)
    with refused("lr * weight_decay must be below 1, got 2.0 * 0.5"):
        optimizer.step()


# In a run


class Parts(nn.Module):
    """A memory's table, a big one, a constant expert's vectors, and a matrix."""

    def __init__(self):
        super().__init__()
        self.linear = Linear(D, D, role="ffn")
        self.small = ValueTable(M, D, role="memory_values")
        self.big = ValueTable(SPARSE_FROM, 1, role="memory_values")
        self.constant = ValueTable(2, D, role="constant")
        self.shared = self.small


def config(**options):
    return OptimConfig(lr=0.1, table=TableConfig(**options))


@pytest.mark.parametrize(("choice", "compact"), [
    ("auto", ["big"]), ("always", ["big", "small"]), ("never", []),
])  # fmt: skip
def test_tables_are_told_which_gradients_they_take(choice, compact):
    model = Parts()
    build_optimizer(model, config(sparse=choice))
    assert [n for n in ("big", "small") if getattr(model, n).sparse] == compact
    assert not model.constant.sparse


@pytest.mark.parametrize(("name", "kinds"), [
    ("adamw", [torch.optim.AdamW]),
    ("row_adagrad", [torch.optim.AdamW, RowAdagrad]),
    ("row_adam", [torch.optim.AdamW, RowAdam]),
])  # fmt: skip
def test_every_parameter_is_in_one_group_and_tables_are_in_theirs(name, kinds):
    model = Parts()
    optimizer = build_optimizer(model, config(optimizer=name, weight_decay=0.25))
    parts = optimizer.parts if isinstance(optimizer, Together) else [optimizer]
    assert [type(part) for part in parts] == kinds
    groups = optimizer.param_groups
    assert [(g.get("tables", False), g["weight_decay"]) for g in groups] == [
        (False, 0.1), (False, 0.0), (True, 0.25)
    ]  # fmt: skip
    assert [id(p) for p in groups[2]["params"]] == [id(m.weight) for m in memory_tables(model)]
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())


def test_without_a_table_to_train_apart_nothing_changes():
    for model, options in ((Parts(), OptimConfig()), (nn.Linear(2, 2), config())):
        optimizer = build_optimizer(model, options)
        assert type(optimizer) is torch.optim.AdamW
        assert not any("tables" in group for group in optimizer.param_groups)


@pytest.mark.parametrize(("schedule", "want"), [
    ("constant", lambda step, ratio: 4.0),
    ("scheduled", lambda step, ratio: 4 * ratio),
    ("decay", lambda step, ratio: (4 - 3 * step / 10 if step < 10 else 1) * ratio),
])  # fmt: skip
def test_the_learning_rate_of_tables(schedule, want):
    options = config(schedule=schedule, decay_fraction=0.5)
    optimizer = build_optimizer(Parts(), options)
    plan = build_schedule(optimizer, options, 20)
    for step in range(20):
        ratio = lr_ratio(step, 20, options)
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert lrs == pytest.approx([0.1 * ratio, 0.1 * ratio, 0.1 * want(step, ratio)])
        optimizer.step()
        plan.step()


def test_tables_and_all_else_are_clipped_apart():
    model = Parts()
    options = OptimConfig(clip_norm=0.5, table=TableConfig(clip_norm=3.0))
    optimizer = build_optimizer(model, options)
    model.linear.weight.grad = torch.randn(D, D)
    model.constant.weight.grad = torch.randn(2, D)
    model.small.weight.grad = torch.randn(M, D)
    model.big.weight.grad = sparse([5, 2], torch.full((2, 1), 9.0), SPARSE_FROM)
    clip_apart(optimizer, options)
    norms = []
    for some in ((model.linear, model.constant), (model.small, model.big)):
        grads = [m.weight.grad for m in some if m.weight.grad is not None]
        norms.append(math.sqrt(sum(g.to_dense().square().sum().item() for g in grads)))
    assert norms == pytest.approx([0.5, 3.0], rel=1e-5)


def test_one_optimizer_of_two_saves_and_loads_as_one():
    model, options = Parts(), config(weight_decay=0.1, sparse="always")
    optimizer = build_optimizer(model, options)
    plan = build_schedule(optimizer, options, 9)

    def step(model, optimizer, plan, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(M, (3, 2), generator=generator)
        y = model.linear(model.small(ids, torch.ones(3, 2)))
        (y.square().sum() + model.big(ids, torch.ones(3, 2)).sum()).backward()
        optimizer.step()
        plan.step()
        optimizer.zero_grad()

    for seed in range(3):
        step(model, optimizer, plan, seed)
    other = copy.deepcopy(model)
    other_optimizer = build_optimizer(other, options)
    other_plan = build_schedule(other_optimizer, options, 9)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_plan.load_state_dict(plan.state_dict())
    for seed in range(3, 6):
        step(model, optimizer, plan, seed)
        step(other, other_optimizer, other_plan, seed)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert other_optimizer.param_groups[2]["steps"] == 6
    assert other_optimizer.state[other.small.weight]["touches"].dtype == torch.int32


@pytest.mark.parametrize(("options", "message"), [
    ({"lr_scale": 0.0}, "table.lr_scale must be positive"),
    ({"decay_fraction": 1.5}, "table.decay_fraction must be at most 1, got 1.5"),
    ({"weight_decay": -0.1}, "table.weight_decay must be 0 or more, got -0.1"),
    ({"clip_norm": 0.0}, "table.clip_norm must be positive, got 0.0"),
    ({"optimizer": "adam"}, "unknown table.optimizer 'adam'"),
    ({"sparse": "sometimes"}, "unknown table.sparse 'sometimes'"),
    ({"optimizer": "adamw", "sparse": "always"}, "'adamw' takes no sparse gradients"),
])  # fmt: skip
def test_a_config_that_cannot_work_is_refused(options, message):
    with refused(message):
        check_optim(OptimConfig(table=TableConfig(**options)))


PKM = {"name": "pkm", "n_keys": 16, "heads": 2, "top_k": 4, "d_key": 8}
SHORT = ("trainer.max_steps=6", "trainer.eval_every_steps=6", "data.batch_size=2")


@pytest.mark.parametrize(("override", "message"), [
    ("trainer.devices=2", "optim.table works on one device only, got trainer.devices=2"),
    ("trainer.compile=true", "torch.compile makes no sparse gradients"),
    ("optim.table.sprase=always", "Did you mean 'optim.table.sparse'?"),
    ("optim.table.sparse=maybe", "maybe"),
])  # fmt: skip
def test_a_recipe_that_cannot_work_is_refused(override, message):
    with refused(message):
        tiny_recipe(PKM, "optim.table.lr_scale=2", override)


def test_compact_and_dense_gradients_train_the_same(tmp_path, monkeypatch):
    """Over micro-batches, clipped, with weight decay: all but the rounding of sums is the same."""
    evaluate_briefly(monkeypatch)
    settled, settle = [], Together.settle
    monkeypatch.setattr(Together, "settle", lambda self: settled.append(settle(self)))
    found = {}
    for choice in ("always", "never"):
        recipe = tiny_recipe(
            PKM, *SHORT, f"optim.table.sparse={choice}", "optim.table.weight_decay=0.1",
            "optim.table.clip_norm=0.01", "trainer.accumulate=2", "precision=fp32",
        )  # fmt: skip
        found[choice] = train(recipe, tmp_path / choice)
    assert len(settled) == len(found)  # before the last evaluation
    losses = [found[choice]["final"]["bpb"] for choice in found]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0] < found["always"]["curve"][0]["train_bpb"]


@pytest.mark.parametrize("precision", ["bf16", "nvfp4"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, precision):
    evaluate_briefly(monkeypatch)
    recipe = tiny_recipe(
        PKM, *SHORT, "optim.table.sparse=always", "optim.table.weight_decay=0.1",
        "trainer.checkpoint_every_steps=3", f"precision={precision}",
    )  # fmt: skip
    whole = train(recipe, tmp_path / "whole")
    with killed_after(monkeypatch, 3):
        train(recipe, tmp_path / "killed")
    again = train(recipe, tmp_path / "killed")
    assert timeless(whole)["final"] == timeless(again)["final"]
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")
