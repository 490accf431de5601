"""Where the weights of a run begin: drawn from its seed, or read from another run (`init_from`).

The learning rate, its warm-up and the optimizer's moments start anew, as t5x starts the experts of
an upcycled model (moe.md 12); a recipe that goes on where a schedule stopped says a constant rate
and `warmup_fraction: 0`.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from layers.names import unknown
from recipes.schema import Recipe
from zoo.packing import HEADER
from zoo.pretrained import own_tensors

STATE = ("operand_scales", "peak_history")  # of a leaf's precision, not of the model


def init_file(recipe: Recipe) -> Path | None:
    """The weights file that `init_from` names; None where the weights are drawn.

    Raises:
        ValueError: where there is no such file.
    """
    if recipe.init_from is None:
        return None
    given = Path(recipe.init_from)
    path = given / "weights.safetensors" if given.is_dir() else given
    if not path.is_file():
        raise ValueError(
            f"init_from={recipe.init_from}: no weights at {path}; give a finished run's directory "
            "or a safetensors file"
        )
    return path


def init_sha256(recipe: Recipe) -> str | None:
    """sha256 of the weights file, wherever it lies: what a run says that it began from."""
    path = init_file(recipe)
    if path is None:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_begun(recipe: Recipe, out: Path) -> None:
    """Refuse to go on with, or hand back, a run that began from other weights than it would now.

    A finished run is read where the file is gone. Raises ValueError.
    """
    meta = out / "meta.json"
    if recipe.init_from is None or not meta.is_file():
        return
    if (out / "result.json").is_file() and not Path(recipe.init_from).exists():
        return
    began = json.loads(meta.read_text()).get("init_sha256")
    if began != (now := init_sha256(recipe)):
        raise ValueError(
            f"{out} began from other weights than init_from={recipe.init_from} holds now "
            f"(sha256 {str(began)[:12]}, now {str(now)[:12]}): give another out=, or delete it"
        )


@torch.no_grad()
def begin_from(recipe: Recipe, model: nn.Module) -> None:
    """Fill a model that was just built with the weights of `init_from`, if there is one.

    Names and shapes must agree to the last. Scales of a precision are none of these: they are taken
    where both have them, and start anew where the model's precision is another.

    Raises:
        ValueError: for a file that is broken or packed, a name too many or too few (with the
            nearest), a wrong shape.
    """
    path = init_file(recipe)
    if path is None:
        return
    given, own = _read(path), own_tensors(model)
    for name in sorted(given.keys() - own.keys()):
        if not name.endswith(STATE):
            raise ValueError(f"{path}: {unknown('weight', name, _few(name, own))}")
    for name, tensor in own.items():
        if name not in given:
            if name.endswith(STATE):
                continue
            raise ValueError(
                f"{path} lacks {name} of this model: {unknown('weight', name, _few(name, given))}"
            )
        if given[name].shape != tensor.shape:
            if name.endswith(STATE):
                continue
            raise ValueError(
                f"{path}: {name} must be {list(tensor.shape)} for this recipe's model, "
                f"got {list(given[name].shape)}"
            )
        tensor.copy_(given[name])


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            packed = HEADER in (file.metadata() or {})
        if packed:
            raise ValueError(
                f"{path} is packed, which cannot be trained: begin from the run that was packed"
            )
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def _few(name: str, names: dict[str, Tensor]) -> list[str]:
    """Of many names those of the same part of a model, if there are any: a readable error."""
    part = name.rpartition(".")[0]
    while part:
        found = [n for n in names if n.startswith(f"{part}.")]
        if found:
            return found
        part = part.rpartition(".")[0]
    return list(names)
