"""What an earlier run wrote is found again by the passages' text, under ids that stay unique."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pipeline.base_model import BaseModel
from pipeline.general import ForgottenWriter
from pipeline.held_out import hold_out
from pipeline.previous import PreviousRun, earlier_runs, previous_settings
from pipeline.schema import ANSWER, DOCUMENT, PASSAGE, QUESTION, Document, Passage, Question, Rejected, to_table
from pipeline.store import Stage
from pipeline.training_data import training_tables
from tests.conftest import make_config

UNIT = "000000-00000"  # of what is written about the first shard of passages


def write_run(run_dir: str) -> None:
    passages = [Passage(f"p{i}", "d", "Mills", 0, 9, f"Mill number {i}.") for i in range(3)]
    questions = [Question(f"q{i}{j}", f"p{i}", "fact", f"What is mill {i}, {j}?") for i in range(3) for j in range(2)]
    answers = [
        {"answer_id": f"a{q.question_id}", "question_id": q.question_id, "passage_id": q.passage_id, "text": "a mill"}
        | {"finish_reason": "stop", "prompt_ids": [1], "answer_ids": [2], "topk_ids": [2], "topk_logprobs": [0.0]}
        for q in questions
    ]
    write_stages(
        run_dir,
        chunk=to_table(passages, PASSAGE),
        question=to_table(questions, QUESTION),
        answer=pa.Table.from_pylist(answers, ANSWER),
    )


def write_stages(run_dir: str, **tables: pa.Table) -> None:
    for name, table in tables.items():
        stage = Stage(run_dir, name)
        stage.open({})
        stage.commit("000000" if name == "chunk" else UNIT, [table], [], table.num_rows)
        stage.close(0)


def passage(passage_id: str, text: str, heading: str = "Mills") -> dict[str, str]:
    return {"passage_id": passage_id, "heading": heading, "text": text}


def test_rows_of_an_unchanged_passage_are_found_and_others_are_not(tmp_path: Path) -> None:
    write_run(str(tmp_path))
    previous = PreviousRun(str(tmp_path))
    assert previous.holds(passage("p1", "Mill number 1."))
    assert not previous.holds(passage("p1", "Mill number 1, rebuilt."))
    assert not previous.holds(passage("p1", "Mill number 1.", heading="Barns"))
    assert not PreviousRun(None).holds(passage("p1", "Mill number 1."))
    found = previous.rows("answer", [passage("p1", "Mill number 1.")])
    assert found["answer_id"].to_pylist() == ["aq10", "aq11"], "an unchanged document keeps its ids"
    assert previous.rows("question", []).num_rows == 0


def test_two_passages_of_the_same_text_give_rows_with_ids_of_their_own(tmp_path: Path) -> None:
    write_run(str(tmp_path))
    twice = [passage("x", "Mill number 1."), passage("y", "Mill number 1.")]
    previous = PreviousRun(str(tmp_path))
    questions, answers = previous.rows("question", twice), previous.rows("answer", twice)
    assert questions["passage_id"].to_pylist() == ["x", "x", "y", "y"]
    assert len(set(questions["question_id"].to_pylist())) == 4 and len(set(answers["answer_id"].to_pylist())) == 4
    assert answers["question_id"].to_pylist() == questions["question_id"].to_pylist(), "every answer has its question"


def test_a_twin_that_kept_its_id_keeps_its_own_rows(tmp_path: Path) -> None:
    """Of two passages of one text only the first would be found by it."""
    passages = [Passage(name, "d", "Mills", 0, 9, "A mill.") for name in ("a", "b")]
    questions = [Question(f"q{name}", name, "fact", f"What is {name}?") for name in ("a", "b")]
    write_stages(str(tmp_path), chunk=to_table(passages, PASSAGE), question=to_table(questions, QUESTION))
    previous = PreviousRun(str(tmp_path))
    assert previous.rows("question", [passage("b", "A mill.")])["question_id"].to_pylist() == ["qb"]
    assert previous.rows("question", [passage("a", "A mill.")])["question_id"].to_pylist() == ["qa"]


def test_answers_are_parted_by_whether_the_adapter_was_trained_on_them(tmp_path: Path) -> None:
    """Mill 0 has an answer that was trained on, one that the filter took out there, and one to a new question."""
    write_run(str(tmp_path))
    had = Stage(str(tmp_path), "answer").read_unit(UNIT)
    write_stages(str(tmp_path), filter=had.slice(0, 1))
    passages = [passage("p0", "Mill number 0."), passage("new", "Another mill.")]
    more = [
        {**had.to_pylist()[0], "answer_id": name, "passage_id": about} for name, about in (("x", "p0"), ("y", "new"))
    ]
    rows = pa.concat_tables([had.slice(0, 2), pa.Table.from_pylist(more, ANSWER)])
    new, old = PreviousRun(str(tmp_path)).split(rows, passages)
    assert new["answer_id"].to_pylist() == ["aq01", "x", "y"] and old["answer_id"].to_pylist() == ["aq00"]
    new, old = PreviousRun(None).split(rows, passages)
    assert (new.num_rows, old.num_rows) == (4, 0)


def test_an_update_holds_out_what_was_held_out_before_and_a_tenth_of_what_is_new(tmp_path: Path) -> None:
    """One passage is new; the others are as they were under other ids, as those of a document that changed.

    What nearly repeats a question of before is not asked: the adapter may know it from there.
    """
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    write_run(before)
    stage = Stage(before, "filter")
    stage.open({})
    stage.commit(UNIT, [], [Rejected("filter", "aq10", "held_out", "")], 1)
    stage.close(0)
    passages = [Passage(f"n{i}", "d", "Mills", 0, 9, f"Mill number {i}.") for i in range(3)]
    passages.append(Passage("new", "d", "Mills", 0, 9, "Another mill."))
    kept = PreviousRun(before).rows("question", to_table(passages[:3], PASSAGE).to_pylist())
    new = [Question(f"new{n:02d}", "new", "fact", f"Who built barn {n}?") for n in range(1, 30)]
    more = Question("0", "n0", "fact", "What else is mill 0?")  # a second round's, near to what was trained on
    again = Question("new00", "new", "fact", "What is mill 2 and 1?")
    write_stages(
        after,
        chunk=to_table(passages, PASSAGE),
        question=pa.concat_tables([kept, to_table([more, again, *new], QUESTION)]),
    )
    held_out = hold_out(make_config(after, update={"previous_run": before}))
    assert sorted(held_out.texts) == ["What is mill 1, 0?", *(f"Who built barn {n}?" for n in (1, 2, 3))]


def test_what_another_passage_is_asked_is_not_forgotten(tmp_path: Path) -> None:
    """Mill 1 was rewritten and is asked one of its questions again; mill 2 is gone, and mill 0 is asked one of its."""
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    write_run(before)
    passages = [Passage("p0", "d", "Mills", 0, 9, "Mill number 0."), Passage("n1", "d", "Mills", 0, 9, "Another mill.")]
    questions = [
        Question("q", "n1", "fact", "What is mill 1, 0?"),
        Question("q00", "p0", "fact", "What is mill 2, 1?"),
    ]
    removed = Stage(before, "answer").read_unit(UNIT).slice(2)  # of mills 1 and 2
    write_stages(
        after,
        chunk=to_table(passages, PASSAGE),
        question=to_table(questions, QUESTION),
        filter=ANSWER.empty_table(),
        forgotten=removed,
    )
    config = make_config(
        after, update={"previous_run": before, "forget_removed": True}, evaluate={"near_duplicate_threshold": 1.0}
    )
    rows = pa.concat_tables(training_tables(config).removed)
    assert rows["question_id"].to_pylist() == ["q11", "q20"]


@pytest.mark.parametrize(
    ("now", "asked"),
    [
        ({"Mills of 1931": ["Mill number 0.", "Mill number 1."]}, ["q20", "q21"]),
        ({"Mills": ["Mill number 0."], "Barns": ["Mill number 1.", "Mill number 2."]}, []),
        ({"Mills": ["Mill number 0.", "Mill number 1.", "Mill number 2, a red one."]}, []),
        ({}, ["q00", "q01", "q10", "q11", "q20", "q21"]),
        ({"Barns": ["Another number of a barn."]}, ["q00", "q01", "q10", "q11", "q20", "q21"]),
    ],
    ids=["another title", "moved", "a file of another name", "all gone", "something else is new"],
)
def test_what_still_stands_somewhere_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: dict[str, list[str]], asked: list[str]
) -> None:
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    write_run(before)
    passages = [
        Passage(f"{heading}{place}", heading, heading, 0, 9, text)
        for heading, texts in now.items()
        for place, text in enumerate(texts)
    ]
    documents = [Document(heading, f"{heading}.txt", "", "") for heading in now]
    write_stages(before, dedup=to_table([Document("d", "mills.txt", "", "")], DOCUMENT))
    write_stages(after, chunk=to_table(passages, PASSAGE), dedup=to_table(documents, DOCUMENT))
    were_asked = []

    def answer_alone(engine: Any, rows: list[tuple[str, str, str]], *_: Any) -> pa.Table:
        were_asked.extend(question_id for _, question_id, _ in rows)
        return ANSWER.empty_table()

    monkeypatch.setattr("pipeline.general.answer_alone", answer_alone)
    engine: Any = SimpleNamespace(stats=SimpleNamespace(since=lambda _: {}))
    Stage(after, "forgotten").open({})
    ForgottenWriter(after, before, make_config(after).answer, engine).do_unit({"name": UNIT})
    assert were_asked == asked


def test_two_directories_used_in_turn_are_no_endless_line(tmp_path: Path) -> None:
    """Each was emptied by --redo when the other one was gone on from."""
    names = [str(tmp_path / name) for name in ("a", "b", "c")]
    for run_dir, previous in zip(names, (names[1], names[0], names[1]), strict=True):
        stage = Stage(run_dir, "train")
        stage.open({})
        stage.close(0.0, {"previous_run": previous})
    config = make_config(names[2], update={"previous_run": names[1]})
    assert list(earlier_runs(config)) == [names[1], names[0]]


def test_a_previous_run_that_cannot_be_gone_on_from_is_named(tmp_path: Path) -> None:
    config = make_config(str(tmp_path / "run"), update={"previous_run": str(tmp_path / "hanbook")})
    with pytest.raises(ValueError, match=r"update\.previous_run = '.*hanbook': stage .* is not complete"):
        previous_settings(config, BaseModel("m", "m", "r", "t", "c"))
