"""Sampling from a language model."""

import torch
from torch import Tensor

from layers.spark_ffn import pack_for_generation
from zoo.model import LanguageModel
from zoo.sampling import Sampling, check_prompt, generator_of


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
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    check_prompt(tokens, mask, max_new_tokens, model.config.max_seq_len)
    generator = generator_of(seed, tokens.device)
    was_training = model.training
    model.eval()
    pack_for_generation(model)  # numbers, names and parameters stay
    try:
        cache = model.new_cache(tokens.shape[1] + max_new_tokens) if model.tokenwise else None
        given = tokens
        done = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            logits = model(given, mask=mask, cache=cache).logits[:, -1]  # [B, V]
            new = sampling.draw(sampling.probs(logits), generator)  # [B, 1]
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
