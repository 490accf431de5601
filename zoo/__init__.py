"""Pick an FFN variant by name, cost it, build it, set its precision, compose a language model."""

from zoo.accounting import module_cost
from zoo.budget import Match, match
from zoo.describe import Card, describe
from zoo.model import LanguageModel, ModelConfig, build
from zoo.precision import precisions, set_precision
from zoo.registry import cost, create, names, resolve

__all__ = [
    "Card",
    "LanguageModel",
    "Match",
    "ModelConfig",
    "build",
    "cost",
    "create",
    "describe",
    "match",
    "module_cost",
    "names",
    "precisions",
    "resolve",
    "set_precision",
]
