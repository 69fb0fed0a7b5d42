"""Pieces of work: how units are shared out, and what an actor does with a piece that another one had begun."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import stage as stage_module
from pipeline.config import Cluster
from pipeline.schema import DOCUMENT, Document, to_table
from pipeline.stage import SMALL_PIECES, Actors, Job, _pieces, _UnitActor, only, run_stages
from pipeline.store import Stage, Unit


class Letters:
    """Writes a row with the engine's text."""

    def __init__(self, stage: Stage, engine: str) -> None:
        self._stage = stage
        self._text = engine

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
    stages = [Stage(str(tmp_path), name, DOCUMENT) for name in ("first", "second")]
    Letters(stages[0], "by one that died").do_unit({"name": "0"})
    actor = _UnitActor(
        [(stage, Letters, {"stage": stage}) for stage in stages], Actors(Cluster(), load_engine=lambda: "by another")
    )
    lines = [json.dumps([job, {"name": name}]) for name in "01" for job in (0, 1)]
    (done,) = actor(pa.table({"work": ["\n".join(lines)]}))["done"].to_pylist()
    assert [unit["name"] for unit in json.loads(done)] == ["0", "0", "1", "1"]
    texts = [[stage.read_unit(name)["text"][0].as_py() for name in "01"] for stage in stages]
    assert texts == [["by one that died", "by another"], ["by another", "by another"]]


class Poisoned(Letters):
    """Dies of unit 2, like an engine of a passage that it cannot bear."""

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        if unit["name"] == "2":
            os._exit(1)
        return super().do_unit(unit)


def test_a_unit_that_kills_every_actor_is_named_and_the_others_are_done(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "MAX_DEATHS", 1)
    stage = Stage(str(tmp_path), "read", DOCUMENT)
    arguments = {"stage": stage, "engine": "text"}
    job = Job(stage, {}, [{"name": str(number)} for number in range(5)], Poisoned, arguments)
    with pytest.raises(ValueError, match=r"stage read: actors died 2 times .* unit 2 of"):
        run_stages([job], Actors(Cluster(), count=1))
    assert {"0", "1"} <= stage.committed() and "2" not in stage.committed()
    healthy = Job(stage, {}, job.units, Letters, arguments)
    assert only(run_stages([healthy], Actors(Cluster(), count=1)))["rows_out"] == 5
