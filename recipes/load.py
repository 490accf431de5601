"""From files and `key=value` to a checked recipe: dataclasses < one YAML < overrides."""

import difflib
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from layers.names import check_positive
from recipes.keys import check_keys, one_line, type_error
from recipes.nested import check_nested
from recipes.optim import check_optim
from recipes.schema import Recipe
from recipes.synthetic import check_task
from recipes.table_optim import check_tables
from recipes.text import corpus_row, tokenizer_row
from zoo.model import build
from zoo.precision import policy_of

T = TypeVar("T")
Overrides = Sequence[str] | Mapping[str, Any]


def load(source: str | Path | Mapping[str, Any], overrides: Overrides = ()) -> Recipe:
    """A checked recipe.

    Args:
        source: a YAML file, the bare name of a shipped one ("moe"), or a plain mapping.
        overrides: `key=value` strings with dotted keys, or a mapping merged over the source.

    Raises:
        ValueError: in one line, with the dotted path, what is allowed and the nearest name.
    """
    plain = dict(source) if isinstance(source, Mapping) else read_yaml(find(source, "recipes"))
    recipe = merge(Recipe, plain, overrides, what="recipe")
    check(recipe)
    return recipe


def find(source: str | Path, package: str) -> Path:
    """The file of that path, or the YAML of that bare name that the package ships."""
    path = Path(source)
    if path.is_file():
        return path
    folder = Path(str(resources.files(package)))
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    if str(source) in names:
        return folder / f"{source}.yaml"
    near = difflib.get_close_matches(str(source), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"no file {str(source)!r}, and {package} ships none of that name.{hint} "
        f"Shipped: {', '.join(names)}"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that one YAML file holds."""
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {one_line(error)}") from None
    if not isinstance(plain, dict):
        raise ValueError(f"{path} must hold a mapping of keys, got a {type(plain).__name__}")
    return typing.cast("dict[str, Any]", plain)


def parse(overrides: Overrides) -> dict[str, Any]:
    """`key=value` strings as a nested mapping; a mapping is handed back as it is."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"expected key=value, got {text!r}")
    try:
        plain = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"cannot read {' '.join(overrides)}: {one_line(error)}") from None
    return typing.cast("dict[str, Any]", plain)


def merge(schema: type[T], plain: Mapping[str, Any], overrides: Overrides, *, what: str) -> T:
    """An instance of the dataclass `schema`, whatever is not said taken from its defaults."""
    said = parse(overrides)
    for part in (plain, said):
        check_keys(schema, part, what=what)
    both = merged(plain, said)
    try:
        return typing.cast(T, OmegaConf.to_object(OmegaConf.merge(schema, both)))
    except MissingMandatoryValue as error:
        raise ValueError(f"{what}: {error.full_key} must be given") from None
    except OmegaConfBaseException as error:
        raise type_error(schema, error, flatten(both), what) from None


def merged(plain: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """`said` over `plain`, mapping by mapping.

    A mapping that says another `name` replaces the whole: options of one choice are none of
    another's.
    """
    result = dict(plain)
    for key, value in said.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            same = value.get("name", old.get("name")) == old.get("name")
            value = merged(old, value) if same else value
        result[key] = value
    return result


def to_plain(recipe: Any) -> dict[str, Any]:
    """A recipe as dicts, lists and scalars, every default written out."""
    return _listed(OmegaConf.to_container(OmegaConf.structured(recipe), resolve=True))


def to_yaml(recipe: Any) -> str:
    """A recipe as YAML that `load` reads back equal."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(recipe)), resolve=True)


def flatten(plain: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted path: leaf}. Lists are leaves."""
    if not isinstance(plain, Mapping) or not plain:
        return {prefix: plain} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Dotted paths in which two plain recipes differ."""
    a, b = flatten(_listed(one)), flatten(_listed(other))
    missing = object()
    return [path for path in {**a, **b} if a.get(path, missing) != b.get(path, missing)]


def check(recipe: Recipe) -> None:
    """Raise for numbers, names and choices that no run could use, before anything is built."""
    trainer, data = recipe.trainer, recipe.data
    numbers: dict[str, float | None] = {
        "max_steps": trainer.max_steps,
        "accumulate": trainer.accumulate,
        "eval_every_steps": trainer.eval_every_steps,
        "checkpoint_every_steps": trainer.checkpoint_every_steps,
        "log_every_steps": trainer.log_every_steps,
        "sharpness_eps": trainer.sharpness_eps,
        "threads": trainer.threads,
    }
    check_positive(**{f"trainer.{k}": n for k, n in numbers.items() if n is not None})
    check_positive(**{"data.seq_len": data.seq_len, "data.batch_size": data.batch_size})
    if recipe.seed < 0:
        raise ValueError(f"seed must be 0 or more, got {recipe.seed}")
    check_optim(recipe.optim)
    check_tables(recipe)
    corpus_row(data.corpus)
    tokens, task = tokenizer_row(data.tokenizer), check_task(data)
    whose = f"tokenizer {data.tokenizer!r}" if task is None else f"task {task.name!r}"
    vocab_size = tokens.vocab_size if task is None else task.vocab
    if recipe.model.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size must be at least {vocab_size} for {whose}, "
            f"got {recipe.model.vocab_size}"
        )
    if recipe.model.max_seq_len < data.seq_len:
        raise ValueError(
            f"model.max_seq_len must be at least data.seq_len={data.seq_len}, "
            f"got {recipe.model.max_seq_len}"
        )
    recipe.model.layers()
    check_nested(recipe)
    how = (trainer.devices, trainer.expert_parallel, trainer.strategy, trainer.table_parallel)
    if how != (1, 1, "auto", "none"):
        from recipes.parallel import check_parallel  # as heavy as lightning

        check_parallel(recipe)
    policy_of(recipe.precision)
    if not isinstance(recipe.precision, str):  # a rule or switch that matches nothing is told here
        with torch.device("meta"):
            build(recipe)
    if recipe.probes and trainer.compile:
        raise ValueError("probes work in eager mode only: leave out probes or trainer.compile")


def _listed(plain: Any) -> Any:
    """Tuples as lists, as YAML and JSON give them back."""
    if isinstance(plain, dict):
        return {str(key): _listed(value) for key, value in plain.items()}
    return [_listed(value) for value in plain] if isinstance(plain, list | tuple) else plain
