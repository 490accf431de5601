"""Formats, policies, and how a policy reaches a module."""

from layers.precision.apply import CoverageReport, Covered, apply_policy, leaves
from layers.precision.formats import FORMATS
from layers.precision.leaf import Leaf
from layers.precision.operands import LeafPrecision
from layers.precision.policy import PrecisionPolicy, Rule, Switch
from layers.precision.presets import PRESETS
from layers.precision.quantize import fake_quantize, quantize
from layers.precision.spec import QSpec
from layers.precision.state import seed_rounding, update_delayed_scales

__all__ = [
    "FORMATS",
    "PRESETS",
    "CoverageReport",
    "Covered",
    "Leaf",
    "LeafPrecision",
    "PrecisionPolicy",
    "QSpec",
    "Rule",
    "Switch",
    "apply_policy",
    "fake_quantize",
    "leaves",
    "quantize",
    "seed_rounding",
    "update_delayed_scales",
]
