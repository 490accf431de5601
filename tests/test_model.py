"""The language model: what tokens see, what layers hand on, what it costs, how it is stored."""

from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch
from lm_toys import CHAIN, RAW, TOY
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from zoo import registry
from zoo.generate import generate
from zoo.model import LanguageModel, ModelConfig, _attention_mask, build, model_cost

TINY = ModelConfig(
    vocab_size=17, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, max_seq_len=24, init_std=0.3,
    ffn={"name": "swiglu", "d_ff": 32},
)  # fmt: skip
MIXED = replace(
    TINY, ffn=["toy", {"name": "swiglu", "d_ff": 32}, {"name": "toy", "n_experts": 5}], n_layers=3
)


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    monkeypatch.setattr(registry, "FFNS", (*registry.FFNS, TOY, RAW))
    monkeypatch.setattr(registry, "ROUTERS", (*registry.ROUTERS, CHAIN))


def tokens(b=2, s=9, config=TINY):
    return torch.randint(config.vocab_size, (b, s))


def loss_of(model, ids, mask=None):
    out = model(ids, mask)
    task = cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    return task + sum(out.losses.values(), torch.zeros(())), out


@pytest.mark.parametrize("config", [TINY, MIXED], ids=["dense", "mixed"])
def test_no_token_sees_a_later_one(config):
    model, ids = LanguageModel(config), tokens()
    changed = ids.clone()
    changed[:, 6:] = (ids[:, 6:] + 1) % 17
    a, b = model(ids).logits, model(changed).logits
    assert_close(a[:, :6], b[:, :6])
    assert (a[:, 6:] - b[:, 6:]).abs().amin(dim=(0, 2)).max() > 0
    assert a.dtype == torch.float32


@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 3, 1], [9]])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_cache_gives_the_logits_of_the_full_forward(steps, qk_norm):
    model, ids = LanguageModel(replace(MIXED, qk_norm=qk_norm)), tokens()
    cache = model.new_cache(9)
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in ids.split(steps, dim=1)]
        assert_close(torch.cat(parts, 1), model(ids).logits)
    assert cache.length == 9


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing_for_real_tokens(side):
    model, ids = LanguageModel(MIXED), tokens(1, 6)
    left, right = {"left": (4, 0), "right": (0, 4), "both": (2, 3)}[side]
    mask = torch.tensor([[False] * left + [True] * 6 + [False] * right])
    padded = [torch.cat((tokens(1, left), ids, tokens(1, right)), 1) for _ in range(2)]
    want = model(ids)
    for p in padded:
        got = model(p, mask)
        # positions are shifted, so float32 angles and sums differ in the last digits
        assert_close(got.logits[:, left : left + 6], want.logits, rtol=1e-4, atol=1e-4)
        assert_close(got.losses, want.losses, rtol=1e-4, atol=1e-5)
        for a, b in zip(got.stats, want.stats, strict=True):
            assert_close(a, b)
        assert got.logits.isfinite().all()


def test_padding_changes_no_gradient():
    model, ids = LanguageModel(MIXED), tokens(1, 6)
    probe = torch.randn(6, 17)
    mask = torch.tensor([[False] * 3 + [True] * 6 + [False]])
    padded = torch.cat((tokens(1, 3), ids, tokens(1, 1)), 1)
    results = []
    for logits in (model(ids).logits[0], model(padded, mask).logits[0, 3:9]):
        model.zero_grad()
        (logits * probe).mean().backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert_close(*results, rtol=1e-4, atol=1e-5)  # shifted positions, as above


def test_every_token_reads_at_least_itself():
    # a kernel may answer an empty row with NaN, and its gradient would reach every weight
    mask = torch.tensor([[False, False, True, False], [False] * 4])
    allowed = _attention_mask(mask, 0, 4, mask.device)
    assert allowed is not None
    assert allowed.diagonal(dim1=-2, dim2=-1).all()
    assert allowed[0, 0].long().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_padded_prompts_decode_like_each_alone():
    model = LanguageModel(MIXED)
    short, long = tokens(1, 3), tokens(1, 7)
    batch = torch.cat((torch.cat((torch.zeros(1, 4, dtype=torch.long), short), 1), long))
    mask = torch.tensor([[False] * 4 + [True] * 3, [True] * 7])
    both = generate(model, batch, mask=mask, max_new_tokens=5, temperature=0.0)
    for row, alone in zip(both, (short, long), strict=True):
        want = generate(model, alone, max_new_tokens=5, temperature=0.0)[0]
        assert row[-5:].tolist() == want[-5:].tolist()


def test_the_last_routers_logits_reach_later_layers_over_dense_ones():
    model, ids = LanguageModel(MIXED), tokens()
    first, last = model.blocks[0].ffn.router, model.blocks[2].ffn.router
    assert first.config.n_carry is None
    assert last.gate.shape == (5, 3)  # N_j x N_{j-1}
    assert [set(s) for s in model(ids).stats] == [{"counts"}, set(), {"counts"}]
    handed = {}
    model.blocks[2].ffn.register_forward_pre_hook(lambda m, args: handed.update(carry=args[1]))
    model.blocks[0].ffn.weight.data.zero_()  # leaves the logits as the only way back
    model(ids).logits.square().mean().backward()
    assert handed["carry"].shape == (2, 9, 3)
    assert first.weight.grad.abs().max() > 1e-6


def test_losses_are_means_over_the_layers_that_report_them():
    config = replace(TINY, ffn=["toy", "raw", "toy"])
    model, ids = LanguageModel(config), tokens()
    reported = []
    for i in (0, 2):
        model.blocks[i].ffn.register_forward_hook(lambda m, a, out: reported.append(out.losses))
    out = model(ids)
    assert_close(out.losses["balance"], (reported[0]["balance"] + reported[1]["balance"]) / 2)
    assert_close(out.losses["size"], out.stats[1]["size"])


def test_a_variant_may_read_the_raw_residual():
    model = LanguageModel(replace(TINY, n_layers=1, ffn="raw"))
    names = dict(model.named_parameters())
    assert "blocks.0.attention_norm.weight" in names
    assert "blocks.0.ffn_norm.weight" not in names
    model.blocks[0].attention.out.weight.data.zero_()
    ids = tokens()
    assert_close(model(ids).logits, model.head(model.norm(model.embedding(ids) / 2)))
    assert {i.name for i in model.cost(9) if i.params} == set(names)


@pytest.mark.parametrize("ffn", [TINY.ffn, {"name": "toy", "dropout": 0.3}], ids=["dense", "toy"])
def test_checkpointing_changes_no_bit_and_counts_once(ffn):
    config = replace(TINY, ffn=ffn)
    model, ids = LanguageModel(config).train(), tokens()
    results = []
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(1)
        loss, out = loss_of(model, ids)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        results.append((loss, grads, out.stats))
    assert_close(*results, rtol=0, atol=0)
    if "toy" in str(ffn):
        assert all(s["counts"].sum() == ids.numel() for s in results[1][2])


def test_compiled_model_gives_the_same_numbers():
    model, ids = LanguageModel(replace(TINY, n_layers=1, qk_norm=True)), tokens()
    results = []
    for run in (model, torch.compile(model)):
        model.zero_grad()
        loss, out = loss_of(run, ids)
        loss.backward()
        results.append((out.logits, {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_cost_names_every_parameter_and_counts_every_matmul(tied):
    config = replace(TINY, tie_embeddings=tied, qk_norm=True, ffn=["swiglu", "swiglu", "swiglu"])
    model, ids = LanguageModel(config), tokens()
    cost = model_cost(config, 9, causal=False)
    built = {name: p.numel() for name, p in model.named_parameters()}
    assert {item.name: item.params for item in cost if item.params} == built
    assert len({item.name for item in cost}) == len(cost.items)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    assert cost.flops == counter.get_total_flops() / ids.numel()
    assert cost.by_role()["head"].flops == 2 * 16 * 17
    assert {i.layer for i in cost if i.name.startswith("blocks.1.")} == {1}
    # a tied table is read whole, an untied one row by row
    embedding = cost.by_role()["embedding"]
    assert embedding.active_params == (16 * 17 if tied else 16)
    assert model.cost(9).flops < cost.flops


def test_cost_of_a_mixture_names_its_router():
    built = {name: p.numel() for name, p in LanguageModel(MIXED).named_parameters()}
    assert {item.name: item.params for item in model_cost(MIXED, 9) if item.params} == built
    assert "blocks.2.ffn.router.gate" in built


@pytest.mark.parametrize("tied", [True, False])
def test_initial_weights_have_the_stated_spread(tied):
    config = replace(TINY, d_model=128, vocab_size=512, init_std=None, tie_embeddings=tied)
    model = LanguageModel(config)
    assert (model.head.weight is model.embedding.weight) == tied
    fan_in = 128**-0.5
    stds = dict.fromkeys(("embedding", "head", "blocks.0.attention.qkv"), fan_in)
    stds["blocks.2.attention.out"] = fan_in / 6**0.5
    assert replace(config, init_std=0.05).embedding_std == 0.05
    for name, std in stds.items():
        assert_close(model.get_submodule(name).weight.std().item(), std, rtol=0.03, atol=0)
    assert abs(model(tokens(config=config)).logits.std() - 1) < 0.15


def test_a_model_may_be_born_without_storage():
    config = replace(TINY, n_layers=1, d_model=128, n_heads=4)
    with torch.device("meta"):
        model = LanguageModel(config)
    model.to_empty(device="cpu")
    for module in reversed(list(model.modules())):
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    assert model.head.weight is model.embedding.weight
    stds = {"embedding": 0.3, "blocks.0.attention.qkv": 128**-0.5}
    stds["blocks.0.attention.out"] = 256**-0.5
    for name, std in stds.items():
        assert_close(model.get_submodule(name).weight.std().item(), std, rtol=0.05, atol=0)
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("config", [TINY, replace(MIXED, tie_embeddings=False)])
def test_a_saved_model_loads_equal(config, tmp_path):
    model, ids = LanguageModel(config), tokens()
    model.save_pretrained(tmp_path / "a")
    loaded = LanguageModel.from_pretrained(tmp_path / "a")
    assert loaded.config == config
    assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert set(stored) == {name for name, _ in model.named_parameters()}


def test_a_broken_folder_is_an_error(tmp_path):
    def fails(message):
        with pytest.raises(ValueError, match=message) as error:
            LanguageModel.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)

    fails("no model config at .*config.json")
    LanguageModel(TINY).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole, state = weights.read_bytes(), load_file(weights)
    save_file({k: v for k, v in state.items() if k != "norm.weight"}, weights)
    fails("lacks weights: norm.weight")
    save_file({**state, "extra": torch.ones(1)}, weights)
    fails("has unknown weights: extra")
    save_file({**state, "norm.weight": torch.ones(3)}, weights)
    fails(r"norm.weight must be \[16\], got \[3\]")
    weights.write_bytes(whole[:-7])
    fails("is not a whole safetensors file")
    weights.unlink()
    fails("no weights at .*model.safetensors")
    text = config.read_text()
    config.write_text(text.replace('"d_model"', '"d_modle"'))
    fails("unknown model option 'd_modle'. Did you mean 'd_model'?")
    config.write_text(text.replace('"d_model": 16', '"d_model": "16"'))
    fails("model option d_model must be int, got '16'")
    config.write_text(text[:20])
    fails("is not JSON")
    config.write_text("{}")
    fails("does not describe a moe-zoo model")


def test_sampling_follows_its_options_and_its_seed():
    model, ids = LanguageModel(MIXED).train(), tokens(2, 4)
    draw = {"max_new_tokens": 12, "temperature": 2.0}
    a, b = (generate(model, ids, seed=3, **draw) for _ in range(2))
    assert model.training
    assert a.equal(b)
    assert a.shape == (2, 16)
    assert a[:, :4].equal(ids)
    assert not a.equal(generate(model, ids, seed=4, **draw))
    greedy = generate(model, ids, max_new_tokens=12, temperature=0.0)
    assert generate(model, ids, top_k=1, seed=5, **draw).equal(greedy)
    assert generate(model, ids, top_p=1e-6, seed=5, **draw).equal(greedy)
    full = ids
    for _ in range(12):  # without a cache
        full = torch.cat((full, model.eval()(full).logits[:, -1:].argmax(-1)), 1)
    assert greedy.equal(full)


def test_sampled_tokens_come_with_their_probabilities():
    model, ids = LanguageModel(TINY), tokens(1, 4)
    probs = (model(ids).logits[0, -1] / 1.5).softmax(-1)
    drawn = generate(model, ids.expand(4000, 4), max_new_tokens=1, temperature=1.5, seed=0)[:, -1]
    assert_close(drawn.bincount(minlength=17) / 4000, probs, rtol=0, atol=0.03)
    kept = probs.topk(3).indices.tolist()
    drawn = generate(model, ids.expand(500, 4), max_new_tokens=1, temperature=1.5, top_k=3, seed=0)
    assert set(drawn[:, -1].tolist()) == set(kept)
    p = probs.sort(descending=True).values[:2].sum().item() - 1e-4
    drawn = generate(model, ids.expand(500, 4), max_new_tokens=1, temperature=1.5, top_p=p, seed=0)
    assert set(drawn[:, -1].tolist()) == set(kept[:2])


def test_generation_ends_where_every_row_has_ended():
    model, ids = LanguageModel(TINY), tokens(1, 4)
    greedy = generate(model, ids, max_new_tokens=10, temperature=0.0)[0].tolist()
    eos = greedy[6]
    out = generate(model, ids, max_new_tokens=10, temperature=0.0, eos=eos)[0].tolist()
    assert out == greedy[: 4 + greedy[4:].index(eos) + 1]
    two = torch.cat((ids, tokens(1, 4)))
    rows = generate(model, two, max_new_tokens=10, temperature=0.0, eos=eos)
    ended = (rows[:, 4:] == eos).cummax(1).values
    assert (rows[:, 4:][ended] == eos).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be positive, got 0"),
        ({"max_new_tokens": 30}, r"4 \+ 30 tokens are more than the model's max_seq_len=24"),
        ({"temperature": -1.0}, "temperature must be 0.0 .greedy. or more, got -1.0"),
        ({"top_k": 0}, "top_k must be positive, got 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"mask": torch.tensor([[True, True, True, False]])}, "padded on the left"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, r"S >= 1, got \[1, 0\]"),
    ],
)
def test_sampling_errors(options, message):
    given = {"tokens": tokens(1, 4), "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        generate(LanguageModel(TINY), **given)


def test_inputs_are_checked():
    model, ids = LanguageModel(TINY), tokens(1, 25)
    with pytest.raises(ValueError, match="25 tokens are more than the 24"):
        model(ids)
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        model(ids[:, :3], cache=model.new_cache())
    with pytest.raises(ValueError, match="5 tokens are more than the 4"), torch.no_grad():
        model(ids[:, :5], cache=model.new_cache(4))
    with pytest.raises(ValueError, match=r"tokens must be \[B, S\], got \[25\]"):
        model(ids[0])
    with pytest.raises(
        ValueError, match=r"mask must be bool \[1, 3\] like tokens, got torch.int64"
    ):
        model(ids[:, :3], ids[:, :3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 5}, "d_model must be a multiple of n_heads=5, got 16: change one, or give"),
        ({"n_kv_heads": 3}, "n_heads must be a multiple of n_kv_heads=3"),
        ({"n_layers": 0}, "n_layers must be positive"),
        ({"ffn": ["swiglu"]}, "ffn lists 1 choices for n_layers=3"),
        ({"router": 5}, "router must be a name or a mapping with 'name', got 5"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn": "???"}, "the model needs ffn"),
        ({"ffn": ["swiglu", "swigul", "swiglu"]}, "layer 1: unknown FFN .* Did you mean 'swiglu'"),
        ({"ffn": {"name": "swiglu", "d_f": 3}}, "layer 0: unknown option of swiglu 'd_f'"),
        ({"ffn": {"name": "toy", "d_model": 3}}, "layer 0: d_model is the model's"),
        ({"ffn": {"name": "toy", "n_carry": 3}}, "layer 0: n_carry is the model's"),
        ({"ffn": {"name": "toy", "router": {"name": "chain", "n_carry": 3}}}, "n_carry is the"),
        ({"ffn": {"name": "toy", "n_experts": 0}}, "layer 0: n_experts must be positive"),
        ({"ffn": {"name": "swiglu", "router": "chain"}}, "layer 0: swiglu routes nothing"),
        ({"ffn": "toy", "router": "chian"}, "layer 0: unknown router 'chian'. Did you mean"),
    ],
)
def test_errors_of_a_layer_say_which(change, message):
    with pytest.raises(ValueError, match=message) as error:
        LanguageModel(replace(TINY, **change))
    assert "\n" not in str(error.value)


def test_the_models_router_is_every_routing_layers_default():
    ffn = ["toy", "swiglu", {"name": "toy", "router": "chain"}]
    config = replace(TINY, ffn=ffn, router={"name": "chain", "n_experts": 3})
    assert [c.router_config and c.router_config.n_carry for c in config.layers()] == [None, None, 3]


def test_config_goes_through_omegaconf_and_back():
    schema = OmegaConf.structured(ModelConfig)
    assert OmegaConf.is_missing(schema, "ffn")
    given = {"d_model": 32, "n_kv_heads": 2, "ffn": [{"name": "mlp", "layers": "1:"}, "swiglu"]}
    config = OmegaConf.to_object(OmegaConf.merge(schema, given))
    assert config == ModelConfig(**given)
    assert ModelConfig.of(asdict(config)) == config
    with pytest.raises(FrozenInstanceError):
        config.d_model = 3


def test_build_takes_a_config_a_recipe_or_plain_mappings():
    class Recipe:
        model, precision = TINY, "bf16"

    plain = asdict(TINY)
    for given in (TINY, plain, {"model": plain}):
        assert build(given).blocks[0].ffn.down.precision is None
    for given in (Recipe(), {"model": plain, "precision": "bf16"}):
        model = build(given)
        assert model.blocks[0].ffn.down(torch.randn(3, 32)).dtype == torch.bfloat16
        out = model(tokens())
        assert out.logits.isfinite().all()
    assert build(TINY, precision="bf16").blocks[0].attention.out.precision is not None
    with pytest.raises(ValueError, match="build takes a recipe or a ModelConfig, got int"):
        build(3)
    with pytest.raises(ValueError, match="unknown model option 'd_modle'"):
        build({"d_modle": 3})


def test_widths_must_fit_the_layers():
    model = build(TINY)
    with pytest.raises(ValueError, match=r"widths must have one entry for each of 3 layers, got 1"):
        model(tokens(), widths=[8])
    with pytest.raises(ValueError, match=r"layer 1: SwiGLU is not nested, it has no width 8"):
        model(tokens(), widths=[None, 8, None])
