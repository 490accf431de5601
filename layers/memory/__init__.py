"""The parts of memory layers, which combine freely: query, retriever, pool, readout."""

from layers.memory.core import Memory, MemoryConfig, slot_usage
from layers.memory.expansion import Expansion, ExpansionConfig, Window, window_of
from layers.memory.pool import Pool, PoolConfig
from layers.memory.query import Query, QueryConfig
from layers.memory.readout import Readout, ReadoutConfig
from layers.memory.retriever import Hits, ProductKeys, ProductKeysConfig
from layers.memory.tucker import TuckerKeys, TuckerKeysConfig

__all__ = [
    "Expansion",
    "ExpansionConfig",
    "Hits",
    "Memory",
    "MemoryConfig",
    "Pool",
    "PoolConfig",
    "ProductKeys",
    "ProductKeysConfig",
    "Query",
    "QueryConfig",
    "Readout",
    "ReadoutConfig",
    "TuckerKeys",
    "TuckerKeysConfig",
    "Window",
    "slot_usage",
    "window_of",
]
