"""Give every leaf of a module its precision, and say what was touched and what was not."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from layers.names import check_choice
from layers.precision.leaf import Leaf
from layers.precision.operands import LeafPrecision
from layers.precision.policy import HIGH_ROLES, ROLES, PrecisionPolicy

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)(?:\.|$)")


@dataclass(frozen=True, kw_only=True)
class Covered:
    """One parameter and what the policy made of it."""

    name: str  # as in named_parameters()
    role: str
    params: int
    flops: float | None  # matmul FLOPs per token that it takes part in, where known
    rule: int | None  # number of the rule that matched; None: the default, or no leaf
    precision: LeafPrecision | None  # None: no leaf owns it, so no policy touches it

    @property
    def format(self) -> str:
        """The formats of its six operands, or "untouched"."""
        return self.precision.label if self.precision else "untouched"


@dataclass(frozen=True, kw_only=True)
class CoverageReport:
    """What `apply_policy` did, parameter by parameter."""

    policy: PrecisionPolicy
    parameters: tuple[Covered, ...]

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the weights whose leaf got a precision."""
        return tuple(p.name for p in self.parameters if p.precision)

    @property
    def untouched(self) -> tuple[str, ...]:
        """Names of the parameters that no leaf owns."""
        return tuple(p.name for p in self.parameters if not p.precision)

    def weight_share(self) -> dict[str, float]:
        """Share of all parameters by format; adds up to one."""
        return _shares({p.name: p.params for p in self.parameters}, self.parameters)

    def flops_share(self) -> dict[str, float] | None:
        """Share of matmul FLOPs by format, or None where FLOPs are not known."""
        flops = {p.name: p.flops for p in self.parameters}
        known = {name: f for name, f in flops.items() if f is not None}
        return _shares(known, self.parameters) if len(known) == len(flops) else None

    def __str__(self) -> str:
        shares = ", ".join(f"{fmt} {share:.1%}" for fmt, share in self.weight_share().items())
        rows = [f"{p.name:40s} {p.role:12s} {p.params:>12,d}  {p.format}" for p in self.parameters]
        return "\n".join([f"{self.policy.name}: weights {shares}", *rows])


def _shares(amounts: Mapping[str, float], covered: tuple[Covered, ...]) -> dict[str, float]:
    whole = sum(amounts.values()) or 1
    shares: dict[str, float] = {}
    for p in covered:
        shares[p.format] = shares.get(p.format, 0.0) + amounts[p.name] / whole
    return shares


def leaves(module: nn.Module) -> dict[str, Leaf]:
    """Every leaf of a module by its qualified name; "" when the module is one itself."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Leaf)}


def apply_policy(
    module: nn.Module,
    policy: PrecisionPolicy,
    *,
    where: str = "*",
    active: Sequence[int] = (),
    roles: Mapping[str, str] | None = None,
    flops: Mapping[str, float] | None = None,
) -> CoverageReport:
    """Set the precision of every leaf whose qualified name matches the glob `where`.

    Args:
        module: any module; its parameters, names and dtypes stay as they are.
        policy: what to set.
        where: glob over qualified leaf names, e.g. "blocks.*.ffn.*"; other leaves stay as they are.
        active: the switches of the policy's schedule that hold, from `policy.active`.
        roles: role by parameter name, for parameters that no leaf owns.
        flops: matmul FLOPs per token by parameter name, for the report's shares.

    Returns:
        The coverage report; it lists every parameter of the module.

    Raises:
        ValueError: when no leaf matches; under a strict policy also when a rule with a name or
            layers matches no leaf, or a matrix of a quantisable role is owned by no leaf.
    """
    names = dict(module.named_parameters(remove_duplicate=False))
    owned = {f"{n}.weight".lstrip("."): (n, leaf) for n, leaf in leaves(module).items()}
    touched = {p: v for p, v in owned.items() if fnmatchcase(v[0], where)}
    if not touched:
        known = ", ".join(n for n, _ in owned.values()) or "none"
        raise ValueError(
            f"where={where!r} matches no leaf, so nothing would change. Leaves: {known}"
        )
    n_layers = 1 + max((b for n, _ in owned.values() if (b := block_of(n)) is not None), default=-1)
    choices = {
        parameter: policy.resolve(
            name=name, role=leaf.role, layer=block_of(name), n_layers=n_layers, active=active
        )
        for parameter, (name, leaf) in touched.items()
        if parameter in names  # a packed weight is none, and keeps the precision it is packed in
    }
    for parameter, (precision, _) in choices.items():
        _check_backend(*owned[parameter], precision)
    rows = _rows(names, owned, choices, roles or {}, flops)
    report = CoverageReport(policy=policy, parameters=tuple(rows))
    if policy.strict and where == "*":
        _refuse_misses(module, report, n_layers)
        _refuse_idle_switches(policy, owned, n_layers)
    for parameter, (precision, _) in choices.items():
        owned[parameter][1].precision = precision
    return report


def _rows(
    parameters: Mapping[str, nn.Parameter],
    owned: Mapping[str, tuple[str, Leaf]],
    choices: Mapping[str, tuple[LeafPrecision, int | None]],
    roles: Mapping[str, str],
    flops: Mapping[str, float] | None,
) -> Iterator[Covered]:
    """A row for each parameter; the numbers of a tied one count once."""
    seen = set()
    for name, parameter in parameters.items():
        role, rule, precision = roles.get(name, "other"), None, None
        if name in owned:
            leaf = owned[name][1]
            role, precision = leaf.role, leaf.precision
        if name in choices:
            precision, rule = choices[name]
        yield Covered(
            name=name, role=role, rule=rule, precision=precision,
            params=0 if id(parameter) in seen else parameter.numel(),
            flops=None if flops is None else flops.get(name, 0.0),
        )  # fmt: skip
        seen.add(id(parameter))


def _check_backend(name: str, leaf: Leaf, precision: LeafPrecision) -> None:
    if precision.backend == "hardware" and leaf.multiplies:
        from layers.precision.hardware import check_hardware  # which imports what imports this

        try:
            check_hardware(precision, leaf.device())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def block_of(name: str) -> int | None:
    """The number of the block that a leaf of that name stands in."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def _refuse_misses(module: nn.Module, report: CoverageReport, n_layers: int) -> None:
    biases = {f"{name}.bias" for name in leaves(module)}  # of experts: [E, out], never multiplied
    matrices = {n for n, p in module.named_parameters() if p.ndim >= 2} - biases
    missed = [
        p.name
        for p in report.parameters
        if p.precision is None and p.name in matrices and p.role not in HIGH_ROLES
    ]
    present = {p.role for p in report.parameters}
    for rule in (*report.policy.rules, *(switch.rule for switch in report.policy.schedule)):
        for role in rule.roles:
            check_choice("role", role, sorted({*ROLES, *present}))
    if missed:
        raise ValueError(
            f"precision {report.policy.name!r} is strict, but no leaf owns {', '.join(missed)}: "
            "build them from layers.linear, or set strict to false"
        )
    used = {p.rule for p in report.parameters}
    for number, rule in enumerate(report.policy.rules):
        by_layer = rule.layers is not None and n_layers > 0  # a part alone has no layers
        by_role = any(role not in HIGH_ROLES for role in rule.roles)  # those are named in case
        if number not in used and (rule.name != "*" or by_layer or by_role):
            raise ValueError(
                f"precision {report.policy.name!r} is strict, but rule {number} "
                f"({rule.to_plain()}) matches no leaf: correct it, or set strict to false"
            )


def _refuse_idle_switches(
    policy: PrecisionPolicy, owned: Mapping[str, tuple[str, Leaf]], n_layers: int
) -> None:
    for number, switch in enumerate(policy.schedule):
        found = any(
            switch.matches(name=name, role=leaf.role, layer=block_of(name), n_layers=n_layers)
            for name, leaf in owned.values()
        )
        if not found and (n_layers > 0 or switch.rule.layers is None):
            raise ValueError(
                f"precision {policy.name!r} is strict, but switch {number} ({switch.to_plain()}) "
                "matches no leaf: correct it, or set strict to false"
            )
