"""From a name to a checked config, from a config to a module."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from layers.base import Cost
from layers.names import unknown
from layers.precision import PrecisionPolicy
from zoo.accounting import layer_cost, stored
from zoo.catalogue import FFNS, ROUTERS
from zoo.entry import Entry
from zoo.options import construct, field_names
from zoo.precision import policy_of, set_precision

# other packages' rows: an Entry, or an iterable of them; `layers.precision.formats` reads theirs
ENTRY_POINTS = "moe_zoo.entries"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A name with every option settled: what `create` builds and `cost` counts."""

    entry: Entry
    config: Any
    router_entry: Entry | None = None
    router_config: Any = None
    pool: str | None = None  # of the model, which this layer reads; see zoo.pools

    @property
    def causal(self) -> bool:
        """Whether no token's output, in training too, depends on later tokens."""
        return all(getattr(c, "causal", True) for c in (self.config, self.router_config))

    @property
    def tokenwise(self) -> bool:
        """Whether a token's output in evaluation hangs on no other token, so that a cache serves.

        By the row; a config as settled may say otherwise.
        """
        configs = (self.config, self.router_config)
        return self.entry.tokenwise and all(getattr(c, "tokenwise", True) for c in configs)

    def build(self, pool: nn.Module | None = None) -> nn.Module:
        """A new module with freshly drawn weights. pool: the shared one that it reads, if any."""
        if pool is not None:
            return self.entry.module(self.config, pool)
        if self.router_entry is None:
            return self.entry.module(self.config)
        return self.entry.module(self.config, self.router_entry.module(self.router_config))

    def cost(self, seq_len: int | None = None, **measured: float) -> Cost:
        """Cost of the layer with its router, storage at 16 bits; see `Cost`.

        Args:
            seq_len: tokens of a sequence, for a variant whose cost per token hangs on it (its
                config says `costs_by_sequence`); None: that variant's default.
            measured: what a run measured in place of the designed value, where the variant's
                config takes it (`assignments`: FFN assignments per token).
        """
        if seq_len is not None and getattr(self.config, "costs_by_sequence", False):
            measured["seq_len"] = seq_len
        return layer_cost(self.config, self.router_config, **measured)


def _table(rows: tuple[Entry, ...], kind: str) -> dict[str, Entry]:
    """Rows by name and alias; a clash is an error."""
    table: dict[str, Entry] = {}
    for row in rows:
        for name in (row.name, *row.aliases):
            if name in table:
                raise ValueError(f"two {kind} entries are named {name!r}: rename one")
            table[name] = row
    return table


@cache
def _plugins() -> tuple[Entry, ...]:
    """Rows that other installed packages add."""
    found: list[Entry] = []
    for point in entry_points(group=ENTRY_POINTS):
        loaded = point.load()
        rows = loaded if isinstance(loaded, Iterable) else (loaded,)
        found.extend(row for row in rows if isinstance(row, Entry))
    return tuple(found)


def entries(kind: str = "ffn") -> dict[str, Entry]:
    """Every row of a kind ("ffn" or "router") by name and alias, other packages' included."""
    own = {"ffn": FFNS, "router": ROUTERS}
    if kind not in own:
        raise unknown("kind of entry", kind, own)
    return _table(own[kind] + tuple(e for e in _plugins() if e.kind == kind), kind)


def find(name: str, kind: str = "ffn") -> Entry:
    """The row of that name or alias.

    Raises:
        ValueError: when there is none; names the nearest.
    """
    own = _table({"ffn": FFNS, "router": ROUTERS}[kind], kind)
    if name in own:
        return own[name]
    table = entries(kind)
    if name not in table:
        raise unknown({"ffn": "FFN variant", "router": "router"}[kind], name, table)
    return table[name]


def names(pattern: str = "*", kind: str = "ffn") -> list[str]:
    """Names (not aliases) of the FFN variants, or routers, that match a glob."""
    rows = {entry.name for entry in entries(kind).values()}
    return sorted(name for name in rows if fnmatchcase(name, pattern))


def resolve(
    name: str,
    *,
    preset: str | None = None,
    router: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> Choice:
    """Settle every option of a variant.

    Args:
        name: a row of the catalogue, or an alias.
        preset: a named set of options of that row; options given here win over it.
        router: another router by name, or a mapping with `name` and its options.
        options: fields of the variant's config or of its router's; one that both have goes to both,
            and what the layer derives from its own (n_routes) goes to a router that asks for it.

    Raises:
        ValueError: for an unknown name, preset or option, a missing or impossible value.
    """
    entry = find(name)
    options = {**entry.defaults, **_preset(entry, preset), **options}
    router_entry, router_defaults, router_options = _router(entry, router)
    known = field_names(entry.config)
    router_known = field_names(router_entry.config) if router_entry else []
    for option in options:
        if option not in known and option not in router_known:
            raise unknown(f"option of {entry.name}", option, {*known, *router_known})
    config = construct(entry, {k: v for k, v in options.items() if k in known})
    if router_entry is None or not getattr(config, "routes", True):
        return _without_router(entry, config, router, {o for o in options if o not in known})
    shared = {k: getattr(config, k) for k in router_known if hasattr(config, k)}  # n_routes too
    flat = {k: v for k, v in options.items() if k in router_known and k not in known}
    for option, value in router_options.items():
        if option not in router_known:
            raise unknown(f"option of router {router_entry.name}", option, router_known)
        if option in shared and shared[option] != value:
            raise ValueError(
                f"router option {option}={value} contradicts {entry.name}'s {option}="
                f"{shared[option]}: give it once, beside the variant's name"
            )
    settled = {**router_defaults, **shared, **flat, **router_options}
    router_config = construct(router_entry, settled)
    return Choice(
        entry=entry, config=config, router_entry=router_entry, router_config=router_config
    )


def _without_router(entry: Entry, config: Any, router: Any, options: set[str]) -> Choice:
    """Of a variant that routes nothing, ever or with these options, so that none is unread."""
    if router is not None or options:
        given = f"router={router!r}" if router is not None else ", ".join(sorted(options))
        raise ValueError(f"{entry.name} routes nothing with these options, so leave out {given}")
    return Choice(entry=entry, config=config)


def _preset(entry: Entry, preset: str | None) -> Mapping[str, Any]:
    if preset is None:
        return {}
    if preset not in entry.presets:
        raise unknown(f"preset of {entry.name}", preset, entry.presets)
    return entry.presets[preset]


def _router(
    entry: Entry, router: str | Mapping[str, Any] | None
) -> tuple[Entry | None, Mapping[str, Any], Mapping[str, Any]]:
    """Its row, options that the catalogue gives it, and options that the caller gives it."""
    if entry.router is None:
        if router is not None:
            raise ValueError(f"{entry.name} routes nothing, so it takes no router, got {router!r}")
        return None, {}, {}
    if router is None:
        found, options = read_router(entry.router)
        return found, options, {}
    found, options = read_router(router)
    return found, {}, options


def read_router(router: str | Mapping[str, Any]) -> tuple[Entry, dict[str, Any]]:
    """A router's row and options, from its name or a mapping with `name`, `preset` and options."""
    if isinstance(router, str):
        return find(router, "router"), {}
    if "name" not in router:
        raise ValueError(f"router needs 'name', got {dict(router)}")
    found = find(router["name"], "router")
    said = {k: v for k, v in router.items() if k not in ("name", "preset")}
    return found, {**_preset(found, router.get("preset")), **said}


def create(
    name: str,
    *,
    preset: str | None = None,
    router: str | Mapping[str, Any] | None = None,
    precision: str | Mapping[str, Any] | PrecisionPolicy | None = None,
    **options: Any,
) -> nn.Module:
    """Build a variant by name: `zoo.create("moe_plus_plus", d_model=512)`.

    Called as `ffn(x, carry=None, mask=None)` with x: [B, S, D]; returns `layers.base.FFNOutput`.

    Args:
        name, preset, router, options: as in `resolve`.
        precision: a preset's name or a policy; None computes in the dtype of the input.
    """
    module = resolve(name, preset=preset, router=router, **options).build()
    if precision is not None:
        set_precision(module, precision)
    return module


def cost(
    name: str,
    *,
    preset: str | None = None,
    router: str | Mapping[str, Any] | None = None,
    precision: str | Mapping[str, Any] | PrecisionPolicy = "bf16",
    **options: Any,
) -> Cost:
    """What one token costs in a variant, router included, without building it.

    `precision` decides the bytes that a weight takes in store; FLOPs do not depend on it.
    """
    choice = resolve(name, preset=preset, router=router, **options)
    return stored(choice.cost(), policy_of(precision))
