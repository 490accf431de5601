"""How tokens of a layer read one another: a recipe's `mixer`, by name, and what it is built from.

mixer: attention
mixer: {name: spark_attention, top_k: 64, split: 32}
"""

from collections.abc import Mapping
from typing import Any

from layers.names import unknown
from zoo.attention import Attention, AttentionConfig
from zoo.entry import Entry
from zoo.heads import Heads, HeadsConfig
from zoo.options import construct, field_names
from zoo.spark_attention import SparkAttention, SparkAttentionConfig

TINY = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_head": 8}
MIXERS = {
    row.name: row
    for row in (
        Entry(
            name="attention", module=Attention, config=AttentionConfig, kind="mixer",
            summary="causal softmax attention with rotary positions", paper="arXiv:1706.03762",
            tiny=TINY,
        ),
        Entry(
            name="spark_attention", module=SparkAttention, config=SparkAttentionConfig,
            kind="mixer", summary="some k keys a query, found by a part of each head",
            paper="arXiv:2506.06644", tiny={**TINY, "top_k": 4},
        ),
    )
}  # fmt: skip


def mixer_config(mixer: Any, **sizes: Any) -> HeadsConfig:
    """The checked config of a recipe's `mixer`.

    Args:
        mixer: a name, or a mapping with `name` and options of its own.
        sizes: the fields of `HeadsConfig`, which are the model's to say.

    Raises:
        ValueError: for an unknown mixer or option, one that is the model's, or a refused value.
    """
    said = {"name": mixer} if isinstance(mixer, str) else mixer
    if not isinstance(said, Mapping) or not isinstance(said.get("name"), str):
        raise ValueError(f"mixer must be a name or a mapping with 'name', got {mixer!r}")
    options = {key: value for key, value in said.items() if key != "name"}
    if said["name"] not in MIXERS:
        raise unknown("mixer", said["name"], MIXERS)
    entry = MIXERS[said["name"]]
    own = [name for name in field_names(entry.config) if name not in field_names(HeadsConfig)]
    for option in options:
        if option in field_names(HeadsConfig):
            raise ValueError(f"{option} is the model's: leave it out of mixer")
        if option not in own:
            raise unknown(f"option of mixer {entry.name}", option, own)
    return construct(entry, {**sizes, **options})


def build_mixer(config: HeadsConfig) -> Heads[Any]:
    """A new mixer with freshly drawn weights."""
    (entry,) = (row for row in MIXERS.values() if row.config is type(config))
    return entry.module(config)  # pyright: ignore[reportReturnType] # mixers are Heads
