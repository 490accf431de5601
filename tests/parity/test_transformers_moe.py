"""Whole MoE blocks of transformers beside ours, from the same weights: outputs and all gradients.

Float32 on both sides. The tolerance is 2e-6 of the largest number of each tensor: some twenty
roundings of float32, since sums are taken in another order here and there.

Not whole: Qwen2-MoE's gate on its shared expert, Switch's experts without a gate and gpt-oss's with
biases and a clamped activation are no options of `moe`.
"""

import pytest
import torch

import zoo
from zoo.interop import export_moe, import_moe, moe_sizes

pytestmark = pytest.mark.parity

B, S, D, F, E, K = 2, 24, 16, 12, 16, 4
SIZES = {"hidden_size": D, "num_experts_per_tok": K, "num_hidden_layers": 1, "vocab_size": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
# model: (their block, their config, our router); the rest of both is equal. Presets as they are.
BLOCKS = {
    "mixtral": (
        "MixtralSparseMoeBlock", {"num_local_experts": E, "intermediate_size": F},
        {"name": "top_k", "preset": "mixtral"},
    ),
    "olmoe": (
        "OlmoeSparseMoeBlock", {"num_experts": E, "intermediate_size": F},
        {"name": "top_k", "preset": "olmoe"},
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
}  # fmt: skip
CONFIGS = {"mixtral": "MixtralConfig", "olmoe": "OlmoeConfig", "qwen3_moe": "Qwen3MoeConfig",
           "deepseek_v2": "DeepseekV2Config", "deepseek_v3": "DeepseekV3Config",
           "llama4": "Llama4TextConfig", "qwen2_moe": "Qwen2MoeConfig",
           "gpt_oss": "GptOssConfig"}  # fmt: skip


def draw(module):
    """Weights of size 1 / sqrt(in), all biases too: theirs are left empty or zero."""
    for name, tensor in module.state_dict().items():
        std = 0.3 if tensor.ndim == 1 else D**-0.5
        torch.nn.init.normal_(tensor, std=2 * std if "gate.weight" in name else std)
    return module


def theirs(model, block, options, experts="eager"):
    """A block of transformers with weights drawn, its experts run by one of their ways."""
    pytest.importorskip("transformers")
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    config = getattr(modeling, CONFIGS[model])(**SIZES | HEADS | options)
    config._experts_implementation = experts
    return draw(getattr(modeling, block)(config))


def our_block(state, router, top_k=K):
    layer = zoo.create("moe", router=router, top_k=top_k, **moe_sizes(state))
    layer.load_state_dict(state)
    return layer


def run(module, x, probe):
    """y and the gradients of x and of every weight, for a loss of (y * probe)."""
    x = x.clone().requires_grad_()
    out = module(x)
    y = (out if isinstance(out, torch.Tensor) else out[0]).view_as(x)
    weights = dict(module.named_parameters())
    grads = torch.autograd.grad((y * probe).sum(), [x, *weights.values()])
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
    name, options, router = BLOCKS[model]
    block = theirs(model, name, options, experts)
    top_k = options.get("num_experts_per_tok", K)
    assert_same(model, block, our_block(import_moe(block.state_dict(), model), router, top_k))


@pytest.mark.parametrize("model", BLOCKS)
def test_ours_is_a_block_of_transformers(model):
    """The other way: exported, a strict `load_state_dict` of theirs takes it all."""
    name, options, router = BLOCKS[model]
    block = theirs(model, name, options)
    top_k = options.get("num_experts_per_tok", K)
    sizes = moe_sizes(import_moe(block.state_dict(), model))
    layer = draw(zoo.create("moe", router=router, top_k=top_k, **sizes))
    block.load_state_dict(export_moe(layer.state_dict(), model))
    assert_same(model, block, layer)


def test_the_routed_half_of_qwen2_moe():
    """With a shared expert of zeros: its gate is no option of `moe`."""
    options = {
        "num_experts": E, "moe_intermediate_size": F, "shared_expert_intermediate_size": 2 * F,
        "norm_topk_prob": False,
    }  # fmt: skip
    block = theirs("qwen2_moe", "Qwen2MoeSparseMoeBlock", options)
    torch.nn.init.zeros_(block.shared_expert.down_proj.weight)
    state = {k: t for k, t in block.state_dict().items() if not k.startswith("shared_expert")}
    layer = our_block(import_moe(state, "qwen3_moe"), {"name": "top_k", "preset": "qwen2"})
    x, probe = torch.randn(2, B, S, D)
    y, dx, dw = run(layer, x, probe)
    their_y, their_dx, their_dw = run(block, x, probe)
    routed = {k: g for k, g in their_dw.items() if not k.startswith("shared_expert")}
    assert_near(y, their_y, "y")
    assert_near(dx, their_dx, "dx")
    for name, grad in import_moe(routed, "qwen3_moe").items():
        assert_near(dw[name], grad, f"gradient of {name}")


def test_gpt_oss_where_its_experts_are_swiglu():
    """alpha 1, no clamp and biases that take its `up + 1` back: all else that it does is ours.

    Its biases and clamp are no options of `moe`.
    """
    options = {"num_local_experts": E, "intermediate_size": F}
    block = theirs("gpt_oss", "GptOssMLP", options)
    block.experts.alpha, block.experts.limit = 1.0, float("inf")
    torch.nn.init.zeros_(block.experts.gate_up_proj_bias)
    torch.nn.init.constant_(block.experts.gate_up_proj_bias[:, 1::2], -1.0)
    torch.nn.init.zeros_(block.experts.down_proj_bias)

    def taken(tensors):
        ours = {k: t for k, t in tensors.items() if not k.endswith("bias")}
        state = import_moe(ours, "llama4", layout="interleaved")  # their names, without the biases
        return state | {"router.logit_bias": tensors["router.bias"]}

    layer = our_block(taken(block.state_dict()), {"name": "top_k", "preset": "gpt_oss"})
    x, probe = torch.randn(2, B, S, D)
    y, dx, dw = run(layer, x, probe)
    their_y, their_dx, their_dw = run(block, x, probe)
    assert_near(y, their_y, "y")
    assert_near(dx, their_dx, "dx")
    expected = taken(their_dw)
    assert expected.keys() == dw.keys()
    for name, grad in expected.items():
        assert_near(dw[name], grad, f"gradient of {name}")


WHOLE = {
    "mixtral": ("MixtralForCausalLM", "model.layers.0.block_sparse_moe.", "mlp"),
    "olmoe": ("OlmoeForCausalLM", "model.layers.0.mlp.", "mlp"),
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
    _, options, router = BLOCKS[model]
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
    assert_same(model, block, our_block(state, router))
