"""Routers' choices from one evaluation to the next: what is kept, and how alike they are."""

import pytest
import torch
from routing_toys import routed

from layers.base import Routing
from recipes.batches import Batch
from recipes.choices import NONE, ChoiceLog, Choices, agreement, token_keys


def a_batch(n, mask=None):
    ids = torch.arange(n)[None]
    mask = None if mask is None else torch.tensor([mask])
    return Batch(ids, ids, torch.ones_like(ids), mask, 0)


def choices_of(routings, mask=None):
    log = ChoiceLog()
    n = len(routings[0].experts)
    log.update(dict(enumerate(routings)), a_batch(n, mask))
    found = log.value()
    assert found is not None
    return found


def test_the_same_choices_in_another_order_are_all_kept():
    routing = routed(torch.randn(20, 5), 3)
    turned = routing._replace(experts=routing.experts.flip(-1))
    assert agreement(choices_of([routing]), choices_of([turned])) == (1.0, 1.0)


def test_planted_changes_are_the_exact_share():
    """Two layers of 10 tokens, top 2: 3 choices of 40 are others, two of them of one token."""
    logits = torch.arange(6).float().expand(10, 6)
    a, b = routed(logits, 2), routed(logits, 2)
    experts = a.experts.clone()
    experts[4], experts[7, 0] = torch.tensor([0, 1]), 2
    kept, jaccard = agreement(choices_of([a, b]), choices_of([a._replace(experts=experts), b])) or (
        0,
        0,
    )
    assert kept == pytest.approx(37 / 40)
    assert jaccard == pytest.approx((18 + 0 + 1 / 3) / 20)


def test_choices_that_do_not_hold_are_in_no_set():
    """ReMoE's form: every expert listed, few kept; a token without any agrees with itself."""
    experts = torch.arange(4).expand(3, -1)
    logits = torch.zeros(3, 4)
    first = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]).bool()
    later = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    before, now = (choices_of([Routing(experts, logits, logits, {}, x)]) for x in (first, later))
    assert [NONE] * 4 in before.experts.tolist()
    kept, jaccard = agreement(before, now) or (0, 0)
    assert kept == pytest.approx(3 / 4)
    assert jaccard == pytest.approx((1 / 3 + 1 + 1 / 2) / 3)


def test_other_tokens_are_not_compared_and_padding_is_left_out():
    routing = routed(torch.randn(4, 3), 2)
    mask = [True, False, True, True]
    some = choices_of([routing], mask)
    keys = token_keys(a_batch(4)).flatten()[torch.tensor(mask)]
    assert some.keys.tolist() == sorted(keys.tolist())
    assert torch.equal(some.experts, routing.experts[torch.tensor(mask)][keys.argsort()].int())
    assert agreement(some, choices_of([routing])) is None
    assert agreement(some, None) is None
    assert agreement(None, some) is None


def test_keys_tell_domains_windows_and_places_apart():
    tokens = torch.randint(3, (50, 8)).unique(dim=0)
    batches = [Batch(tokens, tokens, tokens, None, domain) for domain in (0, 1)]
    keys = torch.cat([token_keys(batch).flatten() for batch in batches])
    assert len(keys.unique()) == len(keys) == 2 * tokens.numel()
    assert torch.equal(
        token_keys(batches[0])[3:5], token_keys(batches[0]._replace(tokens=tokens[3:5]))
    )


@pytest.mark.parametrize("sizes", [[25], [3, 1, 9, 12], [1] * 25])
def test_the_sample_is_the_same_however_windows_come(sizes, monkeypatch):
    """25 windows of 4 tokens, of which 30 tokens fit; in another order too."""
    monkeypatch.setattr("recipes.choices.MOST_KEPT", 60)
    ids = torch.randint(256, (25, 4))
    routing = routed(torch.randn(100, 4), 2)
    log, start = ChoiceLog(), 0
    for n in sizes:
        rows = ids[start : start + n].flip(0)
        choices = routing.experts.view(25, 4, 2)[start : start + n].flip(0).flatten(0, 1)
        log.update({3: routing._replace(experts=choices)}, Batch(rows, rows, rows, None, 0))
        start += n
    found = log.value()
    assert found is not None
    keys, order = token_keys(Batch(ids, ids, ids, None, 0)).flatten().sort()
    assert torch.equal(found.keys, keys[:30])
    assert torch.equal(found.experts, routing.experts[order[:30]].int())


def test_choices_of_several_processes_are_those_of_one(monkeypatch):
    """As torchmetrics gathers them: tensors of unequal length, joined; its own stay as they are."""
    monkeypatch.setattr("recipes.choices.MOST_KEPT", 20)
    routing = routed(torch.randn(12, 4), 2)
    mask = torch.tensor([True] * 7 + [False] * 5)
    one, other = ChoiceLog(), ChoiceLog()
    one.update({0: routing}, a_batch(12, mask.tolist()))
    other.update({0: routing}, a_batch(12, (~mask).tolist()))
    assert [len(log.keys[0]) for log in (one, other)] == [7, 5]
    theirs = [other.keys[0], other.experts[0]]
    one.distributed_available_fn = lambda: True
    one.dist_sync_fn = lambda mine, group: [mine, theirs[mine.ndim - 1]]
    found = one.value()
    assert agreement(found, choices_of([routing])) == (1.0, 1.0)
    assert found is not None
    assert len(found.keys) == 10
    assert len(one.keys[0]) == 7


def test_kept_choices_survive_a_checkpoint(tmp_path):
    choices = choices_of([routed(torch.randn(6, 4), 2), routed(torch.randn(6, 3), 1)])
    torch.save(choices.state_dict(), tmp_path / "c.pt")
    back = Choices.of_state(torch.load(tmp_path / "c.pt", weights_only=True))
    assert agreement(choices, back) == (1.0, 1.0)
    assert Choices.of_state(None) is None
