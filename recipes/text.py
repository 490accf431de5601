"""Texts and tokenizers that ship with the package: nothing to download, nothing to prepare.

Each file is checked by its sha256 when it is first read, and unpacked in memory. Sizes are bytes.
"""

import gzip
import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from layers.names import unknown


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One gzip file of `recipes/corpora`."""

    file: str
    packed_sha256: str
    unpacked_sha256: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One row of CORPORA."""

    name: str
    summary: str
    archive: Packed
    licence: str  # in one line
    note: str  # file beside the text: origin, licence, split, reference figures
    domains: tuple[str, ...]  # kinds of text; a document has one
    cuts: tuple[float, float]  # of a document's characters: where training and validation end


@dataclass(frozen=True, kw_only=True)
class TokenizerRow:
    """One row of TOKENIZERS."""

    name: str
    summary: str
    vocab_size: int
    archive: Packed | None = None  # None: nothing to read
    corpora: tuple[str, ...] | None = None  # what it was made for; None: any text


# fmt: off
CORPORA = (
    Corpus(
        name="classics7", summary="24 documents of 7 kinds, 4.9 MB: loss and routing by domain",
        archive=Packed(
            file="classics7.txt.gz",
            packed_sha256="169ccbc3463c5476063ea775aa8b4162b3a62401bcd5261f98aa7e20d4e26b3a",
            unpacked_sha256="165a7250e0cc16adcc7a3111638f70814feff919ea1f8c861fb73e10d86d56c9",
        ),
        licence="public domain; stb also under MIT", note="classics7.md",
        domains=("drama", "verse", "novel", "scripture", "civics", "reference", "code"),
        cuts=(0.9, 0.95),
    ),
    Corpus(
        # nanoGPT's split: the first 90% train, the last 10% validate, and nothing is left to test.
        name="tinyshakespeare", summary="1.1 MB of plays: the yardstick that others publish",
        archive=Packed(
            file="tinyshakespeare.txt.gz",
            packed_sha256="13125fe8f49092165d7d489e3944db52d1ba546e64a60080cc9523bcd0c5e46a",
            unpacked_sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        ),
        licence="public domain", note="tinyshakespeare.md", domains=("drama",), cuts=(0.9, 1.0),
    ),
)

TOKENIZERS = (
    TokenizerRow(name="bytes", summary="one token a byte, no dependency", vocab_size=256),
    TokenizerRow(
        name="bpe1024", summary="byte pairs, 2.4 bytes a token", vocab_size=1024,
        archive=Packed(
            file="classics7-bpe1024.json.gz",
            packed_sha256="8501e9fafe76c194db489b9a6a99579cf1277e6268bae2c2f30f018f108127f1",
            unpacked_sha256="3cae6bb376162666028c5c00ea962a1753a9340ebefd6217be66c7d7f401e921",
        ),
        corpora=("classics7",),
    ),
    TokenizerRow(
        name="bpe4096", summary="byte pairs, 3.1 bytes a token", vocab_size=4096,
        archive=Packed(
            file="classics7-bpe4096.json.gz",
            packed_sha256="9323e258f926b71349acb67aee61174464d7af621211ad55134ade252b0e67d9",
            unpacked_sha256="8ddef07d466980150f6fc5341fcd11c860f0c46a8a8e8c90e00f70d11dc4ad67",
        ),
        corpora=("classics7",),
    ),
)
# fmt: on


class Document(NamedTuple):
    """One text of a corpus."""

    title: str
    domain: str
    text: str


def corpus_row(name: str) -> Corpus:
    """The row of CORPORA with that name; ValueError with the nearest name if there is none."""
    for row in CORPORA:
        if row.name == name:
            return row
    raise unknown("corpus", name, [row.name for row in CORPORA])


def tokenizer_row(name: str) -> TokenizerRow:
    """The row of TOKENIZERS with that name; ValueError with the nearest name if there is none."""
    for row in TOKENIZERS:
        if row.name == name:
            return row
    raise unknown("tokenizer", name, [row.name for row in TOKENIZERS])


@lru_cache
def unpack(archive: Packed) -> bytes:
    """The checked content of a shipped file.

    Raises:
        ValueError: the file is missing, or it is not the one that was shipped.
    """
    path = resources.files("recipes.corpora") / archive.file
    if not path.is_file():
        raise ValueError(f"{archive.file} is missing from recipes/corpora: install moe-zoo again")
    packed = path.read_bytes()
    _check_sha256(archive.file, packed, archive.packed_sha256)
    content = gzip.decompress(packed)
    _check_sha256(f"{archive.file}, unpacked,", content, archive.unpacked_sha256)
    return content


def _check_sha256(what: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"{what} is damaged: sha256 {found[:16]}..., expected {expected[:16]}...: "
            "install moe-zoo again"
        )


@lru_cache
def documents(corpus: str) -> tuple[Document, ...]:
    """The documents of a corpus, by name. A corpus without headers is one document."""
    row = corpus_row(corpus)
    text = unpack(row.archive).decode("ascii")
    if not text.startswith("\x1e"):
        return (Document(row.name, row.domains[0], text),)
    found = []
    for document in text.split("\x1e")[1:]:
        header, body = document.split("\n", 1)
        meta = json.loads(header)
        found.append(Document(meta["title"], meta["domain"], body))
    return tuple(found)


def split(text: str, cuts: tuple[float, float]) -> dict[str, str]:
    """The parts of one document: train, validation, test, in this order; they may be empty."""
    first, second = (int(cut * len(text)) for cut in cuts)
    return {"train": text[:first], "validation": text[first:second], "test": text[second:]}


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    bytes_per_token: Tensor  # [V] int64: bytes of text that each id stands for

    def encode(self, text: str) -> Tensor:
        """Token ids: [N] int64."""
        ...

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of ids [N]; bytes that are no UTF-8 become U+FFFD."""
        ...


class ByteTokenizer:
    """One token a byte of UTF-8."""

    vocab_size = 256

    def __init__(self) -> None:
        self.bytes_per_token = torch.ones(256, dtype=torch.int64)

    def encode(self, text: str) -> Tensor:
        """Token ids: [N] int64."""
        return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64))

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of ids [N]; bytes that are no UTF-8 become U+FFFD."""
        return bytes(torch.as_tensor(tokens).tolist()).decode(errors="replace")


class PairTokenizer:
    """Byte pairs, from a JSON file of the `tokenizers` library (all 256 bytes are in it)."""

    def __init__(self, library: Any, content: bytes):
        self._pairs = library.Tokenizer.from_str(content.decode())
        self.vocab_size: int = self._pairs.get_vocab_size()
        names = [self._pairs.id_to_token(i) for i in range(self.vocab_size)]
        # The byte-level alphabet writes each byte as one character: a name is as long as its bytes.
        self.bytes_per_token = torch.tensor([len(name) for name in names])

    def encode(self, text: str) -> Tensor:
        """Token ids: [N] int64."""
        return torch.tensor(self._pairs.encode(text).ids, dtype=torch.int64)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of ids [N]; bytes that are no UTF-8 become U+FFFD."""
        return self._pairs.decode(torch.as_tensor(tokens).tolist(), skip_special_tokens=False)


@lru_cache
def tokenizer(name: str) -> Tokenizer:
    """A tokenizer by name.

    Raises:
        ValueError: unknown name, or the library that it needs is not installed.
    """
    row = tokenizer_row(name)
    if row.archive is None:
        return ByteTokenizer()
    try:
        library = importlib.import_module("tokenizers")
    except ImportError:
        raise ValueError(
            f"tokenizer {name!r} needs the library `tokenizers`: install moe-zoo[bpe]"
        ) from None
    return PairTokenizer(library, unpack(row.archive))
