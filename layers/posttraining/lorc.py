"""Low-rank compensation of a quantisation error (LoRC; ZeroQuant-FP, arXiv:2307.09782).

precision.md 13.2: E = W - W^ = U S V^T, and the layer adds B A with B = U_r S_r^(1/2),
A = S_r^(1/2) V_r^T. No other matrix of that rank leaves less of E (Eckart and Young).
"""

import torch
from torch import Tensor

from layers.names import check_positive


def low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors of what is to be added to a quantised weight.

    Args:
        error: [..., N, K], the weight minus the quantised weight.
        rank: r; more than min(N, K) is cut to that.

    Returns:
        a [..., r, K] and b [..., N, r], in the dtype of the error.
    """
    check_positive(rank=rank)
    u, s, vh = torch.linalg.svd(error.double(), full_matrices=False)
    root = s[..., :rank].sqrt()
    a = root[..., :, None] * vh[..., :rank, :]
    b = u[..., :, :rank] * root[..., None, :]
    return a.to(error.dtype), b.to(error.dtype)
