"""Two processes that go through many small runs, for what starting them costs: `python DIR RANK`.

DIR/plan.json lists [name, recipe, out, step to be killed after or null, port]; what is not a run
is a function of this file. Each writes DIR/NAME.json.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import zoo
from recipes.callbacks import SaveLast
from recipes.launch import free_port
from recipes.load import load
from recipes.parallel import LocalAdamW, clip_gradients
from recipes.train import train
from zoo.parallel import DATA, EXPERTS, parallelize, whole

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 300  # of all runs together; a hang is an error
MODEL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}


class Killed(Exception):
    """In place of a signal."""


@contextmanager
def cut_after(step: int | None):
    """Training ends as if killed right after `step`, checkpoint of that step included."""
    original = SaveLast.on_train_batch_end

    def hook(self, trainer, pl_module, outputs, batch, batch_idx):
        original(self, trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == step and not (batch_idx + 1) % trainer.accumulate_grad_batches:
            raise Killed

    SaveLast.on_train_batch_end = hook
    try:
        with suppress(Killed):
            yield
    finally:
        SaveLast.on_train_batch_end = original


@contextmanager
def brief():
    """A sample of one token."""
    import recipes.train

    before = recipes.train.SAMPLE_TOKENS
    recipes.train.SAMPLE_TOKENS = 1
    try:
        yield
    finally:
        recipes.train.SAMPLE_TOKENS = before


# What is checked without a trainer; each returns what rank 0 writes


def model_of(ffn: dict[str, Any], precision: str = "fp32") -> zoo.LanguageModel:
    torch.manual_seed(0)
    return zoo.build({"model": MODEL | {"ffn": ffn}, "precision": precision})


def step_of(model: zoo.LanguageModel, tokens: torch.Tensor) -> float:
    """Loss of a forward and backward pass."""
    out = model(tokens)
    loss = out.logits.float().logsumexp(-1).square().mean()
    loss = loss + sum(out.losses.values())
    loss.backward()
    return loss.item()


def mesh_of(n_experts: int) -> Any:
    shape = (dist.get_world_size() // n_experts, n_experts)
    return dist.init_device_mesh("cpu", shape, mesh_dim_names=(DATA, EXPERTS))


def pair(ffn: Any, n_experts: int) -> tuple[Any, Any, torch.Tensor]:
    """The same model whole and sharded, and the batch of all. "tied": blocks that share an FFN."""
    tied, ffn = ffn == "tied", "mlp" if ffn == "tied" else ffn
    one, many = model_of(ffn), model_of(ffn)
    if tied:
        for model in (one, many):
            model.blocks[1].ffn = model.blocks[0].ffn
    parallelize(many, mesh_of(n_experts))
    tokens = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(1))
    return one, many, tokens


MOE = {"name": "moe", "n_experts": 4, "d_expert": 16}
MOE_PLUS_PLUS = {"name": "moe_plus_plus", "n_experts": 4, "d_expert": 16}
BIASES = {"name": "gpt_oss_moe", "n_experts": 4, "top_k": 2, "d_expert": 16}
RING = {
    "name": "ultramem_v2", "d_ff": 48, "n_keys": 4, "top_k": 4, "d_key": 4, "pool": "ring",
}  # fmt: skip
KINDS = {
    "moe": MOE, "moe_plus_plus": MOE_PLUS_PLUS, "shared": MOE | {"n_shared": 1}, "biases": BIASES,
    "tied": "tied", "pool": RING,
}  # fmt: skip
DENSE = ("tied", "pool")  # kinds without experts


def gradients() -> dict[str, Any]:
    """Names of gradients that are not those of one process to the bit, by kind and axis."""
    world, found = dist.get_world_size(), {}
    for kind, ffn in KINDS.items():
        for axis, n_experts in (("data", 1), ("experts", 2))[: 1 if kind in DENSE else 2]:
            one, many, tokens = pair(ffn, n_experts)
            parts = tokens.chunk(world // n_experts)
            for part in parts:
                step_of(one, part)
            step_of(many, parts[dist.get_rank() // n_experts])
            found[f"{kind} {axis}"] = [
                name
                for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True)
                if not same(whole(q.grad), p.grad / len(parts), exact=len(parts) <= 2)
            ]
    return found


def same(a: torch.Tensor, b: torch.Tensor, *, exact: bool) -> bool:
    """More than two batches are added in another order."""
    return torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def clipping() -> dict[str, Any]:
    """Norms before and after, of one process and sharded; and whether gradients agree."""
    found = {}
    for axis, n_experts in (("data", 1), ("experts", 2)):
        one, many, tokens = pair(MOE_PLUS_PLUS, n_experts)
        parts = tokens.chunk(3 - n_experts)
        for part in parts:
            step_of(one, part)
        for p in one.parameters():
            p.grad /= len(parts)
        step_of(many, parts[dist.get_rank() // n_experts])
        norms = [torch.nn.utils.clip_grad_norm_(one.parameters(), 0.01)]
        norms.append(clip_gradients(many.parameters(), 0.01))
        grads = [whole(q.grad) for q in many.parameters()]
        norms.append(torch.nn.utils.get_total_norm(grads))
        for p, g in zip(one.parameters(), grads, strict=True):
            torch.testing.assert_close(g, p.grad, rtol=1e-6, atol=0)
        found[axis] = [norm.item() for norm in norms]
    return found


def dead() -> dict[str, Any]:
    """All tokens to the first rank's experts: largest gradients by expert, and after a step."""
    one, many, tokens = pair(MOE, 2)
    for model in (one, many):
        for block in model.blocks:
            block.ffn.router.register_forward_hook(
                lambda module, args, out: out._replace(experts=out.experts % 2)
            )
    optimizer = LocalAdamW.of(torch.optim.AdamW(many.parameters(), fused=True))
    before = [whole(p).detach().clone() for p in many.parameters()]
    assert step_of(many, tokens) == step_of(one, tokens)
    found: dict[str, Any] = {"largest": {}, "unequal": [], "unmoved": []}
    for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
        grad = whole(q.grad)
        if not torch.equal(grad, p.grad):
            found["unequal"].append(name)
        if ".experts." in name:
            found["largest"][name] = grad.abs().amax((1, 2)).tolist()
    optimizer.step()
    for (name, p), old in zip(many.named_parameters(), before, strict=True):
        moved = whole(p).detach() != old
        if not (moved.flatten(1).any(1).all() if ".experts." in name else moved.any()):
            found["unmoved"].append(name)
    return found


def moved() -> dict[str, Any]:
    """Names of expert stacks of which some expert stands still after a step."""
    found = {}
    for axis, n_experts in (("data", 1), ("experts", 2)):
        _, many, tokens = pair(MOE, n_experts)
        optimizer = LocalAdamW.of(torch.optim.AdamW(many.parameters(), weight_decay=0, fused=True))
        before = {n: whole(p).detach().clone() for n, p in many.named_parameters()}
        step_of(many, tokens)
        optimizer.step()
        after = {n: whole(p).detach() for n, p in many.named_parameters() if ".experts." in n}
        assert len(after) == 4
        found[axis] = [n for n, p in after.items() if not (p != before[n]).any(2).any(1).all()]
    return found


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f for f in (gradients, clipping, dead, moved)
}


def ranks(
    directory: Path,
    plan: list[tuple[str, Any, str | None, int | None]],
    world: int = 2,
    script: str = __file__,
) -> None:
    """Go through the plan with so many processes, within a timeout; raise where one fails.

    script: whose `main` they run, with checks of its own.
    """
    settled = [[*row, free_port()] for row in plan]
    (directory / "plan.json").write_text(json.dumps(settled))
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "WORLD_SIZE": str(world)}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning:torch", script, str(directory)]
    logs = [directory / f"rank-{rank}.txt" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("wb") as file:
            processes.append(
                subprocess.Popen(
                    [*command, str(rank)], cwd=ROOT, stdout=file, stderr=file,
                    env=shared | {"LOCAL_RANK": str(rank), "RANK": str(rank)},
                )
            )  # fmt: skip
    try:
        statuses = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
    assert statuses == [0] * world, said


def main() -> None:
    directory, rank, world = Path(sys.argv[1]), int(sys.argv[2]), os.environ["WORLD_SIZE"]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name, recipe, out, step, port in json.loads((directory / "plan.json").read_text()):
        os.environ |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        print(name, flush=True)
        if recipe is not None:
            with brief(), cut_after(step):
                train(load(recipe), directory / out)
            continue
        dist.init_process_group("gloo")
        found = CHECKS[name]()
        if rank == 0:
            (directory / f"{name}.json").write_text(json.dumps(found))
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
