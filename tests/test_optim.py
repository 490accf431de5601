"""Parameter groups and schedules against their closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from layers.linear import ValueTable
from recipes.optim import (
    build_optimizer,
    build_schedule,
    check_optim,
    decayed_names,
    lr_ratio,
    parameter_groups,
)
from recipes.schema import OptimConfig


class Parts(nn.Module):
    """One parameter of each kind."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.RMSNorm(4)
        self.gate = nn.Linear(4, 3)
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.expert_bias = nn.Parameter(torch.randn(3, 5))
        self.constant = ValueTable(2, 4, role="constant")
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.register_buffer("counts", torch.zeros(3, 3))


def test_matrices_are_decayed_and_vectors_are_not():
    matrices = {"embedding.weight", "gate.weight", "experts", "frozen"}
    assert decayed_names(Parts()) == matrices


def test_groups_hold_every_trainable_parameter_once():
    model = Parts()
    groups = parameter_groups(model, 0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    found = [id(p) for g in groups for p in g["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}


def test_tied_weights_are_counted_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    (group,) = parameter_groups(model, 0.1)
    assert len(group["params"]) == 1


def test_one_step_is_adamw_as_written():
    """arXiv:1711.05101, algorithm 2: after one step m_hat = g and v_hat = g^2."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    config = OptimConfig(lr=0.01, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.5 if name == "weight" else 0.0
        step = p.grad / (p.grad.abs() + config.eps)
        assert_close(p.detach(), before[name] * (1 - 0.01 * decay) - 0.01 * step)


def test_cosine_closed_form():
    config = OptimConfig(schedule="cosine", warmup_fraction=0.1, final_lr_ratio=0.1)
    ratios = [lr_ratio(i, 100, config) for i in range(101)]
    assert ratios[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert ratios[10] == max(ratios) == 1.0
    assert ratios[55] == pytest.approx(0.55)
    assert ratios[40] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2)
    assert ratios[100] == pytest.approx(0.1)
    assert lr_ratio(500, 100, config) == ratios[100]


def test_warmup_stable_decay_closed_form():
    config = OptimConfig(
        schedule="wsd", warmup_fraction=0.05, decay_fraction=0.25, final_lr_ratio=0.0
    )
    ratios = [lr_ratio(i, 400, config) for i in range(401)]
    assert ratios[0] == pytest.approx(1 / 21)
    assert ratios[20:301] == [1.0] * 281
    assert ratios[325] == pytest.approx(0.5)  # 1 - sqrt(1/4)
    assert ratios[364] == pytest.approx(0.2)  # 1 - sqrt(64/100)
    assert ratios[400] == 0.0


def test_a_trunk_serves_shorter_runs():
    """wsd runs of another length share every step before the shorter one decays."""
    config = OptimConfig(schedule="wsd", warmup_fraction=0.0, decay_fraction=0.5)
    assert [lr_ratio(i, 50, config) for i in range(25)] == [
        lr_ratio(i, 90, config) for i in range(25)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("max_steps", [1, 2, 3, 7])
def test_no_step_stands_still(schedule, max_steps):
    config = OptimConfig(schedule=schedule)
    assert all(0 < lr_ratio(i, max_steps, config) <= 1 for i in range(max_steps))


def test_the_schedule_drives_the_optimizer_and_resumes():
    model = nn.Linear(2, 2)
    config = OptimConfig(lr=0.5)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, 20)
    used = []
    for _ in range(20):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert used == pytest.approx([0.5 * lr_ratio(i, 20, config) for i in range(20)])
    again = build_schedule(build_optimizer(model, config), config, 20)
    again.load_state_dict(schedule.state_dict())
    assert again.get_last_lr() == schedule.get_last_lr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"eps": -1e-8}, "eps must be positive"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'. Did you mean 'cosine'"),
        ({"warmup_fraction": 1.5}, r"warmup_fraction must lie in \[0, 1\], got 1.5"),
        ({"final_lr_ratio": -1.0}, "final_lr_ratio must lie in"),
        (
            {"schedule": "wsd", "warmup_fraction": 0.6, "decay_fraction": 0.6},
            "warmup_fraction \\+ decay_fraction must be at most 1",
        ),
    ],
)
def test_a_config_that_cannot_work_is_refused(options, message):
    config = replace(OptimConfig(), **options)
    with pytest.raises(ValueError, match=message):
        check_optim(config)
    with pytest.raises(ValueError, match=message):
        build_optimizer(nn.Linear(2, 2), config)


def test_a_model_without_parameters_and_a_run_without_steps_are_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(nn.Identity(), OptimConfig())
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig())
    with pytest.raises(ValueError, match="max_steps must be positive, got 0"):
        build_schedule(optimizer, OptimConfig(), 0)
