"""How many answers an evaluation got right, where a batch says which targets are answers."""

import torch
from torch import Tensor
from torchmetrics import Metric

from recipes.batches import Batch


class Accuracy(Metric):
    """Answers whose likeliest token is the right one / all answers."""

    full_state_update = False
    right: Tensor  # int64
    n_answers: Tensor  # int64

    def __init__(self) -> None:
        super().__init__()
        for name in ("right", "n_answers"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Add a batch. logits: [B, S, V]. A batch of text has no answers and adds nothing."""
        if batch.answers is not None:
            self.right += ((logits.argmax(-1) == batch.targets) & batch.answers).sum()
            self.n_answers += batch.answers.sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Right answers and all answers, over all processes."""
        return self.right, self.n_answers

    def value(self) -> float | None:
        """The share of everything added so far; None where nothing was an answer."""
        right, n = self.compute()
        return int(right) / int(n) if int(n) else None
