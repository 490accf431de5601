"""A precision that moves while a run trains: streams, switches, delayed scales, and resume."""

import sys
from copy import deepcopy

import pytest
import torch
from recipe_toys import evaluate_briefly, killed_after, rows, timeless, tiny_recipe
from safetensors.torch import load_file

import zoo
from layers.linear import Linear
from layers.precision import PRESETS, PrecisionPolicy, Switch, apply_policy, fake_quantize, leaves
from layers.precision.policy import HIGH_ROLES
from recipes import cli
from recipes.precision_callbacks import LivePrecision, precision_callbacks
from recipes.sample import continue_text
from recipes.task import LanguageModelTask
from recipes.train import SAMPLE_PROMPT, train

MOE = {"name": "moe", "n_experts": 4, "d_expert": 32}
STEPS, SWITCH = 4, 2
SMALL = (
    "data.seq_len=32",
    "data.batch_size=4",
    "data.eval_bytes_per_domain=512",
    "model.max_seq_len=64",
    f"trainer.max_steps={STEPS}",
    "trainer.checkpoint_every_steps=1",
    "trainer.eval_every_steps=2",
    "trainer.log_every_steps=1",
)
SR = {"format": "mxfp4", "scale_rule": "rceil", "rounding": "stochastic"}


def delayed(name, **options):
    return {"format": name, "scope": "delayed", "history": 2, **options}


# Everything that moves at once: delayed scales, random rounding, signs drawn per step, a switch
POLICY = {
    "default": {
        "all": delayed("fp8_e4m3"),
        "dgrad_dy": delayed("fp8_e5m2", rounding="stochastic"),
        "wgrad_dy": {**SR, "hadamard": 32, "signs": "step"},
        "wgrad_x": {"format": "mxfp4", "hadamard": 32, "signs": "step"},
    },
    "rules": [{"roles": list(HIGH_ROLES), "use": "bf16"}],
    "seed": 5,
    "schedule": [{"at": SWITCH / STEPS, "use": {"all": SR}, "name": "blocks.*.ffn.*"}],
}


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    evaluate_briefly(monkeypatch)
    monkeypatch.setattr("recipes.train.SAMPLE_TOKENS", 12)


def recipe_of(policy, *overrides, ffn=MOE):
    recipe = tiny_recipe(ffn, *SMALL, *overrides)
    return type(recipe)(**{**vars(recipe), "precision": deepcopy(policy)})


def tensors(run):
    return load_file(run / "weights.safetensors")


def assert_same(one, other):
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of POLICY, and its result."""
    with pytest.MonkeyPatch.context() as patch:
        evaluate_briefly(patch)
        patch.setattr("recipes.train.SAMPLE_TOKENS", 12)
        out = tmp_path_factory.mktemp("whole")
        return out, train(recipe_of(POLICY), out)


# Resume


def test_the_run_does_what_the_policy_says(whole):
    """Otherwise the tests below would hold of a run in which nothing moves."""
    state = tensors(whole[0])
    scales = {n: t for n, t in state.items() if n.endswith("operand_scales")}
    history = {n: t for n, t in state.items() if n.endswith("peak_history")}
    assert len(scales) == len(history) == 8  # two blocks of two attention and two expert leaves
    assert all((t[0] != 1).all() for t in scales.values())  # fprop_x of every leaf and expert
    assert all(len(t) == 2 and (t[:, 0] > 0).all() for t in history.values())
    assert scales["blocks.0.ffn.experts.gate_up.operand_scales"].shape == (6, 4)


@pytest.mark.parametrize("step", [1, SWITCH, 3, STEPS])
def test_cut_anywhere_it_ends_as_the_whole(step, whole, tmp_path, monkeypatch):
    """Weights, curve, scales and histories, cut before the switch, at it, after it, at the end."""
    recipe = recipe_of(POLICY)
    with killed_after(monkeypatch, step):
        train(recipe, tmp_path)
    found = train(recipe, tmp_path)
    assert timeless(found) == timeless(whole[1])
    assert rows(tmp_path) == rows(whole[0])
    assert_same(whole[0], tmp_path)


def test_a_switch_to_delayed_scales_is_resumed_too(tmp_path, monkeypatch):
    """The buffers that only the switch needs are there from the start."""
    policy = {"base": "mxfp8", "schedule": [{"at": 3, "use": POLICY["default"]}]}
    recipe = recipe_of(policy, "trainer.max_steps=5")
    train(recipe, tmp_path / "whole")
    with killed_after(monkeypatch, 4):
        train(recipe, tmp_path / "cut")
    train(recipe, tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_recomputing_and_evaluating_change_nothing(whole, tmp_path):
    """Activation checkpointing draws the same bits; evaluations leave no peak and no draw."""
    overrides = ["trainer.activation_checkpointing=true", "trainer.eval_every_steps=1"]
    train(recipe_of(POLICY, *overrides), tmp_path)
    assert_same(whole[0], tmp_path)


def test_another_seed_of_the_policy_is_another_run(whole, tmp_path):
    train(recipe_of(POLICY | {"seed": 6}), tmp_path)
    name = "blocks.0.ffn.experts.down.weight"
    assert not torch.equal(tensors(whole[0])[name], tensors(tmp_path)[name])


def test_a_finished_run_computes_as_its_last_step_did(whole):
    """`zoo generate` continues as the run itself did, formats and streams alike."""
    out, result = whole
    said = continue_text(out, SAMPLE_PROMPT, max_new_tokens=12, temperature=1.0, top_k=None, seed=0)
    assert said == result["sample"]["text"]


# What moves when


def watch(monkeypatch, *names):
    """For each micro-batch, the keys, precision and scale of the leaves named."""
    seen = []
    step = LanguageModelTask.training_step

    def spy(self, batch, batch_idx):
        found = leaves(self.model)
        seen.append([
            (leaf.precision, *((t.clone() if t is not None else None)
             for t in (leaf.rounding_key, leaf.operand_scales)))
            for leaf in (found[name] for name in names)
        ])  # fmt: skip
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModelTask, "training_step", spy)
    return seen


def test_every_micro_batch_draws_and_every_step_scales(tmp_path, monkeypatch):
    """Two micro-batches of a step: other draws but for weights, and the same delayed scales."""
    seen = watch(monkeypatch, "blocks.0.ffn.experts.down", "blocks.1.ffn.experts.down")
    overrides = ["trainer.accumulate=2", "data.batch_size=4"]
    train(recipe_of(POLICY, *overrides), tmp_path)
    keys = torch.stack([torch.stack([key for _, key, _ in leaf]) for leaf in seen])  # [8, 2, 2]
    assert keys.shape == (8, 2, 2)
    assert keys[..., 1].unique().numel() == 16  # activations: every micro-batch and leaf
    assert keys[..., 0].unique().numel() == 8  # weights: every step and leaf
    assert (keys[0::2, :, 0] == keys[1::2, :, 0]).all()
    scales = torch.stack([leaf[0][2] for leaf in seen])  # [8, 6, E]
    assert torch.equal(scales[0::2], scales[1::2])
    assert (scales[0] == 1).all()
    assert (scales[0, 0] != scales[2, 0]).all()
    last = tensors(tmp_path)["blocks.0.ffn.experts.down.peak_history"]
    assert len(last.unique(dim=0)) == 2  # one row a step, not one a micro-batch


def test_switches_at_steps_shares_and_layers(tmp_path, monkeypatch):
    policy = {
        "base": "mxfp8",
        "rules": [{"roles": list(HIGH_ROLES), "use": "bf16"}],
        "schedule": [
            {"at": 0.5, "use": "bf16", "gemms": ["fprop"]},
            {"at": 3, "use": "bf16", "layers": 0},
        ],
    }
    seen = watch(monkeypatch, "blocks.0.attention.out", "blocks.1.attention.out", "head")
    train(recipe_of(policy, "trainer.max_steps=4"), tmp_path)

    def formats(leaf):
        return leaf[0].fprop_x.format, leaf[0].dgrad_w.format, leaf[0].wgrad_x.format

    low, high = ("mxfp8_e4m3",) * 3, ("bf16",) * 3
    forward = ("bf16", "mxfp8_e4m3", "mxfp8_e4m3")
    first, last, head = ([formats(step[i]) for step in seen] for i in range(3))
    assert first == [low, low, forward, high]
    assert last == [high, high, high, high]  # the preset's own tail
    assert head == [high] * 4


def test_a_forward_only_switch_leaves_the_backward_low():
    torch.manual_seed(0)
    leaf = torch.nn.ModuleDict({"ffn": Linear(64, 32, role="ffn")})
    policy = PrecisionPolicy.of({
        "default": "mxfp8_e4m3", "schedule": [{"at": 1, "use": "bf16", "gemms": "fprop"}]
    })  # fmt: skip
    x, dy = torch.randn(32, 64, requires_grad=True), torch.randn(32, 32)
    w = leaf["ffn"].weight

    def run(step):
        x.grad = w.grad = None
        apply_policy(leaf, policy, active=policy.active(step, 2))
        y = leaf["ffn"](x)
        y.backward(dy.bfloat16())
        return y.detach(), x.grad, w.grad

    before, after = run(0), run(1)
    assert torch.equal(after[0], (x.bfloat16() @ w.bfloat16().T))
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])
    low = fake_quantize(dy.bfloat16().float(), "mxfp8_e4m3").bfloat16()
    low_w = fake_quantize(w.detach().T.contiguous(), "mxfp8_e4m3").T.bfloat16()
    assert torch.equal(after[1], (low @ low_w).float())


def test_rounding_leaves_the_global_generator_alone(tmp_path, monkeypatch):
    policy = PrecisionPolicy.of(deepcopy(POLICY))
    model = zoo.build({"model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "ffn": MOE}}, policy)
    tokens = torch.arange(64).view(2, 32)
    state = torch.get_rng_state()
    for step in range(2):
        zoo.seed_rounding(model, 3, step)
        model(tokens).logits.float().square().sum().backward()
        zoo.update_delayed_scales(model)
    zoo.set_precision(model, policy, step=5, max_steps=8)
    model(tokens).logits.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_compiled_leaf_draws_and_switches_as_an_eager_one():
    """Output and gradients bit for bit, at two steps of random rounding and one after a switch."""
    policy = PrecisionPolicy.of({
        "default": {"all": SR}, "schedule": [{"at": 2, "use": "bf16", "gemms": "fprop"}]
    })  # fmt: skip
    eager = torch.nn.ModuleDict({"ffn": Linear(64, 32, role="ffn")})
    compiled = deepcopy(eager)
    compiled["ffn"].compile()
    x, dy = torch.randn(32, 64), torch.randn(32, 32).bfloat16()

    def run(module, step):
        apply_policy(module, policy, active=policy.active(step, 3))
        zoo.seed_rounding(module, 1, step)
        module.zero_grad()
        leaf_x = x.clone().requires_grad_()
        y = module["ffn"](leaf_x)
        y.backward(dy)
        return y.detach(), leaf_x.grad, module["ffn"].weight.grad.clone()

    found = [[run(module, step) for step in range(3)] for module in (eager, compiled)]
    for mine, theirs in zip(*found, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one, other)
    first, second, switched = found[0]
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(switched[0], x.bfloat16() @ eager["ffn"].weight.bfloat16().T)


# What costs nothing, and what is refused


@pytest.mark.parametrize("name", list(PRESETS))
def test_what_never_moves_has_no_callback(name):
    recipe = tiny_recipe("mlp", f"precision={name}")
    moves = any(
        spec.is_random
        for use in (PRESETS[name].default, *(rule.use for rule in PRESETS[name].rules))
        for spec in (use.dgrad_dy, use.wgrad_dy, use.fprop_x, use.fprop_w, use.dgrad_w, use.wgrad_x)
    )
    assert [type(c) for c in precision_callbacks(recipe)] == [LivePrecision] * moves


def test_a_state_dict_fits_at_every_step():
    model = {"d_model": 32, "n_layers": 1, "n_heads": 2, "ffn": MOE}
    policy = {"default": "bf16", "schedule": [{"at": 3, "use": POLICY["default"]},
                                              {"at": 0.9, "use": "bf16"}]}  # fmt: skip
    built = [zoo.build({"model": model}, policy, step=s, max_steps=10) for s in (0, 3, 9)]
    assert "head.operand_scales" not in built[0].state_dict()  # high by default, never switched
    assert "blocks.0.ffn.experts.down.operand_scales" in built[0].state_dict()
    for other in built[1:]:
        other.load_state_dict(built[0].state_dict())
    labels = [m.blocks[0].ffn.experts.down.precision.label for m in built]
    assert labels == ["bf16", "fp8_e4m3/fp8_e5m2/mxfp4", "bf16"]


@pytest.mark.parametrize(
    ("step", "max_steps", "message"),
    [
        (1, None, "switches at a share of all steps: give max_steps with step=1"),
        (-1, None, "step must be 0 or more, got -1"),
        (8, 8, r"step must be in \[0, max_steps=8\), got 8"),
    ],
)
def test_a_step_without_meaning_is_refused(step, max_steps, message):
    leaf = torch.nn.ModuleDict({"ffn": Linear(32, 32, role="ffn")})
    policy = {"default": "bf16", "schedule": [{"at": 0.5, "use": "mxfp4"}]}
    with pytest.raises(ValueError, match=message):
        zoo.set_precision(leaf, policy, step=step, max_steps=max_steps)


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ("{at: 1.5, use: bf16}", "`at` is a step or a share in [0, 1], got 1.5"),
        ("{at: -2, use: bf16}", "`at` is a step or a share in [0, 1], got -2"),
        ("{at: true, use: bf16}", "`at` is a step or a share in [0, 1], got True"),
        ("{use: bf16}", "a precision switch needs 'at'"),
        ("{at: 0.5}", "a precision rule needs 'use'"),
        ("{at: 0.5, use: bf16, gemms: [fprob]}", "Did you mean 'fprop'"),
        ("{at: 0.5, use: bf16, gemms: []}", "`gemms` is empty"),
        ("{at: 0.5, use: bf17}", "Did you mean 'bf16'"),
        ("{at: 0.5, use: bf16, when: 3}", "field of a precision switch"),
        ("{at: 0.5, use: bf16, name: block.*}", "matches no leaf"),
        ("{at: 0.5, use: bf16, layers: 9}", "layers=9 is out of range"),
    ],
)
def test_zoo_train_refuses_a_wrong_schedule(switch, message, tmp_path, capsys, monkeypatch):
    schedule = f"precision={{base: mxfp8, schedule: [{switch}]}}"
    monkeypatch.setattr(sys, "argv", ["zoo", "train", "debug", schedule, f"out={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in err
    assert err.count("\n") == 1


def test_switch_reads_back():
    plain = {"at": 0.82, "use": "bf16", "gemms": ["fprop"], "layers": "last 15%"}
    assert Switch.of(Switch.of(plain).to_plain()) == Switch.of(plain)
