"""Which operand of which matmul stands in which format: one frozen, serialisable policy.

Roles come from the leaf that owns the weight, so a policy never names a variant and a variant
never names a format.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from layers.names import check_choice, unknown
from layers.precision.operands import BACKENDS, GEMMS, LeafPrecision
from layers.selection import select_layers

# Never on a coarse grid unless a rule says so by role: a changed score changes which expert runs.
HIGH_ROLES = (
    "router",
    "norm",
    "embedding",
    "head",
    "bias",
    "constant",
    "product_keys",
    "depthwise",
)
# a variant may add its own
ROLES = ("ffn", "expert", "attention", "memory_values", "query_proj", *HIGH_ROLES)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which leaves, and what for them. Every selector that is given must match."""

    use: LeafPrecision
    roles: tuple[str, ...] = ()  # any, when empty
    name: str = "*"  # glob over the leaf's qualified name, e.g. "blocks.*.ffn.down"
    layers: str | None = None  # blocks as in layers.selection: "0", "-1:", "last 15%"

    def __post_init__(self) -> None:
        if self.layers is not None:
            select_layers(self.layers, 10_000)  # the grammar; how many there are shows later

    def matches(self, *, name: str, role: str, layer: int | None, n_layers: int) -> bool:
        """Whether a leaf of that name, role and block falls under the rule."""
        if self.roles and role not in self.roles:
            return False
        if not fnmatchcase(name, self.name):
            return False
        return self.layers is None or (
            layer is not None and layer in select_layers(self.layers, n_layers)
        )

    @classmethod
    def of(cls, value: "Rule | dict[str, Any]") -> "Rule":
        """From a mapping with `use` and any of `roles`, `name`, `layers`."""
        if isinstance(value, Rule):
            return value
        for key in value:
            check_choice("field of a precision rule", key, [f.name for f in fields(cls)])
        if "use" not in value:
            raise ValueError(f"a precision rule needs 'use', got {sorted(value)}")
        roles = value.get("roles", ())
        layers = value.get("layers")
        return cls(
            use=LeafPrecision.of(value["use"]),
            roles=(roles,) if isinstance(roles, str) else tuple(roles),
            name=value.get("name", "*"),
            layers=None if layers is None else str(layers),
        )

    def to_plain(self) -> dict[str, Any]:
        """The plain mapping that `of` reads back."""
        plain: dict[str, Any] = {"use": self.use.to_plain()}
        if self.roles:
            plain["roles"] = list(self.roles)
        if self.name != "*":
            plain["name"] = self.name
        return plain | ({} if self.layers is None else {"layers": self.layers})


@dataclass(frozen=True, kw_only=True)
class Switch:
    """From a step on, other formats for some matmuls of some leaves (arXiv:2509.25149, sec. 4.4).

    Without `roles` it leaves the roles alone that are high by default.
    """

    at: int | float  # a step, or a share of all steps between 0 and 1
    rule: Rule
    gemms: tuple[str, ...] = tuple(GEMMS)  # ("fprop",) switches the forward pass alone

    def __post_init__(self) -> None:
        whole = isinstance(self.at, int) and not isinstance(self.at, bool)
        if not (whole and self.at >= 0) and not (isinstance(self.at, float) and 0 <= self.at <= 1):
            raise ValueError(f"a switch's `at` is a step or a share in [0, 1], got {self.at!r}")
        if not self.gemms:
            raise ValueError(f"a switch's `gemms` is empty: name some of {', '.join(GEMMS)}")
        for gemm in self.gemms:
            check_choice("matmul", gemm, GEMMS)

    def is_active(self, step: int, max_steps: int) -> bool:
        """Whether it holds for the step of that number, counted from 0."""
        return step >= (self.at * max_steps if isinstance(self.at, float) else self.at)

    def matches(self, *, name: str, role: str, layer: int | None, n_layers: int) -> bool:
        """Whether it changes a leaf of that name, role and block."""
        if not self.rule.roles and role in HIGH_ROLES:
            return False
        return self.rule.matches(name=name, role=role, layer=layer, n_layers=n_layers)

    @classmethod
    def of(cls, value: "Switch | dict[str, Any]") -> "Switch":
        """From a mapping with `at`, `use` and any of `gemms`, `roles`, `name`, `layers`."""
        if isinstance(value, Switch):
            return value
        for key in value:
            known = ["at", "gemms", *(f.name for f in fields(Rule))]
            check_choice("field of a precision switch", key, known)
        if "at" not in value:
            raise ValueError(f"a precision switch needs 'at', got {sorted(value)}")
        rule = Rule.of({k: v for k, v in value.items() if k not in ("at", "gemms")})
        gemms = value.get("gemms", tuple(GEMMS))
        gemms = (gemms,) if isinstance(gemms, str) else tuple(gemms)
        return cls(at=value["at"], rule=rule, gemms=gemms)

    def to_plain(self) -> dict[str, Any]:
        """The plain mapping that `of` reads back."""
        plain: dict[str, Any] = {"at": self.at, **self.rule.to_plain()}
        return plain if set(self.gemms) == set(GEMMS) else plain | {"gemms": list(self.gemms)}


@dataclass(frozen=True, kw_only=True)
class PrecisionPolicy:
    """The whole of a model's precision. The first rule that matches a leaf wins."""

    name: str
    default: LeafPrecision
    rules: tuple[Rule, ...] = ()
    strict: bool = True  # a weight of a quantisable role that no leaf owns is an error
    seed: int = 0  # of random rounding and signs, beside the run's own
    schedule: tuple[Switch, ...] = ()  # later ones over earlier ones
    backend: Literal["emulated", "hardware"] = "emulated"  # of every low product, see LeafPrecision

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, BACKENDS)

    def active(self, step: int, max_steps: int) -> tuple[int, ...]:
        """The switches of the schedule that hold at a step, by number."""
        return tuple(i for i, s in enumerate(self.schedule) if s.is_active(step, max_steps))

    def resolve(
        self,
        *,
        name: str,
        role: str,
        layer: int | None = None,
        n_layers: int = 0,
        active: Sequence[int] = (),
    ) -> tuple[LeafPrecision, int | None]:
        """What a leaf gets, and the number of the rule that said so (None: the default).

        active: the switches that hold, from `active`; none: as training starts.
        """
        where = {"name": name, "role": role, "layer": layer, "n_layers": n_layers}
        use, number = self.default, None
        for i, rule in enumerate(self.rules):
            if rule.matches(**where):
                use, number = rule.use, i
                break
        for i in active:
            if self.schedule[i].matches(**where):
                use = use.replacing(self.schedule[i].gemms, self.schedule[i].rule.use)
        if self.backend != "emulated" and not use.is_cast:
            use = replace(use, backend=self.backend)
        return use, number

    @classmethod
    def of(cls, value: "PrecisionPolicy | str | dict[str, Any]") -> "PrecisionPolicy":
        """From a preset's name, a mapping as in YAML, or a policy.

        A mapping may name a preset as its `base`: its own rules then come before the preset's,
        and what else it says replaces what the preset says.

        Raises:
            ValueError: for a name that is no preset, an unknown field, format or option.
        """
        from layers.precision.presets import PRESETS  # which are built of policies

        if isinstance(value, PrecisionPolicy):
            return value
        if isinstance(value, str):
            if value not in PRESETS:
                raise unknown("precision", value, PRESETS)
            return PRESETS[value]
        if not isinstance(value, dict):
            raise ValueError(f"precision must be a preset's name or a mapping, got {value!r}")
        for key in value:
            known = ["base", *(f.name for f in fields(cls))]
            check_choice("field of a precision policy", key, known)
        given = {key: read(value[key]) for key, read in _READ.items() if key in value}
        if "base" in value:
            base = cls.of(value["base"])
            given["rules"] = (*given.get("rules", ()), *base.rules)
            return replace(base, **{"name": f"{base.name}_custom", **given})
        if "default" not in value:
            raise ValueError(f"a precision policy needs 'default' or 'base', got {sorted(value)}")
        return cls(**{"name": "custom", **given})

    def to_plain(self) -> dict[str, Any]:
        """The plain mapping that `of` reads back, for YAML and JSON."""
        plain: dict[str, Any] = {
            "name": self.name,
            "default": self.default.to_plain(),
            "rules": [rule.to_plain() for rule in self.rules],
            "strict": self.strict,
        }
        if self.seed:
            plain["seed"] = self.seed
        if self.backend != "emulated":
            plain["backend"] = self.backend
        if self.schedule:
            plain["schedule"] = [switch.to_plain() for switch in self.schedule]
        return plain


_READ: dict[str, Callable[[Any], Any]] = {
    "name": str,
    "default": LeafPrecision.of,
    "rules": lambda rules: tuple(Rule.of(rule) for rule in rules),
    "strict": bool,
    "seed": int,
    "backend": str,
    "schedule": lambda switches: tuple(Switch.of(switch) for switch in switches),
}
