"""Run stages: the units of work that are not committed yet, through Ray Data, with a progress bar.

In: unit descriptions (small dicts; rows never pass through the driver) and worker classes. Out: the stages' manifests.
Ray starts with the first stage that has work to do: a run that is up to date, or refused, never waits for it.
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
from tqdm import tqdm

from pipeline.config import Cluster, Model
from pipeline.schema import digest
from pipeline.store import Stage, Unit

CODE = Path(__file__).resolve().parent.parent
# What workers do not need of it; the code alone is well under a megabyte.
NOT_CODE = [".git", ".venv", ".models", "runs", "registry", "tests", "benchmarks/results", "**/__pycache__"]
_OBJECT_STORE = 256 << 20  # bytes; rows stay in shards, so only unit names pass through it


def start_ray(cluster: Cluster) -> None:
    """Join the configured cluster, or start a local Ray, unless this process did so before; workers import our code."""
    import ray
    import ray.data

    if ray.is_initialized():
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        # Inside `ray job submit` the job's own working directory is already set.
        inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        ray.init(
            address,
            log_to_driver=False,
            runtime_env={} if inside_job else {"working_dir": str(CODE), "excludes": NOT_CODE},
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


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Leave Ray, if it was started, at the end of the block; a local one ends with it."""
    try:
        yield
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


class Worker(Protocol):
    """Built from keyword arguments inside an actor; `do_unit` commits the unit and returns it."""

    def do_unit(self, unit: dict[str, Any]) -> Unit: ...


@dataclass(frozen=True)
class Job:
    """A stage, all that decides its rows, its units of work (each with a unique `name`), and who does them."""

    stage: Stage
    settings: dict[str, Any]
    units: Iterable[dict[str, Any]]
    worker: type[Worker]
    arguments: dict[str, Any]
    max_reject_share: float = 1.0  # of its rows; a stage that rejects more fails

    @property
    def settings_digest(self) -> str:
        """What a stage that reads this one's rows depends on; known before there are any."""
        return digest(json.dumps(self.settings, sort_keys=True))


@dataclass(frozen=True)
class Actors:
    """What stages ask Ray for: at most `count` actors of this size, or one for each CPU of the cluster.

    With a `model`, every actor loads an engine, which all its workers get as `engine`.
    """

    cluster: Cluster
    count: int | None = None
    cpus: float = 1
    gpus: float = 0
    model: Model | None = None
    top_k: int = 0


class _UnitActor:
    """What Ray Data calls: a row with the JSON of [job, unit] pairs in, a row with that of the committed units out."""

    def __init__(self, jobs: list[tuple[type[Worker], dict[str, Any]]], actors: Actors) -> None:
        shared = {}
        if actors.model is not None:
            from pipeline.engine import Engine

            shared["engine"] = Engine(actors.model, actors.cluster, actors.top_k)
        self._workers = [worker(**arguments, **shared) for worker, arguments in jobs]

    def __call__(self, batch: pa.Table) -> pa.Table:
        (text,) = batch["work"].to_pylist()
        done = [asdict(self._workers[job].do_unit(unit)) for job, unit in json.loads(text)]
        return pa.table({"done": [json.dumps(done)]})


def run_stages(jobs: list[Job], actors: Actors, redo: bool = False) -> list[dict[str, Any]]:
    """Bring the stages to completion in one pass and return their manifests.

    Units of the same name are done by the same actor, in the order of the jobs: a later one may read what an earlier
    one wrote. Raises ValueError if a stage was made with other settings, or when it rejects too large a share of rows.
    """
    opened = []
    for job in jobs:
        if job.stage.open(job.settings, redo):
            opened.append(job)
        else:
            print(f"{job.stage.name}: up to date", file=sys.stderr)
    if opened:
        start_ray(actors.cluster)
        started = time.monotonic()
        work: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        total = 0
        for number, job in enumerate(opened):
            committed = job.stage.committed()
            for unit in job.units:
                total += 1
                if unit["name"] not in committed:
                    work.setdefault(unit["name"], []).append((number, unit))
        left = sum(map(len, work.values()))
        name = ", ".join(job.stage.name for job in opened)
        with tqdm(total=total, initial=total - left, desc=name, unit="unit") as bar:
            for done in _map_work(list(work.values()), opened, actors):
                bar.update(done)
        seconds = time.monotonic() - started
        busy = [job.stage.totals()["stats"].get("engine_seconds", 0.0) for job in opened]
        for job, share in zip(opened, busy, strict=True):
            part = share / sum(busy) if sum(busy) else 1 / len(opened)
            _close(job, seconds * part)
    return [job.stage.require() for job in jobs]


def run_stage(job: Job, actors: Actors, redo: bool = False) -> dict[str, Any]:
    """Bring one stage to completion and return its manifest."""
    return run_stages([job], actors, redo)[0]


def _close(job: Job, seconds: float) -> None:
    stage = job.stage
    manifest = stage.close(seconds)
    rejected = sum(manifest["rejected"].values())
    if rejected > job.max_reject_share * max(1, rejected + manifest["rows_out"]):
        stage.folder.delete_file("manifest.json")
        raise ValueError(
            f"stage {stage.name} rejected {rejected} of {rejected + manifest['rows_out']} rows "
            f"({manifest['rejected']}), more than max_reject_share = {job.max_reject_share}; look at "
            f"{stage.folder}/rejected, or raise max_reject_share"
        )


def _map_work(work: list[list[tuple[int, dict[str, Any]]]], jobs: list[Job], actors: Actors) -> Iterator[int]:
    """Yield how many units each finished piece of work had."""
    if not work:
        return
    import ray.data

    count = actors.count or int(ray.cluster_resources().get("CPU", 1))
    # One block per unit makes each a task of its own; a repartition would wait for a core that the engines hold.
    blocks = [pa.table({"work": [json.dumps(pairs)]}) for pairs in work]
    dataset = ray.data.from_arrow(blocks).map_batches(
        _UnitActor,
        fn_constructor_kwargs={"jobs": [(job.worker, job.arguments) for job in jobs], "actors": actors},
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(count, len(work)), max_tasks_in_flight_per_actor=2),
        num_cpus=actors.cpus,
        num_gpus=actors.gpus,
    )
    for row in dataset.iter_rows():
        yield len(json.loads(row["done"]))
