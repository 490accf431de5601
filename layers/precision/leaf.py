"""What a precision policy acts on: the modules that own the weights of matmuls and look-ups."""

from torch import nn

from layers.precision.policy import LeafPrecision


class Leaf(nn.Module):
    """A module that owns one `weight` and multiplies, or looks up, nothing else.

    `precision` is a frozen value; None computes in the dtype of the input. Setting it changes no
    parameter and no name, and makes `torch.compile` recompile by itself.
    """

    role: str
    precision: LeafPrecision | None = None
