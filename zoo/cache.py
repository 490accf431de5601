"""Keys and values of the tokens seen so far, for decoding."""

import torch
from torch import Tensor


class LayerCache:
    """What one attention layer keeps. Room for all tokens is taken at the first `append`."""

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self.length = 0  # tokens held
        self.keys: Tensor | None = None  # [B, G, max_tokens, h]
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k: [B, G, S, h] and v: [B, G, S, h'] of the newest tokens. Returns all P held of each."""
        if self.keys is None or self.values is None:
            b, g = k.shape[:2]
            self.keys = k.new_empty(b, g, self.max_tokens, k.shape[-1])
            self.values = v.new_empty(b, g, self.max_tokens, v.shape[-1])
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; the next append writes over the rest."""
        self.length = length


class KVCache:
    """The caches of all layers, and which of the tokens held are padding."""

    def __init__(self, n_layers: int, max_tokens: int):
        self.max_tokens = max_tokens
        self.layers = [LayerCache(max_tokens) for _ in range(n_layers)]
        self.mask: Tensor | None = None  # [B, P] bool, True where a token is real; None: all are

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.layers[0].length

    def append_mask(self, mask: Tensor | None, batch: int, n_new: int) -> Tensor | None:
        """Remember the newest tokens' mask, [B, S]. Returns the mask of all tokens, [B, P]."""
        if mask is None and self.mask is None:
            return None
        device = (
            mask.device if mask is not None else None if self.mask is None else self.mask.device
        )
        ones = torch.ones(batch, max(self.length, n_new), dtype=torch.bool, device=device)
        old = ones[:, : self.length] if self.mask is None else self.mask
        self.mask = torch.cat((old, ones[:, :n_new] if mask is None else mask), dim=1)
        return self.mask

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`; room for the rest stays.

        Raises:
            ValueError: for a length that is not within [0, `self.length`].
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be in [0, {self.length}], got {length}")
        for layer in self.layers:
            layer.truncate(length)
        if self.mask is not None:
            self.mask = self.mask[:, :length]
