"""What post-training quantisation adds to a leaf beside its weight.

A pre-shift multiplies input channels by powers of two before they are quantised (LLM-FP4,
arXiv:2310.16836); low-rank factors add back a part of the weight's error (ZeroQuant-FP,
arXiv:2307.09782). E matrices have one of each, so rows come with their counts.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from layers.grouped import grouped_linear

NAME = "correction"  # the attribute of a leaf that holds one
PARTS = ("shift", "a", "b")


class Correction(nn.Module):
    """Buffers, so that no policy takes them for weights: a quantised model is not trained on."""

    shift: Tensor | None  # [K] or [E, K], powers of two
    a: Tensor | None  # [r, K] or [E, r, K]
    b: Tensor | None  # [N, r] or [E, N, r]

    def __init__(
        self, *, shift: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None
    ):
        super().__init__()
        if (a is None) != (b is None):
            raise ValueError("low-rank factors come in pairs: give both a and b")
        for name, part in zip(PARTS, (shift, a, b), strict=True):
            self.register_buffer(name, part)

    def of(self, expert: int) -> "Correction":
        """That of one matrix of a stack."""
        parts = {p: getattr(self, p) for p in PARTS}
        return Correction(**{p: None if t is None else t[expert] for p, t in parts.items()})

    def shifted(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """What the leaf quantises. x: [..., K]; counts: [E], rows of each matrix."""
        if self.shift is None:
            return x
        shift = self.shift if counts is None else self.shift.repeat_interleave(counts, 0)
        return x * shift.to(x.dtype)

    def corrected(self, y: Tensor, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """y plus B A x, of the input as it came. y: [..., N]; x: [..., K]."""
        if self.a is None or self.b is None:
            return y
        if counts is None:
            return y + (x.to(y.dtype) @ self.a.T.to(y.dtype)) @ self.b.T.to(y.dtype)
        inner = grouped_linear(x.to(y.dtype), self.a, counts)
        return y + grouped_linear(inner, self.b, counts)


def attach_corrections(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give each leaf the correction that the tensors of a file name, e.g. "...down.correction.a".

    Values are left to whoever loads the file. Leaves that already have one keep it.
    """
    modules = dict(module.named_modules())
    for owner in _owners(tensors):
        leaf = modules.get(owner)
        if leaf is None or getattr(leaf, NAME, None) is not None:
            continue
        parts = {p: tensors.get(_join(owner, p)) for p in PARTS}
        setattr(leaf, NAME, Correction(**parts))


def _join(owner: str, part: str) -> str:
    return f"{owner}.{NAME}.{part}".lstrip(".")


def _owners(names: Iterable[str]) -> list[str]:
    """Qualified names of the modules that have a correction."""
    endings = tuple(_join("", p) for p in PARTS)
    found = (n.removesuffix(e) for n in names for e in endings if n.endswith(e))
    return list(dict.fromkeys(name.rstrip(".") for name in found))
