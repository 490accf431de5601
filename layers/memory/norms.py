"""Norms of queries and keys, in float32: layer, RMS, and a batch norm that never counts padding."""

import torch
from torch import Tensor, nn

from layers.base import Cost, WeightCost
from layers.names import check_choice

NORMS = ("none", "layer", "rms", "batch")
EPS = 1e-5  # of every norm here; UltraMem's and torch's


def norm_cost(kind: str, d_key: int, n_queries: int) -> Cost:
    """The parameters of `make_norm` and their element-wise work for one token."""
    width = d_key * n_queries if kind == "batch" else d_key
    work = 5.0 * d_key * n_queries
    gain = WeightCost(name="weight", role="norm", params=width, other_flops=work, bits=32)
    bias = WeightCost(name="bias", role="norm", params=width, bits=32)
    return Cost({"none": (), "rms": (gain,)}.get(kind, (gain, bias)))


def make_norm(kind: str, d_key: int, n_queries: int) -> nn.Module | None:
    """The norm of that name over vectors [..., n_queries, d_key]; None for "none".

    "layer" and "rms" norm each vector, with one gain [d_key] for all; "batch" norms each of the
    n_queries * d_key features over tokens.
    """
    check_choice("norm", kind, NORMS)
    if kind == "none":
        return None
    if kind == "batch":
        return MaskedBatchNorm(n_queries * d_key)
    return VectorNorm(d_key, centred=kind == "layer")


class VectorNorm(nn.Module):
    """x / rms(x) * weight over the last axis; centred: (x - mean) / std * weight + bias."""

    def __init__(self, width: int, *, centred: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if centred else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain 1, bias 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: [..., width]. The mask is not read: each vector is normed by itself."""
        gain = self.weight.to(x.dtype)
        if self.bias is None:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain
        var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        return torch.addcmul(self.bias.to(x.dtype), (x - mean) * torch.rsqrt(var + EPS), gain)


class MaskedBatchNorm(nn.Module):
    """(x - mean) / std * weight + bias per feature, over the real tokens of a micro-batch.

    Padding corrupts the statistics (arXiv:1907.05242's code warns of it), so it is left out. In
    evaluation running statistics stand in. A forward in training moves them, as `nn.BatchNorm1d`
    does; running the same batch again at once, as activation checkpointing does, moves nothing.
    """

    running_mean: Tensor  # [F]
    running_var: Tensor  # [F], unbiased
    last_mean: Tensor  # [F], of the batch counted last; not saved

    def __init__(self, width: int, momentum: float = 0.1):
        super().__init__()
        self.momentum = momentum
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.register_buffer("running_mean", torch.empty(width))
        self.register_buffer("running_var", torch.empty(width))
        self.register_buffer("last_mean", torch.empty(width), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain 1, bias 0, and statistics of standard normal features."""
        for one in (self.weight, self.running_var):
            nn.init.ones_(one)
        for zero in (self.bias, self.running_mean, self.last_mean):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: [T, n, d_key] with n * d_key features; mask: [T] bool, True where a token is real."""
        shape, x = x.shape, x.flatten(1)  # [T, F]
        if self.training and x.shape[0]:
            mean, var = self._statistics(x, mask)
        else:
            mean, var = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        scale = torch.rsqrt(var + EPS) * self.weight.to(x.dtype)
        return torch.addcmul(self.bias.to(x.dtype), x - mean, scale).view(shape)

    def _statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [F] of the real tokens; moves the running ones."""
        if mask is None:
            var, mean = torch.var_mean(x, dim=0, correction=0)
            count = torch.full((), float(x.shape[0]), device=x.device)
        else:
            real = mask[:, None].to(x.dtype)
            count = mask.sum().to(torch.float32)
            share = 1 / count.clamp(min=1).to(x.dtype)
            mean = (x * real).sum(0) * share
            var = ((x - mean).square() * real).sum(0) * share
        self._count(mean.detach(), var.detach(), count)
        return mean, var

    @torch.no_grad()
    def _count(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        mean, var = mean.to(self.last_mean.dtype), var.to(self.running_var.dtype)
        again = (mean == self.last_mean).all()
        share = torch.where(again | (count == 0), 0.0, self.momentum).to(mean.dtype)
        unbiased = var * (count / (count - 1).clamp(min=1)).to(var.dtype)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(unbiased, share)
        self.last_mean.copy_(mean)
