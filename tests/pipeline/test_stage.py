"""Pieces of work: how units are shared out, and what an actor does with a piece that another one had begun."""

import io
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from tqdm import tqdm

from pipeline import stage
from pipeline.config import Cluster
from pipeline.schema import DOCUMENT, Document, to_table
from pipeline.stage import (
    SMALL_PIECES,
    Actors,
    Job,
    _pieces,
    _UnitActor,
    in_turns,
    only,
    ray_session,
    run_stages,
    show_progress,
)
from pipeline.store import Stage, Unit


class Letters:
    """Writes a row with the engine's text."""

    def __init__(self, stage: Stage, engine: Any) -> None:
        self._stage = stage
        self._text = engine.text

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        row = Document(unit["name"], "", "", self._text)
        return self._stage.commit(unit["name"], [to_table([row], DOCUMENT)], [], 1)


def test_pieces_become_small_and_stay_few() -> None:
    assert list(_pieces([], 1)) == []
    assert list(_pieces(["a\n", "b\n"], 1)) == ["a\n", "b\n"]
    for count, num_actors in ((1000, 1), (10_000, 100), (300_000, 4)):
        pieces = list(_pieces([f"{number}\n" for number in range(count)], num_actors))
        assert "".join(pieces).split() == [str(number) for number in range(count)]
        sizes = [piece.count("\n") for piece in pieces]
        assert sizes == sorted(sizes, reverse=True) and sizes[-SMALL_PIECES:] == [1] * SMALL_PIECES
        assert len(pieces) < 10 * max(SMALL_PIECES, 4 * num_actors)


def test_what_is_committed_is_not_done_again(tmp_path: Path) -> None:
    stages = [Stage(str(tmp_path), name) for name in ("read", "dedup")]
    Letters(stages[0], SimpleNamespace(text="by one that died")).do_unit({"name": "0"})
    actors = Actors(Cluster(), load_engine=lambda: SimpleNamespace(text="by another"))
    actor = _UnitActor([(stage, Letters, {"stage": stage}) for stage in stages], actors)
    lines = [json.dumps([job, {"name": name}]) for name in "01" for job in (0, 1)]
    (done,) = actor(pa.table({"work": ["\n".join(lines)]}))["done"].to_pylist()
    assert [unit["name"] for unit in json.loads(done)] == ["0", "0", "1", "1"]
    texts = [[stage.read_unit(name)["text"][0].as_py() for name in "01"] for stage in stages]
    assert texts == [["by one that died", "by another"], ["by another", "by another"]]


class Threads(Letters):
    """Writes which thread made it and which one calls it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._maker = threading.get_ident()

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        self._text = f"{self._maker} {threading.get_ident()}"
        return super().do_unit(unit)


def test_one_thread_loads_and_computes(tmp_path: Path) -> None:
    """Two would each have a team of OpenMP threads, and these get in each other's way."""
    letters = Stage(str(tmp_path), "read")
    loaders: list[int] = []

    def load_engine() -> SimpleNamespace:
        loaders.append(threading.get_ident())
        return SimpleNamespace(text="")

    actors = Actors(Cluster(), load_engine=load_engine)
    actor = _UnitActor([(letters, Threads, {"stage": letters})], actors)
    for name in "01":
        with ThreadPoolExecutor(1) as other:
            other.submit(actor, pa.table({"work": [json.dumps([0, {"name": name}])]})).result()
    texts = {letters.read_unit(name)["text"][0].as_py() for name in "01"}
    assert texts == {f"{loaders[0]} {loaders[0]}"}


def test_what_is_built_on_a_refused_stage_is_not_begun(tmp_path: Path) -> None:
    first, second = (Stage(str(tmp_path), name) for name in ("read", "dedup"))
    first.open({"seed": 1})
    jobs = [Job(stage, {"seed": 2}, [], Letters, {}) for stage in (first, second)]
    outcomes = run_stages(jobs, Actors(Cluster()))
    assert [str(outcome) for outcome in outcomes] == [str(outcomes[0])] * 2 and "seed was 1" in str(outcomes[0])
    assert second.folder.list() == []


class Slow(Letters):
    """Tells how far its engine is, and reads what the driver and `status` then see."""

    def __init__(self, stage: Stage, engine: Any) -> None:
        super().__init__(stage, engine)
        self._engine = engine

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        self._engine.on_progress(3, 9)
        with tqdm(file=io.StringIO()) as bar:
            show_progress([self._stage], bar)
            self._text = str(bar.postfix)
        self._engine.on_progress(9, 9)
        return super().do_unit(unit)


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_a_group_waits_for_its_turn_and_is_yielded_before_the_next(
    local_ray: None, tmp_path: Path, at_a_time: int
) -> None:
    import ray

    log = tmp_path / "log"

    def note(what: str) -> None:
        with log.open("a") as file:
            file.write(f"{what}\n")

    @ray.remote(num_cpus=0)
    def ask(group: str) -> str:
        note(f"asked {group}")
        return group.upper()

    @ray.remote(num_cpus=0)
    def measure(replies: str) -> int:
        return len(replies)

    def submit(group: str) -> list[Any]:
        replies = ask.remote(group)
        return [replies, measure.remote(replies)]

    for group, results, seconds in in_turns(["a", "bb", "ccc"], at_a_time, submit):
        note(f"got {group}")
        assert results == [group.upper(), len(group)] and seconds > 0
    lines = log.read_text().splitlines()
    assert sorted(lines) == sorted(f"{what} {group}" for what in ("asked", "got") for group in ("a", "bb", "ccc"))
    if at_a_time == 1:
        assert lines == ["asked a", "got a", "asked bb", "got bb", "asked ccc", "got ccc"]
    else:
        assert lines.index("asked ccc") > min(lines.index("got a"), lines.index("got bb"))


def test_what_an_engine_is_at_is_shown(tmp_path: Path) -> None:
    letters = Stage(str(tmp_path), "read")
    letters.write_progress("of another engine", 1, 2)
    actors = Actors(Cluster(), load_engine=lambda: SimpleNamespace(text=""))
    actor = _UnitActor([(letters, Slow, {"stage": letters})], actors)
    actor(pa.table({"work": [json.dumps([0, {"name": "0"}])]}))
    assert letters.read_unit("0")["text"].to_pylist() == ["read 4/11 requests"]
    assert letters.read_progress() == {"finished": 1, "requests": 2}
    letters.close(seconds=0)
    assert letters.read_progress() == {}


class Poisoned(Letters):
    """Dies of unit 2, like an engine of a passage that it cannot bear."""

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        if unit["name"] == "2":
            os._exit(1)
        return super().do_unit(unit)


def run_as_driver(job: Job) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch, ray_session():
        patch.setattr(stage, "MAX_DEATHS", 1)
        return only(run_stages([job], Actors(Cluster(), count=1)))


class Failing(Letters):
    """Cannot write unit 2 of the run `bad`."""

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        if unit["name"] == "2" and self._stage.run_dir.endswith("bad"):
            raise OSError(28, "No space left on device")
        return super().do_unit(unit)


def test_a_run_whose_unit_fails_is_named_and_the_others_are_done(local_ray: None, tmp_path: Path) -> None:
    stages = [Stage(str(tmp_path / name), "read") for name in ("good", "bad")]
    units = [{"name": str(number)} for number in range(5)]
    engine = SimpleNamespace(text="text")
    jobs = [Job(stage, {}, units, Failing, {"stage": stage, "engine": engine}) for stage in stages]
    good, bad = run_stages(jobs, Actors(Cluster(), count=1))
    assert good["rows_out"] == 5
    assert isinstance(bad, ValueError) and "stage read, unit 2: OSError: [Errno 28] No space left" in str(bad)
    assert stages[1].manifest() is None and {"0", "1"} <= stages[1].committed()
    jobs = [Job(stages[1], {}, units, Letters, {"stage": stages[1], "engine": engine})]
    assert only(run_stages(jobs, Actors(Cluster(), count=1)))["rows_out"] == 5, "it goes on from there"


class Lasting(Letters):
    def do_unit(self, unit: dict[str, Any]) -> Unit:
        time.sleep(5)
        return super().do_unit(unit)


@pytest.mark.long
def test_a_unit_may_take_longer_than_ray_data_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S", "1")
    letters = Stage(str(tmp_path), "read")
    arguments = {"stage": letters, "engine": SimpleNamespace(text="text")}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as driver:
        job = Job(letters, {}, [{"name": "0"}], Lasting, arguments)
        assert driver.submit(run_as_driver, job).result()["rows_out"] == 1


@pytest.mark.long
def test_a_unit_that_kills_every_actor_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    """A process of its own is the driver: Ray Data keeps the last actor, with its CPU, until the driver ends."""
    letters = Stage(str(tmp_path), "read")
    arguments = {"stage": letters, "engine": SimpleNamespace(text="text")}
    units = [{"name": str(number)} for number in range(5)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as driver:
        job = Job(letters, {}, units, Poisoned, arguments)
        with pytest.raises(ValueError, match=r"stage read: actors died 2 times .* unit 2 of"):
            driver.submit(run_as_driver, job).result()
        assert {"0", "1"} <= letters.committed() and "2" not in letters.committed()
        job = Job(letters, {}, units, Letters, arguments)
        assert driver.submit(run_as_driver, job).result()["rows_out"] == 5
