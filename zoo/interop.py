"""One `moe` layer's weights as other libraries name and lay them out, there and back.

Two tables of `zoo.layouts` settle it: `NAMINGS`, what a family of models calls its router, bias and
shared experts; `LAYOUTS`, how the experts are stored. Both directions are pure functions of a dict
of tensors and move numbers without touching them: there and back gives the same bits, and gradients
convert as weights do.

Ours (moe.md 14.3): experts.gate_up.weight [E, 2F, D], gate rows first; experts.down.weight
[E, D, F]; router.weight [E, D]; router.bias [E] where the router has one; shared.gate_up.weight
[2S, D] and shared.down.weight [D, S] where there are shared experts, S wide together.
"""

import difflib
import math
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from layers.names import unknown
from zoo.layouts import LAYOUTS, NAMINGS, Layout, Naming, Shapes

Tensors = Mapping[str, Tensor]


def import_moe(
    tensors: Tensors, model: str, *, layout: str | None = None, prefix: str = ""
) -> dict[str, Tensor]:
    """Weights of another library, for the `load_state_dict` of a `moe`.

    A tensor that needs no change is passed on, not copied.

    Args:
        tensors: theirs by name. Those under the prefix are exactly one layer's; others are not
            looked at.
        model: a name of `NAMINGS`.
        layout: a name of `LAYOUTS`; None: the one in which transformers holds that model.
        prefix: what stands before the layer's names, e.g. "model.layers.3.mlp.".

    Raises:
        ValueError: for an unknown model or layout, a name too many or too few, a wrong shape,
            experts of several dtypes.
    """
    naming, how, what = _find(model, layout)
    given = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    if not given:
        raise ValueError(f"{what}: no weight's name begins with {prefix!r}")
    e, d = _router_sizes(given, naming.router, what)
    experts = how.shapes(naming, e, d, 1)
    shared = _shared_shapes(naming, given, d, 1)
    _check_names(given, {naming.router, *naming.others.values(), *experts, *shared}, what)
    experts = how.shapes(naming, e, d, _width(given, experts))
    shared = _shared_shapes(naming, given, d, _width(given, shared))
    _check_tensors(given, experts, what)
    _check_tensors(given, shared, what)
    _check_tensors(given, {name: [e] for name in naming.others.values()}, what)

    gate_up, down = how.read([given[name] for name in experts])
    state = {"router.weight": given[naming.router]}
    state |= {own: given[theirs] for own, theirs in naming.others.items()}
    state |= {"experts.gate_up.weight": gate_up, "experts.down.weight": down}
    if shared:
        gate, up, last = (given[name] for name in shared)
        state |= {"shared.gate_up.weight": torch.cat([gate, up]), "shared.down.weight": last}
    return state


def export_moe(
    state: Tensors, model: str, *, layout: str | None = None, prefix: str = ""
) -> dict[str, Tensor]:
    """The `state_dict` of a `moe` as another library has it: `import_moe` backwards.

    A tensor that needs no change is passed on, not copied; no two share memory, so that saving
    writes each once.

    Args:
        state: ours by name, of one layer.
        model, layout: as in `import_moe`.
        prefix: put before each of their names.

    Raises:
        ValueError: as in `import_moe`; for a bias or shared experts that the model has not.
    """
    naming, how, what = _find(model, layout)
    e, d, f = _check_ours(state, naming, f"moe, for {what},")
    names = how.shapes(naming, e, d, f)
    written = how.write(state["experts.gate_up.weight"], state["experts.down.weight"])
    theirs = {naming.router: state["router.weight"]}
    theirs |= {name: state[own] for own, name in naming.others.items()}
    theirs |= dict(zip(names, written, strict=True))
    if "shared.down.weight" in state:
        gate, up = (half.clone() for half in state["shared.gate_up.weight"].chunk(2))
        matrices = (gate, up, state["shared.down.weight"])
        parts = ("gate_proj", "up_proj", "down_proj")
        theirs |= {f"{naming.shared}.{p}.weight": m for p, m in zip(parts, matrices, strict=True)}
    return {prefix + name: tensor for name, tensor in theirs.items()}


def moe_sizes(state: Tensors) -> dict[str, int]:
    """Sizes for `zoo.create("moe", top_k=..., router=..., **sizes)`, from our tensors.

    Raises:
        ValueError: for a wrong name or shape, or shared experts that are no whole number of
            experts wide.
    """
    others = {name: name for name in ("router.bias", "router.logit_bias") if name in state}
    e, d, f = _check_ours(state, Naming(shared="shared", others=others), "moe")
    wide = state["shared.down.weight"].shape[-1] if "shared.down.weight" in state else 0
    if wide % f:
        raise ValueError(f"shared experts {wide} wide are no whole number of d_expert={f}")
    return {"d_model": d, "d_expert": f, "n_experts": e, "n_shared": wide // f}


def _find(model: str, layout: str | None) -> tuple[Naming, Layout, str]:
    """The rows, and their names to say in an error."""
    if model not in NAMINGS:
        raise unknown("model to exchange weights with", model, NAMINGS)
    layout = NAMINGS[model].layout if layout is None else layout
    if layout not in LAYOUTS:
        raise unknown("layout of experts", layout, LAYOUTS)
    return NAMINGS[model], LAYOUTS[layout], f"{model} ({layout})"


def _shared_shapes(naming: Naming, given: Collection[str], d: int, s: int) -> Shapes:
    """Of the shared experts, one FFN S wide; none where none is given."""
    if naming.shared is None or not any(k.startswith(f"{naming.shared}.") for k in given):
        return {}
    shapes = {"gate_proj": [s, d], "up_proj": [s, d], "down_proj": [d, s]}
    return {f"{naming.shared}.{part}.weight": shape for part, shape in shapes.items()}


def _check_ours(state: Tensors, naming: Naming, what: str) -> tuple[int, int, int]:
    """E, D and F of a layer of ours that has what `naming` can name, and nothing else."""
    e, d = _router_sizes(state, "router.weight", what)

    def shapes(f: int, s: int) -> tuple[Shapes, Shapes]:
        has_shared = naming.shared and any(k.startswith("shared.") for k in state)
        shared = {"shared.gate_up.weight": [2 * s, d], "shared.down.weight": [d, s]}
        experts = {"experts.gate_up.weight": [e, 2 * f, d], "experts.down.weight": [e, d, f]}
        return experts, shared if has_shared else {}

    experts, shared = shapes(1, 1)
    _check_names(state, {"router.weight", *naming.others, *experts, *shared}, what)
    f, s = _width(state, experts), _width(state, shared)
    for part in (*shapes(f, s), {name: [e] for name in naming.others}):
        _check_tensors(state, part, what)
    return e, d, f


def _router_sizes(given: Tensors, name: str, what: str) -> tuple[int, int]:
    """E and D, as the router has them."""
    if name not in given:
        raise ValueError(f"{what} lacks weight {name!r}.{_nearest(name, given, 'Nearest given:')}")
    if given[name].ndim != 2:
        raise ValueError(f"{what}: {name} must be [E, D], got {list(given[name].shape)}")
    e, d = given[name].shape
    return e, d


def _width(given: Tensors, of_one: Shapes) -> int:
    """F, from the last matrix and its shape for F = 1."""
    if not of_one:
        return 0
    name, shape = list(of_one.items())[-1]
    return max(given[name].numel() // max(math.prod(shape), 1), 1)


def _check_names(given: Collection[str], wanted: set[str], what: str) -> None:
    """Raise unless what is given is what is wanted."""
    extra, lacking = sorted(set(given) - wanted), sorted(wanted - set(given))
    if extra:
        near = _nearest(extra[0], lacking or wanted, "Nearest:")
        known = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in wanted}))
        raise ValueError(f"{what} has no weight {extra[0]!r}{_more(extra)}.{near} Known: {known}")
    if lacking:
        near = _nearest(lacking[0], given, "Nearest given:")
        raise ValueError(f"{what} lacks weight {lacking[0]!r}{_more(lacking)}.{near}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _nearest(name: str, known: Collection[str], says: str) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f" {says} {near[0]!r}." if near else ""


def _check_tensors(given: Tensors, shapes: Shapes, what: str) -> None:
    """Raise unless shapes are right, and all dtypes the same: stacking would convert them."""
    for name, shape in shapes.items():
        if list(given[name].shape) != shape:
            raise ValueError(f"{what}: {name} must be {shape}, got {list(given[name].shape)}")
    dtypes = {name: given[name].dtype for name in shapes}
    first, *_ = dtypes or [""]
    for name, dtype in dtypes.items():
        if dtype != dtypes[first]:
            raise ValueError(f"{what}: {name} is {dtype} but {first} is {dtypes[first]}")
