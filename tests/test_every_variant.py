"""What must hold for every row of the catalogue: a new row is tested by being there.

Every row runs in every precision preset. What repeats that (checkpointing, dtypes, state dicts,
compiling) sweeps all presets for one row of each class of leaf, since only leaves know a precision;
for the others the rest of the sweep is marked slow.
"""

import inspect

import pytest
import torch
from torch import _inductor as inductor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import zoo
from layers.precision.leaf import Leaf
from layers.precision.policy import HIGH_ROLES
from zoo.catalogue import FFNS

B, S = 2, 32
ALL = zoo.precisions()
IN_EVERY_RUN = ("bf16", "nvfp4")  # a cast; blocks with two scales, rotation and random rounding


def tiny(entry, precision=None, **options):
    ffn = zoo.create(entry.name, **{**entry.tiny, **options}, precision=precision)
    return ffn, torch.randn(B, S, entry.tiny["d_model"])


def first_of_their_leaves():
    """Names of the rows that are the first to have low-precision leaves of some class."""
    seen, found = set(), set()
    for entry in FFNS:
        leaves = [m for m in tiny(entry)[0].modules() if isinstance(m, Leaf)]
        leaves = {type(leaf) for leaf in leaves if leaf.role not in HIGH_ROLES}
        if leaves - seen:
            found.add(entry.name)
        seen |= leaves
    return found


def swept(in_every_run, always=ALL, backend=()):
    """Every row in each preset, the others slow: `always` where its leaves are new, else fewer."""
    params = []
    for entry in FFNS:
        often = always if entry.name in SWEPT else in_every_run
        for precision in ALL:
            marks = () if precision in often else pytest.mark.slow
            name = "-".join((entry.name, precision, *backend))
            params.append(pytest.param(entry, precision, *backend, marks=marks, id=name))
    return params


SWEPT = first_of_their_leaves()
every_variant = pytest.mark.parametrize("entry", FFNS, ids=lambda entry: entry.name)
every_precision = pytest.mark.parametrize("precision", ALL)
every_sweep = pytest.mark.parametrize(("entry", "precision"), swept(IN_EVERY_RUN))


def run(ffn, x, **inputs):
    """One forward; routers that draw noise draw the same each time."""
    torch.manual_seed(0)
    return ffn(x, **inputs)


def loss_of(out, probe):
    """A loss with a gradient of full rank, every auxiliary loss in it."""
    return (out.y * probe).sum() + sum((out.losses or {}).values())


def step(ffn, x, forward=None, **inputs):
    """(y, loss, gradients by name) of one forward and backward."""
    x = x.clone().requires_grad_()
    out = run(ffn if forward is None else forward, x, **inputs)
    probe = torch.linspace(-1, 1, x.numel()).view_as(x).to(out.y)
    ffn.zero_grad()
    loss = loss_of(out, probe)
    loss.backward()
    return out.y, loss, {"x": x.grad} | {n: p.grad.clone() for n, p in ffn.named_parameters()}


@every_variant
@every_precision
def test_runs_and_gives_every_parameter_a_gradient(entry, precision):
    ffn, x = tiny(entry, precision)
    y, _, grads = step(ffn, x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    for name, grad in grads.items():
        assert grad is not None, f"{entry.name}: {name} got no gradient"
        assert grad.isfinite().all(), f"{entry.name}: {name} got a gradient that is not finite"


@every_sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype_of_its_input(entry, precision, dtype):
    ffn, x = tiny(entry, precision)
    assert ffn(x.to(dtype)).y.dtype == dtype


@every_sweep
def test_checkpointing_gives_the_same_numbers(entry, precision):
    ffn, x = tiny(entry, precision)
    plain = step(ffn, x)
    again = step(ffn, x, lambda *args: checkpoint(ffn, *args, use_reentrant=False))
    assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("entry", "precision", "backend"),
    [
        *swept(("bf16",), backend=("aot_eager",)),  # what a row adds to a graph is its routing
        *swept((), ("fp32", "nvfp4"), backend=("inductor",)),
    ],
)
@inductor.config.patch(fallback_random=True)  # random numbers as eager draws them
def test_compiled_gives_the_same_numbers(entry, precision, backend):
    torch.compiler.reset()
    ffn, x = tiny(entry, precision)
    plain = step(ffn, x)
    compiled = step(ffn, x, torch.compile(ffn, backend=backend))
    # inductor fuses element-wise steps and so rounds less often; a low format then lands on a
    # neighbouring grid point here and there
    # in fp32 the loosest is a bias of the output: its gradient is a sum over tokens that cancels
    exact = 1e-6 if entry.own_norm else 0  # eager norms on a CPU have a backward of their own
    close = exact if backend == "aot_eager" else {"fp32": 2e-5, "bf16": 5e-2}.get(precision, 1e-1)
    for name, grad in plain[2].items():
        error = (compiled[2][name] - grad).norm() / grad.norm().clamp_min(1e-12)
        assert error <= close, f"{name}: relative difference {error:.2e}"
    assert (compiled[0] - plain[0]).norm() / plain[0].norm() <= close


@every_sweep
def test_state_dict_round_trip(entry, precision):
    ffn, x = tiny(entry, precision)
    other, _ = tiny(entry, precision)
    missing = other.load_state_dict(ffn.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert_close(run(other, x).y, run(ffn, x).y, rtol=0, atol=0)


@every_variant
def test_setting_a_precision_changes_no_parameter(entry):
    ffn, _ = tiny(entry)
    before = {name: p.clone() for name, p in ffn.state_dict().items()}
    report = zoo.set_precision(ffn, "nvfp4")
    assert_close(dict(ffn.state_dict()), before, rtol=0, atol=0)
    assert sum(report.weight_share().values()) == pytest.approx(1)
    assert sum((report.flops_share() or {}).values()) == pytest.approx(1)
    assert {p.name for p in report.parameters} == {n for n, _ in ffn.named_parameters()}
    assert report.changed


@every_variant
def test_same_input_twice_gives_the_same_bits(entry):
    ffn, x = tiny(entry)
    assert_close(step(ffn, x), step(ffn, x), rtol=0, atol=0)


@every_variant
def test_a_token_does_not_see_its_neighbours(entry):
    if not zoo.resolve(entry.name, **entry.tiny).tokenwise:
        pytest.skip("the catalogue says that its tokens see one another")
    ffn, x = tiny(entry)
    ffn.eval()  # a capacity in training lets one token take another's place
    order = torch.randperm(S)
    assert_close(ffn(x[:, order]).y, ffn(x).y[:, order])
    alone = torch.cat([ffn(x[:, i : i + 1]).y for i in range(S)], dim=1)
    assert_close(alone, ffn(x).y)


@every_variant
def test_masked_tokens_change_nothing(entry):
    ffn, x = tiny(entry)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, 20:] = False
    other = torch.where(mask[..., None], x, torch.full_like(x, 7.0))
    one, two = run(ffn, x, mask=mask), run(ffn, other, mask=mask)
    assert_close(one.y, two.y)
    assert not one.y[~mask].any()
    assert_close(one.losses, two.losses)
    assert_close(one.stats, two.stats)
    # a mask of ones is no mask
    assert_close(run(ffn, x, mask=torch.ones_like(mask)).y, run(ffn, x).y)


@every_variant
def test_no_tokens_at_all(entry):
    ffn, x = tiny(entry)
    x = x[:, :0].clone().requires_grad_()
    out = ffn(x)
    assert out.y.shape == x.shape
    loss_of(out, torch.ones_like(x)).backward()
    for name, p in ffn.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


@every_variant
def test_cost_is_what_is_built_and_what_is_run(entry):
    ffn, x = tiny(entry)
    choice = zoo.resolve(entry.name, **entry.tiny)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = ffn(x)
    measured = {}
    if "assignments" in inspect.signature(choice.config.cost).parameters:
        kept = out.stats["counts"].sum() - out.stats["zero_computation"]
        measured["assignments"] = kept.item() / (B * S)
    cost = choice.cost(S, **measured)
    built = {name: p.numel() for name, p in ffn.named_parameters()}
    counted = {item.name: item.params for item in cost if item.params}
    assert counted == built
    assert cost.flops == counter.get_total_flops() / (B * S)
    assert zoo.cost(entry.name, **entry.tiny).params == sum(built.values())


@every_variant
def test_works_alone_at_its_default_sizes(entry):
    ffn = zoo.create(entry.name, d_model=64)
    assert ffn(torch.randn(1, 4, 64)).y.shape == (1, 4, 64)


@every_variant
def test_match_meets_the_budget(entry):
    if entry.width is None:
        pytest.skip("has no width to turn")
    target = zoo.cost("swiglu", d_model=128, d_ff=2048)
    for key in ("flops", "active_params"):
        found = zoo.match(entry.name, d_model=128, tolerance=0.05, **{key: getattr(target, key)})
        cost = zoo.cost(entry.name, **found.options)
        assert getattr(cost, key) == found.value
        assert abs(found.residual) <= 0.05


@every_variant
def test_every_card_is_whole(entry):
    card = zoo.describe(entry.name)
    assert entry.paper in str(card)
    assert entry.width in {option.name for option in card.options}
    assert any(option.comment for option in card.options)
    assert card.cost is not None
    assert card.cost.params == sum(
        p.numel() for p in zoo.create(entry.name, d_model=512).parameters()
    )
