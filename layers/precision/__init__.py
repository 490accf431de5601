"""Formats, policies, and how a policy reaches a module."""

from layers.precision.apply import CoverageReport, Covered, apply_policy, leaves
from layers.precision.formats import FORMATS, fake_quantize, quantize
from layers.precision.leaf import Leaf
from layers.precision.policy import PRESETS, LeafPrecision, PrecisionPolicy, Rule
from layers.precision.spec import QSpec

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
    "apply_policy",
    "fake_quantize",
    "leaves",
    "quantize",
]
