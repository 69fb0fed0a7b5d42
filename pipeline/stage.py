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
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from tqdm import tqdm

from pipeline.config import Cluster
from pipeline.resources import cluster_address, this_machine
from pipeline.store import PROGRESS_S, Stage, Unit

logger = logging.getLogger(__name__)

CODE = Path(__file__).resolve().parent.parent
# What workers do not need of it; the code alone is well under a megabyte.
NOT_CODE = [".git", ".venv", ".models", "models", "runs", "registry", "tests", "benchmarks/results", "**/__pycache__"]
_OBJECT_STORE = 256 << 20  # bytes; rows stay in shards: what passes through it are unit names, signatures and replies
SMALL_PIECES = 128  # the work ends with so many pieces, at least, of a single unit
WATCHED_STAGES = 64  # of more than these, their units move the bar
MAX_DEATHS = 8  # of actors over the same piece of work; with one more, the run gives up


def start_ray(cluster: Cluster) -> None:
    """Join the configured cluster, or start a local Ray, unless this process did so before; workers import our code."""
    import ray
    import ray.data

    if ray.is_initialized():
        return
    if address := cluster_address(cluster):
        # Inside `ray job submit` the job's own working directory is already set.
        inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        ray.init(
            address,
            log_to_driver=False,
            runtime_env={} if inside_job else {"working_dir": str(CODE), "excludes": NOT_CODE},
        )
    else:
        ray.init(
            "local",  # unset, it would join, or look for, the last cluster that was started on this machine
            num_cpus=this_machine(cluster)["Resources"]["CPU"],
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE,
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # what they advise is for whoever writes the code
    # Counting an actor's own pages every second takes 84 ms of a core in one that holds 4 GB, as an engine does.
    context.memory_usage_poll_interval_s = None
    # A unit may take hours on a CPU, and so may the wait for a node; Ray Data would give up after half an hour.
    context.execution_no_progress_timeout_s = -1
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


@dataclass(frozen=True)
class Actors:
    """What stages ask Ray for: at most `count` actors, or one for each CPU of the cluster, with Ray's `options`.

    With `load_engine`, every actor calls it once, and all its workers get what it returns as `engine`.
    """

    cluster: Cluster
    count: int | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"num_cpus": 1})
    load_engine: Callable[[], Any] | None = None


class _UnitActor:
    """What Ray Data calls: a row with a line of JSON per [job, unit] in, a row with that of the committed units out.

    Where one fails stands its run, and why; an actor does no more of that run, and goes on with the others.
    """

    def __init__(self, jobs: list[tuple[Stage, type[Worker], dict[str, Any]]], actors: Actors) -> None:
        # Ray would load models in one thread and call them in another. OpenMP gives each thread that computes a team of
        # its own, and two teams on the same cores put each other to sleep at every barrier: a third of the speed.
        self._thread = ThreadPoolExecutor(1)
        self._engine: Any = self._thread.submit(actors.load_engine).result() if actors.load_engine else None
        self._workers = self._thread.submit(self._make_workers, jobs).result()
        self._failed: set[str] = set()  # runs

    def __call__(self, batch: pa.Table) -> pa.Table:
        (text,) = batch["work"].to_pylist()
        return pa.table({"done": [self._thread.submit(self._do_units, text).result()]})

    def _make_workers(self, jobs: list[tuple[Stage, type[Worker], dict[str, Any]]]) -> list[tuple[Stage, Worker]]:
        shared = {"engine": self._engine} if self._engine else {}
        return [(stage, worker(**arguments, **shared)) for stage, worker, arguments in jobs]

    def _do_units(self, text: str) -> str:
        done = []
        for job, unit in map(json.loads, text.splitlines()):
            stage, worker = self._workers[job]
            if stage.run_dir in self._failed:
                continue
            try:
                done.append(asdict(self._do_unit(stage, worker, unit)))
            except Exception as error:
                logger.exception("unit %s of %s", unit["name"], stage.folder)
                self._failed.add(stage.run_dir)
                known = isinstance(error, ValueError)
                what = str(error) if known else f"{type(error).__name__}: {error} (Ray's log has the traceback)"
                done.append({"run_dir": stage.run_dir, "error": f"stage {stage.name}, unit {unit['name']}: {what}"})
        return json.dumps(done)

    def _do_unit(self, stage: Stage, worker: Worker, unit: dict[str, Any]) -> Unit:
        from pipeline.metrics import record_unit

        # Another actor may have died in the midst of this piece of work.
        committed = stage.find_unit(unit["name"])
        if committed is None:
            if self._engine:
                self._engine.on_progress = partial(stage.write_progress, unit["name"])
            committed = worker.do_unit(unit)
            record_unit(stage, committed)
        return committed


@contextlib.contextmanager
def watching(look: Callable[[], None], every_s: float = PROGRESS_S / 2) -> Iterator[None]:
    """Call `look` every so many seconds of the block, from a thread, and once at its end."""
    is_over = threading.Event()

    def watch() -> None:
        is_last = False
        while not is_last:
            is_last = is_over.wait(every_s)
            with contextlib.suppress(OSError):
                look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def show_progress(stages: list[Stage], bar: tqdm) -> None:
    """Show beside the bar how many requests the engines have finished of those of their units."""
    sums: dict[str, Counter[str]] = {}
    for stage in stages if len(stages) <= WATCHED_STAGES else []:
        sums.setdefault(stage.name, Counter()).update(stage.read_progress())
    texts = [f"{name} {of['finished']}/{of['requests']} requests" for name, of in sums.items() if of]
    bar.set_postfix_str(", ".join(texts))


def attempt(call: Callable[[], Any]) -> Any:
    """Return what the call returns, or the ValueError that it raises."""
    try:
        return call()
    except ValueError as error:
        return error


def run_stages(jobs: list[Job], actors: Actors, redo: bool = False) -> list[Any]:
    """Bring the stages to completion in one pass; return for each its manifest, or the ValueError that stands for it.

    Units of the same name in one run are done by the same actor, in the order of the jobs: a later one may read what an
    earlier one wrote. It is an error if a stage was made with other settings, or if it rejects too large a share of its
    rows; what is built on a refused stage is not begun, and all others are completed all the same.
    """
    outcomes: list[Any] = []
    refused: dict[str, ValueError] = {}  # by run: what is built on a refused stage is not done either
    for job in jobs:
        run_dir = job.stage.run_dir
        outcome = refused.get(run_dir) or attempt(partial(job.stage.open, job.settings, redo))
        if isinstance(outcome, ValueError):
            refused[run_dir] = outcome
        outcomes.append(outcome)
    opened = {number: jobs[number] for number, outcome in enumerate(outcomes) if outcome is True}
    for job, outcome in zip(jobs, outcomes, strict=True):
        if outcome is False:
            print(f"{job.stage.name}: up to date", file=sys.stderr)
    if opened:
        start_ray(actors.cluster)
        started = time.monotonic()
        failed: dict[str, ValueError] = {}  # by run
        work: dict[tuple[str, str], str] = {}  # run and unit's name -> a line of JSON for each job
        total = left = 0
        for place, job in enumerate(opened.values()):
            committed = job.stage.committed()
            for unit in job.units:
                total += 1
                if unit["name"] not in committed:
                    left += 1
                    key = (job.stage.run_dir, unit["name"])
                    work[key] = work.get(key, "") + json.dumps([place, unit]) + "\n"
        name = ", ".join(dict.fromkeys(job.stage.name for job in opened.values()))
        at_engines = [job.stage for job in opened.values()] if actors.load_engine else []
        with (
            tqdm(total=total, initial=total - left, desc=name, unit="unit") as bar,
            watching(partial(show_progress, at_engines, bar)),
        ):
            for done in _map_work(list(work.values()), list(opened.values()), actors):
                bar.update(sum("error" not in one for one in done))
                failed |= {one["run_dir"]: ValueError(one["error"]) for one in done if "error" in one}
        seconds = time.monotonic() - started
        totals = {number: job.stage.totals() for number, job in opened.items()}
        busy = {number: sums["stats"].get("engine_seconds", 0.0) for number, sums in totals.items()}
        all_busy = sum(busy.values())
        for number, job in opened.items():
            part = busy[number] / all_busy if all_busy else 1 / len(opened)
            close = partial(_close, job, seconds * part, totals[number])
            outcomes[number] = failed.get(job.stage.run_dir) or attempt(close)
    return [
        outcome if isinstance(outcome, ValueError) else job.stage.require()
        for job, outcome in zip(jobs, outcomes, strict=True)
    ]


def run_alike(jobs: Iterable[Callable[[], Job]], actors: Actors, redo: bool = False) -> list[Any]:
    """Run a stage of several corpora in one pass; what makes a job may raise the ValueError that then stands for it."""
    made = [attempt(job) for job in jobs]
    outcomes = iter(run_stages([job for job in made if isinstance(job, Job)], actors, redo))
    return [next(outcomes) if isinstance(job, Job) else job for job in made]


def only(outcomes: list[Any]) -> Any:
    """Return the only outcome of a call for several, or raise it."""
    (outcome,) = outcomes
    if isinstance(outcome, ValueError):
        raise outcome
    return outcome


def in_turns(
    groups: list[Any], at_a_time: int, submit: Callable[[Any], list[Any]]
) -> Iterator[tuple[Any, list[Any], float]]:
    """Yield each group as it is done, with the results of the Ray tasks that `submit` started for it, and its seconds.

    The last of these tasks ends last. So many groups are worked on at a time; the next one waits for one of them.
    """
    import ray

    waiting = list(groups)
    running: dict[Any, tuple[Any, list[Any], float]] = {}
    while waiting or running:
        while waiting and len(running) < at_a_time:
            group = waiting.pop(0)
            submitted = submit(group)
            running[submitted[-1]] = (group, submitted, time.monotonic())
        (done,), _ = ray.wait(list(running))
        group, submitted, started = running.pop(done)
        yield group, ray.get(submitted), time.monotonic() - started


def _close(job: Job, seconds: float, totals: dict[str, Any]) -> None:
    stage, rows, rejected = job.stage, totals["rows_out"], sum(totals["rejected"].values())
    if rejected > job.max_reject_share * max(1, rejected + rows):
        raise ValueError(
            f"stage {stage.name} rejected {rejected} of {rejected + rows} rows ({totals['rejected']}), more than "
            f"max_reject_share = {job.max_reject_share}; look at {stage.folder}/rejected, or raise max_reject_share"
        )
    stage.close(seconds, totals=totals)


def _pieces(work: list[str], num_actors: int) -> Iterator[str]:
    """Yield the work in a bounded number of pieces, whose size falls to one unit, so that no actor ends late.

    Ray Data keeps some kilobytes in the driver for every piece that it was ever given.
    """
    start, small = 0, max(SMALL_PIECES, 4 * num_actors)
    while start < len(work):
        end = start + max(1, (len(work) - start) // small)
        yield "".join(work[start:end])
        start = end


def _map_work(work: list[str], jobs: list[Job], actors: Actors) -> Iterator[list[dict[str, Any]]]:
    """Yield what became of the units of each finished piece of work."""
    if not work:
        return
    import ray.data
    import ray.exceptions
    from ray.util.annotations import RayDeprecationWarning

    count = actors.count or int(ray.cluster_resources().get("CPU", 1))
    # One block per piece makes each a task of its own; a repartition would wait for a core that the engines hold.
    pieces = [{"work": piece} for piece in _pieces(work, count)]
    dataset = ray.data.from_items(pieces, override_num_blocks=len(pieces))
    # All of them from the start: a pool that grows asks for no more than the cluster has, and for a node at a time.
    # Those without room wait, for which an autoscaler adds nodes; the others work.
    pool = ray.data.ActorPoolStrategy(size=min(count, len(pieces)), max_tasks_in_flight_per_actor=2)
    with warnings.catch_warnings():
        # Ray deprecates this way to give `max_task_retries`, without which it retries forever, and has no other yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = dataset.map_batches(
            _UnitActor,
            fn_constructor_kwargs={"jobs": [(job.stage, job.worker, job.arguments) for job in jobs], "actors": actors},
            batch_size=None,
            batch_format="pyarrow",
            compute=pool,
            max_task_retries=MAX_DEATHS,
            **actors.options,
        )
    try:
        for row in dataset.iter_rows():
            yield json.loads(row["done"])
    except ray.exceptions.RayActorError as error:
        # Pieces are begun in order, and the others went on meanwhile: one that kills its actors is the first left.
        begun = ((jobs[job].stage, unit["name"]) for job, unit in map(json.loads, "".join(work).splitlines()))
        stage, name = next(((stage, name) for stage, name in begun if stage.find_unit(name) is None), (None, None))
        if stage is None:
            raise
        if error.actor_init_failed:
            raise ValueError(f"stage {stage.name}: its actors cannot start: {str(error).splitlines()[-1]}") from error
        raise ValueError(
            f"stage {stage.name}: actors died {MAX_DEATHS + 1} times over the same work, most likely unit {name} of "
            f"{stage.folder}; Ray's log says why (often memory: give actors less to do at once, or larger nodes). "
            "Everything else that is committed stays; run again to go on"
        ) from error
