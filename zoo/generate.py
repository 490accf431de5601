"""Sampling from a language model."""

import torch
from torch import Tensor

from layers.names import check_positive
from zoo.model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Continue each row of a batch, with a key-value cache.

    A model with an FFN that reads other tokens (Soft MoE) is run on all tokens for each new one.

    Args:
        model: used in evaluation mode, and put back into its own afterwards.
        tokens: [B, S] int64, S >= 1.
        mask: [B, S] bool, False where a shorter row is padded on the left.
        max_new_tokens: how many to add.
        temperature: logits are divided by it; 0.0 takes the likeliest token (greedy).
        top_k: sample among the k likeliest.
        top_p: sample among the fewest likeliest tokens whose probabilities reach p.
        eos: a row that draws it is filled up with it; ends early when every row has.
        seed: of this call's own generator; None draws one from torch's global generator.

    Returns:
        [B, S + N] int64, N <= max_new_tokens: the prompt and what follows.

    Raises:
        ValueError: for an option out of range, an empty prompt, padding on the right, or more
            tokens than the model holds.
    """
    _check(tokens, mask, max_new_tokens, temperature, top_k, top_p)
    room = tokens.shape[1] + max_new_tokens
    if room > model.config.max_seq_len:
        raise ValueError(
            f"{tokens.shape[1]} + {max_new_tokens} tokens are more than the model's "
            f"max_seq_len={model.config.max_seq_len}"
        )
    generator = torch.Generator(tokens.device)
    generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache(room) if model.tokenwise else None
        given = tokens
        done = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            logits = model(given, mask=mask, cache=cache).logits[:, -1].float()  # [B, V]
            new = _pick(logits, temperature, top_k, top_p, generator)  # [B, 1]
            if eos is not None:
                new = new.masked_fill(done, eos)
                done = new == eos
            tokens = torch.cat((tokens, new), dim=1)
            if done.all():
                break
            given = tokens if cache is None else new
            if cache is not None:
                mask = None  # it keeps that of the prompt
            elif mask is not None:
                mask = torch.cat((mask, torch.ones_like(new, dtype=torch.bool)), dim=1)
    finally:
        model.train(was_training)
    return tokens


def _pick(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """logits: [B, V] float32. Returns [B, 1]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probs, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        probs[:, top_k:] = 0
    if top_p is not None:
        # a token stays while those before it have not reached p, so the first always does
        probs = probs / probs.sum(-1, keepdim=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    return order.gather(-1, torch.multinomial(probs, 1, generator=generator))


def _check(
    tokens: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    check_positive(max_new_tokens=max_new_tokens)
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must be [B, S] with S >= 1, got {list(tokens.shape)}")
    if mask is not None and not mask[:, -1].all():
        raise ValueError("a prompt must be padded on the left, so that its last token is real")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0.0 (greedy) or more, got {temperature}")
    if top_k is not None:
        check_positive(top_k=top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
