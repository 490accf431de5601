"""Every router against a loop over tokens in float64, and against transformers' own routers."""

import math

import pytest
import torch
from torch.testing import assert_close

from routers.conventions import value
from routers.deepseek_v2 import DeepSeekV2Router
from zoo.catalogue import ROUTERS

pytestmark = pytest.mark.parity

D, E, K, T, SEED = 6, 8, 2, 24, 7
ROWS = {entry.name: entry for entry in ROUTERS}


def make(name, **options):
    """A router of 8 experts with large weights, and its random state, in float64."""
    row = ROWS[name]
    sizes = {"d_model": D, "n_experts": E} | ({} if name == "gshard" else {"top_k": K})
    router = row.module(row.config(**sizes | options)).double()
    for p in router.parameters():
        torch.nn.init.normal_(p)
    if hasattr(router, "bias"):
        router.bias.normal_(std=0.3)
    return router


def number(v):
    return v.item() if isinstance(v, torch.Tensor) else float(v)


def softmax(values):
    top = max(v.item() for v in values)
    e = [torch.exp(v - top) for v in values]
    return [v / sum(e) for v in e]


def sigmoid(v):
    return 1 / (1 + torch.exp(-v))


def best(values, k, among=None):
    """The k largest, the first of equals first."""
    among = range(len(values)) if among is None else among
    return sorted(among, key=lambda e: (-number(values[e]), e))[:k]


def groups_of(values, n_groups, top_groups, score):
    size = len(values) // n_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(n_groups)]
    kept = best([score([number(values[e]) for e in g]) for g in groups], top_groups)
    return [e for g in kept for e in groups[g]]


# One token's weights by expert, from its logits: the equations of moe.md 2


def top_k(c, router, z, t, x):
    if c.logit_bias:
        z = [v + b for v, b in zip(z, router.logit_bias, strict=True)]
    chosen, p = best(z, c.top_k), softmax(z)
    total = sum(p[e] for e in chosen) if c.renormalize else 1
    return {e: p[e] / total for e in chosen}


def noisy_top_k(c, router, z, t, x):
    torch.manual_seed(SEED)
    noise = torch.randn(T, E, dtype=torch.float64)[t]
    size = [torch.log(1 + torch.exp(w @ x)) for w in router.noise]
    h = [v + n * s for v, n, s in zip(z, noise, size, strict=True)]
    chosen = best(h, c.top_k)
    return dict(zip(chosen, softmax([h[e] for e in chosen]), strict=True))


def vmoe(c, router, z, t, x):
    torch.manual_seed(SEED)
    noise = torch.randn(T, E, dtype=torch.float64)[t]
    p = softmax([v + n / E for v, n in zip(z, noise, strict=True)])
    return {e: p[e] for e in best(p, c.top_k)}


def gshard(c, router, z, t, x):
    torch.manual_seed(SEED)
    p, draw = softmax(z), torch.rand(T, dtype=torch.float64)[t]
    one, two = best(p, 2)
    both = p[one] + p[two]
    found = {one: p[one] / both}
    if draw < min(1, 2 * p[two] / both):
        found[two] = p[two] / both
    return found


def deepseek_v2(c, router, z, t, x):
    p = softmax(z)
    allowed = groups_of(p, c.n_groups, c.top_groups, max)
    return {e: p[e] * c.scale for e in best(p, c.top_k, allowed)}


def deepseek_v3(c, router, z, t, x):
    s = [sigmoid(v) for v in z]
    choice = [v + b for v, b in zip(s, router.bias.double(), strict=True)]
    allowed = groups_of(choice, c.n_groups, c.top_groups, lambda g: sum(sorted(g)[-2:]))
    chosen = best(choice, c.top_k, allowed)
    total = sum(s[e] for e in chosen) + 1e-20 if c.renormalize else 1
    return {e: s[e] / total * c.scale for e in chosen}


def llama4(c, router, z, t, x):
    return {e: sigmoid(z[e]) for e in best(z, c.top_k)}


def remoe(c, router, z, t, x):
    return {e: z[e] for e in range(E) if z[e] > 0}


def longcat(c, router, z, t, x):
    p = softmax(z)
    choice = [v + b for v, b in zip(p, router.bias.double(), strict=True)]
    return {e: p[e] * c.scale for e in best(choice, c.top_k)}


def spt(c, router, z, t, x):
    z = [v + b for v, b in zip(z, router.logit_bias, strict=True)]
    return {e: 2 * sigmoid(z[e]) for e in best(z, c.top_k)}


def factor_llm(c, router, z, t, x):
    """N / K of value, N / K times the gradient of the probability."""
    z = [v + b for v, b in zip(z, router.logit_bias, strict=True)]
    p = softmax(z)
    return {e: E / c.top_k * (1 + p[e] - p[e].detach()) for e in best(z, c.top_k)}


INPUT = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
CASES = [
    (top_k, {}), (top_k, {"top_k": 3, "renormalize": False}), (top_k, {"logit_bias": True}),
    (noisy_top_k, {}), (noisy_top_k, {"top_k": 3}), (vmoe, {}), (gshard, {}),
    (deepseek_v2, {}), (deepseek_v2, {"n_groups": 4, "top_groups": 2, "top_k": 3, "scale": 16.0}),
    (deepseek_v3, {}), (deepseek_v3, {"n_groups": 4, "top_groups": 2, "top_k": 4, "scale": 2.5}),
    (deepseek_v3, {"renormalize": False, "n_groups": 2}), (llama4, {"top_k": 1}), (llama4, {}),
    (remoe, {}), (longcat, {"scale": 6.0}), (longcat, {"n_copy": 3}),
    (spt, {}), (spt, {"top_k": 5}), (factor_llm, {}), (factor_llm, {"top_k": 1}),
    (factor_llm, {"top_k": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "options"), CASES, ids=lambda v: getattr(v, "__name__", None))
def test_each_token_by_itself(rule, options):
    router = make(rule.__name__, **options)
    x = INPUT.clone().requires_grad_()
    torch.manual_seed(SEED)
    extra = {"n_sequences": 2} if getattr(router, "reads_sequences", False) else {}
    got = router(x, None, None, **extra)
    n = router.weight.shape[0]
    keep = torch.ones_like(got.experts, dtype=torch.bool) if got.keep is None else got.keep
    dense = torch.zeros(T, n, dtype=torch.float64).scatter_add(-1, got.experts, got.weights)

    expected = torch.zeros(T, n, dtype=torch.float64)
    for t in range(T):
        found = rule(router.config, router, [w @ x[t] for w in router.weight], t, x[t])
        assert set(got.experts[t][keep[t]].tolist()) == set(found)
        for e, weight in found.items():
            expected[t, e] = weight
    assert_close(dense, expected)
    inputs, probe = (x, *router.parameters()), torch.randn_like(expected)
    assert_close(
        torch.autograd.grad((dense * probe).sum(), inputs),
        torch.autograd.grad((expected * probe).sum(), inputs),
    )


# Losses, by loops


def test_importance_and_load_of_noisy_top_k():
    router = make("noisy_top_k", top_k=3)
    torch.manual_seed(SEED)
    losses = router(INPUT).losses
    torch.manual_seed(SEED)
    noise = torch.randn(T, E, dtype=torch.float64)
    importance, load = [0.0] * E, [0.0] * E
    for t in range(T):
        z = [(w @ INPUT[t]).item() for w in router.weight]
        size = [math.log1p(math.exp((w @ INPUT[t]).item())) for w in router.noise]
        h = [z[e] + noise[t, e].item() * size[e] for e in range(E)]
        chosen = best(h, 3)
        total = sum(math.exp(h[e]) for e in chosen)
        for e in range(E):
            others = sorted((h[j] for j in range(E) if j != e), reverse=True)
            load[e] += 0.5 * (1 + math.erf((z[e] - others[2]) / size[e] / math.sqrt(2)))
            importance[e] += math.exp(h[e]) / total if e in chosen else 0.0
    assert_close(losses["importance"].item(), squared_variation(importance))
    assert_close(losses["load"].item(), squared_variation(load))


def test_importance_and_load_of_vmoe():
    router = make("vmoe")
    torch.manual_seed(SEED)
    losses = router(INPUT).losses
    torch.manual_seed(SEED)
    noise = torch.randn(T, E, dtype=torch.float64)
    importance, load = [0.0] * E, [0.0] * E
    for t in range(T):
        z = [w @ INPUT[t] for w in router.weight]
        p = softmax(z)
        threshold = sorted(z[e].item() + noise[t, e].item() / E for e in range(E))[-2]
        for e in range(E):
            load[e] += 0.5 * (1 + math.erf((z[e].item() - threshold) * E / math.sqrt(2)))
            importance[e] += p[e].item()
    assert_close(losses["importance"].item(), squared_variation(importance))
    assert_close(losses["load"].item(), squared_variation(load))


def squared_variation(v):
    mean = sum(v) / len(v)
    return sum((u - mean) ** 2 for u in v) / len(v) / mean**2


def test_the_sequence_wise_loss_of_deepseek_v3():
    router = make("deepseek_v3", n_groups=4, top_groups=2)
    got = router(INPUT, None, None, n_sequences=3).losses["balance"].item()
    each = []
    for b in range(3):
        tokens = INPUT[b * 8 : b * 8 + 8]
        s = [[sigmoid(w @ x).item() for w in router.weight] for x in tokens]
        f = [E / (K * 8) * sum(e in best(row, K) for row in s) for e in range(E)]
        p = [sum(row[e] / sum(row) for row in s) / 8 for e in range(E)]
        each.append(sum(a * b for a, b in zip(f, p, strict=True)))
    assert_close(got, sum(each) / 3)


def test_the_regulariser_of_remoe():
    router = make("remoe", penalty=0.5)
    got = router(INPUT).losses["l1"].item()
    gates = [[max((w @ x).item(), 0.0) for w in router.weight] for x in INPUT]
    total = sum(sum(row[e] > 0 for row in gates) * sum(row[e] for row in gates) for e in range(E))
    assert_close(got, 0.5 * E / (K * T**2) * total, rtol=1e-6, atol=0)


# transformers


def theirs(path, name, **config):
    """A router of transformers, and its config; skips where the library is missing."""
    pytest.importorskip("transformers")
    from types import SimpleNamespace

    module = pytest.importorskip(f"transformers.models.{path}.modeling_{path}")
    sizes = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), E)
    shared = {"hidden_size": D, "num_experts_per_tok": K, "norm_topk_prob": True}
    router = getattr(module, name)(SimpleNamespace(**sizes | shared | config))
    return router.double()


HF = {
    "mixtral": ("mixtral", "MixtralTopKRouter", "top_k", {"renormalize": True}, {}),
    "olmoe": (
        "olmoe", "OlmoeTopKRouter", "top_k", {"renormalize": False}, {"norm_topk_prob": False},
    ),
    "qwen2": (
        "qwen2_moe", "Qwen2MoeTopKRouter", "top_k", {"renormalize": False},
        {"norm_topk_prob": False},
    ),
    "qwen3": ("qwen3_moe", "Qwen3MoeTopKRouter", "top_k", {"renormalize": True}, {}),
    "gpt_oss": ("gpt_oss", "GptOssTopKRouter", "top_k", {"logit_bias": True}, {}),
    "granite": ("granitemoe", "GraniteMoeTopKRouter", "top_k", {"renormalize": True}, {}),
    "deepseek_v2": (
        "deepseek_v2", "DeepseekV2TopkRouter", "deepseek_v2",
        {"n_groups": 4, "top_groups": 2, "scale": 16.0},
        {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0,
         "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": (
        "deepseek_v3", "DeepseekV3TopkRouter", "deepseek_v3",
        {"n_groups": 4, "top_groups": 2, "scale": 2.5},
        {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "longcat": (
        "longcat_flash", "LongcatFlashTopkRouter", "longcat", {"n_copy": 4, "scale": 6.0},
        {"zero_expert_num": 4, "routed_scaling_factor": 6.0},
    ),
    "llama4": ("llama4", "Llama4Router", "llama4", {"top_k": 1}, {"num_experts_per_tok": 1}),
    "switch": (
        "switch_transformers", "SwitchTransformersTop1Router", "top_k",
        {"top_k": 1, "renormalize": False},
        {"expert_capacity": 999, "router_bias": False, "router_jitter_noise": 0.0,
         "router_ignore_padding_tokens": False, "router_dtype": "float64"},
    ),
}  # fmt: skip


def dense_of(name, out):
    """Their [T, N] weights: 0 for experts not chosen."""
    if name == "llama4":
        return out[0]
    if name == "switch":
        chosen, p, _ = out
        return (chosen * p).flatten(0, -2)
    weights, experts = out[-2:]
    logits = out[0] if out[0].ndim == 2 else out[0].flatten(0, -2)
    return torch.zeros_like(logits, dtype=torch.float64).scatter(1, experts, weights.double())


@pytest.mark.parametrize("name", HF)
def test_as_in_transformers(name):
    path, kind, row, options, config = HF[name]
    reference, ours = theirs(path, kind, **config), make(row, **options)
    weight = next(p for n, p in reference.named_parameters() if n.endswith("weight"))
    with torch.no_grad():
        weight.copy_(ours.weight)
        if getattr(ours, "logit_bias", None) is not None:
            reference.bias.copy_(ours.logit_bias)
        if hasattr(ours, "bias"):
            reference.e_score_correction_bias.copy_(ours.bias)
    x = INPUT.clone().requires_grad_(), INPUT.clone().requires_grad_()
    extra = {"n_sequences": 2} if getattr(ours, "reads_sequences", False) else {}
    got = ours.eval()(x[0], None, None, **extra)
    shaped = x[1] if name != "switch" else x[1].unsqueeze(0)
    expected = dense_of(name, reference.eval()(shaped))
    dense = torch.zeros_like(expected).scatter_add(-1, got.experts, got.weights.to(expected.dtype))
    # several of theirs compute the scores in float32 whatever the dtype is
    close = {"rtol": 1e-5, "atol": 1e-6}
    assert_close(dense, expected, **close)
    probe = torch.randn_like(expected)
    grads = torch.autograd.grad((dense * probe).sum(), (x[0], ours.weight))
    assert_close(
        grads, torch.autograd.grad((expected * probe).sum(), (x[1], weight)), rtol=1e-4, atol=1e-5
    )


def test_deepseek_v2_without_groups_as_greedy_in_transformers():
    reference = theirs(
        "deepseek_v2", "DeepseekV2TopkRouter", n_group=1, topk_group=1,
        routed_scaling_factor=1.0, topk_method="greedy",
    )  # fmt: skip
    ours = make("deepseek_v2")
    assert isinstance(ours, DeepSeekV2Router)
    with torch.no_grad():
        reference.weight.copy_(ours.weight)
    _, weights, experts = reference(INPUT)
    got = ours(INPUT)
    order = weights.argsort(-1, descending=True)
    assert torch.equal(experts.gather(1, order), got.experts)
    assert_close(weights.gather(1, order).double(), got.weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_the_pooled_balance_loss_of_transformers(n_layers, masked):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = [torch.randn(T, E, dtype=torch.float64) for _ in range(n_layers)]
    mask = torch.rand(3, T // 3) > 0.3 if masked else None
    expected = mixtral.load_balancing_loss_func(
        tuple(logits), E, K, None if mask is None else mask.long()
    )
    probs = [z.softmax(-1) for z in logits]
    experts = [p.topk(K).indices for p in probs]
    flat = None if mask is None else mask.flatten()
    got = value("huggingface", probs, experts, flat)
    assert_close(got, expected.double(), rtol=1e-6, atol=1e-7)  # theirs counts in float32
