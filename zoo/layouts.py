"""How other libraries name the parts of a mixture's layer, and how they lay its experts out.

`zoo.interop` moves weights between these and ours. E experts, D wide outside and F inside.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

Shapes = dict[str, list[int]]  # by name; the expert's own, the matrix down last


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What a family of models calls the parts of its layer."""

    router: str = "gate.weight"
    shared: str | None = None  # where its shared experts stand; None: it has none
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # stored one by one
    others: Mapping[str, str] = field(default_factory=dict)  # theirs by our name, of those [E]
    layout: str = "packed"  # how transformers holds its experts


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the experts of a layer are stored."""

    shapes: Callable[[Naming, int, int, int], Shapes]  # of E, D, F
    read: Callable[[list[Tensor]], tuple[Tensor, Tensor]]  # to ours, in the order of shapes
    write: Callable[[Tensor, Tensor], list[Tensor]]  # from ours


def _packed(naming: Naming, e: int, d: int, f: int) -> Shapes:
    return {"experts.gate_up_proj": [e, 2 * f, d], "experts.down_proj": [e, d, f]}


def _turned(naming: Naming, e: int, d: int, f: int) -> Shapes:
    return {"experts.gate_up_proj": [e, d, 2 * f], "experts.down_proj": [e, f, d]}


def _one_by_one(naming: Naming, e: int, d: int, f: int) -> Shapes:
    gate, up, down = naming.expert
    shapes = {gate: [f, d], up: [f, d], down: [d, f]}
    return {f"experts.{i}.{part}.weight": shapes[part] for part in naming.expert for i in range(e)}


def _read_packed(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    gate_up, down = tensors
    return gate_up, down


def _write_packed(gate_up: Tensor, down: Tensor) -> list[Tensor]:
    return [gate_up, down]


def _read_turned(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    gate_up, down = (rearrange(stack, "e i o -> e o i").contiguous() for stack in tensors)
    return gate_up, down


def _write_turned(gate_up: Tensor, down: Tensor) -> list[Tensor]:
    return [rearrange(stack, "e o i -> e i o").contiguous() for stack in (gate_up, down)]


def _read_interleaved(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    gate_up, down = _read_turned(tensors)
    return rearrange(gate_up, "e (f two) d -> e (two f) d", two=2).contiguous(), down


def _write_interleaved(gate_up: Tensor, down: Tensor) -> list[Tensor]:
    return _write_turned(rearrange(gate_up, "e (two f) d -> e (f two) d", two=2), down)


def _read_one_by_one(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    n = len(tensors) // 3
    gate, up, down = (torch.stack(tensors[i : i + n]) for i in (0, n, 2 * n))
    return torch.cat([gate, up], 1), down


def _write_one_by_one(gate_up: Tensor, down: Tensor) -> list[Tensor]:
    gate, up = gate_up.chunk(2, 1)
    return [matrix.clone() for stack in (gate, up, down) for matrix in stack]


# fmt: off
LAYOUTS = {
    # gate_up_proj [E, 2F, D], gate rows first; down_proj [E, D, F]: most models in transformers
    "packed": Layout(shapes=_packed, read=_read_packed, write=_write_packed),
    # gate_up_proj [E, D, 2F], gate columns first; down_proj [E, F, D]: Llama 4
    "transposed": Layout(shapes=_turned, read=_read_turned, write=_write_turned),
    # gate_up_proj [E, D, 2F], gate in the even columns; down_proj [E, F, D]: gpt-oss
    "interleaved": Layout(shapes=_turned, read=_read_interleaved, write=_write_interleaved),
    # three matrices for each expert, [F, D], [F, D] and [D, F]: checkpoints on disk
    "per_expert": Layout(shapes=_one_by_one, read=_read_one_by_one, write=_write_one_by_one),
}
NAMINGS = {
    "mixtral": Naming(expert=("w1", "w3", "w2")),
    "olmoe": Naming(),
    "qwen3_moe": Naming(),
    "deepseek_v2": Naming(shared="shared_experts"),
    "deepseek_v3": Naming(
        shared="shared_experts", others={"router.bias": "gate.e_score_correction_bias"}
    ),
    "llama4": Naming(router="router.weight", shared="shared_expert", layout="transposed"),
}
# fmt: on
