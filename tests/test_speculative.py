"""Speculative decoding: the model's own tokens, whatever the draft (arXiv:2211.17192)."""

import math
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from zoo.cache import KVCache
from zoo.generate import generate
from zoo.model import LanguageModel, ModelConfig
from zoo.sampling import Sampling
from zoo.speculative import _residual, speculative_generate

V = 11
SMALL = {"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}
SMALL |= {"tie_embeddings": False}  # tied, the likeliest next token would be the last one
NESTED = {"name": "matformer", "d_ff": 32}


def lm(ffn=NESTED, seed=0, **options):
    """A model as training would begin with it."""
    torch.manual_seed(seed)
    return LanguageModel(ModelConfig(**{**SMALL, **options}, ffn=ffn)).eval()


def drafts(model):
    """Every kind of draft of a model, by name."""
    return {
        "widths": [4, 8],
        "one_layer": [None, 4],
        "itself": [None, None],
        "other": lm("mlp", seed=7, n_layers=1),
        "same": model,
    }


KINDS = sorted(drafts(None))


def left_padded(*lengths):
    """Rows of random tokens, the shorter ones padded on the left."""
    most = max(lengths)
    mask = torch.arange(most) >= most - torch.tensor(lengths)[:, None]
    return torch.randint(V, mask.shape), mask


@pytest.mark.parametrize("n_draft", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_gives_the_models_greedy_output(kind, n_draft):
    model = lm()
    draft = drafts(model)[kind]
    kept = []
    for seed in range(4):
        torch.manual_seed(seed)
        prompt = torch.randint(V, (1, 1 + seed))
        say = {"max_new_tokens": 16, "temperature": 0.0}
        want = generate(model, prompt, **say)
        got, record = speculative_generate(model, prompt, draft=draft, n_draft=n_draft, **say)
        assert got.equal(want)
        assert record.new_tokens == 16
        kept.append(record.acceptance_rate)
    if kind in ("itself", "same"):
        assert set(kept) == {1.0}
    else:
        assert min(kept) < 1  # so that refusals were tried


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_padded_batch_are_greedy_too(kind):
    model = lm(["swiglu", NESTED])
    draft = [None, 4] if kind == "widths" else drafts(model)[kind]
    tokens, mask = left_padded(6, 2, 1, 4)
    say = {"mask": mask, "max_new_tokens": 17, "temperature": 0.0}
    want = generate(model, tokens, **say)
    got, _ = speculative_generate(model, tokens, draft=draft, n_draft=3, **say)
    assert got.equal(want)


@pytest.mark.parametrize("kind", ["widths", "other"])
@pytest.mark.parametrize("rows", [1, 2])
def test_generation_ends_where_every_row_has_ended(kind, rows):
    model = lm()
    draft = drafts(model)[kind]
    lengths = set()
    for i in range(8):
        prompt = torch.randint(V, (rows, 3))
        say = {"max_new_tokens": 16, "temperature": 0.0}
        say["eos"] = generate(model, prompt, **say)[0, 3 + i].item()
        want = generate(model, prompt, **say)
        got, record = speculative_generate(model, prompt, draft=draft, n_draft=4, **say)
        assert got.equal(want)
        assert record.new_tokens == want.shape[1] - 3
        lengths.add(record.new_tokens)
    assert len(lengths) > 2


SETTINGS = {
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 1.7},
    "top_k": {"temperature": 1.2, "top_k": 4},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "both": {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
}


def exact(model, prompt, length, sampling):
    """Probabilities of every continuation, one forward of whole sequences a step: [V ** length]."""
    sequences, probs = prompt, torch.ones(1)
    for _ in range(length):
        with torch.no_grad():
            step = sampling.probs(model(sequences).logits[:, -1])  # [N, V]
        sequences = torch.cat(
            (sequences.repeat_interleave(V, 0), torch.arange(V).repeat(len(sequences))[:, None]), 1
        )
        probs = (probs[:, None] * step).flatten()
    return probs


@pytest.mark.parametrize("kind", ["widths", "other"])
@pytest.mark.parametrize("setting", sorted(SETTINGS))
def test_tokens_are_distributed_as_the_models(setting, kind):
    """Three tokens after a prompt, against their exact probabilities: chi-square, and support.

    Rows in step draw apart from one another, so a batch of them is a sample.
    """
    model = lm()
    sampling = Sampling(**SETTINGS[setting])
    prompt = torch.tensor([[3, 1]])
    want = exact(model, prompt, 3, sampling)
    n, found, refused = 400, torch.zeros(V**3), 0
    for seed in range(10):
        out, record = speculative_generate(
            model, prompt.expand(n, -1), draft=drafts(model)[kind], n_draft=2, max_new_tokens=3,
            seed=seed, **SETTINGS[setting],
        )  # fmt: skip
        places = (out[:, 2:] * torch.tensor([V * V, V, 1])).sum(1)
        found += places.bincount(minlength=V**3)
        refused += record.drafted - record.accepted
    assert refused > 0
    assert found[want == 0].sum() == 0
    check_chi_square(found, want)
    check_chi_square(found.view(V * V, V).sum(0), want.view(V * V, V).sum(0))  # the last token


def test_one_row_alone_is_distributed_as_the_models():
    model = lm()
    prompt = torch.tensor([[3, 1]])
    want = exact(model, prompt, 2, Sampling())
    found = torch.zeros(V**2)
    for seed in range(300):
        out, _ = speculative_generate(
            model, prompt, draft=[4, 4], n_draft=2, max_new_tokens=2, seed=seed
        )
        found[out[0, 2] * V + out[0, 3]] += 1
    check_chi_square(found, want)


def check_chi_square(found, want):
    """Counts against probabilities, rare ones taken together; 4 sigma of Wilson and Hilferty."""
    n = found.sum()
    common = want * n >= 5
    counts = torch.cat((found[common], found[~common].sum()[None]))
    means = torch.cat((want[common], want[~common].sum()[None])) * n
    counts, means = counts[means > 0], means[means > 0]
    assert len(counts) > 3
    chi, df = ((counts - means).square() / means).sum(), len(counts) - 1
    z = ((chi / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    assert z < 4
    assert (counts - means).abs().sum() / (2 * n) < 0.1  # total variation


def test_one_round_by_hand():
    """Acceptance min(1, p / q), the residual: the identity that makes the method exact."""
    p = torch.rand(50, V).double()
    q = torch.rand(50, V).double()
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    p[0], q[1] = q[0], torch.eye(V)[3].double()
    kept = torch.minimum(p, q)
    refused = 1 - kept.sum(-1, keepdim=True)
    assert_close(kept + refused * _residual(p, q), p)
    assert _residual(p, q)[0].equal(p[0])  # nothing is refused there


@pytest.mark.parametrize("rows", [1, 4])
def test_the_record_counts(rows):
    model = lm()
    prompt = torch.randint(V, (rows, 3))
    calls = Counter()
    forward = model.forward

    def counted(*args, widths=None, **kwargs):
        calls[None if widths is None else tuple(widths)] += 1
        return forward(*args, widths=widths, **kwargs)

    model.forward = counted
    out, record = speculative_generate(
        model, prompt, draft=(4, 8), n_draft=3, max_new_tokens=20, seed=0
    )
    assert calls == {None: record.model_forwards, (4, 8): record.draft_forwards}
    verifications = record.model_forwards - 1
    assert record.drafted == rows * record.draft_forwards
    # each verification adds what was kept and one token more
    assert rows * (record.new_tokens - 1) == record.accepted + rows * verifications
    assert record.new_tokens == 20 == out.shape[1] - 3
    assert record.tokens_per_verification == 19 / verifications
    assert record.acceptance_rate == record.accepted / record.drafted

    perfect = speculative_generate(
        model, prompt, draft=[None, None], n_draft=3, max_new_tokens=21, seed=0
    ).record
    assert perfect.acceptance_rate == 1
    assert perfect.tokens_per_verification == 4
    alone = speculative_generate(model, prompt, draft=(4, 8), n_draft=3, max_new_tokens=1).record
    assert (alone.drafted, alone.model_forwards) == (0, 1)
    assert math.isnan(alone.acceptance_rate)
    assert math.isnan(alone.tokens_per_verification)


def test_seeds_and_modes():
    model, draft = lm().train(), lm("mlp", seed=7)
    prompt = torch.randint(V, (2, 3))
    say = {"draft": draft, "n_draft": 3, "max_new_tokens": 20}
    a, b, c = (speculative_generate(model, prompt, **say, seed=s).tokens for s in (1, 1, 2))
    assert a.equal(b)
    assert not a.equal(c)
    assert model.training
    assert not draft.training
    torch.manual_seed(5)
    a = speculative_generate(model, prompt, **say).tokens
    torch.manual_seed(5)
    assert a.equal(speculative_generate(model, prompt, **say).tokens)


def test_a_mixture_drafts_for_itself():
    model = lm({"name": "moe", "n_experts": 4, "top_k": 2, "d_expert": 32})
    prompt = torch.randint(V, (2, 3))
    say = {"max_new_tokens": 20, "temperature": 0.0}
    want = generate(model, prompt, **say)
    assert speculative_generate(model, prompt, draft=[4, 4], n_draft=3, **say).tokens.equal(want)


def test_a_truncated_cache_goes_on_as_a_shorter_one():
    model = lm()
    tokens, mask = left_padded(6, 4)
    for given in (None, mask):
        cache, short = model.new_cache(9), model.new_cache(9)
        with torch.no_grad():
            model(tokens, given, cache)
            cache.truncate(4)
            model(tokens[:, :4], None if given is None else given[:, :4], short)
            after = [model(torch.tensor([[1, 2], [3, 4]]), cache=c).logits for c in (cache, short)]
        assert cache.length == 6
        assert after[0].equal(after[1])
    cache.truncate(0)
    assert cache.length == 0


@pytest.mark.parametrize("length", [-1, 3])
def test_a_cache_is_not_truncated_to_more_than_it_holds(length):
    cache = KVCache(1, 4)
    cache.layers[0].append(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match=rf"length must be in \[0, 2\], got {length}"):
        cache.truncate(length)


def test_probabilities_are_those_of_the_options():
    logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0]]])
    probs = (logits / 0.5).softmax(-1)
    assert_close(Sampling(temperature=0.5).probs(logits), probs)
    assert Sampling(temperature=0.0).probs(logits.bfloat16()).tolist() == [[[1.0, 0, 0, 0]]]
    kept = Sampling(temperature=0.5, top_k=2).probs(logits.flip(-1))
    assert_close(kept, (probs * torch.tensor([1, 1, 0, 0])).flip(-1) / probs[..., :2].sum())
    p = probs[0, 0, :2].sum().item()
    for top_p, n in ((p - 1e-4, 2), (p + 1e-4, 3), (1e-6, 1), (1.0, 4)):
        kept = Sampling(temperature=0.5, top_p=top_p).probs(logits)
        assert (kept > 0).sum() == n
        assert_close(kept.sum(), torch.tensor(1.0))
    inside = Sampling(temperature=0.5, top_k=2, top_p=0.9).probs(logits)  # 0.88 of the two
    assert_close(inside, Sampling(temperature=0.5, top_k=2).probs(logits))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_draft": 0}, "n_draft must be positive, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be positive, got 0"),
        ({"max_new_tokens": 30}, r"4 \+ 30 tokens are more than the model's max_seq_len=32"),
        ({"temperature": -1.0}, "temperature must be 0.0 .greedy. or more, got -1.0"),
        ({"top_k": 0}, "top_k must be positive, got 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"mask": torch.tensor([[True, True, True, False]])}, "padded on the left"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, r"S >= 1, got \[1, 0\]"),
        ({"draft": [4]}, "widths must have one entry for each of 2 layers, got 1"),
        ({"draft": [4, 33]}, r"width must be in \[1, 32\], what the layer has, got 33"),
        ({"draft": lm("mlp", vocab_size=12)}, "vocab_size must be the model's 11, got 12"),
        ({"draft": lm("mlp", max_seq_len=6)}, "7 tokens are more than the draft's max_seq_len=6"),
        (
            {"draft": lm("soft_moe", allow_noncausal=True)},
            "the draft has an FFN that reads other tokens",
        ),
        ({"draft": lm("mlp").to("meta")}, "must be on one device, got cpu and meta"),
    ],
)
def test_errors(options, message):
    given = {
        "tokens": torch.randint(V, (1, 4)), "draft": [4, 4], "n_draft": 2, "max_new_tokens": 3,
        **options,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        speculative_generate(lm(), **given)


def test_a_model_that_is_not_nested_has_no_widths():
    with pytest.raises(ValueError, match="layer 0: MLP is not nested"):
        speculative_generate(
            lm("mlp"), torch.zeros(1, 2, dtype=torch.long), draft=[4, 4], n_draft=2,
            max_new_tokens=5,
        )  # fmt: skip
