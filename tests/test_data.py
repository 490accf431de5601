"""Corpora, tokenizers, batches: nothing lost, nothing twice, and exactly resumable."""

import importlib
import math
from dataclasses import replace
from itertools import islice

import lightning
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from recipes import text
from recipes.batches import (
    epoch_starts,
    epoch_steps,
    eval_batch,
    eval_windows,
    spread,
    train_batch,
)
from recipes.data import TextData, check_data, load_tokens, tokenizer
from recipes.schema import DataConfig
from recipes.text import CORPORA, TOKENIZERS, corpus_row, documents
from recipes.tokens import Span, Tokens

every_tokenizer = pytest.mark.parametrize("name", [row.name for row in TOKENIZERS])


def classics():
    return load_tokens("classics7", "bytes")


def toy(lengths=(50, 31, 17), n_domains=2):
    """Token i of the corpus is i, so that a batch says where it was cut."""
    spans, end = {"train": [], "validation": [], "test": []}, 0
    for i, n in enumerate(lengths):
        for name, share in (("train", n), ("validation", n // 2), ("test", n // 3)):
            spans[name].append(Span(end, end + share, i % n_domains))
            end += share
    return Tokens(
        ids=torch.arange(end, dtype=torch.int16),
        bytes_per_token=1 + torch.arange(end) % 3,
        domains=tuple(f"d{i}" for i in range(n_domains)),
        spans={name: tuple(found) for name, found in spans.items()},
    )


def batches(tokens, n, **options):
    settings = {"seed": 0, "seq_len": 4, "batch_size": 2} | options
    return [train_batch(tokens, step=i, **settings) for i in range(n)]


# Corpora and tokenizers


@pytest.mark.parametrize("row", CORPORA, ids=lambda row: row.name)
def test_a_corpus_is_whole_and_splits_as_its_note_says(row):
    found = documents(row.name)
    assert {d.domain for d in found} == set(row.domains)
    assert (text.resources.files("recipes.corpora") / row.note).is_file()
    parts = [text.split(d.text, row.cuts) for d in found]
    sizes = {name: sum(len(p[name]) for p in parts) for name in parts[0]}
    assert (
        sizes
        == {
            "classics7": {"train": 4_408_483, "validation": 244_915, "test": 244_928},
            "tinyshakespeare": {"train": 1_003_854, "validation": 111_540, "test": 0},
        }[row.name]
    )
    assert all("".join(p.values()) == d.text for p, d in zip(parts, found, strict=True))


@pytest.mark.parametrize("field", ["packed_sha256", "unpacked_sha256"])
def test_a_damaged_file_is_one_clear_line(field):
    broken = replace(corpus_row("tinyshakespeare").archive, **{field: "0" * 64})
    with pytest.raises(ValueError, match=r"^tinyshakespeare.txt.gz.* damaged: .*again$"):
        text.unpack(broken)


def test_a_missing_file_is_one_clear_line():
    archive = replace(CORPORA[0].archive, file="gone.txt.gz")
    with pytest.raises(ValueError, match=r"gone\.txt\.gz is missing"):
        text.unpack(archive)


@every_tokenizer
def test_a_tokenizer_gives_text_back_and_counts_its_bytes(name):
    pytest.importorskip("tokenizers") if name != "bytes" else None
    encoder = tokenizer(name)
    row = text.tokenizer_row(name)
    assert encoder.vocab_size == row.vocab_size == len(encoder.bytes_per_token)
    for given in (
        "",
        "To be, or not to be",
        "naïve 😀 <|doc|>\n\tint x;",
        documents("classics7")[6].text,
    ):
        ids = encoder.encode(given)
        assert ids.dtype == torch.int64
        assert encoder.decode(ids) == given
        assert int(encoder.bytes_per_token[ids].sum()) == len(given.encode())


def test_bytes_that_are_no_text_still_decode():
    assert tokenizer("bytes").decode([72, 105, 255]) == "Hi\ufffd"


def test_a_missing_library_is_one_line_that_names_the_extra(monkeypatch):
    def refuse(name):
        raise ImportError(name)

    text.tokenizer.cache_clear()
    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ValueError, match=r"'bpe1024' needs .*moe-zoo\[bpe\]$"):
        tokenizer("bpe1024")


@pytest.mark.parametrize("name", ["bytes", "bpe4096"])
def test_every_byte_of_evaluation_is_a_target_once(name):
    pytest.importorskip("tokenizers") if name != "bytes" else None
    data = TextData(DataConfig(tokenizer=name, seq_len=200, eval_bytes_per_domain=None), seed=0)
    limited = [0] * 7
    for batch in data.eval_loader("validation", bytes_per_domain=8192):
        limited[batch.domain] += int(batch.n_bytes.sum())
    assert all(8192 - 2 * 200 * 4 < size <= 8192 for size in limited)
    for loader, size in ((data.val_dataloader(), 244_915), (data.test_dataloader(), 244_928)):
        found = list(loader)
        assert len(found) == len(loader)
        assert sum(int(b.n_bytes.sum()) for b in found) == size
        assert {b.domain for b in found} == set(range(7))


# Training batches


def test_an_epoch_shows_no_token_twice_and_crosses_no_document():
    tokens, window = classics(), 129
    spans = tokens.spans["train"]
    starts = [epoch_starts(spans, window, 0, epoch) for epoch in (0, 1)]
    assert len(starts[0]) == len(starts[1])
    for found in starts:
        inside = sum(((found >= s.start) & (found + window <= s.stop)).int() for s in spans)
        assert (inside == 1).all()
        assert found.sort().values.diff().min() >= window
    assert len(set(starts[0].tolist()) & set(starts[1].tolist())) < 0.1 * len(starts[0])
    total = sum(s.stop - s.start for s in spans)
    assert window * len(starts[0]) > total - 2 * window * len(spans)  # two windows lost a document


def test_batches_lie_in_the_text_and_targets_follow():
    tokens = toy()
    train = torch.cat([torch.arange(s.start, s.stop) for s in tokens.spans["train"]])
    for batch in batches(tokens, 40):
        assert batch.tokens.shape == batch.targets.shape == batch.n_bytes.shape == (2, 4)
        assert_close(batch.targets, batch.tokens + 1)
        assert torch.isin(batch.targets, train).all()
        assert_close(batch.n_bytes, tokens.bytes_per_token[batch.targets])
        assert (batch.mask, batch.domain) == (None, None)


def test_an_epoch_of_batches_repeats_nothing_and_the_next_is_another():
    tokens = toy()
    n = epoch_steps(tokens, seq_len=4, batch_size=2)
    seen = [b.tokens[:, 0] for b in batches(tokens, 2 * n)]
    first, second = (torch.cat(part).tolist() for part in (seen[:n], seen[n:]))
    assert len(set(first)) == len(first) == 2 * n
    assert first != second


def test_a_batch_depends_on_seed_step_and_rank_alone():
    tokens = classics()
    settings = {"seq_len": 32, "batch_size": 4}
    once = train_batch(tokens, seed=3, step=70, **settings).tokens
    epoch_starts.cache_clear()
    assert_close(train_batch(tokens, seed=3, step=70, **settings).tokens, once)
    for other in ({"seed": 4, "step": 70}, {"seed": 3, "step": 71}):
        assert not train_batch(tokens, **other, **settings).tokens.equal(once)


@pytest.mark.parametrize("step", [0, 5, 40])
def test_ranks_and_accumulation_share_one_large_batch(step):
    def tokens_of(step, **options):
        return train_batch(classics(), seed=0, step=step, seq_len=16, **options).tokens

    large = tokens_of(step, batch_size=8)
    ranks = [tokens_of(step, batch_size=4, rank=rank, world=2) for rank in (0, 1)]
    halves = [tokens_of(2 * step + i, batch_size=4, accumulate=2) for i in (0, 1)]
    assert_close(torch.cat(ranks), large)
    assert_close(torch.cat(halves), large)


def test_an_epoch_is_whole_optimizer_steps():
    tokens = toy()
    assert epoch_steps(tokens, seq_len=4, batch_size=1) == 9 + 5 + 2
    assert epoch_steps(tokens, seq_len=4, batch_size=1, accumulate=3) == 15
    assert epoch_steps(tokens, seq_len=4, batch_size=1, accumulate=3, world=2) == 6


# Evaluation batches


def test_evaluation_covers_a_split_once_and_keeps_domains_apart():
    tokens = toy()
    targets = []
    for domain, windows in enumerate(eval_windows(tokens, "validation", 4)):
        batch = eval_batch(tokens, windows, 4, domain)
        real = batch.targets[batch.mask]
        assert_close(batch.tokens[batch.mask], real - 1)
        assert_close(batch.n_bytes[batch.mask], tokens.bytes_per_token[real])
        for padded in (batch.tokens, batch.targets, batch.n_bytes):
            assert (padded[~batch.mask] == 0).all()
        owned = [s for s in tokens.spans["validation"] if s.domain == domain]
        assert real.tolist() == [i for s in owned for i in range(s.start, s.stop)]
        targets += real.tolist()
    assert len(targets) == 25 + 15 + 8


@pytest.mark.parametrize("limit", [1, 900, 8192, 10**9])
def test_a_byte_limit_takes_whole_windows_spread_over_the_domain(limit):
    sizes = torch.full((137,), 256)
    sizes[::29] = 40  # last windows of documents
    chosen = spread(sizes, limit)
    assert chosen.diff().min() > 0 if len(chosen) > 1 else len(chosen) == 1
    assert sizes[chosen].sum() <= max(limit, 256)
    if limit > sizes.sum():
        assert len(chosen) == 137
    if limit == 8192:
        assert sizes[chosen].sum() > limit - 2 * 256
        assert chosen[0] < 5
        assert chosen[-1] > 131


def test_the_default_evaluation_is_small_and_even():
    data = TextData(DataConfig(), seed=0)
    found = dict.fromkeys(range(7), 0)
    for batch in data.val_dataloader():
        found[batch.domain] += int(batch.n_bytes.sum())
    assert all(8192 - 2 * 256 < size <= 8192 for size in found.values())


def test_processes_share_an_evaluation_in_equal_shapes():
    data = TextData(DataConfig(seq_len=200, batch_size=4), seed=0)
    options = {"seq_len": 200, "batch_size": 4, "bytes_per_domain": 3000, "world": 2}
    make = type(data.val_dataloader())
    both = [list(make(data.tokens, "validation", rank=r, **options)) for r in (0, 1)]
    alone = list(make(data.tokens, "validation", **options | {"world": 1}))
    assert [b.tokens.shape for b in both[0]] == [b.tokens.shape for b in both[1]]
    assert [b.domain for b in both[0]] == [b.domain for b in both[1]]
    shared = torch.cat([b.targets for rank in both for b in rank if b.domain == 3])
    whole = torch.cat([b.targets for b in alone if b.domain == 3])
    real = {tuple(row) for row in shared.tolist() if any(row)}
    assert real == {tuple(row) for row in whole.tolist()}


# Under Lightning


class Recorder(lightning.LightningModule):
    """Keeps what it was trained on."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch.tokens)
        return self.scale * batch.tokens.float().mean()

    def validation_step(self, batch, _):
        assert batch.mask.any()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class SaveEveryStep(lightning.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit(data, max_steps, folder, resume=None):
    module = Recorder()
    trainer = lightning.Trainer(
        max_steps=max_steps, max_epochs=-1, accumulate_grad_batches=data.accumulate,
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[SaveEveryStep(folder)], enable_checkpointing=False, num_sanity_val_steps=0,
        val_check_interval=3 * data.accumulate, check_val_every_n_epoch=None,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    return module


# Lightning 2.6 makes torch's deprecated leaf spec.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_sees_the_next_batch_wherever_it_stopped(tmp_path, monkeypatch, accumulate):
    monkeypatch.setattr("recipes.data.load_tokens", lambda *_: toy((40, 30)))
    data = TextData(DataConfig(seq_len=4, batch_size=2), seed=1, accumulate=accumulate)
    per_epoch = len(data.train_dataloader()) // accumulate
    last = 2 * per_epoch + 1
    whole = fit(data, last, tmp_path)
    expected = [
        train_batch(data.tokens, seed=1, step=i, seq_len=4, batch_size=2, accumulate=accumulate)
        for i in range(accumulate * last)
    ]
    assert_close(whole.seen, [b.tokens for b in expected], rtol=0, atol=0)
    for stop in (1, per_epoch - 1, per_epoch, per_epoch + 1):
        rest = fit(data, last, tmp_path, resume=tmp_path / f"{stop}.ckpt")
        assert_close(rest.seen, whole.seen[accumulate * stop :], rtol=0, atol=0)
        assert rest.scale.equal(whole.scale)


def test_a_loader_goes_on_from_its_state():
    data = TextData(DataConfig(seq_len=2000, batch_size=64), seed=0)
    loader, other = data.train_dataloader(), data.train_dataloader()
    n = len(loader)
    seen = [b.tokens for b in islice(loader, n - 1)]
    other.load_state_dict(loader.state_dict())
    rest, again = list(loader), list(other)
    assert (len(seen), len(rest)) == (n - 1, 1)
    assert_close(rest[0].tokens, again[0].tokens)
    assert len(list(loader)) == n


# At the door


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "classic7"}, "unknown corpus 'classic7'. Did you mean 'classics7'"),
        ({"tokenizer": "byte"}, "unknown tokenizer 'byte'. Did you mean 'bytes'"),
        ({"seq_len": 0}, "seq_len must be positive, got 0"),
        ({"batch_size": -1}, "batch_size must be positive, got -1"),
        ({"eval_bytes_per_domain": 0}, "eval_bytes_per_domain must be positive, got 0"),
        ({"final_bytes_per_domain": 0}, "final_bytes_per_domain must be positive, got 0"),
        ({"seq_len": 30_000}, "seq_len=30000 is too long .* so at most 20612"),
        (
            {"corpus": "tinyshakespeare", "tokenizer": "bpe1024"},
            "'bpe1024' was made for classics7, not for 'tinyshakespeare'",
        ),
    ],
)
def test_a_config_that_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_data(DataConfig(**options))


def test_what_the_corpus_cannot_give_is_refused():
    with pytest.raises(ValueError, match=r"more than the .* training windows of seq_len=1024"):
        TextData(DataConfig(seq_len=1024, batch_size=4096), seed=0, accumulate=2)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        TextData(DataConfig(), seed=-1)
    plays = TextData(DataConfig(corpus="tinyshakespeare"), seed=0)
    with pytest.raises(ValueError, match="unknown split of corpus 'tinyshakespeare' 'test'"):
        plays.test_dataloader()


def test_bits_per_byte_of_a_uniform_guess():
    data = TextData(DataConfig(), seed=0)
    nats = n_bytes = 0.0
    for batch in data.val_dataloader():
        nats += math.log(256) * int(batch.mask.sum())
        n_bytes += int(batch.n_bytes.sum())
    assert nats / n_bytes / math.log(2) == pytest.approx(8.0)
