"""From logits to the token that comes next: one distribution for every way to decode."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.names import check_positive


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What the next token is drawn from."""

    temperature: float = 1.0  # logits are divided by it; 0.0 takes the likeliest token (greedy)
    top_k: int | None = None  # among the k likeliest
    top_p: float | None = None  # among the fewest likeliest whose probabilities reach p

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0.0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None:
            check_positive(top_k=self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def probs(self, logits: Tensor) -> Tensor:
        """logits: [..., V]. Returns [..., V] float32, summing to one; greedy: one where largest."""
        logits = logits.float()
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        probs = (logits / self.temperature).softmax(-1)
        if self.top_k is None and self.top_p is None:
            return probs
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ranked[..., self.top_k :] = 0
        if self.top_p is not None:
            # a token stays while those before it have not reached p, so the first always does
            ranked = ranked / ranked.sum(-1, keepdim=True)
            ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= self.top_p, 0)
        ranked = ranked / ranked.sum(-1, keepdim=True)
        return torch.zeros_like(probs).scatter(-1, order, ranked)

    def draw(self, probs: Tensor, generator: torch.Generator) -> Tensor:
        """probs: [B, V], as `probs` gives them. Returns [B, 1] int64; greedy draws no number."""
        if self.temperature == 0:
            return probs.argmax(-1, keepdim=True)
        return torch.multinomial(probs, 1, generator=generator)


def generator_of(seed: int | None, device: torch.device) -> torch.Generator:
    """A call's own generator; None draws its seed from torch's global one."""
    generator = torch.Generator(device)
    return generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)


def check_prompt(tokens: Tensor, mask: Tensor | None, max_new_tokens: int, room: int) -> None:
    """Raise for a prompt that cannot go on. room: tokens that the model holds."""
    check_positive(max_new_tokens=max_new_tokens)
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must be [B, S] with S >= 1, got {list(tokens.shape)}")
    if mask is not None and not mask[:, -1].all():
        raise ValueError("a prompt must be padded on the left, so that its last token is real")
    if tokens.shape[1] + max_new_tokens > room:
        raise ValueError(
            f"{tokens.shape[1]} + {max_new_tokens} tokens are more than the model's "
            f"max_seq_len={room}"
        )
