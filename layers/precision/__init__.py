"""Formats, policies, and how a policy reaches a module."""

from layers.precision.apply import CoverageReport, Covered, apply_policy, leaves
from layers.precision.formats import FORMATS, Format, every_format, register_format
from layers.precision.leaf import Leaf
from layers.precision.operands import LeafPrecision
from layers.precision.policy import PrecisionPolicy, Rule, Switch
from layers.precision.presets import PRESETS
from layers.precision.probe import ProbeReport, probing
from layers.precision.quantize import fake_quantize, quantize
from layers.precision.spec import QSpec
from layers.precision.state import seed_rounding, update_delayed_scales

__all__ = [
    "FORMATS",
    "PRESETS",
    "CoverageReport",
    "Covered",
    "Format",
    "Leaf",
    "LeafPrecision",
    "PrecisionPolicy",
    "ProbeReport",
    "QSpec",
    "Rule",
    "Switch",
    "apply_policy",
    "every_format",
    "fake_quantize",
    "leaves",
    "probing",
    "quantize",
    "register_format",
    "seed_rounding",
    "update_delayed_scales",
]
