"""What a row of the catalogue says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn


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
    off: Mapping[str, Any] = field(default_factory=dict)  # options that switch its idea off
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # named options
    tokenwise: bool = True  # a token's output does not depend on its neighbours
    own_norm: bool = False  # reads the raw residual stream and norms it itself

    def __post_init__(self) -> None:
        named = [("default", key) for key in self.defaults] + [("off", key) for key in self.off]
        for what, option in (("width", self.width), *named):
            if option is not None and option not in self.config.__dataclass_fields__:
                raise ValueError(f"{self.name}: {what} {option!r} is no field of its config")
