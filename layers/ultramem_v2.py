"""UltraMemV2: a memory of single neurons beside a smaller FFN (arXiv:2508.18756; memory.md 6)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import FFNOutput
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
    window_of,
)
from layers.memory.beside import BesideConfig, remember
from layers.names import check_choice, check_positive
from layers.swiglu import SwiGLU

PRESETS: dict[str, dict[str, object]] = {
    "paper": {"init": "paper", "n_keys": 360},
    "release": {"init": "release", "n_keys": 360},  # what the released code draws
}
INITS = ("paper", "release")
GROUPS = ("summed", "apart")
PROBES = 128  # random queries that calibrate the scores


@dataclass(frozen=True, kw_only=True)
class UltraMemV2Config(BesideConfig):
    """Sizes and options of UltraMemV2; as small as a laptop likes, see the presets."""

    n_keys: int = 128  # n_keys^2 rows in one table
    expand: int = 2  # expand^2 virtual copies of a row, and so `expand` times the keys a side
    heads: int = 1
    top_k: int = 32  # slots that a head reads
    sub_top_k: int | None = None  # keys a side that a head looks at; None: top_k, at most 128
    d_value: int | None = None  # width of a neuron's output; None: 3/16 d_model
    d_input: int | None = None  # width of a neuron's input; None: 1/16 d_model
    rank: int = 2
    n_cores: int = 2  # blocks of a value, each with a score of its own
    query: str = "per_rank"  # "shared": one query a side for all ranks
    search: str = "positive"  # "signed": both quadrants of TDQKR
    activation: str = "identity"  # of a neuron: identity | gelu | relu | silu
    groups: str = "summed"  # "apart": an output matrix for each virtual copy
    query_conv: int = 0  # taps of a causal convolution before the query; 0: none
    n_tables: int = 1  # tables in the pool, one a layer that shares it
    table: int = 0  # which of them is this layer's own: where its window begins
    share: float = 1.0  # of the pool, seen through a window
    windows: str = "ring"  # that wraps round | clamped to the pool | block: of a group of layers
    pool: str = "own"  # "shared": the pool is handed to the constructor
    init: str = "paper"  # "release": much quieter at the start
    depth: int = 12  # layers of the model, for the paper's init

    def __post_init__(self) -> None:
        check_choice("init", self.init, INITS)
        check_choice("groups", self.groups, GROUPS)
        check_positive(
            n_keys=self.n_keys, expand=self.expand, n_tables=self.n_tables, depth=self.depth,
            d_input=self.input_width, top_k=self.top_k,
        )  # fmt: skip
        if not 0 <= self.table < self.n_tables:
            raise ValueError(f"table must be in [0, n_tables={self.n_tables}), got {self.table}")
        super().__post_init__()

    @property
    def value_width(self) -> int:
        """`d_value`, with the default filled in: a multiple of the cores."""
        if self.d_value is None:
            return max(round(3 * self.d_model / 16 / self.n_cores), 1) * self.n_cores
        return self.d_value

    @property
    def input_width(self) -> int:
        """`d_input`, with the default filled in."""
        return max(self.d_model // 16, 1) if self.d_input is None else self.d_input

    @property
    def window(self) -> Window:
        """The rows that the layer sees: as many as make a square, a share of the pool."""
        return window_of(self.windows, self.table, self.n_tables, self.n_keys**2, self.share)

    def memory(self, d_key: int) -> MemoryConfig:
        """The memory with keys of that width."""
        d, copies = self.d_model, self.expand**2
        n_keys = self.expand * math.isqrt(self.window.visible)
        sub = self.sub_top_k
        if sub is None and self.top_k > 128:  # 128^2 pairs are enough (memory.md 6.4)
            sub = 128
        keys = TuckerKeysConfig(
            heads=self.heads, n_keys=n_keys, d_key=d_key, top_k=self.top_k, sub_top_k=sub,
            rank=self.rank, n_cores=self.n_cores, query=self.query, search=self.search,
        )  # fmt: skip
        query = QueryConfig(
            d_model=d, n_queries=keys.queries, d_key=d_key, norm="rms", conv=self.query_conv
        )
        pool = PoolConfig(
            n_rows=self.window.n_rows, d_value=self.value_width, cores=self.n_cores,
            d_input=self.input_width, activation=self.activation,
        )  # fmt: skip
        readout = ReadoutConfig(
            d_model=d, d_value=self.value_width, weights="raw", output="linear",
            groups=copies if self.groups == "apart" else 1, d_input=self.input_width,
        )  # fmt: skip
        # layers whose windows begin at the same row have permutations of their own all the same
        seed = self.table * self.n_keys**2 - self.window.offset
        return MemoryConfig(
            query=query, keys=keys, pool=pool, readout=readout, owner=self.pool,
            expansion=ExpansionConfig(copies=copies, window=self.window, seed=seed),
        )  # fmt: skip


class UltraMemV2(nn.Module):
    """y = FFN(x) + W_o sum over slots of [s1 g V1[row]; s2 g V2[row]], g = <P[row], W_p x>.

    The slots, and two scores s1 and s2 of each, are those of TDQKR; a slot is a virtual copy of a
    row (IVE), and copies are added up before W_o. Top-m is the only non-linearity of the memory.
    """

    def __init__(self, config: UltraMemV2Config, pool: Pool | None = None):
        super().__init__()
        self.config = config
        self.ffn = SwiGLU(config.ffn)
        self.memory = Memory(config.parts, pool)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw by the config's rule (memory.md 6.6); of a pool, its own alone."""
        c, m = self.config, self.memory
        d, d_key = c.d_model, c.widths.d_key
        inputs, output = m.readout.input, m.readout.output
        assert output is not None
        if c.init == "paper":
            std = (0.4 / d) ** 0.5
            for linear in (m.query.proj, inputs, output, self.ffn.gate_up, self.ffn.down):
                if linear is not None:
                    nn.init.normal_(linear.weight, std=std)
            self.ffn.down.weight.mul_((2 * c.depth) ** -0.5)
        else:
            nn.init.normal_(m.query.proj.weight, std=d_key**-0.5)
            nn.init.normal_(output.weight, std=output.weight.shape[-1] ** -0.5)
            if inputs is not None:
                nn.init.normal_(inputs.weight, std=d**-0.5)
        for gain in (m.query.norm, m.keys.norm):
            assert gain is not None
            nn.init.constant_(gain.weight, d_key**-0.4)  # pyright: ignore[reportArgumentType]
        if c.init == "paper":
            self._calibrate()
        if m.pool is not None:
            self.draw_pool()

    def draw_pool(self) -> None:
        """Draw values and pre-values with one std; of a shared pool the model has one layer do it.

        The paper's makes the memory's output as loud as an FFN's: std^4 = 0.2 k_in d /
        (m H (1 + spread^2) D_p D_v L), k_in the FFN's width over d, spread the std of a kept score.
        """
        c, pool = self.config, self.memory.values()
        std = 0.02
        if c.init == "paper":
            k_in = c.widths.d_ffn / c.d_model
            mean, spread = self._kept_scores()
            spread = spread / mean if mean > 0 else 0.0
            read = c.top_k * c.heads * (1 + spread**2) * c.input_width * c.value_width
            std = (0.2 * k_in * c.d_model / (read * c.depth)) ** 0.25
        pool.draw(std)
        assert pool.inputs is not None
        nn.init.normal_(pool.inputs.weight, std=std)

    def _calibrate(self) -> None:
        """Scale the gains until the mean kept score of a core is 1.

        A score grows with both gains squared, so f on each is f^4 on the scores.
        """
        mean, _ = self._kept_scores()
        if mean <= 0:
            return  # hardly a choice to calibrate: as many slots kept as there are
        for norm in (self.memory.query.norm, self.memory.keys.norm):
            assert norm is not None
            norm.weight.mul_(mean**-0.25)  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def _kept_scores(self) -> tuple[float, float]:
        """Mean and std of a core's kept scores for some random queries; 0 on the meta device."""
        m, parts = self.memory, self.config.parts
        if m.keys.weight.is_meta:
            return 0.0, 0.0
        shape = (PROBES, parts.keys.queries, parts.keys.d_key)
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(shape, generator=generator).to(m.keys.weight)
        assert m.query.norm is not None
        scores = m.keys(m.query.norm(q)).scores
        return scores.mean().item(), scores.std().item()

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D]; mask: [B, S] bool. carry is not read; `stats` as `Memory.forward` says."""
        out = remember(self.memory, self.config, x, mask)
        return out._replace(y=out.y + self.ffn(x, carry, mask).y)
