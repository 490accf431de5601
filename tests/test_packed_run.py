"""A packed run directory: made from a finished run, and sampled from like one."""

import json

import pytest
import torch
from recipe_toys import refused, tiny_recipe

from recipes import load
from recipes.pack import pack_run
from recipes.sample import continue_text
from zoo.model import build
from zoo.pretrained import write_weights

LOW = {"default": "mxfp4", "rules": [{"roles": ["head", "router"], "use": "bf16"}]}
DRAW = {"max_new_tokens": 6, "temperature": 0.0, "top_k": None, "seed": 0}


@pytest.fixture
def run(tmp_path):
    """As training leaves it, but for what no sampling reads."""
    torch.manual_seed(0)
    recipe = tiny_recipe({"name": "swiglu"})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(load.to_yaml(recipe))
    write_weights(build(recipe), folder / "weights.safetensors")
    return folder


def test_a_packed_run_is_small_and_goes_on_with_text(run):
    packed = pack_run(run, precision=LOW)
    out = run.with_name("run-packed")
    said = json.loads((out / "pack.json").read_text())
    assert said["bytes"] == packed.report.bytes
    assert said["bpb"]["before"] == said["bpb"]["after"] == packed.bpb > 0
    sizes = [(d / "weights.safetensors").stat().st_size for d in (out, run)]
    assert sizes[0] < sizes[1]
    text = continue_text(out, "The ", **DRAW)
    assert text == continue_text(out, "The ", **DRAW)
    assert isinstance(text, str)


def test_runs_that_cannot_be_packed_say_so(run, tmp_path):
    with refused("nothing to pack"):
        pack_run(run)
    with refused("is it a finished run?"):
        pack_run(tmp_path)
    pack_run(run, precision=LOW)
    with refused("is already there"):
        pack_run(run, precision=LOW)
    with refused("packed already"):
        pack_run(run.with_name("run-packed"), precision=LOW)
