"""Whole models converted: chosen layers become mixtures, everything else is as it was."""

import pytest
import torch
from conversion_toys import WIDTH, D
from recipe_toys import refused

import zoo
from zoo.conversion import METHODS, convert, layer_pa_loss, teach_routers


def tiny_model(**options):
    config = {"vocab_size": 40, "d_model": D, "n_layers": 3, "n_heads": 2, "max_seq_len": 16}
    return zoo.build(config | {"ffn": {"name": "swiglu", "d_ff": WIDTH}} | options)


@pytest.mark.parametrize("to", ["upcycle", "granular"])
def test_a_converted_model_gives_the_logits_of_the_dense_one(to):
    model, tokens = tiny_model(), torch.randint(40, (2, 9))
    made = convert(model, to)
    assert [each.layer for each in made.receipts] == [0, 1, 2]
    assert max(each.largest for each in made.receipts) < 1e-5
    torch.testing.assert_close(made.model(tokens).logits, model(tokens).logits)
    routers = [block.ffn.router.weight for block in made.model.blocks]
    assert not torch.equal(routers[0], routers[1])


def test_chosen_layers_are_converted_and_the_others_left():
    plan = ["mlp", {"name": "swiglu", "preset": "geglu", "d_ff": WIDTH},
            {"name": "moe", "d_expert": 8, "router": "llama4"}]  # fmt: skip
    model, tokens = tiny_model(ffn=plan), torch.randint(40, (1, 5))
    made = convert(model, "upcycle", layers="1", n_experts=3).model
    assert [type(block.ffn).__name__ for block in made.blocks] == ["MLP", "MoE", "MoE"]
    assert made.config.ffn[1]["activation"] == "gelu"
    torch.testing.assert_close(made(tokens).logits, model(tokens).logits)
    again = zoo.build({"model": {**vars(made.config)}})  # the config alone builds the same
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(tokens).logits, made(tokens).logits)
    assert made.config.ffn[2] == plan[2]
    with refused("layer 0 is a MLP, only swiglu layers are converted"):
        convert(model, "upcycle")
    with refused("names none of 3 layers"):
        convert(model, "upcycle", layers="3:")
    behind = tiny_model(ffn=["swiglu", "swiglu", {"name": "moe_plus_plus", "d_expert": 8}])
    with refused("a later layer's router reads the logits"):
        convert(behind, "upcycle", layers="first")


@pytest.mark.parametrize("to", METHODS)
def test_the_same_seed_gives_the_same_model_and_another_another(to):
    model = tiny_model()
    one, same, other = (convert(model, to, seed=seed).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    if to == "spark":  # which draws nothing
        assert all(torch.equal(one[name], other[name]) for name in one)
        return
    assert not torch.equal(one["blocks.0.ffn.router.weight"], other["blocks.0.ffn.router.weight"])


def test_scales_kept_from_training_are_refused():
    """In another precision a model converts whatever it computes in."""
    model = tiny_model()
    zoo.set_precision(model, "nvfp4")
    assert max(each.largest for each in convert(model, "upcycle").receipts) < 1e-5
    delayed = {"all": {"format": "fp8_e4m3", "scope": "delayed"}}
    zoo.set_precision(model, {"name": "late", "default": delayed})
    with refused("keeps static or delayed scales, which new experts lack"):
        convert(model, "upcycle")


def test_routers_are_taught_at_the_dense_models_inputs():
    teacher, tokens = tiny_model().train(), torch.randint(40, (4, 16))
    student = convert(teacher, "factor_llm", layers="1:").model
    before = {name: w.clone() for name, w in student.state_dict().items()}
    read = []
    for layer in (1, 2):
        hook = teacher.blocks[layer].ffn.register_forward_pre_hook(lambda _, x: read.append(x[0]))
        teacher(tokens)
        hook.remove()
    expected = sum(
        layer_pa_loss(student.blocks[i].ffn, teacher.blocks[i].ffn, read[i - 1].flatten(0, 1)) / 2
        for i in (1, 2)
    )
    losses = teach_routers(student, teacher, [tokens] * 30)
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    changed = {n for n, w in student.state_dict().items() if not torch.equal(w, before[n])}
    assert changed == {
        f"blocks.{i}.ffn.router.{name}" for i in (1, 2) for name in ("weight", "logit_bias")
    }
    assert teacher.training
    assert not any(block.ffn._forward_pre_hooks for block in teacher.blocks)
    assert all(w.grad is None for w in teacher.parameters())
    with refused("no layer of the student is a mixture in place of a dense FFN"):
        teach_routers(teacher, teacher, [tokens])
