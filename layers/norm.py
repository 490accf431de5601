"""Root-mean-square layer normalisation (arXiv:1910.07467, eq. 4)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last axis. Weight [D], ones.

    Computed in float32 (float64 stays float64), returned in the dtype of the input.
    """

    role = "norm"

    def __init__(self, d: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D]. Returns the same shape and dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(dtype), self.weight.to(dtype), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., D]; weight: [D], of the same dtype. Returns [..., D]."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """The same numbers as `F.rms_norm`, whose backward on a CPU is a chain of ten passes.

    With xhat = x * rstd and g = dy * weight, dx = rstd * (g - xhat * mean(g * xhat)). Layer
    normalisation's backward kernel, told that the mean is zero, gives this less rstd * mean(g).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        rstd = mean_square.add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, rstd = ctx.saved_tensors
        d = x.shape[-1]
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
            dy.contiguous(), x, [d], torch.zeros_like(rstd), rstd, weight, None, [True, True, False]
        )
        mean_g = torch.mv(dy.reshape(-1, d), weight).view_as(rstd).div_(d)
        return dx.add_(mean_g.mul_(rstd)), dw, None
