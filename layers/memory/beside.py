"""A memory beside an FFN in the same layer: how their FLOPs are shared out (memory.md 6.5)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from layers.base import Cost, FFNOutput
from layers.memory.core import Memory, MemoryConfig
from layers.memory.losses import BALANCES, core_penalty
from layers.memory.retriever import Hits
from layers.memory.tucker import TuckerKeys, TuckerKeysConfig
from layers.names import check_choice, check_positive
from layers.swiglu import SwiGLUConfig, default_d_ff

MEMORY_SHARE = 0.17  # of a layer's FLOPs: the best of UltraMemV2's paper (memory.md 6.5)


class Split(NamedTuple):
    """The two widths of a layer that holds an FFN and a memory."""

    d_ffn: int  # hidden width of the FFN, a swiglu
    d_key: int  # of the memory


@dataclass(frozen=True, kw_only=True)
class BesideConfig(ABC):
    """What a layer of an FFN and a memory with Tucker-decomposed keys settles."""

    d_model: int
    d_ff: int | None = None  # the layer costs the FLOPs of a swiglu so wide; None: as swiglu
    memory_share: float | None = None  # of these FLOPs, for the memory; None: 0.17
    d_key: int | None = None  # of a key of one side; None: what memory_share allows
    core_margin: float | None = None  # tau of the loss "core_penalty" (paper: 0.15); None: none
    key_balance: str = "none"  # loss of that name: none | paper (2 m if even) | release (2)

    def __post_init__(self) -> None:
        keys = self.parts.keys  # their own checks
        assert isinstance(keys, TuckerKeysConfig)
        check_choice("key_balance", self.key_balance, ("none", *BALANCES))
        if self.key_balance != "none" and keys.search != "positive":
            raise ValueError(
                f"key_balance={self.key_balance!r} is of the keys of largest projections, and "
                f"search={keys.search!r} looks at the lowest too: choose one"
            )
        if self.core_margin is not None and self.core_margin < 0:
            raise ValueError(f"core_margin must not be negative, got {self.core_margin}")
        if self.core_margin is not None and keys.rank == 1:
            raise ValueError("core_margin is of all but the first singular value, and rank=1")

    @abstractmethod
    def memory(self, d_key: int) -> MemoryConfig:
        """The memory with keys of that width."""

    @cached_property
    def widths(self) -> Split:
        """Hidden width of the FFN, width of a key."""
        d_ff = default_d_ff(self.d_model) if self.d_ff is None else self.d_ff
        return split(
            self.d_model, d_ff, self.memory_share, self.d_key,
            lambda d_key: self.memory(d_key).cost().flops,
        )  # fmt: skip

    @property
    def ffn(self) -> SwiGLUConfig:
        """The FFN that it stands beside."""
        return SwiGLUConfig(d_model=self.d_model, d_ff=self.widths.d_ffn)

    @property
    def parts(self) -> MemoryConfig:
        """The memory that it is."""
        return self.memory(self.widths.d_key)

    def cost(self) -> Cost:
        """One token's cost."""
        return self.ffn.cost().within("ffn.") + self.parts.cost().within("memory.")


def remember(memory: Memory, config: BesideConfig, x: Tensor, mask: Tensor | None) -> FFNOutput:
    """The memory's output and, in training, the losses that the config asks for, unweighted.

    x: [B, S, D]; mask: [B, S] bool, True where a token is real. Losses: `layers.memory.losses`.
    """
    if not memory.training or (config.key_balance == "none" and config.core_margin is None):
        return memory(x, mask=mask)
    keys, losses = memory.keys, dict[str, Tensor]()
    assert isinstance(keys, TuckerKeys)

    def search(queries: Tensor, real: Tensor | None) -> Hits:
        hits, losses["key_balance"] = keys.balanced(queries, config.key_balance, real)
        return hits

    out = memory(x, mask=mask, search=None if config.key_balance == "none" else search)
    if config.core_margin is not None:
        losses["core_penalty"] = core_penalty(keys.cores.sum(0), config.core_margin)
    return out._replace(losses=losses)


def split(
    d_model: int,
    d_ff: int,
    memory_share: float | None,
    d_key: int | None,
    memory_flops: Callable[[int], float],
) -> Split:
    """Widths at which FFN and memory together cost as many FLOPs as a swiglu of width d_ff.

    Args:
        d_model: D.
        d_ff: width of the swiglu whose place the layer takes.
        memory_share: of its FLOPs, for the memory; None: 17%, or what d_key makes it.
        d_key: of the memory; None: as wide as its share allows, a multiple of 4.
        memory_flops: FLOPs a token of the memory at a key width; grows linearly.

    Raises:
        ValueError: for both memory_share and d_key, or a memory that leaves the FFN nothing.
    """
    check_positive(d_model=d_model, d_ff=d_ff)
    if memory_share is not None and d_key is not None:
        raise ValueError(
            f"memory_share={memory_share} and d_key={d_key} both say how large the memory is: "
            "give one"
        )
    column = 6 * d_model  # FLOPs of one hidden number of a swiglu
    if d_key is None:
        share = MEMORY_SHARE if memory_share is None else memory_share
        if not 0 < share < 1:
            raise ValueError(f"memory_share must be in (0, 1), got {share}")
        step = 8 if d_ff >= 64 else 1
        d_ffn = max(round((1 - share) * d_ff / step), 1) * step
        fixed = memory_flops(1) - (slope := memory_flops(2) - memory_flops(1))
        left = column * (d_ff - d_ffn) - fixed
        return Split(d_ffn, max(round(left / slope / 4), 1) * 4)
    check_positive(d_key=d_key)
    d_ffn = round(d_ff - memory_flops(d_key) / column)
    if d_ffn < 1:
        raise ValueError(
            f"a memory with d_key={d_key} costs as much as a swiglu of d_ff={d_ff} and leaves "
            "nothing for the FFN: give a smaller d_key or a larger d_ff"
        )
    return Split(d_ffn, d_key)
