"""One `moe` layer's weights as other libraries name and lay them out, there and back.

Two tables of `zoo.layouts` settle it: `NAMINGS`, what a family of models calls its router, bias and
shared experts; `LAYOUTS`, how the experts are stored. Both directions are pure functions of a dict
of tensors and move numbers without touching them: there and back gives the same bits, and gradients
convert as weights do.

Ours (moe.md 14.3): experts.gate_up.weight [E, 2F, D], gate rows first, or experts.up.weight
[E, F, D] where experts are not gated; experts.down.weight [E, D, F]; biases of both, [E, 2F] and
[E, D], where they have some; router.weight [E, D]; router.bias [E] where the router has one;
shared.gate_up.weight [2S, D] and shared.down.weight [D, S] where there are shared experts, S wide
together, and shared_gate.weight [1, D] where these have a gate.
"""

import difflib
import math
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from layers.names import unknown
from zoo.layouts import BODIES, LAYOUTS, NAMINGS, Layout, Naming, Shapes

Tensors = Mapping[str, Tensor]
SHARED = ("gate_proj", "up_proj", "down_proj")  # of shared experts, in every model that has some


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
        ValueError: for an unknown model or layout, a layout of other experts than the model's, a
            name too many or too few, a wrong shape, experts of several dtypes.
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

    state = {"router.weight": given[naming.router]}
    state |= {own: given[theirs] for own, theirs in naming.others.items()}
    read = how.read([given[name] for name in experts])
    state |= dict(zip(BODIES[naming.body](e, d, 1), read, strict=True))
    if shared:
        gate, up, last = (given[f"{naming.shared}.{part}.weight"] for part in SHARED)
        state |= {"shared.gate_up.weight": torch.cat([gate, up]), "shared.down.weight": last}
    if shared and naming.shared_gate:
        state["shared_gate.weight"] = given[naming.shared_gate]
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
    written = how.write([state[name] for name in BODIES[naming.body](e, d, f)])
    theirs = {naming.router: state["router.weight"]}
    theirs |= {name: state[own] for own, name in naming.others.items()}
    theirs |= dict(zip(names, written, strict=True))
    if "shared.down.weight" in state:
        gate, up = (half.clone() for half in state["shared.gate_up.weight"].chunk(2))
        matrices = (gate, up, state["shared.down.weight"])
        theirs |= {f"{naming.shared}.{p}.weight": m for p, m in zip(SHARED, matrices, strict=True)}
        if naming.shared_gate:
            theirs[naming.shared_gate] = state["shared_gate.weight"]
    return {prefix + name: tensor for name, tensor in theirs.items()}


def moe_sizes(state: Tensors) -> dict[str, int]:
    """Sizes and bodies for `zoo.create("moe", top_k=..., router=..., **sizes)`, from our tensors.

    What tensors do not tell is the activation: "gpt_oss" for gpt-oss, "relu" for Switch.

    Raises:
        ValueError: for a wrong name or shape, or shared experts that are no whole number of
            experts wide.
    """
    others = {name: name for name in ("router.bias", "router.logit_bias") if name in state}
    gate = "shared_gate.weight" if "shared_gate.weight" in state else None
    naming = Naming(shared="shared", shared_gate=gate, others=others, body=_body(state))
    e, d, f = _check_ours(state, naming, "moe")
    wide = state["shared.down.weight"].shape[-1] if "shared.down.weight" in state else 0
    if wide % f:
        raise ValueError(f"shared experts {wide} wide are no whole number of d_expert={f}")
    return {
        "d_model": d, "d_expert": f, "n_experts": e, "n_shared": wide // f,
        "shared_gate": gate is not None, "gated": naming.body != "ungated",
        "bias": naming.body == "gated with biases",
    }  # fmt: skip


def _body(state: Tensors) -> str:
    """The body of our experts by what they hold; gated where that is not whole."""
    if "experts.up.weight" in state:
        return "ungated"
    return "gated with biases" if "experts.gate_up.bias" in state else "gated"


def _find(model: str, layout: str | None) -> tuple[Naming, Layout, str]:
    """The rows, and their names to say in an error."""
    if model not in NAMINGS:
        raise unknown("model to exchange weights with", model, NAMINGS)
    layout = NAMINGS[model].layout if layout is None else layout
    if layout not in LAYOUTS:
        raise unknown("layout of experts", layout, LAYOUTS)
    naming, how = NAMINGS[model], LAYOUTS[layout]
    if naming.body != how.body:
        fits = ", ".join(name for name, row in LAYOUTS.items() if row.body == naming.body)
        raise ValueError(
            f"experts of {model} are {naming.body}, layout {layout!r} holds {how.body} ones: "
            f"give one of {fits}"
        )
    return naming, how, f"{model} ({layout})"


def _shared_shapes(naming: Naming, given: Collection[str], d: int, s: int) -> Shapes:
    """Of the shared experts, one FFN S wide, and of their gate; none where none is given."""
    if naming.shared is None or not any(k.startswith(f"{naming.shared}.") for k in given):
        return {}
    gate = {naming.shared_gate: [1, d]} if naming.shared_gate else {}
    shapes = zip(SHARED, ([s, d], [s, d], [d, s]), strict=True)
    return gate | {f"{naming.shared}.{part}.weight": shape for part, shape in shapes}


def _check_ours(state: Tensors, naming: Naming, what: str) -> tuple[int, int, int]:
    """E, D and F of a layer of ours that has what `naming` can name, and nothing else."""
    e, d = _router_sizes(state, "router.weight", what)

    def shapes(f: int, s: int) -> tuple[Shapes, Shapes]:
        has_shared = naming.shared and any(k.startswith("shared.") for k in state)
        shared = {"shared_gate.weight": [1, d]} if naming.shared_gate else {}
        shared |= {"shared.gate_up.weight": [2 * s, d], "shared.down.weight": [d, s]}
        return BODIES[naming.body](e, d, f), shared if has_shared else {}

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
        known = ", ".join(sorted({re.sub(r"(?<=[._])\d+(?=\.)", "*", name) for name in wanted}))
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
