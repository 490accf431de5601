"""A memory beside an FFN in the same layer: how their FLOPs are shared out (memory.md 6.5)."""

from collections.abc import Callable
from typing import NamedTuple

from layers.names import check_positive

MEMORY_SHARE = 0.17  # of a layer's FLOPs: the best of UltraMemV2's paper (memory.md 6.5)


class Split(NamedTuple):
    """The two widths of a layer that holds an FFN and a memory."""

    d_ffn: int  # hidden width of the FFN, a swiglu
    d_key: int  # of the memory


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
