"""A recipe's data for Lightning: corpora from text.py, tokens.py, batches from batches.py.

Tasks in place of a text are in synthetic.py, their batches in task_batches.py.
"""

from typing import cast

from lightning import LightningDataModule

from layers.names import unknown
from recipes.batches import (
    Batch,
    EvalLoader,
    TrainLoader,
    epoch_steps,
    train_batch,
    train_loader,
)
from recipes.ranks import data_rank
from recipes.schema import DataConfig
from recipes.synthetic import Split, Task, task_of
from recipes.task_batches import TaskEvalLoader, task_train_loader
from recipes.text import CORPORA, TOKENIZERS, Tokenizer, tokenizer
from recipes.tokens import Tokens, check_data, load_tokens

__all__ = [
    "CORPORA",
    "TOKENIZERS",
    "Batch",
    "EvalLoader",
    "TextData",
    "Tokenizer",
    "Tokens",
    "TrainLoader",
    "check_data",
    "load_tokens",
    "tokenizer",
    "train_batch",
]


class TextData(LightningDataModule):
    """A corpus for a Trainer; set its `use_distributed_sampler=False`, ranks are told apart here.

    Where the config names a task, its sequences stand in for a corpus: `task` is that task, and
    there are neither `tokens` nor a `tokenizer`. Raises ValueError at once for a config that
    cannot work.
    """

    tokens: Tokens
    tokenizer: Tokenizer

    def __init__(self, config: DataConfig, seed: int, accumulate: int = 1):
        super().__init__()
        check_data(config)
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.config, self.seed, self.accumulate = config, seed, accumulate
        self.task = task_of(config.task)
        self.sizes = {"seq_len": config.seq_len, "batch_size": config.batch_size}
        if self.task is not None:
            return
        self.tokens = load_tokens(config.corpus, config.tokenizer)
        self.tokenizer = tokenizer(config.tokenizer)
        epoch_steps(self.tokens, **self.sizes, accumulate=accumulate)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of what `Batch.domain` counts."""
        return self.tokens.domains if self.task is None else (self.task.name,)

    def _place(self) -> dict[str, int]:
        place = data_rank(self.trainer)
        return {"rank": place.rank, "world": place.world}

    def train_dataloader(self) -> TrainLoader:
        """Endless over epochs; starts at micro-batch 0 unless a state is loaded."""
        sizes = {"accumulate": self.accumulate, **self.sizes, **self._place()}
        if self.task is not None:
            return task_train_loader(self.task, seed=self.seed, **sizes)
        return train_loader(self.tokens, seed=self.seed, **sizes)

    def eval_loader(
        self, name: str, bytes_per_domain: int | None = None
    ) -> EvalLoader | TaskEvalLoader:
        """Batches of "validation" or "test"; None: all of it. A task's answer is a byte.

        Raises:
            ValueError: no such split, or the corpus leaves it empty.
        """
        if self.task is not None:
            return self._task_loader(self.task, name, bytes_per_domain)
        filled = [part for part, spans in self.tokens.spans.items() if spans]
        if name not in filled:
            raise unknown(f"split of corpus {self.config.corpus!r}", name, filled)
        return EvalLoader(
            self.tokens, name, bytes_per_domain=bytes_per_domain, **self.sizes, **self._place()
        )

    def _task_loader(self, task: Task, name: str, n_answers: int | None) -> TaskEvalLoader:
        if name not in task.splits:
            raise unknown(f"split of task {task.name!r}", name, task.splits)
        return TaskEvalLoader(
            task, cast("Split", name), n_answers=n_answers, **self.sizes, **self._place()
        )

    def val_dataloader(self) -> EvalLoader | TaskEvalLoader:
        """The validation part, thinned to `eval_bytes_per_domain`."""
        return self.eval_loader("validation", self.config.eval_bytes_per_domain)

    def test_dataloader(self) -> EvalLoader | TaskEvalLoader:
        """All of the test part."""
        return self.eval_loader("test")
