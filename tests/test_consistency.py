"""What is said of a submodel beside the whole model, against loops in float64."""

import math

import pytest
import torch

from zoo.consistency import consistency, next_token_kl
from zoo.extract import extract
from zoo.model import LanguageModel, ModelConfig
from zoo.speculative import speculative_generate

V = 11
SMALL = {"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}
SMALL |= {"tie_embeddings": False}
FFN = {"name": "matformer", "d_ff": 32}


def lm(ffn=FFN, **options):
    return LanguageModel(ModelConfig(**{**SMALL, **options}, ffn=ffn))


def text(n=3):
    """Batches, the last one padded with what must not count."""
    batches = [(torch.randint(V, (4, 12)), None) for _ in range(n)]
    mask = torch.rand(4, 12) > 0.3
    mask[:, 0] = True
    return [*batches, (torch.randint(V, (4, 12)), mask)]


@torch.no_grad()
def by_hand(model, other, batches):
    """Position by position."""
    n, same, kl, overlap = 0, 0, 0.0, 0.0
    for tokens, mask in batches:
        a = model.eval()(tokens, mask).logits.double()
        b = other(tokens, mask).double()
        for row in range(tokens.shape[0]):
            for place in range(tokens.shape[1]):
                if mask is not None and not mask[row, place]:
                    continue
                p, q = (x[row, place].exp() / x[row, place].exp().sum() for x in (a, b))
                n += 1
                same += int(p.argmax() == q.argmax())
                kl += sum(float(p[v] * (p[v].log() - q[v].log())) for v in range(V))
                overlap += sum(min(float(p[v]), float(q[v])) for v in range(V))
    return n, same / n, kl / n, overlap / n


def test_figures_are_those_of_a_loop():
    model, independent, batches = lm(), lm("mlp", n_layers=1), text()
    found = consistency(model, [[4, 8], independent], batches)
    for got, run in zip(
        found,
        (
            lambda tokens, mask: model(tokens, mask, widths=[4, 8]).logits,
            lambda tokens, mask: independent.eval()(tokens, mask).logits,
        ),
        strict=True,
    ):
        n, agreement, kl, overlap = by_hand(model, run, batches)
        assert got.positions == n < 4 * 4 * 12
        assert got.agreement == pytest.approx(agreement)
        assert got.kl == pytest.approx(kl, rel=1e-5)
        assert got.overlap == pytest.approx(overlap, rel=1e-5)
        assert 0 < got.agreement < 1
        assert got.overlap >= 1 - math.sqrt(got.kl / 2)  # Pinsker


def test_a_model_is_consistent_with_itself():
    model = lm()
    itself, plain = consistency(model, [[None, None], extract(model, [None, None])], text())
    for found in (itself, plain):
        assert (found.agreement, found.kl) == (1.0, 0.0)
        assert found.overlap == pytest.approx(1.0)


def test_an_extracted_model_is_as_consistent_as_its_widths():
    model = lm()
    nested, plain = consistency(model, [[16, 16], extract(model, 16)], text())
    assert nested == plain
    assert nested.kl > 0


def test_padding_counts_nowhere():
    model = lm()
    tokens, mask = torch.randint(V, (2, 9)), torch.arange(9) >= torch.tensor([[0], [4]])
    other = tokens.where(mask, (tokens + 1) % V)
    assert consistency(model, [[4, 4]], [(tokens, mask)]) == consistency(
        model, [[4, 4]], [(other, mask)]
    )


def test_overlap_is_the_share_of_first_drafts_that_are_kept():
    """Leviathan et al., corollary 3.6, on the positions where drafts begin."""
    model = lm().eval()
    prompt = torch.randint(V, (1, 6))
    with torch.no_grad():
        first = model(prompt).logits[0, -1].softmax(-1)
    want = 0.0
    for token in range(V):  # the model's own first token, then one draft
        seen = torch.cat((prompt, torch.tensor([[token]])), 1)
        with torch.no_grad():
            p, q = (model(seen, widths=w).logits[0, -1].softmax(-1) for w in (None, [4, 4]))
        want += float(first[token] * torch.minimum(p, q).sum())
    kept = [
        speculative_generate(
            model, prompt, draft=[4, 4], n_draft=1, max_new_tokens=3, seed=seed
        ).record.accepted
        for seed in range(150)
    ]
    assert sum(kept) / 150 == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / 150))


def test_modes_are_put_back():
    model, other = lm().train(), lm("mlp").train()
    consistency(model, [other], text(1))
    assert model.training
    assert other.training


def test_kl_is_exact_where_probabilities_vanish():
    whole = torch.tensor([[0.0, -200.0], [0.0, 0.0]])
    other = torch.tensor([[0.0, 0.0], [50.0, -50.0]])
    assert next_token_kl(whole, other).tolist() == pytest.approx([math.log(2), 50 - math.log(2)])


@pytest.mark.parametrize(
    ("others", "batches", "message"),
    [
        ([[4, 4]], [], "no real token"),
        ([lm("mlp", vocab_size=12)], text(1), r"one vocabulary, got sizes \[11, 12\]"),
        ([[4]], text(1), "widths must have one entry for each of 2 layers, got 1"),
    ],
)
def test_errors(others, batches, message):
    with pytest.raises(ValueError, match=message):
        consistency(lm(), others, batches)
