"""A dense FFN as Spark's (arXiv:2506.06644): the same parameters, of which a token runs some."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layers.mlp import MLP
from layers.names import check_choice
from layers.spark_ffn import PREDICTORS, SparkFFNConfig
from layers.swiglu import SwiGLU
from routers.scores import INIT_STD
from zoo.conversion.options import ConversionOptions
from zoo.conversion.stacks import DenseFFN


@dataclass(frozen=True, kw_only=True)
class SparkOptions(ConversionOptions):
    """Every number of the dense FFN is used; what it computes changes, and is trained on.

    From an `mlp`, act(W1 q): the columns of W1 are cut at r, the first predict, the others are the
    value. From a gated FFN of width F, act(G q) * (U q), cut alike G = [G1 G2], U = [U1 U2]: of the
    products of its parts, G1 q1 * U2 q2 becomes F neurons, and the mirrored U1 q1 * G2 q2 F / 2
    more, of the neurons where its weights are the largest: 1.5 F, as many parameters. `predictor:
    full` leaves a gated FFN as it is and adds the threshold alone, with selection: none not even
    that: an exact copy.
    """

    sources: ClassVar[tuple[type[SwiGLU | MLP], ...]] = (SwiGLU, MLP)

    density: float = 0.08  # as spark_ffn's, as are those below
    top_k: int | None = None
    d_predictor: int | None = None
    predictor: str = "split"  # full: of gated FFNs alone
    selection: str = "statistical"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("predictor of spark", self.predictor, PREDICTORS)
        if self.router_std != INIT_STD:
            raise ValueError("spark has no router, so leave out router_std")

    def layer(self, d_ff: int, activation: str) -> dict[str, Any]:
        """As `ConversionOptions.layer`, of a gated FFN."""
        if self.predictor == "split":
            if d_ff % 2:
                raise ValueError(f"d_ff={d_ff} must be even, to become 1.5 times as many neurons")
            d_ff = d_ff * 3 // 2
        said = {name: getattr(self, name) for name in ("density", "top_k", "d_predictor")}
        said = {name: value for name, value in said.items() if value is not None}
        if self.selection == "none":
            said.pop("density")
        chosen = {"predictor": self.predictor, "selection": self.selection}
        return {"name": "spark_ffn", "d_ff": d_ff, "activation": activation, **said, **chosen}

    def layer_for(self, ffn: SwiGLU | MLP) -> dict[str, Any]:
        """As `ConversionOptions.layer_for`: an `mlp` keeps its width."""
        if isinstance(ffn, SwiGLU):
            return super().layer_for(ffn)
        if self.predictor == "full":
            raise ValueError("predictor: full needs a gated FFN's gate, which an mlp has not")
        width = ffn.config.hidden
        return self.layer(2 * width, ffn.config.activation) | {"d_ff": width}

    def weights(self, dense: DenseFFN, generator: torch.Generator) -> dict[str, Tensor]:
        """As `ConversionOptions.weights`; nothing is drawn."""
        gate, up, down = dense
        if self.predictor == "full":
            return {"predictor.weight": gate, "up.weight": up, "down.weight": down}
        r = SparkFFNConfig(d_model=up.shape[1], d_predictor=self.d_predictor).r
        scores, value = gate[:, :r], up[:, r:]
        if gate is not up:
            mirrored = up[:, :r], gate[:, r:]
            size = mirrored[0].norm(dim=1) * mirrored[1].norm(dim=1) * down.norm(dim=0)
            more = size.topk(len(size) // 2).indices.sort().values
            scores = torch.cat((scores, mirrored[0][more]))
            value = torch.cat((value, mirrored[1][more]))
            down = torch.cat((down, down[:, more]), dim=1)
        return {"predictor.weight": scores, "up.weight": value, "down.weight": down}

    def loss_weights(self, n_layers: int) -> dict[str, float]:
        """It has no loss."""
        return {}
