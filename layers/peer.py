"""PEER, a mixture of a million single-neuron experts (arXiv:2407.04153, sec. 2)."""

from dataclasses import dataclass

from torch import Tensor, nn

from layers.base import Cost, FFNOutput
from layers.memory import (
    Memory,
    MemoryConfig,
    Pool,
    PoolConfig,
    ProductKeysConfig,
    QueryConfig,
    ReadoutConfig,
)
from layers.names import check_choice

PRESETS: dict[str, dict[str, object]] = {"paper": {"n_keys": 1024, "heads": 8, "top_k": 16}}


@dataclass(frozen=True, kw_only=True)
class PEERConfig:
    """Sizes and options of PEER; as small as a laptop likes, see the preset.

    query_norm "batch", the paper's, reads the whole micro-batch in training, as `PKMConfig` says.
    """

    d_model: int
    n_keys: int = 128  # keys a side; n_keys^2 experts
    heads: int = 2
    top_k: int = 32  # experts of a head; heads * top_k neurons are active
    d_key: int | None = None  # width of a key of one side; None: d_model / 2
    activation: str = "gelu"  # of a neuron: gelu | relu | silu | identity
    query_norm: str = "batch"  # none | layer | rms | batch, which never counts padding
    query_conv: int = 0  # taps of a causal convolution before the query; 0: none
    key_norm: str = "none"  # none | layer | rms
    keys: str = "per_head"  # "shared": one set for all heads, the text's other reading
    weights: str = "softmax"  # of a head's experts: softmax | sigmoid | relu | raw
    pool: str = "own"  # "shared": the experts are handed to the constructor

    def __post_init__(self) -> None:
        check_choice("keys", self.keys, ("per_head", "shared"))
        _ = self.parts  # their own checks

    @property
    def parts(self) -> MemoryConfig:
        """The memory that it is."""
        d_key = max(self.d_model // 2, 1) if self.d_key is None else self.d_key
        keys = ProductKeysConfig(
            heads=self.heads, n_keys=self.n_keys, d_key=d_key, top_k=self.top_k,
            shared=self.keys == "shared", norm=self.key_norm,
        )  # fmt: skip
        query = QueryConfig(
            d_model=self.d_model, n_queries=keys.queries, d_key=d_key, norm=self.query_norm,
            conv=self.query_conv,
        )  # fmt: skip
        d = self.d_model
        return MemoryConfig(
            query=query,
            keys=keys,
            pool=PoolConfig(n_rows=keys.n_slots, d_value=d, d_input=d, activation=self.activation),
            readout=ReadoutConfig(d_model=d, d_value=d, d_input=d, weights=self.weights),
            owner=self.pool,
        )

    def cost(self) -> Cost:
        """One token's cost."""
        return self.parts.cost().within("memory.")


class PEER(nn.Module):
    """y = sum over heads and their k best experts i of softmax(score)_i act(<u_i, x>) v_i.

    Heads have query networks and, unless shared, keys of their own; all read the same experts. The
    paper names no init: u and v are normal with std 1 / sqrt(d_model), as Meta's variant draws
    them (memory.md 3).
    """

    def __init__(self, config: PEERConfig, pool: Pool | None = None):
        super().__init__()
        self.config = config
        self.memory = Memory(config.parts, pool)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D]; mask: [B, S] bool. carry is not read; `stats` as `Memory.forward` says."""
        return self.memory(x, carry, mask)
