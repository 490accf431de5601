"""Pick an FFN variant by name, cost it, build it, set its precision, compose a language model."""

from layers.precision import seed_rounding, update_delayed_scales
from layers.replay import force_balance, join_routes, record_routing, replay_routing
from zoo.accounting import module_cost
from zoo.budget import Match, match
from zoo.consistency import consistency
from zoo.describe import Card, describe
from zoo.extract import extract
from zoo.generate import generate
from zoo.interop import export_moe, import_moe, moe_sizes
from zoo.mixnmatch import least_slope
from zoo.model import LanguageModel, ModelConfig, build
from zoo.packing import PackReport, pack
from zoo.precision import describe_format, formats, policy_of, precisions, set_precision
from zoo.probing import probe
from zoo.registry import cost, create, names, resolve
from zoo.speculative import speculative_generate

__all__ = [
    "Card",
    "LanguageModel",
    "Match",
    "ModelConfig",
    "PackReport",
    "build",
    "consistency",
    "cost",
    "create",
    "describe",
    "describe_format",
    "export_moe",
    "extract",
    "force_balance",
    "formats",
    "generate",
    "import_moe",
    "join_routes",
    "least_slope",
    "match",
    "module_cost",
    "moe_sizes",
    "names",
    "pack",
    "policy_of",
    "precisions",
    "probe",
    "record_routing",
    "replay_routing",
    "resolve",
    "seed_rounding",
    "set_precision",
    "speculative_generate",
    "update_delayed_scales",
]
