"""Routings as routers return them, made by hand."""

import torch

from layers.base import Routing


def routed(logits, k, keep=None):
    experts = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return Routing(experts, torch.ones_like(experts).float(), logits, {}, keep)


def part(routing, start, n):
    """What the router says of n of the tokens."""
    stop = start + n
    return routing._replace(
        experts=routing.experts[start:stop],
        weights=routing.weights[start:stop],
        logits=routing.logits[start:stop],
    )
