"""Run one stage: the units of work that are not committed yet, through Ray Data, with a progress bar.

In: unit descriptions (small dicts; rows never pass through the driver) and a worker class. Out: the stage's manifest.
A worker is built once per actor and called once per unit: it reads the unit's rows, works and commits. An actor that
dies is replaced by Ray Data and its unit redone; units committed by an earlier run are left out at the source.
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray
import ray.data
from tqdm import tqdm

from pipeline.config import Cluster
from pipeline.store import Stage, Unit

_ROOT = Path(__file__).resolve().parent.parent
_EXCLUDES = [".venv", ".git", "runs", "benchmarks", "tests"]
_OBJECT_STORE = 256 << 20  # bytes; rows stay in shards, so only unit names pass through it


@contextlib.contextmanager
def ray_session(cluster: Cluster) -> Iterator[None]:
    """Join the configured cluster, or start a local Ray that ends with the block; workers import our code."""
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        # Inside `ray job submit` the job's own working directory is already set.
        inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        ray.init(
            address,
            log_to_driver=False,
            runtime_env={} if inside_job else {"working_dir": str(_ROOT), "excludes": _EXCLUDES},
        )
    else:
        cores = max(os.cpu_count() or 1, cluster.engine_cpus, cluster.worker_cpus)
        ray.init(
            num_cpus=cores,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE,
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


class Worker(Protocol):
    """Built from keyword arguments inside an actor; `do_unit` commits the unit and returns it."""

    def do_unit(self, unit: dict[str, Any]) -> Unit: ...


@dataclass(frozen=True)
class Actors:
    """What a stage asks Ray for: at most `count` actors of this size."""

    count: int
    cpus: float = 1
    gpus: float = 0


class _UnitActor:
    """What Ray Data calls: one row holding a unit's JSON in, one row holding the committed unit's JSON out."""

    def __init__(self, worker: type[Worker], arguments: dict[str, Any]) -> None:
        self._worker = worker(**arguments)

    def __call__(self, batch: pa.Table) -> pa.Table:
        (text,) = batch["unit"].to_pylist()
        return pa.table({"unit": [json.dumps(asdict(self._worker.do_unit(json.loads(text))))]})


def run_stage(
    stage: Stage,
    settings: dict[str, Any],
    units: Iterable[dict[str, Any]],
    worker: type[Worker],
    arguments: dict[str, Any],
    actors: Actors,
    max_reject_share: float,
    redo: bool = False,
) -> dict[str, Any]:
    """Bring the stage to completion and return its manifest; each unit has a `name` that is unique in the stage.

    Raises ValueError if the stage was made with other settings, or when too large a share of its rows is rejected.
    """
    if not stage.open(settings, redo):
        print(f"{stage.name}: up to date", file=sys.stderr)
        manifest = stage.manifest()
        assert manifest is not None, f"{stage.name} is complete but has no manifest"
        return manifest
    started = time.monotonic()
    units = list(units)
    committed = stage.committed()
    todo = [unit for unit in units if unit["name"] not in committed]
    with tqdm(total=len(units), initial=len(units) - len(todo), desc=stage.name, unit="unit") as bar:
        for _ in _map_units(todo, worker, arguments, actors):
            bar.update()
    manifest = stage.close(time.monotonic() - started)
    rejected = sum(manifest["rejected"].values())
    if rejected > max_reject_share * max(1, rejected + manifest["rows_out"]):
        stage.folder.delete_file("manifest.json")
        raise ValueError(
            f"stage {stage.name} rejected {rejected} of {rejected + manifest['rows_out']} rows "
            f"({manifest['rejected']}), more than max_reject_share = {max_reject_share}; look at "
            f"{stage.folder}/rejected, or raise max_reject_share"
        )
    return manifest


def _map_units(
    todo: list[dict[str, Any]], worker: type[Worker], arguments: dict[str, Any], actors: Actors
) -> Iterable[Unit]:
    if not todo:
        return
    # One block per unit makes each a task of its own; a repartition would wait for a core that the engines hold.
    blocks = [pa.table({"unit": [json.dumps(unit)]}) for unit in todo]
    dataset = ray.data.from_arrow(blocks).map_batches(
        _UnitActor,
        fn_constructor_kwargs={"worker": worker, "arguments": arguments},
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=min(actors.count, len(todo)), max_tasks_in_flight_per_actor=2
        ),
        num_cpus=actors.cpus,
        num_gpus=actors.gpus,
    )
    for row in dataset.iter_rows():
        yield Unit(**json.loads(row["unit"]))
