"""Which operand of which matmul stands in which format: one frozen, serialisable policy.

Roles come from the leaf that owns the weight, so a policy never names a variant and a variant
never names a format. Six operands a leaf (precision.md 10), with y[M, N] = x[M, K] w[N, K]^T:
fprop multiplies x and w, dgrad multiplies dy and w, wgrad multiplies dy and x. Each is written
along the axis that its matmul sums over; gradients pass straight through the rounding.
"""

from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

import torch

from layers.names import check_choice, unknown
from layers.precision.formats import check_spec
from layers.precision.spec import HIGH_FORMATS, QSpec
from layers.selection import select_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

OPERANDS = ("fprop_x", "fprop_w", "dgrad_dy", "dgrad_w", "wgrad_dy", "wgrad_x")

# Never on a coarse grid unless a rule says so by role: a changed score changes which expert runs.
HIGH_ROLES = ("router", "norm", "embedding", "head", "constant", "product_keys")


@dataclass(frozen=True, kw_only=True)
class LeafPrecision:
    """The six operands of one leaf. A `ValueTable` reads its rows through `fprop_w` alone."""

    fprop_x: QSpec
    fprop_w: QSpec
    dgrad_dy: QSpec
    dgrad_w: QSpec
    wgrad_dy: QSpec
    wgrad_x: QSpec
    compute: Literal["bf16", "fp32"] = "bf16"  # decoded operands are multiplied and handed on in it

    def __post_init__(self) -> None:
        check_choice("compute dtype", self.compute, DTYPES)
        for operand in OPERANDS:
            check_spec(getattr(self, operand))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which decoded operands are multiplied and results handed on."""
        return DTYPES[self.compute]

    @cached_property
    def is_cast(self) -> bool:
        """Whether every operand is only cast to `compute`. Asked at every call of a leaf."""
        return all(getattr(self, o) == QSpec(format=self.compute) for o in OPERANDS)

    @property
    def label(self) -> str:
        """One word where all operands share a format, all formats otherwise."""
        return "/".join(dict.fromkeys(getattr(self, o).format for o in OPERANDS))

    @classmethod
    def of(cls, value: Any) -> "LeafPrecision":
        """From a format name (all six operands), a mapping, or a LeafPrecision.

        A mapping may give `all` for the operands that it does not name.
        """
        if isinstance(value, LeafPrecision):
            return value
        given: dict[str, Any] = {"all": value} if isinstance(value, str) else dict(value)
        allowed = ("all", "compute", *OPERANDS)
        for key in given:
            check_choice("field of a leaf's precision", key, allowed)
        rest = given.pop("all", None)
        compute = given.pop("compute", None)
        missing = [o for o in OPERANDS if o not in given]
        if rest is None and missing:
            raise ValueError(f"a leaf's precision lacks {', '.join(missing)}: name them, or 'all'")
        specs = {o: QSpec.of(given.get(o, rest)) for o in OPERANDS}  # pyright: ignore
        if compute is None:
            compute = rest if rest in HIGH_FORMATS else "bf16"
        return cls(compute=compute, **specs)

    def to_plain(self) -> str | dict[str, Any]:
        """The shortest plain value that `of` reads back."""
        specs = {o: getattr(self, o).to_plain() for o in OPERANDS}
        first = specs["fprop_x"]
        same = all(spec == first for spec in specs.values())
        plain: dict[str, Any] = {"all": first} if same else specs
        usual = first if same and first in HIGH_FORMATS else "bf16"
        if self.compute != usual:
            return plain | {"compute": self.compute}
        return first if same and isinstance(first, str) else plain


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
class PrecisionPolicy:
    """The whole of a model's precision. The first rule that matches a leaf wins."""

    name: str
    default: LeafPrecision
    rules: tuple[Rule, ...] = ()
    strict: bool = True  # a weight of a quantisable role that no leaf owns is an error

    def resolve(
        self, *, name: str, role: str, layer: int | None = None, n_layers: int = 0
    ) -> tuple[LeafPrecision, int | None]:
        """What a leaf gets, and the number of the rule that said so (None: the default)."""
        for number, rule in enumerate(self.rules):
            if rule.matches(name=name, role=role, layer=layer, n_layers=n_layers):
                return rule.use, number
        return self.default, None

    @classmethod
    def of(cls, value: "PrecisionPolicy | str | dict[str, Any]") -> "PrecisionPolicy":
        """From a preset's name, a mapping as in YAML, or a policy.

        Raises:
            ValueError: for a name that is no preset, an unknown field, format or option.
        """
        if isinstance(value, PrecisionPolicy):
            return value
        if isinstance(value, str):
            if value not in PRESETS:
                raise unknown("precision", value, PRESETS)
            return PRESETS[value]
        if not isinstance(value, dict):
            raise ValueError(f"precision must be a preset's name or a mapping, got {value!r}")
        for key in value:
            check_choice("field of a precision policy", key, [f.name for f in fields(cls)])
        if "default" not in value:
            raise ValueError(f"a precision policy needs 'default', got {sorted(value)}")
        return cls(
            name=value.get("name", "custom"),
            default=LeafPrecision.of(value["default"]),
            rules=tuple(Rule.of(rule) for rule in value.get("rules", ())),
            strict=value.get("strict", True),
        )

    def to_plain(self) -> dict[str, Any]:
        """The plain mapping that `of` reads back, for YAML and JSON."""
        return {
            "name": self.name,
            "default": self.default.to_plain(),
            "rules": [rule.to_plain() for rule in self.rules],
            "strict": self.strict,
        }


def _preset(name: str, default: LeafPrecision, high: str) -> PrecisionPolicy:
    return PrecisionPolicy(
        name=name,
        default=default,
        rules=(Rule(use=LeafPrecision.of(high), roles=HIGH_ROLES),),
    )


def _mxfp4() -> LeafPrecision:
    """Scales rounded up, which never clip (precision.md 3 and 11.5)."""
    return LeafPrecision.of({"all": {"format": "mxfp4", "scale_rule": "rceil"}})


def _nvfp4() -> LeafPrecision:
    """Weights in 16 x 16 tiles, so that fprop and dgrad see the same numbers (2509.25149)."""
    tiled = QSpec(format="nvfp4", tile="2d")
    return LeafPrecision.of({"all": "nvfp4", "fprop_w": tiled, "dgrad_w": tiled})


PRESETS = {
    "fp32": _preset("fp32", LeafPrecision.of("fp32"), "fp32"),
    "bf16": _preset("bf16", LeafPrecision.of("bf16"), "bf16"),
    "mxfp4": _preset("mxfp4", _mxfp4(), "bf16"),
    "nvfp4": _preset("nvfp4", _nvfp4(), "bf16"),
}  # fmt: skip
