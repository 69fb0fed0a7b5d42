"""What a run asks of a cluster, and what is said where the cluster has not got it."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from cluster.resources import demands, model_fits, unmet
from cluster.submit import refuse_relative_paths, submit
from pipeline.config import Config
from tests.conftest import ROOT

GIB = 1 << 30


def config(**cluster: Any) -> Config:
    return Config.model_validate(
        {
            "run_dir": "/runs/a",
            "model": {"path": "/models/a"},
            "read": {"paths": ["/docs"]},
            "publish": {"registry": "/registry", "name": "a"},
            "cluster": cluster,
        }
    )


def missing(nodes: list[dict[str, float]], **cluster: Any) -> list[str]:
    return [text for demand in demands(config(**cluster)) if (text := unmet(demand, nodes))]


def test_a_laptop_is_enough_for_the_defaults() -> None:
    assert missing([{"CPU": 2}]) == []


def test_engines_may_be_fewer_and_workers_may_not() -> None:
    nodes = [{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}]
    assert missing(nodes, num_engines=16, engine_gpus=1, num_workers=2, worker_gpus=1) == []
    (text,) = missing(nodes, num_engines=16, engine_gpus=1, num_workers=3, worker_gpus=1)
    assert "stage train needs 3 x (2 CPU cores and 1 GPUs)" in text and "room for 2" in text
    assert "cluster.num_workers" in text


def test_no_gpu_where_one_is_asked_for() -> None:
    (text,) = missing([{"CPU": 64}], engine_gpus=1)
    assert "stage write" in text and "the largest node has 64 CPU cores, 0 GPUs" in text


def test_tensor_parallelism_stays_on_a_node() -> None:
    nodes = [{"CPU": 32, "GPU": 4}] * 4
    assert missing(nodes, engine_gpus=4) == []
    (text,) = missing(nodes, engine_gpus=8)
    assert "8 GPUs" in text and "cluster.num_engines, engine_gpus" in text


def test_no_nodes_at_all() -> None:
    assert len(missing([])) == 2


def test_a_model_that_does_not_fit() -> None:
    assert model_fits(config(engine_gpus=1), 14 * GIB, 24 * GIB) is None
    text = model_fits(config(engine_gpus=2), 140 * GIB, 80 * GIB)
    assert text and "140.0 GiB" in text and "set cluster.engine_gpus to 3 or more" in text
    assert model_fits(config(engine_gpus=3), 140 * GIB, 80 * GIB) is None
    assert model_fits(config(), 140 * GIB, 0) is None, "the CPU build needs no GPU"


GOOD = """
run_dir = "s3://bucket/run"
[model]
path = "/models/a"
[read]
paths = ["s3://bucket/docs", "~/docs"]
[publish]
registry = "s3://bucket/registry"
"""


@pytest.mark.parametrize("inside", [None, "runs"])
def test_a_config_that_would_stay_behind_is_refused(tmp_path: Path, inside: str | None) -> None:
    config = (ROOT / inside if inside else tmp_path) / "corpus.toml"
    with pytest.raises(ValueError, match="does not travel to the cluster"):
        submit(str(config), [], None)


def test_paths_must_mean_the_same_on_every_node() -> None:
    refuse_relative_paths(tomllib.loads(GOOD), [])
    for field, text in {
        "run_dir": GOOD.replace("s3://bucket/run", "runs/a"),
        "model.path": GOOD.replace("/models/a", "models/a"),
        "read.paths": GOOD.replace("s3://bucket/docs", "docs"),
        "publish.registry": GOOD.replace("s3://bucket/registry", "./registry"),
    }.items():
        with pytest.raises(ValueError, match=f"{field} = .* is relative"):
            refuse_relative_paths(tomllib.loads(text), [])
    with pytest.raises(ValueError, match=r"run_dir = 'here' is relative"):
        refuse_relative_paths(tomllib.loads(GOOD), ["run_dir=here"])
    refuse_relative_paths(tomllib.loads(GOOD.replace("s3://bucket/run", "runs/a")), ["run_dir=s3://bucket/run"])
