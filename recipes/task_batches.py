"""Batches of the tasks of synthetic.py. Training batch i depends on (seed, i, rank) alone.

B and S as in layers/base.py.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from layers.names import check_positive
from recipes.batches import Batch, TrainLoader, spread
from recipes.synthetic import Ids, Split, Task

STEPS_A_PASS = 1024  # optimizer steps; of no meaning but to Lightning, which counts passes


def task_batch(
    task: Task, sequences: Sequence[Ids], seq_len: int, domain: int | None = None
) -> Batch:
    """Sequences [<= seq_len + 1] side by side, zeros after a shorter one.

    Each answer counts as one byte, every other target as none.
    """
    ids = np.zeros((len(sequences), seq_len + 1), np.int64)
    lengths = torch.tensor([max(len(sequence) - 1, 0) for sequence in sequences])
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    mask = torch.arange(seq_len) < lengths[:, None]  # [B, S]
    answers = torch.from_numpy(task.answers(seq_len)) & mask
    tokens = torch.from_numpy(ids)
    whole = domain is None and bool(mask.all())
    return Batch(
        tokens=tokens[:, :-1] * mask,
        targets=tokens[:, 1:] * mask,
        n_bytes=answers.long(),
        mask=None if whole else mask,
        domain=domain,
        answers=answers,
    )


def task_train_batch(
    task: Task, *, seed: int, step: int, seq_len: int, batch_size: int, rank: int = 0,
    world: int = 1,
) -> Batch:  # fmt: skip
    """Micro-batch `step` of process `rank` among `world`.

    The ranks' batches, laid end to end, are the batch that one process with `batch_size * world`
    sequences would see.
    """
    check_positive(seq_len=seq_len, batch_size=batch_size, world=world)
    first = (step * world + rank) * batch_size
    numbers = range(first, first + batch_size)
    return task_batch(task, [task.sequence("train", seed, i, seq_len) for i in numbers], seq_len)


def task_train_loader(
    task: Task, *, seed: int, seq_len: int, batch_size: int, rank: int, world: int, accumulate: int
) -> TrainLoader:
    """Micro-batches without end, STEPS_A_PASS optimizer steps a pass."""

    def read(step: int) -> Batch:
        return task_train_batch(
            task, seed=seed, step=step, seq_len=seq_len, batch_size=batch_size, rank=rank,
            world=world,
        )  # fmt: skip

    return TrainLoader(read, STEPS_A_PASS * accumulate)


class TaskEvalLoader:
    """The sequences of a held-out split, all of them or evenly spaced ones.

    With several processes each takes every world-th sequence, and empty ones fill up, so that all
    run equally many batches of equal shapes.
    """

    def __init__(
        self, task: Task, split: Split, *, seq_len: int, batch_size: int,
        n_answers: int | None = None, rank: int = 0, world: int = 1,
    ):  # fmt: skip
        """n_answers: at most so many of all processes together, of one sequence at least."""
        self.task, self.seq_len, self.batch_size = task, seq_len, batch_size
        sequences = [task.sequence(split, 0, i, seq_len) for i in range(task.n_held_out(seq_len))]
        if n_answers is not None:
            sizes = [int(task.answers(len(ids) - 1).sum()) for ids in sequences]
            sequences = [sequences[i] for i in spread(torch.tensor(sizes), n_answers).tolist()]
        filler = [np.zeros(0, np.int64)] * (-len(sequences) % world)
        self._mine = [*sequences, *filler][rank::world]

    def __len__(self) -> int:
        return -(-len(self._mine) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self._mine), self.batch_size):
            part = self._mine[first : first + self.batch_size]
            yield task_batch(self.task, part, self.seq_len, domain=0)
