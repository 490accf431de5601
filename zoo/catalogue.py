"""What there is: the FFN variants and the routers, one row each."""

from layers import memory_plus, peer, pkm, ultramem, ultramem_v2
from layers.matformer import MatFormer, MatFormerConfig
from layers.memory_plus import MemoryPlus, MemoryPlusConfig
from layers.mlp import MLP, MLPConfig
from layers.moe import MoE, MoEConfig
from layers.moe_plus_plus import PRESETS, MoEPlusPlus, MoEPlusPlusConfig
from layers.peer import PEER, PEERConfig
from layers.pkm import PKM, PKMConfig
from layers.soft_moe import SoftMoE, SoftMoEConfig
from layers.spark_ffn import SparkFFN, SparkFFNConfig
from layers.spt_ffn import SPTFFN, SPTFFNConfig
from layers.swiglu import SwiGLU, SwiGLUConfig
from layers.ultramem import UltraMem, UltraMemConfig
from layers.ultramem_v2 import UltraMemV2, UltraMemV2Config
from layers.versatile_ffn import VersatileFFN, VersatileFFNConfig
from routers import deepseek_v2, deepseek_v3, longcat, top_k
from routers.deepseek_v2 import DeepSeekV2Router, DeepSeekV2RouterConfig
from routers.deepseek_v3 import DeepSeekV3Router, DeepSeekV3RouterConfig
from routers.expert_choice import ExpertChoiceRouter, ExpertChoiceRouterConfig
from routers.factor_llm import FactorLLMRouter, FactorLLMRouterConfig
from routers.gshard import GShardRouter, GShardRouterConfig
from routers.llama4 import Llama4Router, Llama4RouterConfig
from routers.longcat import LongCatRouter, LongCatRouterConfig
from routers.noisy_top_k import NoisyTopKRouter, NoisyTopKRouterConfig
from routers.pathway import PathwayRouter, PathwayRouterConfig
from routers.random import RandomRouter, RandomRouterConfig
from routers.remoe import ReMoERouter, ReMoERouterConfig
from routers.sign_hash import SignHashRouter, SignHashRouterConfig
from routers.spt import SPTRouter, SPTRouterConfig
from routers.top_k import TopKRouter, TopKRouterConfig
from routers.vmoe import VMoERouter, VMoERouterConfig
from zoo import off
from zoo.entry import Entry
from zoo.mixtures import MIXTURES

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
        name="matformer", module=MatFormer, config=MatFormerConfig, width="d_ff",
        summary="nested FFN: its first so many hidden numbers are FFNs of their own",
        paper="arXiv:2310.07707",
        tiny={"d_model": 32, "d_ff": 64},
        presets={"gated": {"gated": True}},
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
        off=off.only_ffn_experts,
        tiny={"d_model": 32, "d_expert": 32, "n_experts": 4, "top_k": 2},
        presets=PRESETS,
    ),
    *MIXTURES,
    Entry(
        name="expert_choice", module=MoE, config=MoEConfig, width="d_expert",
        router="expert_choice",
        summary="experts take tokens, each as many; evaluation decides by thresholds, causally",
        paper="arXiv:2202.09368",
        tiny={"d_model": 32, "d_expert": 32, "n_experts": 4, "top_k": 2},
    ),
    Entry(
        name="soft_moe", module=SoftMoE, config=SoftMoEConfig, width="d_expert", tokenwise=False,
        summary="experts run on mixtures of a sequence's tokens, in evaluation of earlier ones",
        paper="arXiv:2308.00951",
        tiny={"d_model": 32, "d_expert": 32, "n_experts": 4, "slots_per_expert": 2},
    ),
    Entry(
        name="spt_ffn", module=SPTFFN, config=SPTFFNConfig, width="d_ff", router="spt",
        summary="dense FFN of which a token runs some blocks, low-rank factors as an option",
        paper="arXiv:2312.10365",
        off=off.all_blocks,
        tiny={"d_model": 32, "d_ff": 128, "n_experts": 4, "top_k": 2},
    ),
    Entry(
        name="versatile_ffn", module=VersatileFFN, config=VersatileFFNConfig, width="d_ff",
        router={"name": "top_k", "init": "truncated"}, own_norm=True,
        summary="one FFN as virtual experts in width and as a loop in depth, by difficulty",
        paper="arXiv:2512.14531", aliases=("versatile",),
        off=off.one_pass,
        tiny={"d_model": 32, "d_ff": 64, "n_experts": 4, "top_k": 2, "max_loops": 3},
    ),
    Entry(
        name="spark_ffn", module=SparkFFN, config=SparkFFNConfig, width="d_ff",
        summary="part of the input chooses some neurons, by a threshold of mean and deviation",
        paper="arXiv:2506.06644", aliases=("spark",),
        off=off.all_neurons,
        tiny={"d_model": 32, "d_ff": 96},
    ),
    Entry(
        name="pkm", module=PKM, config=PKMConfig, width="d_key",
        summary="memory of values found by product keys, queries batch-normed",
        paper="arXiv:1907.05242", aliases=("product_key_memory",),
        tiny={"d_model": 32, "n_keys": 8, "heads": 2, "top_k": 4, "d_key": 16},
        presets=pkm.PRESETS,
    ),
    Entry(
        name="peer", module=PEER, config=PEERConfig, width="d_key",
        summary="many single-neuron experts found by product keys",
        paper="arXiv:2407.04153",
        tiny={"d_model": 32, "n_keys": 8, "heads": 2, "top_k": 4, "d_key": 16},
        presets=peer.PRESETS,
    ),
    Entry(
        name="memory_plus", module=MemoryPlus, config=MemoryPlusConfig, width="d_key",
        summary="product-key memory whose output is gated by the input: Memory+, or plain Memory",
        paper="arXiv:2412.09764",
        off=off.ungated,
        tiny={"d_model": 32, "n_keys": 8, "heads": 2, "top_k": 4, "d_key": 16},
        presets=memory_plus.PRESETS,
    ),
    Entry(
        name="ultramem", module=UltraMem, config=UltraMemConfig, width="d_ff",
        summary="FFN and a memory with Tucker-decomposed keys, virtual copies, scores by core",
        paper="arXiv:2411.12364",
        off=off.without_memory,
        tiny={"d_model": 32, "d_ff": 96, "n_keys": 4, "top_k": 4, "d_key": 8, "d_value": 16},
        presets=ultramem.PRESETS,
    ),
    Entry(
        name="ultramem_v2", module=UltraMemV2, config=UltraMemV2Config, width="d_ff",
        summary="FFN and a memory of single neurons with Tucker-decomposed keys",
        paper="arXiv:2508.18756",
        off=off.without_memory,
        tiny={"d_model": 32, "d_ff": 96, "n_keys": 4, "top_k": 4, "d_key": 8, "d_value": 16},
        presets=ultramem_v2.PRESETS,
    ),
)

ROUTERS = (
    Entry(
        name="top_k", kind="router", module=TopKRouter, config=TopKRouterConfig,
        summary="softmax over the experts, the k largest, renormalised or not",
        paper="arXiv:1701.06538",
        tiny={"d_model": 16, "n_experts": 4, "top_k": 2},
        presets=top_k.PRESETS,
    ),
    Entry(
        name="noisy_top_k", kind="router", module=NoisyTopKRouter, config=NoisyTopKRouterConfig,
        summary="noise of learned size on the logits, losses of importance and load",
        paper="arXiv:1701.06538",
        tiny={"d_model": 16, "n_experts": 4, "top_k": 2},
    ),
    Entry(
        name="gshard", kind="router", module=GShardRouter, config=GShardRouterConfig,
        summary="top 2, the second expert kept at random by its weight",
        paper="arXiv:2006.16668",
        tiny={"d_model": 16, "n_experts": 4},
    ),
    Entry(
        name="vmoe", kind="router", module=VMoERouter, config=VMoERouterConfig,
        summary="noise of 1 / E on the logits, weights not renormalised, importance and load",
        paper="arXiv:2106.05974",
        tiny={"d_model": 16, "n_experts": 4, "top_k": 2},
    ),
    Entry(
        name="deepseek_v2", kind="router", module=DeepSeekV2Router, config=DeepSeekV2RouterConfig,
        summary="softmax, choice limited to the groups of the largest probabilities",
        paper="arXiv:2405.04434",
        tiny={"d_model": 16, "n_experts": 8, "top_k": 2, "n_groups": 4, "top_groups": 2},
        presets=deepseek_v2.PRESETS,
    ),
    Entry(
        name="deepseek_v3", kind="router", module=DeepSeekV3Router, config=DeepSeekV3RouterConfig,
        summary="sigmoid, choice limited to groups, balanced by a bias instead of a loss",
        paper="arXiv:2412.19437",
        tiny={"d_model": 16, "n_experts": 8, "top_k": 2, "n_groups": 4, "top_groups": 2},
        presets=deepseek_v3.PRESETS,
    ),
    Entry(
        name="llama4", kind="router", module=Llama4Router, config=Llama4RouterConfig,
        summary="sigmoid of the chosen logit, which scales the expert's input",
        paper="https://github.com/meta-llama/llama-models",
        tiny={"d_model": 16, "n_experts": 4, "top_k": 1},
    ),
    Entry(
        name="remoe", kind="router", module=ReMoERouter, config=ReMoERouterConfig,
        summary="ReLU as choice and weight, as many experts as are above zero",
        paper="arXiv:2412.14711",
        tiny={"d_model": 16, "n_experts": 4, "top_k": 2},
    ),
    Entry(
        name="expert_choice", kind="router", module=ExpertChoiceRouter,
        config=ExpertChoiceRouterConfig,
        summary="each expert takes the tokens that want it most; thresholds in evaluation",
        paper="arXiv:2202.09368",
        tiny={"d_model": 16, "n_experts": 4, "top_k": 2},
    ),
    Entry(
        name="longcat", kind="router", module=LongCatRouter, config=LongCatRouterConfig,
        summary="softmax over experts and identities, their shares steered by a bias",
        paper="arXiv:2509.01322",
        tiny={"d_model": 16, "n_experts": 4, "n_copy": 2, "top_k": 2},
        presets=longcat.PRESETS,
    ),
    Entry(
        name="sign_hash", kind="router", module=SignHashRouter, config=SignHashRouterConfig,
        summary="control: experts by a fixed hash of the hidden state, nothing learned",
        paper="doi:10.1145/509907.509965", aliases=("hash",),
        tiny={"d_model": 16, "n_experts": 4, "top_k": 2},
    ),
    Entry(
        name="random", kind="router", module=RandomRouter, config=RandomRouterConfig,
        summary="control: experts at random, nothing learned",
        paper="arXiv:2110.04260",
        tiny={"d_model": 16, "n_experts": 4, "top_k": 2},
    ),
    Entry(
        name="pathway", kind="router", module=PathwayRouter, config=PathwayRouterConfig,
        summary="MoE++'s router: logits add up over layers, balance by kind of expert",
        paper="arXiv:2410.07348",
        tiny={"d_model": 16, "n_experts": 4, "top_k": 2},
    ),
    Entry(
        name="factor_llm", kind="router", module=FactorLLMRouter, config=FactorLLMRouterConfig,
        summary="hard choice of K of N groups of neurons, each N / K times; straight through",
        paper="arXiv:2408.11855",
        tiny={"d_model": 16, "n_experts": 4, "top_k": 2},
    ),
    Entry(
        name="spt", kind="router", module=SPTRouter, config=SPTRouterConfig,
        summary="the k largest sigmoids, weight 2 p: 1 where the router is even",
        paper="arXiv:2312.10365",
        tiny={"d_model": 16, "n_experts": 4, "top_k": 2},
    ),
)
# fmt: on
