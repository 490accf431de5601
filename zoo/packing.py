"""A model whose low weights are real codes and scales: for inference, and for a small file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layers.linear import ValueTable
from layers.packing import Packed, PackedWeight, native_view, storage_of
from layers.packing import pack as pack_weight
from layers.precision import Leaf, LeafPrecision, PrecisionPolicy, leaves
from layers.precision.formats import resolve
from layers.precision.operands import OPERANDS
from layers.precision.spec import QSpec
from zoo.precision import set_precision

HEADER = "packed"  # its key in the metadata of a safetensors file
LEAF_BUFFERS = ("rounding_key", "operand_scales", "operand_peaks", "peak_history")


@dataclass(frozen=True, kw_only=True)
class PackedLeaf:
    """One weight and what became of it."""

    name: str
    format: str
    numbers: int
    bytes_before: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits per number, all scales included."""
        return 8 * self.bytes / self.numbers


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What `pack` did, leaf by leaf, and what the whole model takes."""

    leaves: tuple[PackedLeaf, ...]
    bytes_before: int  # every parameter and buffer
    bytes: int

    def __str__(self) -> str:
        rows = [
            f"{leaf.name:40s} {leaf.format:12s} {leaf.numbers:>12,d}  {leaf.bits:.3f} bits"
            for leaf in self.leaves
        ]
        return "\n".join([f"{self.bytes_before:,d} bytes, packed {self.bytes:,d}", *rows])


def pack(
    model: nn.Module, policy: str | Mapping[str, Any] | PrecisionPolicy | None = None
) -> PackReport:
    """Replace each low leaf's weight by packed codes in the format of its `fprop_w`, in place.

    The rest of the policy holds as before: inputs are still quantised. Leaves with a high precision
    keep their weights, cast to that format where they only cast; a tied weight, a table and what no
    leaf owns stay as they are. The model is put in evaluation mode and its parameters are frozen.

    Args:
        model: anything that holds leaves.
        policy: set first, as by `set_precision`; None: what the leaves have.

    Returns:
        Each packed leaf with its bytes.

    Raises:
        ValueError: for a model that is packed already, one without a low weight, a format that
            cannot be packed; nothing is changed then.
    """
    if any(isinstance(m, PackedWeight) for m in model.modules()):
        raise ValueError("the model is packed already: load the weights that were packed to change")
    if policy is not None:
        set_precision(model, policy)
    chosen = {n: leaf for n, leaf in leaves(model).items() if _is_low(leaf)}
    if not chosen:
        raise ValueError(
            "nothing to pack: no leaf's weight stands in a low format; give one, e.g. 'mxfp4'"
        )
    for name, leaf in chosen.items():
        _check(name, leaf)
    before, rows = _bytes(model), []
    for name, leaf in chosen.items():
        rows.append(_pack_leaf(name, leaf))
    _cast_high(model)
    model.requires_grad_(False)
    model.eval()
    return PackReport(leaves=tuple(rows), bytes_before=before, bytes=_bytes(model))


def header_of(model: nn.Module) -> str | None:
    """What a file of the model's weights must say to build it anew; None where nothing is packed.

    JSON: the precisions, which leaf has which, and which weights are packed.
    """
    owned = leaves(model)
    packed = [name for name, leaf in owned.items() if isinstance(leaf.weight, PackedWeight)]
    if not packed:
        return None
    uses: list[Any] = []
    numbers: dict[str, int] = {}
    for name, leaf in owned.items():
        if leaf.precision is not None:
            plain = leaf.precision.to_plain()
            if plain not in uses:
                uses.append(plain)
            numbers[name] = uses.index(plain)
    return json.dumps({"precisions": uses, "leaves": numbers, "packed": packed})


def native_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those of packed weights viewed in torch's own dtypes, for a file."""
    owners = {f"{n}.": m for n, m in model.named_modules() if isinstance(m, PackedWeight)}
    views = dict(tensors)
    for name, tensor in tensors.items():
        prefix, key = name[: name.rfind(".") + 1], name[name.rfind(".") + 1 :]
        if prefix in owners:
            views[name] = native_view(key, tensor, owners[prefix].storage)
    return views


def make_room(model: nn.Module, header: str, given: dict[str, Tensor]) -> None:
    """Give a model, plain or without storage, the packed weights and the precisions of a header.

    Args:
        model: built from the config of the one that was packed.
        header: of `header_of`.
        given: the file's tensors by name; those of packed weights become bytes in it, in place.

    Raises:
        ValueError: leaves or codes that do not fit the model.
    """
    said, owned = json.loads(header), leaves(model)
    if unknown := sorted((set(said["leaves"]) | set(said["packed"])) - set(owned)):
        raise ValueError(f"the file packs leaves that the model has not: {', '.join(unknown)}")
    precisions = [LeafPrecision.of(plain) for plain in said["precisions"]]
    for name in said["packed"]:
        leaf, precision = owned[name], precisions[said["leaves"][name]]
        packed = _packed_from(leaf, name, _spec(leaf, precision), given)
        del leaf.weight
        leaf.register_module("weight", PackedWeight(packed))
    for name, leaf in owned.items():
        seeded = leaf.rounding_key
        for key in LEAF_BUFFERS:  # of whatever precision it was built with
            setattr(leaf, key, None)
        number = said["leaves"].get(name)
        leaf.precision = None if number is None else precisions[number]
        for key in LEAF_BUFFERS:
            held = getattr(leaf, key)
            if held is not None and held.is_meta:
                setattr(leaf, key, torch.zeros_like(held, device="cpu"))
        if leaf.rounding_key is not None and seeded is not None and not seeded.is_meta:
            leaf.rounding_key = seeded
    model.requires_grad_(False)
    model.eval()


def _is_low(leaf: Leaf) -> bool:
    p = leaf.precision
    return p is not None and not p.fprop_w.is_high


def _spec(leaf: Leaf, p: LeafPrecision) -> QSpec:
    return p.row_spec if isinstance(leaf, ValueTable) else p.fprop_w


def _resolved_spec(leaf: Leaf) -> QSpec:
    assert leaf.precision is not None
    return _spec(leaf, leaf.precision)


def _check(name: str, leaf: Leaf) -> None:
    """Raise where packing would fail, before anything is packed."""
    try:
        spec = _resolved_spec(leaf)
        storage_of(resolve(spec))
        if spec.hadamard and spec.signs == "step":
            raise ValueError("new signs each step rotate its weight: packing needs fixed ones")
        if spec.rounding == "eden":
            raise ValueError("its weight is rounded by eden: packing needs nearest or stochastic")
        if isinstance(leaf, ValueTable) and spec.rounding != "nearest":
            raise ValueError("rows rounded at random have no one value to pack")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _pack_leaf(name: str, leaf: Leaf) -> PackedLeaf:
    weight, spec = leaf.weight, _resolved_spec(leaf)
    assert isinstance(weight, Tensor)
    number = OPERANDS.index("fprop_w")
    key = None if leaf.rounding_key is None else leaf.rounding_key[0]
    scale = None if leaf.operand_scales is None else leaf.operand_scales[number]
    if isinstance(leaf, ValueTable) and resolve(spec).scope == "tensor":
        packed = _by_row(weight, spec)
    else:
        packed = pack_weight(weight, spec, key=key, operand=number, scale=scale)
    numbers, before = weight.numel(), weight.numel() * weight.element_size()
    del leaf.weight
    held = PackedWeight(packed)
    leaf.register_module("weight", held)
    return PackedLeaf(
        name=name, format=spec.format, numbers=numbers, bytes_before=before, bytes=held.bytes
    )


def _by_row(table: Tensor, spec: QSpec) -> Packed:
    """A table whose tensor scale is one of each row, as each is quantised by itself."""
    stacked = pack_weight(table.unsqueeze(1), spec)  # [M, 1, D]: each row a matrix
    storage, above = stacked.storage, stacked.tensor_scale
    scales = stacked.scales if storage.scale == "none" else stacked.scales.squeeze(1)
    above = None if above is None else above.reshape(-1, 1)
    return Packed(stacked.codes.squeeze(1), scales, above, storage, stacked.width, spec)


def _cast_high(model: nn.Module) -> None:
    """Weights that are only ever cast, in the dtype that they are cast to; tied ones stay."""
    uses: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1
    for leaf in leaves(model).values():
        p = leaf.precision
        if p is None or not p.is_cast or isinstance(leaf, ValueTable):
            continue
        if isinstance(leaf.weight, nn.Parameter) and uses[id(leaf.weight)] == 1:
            leaf.weight = nn.Parameter(leaf.weight.detach().to(p.dtype), requires_grad=False)


def _packed_from(leaf: Leaf, name: str, spec: QSpec, given: dict[str, Tensor]) -> Packed:
    """The packed weight of a leaf from a file's tensors."""
    prefix, weight = f"{name}.weight" if name else "weight", leaf.weight
    assert isinstance(weight, Tensor)
    for key in ("codes", "scales"):
        full = f"{prefix}.{key}"
        if full in given and given[full].dtype != torch.float32:
            given[full] = given[full].view(torch.uint8)
    storage, shape = storage_of(resolve(spec)), tuple(weight.shape)
    if spec.hadamard:
        shape = (*shape[:-1], -(-shape[-1] // spec.hadamard) * spec.hadamard)
    codes = given.get(f"{prefix}.codes")
    scales = given.get(f"{prefix}.scales", torch.zeros(0, dtype=torch.uint8))
    for what, tensor, wanted in (
        ("codes", codes, storage.code_shape(shape)),
        ("scales", scales, storage.scale_shape(shape)),
    ):
        if tensor is None or tuple(tensor.shape) != wanted:
            got = "none" if tensor is None else list(tensor.shape)
            raise ValueError(f"{prefix}.{what} must be {list(wanted)}, got {got}")
    assert codes is not None
    above = given.get(f"{prefix}.tensor_scale")
    return Packed(codes, scales, above, storage, shape[-1], spec)


def _bytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
