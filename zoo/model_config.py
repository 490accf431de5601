"""The shape of a language model: plain values, and the settled layers that they mean."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from layers.names import check_positive, unknown
from zoo.heads import HeadsConfig
from zoo.mixers import mixer_config
from zoo.plan import MISSING, LayerChoice, check_router, layer_choices
from zoo.pools import pool_configs, pool_name, refuse_placed, shared_options
from zoo.registry import Choice, find, resolve


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a language model; plain values only, so that a recipe holds it."""

    vocab_size: int = 256
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None  # None: as many as n_heads
    d_head: int | None = None  # None: d_model / n_heads
    max_seq_len: int = 1024  # tokens; the longest input, cache included
    rope_base: float = 10000.0
    qk_norm: bool = False
    tie_embeddings: bool = True  # the head reads the embedding's weight
    norm_eps: float = 1e-6
    init_std: float | None = None  # of embedding and head; None: 1 / sqrt(d_model), unit logits
    mixer: Any = "attention"  # of every layer: a name, or a mapping with its options; zoo.mixers
    ffn: Any = MISSING  # see zoo.plan
    router: Any = None  # in place of the default router of every layer that routes
    allow_noncausal: bool = False  # let training read later tokens (expert choice, Soft MoE)

    def __post_init__(self) -> None:
        check_positive(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            max_seq_len=self.max_seq_len,
            rope_base=self.rope_base,
            norm_eps=self.norm_eps,
            init_std=self.embedding_std,
        )
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model must be a multiple of n_heads={self.n_heads}, got {self.d_model}: "
                "change one, or give d_head"
            )
        _ = self.attention  # its own checks
        check_router(self.router, "router")
        if self.ffn != MISSING:
            layer_choices(self.ffn, self.n_layers)

    @property
    def embedding_std(self) -> float:
        """Std of embedding and head, with the default filled in."""
        return self.d_model**-0.5 if self.init_std is None else self.init_std

    @property
    def attention(self) -> HeadsConfig:
        """What each layer's mixer is built from.

        The matrix that writes into the residual stream starts smaller by 1 / sqrt(2 n_layers), so
        that the stream's variance does not grow with depth (GPT-2). FFNs draw their own weights.
        """
        return mixer_config(
            self.mixer,
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads if self.n_kv_heads is None else self.n_kv_heads,
            d_head=self.d_model // self.n_heads if self.d_head is None else self.d_head,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
            out_scale=(2 * self.n_layers) ** -0.5,
        )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "ModelConfig":
        """From a mapping of fields; raises for a name or a type that does not fit."""
        known = {f.name: get_args(f.type) or (f.type,) for f in fields(cls)}
        for name, value in given.items():
            if name not in known:
                raise unknown("model option", name, known)
            kinds = {*known[name], int} if float in known[name] else {*known[name]}
            if Any not in kinds and type(value) not in kinds:
                allowed = " or ".join(getattr(kind, "__name__", str(kind)) for kind in known[name])
                raise ValueError(f"model option {name} must be {allowed}, got {value!r}")
        return cls(**given)

    def layers(self) -> tuple[Choice, ...]:
        """Each layer's FFN with every option settled.

        A router whose config has `n_carry` is told how many logits the last routing layer before
        it hands on, or None if there is none; a layer that reads a shared pool, which table of it
        is its own.
        """
        choices: list[Choice] = []
        n_carry = None
        plan = layer_choices(self.ffn, self.n_layers)
        pools: list[str | None] = []
        for i, layer in enumerate(plan):
            with _said_of(i):
                pools.append(pool_name(layer))
        for i, layer in enumerate(plan):
            with _said_of(i):
                choice = self._settle(_placed(layer, i, pools), n_carry)
                _check_skip(choice, i, self.n_layers)
            if not choice.causal and not self.allow_noncausal:
                raise ValueError(
                    f"layer {i}: {choice.entry.name} as configured lets a token read later ones in "
                    "training, which a language model must not: set allow_noncausal=True to do "
                    "so anyway, or choose another variant"
                )
            choices.append(replace(choice, pool=pools[i]))
            n_carry = _n_logits(choice) or n_carry
        _ = pool_configs(choices)  # its own checks
        return tuple(choices)

    def _settle(self, layer: LayerChoice, n_carry: int | None) -> Choice:
        own = layer.router if isinstance(layer.router, Mapping) else {}
        for name in ("d_model", "n_carry"):
            if name in layer.options or name in own:
                raise ValueError(f"{name} is the model's: leave it out of ffn")
        default = self.router if find(layer.ffn).router is not None else None
        router = default if layer.router is None else layer.router
        choice = resolve(layer.ffn, router=router, d_model=self.d_model, **layer.options)
        if hasattr(choice.router_config, "n_carry"):
            return replace(choice, router_config=replace(choice.router_config, n_carry=n_carry))
        return choice


@contextmanager
def _said_of(layer: int) -> Iterator[None]:
    """An error in here names the layer."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from None


def _placed(layer: LayerChoice, i: int, pools: Sequence[str | None]) -> LayerChoice:
    """The choice of layer i as its variant takes it. pools: the shared one of every layer."""
    if pools[i] is None:
        return layer
    refuse_placed(layer.options)
    places = [n for n, name in enumerate(pools) if name == pools[i]]
    options = {**layer.options, **shared_options(find(layer.ffn), places, i)}
    return replace(layer, options=options)


def _check_skip(choice: Choice, i: int, n_layers: int) -> None:
    """Raise where layer i hands something on for after the last block."""
    skip = getattr(choice.config, "skip", 0)
    if i + skip >= n_layers:
        raise ValueError(
            f"skip={skip} adds the memory's output after layer {i + skip}, and the last is "
            f"{n_layers - 1}: skip at most {n_layers - 1 - i}"
        )


def _n_logits(choice: Choice) -> int | None:
    """Router logits per token that a layer hands on; None where it routes nothing."""
    return None if choice.router_config is None else len(choice.config.expert_names)
