"""Checkpoints in shards: a folder that every process writes a part of, whole or not there.

    checkpoints/last.ckpt -> step-100    a link, moved over when the folder is complete
    checkpoints/step-100/*.distcp        parts of the state (torch.distributed.checkpoint)
    checkpoints/step-100/meta.pt         everything else of it
    checkpoints/step-100/files.json      size and checksum of each file

It resumes on any number of processes: as it lies in shards, put together as one file elsewhere. A
file that one process wrote resumes in shards too.
"""

import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

META = "meta.pt"
FILES = "files.json"


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with checkpoints that are replaced at once."""

    def __init__(self, *, n_data: int, n_experts: int):
        """n_data, n_experts: processes along the data axis and along the experts' axis."""
        super().__init__(data_parallel_size=n_data, tensor_parallel_size=n_experts)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Every process writes its part beside the last checkpoint; then the link moves."""
        path = Path(filepath)
        folder = path.with_name(f"step-{checkpoint['global_step']}")
        if folder == path.resolve():
            folder = folder.with_name(f"{folder.name}-again")
        part = folder.with_name(f".{folder.name}.part")
        if self.is_global_zero:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
        self.barrier()
        super().save_checkpoint(checkpoint, part, storage_options)
        self.barrier()
        if self.is_global_zero:
            (part / FILES).write_text(json.dumps(_checksums(part), indent=1))
            part.rename(folder)
            link = path.with_name(f".{path.name}.link")
            link.unlink(missing_ok=True)
            link.symlink_to(folder.name)
            link.replace(path)
            sweep(path)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Each process reads its part, of a folder or of a file of one process."""
        path = Path(checkpoint_path).resolve()
        if path.is_dir():
            return super().load_checkpoint(path, weights_only=True)
        from torch.distributed.checkpoint.state_dict import (  # which takes a second to load
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        # Lightning takes an optimizer's parameters to stand in the model's order, ours do not
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert self.model is not None
        all_of_it = StateDictOptions(full_state_dict=True)  # every process has read all
        set_model_state_dict(self.model, checkpoint["state_dict"], options=all_of_it)
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            state = _renamed(state, dict(enumerate(order)))
            set_optimizer_state_dict(
                self.model, optimizer, optim_state_dict=state, options=all_of_it
            )
        return checkpoint


def sweep(path: Path) -> None:
    """Delete the folders beside a checkpoint that it does not lead to."""
    kept = path.resolve()
    for folder in [*path.parent.glob("step-*"), *path.parent.glob(".step-*.part")]:
        if folder.resolve() != kept:
            shutil.rmtree(folder)


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of each file; written through to the disk first."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            found[path.name] = [path.stat().st_size, _crc(file)]
    return found


def _crc(file: Any) -> int:
    value = 0
    while chunk := file.read(1 << 24):
        value = zlib.crc32(chunk, value)
    return value


def check_files(folder: Path) -> None:
    """Raise ValueError unless every file is as it was written."""
    for name, (size, crc) in json.loads((folder / FILES).read_text()).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{name} is missing or cut short")
        with path.open("rb") as file:
            if _crc(file) != crc:
                raise ValueError(f"wrong checksum of {name}")


def read_meta(folder: Path) -> dict[str, Any]:
    """What a folder says besides its shards."""
    return torch.load(folder / META, map_location="cpu", weights_only=True)


def put_together(folder: Path) -> dict[str, Any]:
    """The checkpoint of a folder as one process would have written it."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".whole-") as room:
        file = Path(room) / "state.pt"
        dcp_to_torch_save(folder, file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    optimizers = [state[key] for key in sorted(state) if key.startswith("optimizer_")]
    return read_meta(folder) | {
        "state_dict": state["state_dict"],
        "optimizer_states": [_numbered(optimizer) for optimizer in optimizers],
    }


def _numbered(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by the numbers of parameters, as torch has it, not by their names."""
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    return _renamed(optimizer, {name: i for i, name in enumerate(names)})


def _renamed(optimizer: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with its parameters called otherwise."""
    groups = [
        group | {"params": [names[p] for p in group["params"]]}
        for group in optimizer["param_groups"]
    ]
    state = {names[p]: of_one for p, of_one in optimizer["state"].items()}
    return {"state": state, "param_groups": groups}
