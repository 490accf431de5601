"""Delayed scaling against TransformerEngine's rule, written out (precision.md section 7)."""

import math

import pytest
import torch

import zoo
from layers.linear import ExpertLinear, Linear
from layers.precision import LeafPrecision
from layers.precision.operands import OPERANDS

LARGEST = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "nvfp4": 6.0 * 448.0}


class Reference:
    """DelayedScaling of one tensor: amax history, algorithm "max", scale from largest / amax."""

    def __init__(self, largest, history, margin):
        self.largest, self.margin = torch.tensor(largest), margin
        self.history = torch.zeros(history)  # slot 0: of the step in the making
        self.scale = torch.tensor(1.0)

    def step(self, amax):
        self.history[0] = amax
        most = self.history.max()
        scale = (self.largest / most) / 2.0**self.margin
        scale = torch.where(most > 0.0, scale, self.scale)
        self.scale = torch.where(most.isfinite(), scale, self.scale)
        self.history = self.history.roll(-1)
        self.history[0] = 0.0
        return self.scale


def precision(history=3, margin=0, forward="fp8_e4m3", backward="fp8_e5m2"):
    """Every operand with a delayed scale."""
    options = {"scope": "delayed", "history": history, "margin": margin}
    gradients = {"format": backward, **options}
    return LeafPrecision.of(
        {"all": {"format": forward, **options}, "dgrad_dy": gradients, "wgrad_dy": gradients}
    )


def largest_of(p, operand):
    return LARGEST[getattr(p, operand).format]


def peaks_of(x, w, dy):
    """What each operand of a step reads, by number."""
    found = {"x": x.abs().amax(), "w": w.abs().amax(), "dy": dy.bfloat16().float().abs().amax()}
    return [found[operand.split("_")[1]] for operand in OPERANDS]


@pytest.mark.parametrize(
    ("history", "margin"), [(1, 0), (3, 0), (3, 2), (1024, 0)], ids=lambda v: str(v)
)
def test_scales_follow_the_rule(history, margin):
    """Peaks that rise, fall, vanish and are infinite; 12 steps."""
    leaf = Linear(32, 16, role="ffn")
    leaf.precision = p = precision(history, margin)
    references = [Reference(largest_of(p, o), history, margin) for o in OPERANDS]
    sizes = [1.0, 8.0, 3.0, 0.0, 0.0, 0.0, 0.0, 5.0, 1e-3, 1e-4, 1e-5, 2.0]
    for i, size in enumerate(sizes):
        x = (size * torch.randn(8, 32)).requires_grad_()
        dy = torch.randn(8, 16) * (size + (i % 2))
        leaf.weight.data = size * torch.randn(16, 32)
        leaf(x).backward(dy.bfloat16())
        zoo.update_delayed_scales(leaf)
        expected = [
            r.step(a) for r, a in zip(references, peaks_of(x, leaf.weight, dy), strict=True)
        ]
        assert torch.equal(leaf.operand_scales, 1.0 / torch.stack(expected)), i
    assert leaf.peak_history.shape == (history, 6)
    assert (leaf.operand_scales != 1).all()


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_peak_that_says_nothing_leaves_the_scale(bad):
    leaf = Linear(16, 16, role="ffn")
    leaf.precision = precision(history=1)

    def step(x):
        with torch.no_grad():
            leaf(x)
        zoo.update_delayed_scales(leaf)
        return leaf.operand_scales[0].clone()

    assert step(torch.zeros(4, 16)) == 1  # nothing seen yet
    scale = step(torch.full((4, 16), 7.0))
    assert scale == 1 / (torch.tensor(448.0) / 7)
    x = torch.zeros(4, 16)
    x[1, 2] = bad
    assert step(x) == scale
    assert step(torch.full((4, 16), 14.0)) == 1 / (torch.tensor(448.0) / 14)


def test_the_first_step_casts_with_scale_one_and_clamps():
    """Values as an ordinary cast to FP8 gives them, but for those beyond its largest."""
    leaf = Linear(16, 16, role="ffn")
    leaf.precision = precision()
    leaf.weight.data = torch.eye(16)
    x = torch.randn(32, 16) * 100
    x[0, 0], x[0, 1] = 1000.0, -1000.0
    with torch.no_grad():
        y = leaf(x).float()
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(y, expected)
    zoo.update_delayed_scales(leaf)
    with torch.no_grad():
        y = leaf(x).float()
    scale = torch.tensor(448.0) / 1000
    expected = ((x * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale).bfloat16()
    assert torch.allclose(y, expected.float(), rtol=2**-7, atol=0)
    assert y[0, 0] == 1000


def test_the_scale_of_a_step_does_not_see_its_own_values():
    """Computed from the steps before: a recomputed forward reads the same number."""
    leaf = Linear(16, 16, role="ffn")
    leaf.precision = precision()
    x = torch.randn(8, 16)
    with torch.no_grad():
        once, again = leaf(x), leaf(x)
        assert torch.equal(once, again)
        assert (leaf.operand_scales == 1).all()
        peaks = leaf.operand_peaks.clone()
        leaf(x / 2)  # a smaller micro-batch of the same step raises nothing
    assert torch.equal(leaf.operand_peaks, peaks)
    assert peaks[0] == x.abs().amax()


def test_every_expert_has_scales_of_its_own():
    """Each follows the rule by itself; an expert without rows keeps its scale."""
    leaf = ExpertLinear(3, 16, 8, role="expert")
    leaf.precision = p = precision(history=2)
    references = [[Reference(largest_of(p, o), 2, 0) for _ in range(3)] for o in OPERANDS]
    for counts in ([5, 0, 3], [0, 6, 2], [4, 0, 4], [0, 0, 8]):
        factor = torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(torch.tensor(counts))[:, None]
        x = (factor * torch.randn(8, 16)).requires_grad_()
        dy = torch.randn(8, 8).bfloat16() * factor.bfloat16()
        leaf.weight.grad = None
        leaf(x, torch.tensor(counts)).backward(dy)
        zoo.update_delayed_scales(leaf)
        expected = torch.empty(6, 3)
        for e, (rows, grads) in enumerate(zip(x.split(counts), dy.split(counts), strict=True)):
            found = {
                "x": rows.abs().amax() if len(rows) else torch.tensor(0.0),
                "w": leaf.weight[e].abs().amax(),
                "dy": grads.float().abs().amax() if len(rows) else torch.tensor(0.0),
            }
            for o, operand in enumerate(OPERANDS):
                expected[o, e] = references[o][e].step(found[operand.split("_")[1]])
        assert torch.equal(leaf.operand_scales, 1.0 / expected), counts
        assert leaf.weight.grad.isfinite().all()
    assert leaf.peak_history.shape == (2, 6, 3)
    assert len(leaf.operand_scales[0].unique()) == 3


def test_an_expert_alone_reads_and_raises_its_own():
    """`ExpertLinear.one` stands on the same scales as the grouped product."""
    leaf = ExpertLinear(3, 16, 8, role="expert")
    leaf.precision = precision(history=2)
    x, counts = torch.randn(9, 16) * 50, torch.tensor([3, 3, 3])
    with torch.no_grad():
        leaf(x, counts)
        zoo.update_delayed_scales(leaf)
        grouped = leaf(x, counts)
        peaks = leaf.operand_peaks.clone()
        assert torch.equal(leaf.one(x[3:6], 1), grouped[3:6])
        leaf.one(x[3:6] * 8, 1)
    assert leaf.operand_peaks[0, 1] == 8 * peaks[0, 1]
    assert torch.equal(leaf.operand_peaks[0, ::2], peaks[0, ::2])


def test_nvfp4_takes_a_delayed_tensor_scale():
    leaf = Linear(32, 16, role="ffn")
    leaf.precision = p = precision(history=2, forward="nvfp4", backward="nvfp4")
    x = torch.randn(32, 32, requires_grad=True)
    for _ in range(2):
        y = leaf(x)
        y.square().sum().backward()
        zoo.update_delayed_scales(leaf)
    expected = 1 / (torch.tensor(largest_of(p, "fprop_x")) / x.detach().abs().amax())
    assert leaf.operand_scales[0] == expected
    exact = x.detach() @ leaf.weight.detach().T
    assert (y.float() - exact).norm() / exact.norm() < 0.2


def test_scales_and_history_are_saved_and_peaks_are_not():
    leaf = Linear(16, 16, role="ffn")
    leaf.precision = precision(history=2)
    with torch.no_grad():
        leaf(torch.randn(4, 16))
    zoo.update_delayed_scales(leaf)
    state = leaf.state_dict()
    assert set(state) == {"weight", "operand_scales", "peak_history"}
    other = Linear(16, 16, role="ffn")
    other.precision = leaf.precision
    other.load_state_dict(state)
    assert torch.equal(other.peak_history, leaf.peak_history)
    assert (other.operand_peaks == 0).all()
