"""Models whose memory tables stay on the disk."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_toys import refused, tiny_recipe
from safetensors.torch import load_file, save_file

import zoo
from recipes import load
from recipes.cli import app
from recipes.sample import continue_text
from zoo.generate import generate
from zoo.model import LanguageModel
from zoo.pretrained import building, load_weights, own_tensors, write_weights

SIZES = {"n_keys": 6, "top_k": 4, "d_key": 4}
ULTRA = {"n_keys": 4, "top_k": 4, "d_key": 4, "d_ff": 64, "d_value": 8}
FFNS = {
    "pkm": SIZES,
    "peer": SIZES,
    "memory_plus": SIZES,
    "ultramem": ULTRA,
    "ultramem_v2": ULTRA | {"d_input": 4},
}
LOW = {"default": "mxfp4", "rules": [{"roles": ["head", "router"], "use": "bf16"}]}
TOKENS = torch.arange(20)[None]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def built(ffn: Any, precision: Any = "fp32", **sizes: Any) -> LanguageModel:
    config = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64, "ffn": ffn}
    torch.manual_seed(0)
    return zoo.build({"model": config | sizes, "precision": precision}).eval()


def reloaded(model, folder):
    model.save_pretrained(folder)
    return LanguageModel.from_pretrained(folder, mapped=True)


def drawn(model, tokens=TOKENS, n=8):
    return generate(model, tokens, max_new_tokens=n, temperature=0.0)


def tables(model):
    return {n: p for n, p in model.state_dict().items() if ".pool." in n or n.startswith("pools.")}


@pytest.mark.parametrize("pool", ["own", "of_all"])
@pytest.mark.parametrize("name", sorted(FFNS))
def test_a_mapped_model_is_the_model(name, pool, tmp_path):
    model = built({"name": name, **FFNS[name], "pool": pool})
    mapped = reloaded(model, tmp_path)
    assert len(tables(mapped)) == len(tables(model)) > 0
    for part, weight in model.state_dict().items():
        assert torch.equal(mapped.state_dict()[part], weight), part
    with torch.no_grad():
        assert torch.equal(mapped(TOKENS).logits, model(TOKENS).logits)
    assert torch.equal(drawn(mapped), drawn(model))
    assert not mapped.training
    assert not any(p.requires_grad for p in mapped.parameters())
    assert not any(t.is_meta for t in (*mapped.parameters(), *mapped.buffers()))


@pytest.mark.parametrize("name", ["peer", "ultramem"])
def test_a_packed_model_is_mapped_too(name, tmp_path):
    model = built({"name": name, **FFNS[name]}, LOW)
    zoo.pack(model)
    model.save_pretrained(tmp_path)
    whole = LanguageModel.from_pretrained(tmp_path)
    mapped = LanguageModel.from_pretrained(tmp_path, mapped=True)
    assert all(name.endswith(("codes", "scales")) for name in tables(mapped))
    with torch.no_grad():
        assert torch.equal(mapped(TOKENS).logits, whole(TOKENS).logits)
    assert torch.equal(drawn(mapped), drawn(whole))


def test_the_file_is_never_written(tmp_path):
    mapped = reloaded(built({"name": "pkm", **SIZES}), tmp_path)
    path = tmp_path / "model.safetensors"
    before = path.read_bytes()
    for table in tables(mapped).values():
        table.fill_(7.0)
    assert all((table == 7).all() for table in tables(mapped).values())
    assert path.read_bytes() == before


def resident(path: Path) -> int:
    """Bytes of a file's mappings that this process holds in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path.resolve()))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def forget(path: Path) -> None:
    """Drop a file from the system's cache, of which a fault would map what lies around a page."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sparse_file(model, path: Path, rows: dict[str, tuple[int, torch.Tensor]]) -> int:
    """Weights of a model on the meta device, zeros that take no room but for the rows given.

    rows: by name, which row and its numbers. Returns how long the file is.
    """
    own = own_tensors(model)
    sizes = {name: t.numel() * t.element_size() for name, t in own.items()}
    kinds = {torch.float32: "F32", torch.int64: "I64"}
    entries, place = {}, 0
    for name in sorted(own, key=lambda n: -own[n].element_size()):
        shape = list(own[name].shape)
        where = [place, place + sizes[name]]
        entries[name] = {"dtype": kinds[own[name].dtype], "shape": shape, "data_offsets": where}
        place += sizes[name]
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + place)
        for name, (row, numbers) in rows.items():
            start = entries[name]["data_offsets"][0] + row * numbers.numel() * 4
            file.seek(8 + len(header) + start)
            file.write(numbers.numpy().tobytes())
    return path.stat().st_size


@linux
def test_a_table_larger_than_all_memory(tmp_path):
    """A sparse file of it; some memory is read, and rows beyond what 32 bits count are right."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    n_keys = 1 << 13
    while n_keys**2 * 32 * 4 < 1.5 * ram:
        n_keys *= 2
    said = {"name": "pkm", "n_keys": n_keys, "heads": 1, "top_k": 4, "d_key": 2}
    path = tmp_path / "weights.safetensors"
    with building(path, mapped=True):
        model = built(said, n_layers=1)
    table = "blocks.0.ffn.memory.pool.values.weight"
    numbers = torch.arange(32.0)
    size = sparse_file(model, path, {table: (n_keys**2 - 1, numbers)})
    if path.stat().st_blocks * 512 > 1 << 26:
        pytest.skip("this file system keeps no sparse files")
    load_weights(model, path, mapped=True)
    assert size > 1.5 * ram
    last, weights = n_keys**2 - 1, torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    pool = model.get_submodule(table.removesuffix(".weight"))
    y = pool(torch.tensor([[last, 0], [5, last]]), weights)
    assert torch.equal(y, torch.stack((2 * numbers, 3 * numbers)))
    assert drawn(model, TOKENS[:, :1]).shape == (1, 9)
    assert 0 < resident(path) < 1 << 23


@linux
@pytest.mark.parametrize("packed", [False, True])
def test_only_what_is_touched_is_read(packed, tmp_path):
    model = built({"name": "pkm", "n_keys": 256, "heads": 1, "top_k": 2, "d_key": 2}, LOW)
    if packed:
        zoo.pack(model)
    path = tmp_path / "model.safetensors"
    mapped = reloaded(model, tmp_path)
    size = sum(t.numel() * t.element_size() for t in tables(mapped).values())
    assert size > (1 << 21 if packed else 1 << 23)
    assert resident(path) == 0
    forget(path)
    drawn(mapped, TOKENS[:, :3], n=2)
    rows = 4 * 2 * 2  # tokens, hits, layers; codes and scales apart, each over two pages at most
    assert 0 < resident(path) <= rows * 4 * os.sysconf("SC_PAGE_SIZE")


def test_what_cannot_be_mapped_is_refused(tmp_path):
    built("mlp").save_pretrained(tmp_path / "mlp")
    with refused("the model has no memory layer, so no table to leave on the disk"):
        LanguageModel.from_pretrained(tmp_path / "mlp", mapped=True)
    folder = tmp_path / "pkm"
    built({"name": "pkm", **SIZES}).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    half = {n: t.bfloat16() if ".pool." in n else t for n, t in tensors.items()}
    save_file(half, path)
    with refused("values.weight must be torch.float32 on the disk, got torch.bfloat16"):
        LanguageModel.from_pretrained(folder, mapped=True)
    save_file({n: t for n, t in tensors.items() if ".pool." not in n}, path)
    with refused("lacks weights: blocks.0.ffn.memory.pool.values.weight"):
        LanguageModel.from_pretrained(folder, mapped=True)
    path.write_bytes(path.read_bytes()[:-8])
    with refused("is not a whole safetensors file"):
        LanguageModel.from_pretrained(folder, mapped=True)
    path.unlink()
    with refused("no weights at"):
        LanguageModel.from_pretrained(folder, mapped=True)


def test_other_tensors_take_the_models_dtype(tmp_path):
    model = built({"name": "pkm", **SIZES})
    write_weights(model, path := tmp_path / "w.safetensors")
    stored = {n: t if ".pool." in n else t.bfloat16() if t.is_floating_point() else t
              for n, t in load_file(path).items()}  # fmt: skip
    save_file(stored, path)
    with building(path, mapped=True):
        mapped = built({"name": "pkm", **SIZES})
    load_weights(mapped, path, mapped=True)
    assert {p.dtype for p in mapped.parameters()} == {torch.float32}
    assert drawn(mapped).shape == (1, 28)


def test_the_command(tmp_path, capsys):
    recipe = tiny_recipe({"name": "peer", **SIZES})
    (tmp_path / "recipe.yaml").write_text(load.to_yaml(recipe))
    torch.manual_seed(0)
    write_weights(zoo.build(recipe), tmp_path / "weights.safetensors")
    draw = {"max_new_tokens": 6, "temperature": 0.0, "top_k": None, "seed": 0}
    text = continue_text(tmp_path, "The ", **draw)
    said = ["generate", str(tmp_path), "--tokens", "6", "--temperature", "0", "--mapped", "--json"]
    app(said, standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == {"prompt": "The ", "text": text}
