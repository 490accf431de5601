"""Memory and Memory+ (arXiv:2412.09764, sec. 3)."""

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

PRESETS: dict[str, dict[str, object]] = {
    "paper": {"n_keys": 1024, "heads": 4},
    "memory": {"gating": "none"},  # the paper's plain layer
    "scalar_gate": {"gating": "scalar"},  # tried by the authors
}
GATINGS = ("swilu", "scalar", "none")


@dataclass(frozen=True, kw_only=True)
class MemoryPlusConfig:
    """Sizes and options of Memory+; as small as a laptop likes, see the preset."""

    d_model: int
    n_keys: int = 128  # keys a side; n_keys^2 slots
    heads: int = 2
    top_k: int = 32  # slots that a head reads
    d_key: int | None = None  # width of a key of one side; None: d_model / 4
    d_value: int | None = None  # width of a value; None: d_model
    gating: str = "swilu"  # swilu: Memory+ | none: Memory | scalar: one sigmoid
    query_norm: str = "none"  # none | layer | rms | batch
    query_conv: int = 0  # taps of a causal convolution before the query; 0: none
    key_norm: str = "none"  # none | layer | rms: with query_norm the paper's qk-normalisation
    pool: str = "own"  # "shared": the table is handed to the constructor, as in the paper

    def __post_init__(self) -> None:
        check_choice("gating", self.gating, GATINGS)
        _ = self.parts  # their own checks

    @property
    def parts(self) -> MemoryConfig:
        """The memory that it is."""
        d = self.d_model
        d_key = max(d // 4, 1) if self.d_key is None else self.d_key
        d_value = d if self.d_value is None else self.d_value
        keys = ProductKeysConfig(
            heads=self.heads, n_keys=self.n_keys, d_key=d_key, top_k=self.top_k, norm=self.key_norm
        )
        query = QueryConfig(
            d_model=d, n_queries=keys.queries, d_key=d_key, norm=self.query_norm,
            conv=self.query_conv,
        )  # fmt: skip
        plain = "none" if d_value == d else "linear"
        readout = ReadoutConfig(
            d_model=d,
            d_value=d_value,
            output="gated" if self.gating == "swilu" else plain,
            scalar_gate=self.gating == "scalar",
        )
        pool = PoolConfig(n_rows=keys.n_slots, d_value=d_value)
        return MemoryConfig(query=query, keys=keys, pool=pool, readout=readout, owner=self.pool)

    def cost(self) -> Cost:
        """One token's cost."""
        return self.parts.cost().within("memory.")


class MemoryPlus(nn.Module):
    """out = W_2 (y * silu(W_1 x + b_1)) + b_2, y = sum of softmax(score) V[slot] over all heads.

    "swilu" is the paper's name for the gate. It replaces the FFN of a few layers, which share one
    table: build a `Pool` once and hand it to each.
    """

    def __init__(self, config: MemoryPlusConfig, pool: Pool | None = None):
        super().__init__()
        self.config = config
        self.memory = Memory(config.parts, pool)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The released init: W_q xavier uniform, keys uniform(-1, 1) / sqrt(both sides' width), W_1
        and W_2 normal std d_model^-1/2; biases 0, which the released code leaves unwritten.
        """
        c, m = self.config.parts, self.memory
        nn.init.xavier_uniform_(m.query.proj.weight)
        bound = (2 * c.keys.d_key) ** -0.5
        nn.init.uniform_(m.keys.weight, -bound, bound)
        for linear in (m.readout.gate, m.readout.output):
            if linear is not None:
                nn.init.normal_(linear.weight, std=self.config.d_model**-0.5)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D]; mask: [B, S] bool. carry is not read; `stats` as `Memory.forward` says."""
        return self.memory(x, carry, mask)
