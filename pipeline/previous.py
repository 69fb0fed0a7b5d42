"""A corpus that changed -> what an earlier run of it already wrote.

In: `update.previous_run`. Out: for passages whose heading and text stood there, too, their questions and answers, so
that only new and changed passages are written about. Rows keep their ids unless the passage got another one. A run that
cannot be gone on from is refused before anything is written.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base_model import BaseModel
from pipeline.config import Config
from pipeline.schema import ROWS, digest
from pipeline.store import Folder, Stage, require_line

CACHED_UNITS = 4  # and shards
IDS = ("question_id", "answer_id")
GONE_ON_FROM = ("question", "answer", "filter")


class PreviousRun:
    """What stands in a run directory about each passage; without one, nothing. Holds 100 bytes a passage in memory."""

    def __init__(self, run_dir: str | None) -> None:
        self._passages: dict[bytes, tuple[str, str]] = {}  # key -> unit and id there
        self._twins: dict[tuple[bytes, str], str] = {}  # key and id there of further passages of one text -> unit
        if run_dir is None:
            return
        passages = Stage(run_dir, "chunk")
        for shard in passages.shards():
            for row in passages.read_shard(shard, ["passage_id", "heading", "text"]).to_pylist():
                there = (shard.removesuffix(".parquet"), row["passage_id"])
                if self._passages.setdefault(_key(row), there) != there:
                    self._twins[_key(row), row["passage_id"]] = there[0]
        self._stages = {name: Stage(run_dir, name) for name in GONE_ON_FROM}
        self._read = lru_cache(CACHED_UNITS)(lambda stage, unit: self._stages[stage].read_unit(unit))
        self._trained = lru_cache(CACHED_UNITS)(self._trained_ids)

    def holds(self, passage: dict[str, Any]) -> bool:
        """Say whether this heading and text stood there."""
        return _key(passage) in self._passages

    def rows(self, stage: str, passages: list[dict[str, Any]]) -> pa.Table:
        """Return what the stage `question`, `answer` or `filter` has about those of these passages that stood there."""
        held = filter(self.holds, passages)
        return pa.concat_tables([ROWS[stage].empty_table(), *(self._rows(stage, passage) for passage in held)])

    def split(self, answers: pa.Table, passages: list[dict[str, Any]]) -> tuple[pa.Table, pa.Table]:
        """Part answers about these passages into those that its adapter was not trained on, and those that it was."""
        units = {self._find(passage)[0] for passage in filter(self.holds, passages)}
        trained = {about: ids for unit in sorted(units) for about, ids in self._trained(unit).items()}
        is_old = pc.field("answer_id").isin(pa.array(sorted(self.ids_now(trained, passages)), pa.string()))
        return answers.filter(~is_old), answers.filter(is_old)

    def ids_now(self, ids: dict[str, list[str]], passages: list[dict[str, Any]]) -> set[str]:
        """Return what rows are called in the new run; `ids` are theirs here, by the passage that they are about."""
        now: set[str] = set()
        for passage in filter(self.holds, passages):
            _, previous_id = self._find(passage)
            now |= {_id_now(old, previous_id, passage["passage_id"]) for old in ids.get(previous_id, [])}
        return now

    def _find(self, passage: dict[str, Any]) -> tuple[str, str]:
        """Return the unit and the id there of a passage that it holds; of several, that of the same id."""
        key, passage_id = _key(passage), passage["passage_id"]
        unit = self._twins.get((key, passage_id))
        return (unit, passage_id) if unit else self._passages[key]

    def _trained_ids(self, unit: str) -> dict[str, list[str]]:
        """Return the ids of a unit's answers that were trained on, by the passage that they are about."""
        ids: dict[str, list[str]] = {}
        for row in self._stages["filter"].read_unit(unit, ["passage_id", "answer_id"]).to_pylist():
            ids.setdefault(row["passage_id"], []).append(row["answer_id"])
        return ids

    def _rows(self, stage: str, passage: dict[str, Any]) -> pa.Table:
        unit, previous_id = self._find(passage)
        rows = self._read(stage, unit).filter(pc.field("passage_id") == previous_id)
        if (new_id := passage["passage_id"]) == previous_id:
            return rows
        for name in IDS:
            if name in rows.column_names:
                ids = [_id_now(old, previous_id, new_id) for old in rows[name].to_pylist()]
                rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(ids, pa.string()))
        same = pa.array([new_id] * rows.num_rows, pa.string())
        return rows.set_column(rows.schema.get_field_index("passage_id"), "passage_id", same)


class PassagesBySource:
    """What a run cut each file, or row of one, into. Holds 500 bytes a document in memory."""

    def __init__(self, run_dir: str) -> None:
        documents, passages = Stage(run_dir, "dedup"), Stage(run_dir, "chunk")
        self._doc_ids = {
            row["source"]: row["doc_id"]
            for shard in documents.shards()
            for row in documents.read_shard(shard, ["doc_id", "source"]).to_pylist()
        }
        self._shards: dict[str, list[str]] = {}
        for shard in passages.shards():
            for doc_id in pc.call_function("unique", [passages.read_shard(shard, ["doc_id"])["doc_id"]]).to_pylist():
                self._shards.setdefault(doc_id, []).append(shard)
        self._read = lru_cache(CACHED_UNITS)(lambda shard: passages.read_shard(shard, ["doc_id", "start", "text"]))

    def find(self, source: str, doc_id: str = "") -> list[dict[str, Any]]:
        """Return the passages of this document or, if it was not there, of what stood at this URI, in order.

        Rows of a file may have moved: then another document stands at the URI.
        """
        doc_id = doc_id if doc_id in self._shards else self._doc_ids.get(source, "")
        tables = [self._read(shard).filter(pc.field("doc_id") == doc_id) for shard in self._shards.get(doc_id, [])]
        return pa.concat_tables(tables).sort_by("start").to_pylist() if tables else []


def earlier_runs(config: Config) -> Iterator[str]:
    """Yield the directories of the runs that this one goes on from, the latest first; behind one that is gone, none."""
    run_dir, seen = config.update.previous_run, {config.run_dir}
    while run_dir and run_dir not in seen:  # two directories may have been used in turn
        yield run_dir
        seen.add(run_dir)
        run_dir = (Stage(run_dir, "train").manifest() or {}).get("previous_run")


def _id_now(old: str, previous_passage_id: str, passage_id: str) -> str:
    """Name a row anew whose passage has another id: two passages of one text would give two rows of the same id."""
    return old if passage_id == previous_passage_id else digest(old, passage_id)


def _key(passage: dict[str, Any]) -> bytes:
    return bytes.fromhex(digest(passage["heading"], passage["text"]))


def adapter_of(run_dir: str, stage: str = "train") -> Folder:
    """Return where a run's trained adapter stands, or that of a baseline."""
    return Folder(run_dir) / stage / "adapter"


def adapter_digest(run_dir: str) -> str:
    """Return the digest of a run's training, which must be complete."""
    return Stage(run_dir, "train").require()["data_digest"]


def previous_settings(config: Config, base: BaseModel) -> dict[str, str]:
    """Return what the writing depends on; ValueError if this config cannot go on from the previous run."""
    run_dir = config.update.previous_run
    if run_dir is None:
        return {}
    adapter, lora = adapter_of(run_dir).read_json("adapter_config.json"), config.train.lora
    try:
        answer = require_line(run_dir, "train")["answer"]
        if adapter is None:
            raise ValueError(f"its adapter, {adapter_of(run_dir)}, is gone; train it again")
    except ValueError as error:
        raise ValueError(f"update.previous_run = {run_dir!r}: {error}") from None
    wrote = answer["settings"]
    layers = adapter["target_modules"] if lora.target_modules == "all-linear" else lora.target_modules
    for name, was, now in (
        *((f"{name} of its base model", wrote["model"][name], value) for name, value in base.identity().items()),
        ("answer.top_k", wrote["answer"]["top_k"], config.answer.top_k),
        ("train.lora.rank", adapter["r"], lora.rank),
        ("train.lora.alpha", adapter["lora_alpha"], lora.alpha or 2 * lora.rank),
        ("train.lora.dropout", adapter["lora_dropout"], lora.dropout),
        ("train.lora.target_modules", sorted(adapter["target_modules"]), sorted(layers)),
    ):
        if was != now:
            raise ValueError(
                f"update.previous_run = {run_dir!r}: {name} is {was}, now {now}; go on with the same, or remove "
                "update.previous_run"
            )
    return {"previous": answer["data_digest"]}
