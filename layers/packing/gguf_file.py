"""Packed weights as a .gguf file, through the package `gguf` (an optional extra)."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from layers.names import unknown
from layers.packing.layouts import MXFP4, NVFP4, to_gguf_mxfp4, to_gguf_nvfp4
from layers.packing.weight import Packed


def write_gguf(
    path: str | Path, tensors: Mapping[str, Packed | Tensor], *, architecture: str = "moe-zoo"
) -> None:
    """Write tensors under their names: MXFP4 and NVFP4 in ggml's blocks, others as float32.

    The tensor scale of an NVFP4 weight is a tensor of its own, `<name>.scale`, as ggml has no
    place for it in a block. No runtime knows the architecture: the file carries weights, and who
    reads it supplies the graph.

    Raises:
        ValueError: a packed format that ggml has not, or rows that its blocks do not divide.
        ModuleNotFoundError: without the package.
    """
    import gguf

    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
        elif tensor.storage == MXFP4:
            writer.add_tensor(name, to_gguf_mxfp4(tensor).numpy(), raw_dtype=kinds.MXFP4)
        elif tensor.storage == NVFP4:
            writer.add_tensor(name, to_gguf_nvfp4(tensor).numpy(), raw_dtype=kinds.NVFP4)
            if tensor.tensor_scale is not None:
                writer.add_tensor(f"{name}.scale", tensor.tensor_scale.reshape(-1).numpy())
        else:
            grid = f"{tensor.storage.grid.name} under {tensor.storage.scale}"
            raise unknown("format of a gguf file", grid, ["mxfp4", "nvfp4"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
