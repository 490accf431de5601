"""Implicit value expansion: more virtual slots than rows (arXiv:2411.12364; memory.md 5.4)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from layers.names import check_choice, check_positive

WINDOWS = ("ring", "clamped", "block")


class Window(NamedTuple):
    """The consecutive rows of a pool that a layer sees, round its end (memory.md 6.3)."""

    offset: int  # the first row
    visible: int  # how many
    n_rows: int  # of the pool


def window_of(kind: str, table: int, n_tables: int, rows: int, share: float) -> Window:
    """The window of one layer over a pool of tables, one for each layer (arXiv:2508.18756).

    It holds as many rows as make a square, of a share of the pool, and begins at the layer's own
    table. A ring goes on at the pool's first row; clamped windows ("NoRing") begin earlier where
    they would pass its end; in blocks, all layers of a group of tables see that group.

    Args:
        kind: ring | clamped | block.
        table: the layer's own, from 0.
        n_tables, rows: tables of the pool, rows of one.
        share: of the pool's rows, in (0, 1]; in blocks one over how many of them there are.

    Raises:
        ValueError: for an unknown kind, a share that is not positive or makes no equal blocks.
    """
    check_choice("windows", kind, WINDOWS)
    check_positive(share=share)
    n_rows, start = n_tables * rows, table * rows
    visible = max(math.isqrt(math.floor(share * n_rows)), 1) ** 2
    if kind == "block":
        n_blocks = round(1 / share)
        if n_tables % max(n_blocks, 1) or abs(n_blocks * share - 1) > 0.01:
            allowed = ", ".join(f"1/{n}" for n in range(1, n_tables + 1) if n_tables % n == 0)
            raise ValueError(
                f"share={share} makes no equal blocks of {n_tables} tables: allowed are {allowed}"
            )
        each = n_tables // n_blocks
        start, visible = table // each * each * rows, math.isqrt(each * rows) ** 2
    if kind == "clamped":
        start = max(min(start, n_rows - visible), 0)
    return Window(start, visible, n_rows)


@dataclass(frozen=True, kw_only=True)
class ExpansionConfig:
    """How virtual slots lie over rows."""

    copies: int  # E virtual copies of every visible row
    window: Window
    seed: int = 0  # of the permutation, with the offset: the same on all ranks

    def __post_init__(self) -> None:
        check_positive(copies=self.copies, visible=self.window.visible)
        if self.window.visible > self.window.n_rows:
            raise ValueError(
                f"a window of {self.window.visible} rows does not fit a pool of "
                f"{self.window.n_rows}"
            )

    @property
    def n_slots(self) -> int:
        """Virtual slots."""
        return self.copies * self.window.visible


class Expansion(nn.Module):
    """z = sigma[slot], row = (z mod visible + offset) mod pool, group = z div visible.

    sigma is a fixed random permutation, saved with the weights: it breaks the topology that
    neighbours in a product key have. Group p multiplies by the p-th projection where groups are
    kept apart, and so stands for a virtual copy V W_p of the table.
    """

    sigma: Tensor  # [E * visible] int64

    def __init__(self, config: ExpansionConfig):
        super().__init__()
        self.config = config
        self.register_buffer("sigma", torch.empty(config.n_slots, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the permutation: a function of the seed and the window alone."""
        generator = torch.Generator().manual_seed(self.config.seed + self.config.window.offset)
        if not self.sigma.is_meta:
            with torch.device("cpu"):
                sigma = torch.randperm(self.config.n_slots, generator=generator)
            self.sigma.copy_(sigma)

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """slots: [T, K] int64. Returns (rows of the pool, groups), [T, K] int64 each."""
        offset, visible, n_rows = self.config.window
        z = self.sigma[slots]
        return (z % visible + offset) % n_rows, z // visible
