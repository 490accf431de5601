"""Short names of what a recipe chooses, for ids and tables."""

from collections.abc import Mapping
from typing import Any

from zoo.precision import policy_of


def ffn_label(ffn: Any) -> str:
    """The catalogue's name of a recipe's FFN; several are joined by "+"."""
    if isinstance(ffn, str):
        return ffn
    if isinstance(ffn, Mapping):
        return str(ffn["name"])
    return "+".join(dict.fromkeys(ffn_label(choice) for choice in ffn))


def precision_label(precision: Any) -> str:
    """The name of a recipe's precision policy."""
    return policy_of(precision).name
