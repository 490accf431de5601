"""From a trained dense FFN to a mixture of experts, with a receipt of what that changed."""

from zoo.conversion.grouping import (
    GROUPINGS,
    balanced_kmeans,
    contiguous_groups,
    kmeans_groups,
    random_groups,
)
from zoo.conversion.layer import Converted, LayerReceipt, convert_ffn, dense_of, receipt
from zoo.conversion.methods import METHODS, options_for
from zoo.conversion.model import Conversion, convert
from zoo.conversion.options import ConversionOptions
from zoo.conversion.prior import expert_outputs, layer_pa_loss, pa_labels, pa_loss
from zoo.conversion.stacks import (
    DenseFFN,
    ExpertStacks,
    drop_upcycle,
    granular_upcycle,
    mixing_scale,
    sparse_upcycle,
    split_neurons,
    with_noise,
)
from zoo.conversion.teach import teach_routers

__all__ = [
    "GROUPINGS",
    "METHODS",
    "Conversion",
    "ConversionOptions",
    "Converted",
    "DenseFFN",
    "ExpertStacks",
    "LayerReceipt",
    "balanced_kmeans",
    "contiguous_groups",
    "convert",
    "convert_ffn",
    "dense_of",
    "drop_upcycle",
    "expert_outputs",
    "granular_upcycle",
    "kmeans_groups",
    "layer_pa_loss",
    "mixing_scale",
    "options_for",
    "pa_labels",
    "pa_loss",
    "random_groups",
    "receipt",
    "sparse_upcycle",
    "split_neurons",
    "teach_routers",
    "with_noise",
]
