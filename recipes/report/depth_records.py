"""What `result.json` keeps of each layer that loops: how often held-out tokens went through it."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TokenLoops:
    """One token of the vocabulary."""

    text: str  # as it is read
    count: int  # how often it stood there
    loops: float  # mean


@dataclass(frozen=True, kw_only=True)
class LayerLoops:
    """How deep one layer was for the held-out tokens; recipes.loop_health."""

    layer: int
    counts: tuple[float, ...]  # [L] tokens of 1, 2, .. L loops
    counts_by_domain: dict[str, tuple[float, ...]] = field(default_factory=dict)  # each [L]
    width: float | None = None  # weight of the width path, mean over tokens; None: it has none
    shallow: tuple[TokenLoops, ...] = ()  # of the most frequent tokens those of fewest loops,
    deep: tuple[TokenLoops, ...] = ()  # and those of most; the extreme first

    def __post_init__(self) -> None:
        if not self.counts:
            raise ValueError("counts is empty: a layer that loops has at least one loop")
        for domain, counts in self.counts_by_domain.items():
            if len(counts) != len(self.counts):
                raise ValueError(
                    f"counts_by_domain has {len(counts)} numbers for {domain} and "
                    f"{len(self.counts)} in all"
                )

    @property
    def mean(self) -> float:
        """Loops of a token."""
        return mean_loops(self.counts)

    @property
    def most_loops(self) -> int:
        """L."""
        return len(self.counts)


def mean_loops(counts: Sequence[float]) -> float:
    """Of tokens by loops, 1 first; 0 where there are none."""
    return sum(i * n for i, n in enumerate(counts, 1)) / (sum(counts) or 1)
