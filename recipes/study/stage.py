"""One stage of a study: its runs several at a time, each after the one that it begins from."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes import record
from recipes.planned import Processes, RunFailed, Train, ensure, finished
from recipes.study.begin import Begin
from recipes.study.plan import StudyPlan, StudyRun
from recipes.study.records import FAILURES

Make = Callable[[Path, Path, Begin], None]  # a finished run's directory, where to, how


@dataclass
class Progress:
    """How far a study is; what a display reads."""

    stage: str = ""
    total: int = 0  # runs of the stage
    done: int = 0  # finished, now or before
    kept: int = 0  # of these, before
    failures: dict[str, str] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)  # id to the time it began, monotonic
    last: str = ""  # what ended last, in words


def directory_of(plan: StudyPlan, run: StudyRun) -> Path:
    """Where a run lies."""
    return plan.out / "runs" / run.id


class Stages:
    """Trains the runs of a study's stages, one stage after the other."""

    def __init__(
        self, plan: StudyPlan, workers: int, train: Train, begin: Make,
        show: Callable[[Progress], None],
    ):  # fmt: skip
        """workers: runs at a time; begin: how a run is converted that another begins from."""
        self.plan, self.workers, self.train, self.begin = plan, workers, train, begin
        self.show = show
        self.progress = Progress()
        # by id of a run that ended: why no other can begin from it, None where one can
        self._ended: dict[str, str | None] = {}
        self._going: dict[Future[dict[str, Any]], StudyRun] = {}

    def go(self, stage: str, runs: Sequence[StudyRun]) -> None:
        """Whatever is missing of a stage's runs; what they begin from is among them."""
        kept = {run.id: finished(run, directory_of(self.plan, run)) for run in runs}
        self._ended = {run_id: _why_not(done) for run_id, done in kept.items() if done is not None}
        waiting = [run for run in runs if run.id not in self._ended]
        p = self.progress
        p.stage, p.total, p.last, p.running = stage, len(runs), "", {}
        p.done = p.kept = len(self._ended)
        self.show(p)
        pool = ThreadPoolExecutor(self.workers)
        try:
            while waiting or self._going:
                waiting = self._start(waiting, pool)
                self.show(p)
                for future in wait(self._going, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    self._take(future)
        except BaseException:
            if isinstance(self.train, Processes):
                self.train.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        pool.shutdown()

    def _start(self, waiting: Sequence[StudyRun], pool: ThreadPoolExecutor) -> list[StudyRun]:
        """Begin what can be begun now. Returns what has to wait."""
        left: list[StudyRun] = []
        for run in waiting:
            ready = run.source is None or run.source in self._ended
            why = self._ended.get(run.source) if run.source else None
            if why is not None:
                self._fail(run, f"not begun, because {run.source} {why}")
            elif ready and len(self._going) < self.workers:
                self._going[pool.submit(self._trained, run)] = run
                self.progress.running[run.id] = time.monotonic()
            else:
                left.append(run)
        return left

    def _trained(self, run: StudyRun) -> dict[str, Any]:
        if run.begin is not None and run.begin.to is not None:
            source = self.plan.out / "runs" / str(run.source)
            self.begin(source, Path(str(run.recipe.init_from)), run.begin)
        return ensure(run, directory_of(self.plan, run), self.train)

    def _take(self, future: Future[dict[str, Any]]) -> None:
        """What came of a run."""
        run = self._going.pop(future)
        seconds = time.monotonic() - self.progress.running.pop(run.id)
        try:
            done = future.result()
        except RunFailed as failure:
            self._fail(run, str(failure))
            return
        why = _why_not(done)
        told = why or f"{done['final']['bpb']:.4f} bits/byte"
        self._end(run, f"{told}, {seconds:.0f} s", why)

    def _fail(self, run: StudyRun, reason: str) -> None:
        self.progress.failures[run.id] = reason
        record.write_json(self.plan.out / FAILURES, self.progress.failures)
        self._end(run, f"failed: {reason}", "failed")

    def _end(self, run: StudyRun, told: str, why: str | None) -> None:
        self._ended[run.id] = why
        self.progress.done += 1
        self.progress.last = f"{run.id}: {told}"
        self.show(self.progress)


def _why_not(done: Mapping[str, Any]) -> str | None:
    """Why nothing can begin from that run; None where it can."""
    return "diverged" if done["final"]["bpb"] is None else None
