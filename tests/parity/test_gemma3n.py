"""Spark's FFN without a split against Gemma 3n's of transformers: outputs and all gradients."""

import pytest
import torch
from torch.testing import assert_close

import zoo
from zoo.gemma import export_gemma3n, gemma3n_ffn, gemma3n_ffns, import_gemma3n

pytestmark = pytest.mark.parity


def theirs(sparsity, d_model=32, d_ff=160):
    modeling = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
    config = pytest.importorskip("transformers").Gemma3nTextConfig(
        hidden_size=d_model, intermediate_size=[64, d_ff], num_hidden_layers=2,
        activation_sparsity_pattern=[0.0, sparsity], num_attention_heads=2, num_key_value_heads=1,
        layer_types=["full_attention"] * 2, num_kv_shared_layers=0,
    )  # fmt: skip
    return modeling.Gemma3nTextMLP(config, layer_idx=1)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.85, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_gemma3ns(sparsity, dtype):
    their = theirs(sparsity).to(dtype)
    ours = zoo.create(**gemma3n_ffn(d_ff=160, sparsity=sparsity), d_model=32).to(dtype)
    ours.load_state_dict(import_gemma3n(their.state_dict()))
    x = torch.randn(2, 7, 32, dtype=dtype)
    probe = torch.randn_like(x)
    results = []
    for run, module in ((lambda x: ours(x).y, ours), (their, their)):
        given = x.clone().requires_grad_()
        y = run(given)
        (y * probe).sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        results.append((y, given.grad, grads))
    (y, dx, grads), (their_y, their_dx, their_grads) = results
    # theirs has its quantile in float32
    atol, rtol = (3e-6, 3e-6) if dtype == torch.float64 else (1e-5, 1e-4)
    assert_close(y, their_y, atol=atol, rtol=rtol)
    assert_close(dx, their_dx, atol=atol, rtol=rtol)
    assert_close(export_gemma3n(grads), their_grads, atol=atol, rtol=rtol)
    assert their_y.abs().max() > 0


def test_layers_of_a_model():
    ffns = gemma3n_ffns(35, 16384)
    assert [ffn.get("density") for ffn in ffns] == [pytest.approx(0.05)] * 10 + [None] * 25
    assert {ffn.get("selection") for ffn in gemma3n_ffns(8, 512)} == {"none"}
    assert [ffn["d_ff"] for ffn in gemma3n_ffns(2, (16, 32), [0.5, 0.9])] == [16, 32]
    model = {"vocab_size": 16, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 8}
    built = zoo.build({"model": {**model, "ffn": gemma3n_ffns(2, (16, 32), [0.5, 0.0])}})
    assert built(torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all()
    with pytest.raises(ValueError, match="sparsity must list 3 layers, got 2"):
        gemma3n_ffns(3, 16, [0.5, 0.9])
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1.0"):
        gemma3n_ffn(d_ff=16, sparsity=1.0)


def test_loading_says_what_is_wrong():
    ffn = zoo.create(**gemma3n_ffn(d_ff=48, sparsity=0.5), d_model=16)
    tensors = export_gemma3n(ffn.state_dict(), prefix="layers.3.mlp.")
    assert_close(import_gemma3n(tensors, prefix="layers.3.mlp."), dict(ffn.state_dict()))
    with pytest.raises(ValueError, match=r"under 'layers.4.mlp.', got none"):
        import_gemma3n(tensors, prefix="layers.4.mlp.")
    tensors["layers.3.mlp.down_proj.weight"] = torch.zeros(48, 16)
    with pytest.raises(ValueError, match=r"down_proj.weight must be \[16, 48\], got \[48, 16\]"):
        import_gemma3n(tensors, prefix="layers.3.mlp.")
