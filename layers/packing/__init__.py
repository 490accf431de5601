"""Weights as real codes and scales: what a low format takes in memory and on disk."""

from layers.packing.storage import Storage, storage_of
from layers.packing.weight import Packed, PackedWeight, native_view, pack

__all__ = ["Packed", "PackedWeight", "Storage", "native_view", "pack", "storage_of"]
