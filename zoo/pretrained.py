"""A model in a folder: `config.json` and `model.safetensors`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layers.posttraining.correction import attach_corrections
from zoo.mapped import copied, is_table, read_mapped, settle
from zoo.packing import HEADER, header_of, make_room, native_tensors

MODEL_TYPE = "moe-zoo"


class Pretrained:
    """Adds `save_pretrained` and `from_pretrained` to a module built from a config dataclass."""

    config_class: Any

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights; a weight that two modules share is written once.

        The precision is not written: it is a way to compute, set anew with `zoo.set_precision`.
        Of a packed model it is, in the header of the weights: they can compute in no other.
        """
        assert isinstance(self, nn.Module)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": MODEL_TYPE, **asdict(self.config)}  # pyright: ignore
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_weights(self, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, mapped: bool = False) -> Self:
        """The model that `save_pretrained` wrote.

        Args:
            folder: its config and weights.
            mapped: leave memory tables on the disk (`zoo.mapped`): for inference, with tables
                larger than memory. The model's weights are frozen and it is in evaluation mode.

        Raises:
            ValueError: for a missing or broken file, an option or a weight too many or too few, a
                wrong shape; for mapped, a model without memory tables, a table in another dtype
                than the model's.
        """
        folder = Path(folder)
        config = _read_config(folder / "config.json")
        path = folder / "model.safetensors"
        with building(path, mapped=mapped):
            model = cls(cls.config_class.of(config))  # pyright: ignore
        load_weights(model, path, mapped=mapped)  # pyright: ignore
        return model


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` without second names of the same tensor."""
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if first.setdefault(id(t), name) == name}


def write_weights(module: nn.Module, path: str | Path) -> None:
    """Write a module's tensors as safetensors, packed ones in torch's own dtypes for them."""
    tensors = native_tensors(module, own_tensors(module))
    header = header_of(module)
    metadata = {"format": "pt"} | ({} if header is None else {HEADER: header})
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata)


@contextmanager
def building(path: str | Path, *, mapped: bool = False) -> Iterator[None]:
    """Where to build the module that a file's weights are for.

    Packed and mapped ones need no storage yet, and must be loaded before anything else.
    """
    if not mapped and _header(Path(path)) is None:
        yield
    else:
        with torch.device("meta"), _Unfilled():
            yield


class _Unfilled(TorchFunctionMode):
    """Leaves tensors without storage unfilled: torch would import a library of 70 MB to do so."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.startswith("_"):  # in place
            target = args[0] if args else kwargs["tensor"]
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **kwargs)


def _header(path: Path) -> str | None:
    """What a file says of packed weights; None where it holds none, or is none."""
    try:
        with safe_open(path, framework="np") as file:  # "pt" would map it as if to be written
            return (file.metadata() or {}).get(HEADER)
    except (SafetensorError, OSError):
        return None  # said where it is read


def load_weights(module: nn.Module, path: str | Path, *, mapped: bool = False) -> None:
    """Fill a module from a safetensors file that holds exactly its tensors.

    A file of packed weights packs the module, and sets the precision of its leaves; one of
    post-training quantisation brings the corrections of its leaves.

    mapped: as in `from_pretrained`.

    Raises:
        ValueError: for a missing or broken file, a name too many or too few, a wrong shape; for
            mapped, a model without memory tables, a table in another dtype than the model's.
    """
    if not Path(path).is_file():
        raise ValueError(f"no weights at {path}")
    header = _header(Path(path))
    stays = is_table(module) if mapped else None
    given = _read(path) if stays is None else read_mapped(path, stays)
    if header is not None:
        if stays is None:
            given = {name: copied(t) for name, t in given.items()}  # no view of the file
        make_room(module, header, given)
    attach_corrections(module, given)
    own = own_tensors(module)
    for what, names in (("lacks", own.keys() - given), ("has unknown", given.keys() - own)):
        if names:
            raise ValueError(f"{path} {what} weights: {_some(sorted(names))}")
    for name, tensor in own.items():
        if given[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} must be {list(tensor.shape)}, got {list(given[name].shape)}"
            )
    if stays is not None and header is None:
        given = {name: _as(given[name], t, stays(name), name) for name, t in own.items()}
    if mapped or header is not None:
        _take(module, given)
    else:
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(given[name])
    if mapped:
        settle(module)


def _read(path: str | Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def _as(t: Tensor, own: Tensor, stays: bool, name: str) -> Tensor:
    """A tensor of a file in the dtype of the module's own."""
    if stays and t.dtype != own.dtype:
        raise ValueError(f"mapped: table {name} must be {own.dtype} on the disk, got {t.dtype}")
    return t.to(own.dtype)


def _take(module: nn.Module, given: dict[str, Tensor]) -> None:
    """Put tensors, as they are, in the place of a module's own; tied ones stay tied."""
    taken: dict[int, Tensor] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for held in (part._parameters, part._buffers):
            for key, tensor in held.items():
                name = f"{prefix}.{key}".lstrip(".")
                if tensor is None or (name not in given and id(tensor) not in taken):
                    continue  # not saved
                if id(tensor) not in taken:
                    new = given[name]
                    is_weight = isinstance(tensor, nn.Parameter)
                    taken[id(tensor)] = nn.Parameter(new, requires_grad=False) if is_weight else new
                held[key] = taken[id(tensor)]  # pyright: ignore[reportArgumentType]


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
