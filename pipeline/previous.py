"""A corpus that changed -> what an earlier run of it already wrote.

In: `update.previous_run`. Out: for passages whose heading and text stood there, too, their questions and answers, so
that only new and changed passages are written about. Rows keep their ids unless the passage got another one.
"""

from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base_model import BaseModel
from pipeline.config import Config
from pipeline.schema import ANSWER, PASSAGE, QUESTION, digest
from pipeline.store import Folder, Stage

CACHED_UNITS = 4
IDS = ("question_id", "answer_id")


class PreviousRun:
    """What stands in a run directory about each passage; without one, nothing. Holds 100 bytes a passage in memory."""

    def __init__(self, run_dir: str | None) -> None:
        self._passages: dict[bytes, tuple[str, str]] = {}  # key -> unit and id there
        if run_dir is None:
            return
        passages = Stage(run_dir, "chunk", PASSAGE)
        for shard in passages.shards():
            for row in passages.read_shard(shard, ["passage_id", "heading", "text"]).to_pylist():
                self._passages.setdefault(_key(row), (shard.removesuffix(".parquet"), row["passage_id"]))
        self._stages = {"question": Stage(run_dir, "question", QUESTION), "answer": Stage(run_dir, "answer", ANSWER)}
        self._read = lru_cache(CACHED_UNITS)(lambda stage, unit: self._stages[stage].read_unit(unit))
        self._asked = lru_cache(CACHED_UNITS)(self._question_ids)

    def holds(self, passage: dict[str, Any]) -> bool:
        """Say whether this heading and text stood there."""
        return _key(passage) in self._passages

    def rows(self, stage: str, passages: list[dict[str, Any]]) -> pa.Table:
        """Return what the stage `question` or `answer` has about those of these passages that stood there."""
        schema = {"question": QUESTION, "answer": ANSWER}[stage]
        held = filter(self.holds, passages)
        return pa.concat_tables([schema.empty_table(), *(self._rows(stage, passage) for passage in held)])

    def split(self, rows: pa.Table, passages: list[dict[str, Any]]) -> tuple[pa.Table, pa.Table]:
        """Part the rows about some passages into those of questions that are new, and those of questions it has."""
        units = {self._passages[_key(passage)][0] for passage in filter(self.holds, passages)}
        asked = {about: ids for unit in sorted(units) for about, ids in self._asked(unit).items()}
        is_had = pc.field("question_id").isin(pa.array(sorted(self.ids_now(asked, passages)), pa.string()))
        return rows.filter(~is_had), rows.filter(is_had)

    def ids_now(self, ids: dict[str, list[str]], passages: list[dict[str, Any]]) -> set[str]:
        """Return what rows are called in the new run; `ids` are theirs here, by the passage that they are about."""
        now: set[str] = set()
        for passage in filter(self.holds, passages):
            _, previous_id = self._passages[_key(passage)]
            now |= {_id_now(old, previous_id, passage["passage_id"]) for old in ids.get(previous_id, [])}
        return now

    def _question_ids(self, unit: str) -> dict[str, list[str]]:
        """Return the ids of a unit's questions by the passage that they are about."""
        ids: dict[str, list[str]] = {}
        for row in self._read("question", unit).select(["passage_id", "question_id"]).to_pylist():
            ids.setdefault(row["passage_id"], []).append(row["question_id"])
        return ids

    def _rows(self, stage: str, passage: dict[str, Any]) -> pa.Table:
        unit, previous_id = self._passages[_key(passage)]
        rows = self._read(stage, unit).filter(pc.field("passage_id") == previous_id)
        if (new_id := passage["passage_id"]) == previous_id:
            return rows
        for name in IDS:
            if name in rows.column_names:
                ids = [_id_now(old, previous_id, new_id) for old in rows[name].to_pylist()]
                rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(ids, pa.string()))
        same = pa.array([new_id] * rows.num_rows, pa.string())
        return rows.set_column(rows.schema.get_field_index("passage_id"), "passage_id", same)


def _id_now(old: str, previous_passage_id: str, passage_id: str) -> str:
    """Name a row anew whose passage has another id: two passages of one text would give two rows of the same id."""
    return old if passage_id == previous_passage_id else digest(old, passage_id)


def _key(passage: dict[str, Any]) -> bytes:
    return bytes.fromhex(digest(passage["heading"], passage["text"]))


def adapter_of(run_dir: str) -> Folder:
    """Return where a run's trained adapter stands."""
    return Folder(run_dir) / "train" / "adapter"


def previous_settings(config: Config, base: BaseModel) -> dict[str, str]:
    """Return what the writing depends on; ValueError if this base model cannot go on from the previous run."""
    if config.update.previous_run is None:
        return {}
    previous = Stage(config.update.previous_run, "answer", ANSWER).require()
    wrote = previous["settings"]
    for name, was, now in (
        *((f"{name} of its base model", wrote["model"][name], value) for name, value in base.identity().items()),
        ("answer.top_k", wrote["answer"]["top_k"], config.answer.top_k),
    ):
        if was != now:
            raise ValueError(
                f"update.previous_run = {config.update.previous_run!r}: {name} is {was}, now {now}; go on with the "
                "same, or remove update.previous_run"
            )
    return {"previous": previous["data_digest"]}
