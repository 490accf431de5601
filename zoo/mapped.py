"""Weights files of which memory tables stay on the disk: a look-up reads the rows it touches.

A memory layer reads heads * top_k of its M rows a token, so the tables may be larger than the
memory there is: the file is mapped, the system reads pages of it when a row on them is first read,
keeps them while there is room and drops them when there is none. Everything else is copied. A
mapped model is for inference: its weights are frozen.
"""

import json
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from layers.linear import ValueTable
from layers.precision import leaves

DTYPES = {  # as safetensors calls them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "F4": torch.float4_e2m1fn_x2,
}  # fmt: skip
# A private mapping that may be written would otherwise be refused where it exceeds all memory
# (Linux counts it as if it were); Python names the flag from 3.13 on.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def is_table(module: nn.Module) -> Callable[[str], bool]:
    """Whether a name in the `state_dict` is of a memory table: its weight, or codes and scales.

    Raises:
        ValueError: for a model without memory layers.
    """
    tables = {
        f"{name}.weight"
        for name, leaf in leaves(module).items()
        if isinstance(leaf, ValueTable) and leaf.role == "memory_values"
    }
    if not tables:
        raise ValueError("mapped: the model has no memory layer, so no table to leave on the disk")
    return lambda name: name in tables or name.rpartition(".")[0] in tables


def read_mapped(path: str | Path, stays: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, views of the file where `stays` says so of the name.

    Writing to a view changes this process's copy of the page, never the file. The file must stay
    as it is while they live; replacing it by another is no harm.

    Raises:
        ValueError: for a broken file, a dtype that torch has none for, a system that maps no files
            in this way.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        raise ValueError(f"mapped: {sys.platform} has no private mappings: load without")
    try:
        with safe_open(path, framework="np"):  # checks sizes and offsets, and maps nothing for long
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    with Path(path).open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(start - 8))
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        room = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=protection)
    entries.pop("__metadata__", None)
    views = {name: _view(room, start, entry, name) for name, entry in entries.items()}
    tensors = {name: t if stays(name) else copied(t) for name, t in views.items()}
    for advice in ("MADV_DONTNEED", "MADV_RANDOM"):  # forget what was copied; read single pages
        if hasattr(mmap, advice):
            room.madvise(getattr(mmap, advice))
    return tensors


def _view(room: mmap.mmap, start: int, entry: dict[str, Any], name: str) -> Tensor:
    """One tensor of the mapping. start: of all data; entry: of the file's header."""
    dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {dtype!r}, which is none of {', '.join(DTYPES)}")
    if dtype == "F4":  # counted in numbers there, two to an element here
        shape = [*shape[:-1], shape[-1] // 2]
    if first == last:
        return torch.empty(shape, dtype=DTYPES[dtype])
    raw = torch.frombuffer(room, dtype=torch.uint8, count=last - first, offset=start + first)
    return raw.view(DTYPES[dtype]).view(shape)


def copied(t: Tensor) -> Tensor:
    """t.clone(), of a type of one byte too that torch cannot fill."""
    return t.clone() if t.element_size() > 1 else t.view(torch.uint8).clone().view(t.dtype)


def settle(module: nn.Module) -> None:
    """Room for the buffers that no file holds, which all start as zeros, and no gradients.

    Random streams are to be seeded anew (`zoo.seed_rounding`), as after any load.
    """
    for part in module.modules():
        for name, t in part._buffers.items():
            if t is not None and t.is_meta:
                part._buffers[name] = torch.zeros(t.shape, dtype=t.dtype, device="cpu")
    module.requires_grad_(False)
    module.eval()
