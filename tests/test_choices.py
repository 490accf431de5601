"""Routers' choices from one evaluation to the next: what is kept, and how alike they are."""

import pytest
import torch
from routing_toys import part, routed

from layers.base import Routing
from recipes.batches import Batch
from recipes.choices import NONE, ChoiceLog, Choices, agreement


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
    assert before.experts[1].tolist() == [NONE] * 4
    kept, jaccard = agreement(before, now) or (0, 0)
    assert kept == pytest.approx(3 / 4)
    assert jaccard == pytest.approx((1 / 3 + 1 + 1 / 2) / 3)


def test_other_tokens_are_not_compared_and_padding_is_left_out():
    routing = routed(torch.randn(4, 3), 2)
    some = choices_of([routing], [True, False, True, True])
    assert some.tokens.tolist() == [0, 2, 3]
    assert torch.equal(some.experts, routing.experts[[0, 2, 3]].int())
    assert agreement(some, choices_of([routing])) is None
    assert agreement(some, None) is None
    assert agreement(None, some) is None


@pytest.mark.parametrize("sizes", [[100], [7, 1, 50, 42], [1] * 100])
def test_many_tokens_are_thinned_evenly_however_they_come(sizes, monkeypatch):
    monkeypatch.setattr("recipes.choices.MOST_KEPT", 60)
    routing = routed(torch.randn(100, 4), 2)
    log, start = ChoiceLog(), 0
    for n in sizes:
        ids = torch.arange(start, start + n)[None]
        log.update({3: part(routing, start, n)}, Batch(ids, ids, ids, None, 0))
        start += n
    found = log.value()
    assert found is not None
    assert found.tokens.tolist() == list(range(0, 100, 4))
    assert torch.equal(found.experts, routing.experts[::4].int())


def test_choices_of_several_processes_stand_one_after_another():
    """As torchmetrics gathers them: tensors of unequal length, joined; its own stay as they are."""
    routing = routed(torch.randn(5, 4), 2)
    one, other = ChoiceLog(), ChoiceLog()
    one.update({0: routing}, a_batch(5))
    other.update({0: routing}, a_batch(5, [True, True, False, False, True]))
    theirs = [other.tokens[0], other.experts[0]]
    one.distributed_available_fn = lambda: True
    one.dist_sync_fn = lambda mine, group: [mine, theirs[mine.ndim - 1]]
    found = one.value()
    assert found is not None
    assert found.tokens.tolist() == [0, 1, 2, 3, 4, 0, 1, 4]
    assert torch.equal(found.experts, routing.experts[found.tokens].int())
    assert len(one.tokens[0]) == 5


def test_kept_choices_survive_a_checkpoint(tmp_path):
    choices = choices_of([routed(torch.randn(6, 4), 2), routed(torch.randn(6, 3), 1)])
    torch.save(choices.state_dict(), tmp_path / "c.pt")
    back = Choices.of_state(torch.load(tmp_path / "c.pt", weights_only=True))
    assert agreement(choices, back) == (1.0, 1.0)
    assert Choices.of_state(None) is None
