"""Batches of text as pure functions. Training batch i depends on (seed, i, rank) alone.

V vocabulary, W windows, N tokens of a corpus; B and S as in layers/base.py.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from layers.names import check_positive
from recipes.tokens import Span, Tokens


class Batch(NamedTuple):
    """What a step reads. bits per byte = sum of nats / sum of n_bytes / ln 2."""

    tokens: Tensor  # [B, S] int64
    targets: Tensor  # [B, S] int64, the token after each
    n_bytes: Tensor  # [B, S] int64, bytes that each target stands for, 0 where padded
    mask: Tensor | None  # [B, S] bool, True where real; None: all of it (training)
    domain: int | None  # index into Tokens.domains; None: mixed (training)
    answers: Tensor | None = None  # [B, S] bool, True where the target is judged; None: as mask

    @property
    def judged(self) -> Tensor | None:
        """[B, S] bool, True at the targets that the loss is of; None: all of them."""
        return self.mask if self.answers is None else self.answers


# Training


def windows_of(span: Span, window: int) -> int:
    """Windows of a span in an epoch: as many as fit wherever the first one starts, or one."""
    n_tokens = span.stop - span.start
    return max((n_tokens - window + 1) // window, min(n_tokens // window, 1))


def epoch_steps(
    tokens: Tokens, *, seq_len: int, batch_size: int, world: int = 1, accumulate: int = 1
) -> int:
    """Micro-batches of one process in an epoch, a multiple of `accumulate`.

    Raises:
        ValueError: the corpus is too short for one optimizer step.
    """
    check_positive(seq_len=seq_len, batch_size=batch_size, world=world, accumulate=accumulate)
    n_windows = sum(windows_of(span, seq_len + 1) for span in tokens.spans["train"])
    steps = n_windows // (batch_size * world * accumulate) * accumulate
    if steps == 0:
        raise ValueError(
            f"batch_size={batch_size} x {accumulate} accumulated x {world} processes is more than "
            f"the {n_windows} training windows of seq_len={seq_len}"
        )
    return steps


@lru_cache(maxsize=4)
def epoch_starts(spans: tuple[Span, ...], window: int, seed: int, epoch: int) -> Tensor:
    """Where the windows of an epoch start, in the order of their use: [W] int64.

    Windows never overlap and never leave a span, so an epoch shows no token twice. Every span's
    first window starts at a random phase, so another epoch cuts the text elsewhere.
    """
    rng = np.random.default_rng((seed, epoch))
    starts = []
    for span in spans:
        count = windows_of(span, window)
        slack = span.stop - span.start - count * window
        phase = rng.integers(min(slack, window - 1) + 1)
        starts.append(span.start + phase + window * np.arange(count))
    return torch.from_numpy(rng.permutation(np.concatenate(starts)))


def train_batch(
    tokens: Tokens,
    *,
    seed: int,
    step: int,
    seq_len: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
) -> Batch:
    """Micro-batch `step`, counted over all epochs, of process `rank` among `world`.

    The ranks' batches, laid end to end, are the batch that one process with `batch_size * world`
    sequences would see. What an epoch leaves over (less than one optimizer step) is not used.
    """
    sizes = {"batch_size": batch_size, "world": world, "accumulate": accumulate}
    epoch, i = divmod(step, epoch_steps(tokens, seq_len=seq_len, **sizes))
    starts = epoch_starts(tokens.spans["train"], seq_len + 1, seed, epoch)
    first = (i * world + rank) * batch_size
    rows = starts[first : first + batch_size, None] + torch.arange(seq_len + 1)  # [B, S + 1]
    ids = tokens.ids[rows].long()
    targets = ids[:, 1:]
    return Batch(ids[:, :-1], targets, tokens.bytes_per_token[targets], None, None)


class TrainLoader:
    """One epoch of micro-batches a pass; the next pass goes on where the last one stopped.

    Its state is one number. It has a length because Lightning reads a loader without one a batch
    ahead, and then saves a position that is one too far.
    """

    def __init__(self, read: Callable[[int], Batch], length: int):
        """read: a micro-batch by its number over all epochs. length: micro-batches of an epoch."""
        self.step = 0  # the next micro-batch, counted over all epochs
        self._read, self._length = read, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        end = (self.step // self._length + 1) * self._length
        while self.step < end:
            self.step += 1
            yield self._read(self.step - 1)

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` reads back."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at the saved micro-batch."""
        self.step = state["step"]


def train_loader(
    tokens: Tokens, *, seed: int, seq_len: int, batch_size: int, rank: int, world: int,
    accumulate: int,
) -> TrainLoader:  # fmt: skip
    """The micro-batches of a text, as `train_batch` has them."""
    sizes = {"batch_size": batch_size, "world": world, "accumulate": accumulate}

    def read(step: int) -> Batch:
        return train_batch(tokens, seed=seed, step=step, seq_len=seq_len, rank=rank, **sizes)

    return TrainLoader(read, epoch_steps(tokens, seq_len=seq_len, **sizes))


# Evaluation


def eval_windows(tokens: Tokens, name: str, seq_len: int) -> list[Tensor]:
    """For each domain (start, length) of windows over a split: [W, 2] int64.

    Every token of the split is a target exactly once, the first of a document's part too: its
    context is the last token of the part before. The last window of a part may be shorter.
    """
    rows: list[list[Tensor]] = [[] for _ in tokens.domains]
    for span in tokens.spans[name]:
        starts = torch.arange(span.start - 1, span.stop - 1, seq_len)
        lengths = (span.stop - 1 - starts).clamp(max=seq_len)
        rows[span.domain].append(torch.stack([starts, lengths], dim=1))
    return [torch.cat(found) if found else torch.empty(0, 2, dtype=torch.int64) for found in rows]


def eval_batch(tokens: Tokens, windows: Tensor, seq_len: int, domain: int) -> Batch:
    """The batch of windows [B, 2] of one domain, padded with zeros at the end."""
    starts, lengths = windows.unbind(1)
    mask = torch.arange(seq_len) < lengths[:, None]  # [B, S]
    positions = starts[:, None] + torch.arange(seq_len + 1)
    ids = tokens.ids[positions.clamp(max=len(tokens.ids) - 1)].long()  # [B, S + 1]
    targets = ids[:, 1:] * mask
    return Batch(ids[:, :-1] * mask, targets, tokens.bytes_per_token[targets] * mask, mask, domain)


def spread(sizes: Tensor, limit: int) -> Tensor:
    """Indices of evenly spaced windows that hold at most `limit` bytes together, one at least.

    Args:
        sizes: [W] bytes of each window.
        limit: bytes.
    """
    n = len(sizes)
    for k in range(min(n, limit * n // int(sizes.sum())), 1, -1):
        chosen = (2 * torch.arange(k) + 1) * n // (2 * k)
        if sizes[chosen].sum() <= limit:
            return chosen
    return torch.tensor([n // 2])


class EvalLoader:
    """Windows of a split, domain by domain: no batch mixes two.

    With several processes each takes every world-th window, and empty windows fill up, so that
    all run equally many batches of equal shapes.
    """

    def __init__(
        self, tokens: Tokens, name: str, *, seq_len: int, batch_size: int,
        bytes_per_domain: int | None = None, rank: int = 0, world: int = 1,
    ):  # fmt: skip
        self.tokens, self.seq_len = tokens, seq_len
        self._batches: list[tuple[int, Tensor]] = []  # domain, windows [B, 2]
        for domain, windows in enumerate(eval_windows(tokens, name, seq_len)):
            if len(windows) == 0:
                continue
            if bytes_per_domain is not None:
                sizes = eval_batch(tokens, windows, seq_len, domain).n_bytes.sum(1)
                windows = windows[spread(sizes, bytes_per_domain)]
            filler = windows.new_zeros(-len(windows) % world, 2)
            mine = torch.cat([windows, filler])[rank::world]
            self._batches += [(domain, part) for part in mine.split(batch_size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for domain, windows in self._batches:
            yield eval_batch(self.tokens, windows, self.seq_len, domain)
