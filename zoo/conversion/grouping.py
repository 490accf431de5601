"""Which hidden neurons an expert gets: equal groups, each neuron in one (moe.md 10)."""

from collections.abc import Callable

import torch
from torch import Tensor

from layers.names import check_positive

KMEANS_STEPS = 50  # more than it ever took at the sizes tried; each one can only improve


def contiguous_groups(rows: Tensor, n_groups: int, generator: torch.Generator) -> Tensor:
    """Neighbours together: group j holds [j F / N, (j + 1) F / N), as the published code.

    Args:
        rows: [F, D], a row for each neuron; read only by `kmeans_groups`.
        n_groups: N; must divide F.
        generator: of what is drawn; nothing is here.

    Returns:
        [N, F / N] int64.
    """
    return torch.arange(_checked(rows, n_groups)).view(n_groups, -1)


def random_groups(rows: Tensor, n_groups: int, generator: torch.Generator) -> Tensor:
    """A random partition (LLaMA-MoE, arXiv:2406.16554). As `contiguous_groups`."""
    return torch.randperm(_checked(rows, n_groups), generator=generator).view(n_groups, -1)


def kmeans_groups(rows: Tensor, n_groups: int, generator: torch.Generator) -> Tensor:
    """Neurons with similar rows of the up matrix together. As `contiguous_groups`; ascending."""
    labels = balanced_kmeans(rows, n_groups, generator)
    return labels.argsort(stable=True).view(n_groups, -1)


GROUPINGS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "contiguous": contiguous_groups,
    "random": random_groups,
    "kmeans": kmeans_groups,
}


def balanced_kmeans(points: Tensor, n_groups: int, generator: torch.Generator) -> Tensor:
    """k-means with groups of one size: the label of each point.

    Lloyd's two steps; the assignment stays balanced because points only change places, two at a
    time, as long as that brings them nearer to their centres. Both steps lower the sum of squared
    distances, so it ends; in a local optimum, as k-means does.

    Args:
        points: [F, D].
        n_groups: N; must divide F.
        generator: of the first centres (k-means++) and of nothing else.

    Returns:
        [F] int64 in [0, N).
    """
    n, x = _checked(points, n_groups), points.detach().double().cpu()
    distances = _squared(x, _first_centres(x, n_groups, generator))
    labels = _fill(distances, n // n_groups)
    for _ in range(KMEANS_STEPS):
        if not _exchange(distances, labels):
            break
        centres = torch.stack([x[labels == j].mean(0) for j in range(n_groups)])
        distances = _squared(x, centres)
    return labels


def _checked(rows: Tensor, n_groups: int) -> int:
    check_positive(n_groups=n_groups)
    if rows.shape[0] % n_groups:
        raise ValueError(f"d_ff={rows.shape[0]} does not split into {n_groups} equal parts")
    return rows.shape[0]


def _squared(x: Tensor, centres: Tensor) -> Tensor:
    """[F, N], |x - c|^2."""
    products = x @ centres.t()
    return x.square().sum(-1, keepdim=True) - 2 * products + centres.square().sum(-1)


def _first_centres(x: Tensor, n_groups: int, generator: torch.Generator) -> Tensor:
    """k-means++: points drawn with the square of their distance to the nearest centre so far."""
    chosen = [int(torch.randint(x.shape[0], (), generator=generator))]
    while len(chosen) < n_groups:
        far = _squared(x, x[chosen]).amin(-1).clamp(min=0)
        far[chosen] = 0
        weights = far if far.sum() > 0 else torch.ones_like(far)  # all points alike
        chosen.append(int(weights.multinomial(1, generator=generator)))
    return x[chosen]


def _fill(distances: Tensor, size: int) -> Tensor:
    """A first balanced assignment: who has most to lose chooses first among groups with room."""
    two = distances.topk(min(2, distances.shape[1]), dim=-1, largest=False).values
    order = (two[:, -1] - two[:, 0]).argsort(descending=True, stable=True)
    labels, room = torch.empty(len(distances), dtype=torch.int64), [size] * distances.shape[1]
    for i, preferred in zip(order.tolist(), distances[order].argsort(-1).tolist(), strict=True):
        j = next(j for j in preferred if room[j])
        labels[i] = j
        room[j] -= 1
    return labels


def _exchange(distances: Tensor, labels: Tensor) -> bool:
    """Let points of every two groups change places while both together gain. In place.

    Between two groups the best exchange pairs the largest gains of either side, so one pass over
    the sorted gains finds all of it. Returns whether anything moved.
    """
    n_groups, moved = distances.shape[1], False
    for a in range(n_groups):
        for b in range(a + 1, n_groups):
            in_a, in_b = ((labels == j).nonzero().squeeze(-1) for j in (a, b))
            gain_a = (distances[in_a, a] - distances[in_a, b]).sort(descending=True, stable=True)
            gain_b = (distances[in_b, b] - distances[in_b, a]).sort(descending=True, stable=True)
            better = gain_a.values + gain_b.values > 1e-12 * distances[in_a, a].mean()
            if better.any():
                labels[in_a[gain_a.indices[better]]] = b
                labels[in_b[gain_b.indices[better]]] = a
                moved = True
    return moved
