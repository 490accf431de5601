"""Published mixtures of experts, one row each: the parts of `moe` put together as their papers do.

Numbers of experts are the papers' own, or, where these are hundreds, halved until they suit small
models with choices halved alike: the share of experts that runs is the paper's.
"""

from typing import Any

from layers.moe import MoE, MoEConfig
from layers.moe_plus_plus import MoEPlusPlus, MoEPlusPlusConfig
from zoo.entry import Entry

TINY: dict[str, Any] = {"d_model": 32, "d_expert": 32, "n_experts": 4, "top_k": 2}

# fmt: off
MIXTURES = (
    Entry(
        name="deepseek_moe", module=MoE, config=MoEConfig, width="d_expert",
        router={"name": "top_k", "preset": "deepseek_moe"},
        summary="many narrow experts of which 6 run, beside 2 shared ones",
        paper="arXiv:2401.06066",
        defaults={"n_experts": 64, "top_k": 6, "n_shared": 2},
        tiny=TINY,
    ),
    Entry(
        name="deepseek_v2_moe", module=MoE, config=MoEConfig, width="d_expert",
        router={"name": "deepseek_v2", "preset": "deepseek_v2"},
        summary="experts in 8 groups, each token's from 3 of them, beside 2 shared ones",
        paper="arXiv:2405.04434",
        defaults={"n_experts": 80, "top_k": 3, "n_shared": 2},  # 160, 6
        tiny={**TINY, "n_experts": 8, "n_groups": 4, "top_groups": 2},
    ),
    Entry(
        name="deepseek_v3_moe", module=MoE, config=MoEConfig, width="d_expert",
        router={"name": "deepseek_v3", "preset": "deepseek_v3"},
        summary="sigmoid scores in groups, balanced by a bias instead of a loss, 1 shared expert",
        paper="arXiv:2412.19437",
        defaults={"n_experts": 128, "top_k": 4, "n_shared": 1},  # 256, 8
        tiny={**TINY, "n_experts": 8, "n_groups": 4, "top_groups": 2},
    ),
    Entry(
        name="gpt_oss_moe", module=MoE, config=MoEConfig, width="d_expert",
        router={"name": "top_k", "preset": "gpt_oss"},
        summary="clamped SwiGLU whose linear half is shifted by one, biases everywhere",
        paper="arXiv:2508.10925",
        defaults={"n_experts": 32, "top_k": 4, "activation": "gpt_oss", "bias": True},
        tiny=TINY,
    ),
    Entry(
        name="granite_moe", module=MoE, config=MoEConfig, width="d_expert",
        router={"name": "top_k", "preset": "granite"},
        summary="many narrow experts of which 8 run, weights a softmax over the chosen",
        paper="https://github.com/ibm-granite/granite-3.0-language-models",
        defaults={"n_experts": 32, "top_k": 8},
        tiny=TINY,
    ),
    Entry(
        name="gshard_moe", module=MoE, config=MoEConfig, width="d_expert", router="gshard",
        summary="ungated ReLU experts, top 2, the second kept at random by its weight",
        paper="arXiv:2006.16668",
        defaults={"n_experts": 16, "activation": "relu", "gated": False},
        tiny=TINY,
        # 2 T / E slots, first choices before second ones, which looks ahead: so not the default
        presets={"capacity": {"capacity_factor": 1.0, "priority": "choice"}},
    ),
    Entry(
        name="hash_moe", module=MoE, config=MoEConfig, width="d_expert", router="sign_hash",
        summary="control: experts by a fixed hash of the hidden state, no gate is learned",
        paper="doi:10.1145/509907.509965",
        tiny=TINY,
    ),
    Entry(
        name="identity_moe", module=MoEPlusPlus, config=MoEPlusPlusConfig, width="d_expert",
        # scale 1: weights sum to 1 / 12 at first; LongCat-Flash's, 12 of 768 times 6, to 3 / 32
        router="longcat",
        summary="FFN experts beside identities, a bias steers how many of each run",
        paper="arXiv:2509.01322",
        defaults={
            "n_experts": 32, "n_copy": 16, "n_constant": 0, "n_zero": 0, "top_k": 4,
            "capacity_factor": None, "tau": 1.0,
        },
        tiny={**TINY, "n_copy": 2},
    ),
    Entry(
        name="llama4_moe", module=MoE, config=MoEConfig, width="d_expert", router="llama4",
        summary="top 1, a sigmoid scales the expert's input, beside a shared expert",
        paper="https://github.com/meta-llama/llama-models",
        defaults={"n_experts": 16, "top_k": 1, "n_shared": 1},
        tiny={**TINY, "top_k": 1},
    ),
    Entry(
        name="mixtral_moe", module=MoE, config=MoEConfig, width="d_expert",
        router={"name": "top_k", "preset": "mixtral"},
        summary="2 of 8 wide experts, weights a softmax over the chosen",
        paper="arXiv:2401.04088",
        defaults={"n_experts": 8, "top_k": 2},
        tiny=TINY,
    ),
    Entry(
        name="noisy_top_k_moe", module=MoE, config=MoEConfig, width="d_expert",
        router="noisy_top_k",
        summary="ungated ReLU experts, noise of learned size, losses of importance and load",
        paper="arXiv:1701.06538",
        defaults={"n_experts": 32, "top_k": 4, "activation": "relu", "gated": False},
        tiny=TINY,
    ),
    Entry(
        name="olmoe", module=MoE, config=MoEConfig, width="d_expert",
        router={"name": "top_k", "preset": "olmoe"},
        summary="8 of 64 narrow experts, probabilities as they are",
        paper="arXiv:2409.02060",
        defaults={"n_experts": 64, "top_k": 8},
        tiny=TINY,
    ),
    Entry(
        name="qwen2_moe", module=MoE, config=MoEConfig, width="d_expert",
        router={"name": "top_k", "preset": "qwen2"},
        summary="4 of 60 experts, beside 4 shared ones under a sigmoid gate of their own",
        paper="arXiv:2407.10671",
        defaults={"n_experts": 60, "top_k": 4, "n_shared": 4, "shared_gate": True},
        tiny={**TINY, "n_shared": 2},
    ),
    Entry(
        name="qwen3_moe", module=MoE, config=MoEConfig, width="d_expert",
        router={"name": "top_k", "preset": "qwen3"},
        summary="8 of 128 narrow experts, balanced over the global batch",
        paper="arXiv:2505.09388",
        defaults={"n_experts": 128, "top_k": 8},
        tiny=TINY,
    ),
    Entry(
        name="random_moe", module=MoE, config=MoEConfig, width="d_expert", router="random",
        summary="control: experts at random, no gate is learned",
        paper="arXiv:2110.04260",
        tiny=TINY,
    ),
    Entry(
        name="remoe", module=MoE, config=MoEConfig, width="d_expert", router="remoe",
        summary="ReLU as choice and weight, 1 of 8 experts on average, held there by a penalty",
        paper="arXiv:2412.14711",
        defaults={"n_experts": 8, "top_k": 1},
        tiny=TINY,
    ),
    Entry(
        name="switch", module=MoE, config=MoEConfig, width="d_expert",
        router={"name": "top_k", "preset": "switch"},
        summary="top 1 of ungated ReLU experts, weighed by its probability, within a capacity",
        paper="arXiv:2101.03961",
        defaults={
            "n_experts": 16, "top_k": 1, "activation": "relu", "gated": False,
            "capacity_factor": 1.25, "eval_capacity_factor": 2.0,
        },
        tiny={**TINY, "top_k": 1},
        presets={"dropless": {"capacity_factor": None, "eval_capacity_factor": None}},
    ),
    Entry(
        name="vmoe", module=MoE, config=MoEConfig, width="d_expert", router="vmoe",
        summary="ungated GELU experts with biases, a little noise, importance and load",
        paper="arXiv:2106.05974",
        defaults={"n_experts": 32, "activation": "gelu", "gated": False, "bias": True},
        tiny=TINY,
        # tokens that are surest of their choice first: it looks ahead, so not the default
        presets={"batch_priority": {
            "capacity_factor": 1.05, "eval_capacity_factor": 1.05, "priority": "batch",
        }},
    ),
)
# fmt: on
