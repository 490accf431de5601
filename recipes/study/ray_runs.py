"""Runs as tasks of a Ray cluster, each on some machine of it; results come back to this one."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from recipes import load, record
from recipes.planned import PlannedRun, Processes, RunFailed

STDERR = 2


class RayTasks:
    """Trains each run as a Ray task with as many CPUs as the recipe has threads.

    The machines need this package installed; they need not share a file system: a task trains in
    a folder of its own and hands back what lies there. So a run that is cut off begins anew, where
    one on this machine alone goes on from its checkpoint, and none begins from another's weights.

    May be called from several threads.
    """

    def __init__(self, address: str | None = None):
        """address: of a cluster that runs; None: RAY_ADDRESS, or a cluster of this machine alone.

        Raises:
            ValueError: where Ray is not installed, or no cluster answers.
        """
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError("Ray is not installed: pip install 'moe-zoo[ray]'") from None
        self._ray: Any = ray
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except ConnectionError as error:
                raise ValueError(f"no Ray cluster at {address}: {error}") from None
        self._task = ray.remote(trained)

    def workers(self, threads: int) -> int:
        """Runs that the cluster holds at a time."""
        return max(int(self._ray.cluster_resources().get("CPU", 1)) // threads, 1)

    def __call__(self, run: PlannedRun, directory: Path) -> None:
        threads = run.recipe.trainer.threads or record.cores()
        task = self._task.options(num_cpus=threads, max_retries=2)
        plain = load.to_plain(run.recipe)
        try:
            files = self._ray.get(task.remote(plain, run.variant, run.id))
        except self._ray.exceptions.RayError as error:  # the machine or its process is gone
            raise RunFailed(" ".join(str(error).split())[:300]) from None
        if (reason := files.pop("failed", None)) is not None:
            raise RunFailed(reason.decode())
        last = files.pop("result.json")
        for name, content in files.items():
            _write(directory / name, content)
        _write(directory / "result.json", last)  # the mark of a finished run


def trained(recipe: dict[str, Any], variant: str, run_id: str) -> dict[str, bytes]:
    """Train a run in a folder of its own. Returns its files, or why it failed as "failed"."""
    with TemporaryDirectory() as folder:
        directory = Path(folder) / run_id
        run = PlannedRun(id=run_id, variant=variant, recipe=load.load(recipe))
        record.write_text(directory / "recipe.yaml", load.to_yaml(run.recipe))
        try:
            Processes(STDERR)(run, directory)
        except RunFailed as failure:
            return {"failed": str(failure).encode()}
        return {
            str(path.relative_to(directory)): path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file() and "checkpoints" not in path.parts and path.name[0] != "."
        }


def _write(path: Path, content: bytes) -> None:
    with record.replacing(path) as part:
        part.write_bytes(content)
