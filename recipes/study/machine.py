"""What a machine can do at most: the two numbers of a roofline, measured in a second or so."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from recipes import record
from recipes.report.records import load_json
from recipes.report.strict import read_as
from recipes.study.records import Machine

FILE = "machine.json"  # in a study's directory; one written by hand stands for another machine
SIDE = 1024  # of the matrices multiplied
COPIED_BYTES = 1 << 28  # beyond any cache of a processor
TIMES = 5


def machine_of(directory: Path, threads: int | None = None) -> Machine:
    """The study's machine.json; measured and written where there is none.

    threads: that the runs had, to measure with as many; None: as many as torch has now.
    """
    path = directory / FILE
    if path.is_file():
        return read_as(Machine, load_json(path), str(path))
    found = measured(threads)
    record.write_json(path, asdict(found))
    return found


def measured(threads: int | None = None) -> Machine:
    """This machine's float32 matmul rate and copy bandwidth, by so many threads."""
    import torch  # a report whose machine is known need not wait for it

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        return _measured()
    finally:
        torch.set_num_threads(before)


def _measured() -> Machine:
    import torch

    a, b = (torch.rand(SIDE, SIDE) for _ in range(2))
    out = torch.empty(SIDE, SIDE)
    source = torch.zeros(COPIED_BYTES // 4)
    target = torch.zeros_like(source)
    return Machine(
        name=record.cpu_name(),
        threads=torch.get_num_threads(),
        flops_per_s=2 * SIDE**3 / _fastest(lambda: torch.mm(a, b, out=out)),
        bytes_per_s=2 * COPIED_BYTES / _fastest(lambda: target.copy_(source)),
    )


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several times: a limit is what nothing disturbed."""
    work()
    taken: list[float] = []
    for _ in range(TIMES):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)
