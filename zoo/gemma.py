"""Gemma 3n's feed-forward layers as `spark_ffn` without a split (transformers, models/gemma3n).

    options = gemma3n_ffn(d_ff=16384, sparsity=0.95)
    ffn = zoo.create(**options, d_model=2048)
    ffn.load_state_dict(import_gemma3n(tensors, prefix="model.layers.3.mlp."))

Theirs takes mean, deviation and threshold in the dtype of the model, ours in float32: in bfloat16
some 1% of the active neurons differ, and theirs miss the target where the mean is large.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

NAMES = {
    "predictor.weight": "gate_proj.weight",
    "up.weight": "up_proj.weight",
    "down.weight": "down_proj.weight",
}


def gemma3n_ffn(*, d_ff: int, sparsity: float) -> dict[str, Any]:
    """A layer as a recipe's `ffn` says it.

    sparsity: of `activation_sparsity_pattern`, in [0, 1); 0: all neurons run, none is thresholded.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    said = {"name": "spark_ffn", "d_ff": d_ff, "predictor": "full", "activation": "gelu_tanh"}
    return said | ({"density": 1 - sparsity} if sparsity else {"selection": "none"})


def gemma3n_ffns(
    n_layers: int, d_ff: int | Sequence[int], sparsity: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """The layers of a model, as a recipe's `ffn` lists them.

    Args:
        n_layers: `num_hidden_layers`.
        d_ff: `intermediate_size`, of all or of each.
        sparsity: `activation_sparsity_pattern`; None: theirs, 0.95 in the first ten layers of more
            than ten, 0 in all others.

    Raises:
        ValueError: for a list of another length.
    """
    widths = [d_ff] * n_layers if isinstance(d_ff, int) else list(d_ff)
    if sparsity is None:
        sparse = 10 if n_layers > 10 else 0
        sparsity = [0.95] * sparse + [0.0] * (n_layers - sparse)
    for name, given in (("d_ff", widths), ("sparsity", sparsity)):
        if len(given) != n_layers:
            raise ValueError(f"{name} must list {n_layers} layers, got {len(given)}")
    return [gemma3n_ffn(d_ff=f, sparsity=s) for f, s in zip(widths, sparsity, strict=True)]


def import_gemma3n(tensors: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """One layer's weights for the `load_state_dict` of its `spark_ffn`; passed on, not copied.

    Args:
        tensors: theirs by name; those that do not begin with the prefix are not looked at.
        prefix: what stands before the layer's names, e.g. "model.layers.3.mlp.".

    Raises:
        ValueError: for a name too many or too few, or shapes of no such layer.
    """
    given = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    wanted = set(NAMES.values())
    if given.keys() != wanted:
        found = ", ".join(sorted(given)) or "none"
        raise ValueError(f"a Gemma 3n FFN has {', '.join(sorted(wanted))} under {prefix!r}, "
                         f"got {found}")  # fmt: skip
    state = {ours: given[theirs] for ours, theirs in NAMES.items()}
    shape = state["up.weight"].shape
    for name, wants in (("predictor.weight", shape), ("down.weight", shape[::-1])):
        if state[name].shape != wants:
            raise ValueError(f"{NAMES[name]} must be {list(wants)}, got {list(state[name].shape)}")
    return state


def export_gemma3n(state: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """The `state_dict` of a `spark_ffn` without a split by their names: `import_gemma3n` back."""
    return {prefix + theirs: state[ours] for ours, theirs in NAMES.items()}
