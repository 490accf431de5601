"""What a row of the catalogue says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

# The layer that is left when an idea is switched off, for a control: options to change, or a whole
# layer, with its `name`, where another row's is what is left.
Off = Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One FFN variant, router or mixer: the row is its documentation and its test's parameter."""

    name: str
    module: type[nn.Module]  # built as module(config), or with its router or a shared pool
    config: type[Any]  # frozen keyword-only dataclass with cost()
    summary: str
    paper: str
    tiny: Mapping[str, Any]  # the smallest options worth testing
    kind: Literal["ffn", "router", "mixer"] = "ffn"
    width: str | None = None  # the field that `zoo.match` turns; None: it has no width of its own
    router: str | Mapping[str, Any] | None = None  # default router: a name, or a mapping with
    # `name`, perhaps `preset`, and options; None: the variant routes nothing
    defaults: Mapping[str, Any] = field(default_factory=dict)  # in place of the config's own
    aliases: tuple[str, ...] = ()
    off: Off | None = None  # what its settled config becomes with its idea switched off; see `Off`
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # named options
    tokenwise: bool = True  # a token's output does not depend on its neighbours
    own_norm: bool = False  # reads the raw residual stream and norms it itself

    def __post_init__(self) -> None:
        for what, option in (("width", self.width), *(("default", key) for key in self.defaults)):
            if option is not None and option not in self.config.__dataclass_fields__:
                raise ValueError(f"{self.name}: {what} {option!r} is no field of its config")
