"""Speculative decoding: a cheap draft proposes, the model verifies, and decides alone.

Leviathan et al., arXiv:2211.17192, algorithm 1: a draft token d of probability q(d) is kept with
probability min(1, p(d) / q(d)), p the model's; the first one refused is drawn anew from
max(p - q, 0), normalised; where all are kept one more token comes from p. Every token is then
distributed as p, whatever the draft. Greedy decoding is the case of one-hot p and q.

A nested model drafts for itself with some of its FFN's numbers (MatFormer, arXiv:2310.07707): both
write the same keys and values, so one cache serves, and the model's pass overwrites the draft's.
"""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.names import check_positive
from zoo.cache import KVCache
from zoo.model import LanguageModel
from zoo.sampling import Sampling, check_prompt, generator_of


@dataclass(frozen=True, kw_only=True)
class SpeculationRecord:
    """What a draft was worth."""

    new_tokens: int  # of a row, filling behind an end included
    drafted: int  # of all rows that had not ended
    accepted: int  # of these, those kept
    model_forwards: int  # the prompt's, then one a verification
    draft_forwards: int

    @property
    def acceptance_rate(self) -> float:
        """Kept of those drafted; not a number where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else math.nan

    @property
    def tokens_per_verification(self) -> float:
        """Of a row, 1 to n_draft + 1; the first token is the prompt's. Not a number without one."""
        verifications = self.model_forwards - 1
        return (self.new_tokens - 1) / verifications if verifications else math.nan


class Speculation(NamedTuple):
    """What `speculative_generate` returns."""

    tokens: Tensor  # [B, S + N] int64, as `zoo.generate.generate` returns them
    record: SpeculationRecord


@torch.no_grad()
def speculative_generate(
    model: LanguageModel,
    tokens: Tensor,
    *,
    draft: LanguageModel | Sequence[int | None],
    n_draft: int,
    max_new_tokens: int,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    seed: int | None = None,
) -> Speculation:
    """Continue each row of a batch as `generate` would, with fewer forwards of the model.

    Exact: tokens are distributed as the model's own under temperature, top_k and top_p, and greedy
    decoding gives its greedy output. "Its own" is what a forward of n_draft + 1 tokens computes:
    against one of a single token it may round differently, and a precision whose scales span
    several tokens may differ by more.

    Rows of a batch go on in step, each by as many tokens as the row that keeps the fewest, since a
    cache holds one length. That stays exact (a row's draft is thrown away by others' draws alone),
    but a batch keeps fewer drafts than its rows would each alone.

    Args:
        model, tokens, mask, max_new_tokens, eos, seed: as in `zoo.generate.generate`; the same seed
            gives other tokens than there, of the same distribution.
        draft: widths of the model's own layers, as its forward takes them, or another model of the
            same vocabulary.
        n_draft: tokens proposed before each verification.
        temperature, top_k, top_p: as in `generate`, of draft and model alike.

    Raises:
        ValueError: as `generate`; for a draft of another vocabulary or device; for a model, or
            draft, whose FFNs read other tokens, which no cache serves.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    check_positive(n_draft=n_draft)
    check_prompt(tokens, mask, max_new_tokens, model.config.max_seq_len)
    drafter = draft if isinstance(draft, LanguageModel) else model
    _check_models(model, drafter, tokens.shape[1] + max_new_tokens)
    generator = generator_of(seed, tokens.device)
    run = _Run(model, draft, tokens.shape[1] + max_new_tokens, mask, sampling, generator)
    with _evaluating(model, drafter):
        return run.go_on(tokens, n_draft, eos)


class _Run:
    """One call: caches, forwards counted, draws."""

    def __init__(
        self, model: LanguageModel, draft: LanguageModel | Sequence[int | None], room: int,
        mask: Tensor | None, sampling: Sampling, generator: torch.Generator,
    ):  # fmt: skip
        self.model, self.room, self.mask = model, room, mask
        self.sampling, self.generator = sampling, generator
        self.cache = model.new_cache(room)
        if isinstance(draft, LanguageModel):
            self.drafter, self.widths, self.draft_cache = draft, None, draft.new_cache(room)
        else:
            self.drafter, self.widths, self.draft_cache = model, draft, self.cache
        self.drafted = self.accepted = self.model_forwards = self.draft_forwards = 0

    def go_on(self, tokens: Tensor, n_draft: int, eos: int | None) -> Speculation:
        """tokens: [B, S]."""
        start = tokens.shape[1]
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)  # [B]
        p = self._verified(tokens, 1)  # [B, 1, V]
        tokens, done = _appended(tokens, self.sampling.draw(p[:, 0], self.generator), done, eos)
        while tokens.shape[1] < self.room and not done.all():
            n = min(n_draft, self.room - tokens.shape[1] - 1)  # the verification adds one itself
            new = self._round(tokens, n, done)
            tokens, done = _appended(tokens, new, done, eos)
        return Speculation(
            tokens,
            SpeculationRecord(
                new_tokens=tokens.shape[1] - start,
                drafted=self.drafted,
                accepted=self.accepted,
                model_forwards=self.model_forwards,
                draft_forwards=self.draft_forwards,
            ),
        )

    def _round(self, tokens: Tensor, n: int, done: Tensor) -> Tensor:
        """n drafts and a verification. tokens: [B, P]; done: [B]. Returns [B, 1 to n + 1]."""
        held = self.cache.length  # all but the newest token
        drafts, q = self._drafts(tokens, n)  # [B, n], [B, n, V]
        self.cache.truncate(held)  # of a draft that shares it
        p = self._verified(torch.cat((tokens, drafts), dim=1), n + 1)  # [B, n + 1, V]
        kept = self._kept(drafts, p, q) | done[:, None]  # [B, n]; ended rows hold none back
        n_kept = int(kept.long().cumprod(1).sum(1).min())
        live = int((~done).sum())
        self.drafted, self.accepted = self.drafted + live * n, self.accepted + live * n_kept
        for cache in {id(c): c for c in (self.cache, self.draft_cache)}.values():
            cache.truncate(min(cache.length, held + 1 + n_kept))
        last = p[:, n_kept]
        if n_kept < n:
            last = _residual(last, q[:, n_kept])
        new = self.sampling.draw(last, self.generator)  # [B, 1]
        if n_kept < n:
            new = torch.where(kept[:, n_kept, None], drafts[:, n_kept, None], new)
        return torch.cat((drafts[:, :n_kept], new), dim=1)

    def _drafts(self, tokens: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """tokens: [B, P]. Returns n tokens that may follow, [B, n], and what they are of."""
        vocab, prompt = self.model.config.vocab_size, tokens.shape[1]
        q = torch.empty(len(tokens), n, vocab, device=tokens.device)  # [B, n, V]
        for i in range(n):
            logits = self._logits(self.drafter, tokens, self.draft_cache, self.widths)
            self.draft_forwards += 1
            q[:, i] = self.sampling.probs(logits[:, -1])
            tokens = torch.cat((tokens, self.sampling.draw(q[:, i], self.generator)), dim=1)
        return tokens[:, prompt:], q

    def _verified(self, tokens: Tensor, n: int) -> Tensor:
        """What the model says after each of the last n tokens: [B, n, V]. tokens: [B, P]."""
        self.model_forwards += 1
        logits = self._logits(self.model, tokens, self.cache, None)
        return self.sampling.probs(logits[:, -n:])

    def _logits(
        self, model: LanguageModel, tokens: Tensor, cache: KVCache,
        widths: Sequence[int | None] | None,
    ) -> Tensor:  # fmt: skip
        """Of the tokens that the cache lacks. tokens: [B, P], all there are."""
        mask = None
        if cache.length == 0 and self.mask is not None:  # it keeps that of the prompt
            mask = F.pad(self.mask, (0, tokens.shape[1] - self.mask.shape[1]), value=True)
        return model(tokens[:, cache.length :], mask=mask, cache=cache, widths=widths).logits

    def _kept(self, drafts: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """[B, n] bool, each with probability min(1, p / q). p: [B, n + 1, V]; q: [B, n, V]."""
        drawn = torch.rand(drafts.shape, generator=self.generator, device=drafts.device)  # < 1
        of_model, of_draft = (
            x.gather(-1, drafts[..., None]).squeeze(-1) for x in (p[:, : drafts.shape[1]], q)
        )
        return drawn * of_draft < of_model


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0), normalised: what a refused draft leaves. p, q: [B, V].

    p itself for a row where nothing is left: its draft was kept, or refused by rounding alone.
    """
    left = (p - q).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total, p)


def _appended(tokens: Tensor, new: Tensor, done: Tensor, eos: int | None) -> tuple[Tensor, Tensor]:
    """tokens: [B, P]; new: [B, N]; done: [B], rows that have ended.

    Returns [B, P + up to N], rows filled with eos behind their first one, no token after the last
    row's; and which rows have ended by then.
    """
    if eos is None:
        return torch.cat((tokens, new), dim=1), done
    before = torch.cat((done[:, None], new == eos), dim=1).cummax(1).values  # [B, N + 1]
    new = new.masked_fill(before[:, :-1], eos)
    whole = before[:, 1:].all(0).long()  # [N], 1 where every row has ended
    new = new[:, : len(whole) - int(whole.sum()) + 1]
    return torch.cat((tokens, new), dim=1), before[:, -1]


def _check_models(model: LanguageModel, drafter: LanguageModel, room: int) -> None:
    for name, each in (("model", model), ("draft", drafter)):
        if not each.tokenwise:
            raise ValueError(
                f"the {name} has an FFN that reads other tokens, which a cache does not hold: "
                "speculative decoding needs one, use generate"
            )
    ours, theirs = model.config.vocab_size, drafter.config.vocab_size
    if ours != theirs:
        raise ValueError(f"the draft's vocab_size must be the model's {ours}, got {theirs}")
    if room > drafter.config.max_seq_len:
        raise ValueError(
            f"{room} tokens are more than the draft's max_seq_len={drafter.config.max_seq_len}"
        )
    places = [each.embedding.weight.device for each in (model, drafter)]
    if places[0] != places[1]:
        raise ValueError(f"model and draft must be on one device, got {places[0]} and {places[1]}")


@contextmanager
def _evaluating(*models: LanguageModel):
    """Both in evaluation mode, put back into their own afterwards."""
    before = [(model, model.training) for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, training in before:
            model.train(training)
