"""What there is: the FFN variants and the routers, one row each."""

from layers.mlp import MLP, MLPConfig
from layers.moe import MoE, MoEConfig
from layers.moe_plus_plus import PRESETS, MoEPlusPlus, MoEPlusPlusConfig
from layers.swiglu import SwiGLU, SwiGLUConfig
from routers.pathway import PathwayRouter, PathwayRouterConfig
from routers.top_k import TopKRouter, TopKRouterConfig
from zoo.entry import Entry

# fmt: off
FFNS = (
    Entry(
        name="mlp", module=MLP, config=MLPConfig, width="d_ff",
        summary="two matrices and an activation: relu, gelu, relu2 or silu",
        paper="arXiv:1706.03762",
        tiny={"d_model": 32, "d_ff": 64},
    ),
    Entry(
        name="swiglu", module=SwiGLU, config=SwiGLUConfig, width="d_ff",
        summary="gated FFN: SwiGLU, GEGLU, ReGLU or bilinear",
        paper="arXiv:2002.05202",
        tiny={"d_model": 32, "d_ff": 64},
        presets={
            "geglu": {"activation": "gelu"},
            "reglu": {"activation": "relu"},
            "bilinear": {"activation": "identity"},
        },
    ),
    Entry(
        name="moe", module=MoE, config=MoEConfig, width="d_expert", router="top_k",
        summary="top-k mixture of gated experts, drops no token, shared experts as an option",
        paper="arXiv:1701.06538", aliases=("moe_swiglu",),
        tiny={"d_model": 32, "d_expert": 32, "n_experts": 4, "top_k": 2},
    ),
    Entry(
        name="moe_plus_plus", module=MoEPlusPlus, config=MoEPlusPlusConfig, width="d_expert",
        router="pathway",
        summary="FFN experts beside zero, copy and constant experts that compute nothing",
        paper="arXiv:2410.07348", aliases=("moe++",),
        tiny={"d_model": 32, "d_expert": 32, "n_experts": 4, "top_k": 2},
        presets=PRESETS,
    ),
)

ROUTERS = (
    Entry(
        name="top_k", kind="router", module=TopKRouter, config=TopKRouterConfig,
        summary="softmax over the experts, the k largest, renormalised or not",
        paper="arXiv:1701.06538",
        tiny={"d_model": 16, "n_experts": 4, "top_k": 2},
    ),
    Entry(
        name="pathway", kind="router", module=PathwayRouter, config=PathwayRouterConfig,
        summary="MoE++'s router: logits add up over layers, balance by kind of expert",
        paper="arXiv:2410.07348",
        tiny={"d_model": 16, "n_experts": 4, "top_k": 2},
    ),
)
# fmt: on
