"""Memory layers by the equations alone, one token at a time in float64 (memory.md)."""

import torch

import zoo


def small(name, **options):
    sizes = {"d_model": 16, "n_keys": 6, "top_k": 4, "d_key": 4, **options}
    return zoo.create(name, **({"d_ff": 64} if "ultra" in name else {}), **sizes)


def rms(v, gain):
    return v / torch.sqrt((v * v).mean() + 1e-5) * gain


def linear(leaf, x):
    y = leaf.weight @ x
    return y if leaf.bias is None else y + leaf.bias


def product_slots(keys, q, k):
    """[(slot, score)] of one head over all n^2 slots, the k best. keys: [2, n, d]; q: [2, d]."""
    n = keys.shape[1]
    found = [(i * n + j, keys[0, i] @ q[0] + keys[1, j] @ q[1]) for i in range(n) for j in range(n)]
    return sorted(found, key=lambda pair: (-pair[1].item(), pair[0]))[:k]


def softmax(scores):
    top = max(s.item() for s in scores)
    powers = [torch.exp(s - top) for s in scores]
    return [p / sum(powers) for p in powers]


def batch_normed(q, gain, bias):
    """q: [T, F], a micro-batch of real tokens."""
    mean = q.mean(0)
    var = ((q - mean) ** 2).mean(0)
    return (q - mean) / torch.sqrt(var + 1e-5) * gain + bias


def leading(core):
    """u, t of the largest singular value of [r, r], by power iteration; sum(u) >= 0."""
    core = core.detach()
    u = torch.ones(core.shape[0], dtype=core.dtype)
    for _ in range(200):
        u = core @ (core.T @ u)
        u = u / torch.sqrt((u * u).sum())
    t = core.T @ u
    sign = 1 if u.sum() >= 0 else -1
    return sign * u, sign * t / torch.sqrt((t * t).sum())


def tdqkr(layer, q, head):
    """[(row key, column key, scores by core)] of one token and head (memory.md 5.3).

    q: [2, r, d], a query for each side and rank.
    """
    c, keys = layer.memory.keys.config, layer.memory.keys
    n, gain = c.n_keys, keys.norm.weight

    def projection(side, a, i):
        return rms(keys.weight[side, a, head, i], gain) @ q[side, a]

    s = [[[projection(side, a, i) for i in range(n)] for a in range(c.rank)] for side in (0, 1)]
    total = keys.cores[:, head].sum(0)
    vectors = leading(total)
    kept = []
    for side in (0, 1):
        along = [sum(vectors[side][a] * s[side][a][i] for a in range(c.rank)) for i in range(n)]
        kept.append(sorted(range(n), key=lambda i, v=along: (-v[i].item(), i))[: c.looks_at])

    def score(core, i, j):
        ranks = range(c.rank)
        return sum(s[0][a][i] * core[a, b] * s[1][b][j] for a in ranks for b in ranks)

    pairs = [(i, j) for i in kept[0] for j in kept[1]]
    best = sorted(pairs, key=lambda p: -score(total, *p).item())[: c.top_k]
    return [(i, j, [score(core, i, j) for core in keys.cores[:, head]]) for i, j in best]


def swiglu(ffn, x):
    gate, up = (ffn.gate_up.weight @ x).chunk(2)
    return ffn.down.weight @ (gate / (1 + torch.exp(-gate)) * up)
