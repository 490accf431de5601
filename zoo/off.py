"""What is left of a variant when its idea is switched off: the rows' `off`, for controls."""

from collections.abc import Mapping
from typing import Any

from layers.memory.beside import BesideConfig
from layers.moe_plus_plus import MoEPlusPlusConfig
from layers.spt_ffn import SPTFFNConfig


def only_ffn_experts(config: MoEPlusPlusConfig) -> Mapping[str, Any]:
    """MoE++ without experts that compute nothing."""
    return {"n_constant": 0, "n_copy": 0, "n_zero": 0}


def all_blocks(config: SPTFFNConfig) -> Mapping[str, Any]:
    """The dense FFN whose blocks an SPT FFN chooses from."""
    return {
        "name": "swiglu" if config.gated else "mlp",
        "d_ff": config.d_ff,
        "activation": config.activation,
    }


def one_pass(config: Any) -> Mapping[str, Any]:
    """VersatileFFN's one FFN, run once, as its config says of the paper's controls."""
    return {"path": "depth", "loops": "fixed", "max_loops": 1}


def all_neurons(config: Any) -> Mapping[str, Any]:
    """A Spark FFN that runs all its neurons."""
    return {"selection": "none"}


def ungated(config: Any) -> Mapping[str, Any]:
    """The plain Memory that Memory+ gates by its input."""
    return {"gating": "none"}


def without_memory(config: BesideConfig) -> Mapping[str, Any]:
    """The FFN beside the memory, as narrow as it is there."""
    return {"name": "swiglu", "d_ff": config.ffn.d_ff}
