"""A corpus as tokens, split into parts; what a recipe says about data is checked here."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from layers.names import check_positive
from recipes.schema import DataConfig
from recipes.synthetic import check_task
from recipes.text import corpus_row, documents, split, tokenizer, tokenizer_row


class Span(NamedTuple):
    """One part of one document, in a corpus of tokens laid end to end."""

    start: int
    stop: int
    domain: int


@dataclass(frozen=True, eq=False)
class Tokens:
    """A tokenized corpus: each document's train, validation and test parts in this order."""

    ids: Tensor  # [N], the smallest type that holds the vocabulary
    bytes_per_token: Tensor  # [V] int64
    domains: tuple[str, ...]
    spans: dict[str, tuple[Span, ...]]  # by split; empty parts left out


@lru_cache
def load_tokens(corpus: str, tokenizer_name: str) -> Tokens:
    """A shipped corpus as tokens; each part is tokenized by itself, so no token crosses a cut."""
    row, encoder = corpus_row(corpus), tokenizer(tokenizer_name)
    dtype = torch.uint8 if encoder.vocab_size <= 256 else torch.int16
    spans: dict[str, list[Span]] = {"train": [], "validation": [], "test": []}
    parts: list[Tensor] = []
    end = 0
    for document in documents(corpus):
        for name, text in split(document.text, row.cuts).items():
            if text:
                parts.append(encoder.encode(text).to(dtype))
                start, end = end, end + len(parts[-1])
                spans[name].append(Span(start, end, row.domains.index(document.domain)))
    fixed = {name: tuple(found) for name, found in spans.items()}
    return Tokens(torch.cat(parts), encoder.bytes_per_token, row.domains, fixed)


def check_data(config: DataConfig) -> None:
    """Raise ValueError on names, sizes and combinations that cannot work."""
    check_positive(seq_len=config.seq_len, batch_size=config.batch_size)
    if config.eval_bytes_per_domain is not None:
        check_positive(eval_bytes_per_domain=config.eval_bytes_per_domain)
    if config.final_bytes_per_domain is not None:
        check_positive(final_bytes_per_domain=config.final_bytes_per_domain)
    if check_task(config) is not None:
        return
    corpus, row = corpus_row(config.corpus), tokenizer_row(config.tokenizer)
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
