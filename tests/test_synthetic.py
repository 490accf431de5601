"""Tasks whose answers are known: every answer follows from the context, or from the fixed table."""

import math
from dataclasses import asdict
from itertools import islice

import numpy as np
import pytest
import torch
from recipe_toys import TINY, killed_after, refused, rows, timeless
from torch.testing import assert_close

from recipes.batches import Batch
from recipes.data import TextData
from recipes.load import load
from recipes.metrics import Evaluation
from recipes.report.page import render
from recipes.report.records import Run
from recipes.report.strict import read_as
from recipes.report.text import percent
from recipes.sample import continue_text
from recipes.schema import DataConfig
from recipes.synthetic import TASKS, Copy, Facts, Recall, Split, fact_table, task_of
from recipes.task_batches import TaskEvalLoader, task_batch, task_train_batch
from recipes.train import train

SMALL = {
    "copy": Copy(length=6, vocab=10, n_eval=9),
    "facts": Facts(n_facts=23, key_len=2, vocab=20),
    "recall": Recall(n_pairs=5, n_queries=3, vocab=16, n_eval=9),
}
EACH = pytest.mark.parametrize("task", [SMALL[name] for name in sorted(SMALL)], ids=sorted(SMALL))
SEQ = 17  # more than any of them fills


def train_batches(task, n, **options: int):
    settings = {"seed": 3, "seq_len": SEQ, "batch_size": 4} | options
    return [task_train_batch(task, step=i, **settings) for i in range(n)]


def eval_batches(task, split: Split = "validation", **options: int):
    return list(TaskEvalLoader(task, split, **{"seq_len": SEQ, "batch_size": 4} | options))


def answers(batch: Batch) -> torch.Tensor:
    """[B, S] bool, True at the answers."""
    assert batch.answers is not None
    return batch.answers


def examples(batch: Batch):
    """(tokens that the model has read, the right answer) of every answer."""
    for row, place in answers(batch).nonzero().tolist():
        yield batch.tokens[row, : place + 1].tolist(), int(batch.targets[row, place])


def looked_up(seen: list[int]) -> int:
    """The value that followed the same key before."""
    return seen[seen[:-1].index(seen[-1]) + 1]


def copied(seen: list[int], separator: int) -> int:
    """The symbol as far from the beginning as the last one is from the separator."""
    return seen[len(seen) - 1 - seen.index(separator)]


@pytest.mark.parametrize("batches", [lambda t: train_batches(t, 5), eval_batches])
def test_every_answer_follows_from_the_context(batches):
    for batch in batches(SMALL["recall"]):
        for seen, answer in examples(batch):
            assert looked_up(seen) == answer
    for batch in batches(SMALL["copy"]):
        for seen, answer in examples(batch):
            assert copied(seen, separator=9) == answer


def test_no_question_is_asked_twice_and_keys_are_no_values():
    for batch in train_batches(SMALL["recall"], 5):
        for row in batch.tokens:
            keys, questions = row[:10:2].tolist(), row[10:15:2].tolist()
            assert len(set(keys)) == 5
            assert len(set(questions)) == 3
            assert max(keys) < 8 <= int(row[1:10:2].min())


def test_facts_are_the_same_in_every_epoch_and_seed():
    task = SMALL["facts"]
    table = {tuple(key): value for *key, value in fact_table(task).tolist()}
    assert len(table) == 23
    per_epoch = 23 // 6  # sequences of 6 facts
    for seed in (0, 1):
        seen = [
            (tuple(tokens[-2:]), answer)
            for batch in train_batches(task, 3 * per_epoch, seed=seed, batch_size=1)
            for tokens, answer in examples(batch)
        ]
        assert all(table[key] == answer for key, answer in seen)
        epochs = [[key for key, _ in seen[i : i + 18]] for i in (0, 18, 36)]
        assert all(len(set(epoch)) == 18 for epoch in epochs)  # none twice
        assert epochs[0] != epochs[1] != epochs[2]
    held_out = [(tuple(t[-2:]), a) for b in eval_batches(task) for t, a in examples(b)]
    assert sorted(held_out) == sorted(table.items())  # all of them, once


@EACH
def test_batches_depend_on_seed_step_and_rank_alone(task):
    once, again = (train_batches(task, 3) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        assert one.tokens.equal(other.tokens)
        assert one.targets.equal(other.targets)
    assert not once[0].tokens.equal(once[1].tokens)
    assert not once[0].tokens.equal(train_batches(task, 1, seed=4)[0].tokens)


@EACH
def test_ranks_tile_the_global_batch(task):
    alone = train_batches(task, 3, batch_size=4)
    both = [train_batches(task, 3, batch_size=2, rank=rank, world=2) for rank in (0, 1)]
    for i, batch in enumerate(alone):
        assert torch.cat([both[0][i].tokens, both[1][i].tokens]).equal(batch.tokens)
    shared = [eval_batches(task, rank=rank, world=2) for rank in (0, 1)]
    assert [b.tokens.shape for b in shared[0]] == [b.tokens.shape for b in shared[1]]
    found = [a for part in shared for batch in part for a in examples(batch)]
    assert sorted(found) == sorted(a for batch in eval_batches(task) for a in examples(batch))


@EACH
def test_targets_are_the_next_tokens_and_padding_is_masked(task):
    n = task.n_tokens(SEQ)
    for batch in (*train_batches(task, 2), *eval_batches(task)):
        assert batch.tokens.shape[1] == batch.targets.shape[1] == SEQ
        mask = torch.ones_like(answers(batch)) if batch.mask is None else batch.mask
        assert not batch.tokens[~mask].any()
        assert not batch.targets[~mask].any()
        assert not (answers(batch) & ~mask).any()
        assert batch.n_bytes.equal(answers(batch).long())
        both = mask[:, 1:]
        assert batch.targets[:, :-1][both].equal(batch.tokens[:, 1:][both])
    for batch in train_batches(task, 2):
        assert (batch.mask is None) == (n == SEQ)
        assert len(set(answers(batch).sum(1).tolist())) == 1  # so that a mean of means is the mean
        padded = train_batches(task, 1, seq_len=SEQ + 2 if n < SEQ else SEQ)[0]
        assert answers(padded).sum() == answers(batch).sum()


def test_a_sequence_that_fills_its_room_needs_no_mask():
    task = SMALL["recall"]
    assert train_batches(task, 1, seq_len=15)[0].mask is None
    assert train_batches(task, 1, seq_len=16)[0].mask is not None


@EACH
def test_held_out_sequences_are_fixed_and_their_own(task):
    held_out = [row for batch in eval_batches(task) for row in batch.tokens.tolist()]
    assert held_out == [row for batch in eval_batches(task) for row in batch.tokens.tolist()]
    trained = [row for batch in train_batches(task, 20) for row in batch.tokens.tolist()]
    assert not [row for row in held_out if row in trained]
    if "test" in task.splits:
        test = [row for batch in eval_batches(task, "test") for row in batch.tokens.tolist()]
        assert not [row for row in test if row in held_out]
    fewer = eval_batches(task, n_answers=6)
    assert 0 < sum(int(answers(batch).sum()) for batch in fewer) <= 6


def test_the_draws_are_even():
    """Keys, values, places asked for and symbols, each within 5 standard deviations."""

    def even(found, n):
        counts = np.bincount(np.concatenate(found), minlength=n)
        p = 1 / n
        spread = math.sqrt(counts.sum() * p * (1 - p))
        assert np.abs(counts - counts.sum() * p).max() < 5 * spread

    recall, copy = SMALL["recall"], SMALL["copy"]
    drawn = [recall.sequence("train", 0, i, SEQ) for i in range(2000)]
    even([ids[:10:2] for ids in drawn], 8)
    even([ids[1:10:2] - 8 for ids in drawn], 8)
    even([np.flatnonzero(ids[:10:2] == ids[10]) for ids in drawn], 5)
    even([copy.sequence("train", 0, i, SEQ)[:6] for i in range(2000)], 9)


class Knowing(torch.nn.Module):
    """A model that gives the right answer to a share of questions and the wrong one otherwise."""

    def __init__(self, batch: Batch, right: torch.Tensor):
        super().__init__()
        said = torch.where(right, batch.targets, batch.targets + 1)
        self.logits = 4.0 * torch.nn.functional.one_hot(said, 32).float()


def test_only_answers_are_counted():
    batch = task_batch(SMALL["recall"], [SMALL["recall"].sequence("test", 0, 0, SEQ)], SEQ, 0)
    right = torch.zeros_like(answers(batch))
    right[0, answers(batch)[0].nonzero()[0, 0]] = True  # one of three answers; all else wrong
    logits = Knowing(batch, right).logits
    found = Evaluation(torch.nn.ModuleDict({"blocks": torch.nn.ModuleList()}), ("recall",))
    found.bpb.update(-logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0], batch)
    found.accuracy.update(logits, batch)
    final = found.final()
    assert final.accuracy == pytest.approx(1 / 3)
    assert (final.eval_bytes, final.eval_tokens) == (3, 3)
    total = math.log(math.exp(4) + 31)
    expected = (3 * total - 4) / 3
    assert_close(final.nats_per_token, expected, rtol=1e-6, atol=0)
    assert_close(final.bpb, expected / math.log(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("recal", "unknown data.task 'recal'. Did you mean 'recall'?"),
        (3, "data.task must be a name, or a mapping with a name, got 3"),
        ({"n_pairs": 3}, "data.task must be a name, or a mapping with a name"),
        ({"name": "copy", "n_pairs": 3}, "unknown option of data.task copy 'n_pairs'"),
        ({"name": "copy", "length": 2.5}, "copy: length must be int, got 2.5"),
        ({"name": "copy", "length": 0}, "copy: length must be"),
        ({"name": "copy", "vocab": 3}, "copy: vocab must be at least 4, got 3"),
        (
            {"name": "recall", "n_pairs": 4, "n_queries": 5},
            "recall: n_queries must be at most n_pairs=4, got 5",
        ),
        (
            {"name": "recall", "n_pairs": 9, "vocab": 16},
            "n_pairs=9 keys need vocab of at least 18, got 16",
        ),
        (
            {"name": "facts", "n_facts": 51, "key_len": 2, "vocab": 20},
            "facts: n_facts must be at most 50, half of the keys",
        ),
    ],
)
def test_a_wrong_task_is_refused(said, message):
    with refused(message):
        task_of(said)


def test_a_task_that_does_not_fit_is_refused():
    plain = {**TINY, "model": {**TINY["model"], "ffn": "mlp"}}
    with refused("data.seq_len must be at least 31 for the task 'recall' as configured, got 30"):
        load(plain, ["data.task=recall", "data.seq_len=30"])
    with refused("model.vocab_size must be at least 300 for task 'copy', got 256"):
        load(plain, ["data.task={name: copy, vocab: 300}"])
    with refused("unknown split of task 'facts' 'test'"):
        TextData(DataConfig(task="facts"), seed=0).test_dataloader()
    assert task_of("recall") == Recall()
    assert sorted(TASKS) == sorted(SMALL)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loader_goes_on_from_its_state(accumulate):
    data = TextData(
        DataConfig(task="copy", seq_len=130, batch_size=2), seed=1, accumulate=accumulate
    )
    loader, other = data.train_dataloader(), data.train_dataloader()
    assert len(loader) % accumulate == 0
    list(islice(loader, 5))
    other.load_state_dict(loader.state_dict())
    for one, two in zip(islice(loader, 3), islice(other, 3), strict=True):
        assert one.tokens.equal(two.tokens)


def tiny(task, ffn: str | dict[str, object] = "mlp", *overrides: str):
    plain = {**TINY, "model": {**TINY["model"], "vocab_size": 32, "qk_norm": True, "ffn": ffn}}
    plain |= {"data": {"task": task, "seq_len": 32, "batch_size": 16}}
    return load(plain, overrides)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_run_that_was_cut_leaves_what_a_whole_one_leaves(name, tmp_path, monkeypatch):
    recipe = tiny(
        {"name": name, **asdict(SMALL[name])}, {"name": "ultramem_v2", "n_keys": 8, "top_k": 4}
    )
    whole = train(recipe, tmp_path / "whole")
    with killed_after(monkeypatch, 4):
        train(recipe, tmp_path / "cut")
    assert timeless(train(recipe, tmp_path / "cut")) == timeless(whole)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    run = read_as(Run, whole, "result")
    assert run.sample is None
    assert run.final.accuracy is not None
    assert run.curve[-1].eval_accuracy == run.final.accuracy
    assert run.final.bpb_by_domain == {name: run.final.bpb}
    assert load(tmp_path / "whole" / "recipe.yaml") == recipe
    with refused("was trained on a task, not on text"):
        continue_text(
            tmp_path / "whole", "a", max_new_tokens=1, temperature=1.0, top_k=None, seed=0
        )


def test_the_report_shows_the_accuracy(tmp_path):
    result = train(tiny({"name": "facts", "n_facts": 8, "vocab": 32}), tmp_path)
    page = render({"schema": 1, "runs": [result]})
    assert ">Accuracy<" in page
    assert percent(result["final"]["accuracy"]) in page


@pytest.mark.parametrize(
    ("task", "steps", "enough"),
    [
        ({"name": "facts", "n_facts": 64, "key_len": 2, "vocab": 32}, 120, 0.8),
        ({"name": "copy", "length": 6, "vocab": 8, "n_eval": 128}, 60, 0.95),
    ],
    ids=["facts", "copy"],
)
def test_a_tiny_model_learns(task, steps, enough, tmp_path):
    recipe = tiny(task, "mlp", f"trainer.max_steps={steps}", "trainer.eval_every_steps=1000")
    found = train(recipe, tmp_path)["final"]["accuracy"]
    settled = task_of(task)
    assert settled is not None
    assert found > enough > 5 * settled.chance
