"""A model in a folder: `config.json` and `model.safetensors`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODEL_TYPE = "moe-zoo"


class Pretrained:
    """Adds `save_pretrained` and `from_pretrained` to a module built from a config dataclass."""

    config_class: Any

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights; a weight that two modules share is written once.

        The precision is not written: it is a way to compute, set anew with `zoo.set_precision`.
        """
        assert isinstance(self, nn.Module)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": MODEL_TYPE, **asdict(self.config)}  # pyright: ignore
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: t.detach().contiguous() for name, t in own_tensors(self).items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model that `save_pretrained` wrote.

        Raises:
            ValueError: for a missing or broken file, an option or a weight too many or too few, a
                wrong shape.
        """
        folder = Path(folder)
        config = _read_config(folder / "config.json")
        model = cls(cls.config_class.of(config))  # pyright: ignore
        load_weights(model, folder / "model.safetensors")  # pyright: ignore
        return model


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` without second names of the same tensor."""
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if first.setdefault(id(t), name) == name}


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Fill a module from a safetensors file that holds exactly its tensors.

    Raises:
        ValueError: for a missing or broken file, a name too many or too few, a wrong shape.
    """
    if not Path(path).is_file():
        raise ValueError(f"no weights at {path}")
    try:
        given = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    own = own_tensors(module)
    for what, names in (("lacks", own.keys() - given), ("has unknown", given.keys() - own)):
        if names:
            raise ValueError(f"{path} {what} weights: {_some(sorted(names))}")
    for name, tensor in own.items():
        if given[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} must be {list(tensor.shape)}, got {list(given[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no model config at {path}")
    try:
        config = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.pop("model_type", None) != MODEL_TYPE:
        raise ValueError(f"{path} does not describe a {MODEL_TYPE} model (model_type)")
    return config


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
