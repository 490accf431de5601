"""Sizes of a Spark FFN (`layers.spark_ffn`), what of it a token runs, and what that costs."""

from dataclasses import dataclass

from layers.base import Cost, WeightCost
from layers.names import check_choice, check_positive
from layers.spark_decode import BACKENDS
from layers.swiglu import default_d_ff

# per hidden number, estimated; the product with the value is one
ACTIVATION_FLOPS = {"gelu_tanh": 9, "gelu": 9, "silu": 5, "relu": 2}
SELECTION_FLOPS = {"statistical": 5, "exact": 20, "none": 0}  # per hidden number, estimated
PREDICTORS = ("split", "full")
MULTIPLE = 64  # of r


@dataclass(frozen=True, kw_only=True)
class SparkFFNConfig:
    """Sizes of a Spark FFN, and what a token runs of it."""

    d_model: int
    d_ff: int | None = None  # hidden width F; None: the parameters of a default swiglu
    d_predictor: int | None = None  # r; None: d_model / 2, to a multiple of 64 from 128 on
    density: float = 0.08  # k / F, share of the neurons that a token runs
    top_k: int | None = None  # k itself, in place of the density
    activation: str = "gelu_tanh"  # gelu_tanh | gelu | silu | relu, after the threshold
    predictor: str = "split"  # split | full (Gemma 3n: gate and value see all of the input)
    selection: str = "statistical"  # statistical | exact (the k largest, same shift) | none (dense)
    detach_threshold: bool = False  # theta is a constant to the gradient
    huber: float = 0.0  # delta of a smooth threshold, in units of the scores; 0: a kink
    density_start: float | None = None  # density of the first step; None: the same throughout
    density_until: float = 0.1  # share of the run after which the density is reached
    backend: str = "auto"  # auto | dense | gather | bag: of a few tokens without gradients

    def __post_init__(self) -> None:
        check_positive(d_model=self.d_model, d_ff=self.hidden)
        check_choice("predictor of spark_ffn", self.predictor, PREDICTORS)
        check_choice("activation of spark_ffn", self.activation, ACTIVATION_FLOPS)
        check_choice("selection of spark_ffn", self.selection, SELECTION_FLOPS)
        check_choice("backend of spark_ffn", self.backend, BACKENDS)
        self._check_split()
        if self.selection == "none":
            self._check_unused()
            return
        if not 0 < self.density < 1:
            raise ValueError(
                f"density must be in (0, 1), got {self.density}; selection: none runs all neurons"
            )
        if not 1 <= self.k < self.hidden:
            raise ValueError(f"top_k must be in [1, d_ff={self.hidden}), got {self.k}")
        if self.huber < 0:
            raise ValueError(f"huber must be at least 0, got {self.huber}")
        if self.density_start is not None:
            self._check_schedule(self.density_start)

    def _check_split(self) -> None:
        if self.predictor == "split" and not 1 <= self.r < self.d_model:
            raise ValueError(f"d_predictor must be in [1, d_model={self.d_model}), got {self.r}")
        if self.predictor == "full" and self.d_predictor is not None:
            raise ValueError(
                f"predictor: full sees the whole input, so leave out d_predictor={self.d_predictor}"
            )

    def _check_unused(self) -> None:
        """No option of a selection that there is not."""
        for name in ("top_k", "detach_threshold", "huber", "density_start"):
            if given := getattr(self, name):
                raise ValueError(f"selection: none selects nothing, so leave out {name}={given}")
        if self.backend not in ("auto", "dense"):
            raise ValueError(f"selection: none runs all neurons, got backend={self.backend!r}")

    def _check_schedule(self, start: float) -> None:
        if self.selection != "statistical":
            raise ValueError("density_start is for selection: statistical")
        if not self.share <= start < 1:
            raise ValueError(
                f"density_start must be in [{self.share:.3g}, 1), from the density that it falls "
                f"to, got {start}"
            )
        if not 0 < self.density_until <= 1:
            raise ValueError(f"density_until must be in (0, 1], got {self.density_until}")

    @property
    def hidden(self) -> int:
        """F, with the default filled in."""
        if self.d_ff is not None:
            return self.d_ff
        gated = default_d_ff(self.d_model)  # three matrices
        return gated if self.predictor == "full" else gated * 3 // 2

    @property
    def r(self) -> int:
        """Numbers of the input that the scores see, with the default filled in."""
        if self.predictor == "full":
            return self.d_model
        if self.d_predictor is not None:
            return self.d_predictor
        half = self.d_model // 2
        return half if half < MULTIPLE else round(half / MULTIPLE) * MULTIPLE

    @property
    def d_value(self) -> int:
        """Numbers of the input that the value sees."""
        return self.d_model if self.predictor == "full" else self.d_model - self.r

    @property
    def k(self) -> int:
        """Neurons that a token is to run."""
        if self.selection == "none":
            return self.hidden
        return max(round(self.density * self.hidden), 1) if self.top_k is None else self.top_k

    @property
    def share(self) -> float:
        """k / F as the threshold has it: the density itself, not rounded to whole neurons."""
        if self.top_k is not None or self.selection != "statistical":
            return self.k / self.hidden
        return max(self.density, 1 / self.hidden)

    def cost(self) -> Cost:
        """One token's cost: FLOPs as training has them, dense; what decoding reads as units."""
        f, k = self.hidden, self.k
        act = (ACTIVATION_FLOPS[self.activation] + SELECTION_FLOPS[self.selection]) * f

        def matrix(name: str, width: int, other_flops: float = 0.0) -> WeightCost:
            n, chosen = width * f, name != "predictor"
            return WeightCost(
                name=f"{name}.weight", role="ffn", params=n, flops=2 * n, other_flops=other_flops,
                units=f if chosen else 1, active_units=k if chosen else 1,
            )  # fmt: skip

        return Cost(
            (matrix("predictor", self.r, act), matrix("up", self.d_value),
             matrix("down", self.d_model))
        )  # fmt: skip

    def decode_flops(self) -> int:
        """Matmul FLOPs of one token that runs k neurons alone: 2 r F + 2 (D - r) k + 2 D k."""
        return 2 * (self.r * self.hidden + (self.d_value + self.d_model) * self.k)
