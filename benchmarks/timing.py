"""Ratios that carry over from a shared machine: interleaved rounds, CPU time of one thread."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import torch


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 7, repeats: int = 1
) -> dict[str, list[float]]:
    """CPU seconds a call of each candidate, one figure a round, all candidates in every round."""
    torch.set_num_threads(1)
    for run in candidates.values():
        run()  # compiles, fills caches, touches pages
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.process_time()
            for _ in range(repeats):
                run()
            times[name].append((time.process_time() - start) / repeats)
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of time(name) / time(base), formed inside each round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def machine() -> str:
    """One line on what ran where and when."""
    try:
        with open("/proc/cpuinfo") as info:
            cpu = next(line.split(":")[1].strip() for line in info if "model name" in line)
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return (
        f"{cpu}, one thread, CPU time, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}"
    )


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table that a Markdown page can hold."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
