"""Sequences whose answers are known: recall, copying and facts, in place of a text.

recall   keys and values stand in the context, then keys are asked for (MQAR of arXiv:2312.04927,
         its questions in one block at the end)
copy     random symbols, a separator, and the same symbols again
facts    a fixed table of keys and values, seen again in every epoch: what weights can hold, and
         nothing in the context helps (arXiv:2412.09764 asks this of real facts)

A sequence is a pure function of its number, and only its answers are judged. Each answer counts as
one byte, so that "bits per byte" of such a run are bits per answer; accuracy is recorded too.
V symbols, S tokens a sequence as the model reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from layers.names import check_positive, unknown
from recipes.schema import DataConfig

Ids = NDArray[np.int64]
Split = Literal["train", "validation", "test"]
# First word of what a sequence is drawn from, so that no split shares a stream with another
STREAMS: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}


@dataclass(frozen=True, kw_only=True)
class Recall:
    """k1 v1 k2 v2 ... then q1 a1 q2 a2 ...: every question is one of the keys, none asked twice.

    Keys are drawn from the lower half of the symbols, no key twice; values from the upper half.
    """

    name: ClassVar[str] = "recall"
    splits: ClassVar[tuple[Split, ...]] = ("validation", "test")
    n_pairs: int = 8
    n_queries: int = 8
    vocab: int = 128  # symbols, keys and values together
    n_eval: int = 1024  # sequences of each held-out split

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.n_queries > self.n_pairs:
            raise ValueError(
                f"recall: n_queries must be at most n_pairs={self.n_pairs}, got {self.n_queries}"
            )
        if self.n_pairs > self.vocab // 2:
            raise ValueError(
                f"recall: n_pairs={self.n_pairs} keys need vocab of at least {2 * self.n_pairs}, "
                f"got {self.vocab}: keys are half of the symbols"
            )

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / (self.vocab - self.vocab // 2)

    def n_tokens(self, seq_len: int) -> int:
        """S of a whole sequence, whatever room there is."""
        return 2 * (self.n_pairs + self.n_queries) - 1

    def answers(self, n_tokens: int) -> NDArray[np.bool_]:
        """True at the targets that are judged: [S]."""
        place = np.arange(n_tokens)
        return (place >= 2 * self.n_pairs) & (place % 2 == 0)

    def n_held_out(self, seq_len: int) -> int:
        """Sequences of a held-out split."""
        return self.n_eval

    def sequence(self, split: Split, seed: int, index: int, seq_len: int) -> Ids:
        """Sequence `index` of a split: [S + 1]; held-out ones are the same for every seed."""
        rng = _stream(split, seed, index)
        keys = rng.permutation(self.vocab // 2)[: self.n_pairs]
        values = rng.integers(self.vocab // 2, self.vocab, self.n_pairs)
        asked = rng.permutation(self.n_pairs)[: self.n_queries]
        pairs = np.stack([keys, values], axis=1)  # [n_pairs, 2]
        return np.concatenate([pairs, pairs[asked]]).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Copy:
    """x1 ... xn | x1 ... xn, the separator being the last symbol; the second half is judged."""

    name: ClassVar[str] = "copy"
    splits: ClassVar[tuple[Split, ...]] = ("validation", "test")
    length: int = 64  # symbols to copy
    vocab: int = 64  # symbols, the separator among them
    n_eval: int = 128  # sequences of each held-out split

    def __post_init__(self) -> None:
        _check_sizes(self)

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / (self.vocab - 1)

    def n_tokens(self, seq_len: int) -> int:
        """S of a whole sequence, whatever room there is."""
        return 2 * self.length

    def answers(self, n_tokens: int) -> NDArray[np.bool_]:
        """True at the targets that are judged: [S]."""
        return np.arange(n_tokens) >= self.length

    def n_held_out(self, seq_len: int) -> int:
        """Sequences of a held-out split."""
        return self.n_eval

    def sequence(self, split: Split, seed: int, index: int, seq_len: int) -> Ids:
        """Sequence `index` of a split: [S + 1]; held-out ones are the same for every seed."""
        symbols = _stream(split, seed, index).integers(0, self.vocab - 1, self.length)
        return np.concatenate([symbols, [self.vocab - 1], symbols])


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts end to end, each a key of several symbols and its value: a table to know by heart.

    Keys, no key twice, are of the lower half of the symbols, values of the upper half, so that a
    key's begin is seen wherever it stands. The table is the same for every seed; the order of an
    epoch is the seed's. Validation is all facts once: what is known, not what is inferred.
    """

    name: ClassVar[str] = "facts"
    splits: ClassVar[tuple[Split, ...]] = ("validation",)
    n_facts: int = 4096
    key_len: int = 3  # symbols
    vocab: int = 128  # symbols, keys and values together

    def __post_init__(self) -> None:
        _check_sizes(self)
        room = (self.vocab // 2) ** self.key_len
        if not 2 * self.n_facts <= room:
            raise ValueError(
                f"facts: n_facts must be at most {room // 2}, half of the keys that key_len="
                f"{self.key_len} and vocab={self.vocab} allow, got {self.n_facts}"
            )

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / (self.vocab - self.vocab // 2)

    def per_sequence(self, seq_len: int) -> int:
        """Facts that a sequence holds: as many as there is room for."""
        return min((seq_len + 1) // (self.key_len + 1), self.n_facts)

    def n_tokens(self, seq_len: int) -> int:
        """S of a whole sequence."""
        return max(self.per_sequence(seq_len), 1) * (self.key_len + 1) - 1

    def answers(self, n_tokens: int) -> NDArray[np.bool_]:
        """True at the targets that are judged: [S]."""
        return np.arange(n_tokens) % (self.key_len + 1) == self.key_len - 1

    def n_held_out(self, seq_len: int) -> int:
        """Sequences that hold all facts; the last one may be shorter."""
        return -(-self.n_facts // self.per_sequence(seq_len))

    def sequence(self, split: Split, seed: int, index: int, seq_len: int) -> Ids:
        """Sequence `index` of a split: [S + 1].

        In training an epoch is all facts in a new order, but for those that fill no sequence.
        """
        table, n = fact_table(self), self.per_sequence(seq_len)
        if split != "train":
            return table[index * n : (index + 1) * n].reshape(-1)
        epoch, place = divmod(index, self.n_facts // n)
        return table[_order(self.n_facts, seed, epoch)[place * n : (place + 1) * n]].reshape(-1)


Task = Recall | Copy | Facts
TASKS: dict[str, type[Task]] = {kind.name: kind for kind in (Recall, Copy, Facts)}


@lru_cache(maxsize=4)
def fact_table(task: Facts) -> Ids:
    """Every fact, its key then its value: [n_facts, key_len + 1]."""
    rng, n_keys = np.random.default_rng(0), task.vocab // 2
    numbers = rng.choice(n_keys**task.key_len, task.n_facts, replace=False)
    digits = numbers[:, None] // n_keys ** np.arange(task.key_len) % n_keys
    values = rng.integers(n_keys, task.vocab, (task.n_facts, 1))
    return np.concatenate([digits, values], axis=1)


@lru_cache(maxsize=4)
def _order(n_facts: int, seed: int, epoch: int) -> Ids:
    return np.random.default_rng((seed, epoch)).permutation(n_facts)


def _stream(split: Split, seed: int, index: int) -> np.random.Generator:
    """Numbers of one sequence alone."""
    of = (seed,) if split == "train" else ()
    return np.random.default_rng((STREAMS[split], *of, index))


def _check_sizes(task: Task) -> None:
    check_positive(**{f"{task.name}: {f.name}": getattr(task, f.name) for f in fields(task)})
    if task.vocab < 4:
        raise ValueError(f"{task.name}: vocab must be at least 4, got {task.vocab}")


def task_of(given: Any) -> Task | None:
    """What `data.task` says: a name, or a mapping of `name` and options; None: there is none.

    Raises:
        ValueError: unknown name or option, or a value that is refused.
    """
    if given is None:
        return None
    said = {"name": given} if isinstance(given, str) else given
    if not isinstance(said, Mapping) or "name" not in said:
        raise ValueError(f"data.task must be a name, or a mapping with a name, got {given!r}")
    if said["name"] not in TASKS:
        raise unknown("data.task", said["name"], TASKS)
    kind = TASKS[said["name"]]
    options: dict[str, Any] = {str(k): value for k, value in said.items() if k != "name"}
    known = [f.name for f in fields(kind)]
    for key, value in options.items():
        if key not in known:
            raise unknown(f"option of data.task {kind.name}", key, known)
        if type(value) is not int:
            raise ValueError(f"{kind.name}: {key} must be int, got {value!r}")
    return kind(**options)


def check_task(config: DataConfig) -> Task | None:
    """The task that a recipe's data asks for, if any; ValueError where it cannot work."""
    task = task_of(config.task)
    if task is not None and task.n_tokens(config.seq_len) > config.seq_len:
        raise ValueError(
            f"data.seq_len must be at least {task.n_tokens(config.seq_len)} for the task "
            f"{task.name!r} as configured, got {config.seq_len}"
        )
    return task
