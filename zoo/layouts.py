"""How other libraries name the parts of a mixture's layer, and how they lay its experts out.

`zoo.interop` moves weights between these and ours. E experts, D wide outside and F inside. Experts
have one of three bodies: gated, gated with biases, ungated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

Shapes = dict[str, list[int]]  # by name; the expert's own, the matrix down last
Matrices = list[Tensor]  # an expert's own tensors, in the order of their shapes


def _gated(e: int, d: int, f: int) -> Shapes:
    return {"experts.gate_up.weight": [e, 2 * f, d], "experts.down.weight": [e, d, f]}


def _gated_bias(e: int, d: int, f: int) -> Shapes:
    biases = {"experts.gate_up.bias": [e, 2 * f], "experts.down.bias": [e, d]}
    return biases | _gated(e, d, f)


def _ungated(e: int, d: int, f: int) -> Shapes:
    return {"experts.up.weight": [e, f, d], "experts.down.weight": [e, d, f]}


# what experts are made of: our tensors' shapes of E, D, F
BODIES: dict[str, Callable[[int, int, int], Shapes]] = {
    "gated": _gated, "gated with biases": _gated_bias, "ungated": _ungated,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What a family of models calls the parts of its layer."""

    router: str = "gate.weight"
    shared: str | None = None  # where its shared experts stand; None: it has none
    shared_gate: str | None = None  # the weight [1, D] of their gate; None: they have none
    expert: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")  # stored one by one, down last
    body: str = "gated"  # of its experts, a key of BODIES
    others: Mapping[str, str] = field(default_factory=dict)  # theirs by our name, of those [E]
    layout: str = "packed"  # how transformers holds its experts


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the experts of a layer are stored."""

    shapes: Callable[[Naming, int, int, int], Shapes]  # of E, D, F
    read: Callable[[Matrices], Matrices]  # to ours, both in the order of their shapes
    write: Callable[[Matrices], Matrices]  # from ours
    body: str = "gated"  # of the experts that it holds


def _packed(naming: Naming, e: int, d: int, f: int) -> Shapes:
    return {"experts.gate_up_proj": [e, 2 * f, d], "experts.down_proj": [e, d, f]}


def _turned(naming: Naming, e: int, d: int, f: int) -> Shapes:
    return {"experts.gate_up_proj": [e, d, 2 * f], "experts.down_proj": [e, f, d]}


def _turned_bias(naming: Naming, e: int, d: int, f: int) -> Shapes:
    biases = {"experts.gate_up_proj_bias": [e, 2 * f], "experts.down_proj_bias": [e, d]}
    return biases | _turned(naming, e, d, f)


def _one_by_one(naming: Naming, e: int, d: int, f: int) -> Shapes:
    gate, up, down = naming.expert
    shapes = {gate: [f, d], up: [f, d], down: [d, f]}
    return {f"experts.{i}.{part}.weight": shapes[part] for part in naming.expert for i in range(e)}


def _modules(naming: Naming, e: int, d: int, f: int) -> Shapes:
    up, down = naming.expert
    shapes = {up: [f, d], down: [d, f]}
    names = [f"experts.expert_{i}" for i in range(e)]
    return {f"{n}.{part}.weight": shapes[part] for part in naming.expert for n in names}


def _same(tensors: Matrices) -> Matrices:
    return tensors


def _turn(tensors: Matrices) -> Matrices:
    return [rearrange(stack, "e a b -> e b a").contiguous() for stack in tensors]


def _read_interleaved(tensors: Matrices) -> Matrices:
    gate_up, down = _turn(tensors)
    return [rearrange(gate_up, "e (f two) d -> e (two f) d", two=2).contiguous(), down]


def _write_interleaved(tensors: Matrices) -> Matrices:
    gate_up, down = tensors
    return _turn([rearrange(gate_up, "e (two f) d -> e (f two) d", two=2), down])


def _read_interleaved_bias(tensors: Matrices) -> Matrices:
    bias, bias_down, *matrices = tensors
    bias = rearrange(bias, "e (f two) -> e (two f)", two=2).contiguous()
    return [bias, bias_down, *_read_interleaved(matrices)]


def _write_interleaved_bias(tensors: Matrices) -> Matrices:
    bias, bias_down, *matrices = tensors
    bias = rearrange(bias, "e (two f) -> e (f two)", two=2).contiguous()
    return [bias, bias_down, *_write_interleaved(matrices)]


def _read_one_by_one(tensors: Matrices) -> Matrices:
    n = len(tensors) // 3
    gate, up, down = (torch.stack(tensors[i : i + n]) for i in (0, n, 2 * n))
    return [torch.cat([gate, up], 1), down]


def _write_one_by_one(tensors: Matrices) -> Matrices:
    gate_up, down = tensors
    gate, up = gate_up.chunk(2, 1)
    return [matrix.clone() for stack in (gate, up, down) for matrix in stack]


def _read_modules(tensors: Matrices) -> Matrices:
    n = len(tensors) // 2
    return [torch.stack(tensors[:n]), torch.stack(tensors[n:])]


def _write_modules(tensors: Matrices) -> Matrices:
    return [matrix.clone() for stack in tensors for matrix in stack]


# fmt: off
LAYOUTS = {
    # gate_up_proj [E, 2F, D], gate rows first; down_proj [E, D, F]: most models in transformers
    "packed": Layout(shapes=_packed, read=_same, write=_same),
    # gate_up_proj [E, D, 2F], gate columns first; down_proj [E, F, D]: Llama 4
    "transposed": Layout(shapes=_turned, read=_turn, write=_turn),
    # gate_up_proj [E, D, 2F], gate in the even columns; down_proj [E, F, D]
    "interleaved": Layout(shapes=_turned, read=_read_interleaved, write=_write_interleaved),
    # the same, with biases [E, 2F], gate's in the even places, and [E, D]: gpt-oss
    "interleaved_bias": Layout(
        shapes=_turned_bias, read=_read_interleaved_bias, write=_write_interleaved_bias,
        body="gated with biases",
    ),
    # three matrices for each expert, [F, D], [F, D] and [D, F]: checkpoints on disk
    "per_expert": Layout(shapes=_one_by_one, read=_read_one_by_one, write=_write_one_by_one),
    # two matrices for each expert, a module of its own, [F, D] and [D, F]: Switch
    "modules": Layout(shapes=_modules, read=_read_modules, write=_write_modules, body="ungated"),
}
NAMINGS = {
    "mixtral": Naming(expert=("w1", "w3", "w2")),
    "olmoe": Naming(),
    "qwen2_moe": Naming(shared="shared_expert", shared_gate="shared_expert_gate.weight"),
    "qwen3_moe": Naming(),
    "deepseek_v2": Naming(shared="shared_experts"),
    "deepseek_v3": Naming(
        shared="shared_experts", others={"router.bias": "gate.e_score_correction_bias"}
    ),
    "llama4": Naming(router="router.weight", shared="shared_expert", layout="transposed"),
    "gpt_oss": Naming(
        router="router.weight", others={"router.logit_bias": "router.bias"},
        body="gated with biases", layout="interleaved_bias",
    ),
    "switch": Naming(
        router="router.classifier.weight", expert=("wi", "wo"), body="ungated", layout="modules",
    ),
}
# fmt: on
