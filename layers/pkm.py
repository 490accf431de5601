"""Product-key memory (arXiv:1907.05242)."""

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

PRESETS: dict[str, dict[str, object]] = {
    "paper": {"n_keys": 512, "heads": 4, "top_k": 32, "d_key": 64}
}


@dataclass(frozen=True, kw_only=True)
class PKMConfig:
    """Sizes and options of a product-key memory; as small as a laptop likes, see the preset.

    query_norm "batch", the paper's, norms a training query by mean and variance of every real
    token of its micro-batch, later ones too. That is one shift and scale for all tokens and tells
    of none in particular, so the layer still counts as causal and a language model takes it; its
    training loss alone is a little flattered, for evaluation reads running statistics and no other
    token. query_norm="rms" reads the token alone in training too.
    """

    d_model: int
    n_keys: int = 128  # keys a side; n_keys^2 slots
    heads: int = 2
    top_k: int = 32  # slots that a head reads
    d_key: int | None = None  # width of a key of one side; None: d_model / 2
    query_norm: str = "batch"  # none | layer | rms | batch, which never counts padding
    query_conv: int = 0  # taps of a causal convolution before the query; 0: none
    key_norm: str = "none"  # none | layer | rms
    weights: str = "softmax"  # of a head's slots: softmax | raw | relu | sigmoid
    pool: str = "own"  # "shared": the table is handed to the constructor

    def __post_init__(self) -> None:
        _ = self.parts  # their own checks

    @property
    def parts(self) -> MemoryConfig:
        """The memory that it is."""
        d_key = max(self.d_model // 2, 1) if self.d_key is None else self.d_key
        keys = ProductKeysConfig(
            heads=self.heads, n_keys=self.n_keys, d_key=d_key, top_k=self.top_k, norm=self.key_norm
        )
        query = QueryConfig(
            d_model=self.d_model, n_queries=keys.queries, d_key=d_key, norm=self.query_norm,
            conv=self.query_conv,
        )  # fmt: skip
        return MemoryConfig(
            query=query,
            keys=keys,
            pool=PoolConfig(n_rows=keys.n_slots, d_value=self.d_model),
            readout=ReadoutConfig(d_model=self.d_model, d_value=self.d_model, weights=self.weights),
            owner=self.pool,
        )

    def cost(self) -> Cost:
        """One token's cost."""
        return self.parts.cost().within("memory.")


class PKM(nn.Module):
    """y = sum over heads and their k best slots of softmax(score) V[slot], of queries BN(W_q x).

    The score of slot (i, j) is <K1_i, q1> + <K2_j, q2>. No auxiliary loss. In training the batch
    norm reads the whole micro-batch, as the authors' does; in evaluation a token stands alone.
    """

    def __init__(self, config: PKMConfig, pool: Pool | None = None):
        super().__init__()
        self.config = config
        self.memory = Memory(config.parts, pool)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W_q (and b_q) as torch's own linear layer draws them; keys and values drew theirs."""
        proj = self.memory.query.proj
        bound = self.config.d_model**-0.5
        for parameter in proj.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D]; mask: [B, S] bool. carry is not read; `stats` as `Memory.forward` says."""
        return self.memory(x, carry, mask)
