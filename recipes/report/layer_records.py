"""What `result.json` keeps of each MoE or memory layer: how it spread tokens, how it chose.

Definitions and their sources: comparison.md section 8. Figures that follow from others are
properties, so results written before they were thought of have them too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log
from statistics import fmean


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """How one MoE layer spread the held-out tokens over its E experts; FFN experts come first."""

    layer: int
    experts: tuple[str, ...]  # [E] labels
    n_ffn_experts: int
    counts: tuple[float, ...]  # [E] assignments
    counts_by_domain: dict[str, tuple[float, ...]] = field(default_factory=dict)  # each [E]
    entropy: float  # H / ln(n_ffn_experts) over the FFN experts; 1 when even
    largest_share: float
    dead: int
    zero_computation_share: float = 0.0  # of the assignments

    def __post_init__(self) -> None:
        n = len(self.experts)
        for what, counts in {"counts": self.counts, **self.counts_by_domain}.items():
            if len(counts) != n:
                raise ValueError(f"{what} has {len(counts)} numbers for {n} experts")
        if not 0 <= self.n_ffn_experts <= n:
            raise ValueError(f"n_ffn_experts must be in [0, {n}], got {self.n_ffn_experts}")

    @property
    def max_violation(self) -> float:
        """MaxVio, max c / mean c - 1 over the FFN experts (arXiv:2408.15664, eq. 4; global).

        0 when even, n_ffn_experts - 1 with all on one; 0 where nothing was routed.
        """
        return max(self._over_mean) - 1

    @property
    def min_violation(self) -> float:
        """1 - min c / mean c over the FFN experts: 0 when even, 1 with one that nobody chose."""
        return 1 - min(self._over_mean)

    @property
    def domain_information(self) -> float:
        """I(domain; expert) over the most that it can be, in [0, 1]; domains weigh alike.

        That is the mean over domains of KL(p(expert | domain) || p(expert)), the Jensen-Shannon
        divergence, over min(ln domains, H(expert)): 0 where every domain spreads its tokens alike,
        1 where the expert tells the domain or the domain the expert. 0 with fewer than 2 domains.
        """
        rows = [[c / sum(row) for c in row] for row in self.counts_by_domain.values() if sum(row)]
        if len(rows) < 2:
            return 0.0
        marginal = entropy([fmean(column) for column in zip(*rows, strict=True)])
        most = min(log(len(rows)), marginal)
        information = marginal - fmean(entropy(row) for row in rows)
        return min(max(information / most, 0.0), 1.0) if most > 0 else 0.0

    @property
    def _over_mean(self) -> list[float]:
        """Counts of the FFN experts over their mean; all 1 where they have none."""
        ffn = self.counts[: self.n_ffn_experts]
        even = fmean(ffn) if ffn else 0.0
        return [c / even for c in ffn] if even else [1.0]


@dataclass(frozen=True, kw_only=True)
class LayerHealth:
    """How one router chose for the held-out tokens; q is its probability of each of E experts.

    Means over tokens. What each router's q is, and which choices are near ties: recipes.health.
    """

    layer: int
    experts_per_token: float
    confidence: float  # largest q; 1 / E when undecided, 1 when sure
    token_entropy: float  # H(q) / ln E; 1 when undecided
    margin: float  # largest q less the second
    information: float  # (H(mean q) - mean H(q)) / ln E; 1: all experts in use, each choice sure
    near_ties: float | None = None  # share of tokens; None: the logits do not tell the choice
    logit_rms: float  # over tokens and experts
    pair_experts: tuple[int, ...] = ()  # [M] of the E experts, the most used where there are many
    pairs: tuple[tuple[float, ...], ...] = ()  # [M, M] tokens that chose both; diagonal: chose it

    def __post_init__(self) -> None:
        m = len(self.pair_experts)
        if len(self.pairs) != m or any(len(row) != m for row in self.pairs):
            raise ValueError(f"pairs must be {m} x {m}, as many as pair_experts")

    @property
    def co_activation(self) -> tuple[tuple[float | None, ...], ...]:
        """[M, M], N_ij / N_i: of the tokens that chose i, the share that chose j too.

        None on the diagonal and in the row of an expert that no token chose.
        """
        return tuple(
            tuple(None if i == j or not row[i] else n / row[i] for j, n in enumerate(row))
            for i, row in enumerate(self.pairs)
        )


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """How the held-out tokens used the rows that one memory layer sees; recipes.memory_health.

    Few tokens cannot read many rows: `used` is at most `reads` / `n_rows`.
    """

    layer: int
    pool: str | None = None  # the model's that it shares with others; None: its own
    n_rows: int  # that the layer sees
    reads: float  # of all tokens and heads
    used: float  # share of the rows that were read at all
    kl: float  # KL(reads of a row || even), nats; 0 when even, ln n_rows with a single row in use
    concentration: tuple[float, ...] = ()  # [33], share of the reads on the most read 0, 1/32, .. 1
    used_by_domain: dict[str, float] = field(default_factory=dict)
    domain_information: float = 0.0  # as of LayerLoad, of rows; too high where reads are few
    recall: float | None = None  # of the best slots over all pairs of keys; None: exact by its kind
    recall_slots: int = 0  # that it is the share of
    core_gap: float | None = None  # 1 - lambda_2 / lambda_1 of the cores' sum, mean over heads

    def top(self, share: float) -> float:
        """Share of the reads that fall on the most read `share` of the rows, interpolated."""
        places = len(self.concentration) - 1
        at = min(max(share, 0.0), 1.0) * places
        low = min(int(at), max(places - 1, 0))
        a, b = self.concentration[low], self.concentration[min(low + 1, places)]
        return a + (at - low) * (b - a)


def entropy(shares: Sequence[float]) -> float:
    """H of shares that sum to one, in nats."""
    return -sum(p * log(p) for p in shares if p > 0)
