"""Whole MoE blocks of transformers beside ours, from the same weights: outputs and all gradients.

Float32 on both sides. The tolerance is 2e-6 of the largest number of each tensor: some twenty
roundings of float32, since sums are taken in another order here and there.

Theirs of Switch takes at most `expert_capacity` tokens of each sequence; here it drops none, and
jitter, which there reaches the experts too, is off in evaluation.
"""

import pytest
import torch

import zoo
from zoo.interop import export_moe, import_moe, moe_sizes

pytestmark = pytest.mark.parity

B, S, D, F, E, K = 2, 24, 16, 12, 16, 4
SIZES = {"hidden_size": D, "num_experts_per_tok": K, "num_hidden_layers": 1, "vocab_size": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
# model: (their block, their config, our row or router); the rest of both is equal. Presets as they
# are.
BLOCKS = {
    "mixtral": (
        "MixtralSparseMoeBlock", {"num_local_experts": E, "intermediate_size": F},
        {"name": "top_k", "preset": "mixtral"},
    ),
    "olmoe": (
        "OlmoeSparseMoeBlock", {"num_experts": E, "intermediate_size": F},
        {"name": "top_k", "preset": "olmoe"},
    ),
    "qwen2_moe": (
        "Qwen2MoeSparseMoeBlock",
        {"num_experts": E, "moe_intermediate_size": F, "shared_expert_intermediate_size": 3 * F,
         "norm_topk_prob": False},
        {"name": "top_k", "preset": "qwen2"},
    ),
    "qwen3_moe": (
        "Qwen3MoeSparseMoeBlock",
        {"num_experts": E, "moe_intermediate_size": F, "norm_topk_prob": True},
        {"name": "top_k", "preset": "qwen3"},
    ),
    "deepseek_v2": (
        "DeepseekV2Moe",
        {"n_routed_experts": E, "moe_intermediate_size": F, "n_shared_experts": 2, "n_group": 8,
         "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
        {"name": "deepseek_v2", "preset": "deepseek_v2"},
    ),
    "deepseek_v3": (
        "DeepseekV3MoE",
        {"n_routed_experts": E, "moe_intermediate_size": F, "n_shared_experts": 1, "n_group": 8,
         "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
        {"name": "deepseek_v3", "preset": "deepseek_v3"},
    ),
    "llama4": (
        "Llama4TextMoe",
        {"num_local_experts": E, "intermediate_size": F, "num_experts_per_tok": 1},
        {"name": "llama4"},
    ),
    "gpt_oss": (
        "GptOssMLP", {"num_local_experts": E, "intermediate_size": F},
        {"name": "top_k", "preset": "gpt_oss"},
    ),
    "switch": (
        "SwitchTransformersSparseMLP",
        {"d_model": D, "d_ff": F, "num_experts": E, "num_experts_per_tok": 1, "expert_capacity": S},
        {"name": "top_k", "preset": "switch"},
    ),
}  # fmt: skip
# theirs, where it is not the model's name; what no tensor tells of the body
FOLDERS = {"switch": "switch_transformers"}
BODIES = {"gpt_oss": {"activation": "gpt_oss"}, "switch": {"activation": "relu"}}
CONFIGS = {"mixtral": "MixtralConfig", "olmoe": "OlmoeConfig", "qwen3_moe": "Qwen3MoeConfig",
           "deepseek_v2": "DeepseekV2Config", "deepseek_v3": "DeepseekV3Config",
           "llama4": "Llama4TextConfig", "qwen2_moe": "Qwen2MoeConfig",
           "gpt_oss": "GptOssConfig", "switch": "SwitchTransformersConfig"}  # fmt: skip


def draw(module):
    """Weights of size 1 / sqrt(in), all biases too: theirs are left empty or zero."""
    for name, tensor in module.state_dict().items():
        std = 0.3 if tensor.ndim == 1 else D**-0.5
        torch.nn.init.normal_(tensor, std=2 * std if "gate.weight" in name else std)
    return module


def theirs(model, block, options, experts="eager"):
    """A block of transformers with weights drawn, its experts run by one of their ways."""
    pytest.importorskip("transformers")
    folder = FOLDERS.get(model, model)
    modeling = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}")
    sizes = {} if model == "switch" else SIZES | HEADS
    config = getattr(modeling, CONFIGS[model])(**sizes | options)
    config._experts_implementation = experts
    return draw(getattr(modeling, block)(config).eval())


def our_block(state, model):
    options, router = BLOCKS[model][1:]
    sizes = {"top_k": options.get("num_experts_per_tok", K)} | BODIES.get(model, {})
    layer = zoo.create("moe", router=router, **sizes, **moe_sizes(state)).eval()
    layer.load_state_dict(state)
    return layer


def run(module, x, probe):
    """y and the gradients of x and of every weight, for a loss of (y * probe)."""
    x = x.clone().requires_grad_()
    out = module(x)
    y = (out if isinstance(out, torch.Tensor) else out[0]).view_as(x)
    weights = dict(module.named_parameters())
    inputs = [x, *weights.values()]
    # an expert of Switch is a module of its own, without a gradient where no token chose it
    grads = torch.autograd.grad((y * probe).sum(), inputs, materialize_grads=True)
    return y.detach(), grads[0], dict(zip(weights, grads[1:], strict=True))


def assert_near(got, expected, what):
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < 2e-6, f"{what}: {error:.2e} of its largest number"


def assert_same(model, block, layer):
    """Outputs, gradients of the input and of each weight, the latter converted as weights are."""
    x, probe = torch.randn(2, B, S, D)
    y, dx, dw = run(layer, x, probe)
    their_y, their_dx, their_dw = run(block, x, probe)
    their_dw |= {name: torch.zeros_like(b) for name, b in block.named_buffers()}  # no gradients
    expected = import_moe(their_dw, model)
    assert_near(y, their_y, "y")
    assert_near(dx, their_dx, "dx")
    assert expected.keys() - {"router.bias"} == dw.keys()
    for name, grad in dw.items():
        assert expected[name].abs().max() > 0
        assert_near(grad, expected[name], f"gradient of {name}")


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("model", BLOCKS)
def test_a_block_of_transformers_is_ours(model, experts):
    name, options, _ = BLOCKS[model]
    block = theirs(model, name, options, experts)
    assert_same(model, block, our_block(import_moe(block.state_dict(), model), model))


@pytest.mark.parametrize("model", BLOCKS)
def test_ours_is_a_block_of_transformers(model):
    """The other way: exported, a strict `load_state_dict` of theirs takes it all."""
    name, options, _ = BLOCKS[model]
    block = theirs(model, name, options)
    layer = draw(our_block(import_moe(block.state_dict(), model), model))
    block.load_state_dict(export_moe(layer.state_dict(), model))
    assert_same(model, block, layer)


def test_gpt_oss_meets_its_bounds():
    """First matrices eight times as large: gates above 7, and linear halves beyond both bounds."""
    name, options, _ = BLOCKS["gpt_oss"]
    block = theirs("gpt_oss", name, options)
    with torch.no_grad():
        block.experts.gate_up_proj.mul_(8)
    layer = our_block(import_moe(block.state_dict(), "gpt_oss"), "gpt_oss")
    seen = []
    layer.experts.gate_up.register_forward_hook(lambda *call: seen.append(call[2]))
    assert_same("gpt_oss", block, layer)
    gate, up = seen[0].chunk(2, dim=-1)
    assert (gate > 7).any()
    assert (up > 7).any()
    assert (up < -7).any()


def test_rows_of_the_catalogue_are_those_blocks():
    """`zoo.create(row)` alone settles what BLOCKS and BODIES say."""
    rows = {"gpt_oss": "gpt_oss_moe", "qwen2_moe": "qwen2_moe", "switch": "switch"}
    for model, row in rows.items():
        name, options, _ = BLOCKS[model]
        state = import_moe(theirs(model, name, options).state_dict(), model)
        top_k = options.get("num_experts_per_tok", K)
        options = {"top_k": top_k, "eval_capacity_factor": None}  # theirs of Switch drops none here
        layer = zoo.create(row, **options, **moe_sizes(state)).eval()
        layer.load_state_dict(state)
        x = torch.randn(B, S, D)
        assert torch.equal(layer(x).y, our_block(state, model)(x).y)


WHOLE = {
    "mixtral": ("MixtralForCausalLM", "model.layers.0.block_sparse_moe.", "mlp"),
    "olmoe": ("OlmoeForCausalLM", "model.layers.0.mlp.", "mlp"),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "model.layers.0.mlp.", "mlp"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "model.layers.0.mlp.", "mlp"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "model.layers.0.mlp.", "mlp"),
}


@pytest.mark.parametrize("model", WHOLE)
def test_a_layer_of_a_checkpoint_on_disk(model, tmp_path):
    """What `save_pretrained` writes, expert by expert, gives the block that wrote it."""
    from safetensors.torch import load_file

    pytest.importorskip("transformers")
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    name, prefix, part = WHOLE[model]
    _, options, _ = BLOCKS[model]
    options = {"first_k_dense_replace": 0, "decoder_sparse_step": 1} | options
    whole = getattr(modeling, name)(getattr(modeling, CONFIGS[model])(**SIZES | HEADS | options))
    block = draw(getattr(whole.model.layers[0], part))
    whole.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert f"{prefix}experts.{E - 1}.{'w2' if model == 'mixtral' else 'down_proj'}.weight" in stored
    state = import_moe(stored, model, layout="per_expert", prefix=prefix)
    packed = import_moe(block.state_dict(), model)
    assert state.keys() == packed.keys()
    assert all(torch.equal(state[k], packed[k]) for k in state)
    assert_same(model, block, our_block(state, model))
