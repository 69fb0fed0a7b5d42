"""Deduplication: exact and near, within a shard and across them; the first in order stays."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from pipeline.dedup import DedupWorker, dedup_job, plan_units, sign
from pipeline.schema import Document, digest
from pipeline.stage import Actors, only, run_alike
from pipeline.store import Stage
from tests.conftest import assert_counted, make_config, rows, write_documents


def make(name: str, text: str) -> Document:
    return Document(digest(text), name, "", text)


def rejected(stage: Stage) -> set[tuple[str, str, str]]:
    found = stage.read_rejected().to_pylist()
    return {(row["record_id"], row["reason"], row["detail"]) for row in found}


def test_the_first_of_equals_stays(run_dir: str) -> None:
    units = [[make("a", "one"), make("b", "one")], [make("c", "two")], [make("d", "two"), make("e", "one")]]
    write_documents(run_dir, "read", [*units, [make("f", "three")]])
    worker = DedupWorker(run_dir)
    committed = [worker.do_unit(unit) for unit in plan_units(run_dir, None)]
    stage = Stage(run_dir, "dedup")
    assert [row["source"] for row in rows(stage)] == ["a", "c", "f"]
    assert rejected(stage) == {
        ("b", "duplicate", "kept: a"),
        ("d", "duplicate", "kept: c"),
        ("e", "duplicate", "kept: a"),
    }
    assert [(unit.rows_in, unit.rows_out) for unit in committed] == [(2, 1), (1, 1), (2, 0), (1, 1)]


def test_ids_are_compared_part_by_part(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.dedup.PART_ROWS", 20)
    generator = random.Random(0)
    texts = [str(generator.randrange(100)) for _ in range(200)]
    documents = [make(str(row), text) for row, text in enumerate(texts)]
    write_documents(run_dir, "read", [documents[start : start + 30] for start in range(0, 200, 30)])
    dropped = [
        (30 * number + row, reason, source)
        for number, unit in enumerate(plan_units(run_dir, None))
        for row, reason, source in unit["drop"]
    ]
    assert dropped == [
        (row, "duplicate", str(texts.index(text))) for row, text in enumerate(texts) if texts.index(text) < row
    ]


def test_a_stage_without_rows(run_dir: str) -> None:
    write_documents(run_dir, "read", [])
    assert list(plan_units(run_dir, None)) == []


def chinese(generator: random.Random) -> str:
    return "".join(chr(generator.randrange(0x4E00, 0x5200)) for _ in range(400))


def english(generator: random.Random) -> str:
    return " ".join(f"word{generator.randrange(1000)}" for _ in range(400))


@pytest.mark.parametrize("make_text", [chinese, english])
def test_signatures_estimate_similarity(make_text: Callable[[random.Random], str]) -> None:
    generator = random.Random(0)
    text = make_text(generator)
    assert sign(text).jaccard(sign(text + text[:20])) > 0.8
    assert sign(text).jaccard(sign(make_text(generator))) < 0.1


def test_near_duplicates(local_ray: None, run_dir: str) -> None:
    generator = random.Random(1)
    documents = []
    for name, make_text in (("e", english), ("z", chinese)):
        text = make_text(generator)
        changed = text.replace(text[-8:], "changed")
        texts = [text, changed, changed, make_text(generator)]
        documents += [make(f"{name}{number}", text) for number, text in enumerate(texts, 1)]
    copies = [make(f"copy{number}", documents[0].text) for number in range(90)]

    def drop_duplicates(threshold: float | None) -> dict[str, Any]:
        config = make_config(run_dir, read={"paths": ["unused"], "near_duplicate_threshold": threshold})
        return only(run_alike([partial(dedup_job, config)], Actors(config.cluster)))

    with pytest.raises(ValueError, match=r"read in .* is not complete"):
        drop_duplicates(0.8)
    write_documents(run_dir, "read", [documents[:3], documents[3:], copies])
    manifest = drop_duplicates(0.8)  # more than nine in ten are duplicates, and the stage goes on

    stage = Stage(run_dir, "dedup")
    assert rejected(stage) == {
        (f"{name}{number}", reason, f"kept: {name}1")
        for name in "ez"
        for number, reason in ((2, "near_duplicate"), (3, "duplicate"))
    } | {(copy.source, "duplicate", "kept: e1") for copy in copies}
    assert [row["source"] for row in rows(stage)] == ["e1", "e4", "z1", "z4"]
    assert_counted(manifest)
    with pytest.raises(ValueError, match=r"near_duplicate_threshold was 0\.8, is now None"):
        drop_duplicates(None)
