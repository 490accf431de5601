"""A decoder-only language model whose FFNs come from the catalogue, layer by layer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.base import Cost, WeightCost, total
from layers.linear import Linear
from layers.names import check_positive
from layers.norm import RMSNorm
from layers.replay import checkpoint_contexts
from zoo.block import Block, BlockOutput, Branch, Context
from zoo.cache import KVCache
from zoo.mixers import build_mixer
from zoo.model_config import ModelConfig
from zoo.pools import build_pools, draw_pools, pools_cost
from zoo.precision import set_precision
from zoo.pretrained import Pretrained
from zoo.registry import Choice

__all__ = ["LanguageModel", "ModelConfig", "ModelOutput", "build", "model_cost"]


class ModelOutput(NamedTuple):
    """What one forward gives."""

    logits: Tensor  # [B, S, V], in the head's dtype; of no meaning where the mask is False
    losses: dict[str, Tensor]  # scalars: mean over the layers that report each, so 1.0 stays even
    stats: list[dict[str, Tensor]]  # one per layer, empty where it reports none
    cache: KVCache | None  # the one given, now with these tokens


class LanguageModel(nn.Module, Pretrained):
    """logits = head(norm(blocks(embedding(tokens)))), each block x + attention, then x + FFN.

    The residual stream keeps the embedding's dtype (float32) or wider; leaves under a precision
    may return bfloat16, and the sum promotes. The last router logits so far (`carry`) go from
    block to block; what a layer hands on for later (`Later`) waits here for its block.
    """

    config_class = ModelConfig

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.activation_checkpointing = False  # recompute each block in the backward pass
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        choices = c.layers()
        self.tokenwise = all(choice.tokenwise for choice in choices)  # in evaluation; see Choice
        self.pools = build_pools(choices)
        self.blocks = nn.ModuleList(_block(c, choice, self.pools) for choice in choices)
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.head = Linear(c.d_model, c.vocab_size, role="head")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw embedding, head and shared pools anew, and tie; attention and FFNs draw their own.

        After `to_empty` on a model built on the meta device call it on all modules, parts before
        wholes: `for m in reversed(list(model.modules()))`.
        """
        weight = self.embedding.weight
        assert isinstance(weight, nn.Parameter)
        nn.init.normal_(weight, std=self.config.embedding_std)
        if self.config.tie_embeddings:
            self.head.weight = weight
        else:
            nn.init.normal_(self.head.weight, std=self.config.embedding_std)
        if self.pools:
            draw_pools(self.config.layers(), [block.get_submodule("ffn") for block in self.blocks])

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        widths: Sequence[int | None] | None = None,
        heads: Sequence[int | None] | None = None,
    ) -> ModelOutput:
        """Logits of the next token at every position.

        Args:
            tokens: [B, S] int64.
            mask: [B, S] bool, True where a token is real; padding may stand left or right. It
                changes no real token's logits, no loss and no count.
            cache: from `new_cache`; tokens are then the newest, after those that it holds. Only
                without gradients.
            widths: for each layer, how many of its FFN's first hidden numbers run; None there, or
                here: all. Only nested FFNs (matformer) run in part.
            heads: for each layer, how many of its first attention heads run.

        Raises:
            ValueError: for a wrong shape, more tokens than `max_seq_len` or the cache hold, or a
                part of a layer that does not run in part.
        """
        self._check(tokens, mask, cache)
        parts = list(zip(self._parts("widths", widths), self._parts("heads", heads), strict=True))
        context = self._context(tokens, mask, cache)
        x, carry = self.embedding(tokens), None
        outputs: list[BlockOutput] = []
        waiting: dict[int, list[Tensor]] = {}  # by the block after which it is added
        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[i]
            if self.activation_checkpointing and torch.is_grad_enabled():
                out = _recomputed(block, x, carry, context, None, *parts[i])
            else:
                out = block(x, carry, context, layer_cache, *parts[i])
            assert isinstance(out, BlockOutput)
            for y, blocks in out.later:
                waiting.setdefault(i + blocks, []).append(y)
            x, carry = sum(waiting.pop(i, ()), start=out.x), out.carry
            outputs.append(out)
        assert not waiting  # the config's layers() says so
        logits = self.head(self.norm(x))
        return ModelOutput(
            logits, _mean(out.losses for out in outputs), [out.stats for out in outputs], cache
        )

    def new_cache(self, max_tokens: int | None = None) -> KVCache:
        """An empty cache with room for `max_tokens`, by default `max_seq_len`."""
        return KVCache(self.config.n_layers, max_tokens or self.config.max_seq_len)

    def cost(self, seq_len: int | None = None, *, causal: bool = True) -> Cost:
        """`model_cost` of this model, at `max_seq_len` unless told."""
        return model_cost(self.config, seq_len or self.config.max_seq_len, causal=causal)

    def _context(self, tokens: Tensor, mask: Tensor | None, cache: KVCache | None) -> Context:
        """What all blocks read. The cache takes the mask here; blocks give it keys and values."""
        c, length, device = self.config, tokens.shape[1], tokens.device
        start = 0 if cache is None else cache.length
        seen = mask if cache is None else cache.append_mask(mask, *tokens.shape)
        return Context(
            rope=c.attention.rope(start, length, c.rope_base, device),
            mask=mask,
            attention_mask=_attention_mask(seen, start, length, device),
        )

    def _parts(self, name: str, given: Sequence[int | None] | None) -> Sequence[int | None]:
        """One entry a layer."""
        n = self.config.n_layers
        if given is None:
            return (None,) * n
        if len(given) != n:
            raise ValueError(f"{name} must have one entry for each of {n} layers, got {len(given)}")
        if name == "widths":
            for i, (block, width) in enumerate(zip(self.blocks, given, strict=True)):
                if width is not None and not getattr(block.ffn, "nested", False):
                    kind = type(block.ffn).__name__
                    raise ValueError(f"layer {i}: {kind} is not nested, it has no width {width}")
        if name == "heads":
            for i, heads in enumerate(given):
                try:
                    self.config.attention.counts(heads)
                except ValueError as error:
                    raise ValueError(f"layer {i}: {error}") from None
        return given

    def _check(self, tokens: Tensor, mask: Tensor | None, cache: KVCache | None) -> None:
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [B, S], got {list(tokens.shape)}")
        if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
            raise ValueError(
                f"mask must be bool {list(tokens.shape)} like tokens, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        held, room = 0, self.config.max_seq_len
        if cache is not None:
            held, room = cache.length, min(room, cache.max_tokens)
            if torch.is_grad_enabled():
                raise ValueError("a cache is for decoding: call the model under torch.no_grad()")
            if not self.tokenwise:
                raise ValueError(
                    "a cache holds keys and values alone, and an FFN of this model reads other "
                    "tokens too: give it all tokens at once, without a cache"
                )
        if held + tokens.shape[1] > room:
            raise ValueError(
                f"{held + tokens.shape[1]} tokens are more than the {room} that "
                f"max_seq_len={self.config.max_seq_len} and the cache allow"
            )


def _recomputed(block: nn.Module, *inputs: Any) -> BlockOutput:
    """A block whose activations are made anew in the backward pass, its routing as it was."""
    if torch.compiler.is_compiling():
        return cast(BlockOutput, checkpoint(block, *inputs, use_reentrant=False))
    out = checkpoint(block, *inputs, use_reentrant=False, context_fn=checkpoint_contexts)
    return cast(BlockOutput, out)


def _block(config: ModelConfig, choice: Choice, pools: nn.ModuleDict) -> Block:
    """The block of one layer: the pre-normed mixer, then the layer's FFN."""
    pool = None if choice.pool is None else pools[choice.pool]
    attention_norm, ffn_norm = (RMSNorm(config.d_model, config.norm_eps) for _ in range(2))
    return Block(
        [
            Branch("attention", build_mixer(config.attention), attention_norm, mixes=True),
            Branch("ffn", choice.build(pool), None if choice.entry.own_norm else ffn_norm),
        ]
    )


def _attention_mask(
    mask: Tensor | None, start: int, length: int, device: torch.device
) -> Tensor | None:
    """[B or 1, 1, S, P] bool for queries `start`, `start + 1`, ...; None where none is needed.

    mask: [B, P], True where a token is real. Padding reads itself, so that no row is empty
    (some kernels answer one with NaN); no real token reads padding.
    """
    if mask is None and (start == 0 or length == 1):
        return None
    queries = torch.arange(start, start + length, device=device)[:, None]  # [S, 1]
    keys = torch.arange(start + length, device=device)  # [P]
    if mask is None:
        return (keys <= queries)[None, None]
    return ((keys <= queries) & mask[:, None, None, :]) | (keys == queries)


def _mean(reports: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each loss, meaned over the layers that report it."""
    found: dict[str, list[Tensor]] = {}
    for report in reports:
        for name, loss in report.items():
            found.setdefault(name, []).append(loss)
    return {name: torch.stack(losses).mean() for name, losses in found.items()}


def model_cost(config: ModelConfig, seq_len: int, *, causal: bool = True) -> Cost:
    """What one token costs, mean over a sequence of `seq_len`; storage at 16 bits, norms at 32.

    One item per parameter, named as in `named_parameters()`, and one without parameters per layer's
    attention scores and per table of a shared pool that a layer reads. A tied head is an item
    without parameters of its own, so its FLOPs count and its numbers do not count twice.

    Args:
        config: the model; nothing is built.
        seq_len: tokens of a sequence.
        causal: True: scores of the (T + 1) / 2 keys that a token sees on average, exact. False:
            of all T keys, the usual convention, and what an unfused attention really multiplies.
    """
    check_positive(seq_len=seq_len)
    c, d = config, config.d_model
    table = c.vocab_size * d
    # a tied table is read whole by the head; an untied one row by row
    rows = (1, 1.0) if c.tie_embeddings else (c.vocab_size, 1.0)
    norm = Cost(
        (WeightCost(name="norm.weight", role="norm", params=d, other_flops=4 * d, bits=32),)
    )
    parts = [
        Cost(
            (
                WeightCost(
                    name="embedding.weight", role="embedding", params=table, units=rows[0],
                    active_units=rows[1],
                ),
            )
        )
    ]  # fmt: skip
    choices = c.layers()
    parts.append(pools_cost(choices))
    for i, choice in enumerate(choices):
        block = f"blocks.{i}."
        parts.append(c.attention.cost(seq_len, causal=causal).within(f"{block}attention.", layer=i))
        parts.append(norm.within(f"{block}attention_", layer=i))
        parts.append(choice.cost(seq_len).within(f"{block}ffn.", layer=i))
        if not choice.entry.own_norm:
            parts.append(norm.within(f"{block}ffn_", layer=i))
    head = WeightCost(
        name="head.weight", role="head", params=0 if c.tie_embeddings else table, flops=2 * table
    )
    return total([*parts, norm, Cost((head,))])


def build(
    config: Any, precision: Any = None, *, step: int = 0, max_steps: int | None = None
) -> LanguageModel:
    """A language model from a recipe or a model config, with the recipe's precision.

    Args:
        config: a `ModelConfig`, a recipe (anything with `model` and `precision`), or the same as
            plain mappings.
        precision: in place of the recipe's; None without a recipe computes in float32.
        step, max_steps: the step of training whose formats it gets, as `set_precision` takes them.
    """
    if isinstance(config, Mapping):
        recipe = config if "model" in config else {"model": config}
        config, of_recipe = recipe["model"], recipe.get("precision")
    else:
        of_recipe = getattr(config, "precision", None)
        config = getattr(config, "model", config)
    if isinstance(config, Mapping):
        config = ModelConfig.of(config)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"build takes a recipe or a ModelConfig, got {type(config).__name__}")
    model = LanguageModel(config)
    precision = of_recipe if precision is None else precision
    if precision is not None:
        set_precision(model, precision, step=step, max_steps=max_steps)
    return model
