"""The grammar of a recipe's `ffn`."""

import pytest

from layers.selection import select_layers
from zoo.plan import LayerChoice, layer_choices

MOE = {"name": "moe", "n_experts": 8}


def ffns(ffn, n_layers=5):
    return [choice.ffn for choice in layer_choices(ffn, n_layers)]


def test_one_choice_stands_in_every_layer():
    assert ffns("swiglu", 2) == ["swiglu", "swiglu"]
    choice = LayerChoice(ffn="moe", options={"n_experts": 8}, router="top_k")
    assert layer_choices({**MOE, "router": "top_k"}, 3) == (choice,) * 3


def test_a_list_is_one_choice_per_layer():
    assert ffns(["swiglu", MOE, "mlp"], 3) == ["swiglu", "moe", "mlp"]


def test_the_first_rule_that_matches_wins_and_the_rest_goes_to_the_item_without_layers():
    rules = [{"name": "mlp", "layers": "first"}, {**MOE, "layers": "::2"}, "swiglu"]
    assert ffns(rules) == ["mlp", "swiglu", "moe", "swiglu", "moe"]
    assert ffns({**MOE, "layers": ":"}, 2) == ["moe", "moe"]
    assert "layers" not in layer_choices(rules, 5)[0].options


@pytest.mark.parametrize(
    ("selector", "layers"),
    [
        (2, [2]), (-1, [4]), ("first", [0]), ("last", [4]), ([3, 0, -1], [0, 3, 4]),
        ("1:", [1, 2, 3, 4]), ("::2", [0, 2, 4]), ("-2:", [3, 4]), (":-3", [0, 1]),
        ("1:4:2", [1, 3]), ("::-2", [0, 2, 4]), (":", [0, 1, 2, 3, 4]),
    ],
)  # fmt: skip
def test_selectors(selector, layers):
    assert select_layers(selector, 5) == layers


@pytest.mark.parametrize(
    ("ffn", "message"),
    [
        (None, "the model needs ffn"),
        ("???", "the model needs ffn"),
        (3, "ffn must be a name, a mapping with 'name', or a list of these, got 3"),
        ({"n_experts": 8}, r"ffn needs 'name', a row of the catalogue, got \{'n_experts': 8\}"),
        (["moe", 4, "moe"], r"ffn\[1\] must be a name or a mapping with 'name', got 4"),
        (["moe", "moe"], "ffn lists 2 choices for n_layers=3"),
        ([], "ffn lists 0 choices for n_layers=3"),
        ([{**MOE, "layers": 0}], r"no ffn rule matches layers \[1, 2\]"),
        ([{**MOE, "layers": 3}, "mlp"], "layers=3 is out of range for n_layers=3"),
        ([{**MOE, "layers": [0, -4]}, "mlp"], r"layers=\[0, -4\] is out of range"),
        ([{**MOE, "layers": "frist"}, "mlp"], "layers must be a layer .* got 'frist'"),
        ([{**MOE, "layers": "::0"}, "mlp"], "layers must be a layer .* got '::0'"),
        ([{**MOE, "layers": True}, "mlp"], "layers must be a layer .* got True"),
        ([{**MOE, "layers": ["first"]}, "mlp"], "layers must be a layer"),
        ([{**MOE, "layers": None}, "mlp"], "layers must be a layer"),
        ([{**MOE, "layers": "5:"}, "mlp"], r"ffn\[0\] \(moe, layers='5:'\) gets none of the 3"),
        ([{**MOE, "layers": ":"}, "mlp"], r"ffn\[1\] \(mlp, layers=':'\) gets none"),
        ({**MOE, 3: 4}, "ffn: options have names, got 3"),
        ({**MOE, "router": 3}, r"ffn.router must be a name or a mapping with 'name', got 3"),
        ({**MOE, "router": {"top_k": 1}}, "ffn.router must be a name or a mapping with 'name'"),
    ],
)
def test_errors_are_one_line_and_say_what_is_wrong(ffn, message):
    with pytest.raises(ValueError, match=message) as error:
        layer_choices(ffn, 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("selector", "layers"),
    [("0", [0]), ("-1", [9]), ("last 15%", [8, 9]), ("last 2%", [9]), ("first 20%", [0, 1]),
     ("last 200%", [*range(10)])],
)  # fmt: skip
def test_selectors_as_text_and_as_shares(selector, layers):
    assert select_layers(selector, 10) == layers


@pytest.mark.parametrize("selector", ["middle 10%", "last x%", "1:2:3:4", "15%", 1.5])
def test_what_is_no_selector_is_refused(selector):
    with pytest.raises(ValueError, match="layers must be"):
        select_layers(selector, 10)
