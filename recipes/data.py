"""The data of a recipe: checked at the door, batches for Lightning (recipes/batches.py)."""

from lightning import LightningDataModule

from layers.names import check_positive, unknown
from recipes.batches import (
    Batch,
    EvalLoader,
    Tokens,
    TrainLoader,
    epoch_steps,
    load_tokens,
    train_batch,
)
from recipes.schema import DataConfig
from recipes.text import CORPORA, TOKENIZERS, Tokenizer, corpus_row, tokenizer, tokenizer_row

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


def check_data(config: DataConfig) -> None:
    """Raise ValueError on names, sizes and combinations that cannot work."""
    corpus, row = corpus_row(config.corpus), tokenizer_row(config.tokenizer)
    check_positive(seq_len=config.seq_len, batch_size=config.batch_size)
    if config.eval_bytes_per_domain is not None:
        check_positive(eval_bytes_per_domain=config.eval_bytes_per_domain)
    if row.corpora is not None and corpus.name not in row.corpora:
        raise ValueError(
            f"tokenizer {row.name!r} was made for {', '.join(row.corpora)}, not for "
            f"{corpus.name!r}: use tokenizer bytes"
        )
    tokens = load_tokens(config.corpus, config.tokenizer)
    shortest = min(span.stop - span.start for span in tokens.spans["train"])
    if config.seq_len >= shortest:
        raise ValueError(
            f"seq_len={config.seq_len} is too long for corpus {corpus.name!r}: its shortest "
            f"document has {shortest} training tokens, so at most {shortest - 1}"
        )


class TextData(LightningDataModule):
    """A corpus for a Trainer; set its `use_distributed_sampler=False`, ranks are told apart here.

    Raises ValueError at once for a config that cannot work.
    """

    def __init__(self, config: DataConfig, seed: int, accumulate: int = 1):
        super().__init__()
        check_data(config)
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.config, self.seed, self.accumulate = config, seed, accumulate
        self.tokens: Tokens = load_tokens(config.corpus, config.tokenizer)
        self.tokenizer: Tokenizer = tokenizer(config.tokenizer)
        self.sizes = {"seq_len": config.seq_len, "batch_size": config.batch_size}
        epoch_steps(self.tokens, **self.sizes, accumulate=accumulate)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of what `Batch.domain` counts."""
        return self.tokens.domains

    def _place(self) -> dict[str, int]:
        trainer = self.trainer
        if trainer is None:
            return {"rank": 0, "world": 1}
        return {"rank": trainer.global_rank, "world": trainer.world_size}

    def train_dataloader(self) -> TrainLoader:
        """Endless over epochs; starts at micro-batch 0 unless a state is loaded."""
        return TrainLoader(
            self.tokens, seed=self.seed, accumulate=self.accumulate, **self.sizes, **self._place()
        )

    def eval_loader(self, name: str, bytes_per_domain: int | None = None) -> EvalLoader:
        """Batches of "validation" or "test"; None: all of it.

        Raises:
            ValueError: no such split, or the corpus leaves it empty.
        """
        filled = [part for part, spans in self.tokens.spans.items() if spans]
        if name not in filled:
            raise unknown(f"split of corpus {self.config.corpus!r}", name, filled)
        return EvalLoader(
            self.tokens, name, bytes_per_domain=bytes_per_domain, **self.sizes, **self._place()
        )

    def val_dataloader(self) -> EvalLoader:
        """The validation part, thinned to `eval_bytes_per_domain`."""
        return self.eval_loader("validation", self.config.eval_bytes_per_domain)

    def test_dataloader(self) -> EvalLoader:
        """All of the test part."""
        return self.eval_loader("test")
