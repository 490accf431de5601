"""A study on a Ray cluster of two workers ends as it does on one machine alone."""

import pytest
from recipe_toys import timeless
from study_toys import small

from recipes import record
from recipes.planned import PlannedRun, RunFailed
from recipes.study.run import directory_of, run_study

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # the cluster takes half a minute to start


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    found.add_node(num_cpus=1)
    yield found.address
    ray.shutdown()
    found.shutdown()


def test_the_same_numbers_as_on_this_machine_alone(cluster, tmp_path):
    from recipes.study.ray_runs import RayTasks

    keys = {"controls": [], "lrs": [], "seeds": [0, 1]}
    train = RayTasks(cluster)
    assert train.workers(1) == 2
    far = small(tmp_path / "far", **keys)
    assert run_study(far, workers=2, train=train).failures == {}
    near = small(tmp_path / "near", **keys)
    run_study(near, workers=1)
    for run in near.reporting():
        results = [record.read_result(directory_of(plan, run)) for plan in (near, far)]
        assert None not in results
        assert timeless(results[0]) == timeless(results[1])
        assert (directory_of(far, run) / "weights.safetensors").is_file()


def test_a_task_that_fails_says_why(cluster, tmp_path):
    from recipes.study.ray_runs import RayTasks

    run = small(tmp_path, controls=[], lrs=[]).reporting()[0]
    gone = PlannedRun(**{
        "id": run.id, "variant": run.variant,
        "recipe": type(run.recipe)(**{**vars(run.recipe), "init_from": "/nowhere"}),
    })  # fmt: skip
    with pytest.raises(RunFailed, match="no weights at"):
        RayTasks(cluster)(gone, tmp_path / "run")
