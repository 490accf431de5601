"""UltraMem: a memory found by Tucker-decomposed keys (arXiv:2411.12364; memory.md 5)."""

from dataclasses import dataclass

from torch import Tensor, nn

from layers.base import FFNOutput, Later
from layers.memory import (
    ExpansionConfig,
    Memory,
    MemoryConfig,
    Pool,
    PoolConfig,
    QueryConfig,
    ReadoutConfig,
    TuckerKeysConfig,
    Window,
)
from layers.memory.beside import BesideConfig, remember
from layers.names import check_choice, check_positive
from layers.swiglu import SwiGLU

PRESETS: dict[str, dict[str, object]] = {
    "paper": {"n_keys": 808, "top_k": 80, "init": "paper"},
    "release": {"n_keys": 808, "top_k": 80, "init": "release"},  # what the released code draws
}
INITS = ("paper", "release")


@dataclass(frozen=True, kw_only=True)
class UltraMemConfig(BesideConfig):
    """Sizes and options of UltraMem; as small as a laptop likes, see the presets."""

    n_keys: int = 64  # n_keys^2 rows in the table
    expand: int = 2  # expand^2 virtual copies of a row, and so `expand` times the keys a side
    heads: int = 2
    top_k: int = 16  # slots that a head reads
    sub_top_k: int | None = None  # keys a side that a head looks at; None: top_k
    d_value: int | None = None  # width of a value; None: 1/8 d_model (paper: 1/2)
    rank: int = 2
    n_cores: int = 2  # blocks of a value, each with a score of its own
    query: str = "shared"  # "per_rank": a query for each rank, as in V2
    search: str = "positive"  # "signed": both quadrants of TDQKR
    query_conv: int = 0  # taps of a causal convolution before the query; 0: none
    skip: int = 0  # blocks later that the memory's output is added; 0: in its own
    pool: str = "own"  # "shared": the table is handed to the constructor
    init: str = "paper"  # of the values; "release": std 0.02
    depth: int = 12  # memory layers of the model, for the paper's init

    def __post_init__(self) -> None:
        check_choice("init", self.init, INITS)
        check_positive(n_keys=self.n_keys, expand=self.expand, depth=self.depth)
        if self.skip < 0:
            raise ValueError(f"skip must not be negative, got {self.skip}")
        super().__post_init__()

    @property
    def value_width(self) -> int:
        """`d_value`, with the default filled in."""
        if self.d_value is None:
            return max(round(self.d_model / 8 / self.n_cores), 1) * self.n_cores
        return self.d_value

    def memory(self, d_key: int) -> MemoryConfig:
        """The memory with keys of that width."""
        d, copies, rows = self.d_model, self.expand**2, self.n_keys**2
        keys = TuckerKeysConfig(
            heads=self.heads, n_keys=self.expand * self.n_keys, d_key=d_key, top_k=self.top_k,
            sub_top_k=self.sub_top_k, rank=self.rank, n_cores=self.n_cores, query=self.query,
            search=self.search,
        )  # fmt: skip
        query = QueryConfig(
            d_model=d, n_queries=keys.queries, d_key=d_key, norm="rms", conv=self.query_conv
        )
        readout = ReadoutConfig(
            d_model=d, d_value=self.value_width, weights="raw", output="linear", groups=copies
        )
        return MemoryConfig(
            query=query,
            keys=keys,
            pool=PoolConfig(n_rows=rows, d_value=self.value_width, cores=self.n_cores),
            readout=readout,
            expansion=ExpansionConfig(copies=copies, window=Window(0, rows, rows)),
            owner=self.pool,
        )


class UltraMem(nn.Module):
    """y = FFN(x) + W_o [pooled_1; ...; pooled_E], pooled_p = sum of [s1 V1[row]; s2 V2[row]] over
    the slots of virtual copy p.

    The slots, and a score for each core, are those of TDQKR: no softmax, queries and keys normed.
    Memory and FFN read the same input. With `skip`, the paper's wiring, the memory's output is no
    part of y: it is added to the residual stream after the output of a later block.
    """

    def __init__(self, config: UltraMemConfig, pool: Pool | None = None):
        super().__init__()
        self.config = config
        self.ffn = SwiGLU(config.ffn)
        self.memory = Memory(config.parts, pool)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The released init, values by the paper's rule unless told (memory.md 5.6).

        Values of std sqrt(E / (2 m H L)) make the output's variance 1 / (2 L) at a mean score of 1.
        """
        c, m = self.config, self.memory
        d_key, output = c.widths.d_key, m.readout.output
        assert output is not None
        nn.init.normal_(m.query.proj.weight, std=d_key**-0.5)
        nn.init.normal_(output.weight, std=output.weight.shape[-1] ** -0.5)
        for gain in (m.query.norm, m.keys.norm):
            assert gain is not None
            nn.init.constant_(gain.weight, d_key**-0.33)  # pyright: ignore[reportArgumentType]
        if m.pool is not None:
            self.draw_pool()

    def draw_pool(self) -> None:
        """Draw the values by the config's rule; of a shared pool the model has one layer do it."""
        c = self.config
        read = 2 * c.top_k * c.heads * c.depth
        std = (c.expand**2 / read) ** 0.5 if c.init == "paper" else 0.02
        self.memory.values().draw(std)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D]; mask: [B, S] bool. carry is not read; `stats` as `Memory.forward` says.

        With `skip` the memory's output is in `later`, and not in y.
        """
        out = remember(self.memory, self.config, x, mask)
        y = self.ffn(x, carry, mask).y
        if self.config.skip:
            return out._replace(y=y, later=Later(out.y, self.config.skip))
        return out._replace(y=out.y + y)
