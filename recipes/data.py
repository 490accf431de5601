"""A recipe's data for Lightning: corpora from text.py, tokens.py, batches from batches.py."""

from lightning import LightningDataModule

from layers.names import unknown
from recipes.batches import Batch, EvalLoader, TrainLoader, epoch_steps, train_batch
from recipes.ranks import data_rank
from recipes.schema import DataConfig
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
        place = data_rank(self.trainer)
        return {"rank": place.rank, "world": place.world}

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
