"""What `result.json` keeps of each layer whose tokens choose neurons: how many they ran."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LayerDensity:
    """How many neurons of one layer the held-out tokens ran; recipes.density."""

    layer: int
    n_neurons: int  # F
    target: float  # k / F
    active: float  # share of the neurons that a token ran, mean over the tokens
    active_by_domain: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("target", "active"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    @property
    def over_target(self) -> float:
        """What ran over what was asked: 1 where the threshold meets it."""
        return self.active / self.target if self.target else 0.0
