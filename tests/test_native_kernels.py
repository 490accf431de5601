"""The native kernels give the bits of the definitions in torch ops, whatever is asked of them."""

import logging
import math
import random
import shutil

import pytest
import torch
from format_toys import assert_same_bits, hard, kernels

from layers.linear import ExpertLinear, Linear
from layers.native import Source, _load
from layers.precision import native
from layers.precision.formats import every_format, format_of, resolve
from layers.precision.presets import PRESETS
from layers.precision.quantize import fake_quantize, quantize
from layers.precision.quantize import rotated as rotate
from layers.precision.spec import QSpec

needs_compiler = pytest.mark.skipif(native.KERNELS.library() is None, reason="no C++ compiler")
KEY = torch.tensor(0x1234567890ABCDEF)
INF, NAN = math.inf, math.nan


def cells():
    """Every format, rule, tile, scope and rounding that kernels.cpp has."""
    for row in every_format():
        for rule in row.scale_rules or (None,):
            for tile in row.tiles:
                for scope in row.scopes or (None,):
                    for rounding in row.roundings:
                        options = {"scale_rule": rule, "tile": tile, "rounding": rounding}
                        if rounding == "eden":
                            options["hadamard"] = 32
                        try:
                            spec = QSpec(format=row.name, scope=scope, **options)
                            if native.has(resolve(spec)):
                                yield spec
                        except ValueError:  # options that exclude one another
                            continue


CELLS = list(cells())


def label(spec):
    said = (spec.format, spec.scale_rule, spec.tile, spec.scope, spec.rounding)
    return "-".join(word for word in said if word)


every_cell = pytest.mark.parametrize("spec", CELLS, ids=label)


def both(function):
    """The result of the torch ops and of the native kernel."""
    results = []
    for mode in ("torch", "native"):
        with kernels(mode):
            results.append(function())
    return results


def draw(spec, seed):
    """One call of `quantize`: everything but the spec at random, odd sizes and special values."""
    r = random.Random(f"{label(spec)} {seed}")
    rows, cols = r.randint(1, 70), r.choice([r.randint(1, 40), r.randint(1, 600)])
    kind = r.choice(["gauss", "binades", "bits", "ties", "special"])
    types = r.choices([torch.float32, torch.bfloat16, torch.float64], [4, 3, 1], k=2)
    x = hard(rows, cols, r.randint(0, 99), kind).to(types[0])
    layout = r.choice(["plain", "plain", "segments", "stacked", "transposed", "strided"])
    ends = None
    if layout == "segments":
        cuts = sorted(r.randint(0, rows) for _ in range(r.randint(1, 4)))
        ends = torch.tensor(cuts, dtype=r.choice([torch.int64, torch.int32]))
    if layout == "stacked":
        x = x[: rows // 3 * 3].unflatten(0, (3, -1)) if rows >= 3 else x[None]
    if layout == "transposed":
        x = x.T
    if layout == "strided":
        x = x[:, cols // 3 :]
    n = x.shape[0] if x.dim() == 3 else 1 if ends is None else len(ends)
    scale = None
    if resolve(spec).given_scale:
        scale = torch.tensor(r.choices([0.01, 1.0, 2.0**-30, 3e38, 0.0, INF], k=n))
        scale = scale[0] if n == 1 and ends is None else scale
    return x, {
        "axis": r.choice([-1, -2]), "dtype": types[1], "ends": ends, "scale": scale, "key": KEY,
        "operand": r.randint(0, 5),
    }  # fmt: skip


def rotated(spec, seed):
    """The spec with a rotation, if it may have one, of any width and signs."""
    r = random.Random(f"rotation {label(spec)} {seed}")
    width = r.choice([0, 2, 4, 8, 16, 32, 64, 128, 256])
    if spec.rounding == "eden":
        width = r.choice([16, 32, 64, 256])
    return spec.but(hadamard=width, signs=r.choice(["fixed", "step", "none"]))


@needs_compiler
@every_cell
def test_every_cell_equals_its_definition(spec):
    for seed in range(3):
        x, options = draw(spec, seed)
        for asked in {spec, rotated(spec, seed)} - {s for s in (spec,) if s.rounding == "eden"}:
            got = both(lambda x=x, asked=asked, o=options: quantize(x, asked, **o))
            assert_same_bits(*got)
        if options["scale"] is None and spec.rounding != "eden" and x.dim() == 2:
            assert_same_bits(*both(lambda x=x: fake_quantize(x, spec, key=KEY)))


def chosen():
    """A few specs that between them take every path of the kernels."""
    specs = [
        QSpec(format="mxfp4", scale_rule="rceil", rounding="stochastic", hadamard=32),
        QSpec(format="nvfp4", rounding="stochastic", hadamard=16),
        QSpec(format="nvfp4", tile="2d"),
        QSpec(format="nvfp4", scope="row", hadamard=64, signs="step"),
        QSpec(format="nvfp4", scale_rule="4over6"),
        QSpec(format="nvfp4", scale_rule="4over6", tile="2d"),
        QSpec(format="fp8_e4m3", scope="row"),
        QSpec(format="fp8_e5m2", rounding="stochastic"),
        QSpec(format="fp8_e4m3", scope="block", tile="2d"),
        QSpec(format="hif4", rounding="stochastic", hadamard=64),
    ]
    return pytest.mark.parametrize("spec", specs, ids=label)


@needs_compiler
@chosen()
@pytest.mark.parametrize("axis", [-1, -2])
def test_threads_and_wide_rows_change_no_bit(spec, axis):
    """More columns than a tile, more rows than a thread's share; segments among them."""
    threads = torch.get_num_threads()
    for shape in ((70, 1100), (300, 300)):
        x, ends = hard(*shape, 3, "binades"), torch.tensor([0, 13, 64])
        calls = [
            lambda x=x, e=e: quantize(x, spec, axis=axis, dtype=torch.bfloat16, ends=e, key=KEY)
            for e in (None, ends)
        ]
        try:
            torch.set_num_threads(1)
            expected = [both(call)[0] for call in calls]
            torch.set_num_threads(3)
            for call, one in zip(calls, expected, strict=True):
                assert_same_bits(both(call)[1], one)
        finally:
            torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("signs", ["fixed", "step", "none"])
@pytest.mark.parametrize("width", [2, 4, 8, 16, 32, 64, 128, 256])
def test_rotation_alone_equals_its_definition(width, signs, axis):
    """What formats without a kernel are rotated by."""
    spec = QSpec(format="mxfp4", hadamard=width, signs=signs)
    for kind, dtype in (("binades", torch.float32), ("special", torch.bfloat16)):
        x = hard(75, 90, width, kind).to(dtype)
        stacked = x[:72].unflatten(0, (3, -1))
        for y, ends in ((x, None), (x, torch.tensor([0, 30, 30, 71])), (stacked, None)):
            assert_same_bits(*both(lambda y=y, e=ends: rotate(y, spec, axis, e, KEY, 1)))


@needs_compiler
def test_stochastic_rounding_is_unbiased_and_follows_its_key():
    spec = QSpec(format="mxfp4", scale_rule="rceil", rounding="stochastic")
    x = torch.randn(64, 64)
    options = {"axis": -1, "dtype": torch.float32}
    with kernels("native"):
        draws = torch.stack([
            quantize(x, spec, key=torch.tensor(n * 2**32 + n), operand=3, **options).values
            for n in range(400)
        ])  # fmt: skip
        again = quantize(x, spec, key=torch.tensor(7 * 2**32 + 7), operand=3, **options).values
        other = quantize(x, spec, key=torch.tensor(7 * 2**32 + 7), operand=2, **options).values
    assert draws[7].equal(again)
    assert not draws[7].equal(other)
    step = x.abs().unflatten(1, (2, 32)).amax(2, keepdim=True).expand(64, 2, 32) * (2 / 3)
    error = draws.mean(0) - x  # of each number: at most half a step / sqrt(400), as a deviation
    assert (error.abs() <= 5 * (step.flatten(1) / 2) / 400**0.5).all()
    assert (error * x.sign()).mean().abs() <= 5 * (step.mean() / 2) / (400 * x.numel()) ** 0.5
    assert draws.unique(dim=0).shape[0] == 400


def everything(x, ends, key):
    """Each kind of graph once: rows, columns, tiles; segments, rotation, random rounding."""
    random_mx = QSpec(format="mxfp4", scale_rule="rceil", rounding="stochastic", hadamard=32)
    random_nv = QSpec(format="nvfp4", rounding="stochastic", hadamard=16, signs="step")
    low = {"dtype": torch.bfloat16, "key": key, "operand": 4}
    found = [
        quantize(x, random_mx, axis=-1, **low),
        quantize(x, random_mx, axis=-2, ends=ends, **low),
        quantize(x, random_nv, axis=-2, ends=ends, **low),
        quantize(x, QSpec(format="nvfp4", tile="2d", scale_rule="4over6"), axis=-1, **low),
        quantize(x, QSpec(format="fp8_e4m3", scope="row"), axis=-2, ends=ends, **low),
        quantize(x, "hif4", axis=-1, **low),
    ]
    return [t for q in found for t in q if t is not None]


@needs_compiler
def test_invariant_16_compiled_equals_eager():
    """Also for another key, which is an argument of the graph and no constant of it."""
    x = torch.cat([hard(23, 70, 7, kind) for kind in ("gauss", "binades", "special")])
    ends = torch.tensor([0, 20, 20, 65])
    torch._dynamo.reset()
    with kernels("native"):
        compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=False)
        for key in (KEY, torch.tensor(-5)):
            assert_same_bits(tuple(compiled(x, ends, key)), tuple(everything(x, ends, key)))
    torch._dynamo.reset()


@needs_compiler
def test_invariant_16_compiled_by_inductor():
    x, ends = hard(69, 70, 7, "binades"), torch.tensor([0, 20, 20, 65])
    torch._dynamo.reset()
    with kernels("native"):
        compiled = torch.compile(everything, fullgraph=True, dynamic=False)
        assert_same_bits(tuple(compiled(x, ends, KEY)), tuple(everything(x, ends, KEY)))
    torch._dynamo.reset()


def test_invariant_16_without_a_compiler_the_same_numbers(monkeypatch, caplog):
    """Said once, in one line."""
    x, ends = hard(69, 70, 7, "special"), torch.tensor([0, 20, 20, 65])
    with kernels("auto"):
        expected = everything(x, ends, KEY)
    _load.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    try:
        with caplog.at_level(logging.WARNING), kernels("auto"):
            assert_same_bits(tuple(everything(x, ends, KEY)), tuple(expected))
            everything(x, ends, KEY)
        assert len(caplog.records) == 1
        assert "torch ops do the same slower" in caplog.text
    finally:
        _load.cache_clear()


@needs_compiler
@pytest.mark.parametrize("preset", ["mxfp4", "nvfp4", "fp8_row", "hif4", "quartet2"])
def test_a_training_step_is_the_same_without_kernels(preset):
    """Linear and experts, one of them empty: outputs and gradients."""
    results = []
    for mode in ("torch", "native"):
        torch.manual_seed(0)
        leaves = [Linear(48, 40, role="ffn"), ExpertLinear(4, 48, 40, role="ffn")]
        x = torch.randn(70, 48, dtype=torch.bfloat16)
        dy = torch.randn(70, 40, dtype=torch.bfloat16)
        found = []
        with kernels(mode):
            for leaf, rest in zip(leaves, ([], [torch.tensor([33, 0, 30, 7])]), strict=True):
                leaf.precision = PRESETS[preset].default
                leaf.seed("leaf", seed=1, step=2)
                inputs = x.clone().requires_grad_()
                y = leaf(inputs, *rest)
                found += [y.detach(), *torch.autograd.grad(y, (inputs, leaf.weight), dy)]
        results.append(tuple(found))
    assert_same_bits(*results)


@needs_compiler
def test_operator_is_registered_well():
    x, ends = torch.randn(40, 48), torch.tensor([7, 40])
    for axis, end in ((-1, None), (-2, None), (-2, ends)):
        numbers = native.numbers_of(format_of("nvfp4"), "max")
        assert numbers is not None
        plain = [numbers.rule, list(numbers.integers), list(numbers.floats)]
        block = [1, 16] if axis == -1 else [16, 1]
        args = (x, *plain, block, axis, "tensor", torch.bfloat16, end, KEY, "stochastic", 3, 16,
                "step", None, False)  # fmt: skip
        torch.library.opcheck(torch.ops.moe_zoo.quantize.default, args)


def test_headers_count_for_the_name_of_a_built_library(tmp_path):
    (tmp_path / "a.cpp").write_text(
        '#include "b.hpp"\n#include <vector>\nint a() { return b(); }\n'
    )
    (tmp_path / "b.hpp").write_text('#include "c.hpp"\n#include "gone.hpp"\n')
    (tmp_path / "c.hpp").write_text("int b = 1;\n")
    source = Source(tmp_path / "a.cpp")
    assert [path.name for path in source.files()] == ["a.cpp", "b.hpp", "c.hpp"]
    before = source._key("true")
    (tmp_path / "c.hpp").write_text("int b = 2;\n")
    assert source._key("true") != before


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no compiler")
def test_kernels_build_where_there_is_a_compiler():
    assert native.KERNELS.library() is not None
    assert len(CELLS) > 100
