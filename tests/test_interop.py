"""Weights of a layer in other libraries' names and layouts: where each number goes, and errors."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import zoo
from zoo.interop import export_moe, import_moe, moe_sizes
from zoo.layouts import BODIES, LAYOUTS, NAMINGS

E, D, F = 3, 4, 5
MODELS = pytest.mark.parametrize("model", NAMINGS)
STORED = pytest.mark.parametrize(
    ("model", "layout"),
    [(m, how) for m in NAMINGS for how in LAYOUTS if NAMINGS[m].body == LAYOUTS[how].body],
)


def ours(model, n_shared=2, dtype=torch.float32):
    """A layer's tensors, every number another: also where a matrix were laid on its side."""
    shapes = {"router.weight": [E, D]}
    shapes |= BODIES[NAMINGS[model].body](E, D, F)
    if NAMINGS[model].shared and n_shared:
        wide = n_shared * F
        shapes |= {"shared.gate_up.weight": [2 * wide, D], "shared.down.weight": [D, wide]}
        shapes |= {"shared_gate.weight": [1, D]} if NAMINGS[model].shared_gate else {}
    shapes |= {name: [E] for name in NAMINGS[model].others}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


@STORED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_shared", [0, 2])
def test_there_and_back_gives_the_same_bits(model, layout, dtype, n_shared):
    state = ours(model, n_shared, dtype)
    theirs = export_moe(state, model, layout=layout, prefix="model.layers.1.mlp.")
    back = import_moe(theirs, model, layout=layout, prefix="model.layers.1.mlp.")
    same_bits(back, state)
    same_bits(export_moe(back, model, layout=layout, prefix="model.layers.1.mlp."), theirs)


@STORED
def test_what_is_exported_can_be_saved(model, layout, tmp_path):
    state = ours(model)
    theirs = export_moe(state, model, layout=layout)
    owned = {t.untyped_storage().data_ptr() for t in theirs.values()}
    assert len(owned) == len(theirs)  # torch.save would write a view's whole storage, each time
    save_file(theirs, tmp_path / "layer.safetensors")
    same_bits(import_moe(load_file(tmp_path / "layer.safetensors"), model, layout=layout), state)


def place(layout, theirs, expert, neuron, d):
    """Where a layout has the gate, the up and the down weight of one neuron and one input."""
    if layout == "per_expert":
        gate, up, down = (
            theirs[f"experts.{expert}.{part}.weight"] for part in ("w1", "w3", "w2")
        )  # Mixtral's names
        return gate[neuron, d], up[neuron, d], down[d, neuron]
    gate_up, down = theirs["experts.gate_up_proj"][expert], theirs["experts.down_proj"][expert]
    if layout == "packed":
        return gate_up[neuron, d], gate_up[F + neuron, d], down[d, neuron]
    if layout == "transposed":
        return gate_up[d, neuron], gate_up[d, F + neuron], down[neuron, d]
    return gate_up[d, 2 * neuron], gate_up[d, 2 * neuron + 1], down[neuron, d]


@pytest.mark.parametrize("layout", [how for how in LAYOUTS if LAYOUTS[how].body == "gated"])
def test_each_number_stands_in_its_place(layout):
    state = ours("mixtral")
    theirs = export_moe(state, "mixtral", layout=layout)
    for e in range(E):
        for n in range(F):
            for d in range(D):
                gate, up, down = place(layout, theirs, e, n, d)
                assert gate == state["experts.gate_up.weight"][e, n, d]
                assert up == state["experts.gate_up.weight"][e, F + n, d]
                assert down == state["experts.down.weight"][e, d, n]


def test_each_number_of_gpt_oss_stands_in_its_place():
    state = ours("gpt_oss")
    theirs = export_moe(state, "gpt_oss")
    assert torch.equal(theirs["router.bias"], state["router.logit_bias"])
    assert torch.equal(theirs["experts.down_proj_bias"], state["experts.down.bias"])
    for e in range(E):
        for n in range(F):
            bias = theirs["experts.gate_up_proj_bias"][e, 2 * n : 2 * n + 2]
            assert torch.equal(bias, state["experts.gate_up.bias"][e, [n, F + n]])
            for d in range(D):
                gate, up, down = place("interleaved", theirs, e, n, d)
                assert gate == state["experts.gate_up.weight"][e, n, d]
                assert up == state["experts.gate_up.weight"][e, F + n, d]
                assert down == state["experts.down.weight"][e, d, n]


def test_the_names_of_switch():
    state = ours("switch")
    theirs = export_moe(state, "switch", prefix="mlp.")
    parts = {"wi": "experts.up.weight", "wo": "experts.down.weight"}
    names = {f"mlp.experts.expert_{e}.{part}.weight" for e in range(E) for part in parts}
    assert theirs.keys() == names | {"mlp.router.classifier.weight"}
    for e in range(E):
        for part, own in parts.items():
            assert torch.equal(theirs[f"mlp.experts.expert_{e}.{part}.weight"], state[own][e])


def test_the_names_of_deepseek_v3_on_disk():
    state = ours("deepseek_v3")
    theirs = export_moe(state, "deepseek_v3", layout="per_expert")
    parts = ("gate_proj", "up_proj", "down_proj")
    experts = {f"experts.{e}.{part}.weight" for e in range(E) for part in parts}
    shared = {f"shared_experts.{part}.weight" for part in parts}
    router = {"gate.weight", "gate.e_score_correction_bias"}
    assert theirs.keys() == experts | shared | router
    gate, up = state["shared.gate_up.weight"].chunk(2)
    assert torch.equal(theirs["shared_experts.gate_proj.weight"], gate)
    assert torch.equal(theirs["shared_experts.up_proj.weight"], up)
    assert torch.equal(theirs["gate.e_score_correction_bias"], state["router.bias"])


@MODELS
def test_a_layer_takes_what_is_imported(model):
    state = ours(model)
    router = model if model.startswith(("deepseek", "llama")) else {"name": "top_k"}
    if model == "gpt_oss":
        router["logit_bias"] = True
    said = {"activation": {"gpt_oss": "gpt_oss", "switch": "relu"}.get(model, "silu")}
    said |= {"top_k": 1 if model == "llama4" else 2, "router": router}
    layer = zoo.create("moe", **said, **moe_sizes(state))
    layer.load_state_dict(import_moe(export_moe(state, model), model))
    same_bits(layer.state_dict(), state)
    x = torch.randn(2, 3, D)
    y = layer(x).y
    other = zoo.create("moe", **said, **moe_sizes(state))
    other.load_state_dict(import_moe(export_moe(layer.state_dict(), model), model))
    assert torch.equal(other(x).y, y)


def test_gradients_convert_as_weights_do():
    weights = {name: t.requires_grad_() for name, t in ours("deepseek_v2").items()}
    theirs = export_moe(weights, "deepseek_v2", layout="per_expert")
    probes = {name: torch.randn_like(t) for name, t in theirs.items()}
    total = torch.stack([(theirs[name] * probes[name]).sum() for name in theirs]).sum()
    got = dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))
    assert_close(got, import_moe(probes, "deepseek_v2", layout="per_expert"), rtol=0, atol=0)


def test_others_beside_the_prefix_are_not_looked_at():
    state = ours("olmoe")
    theirs = export_moe(state, "olmoe", prefix="layers.1.mlp.")
    theirs |= {"layers.10.mlp.odd": torch.zeros(1), "layers.1.norm.weight": torch.zeros(1)}
    same_bits(import_moe(theirs, "olmoe", prefix="layers.1.mlp."), state)


def test_what_needs_no_change_is_not_copied():
    theirs = export_moe(ours("mixtral"), "mixtral")
    state = import_moe(theirs, "mixtral")
    assert state["experts.gate_up.weight"] is theirs["experts.gate_up_proj"]


# Errors: one line, with the nearest name


def broken(model="deepseek_v3", layout=None, **changes):
    """Exported weights with tensors replaced (None: taken out), dots written as __."""
    theirs = export_moe(ours(model), model, layout=layout)
    for name, tensor in changes.items():
        theirs.pop(name.replace("__", "."), None)
        if tensor is not None:
            theirs[name.replace("__", ".")] = tensor
    return lambda: import_moe(theirs, model, layout=layout)


Z = torch.zeros
WRONG = {
    "a misspelt name": (
        broken(experts__down_proj=None, experts__down_prj=Z(1)),
        r"has no weight 'experts.down_prj'. Nearest: 'experts.down_proj'. Known: experts.down_proj",
    ),
    "a name too many": (broken(gate__bias=Z(E)), r"has no weight 'gate.bias'. Nearest: 'gate."),
    "a name too few": (
        broken(gate__e_score_correction_bias=None),
        r"deepseek_v3 \(packed\) lacks weight 'gate.e_score_correction_bias'",
    ),
    "no router": (
        broken(gate__weight=None, gates__weight=Z(E, D)),
        r"deepseek_v3 \(packed\) lacks weight 'gate.weight'. Nearest given: 'gates.weight'",
    ),
    "half of the shared experts": (
        broken(shared_experts__up_proj__weight=None),
        r"lacks weight 'shared_experts.up_proj.weight'. Nearest given: 'shared_experts.",
    ),
    "an expert missing": (
        broken("mixtral", "per_expert", experts__1__w3__weight=None),
        r"mixtral \(per_expert\) lacks weight 'experts.1.w3.weight'",
    ),
    "an expert too many": (
        broken("mixtral", "per_expert", experts__3__w1__weight=Z(F, D)),
        r"has no weight 'experts.3.w1.weight'.*Known: experts.\*.w1.weight, experts.\*.w2.weight",
    ),
    "another layout": (
        broken("mixtral", "packed", experts__down_proj=Z(E, F, D)),
        r"experts.down_proj must be \[3, 4, 5\], got \[3, 5, 4\]",
    ),
    "a matrix of another width": (
        broken("mixtral", "per_expert", experts__0__w1__weight=Z(F + 1, D)),
        r"experts.0.w1.weight must be \[5, 4\], got \[6, 4\]",
    ),
    "a vector for a matrix": (
        broken(gate__weight=Z(E)),
        r"gate.weight must be \[E, D\], got \[3\]",
    ),
    "a bias of another length": (
        broken(gate__e_score_correction_bias=Z(E + 1)),
        r"e_score_correction_bias must be \[3\], got \[4\]",
    ),
    "two dtypes": (
        broken("mixtral", "per_expert", experts__2__w2__weight=Z(D, F).half()),
        r"experts.2.w2.weight is torch.float16 but experts.0.w1.weight is torch.float32",
    ),
    "a model nobody knows": (
        lambda: import_moe({}, "mixtrl"),
        r"unknown model to exchange weights with 'mixtrl'. Did you mean 'mixtral'",
    ),
    "a layout nobody knows": (
        lambda: export_moe(ours("mixtral"), "mixtral", layout="pakced"),
        r"unknown layout of experts 'pakced'. Did you mean 'packed'",
    ),
    "a layout of other experts": (
        lambda: export_moe(ours("gpt_oss"), "gpt_oss", layout="packed"),
        r"experts of gpt_oss are gated with biases, layout 'packed' holds gated ones: give one of "
        r"interleaved_bias",
    ),
    "shared experts without their gate": (
        broken("qwen2_moe", shared_expert_gate__weight=None),
        r"qwen2_moe \(packed\) lacks weight 'shared_expert_gate.weight'",
    ),
    "a gate of no shared experts": (
        lambda: moe_sizes(ours("qwen2_moe", 0) | {"shared_gate.weight": Z(1, D)}),
        r"moe has no weight 'shared_gate.weight'",
    ),
    "biases of half an expert": (
        broken("gpt_oss", experts__down_proj_bias=None),
        r"lacks weight 'experts.down_proj_bias'. Nearest given: 'experts.down_proj'",
    ),
    "an ungated expert missing": (
        broken("switch", experts__expert_1__wo__weight=None),
        r"switch \(modules\) lacks weight 'experts.expert_1.wo.weight'",
    ),
    "a prefix of nothing": (
        lambda: import_moe(export_moe(ours("olmoe"), "olmoe"), "olmoe", prefix="mlp."),
        r"olmoe \(packed\): no weight's name begins with 'mlp.'",
    ),
    "a bias that they have not": (
        lambda: export_moe(ours("deepseek_v3"), "deepseek_v2"),
        r"moe, for deepseek_v2 \(packed\), has no weight 'router.bias'. Nearest: 'router.weight'",
    ),
    "shared experts that they have not": (
        lambda: export_moe(ours("deepseek_v2"), "mixtral"),
        r"has no weight 'shared.down.weight' \(and 1 more\)",
    ),
    "a bias that we have not": (
        lambda: export_moe(ours("deepseek_v2"), "deepseek_v3"),
        r"lacks weight 'router.bias'. Nearest given: 'router.weight'",
    ),
    "shared experts of an odd width": (
        lambda: moe_sizes(
            ours("deepseek_v2", 0)
            | {"shared.gate_up.weight": Z(14, D), "shared.down.weight": Z(D, 7)}
        ),
        r"shared experts 7 wide are no whole number of d_expert=5",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_are_one_line(wrong):
    act, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)
