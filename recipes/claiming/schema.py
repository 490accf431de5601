"""What a claim says: a sentence of a paper, the study that tries it, the tests that judge it.

paper:
  says: "..."                       # in one sentence
  arxiv: "2506.06644"
  where: abstract, figure 3
  numbers: ["...", "..."]           # as published
study: {...}                        # keys of recipes.study.schema; name and out come from the claim
tests:
  - {of: spark, against: swiglu, measure: bpb, direction: lower, threshold: 0.02, note: "..."}
  - {of: {precision: nvfp4}, against: {precision: bf16}, measure: bpb, direction: equal,
     margin: 0.015, scale: ratio}
limits: ["..."]                     # what this scale can and cannot say
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from layers.names import check_positive, unknown
from recipes import load
from recipes.claiming.measures import MEASURES

PACKAGE = "recipes.claims"


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What is claimed, and where."""

    says: str = "???"  # in one sentence
    arxiv: str = "???"
    where: str = "???"  # section, table or figure
    numbers: list[str] = field(default_factory=list)  # as published


@dataclass(frozen=True, kw_only=True)
class Side:
    """The runs of a test: one variant in one precision."""

    variant: str | None = None  # a label; None: the baseline's
    precision: str | None = None  # a label; None: the baseline's
    width: int | None = None  # of the submodel of nested runs that has it in every layer


@dataclass(frozen=True, kw_only=True)
class Test:
    """One sentence that the runs bear out or not.

    The 95 % interval of `of` minus `against` (of their ratio, where `scale` says so) is held
    against the threshold; for `equal` two one-sided tests are held against the margin.
    """

    __test__ = False  # for pytest

    of: Any = field(default_factory=dict)  # a Side, or its variant's label
    against: Any = None  # the same; None: the figure itself is judged
    measure: str = "???"  # a row of recipes.claiming.measures.MEASURES
    tokens: int = 1  # processed together, of weight_bytes_per_token
    direction: Literal["lower", "higher", "equal"] = "???"  # type: ignore[assignment]
    threshold: float | None = None  # of equal: the centre; None: 0, of a ratio 1
    margin: float | None = None  # of equal alone: largest distance; of a ratio, its logarithm's
    scale: Literal["difference", "ratio"] = "difference"
    note: str = ""  # why this threshold

    @property
    def bound(self) -> float:
        """The threshold, with its default."""
        default = 1.0 if self.scale == "ratio" else 0.0
        return default if self.threshold is None else self.threshold


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What `zoo claims` reads; `tests` are checked mappings until `read_tests` reads them."""

    name: str = "???"
    title: str = "???"
    paper: Paper = field(default_factory=Paper)
    study: Any = field(default_factory=dict)
    tests: list[Any] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)


def names() -> list[str]:
    """Of the shipped claims."""
    return sorted(path.stem for path in Path(str(resources.files(PACKAGE))).glob("*.yaml"))


def read_claim(source: str | Path | Mapping[str, Any]) -> Claim:
    """A claim from a file, the name of a shipped one or a mapping, checked but for its study.

    Raises:
        ValueError: for an unknown key, measure or wrong value, or a claim without a test.
    """
    if isinstance(source, Mapping):
        plain = dict(source)
    else:
        plain = load.read_yaml(load.find(source, PACKAGE))
        plain.setdefault("name", Path(source).stem)
    claim = load.merge(Claim, plain, {}, what="claim")
    if not isinstance(claim.study, Mapping):
        raise ValueError(f"claim {claim.name}: study must be a mapping of a study's keys")
    taken = [key for key in ("name", "out") if key in claim.study]
    if taken:
        raise ValueError(f"claim {claim.name}: study.{taken[0]} comes from the claim: leave it out")
    if not claim.tests:
        raise ValueError(f"claim {claim.name}: tests is empty, so nothing would judge it")
    read_tests(claim)
    return claim


def read_tests(claim: Claim) -> tuple[Test, ...]:
    """The tests, their sides read.

    Raises:
        ValueError: naming the test.
    """
    found = []
    for i, plain in enumerate(claim.tests):
        where = f"claim {claim.name}: tests[{i}]"
        if not isinstance(plain, Mapping):
            raise ValueError(f"{where} must be a mapping, got {plain!r}")
        test = load.merge(Test, plain, {}, what=where)
        sides = {
            key: _side(value, f"{where}.{key}")
            for key, value in (("of", test.of), ("against", test.against))
        }
        test = Test(**{**vars(test), **sides})
        _check(test, where)
        found.append(test)
    return tuple(found)


def _side(said: Any, where: str) -> Side | None:
    if said is None:
        return None
    if isinstance(said, str):
        return Side(variant=said)
    if not isinstance(said, Mapping):
        raise ValueError(f"{where} must be a variant's label or a mapping, got {said!r}")
    return load.merge(Side, said, {}, what=where)


def _check(test: Test, where: str) -> None:
    if test.measure not in MEASURES:
        raise ValueError(f"{where}: {unknown('measure', test.measure, MEASURES)}")
    if (test.direction == "equal") == (test.margin is None):
        raise ValueError(f"{where}: equal takes a margin, lower and higher take none")
    check_positive(**{f"{where}: tokens": test.tokens})
    if test.margin is not None:
        check_positive(**{f"{where}: margin": test.margin})
    if test.scale == "ratio":
        if test.against is None:
            raise ValueError(f"{where}: a ratio needs something to be against")
        check_positive(**{f"{where}: threshold of a ratio": test.bound})
