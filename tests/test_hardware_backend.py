"""A policy whose products the device's instructions compute, through the leaves and a model."""

import pytest
import torch

import zoo
from layers.linear import ExpertLinear, Linear, ValueTable
from layers.precision import PrecisionPolicy, apply_policy, hardware
from layers.precision.policy import HIGH_ROLES

FP8 = {"all": "fp8_e4m3", "dgrad_dy": "fp8_e5m2", "wgrad_dy": "fp8_e5m2", "compute": "fp32"}
ROW = {"all": {"format": "fp8_e4m3", "scope": "row"}, "compute": "fp32"}
COUNTS = torch.tensor([7, 0, 20])


def policy(use, **options):
    high = {"roles": list(HIGH_ROLES), "use": "bf16"}
    return PrecisionPolicy.of({"default": use, "rules": [high], **options})


def step(leaf, chosen, seed=0):
    """Output and gradients of one call."""
    torch.manual_seed(seed)
    experts = isinstance(leaf, ExpertLinear)
    x = torch.randn(27, 48, requires_grad=True)
    apply_policy(leaf, chosen)
    y = leaf(x, COUNTS) if experts else leaf(x)
    leaf.weight.grad = None
    y.backward(torch.randn(27, 24))
    return y.detach(), x.grad, leaf.weight.grad


@pytest.mark.parametrize("use", [FP8, ROW], ids=["tensor", "row"])
@pytest.mark.parametrize("experts", [False, True], ids=["one", "experts"])
def test_a_leaf_gives_what_its_emulation_gives(use, experts, monkeypatch):
    """Equal but for the order of float32 sums; and the instruction was really used."""
    calls, real = [], hardware.F.scaled_mm
    monkeypatch.setattr(hardware.F, "scaled_mm", lambda *a, **k: calls.append(1) or real(*a, **k))
    leaf = ExpertLinear(3, 48, 24, role="expert") if experts else Linear(48, 24, role="ffn")
    emulated = step(leaf, policy(use))
    assert not calls
    found = step(leaf, policy(use, backend="hardware"))
    assert len(calls) == (6 if experts else 3)  # an expert without rows multiplies nothing
    for mine, theirs in zip(found, emulated, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * scale)


def test_a_model_trains_on_it_and_switches_away(monkeypatch):
    config = {"d_model": 32, "n_layers": 2, "n_heads": 2, "ffn": {"name": "moe", "n_experts": 4}}
    tokens = torch.arange(64).view(2, 32)
    losses = {}
    for backend in ("emulated", "hardware"):
        torch.manual_seed(0)
        chosen = policy(ROW, backend=backend, schedule=[{"at": 2, "use": "bf16"}])
        model = zoo.build({"model": config}, chosen)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        losses[backend] = []
        for i in range(3):
            zoo.set_precision(model, chosen, step=i)
            logits = model(tokens).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses[backend].append(loss.item())
    assert losses["hardware"] == pytest.approx(losses["emulated"], rel=1e-3)


def test_it_reads_back_and_high_leaves_stay_as_they_are():
    chosen = policy(FP8, backend="hardware")
    assert PrecisionPolicy.of(chosen.to_plain()) == chosen
    head = Linear(8, 8, role="head")
    apply_policy(head, chosen)
    assert head.precision == policy(FP8).rules[0].use
    table = ValueTable(8, 16, role="memory_values")  # no product to compute
    apply_policy(table, policy("mxfp4", backend="hardware"))
    assert table.precision.backend == "hardware"


def test_what_the_device_lacks_is_refused_when_set():
    leaf = torch.nn.ModuleDict({"up": Linear(32, 32, role="ffn")})
    with pytest.raises(ValueError, match="up: backend 'hardware' has no instruction for fprop_x"):
        apply_policy(leaf, policy("mxfp4", backend="hardware"))
    assert leaf["up"].precision is None
    with pytest.raises(ValueError, match=r"'hardwear'.*Did you mean 'hardware'"):
        policy("mxfp4", backend="hardwear")
