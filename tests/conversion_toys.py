"""A small dense FFN, and mixtures computed neuron by neuron from their definition."""

import torch

import zoo
from layers.swiglu import GATES

D, WIDTH = 16, 24
ROWS = (1, 2, 3, 7, 16, 33, 130)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(activation="silu", d_ff=WIDTH, dtype=torch.float64):
    return zoo.create("swiglu", d_model=D, d_ff=d_ff, activation=activation).to(dtype)


def one_expert(x, gate, up, down, activation="silu"):
    """Neuron by neuron, from the definition."""
    y = torch.zeros_like(x)
    for n in range(up.shape[0]):
        h = GATES[activation]((gate[n] * x).sum(), (up[n] * x).sum())
        y += h * down[:, n]
    return y


def mixture_loop(x, moe):
    """Token by token: softmax, the K largest, their experts one after another."""
    c, router, out = moe.config, moe.router, []
    for token in x:
        logits = router.weight.to(x.dtype) @ token
        if router.logit_bias is not None:
            logits = logits + router.logit_bias
        chosen = logits.argsort(descending=True, stable=True)[: c.top_k].tolist()
        p = logits[chosen].softmax(0) if router.config.renormalize else logits.softmax(0)[chosen]
        y = torch.zeros_like(token)
        for weight, e in zip(p, chosen, strict=True):
            gate, up = moe.experts.gate_up.weight[e].chunk(2)
            y += weight * one_expert(token, gate, up, moe.experts.down.weight[e], c.activation)
        out.append(y)
    return torch.stack(out)
