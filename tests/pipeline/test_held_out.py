"""The questions file, what is held out without one, and near-duplicates of what is asked."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.arms import Replies, Reply
from pipeline.config import Config, Evaluate, Update
from pipeline.evaluate import _score
from pipeline.filter import AnswerFilter
from pipeline.held_out import (
    NearQuestions,
    count_trained_on,
    held_out_questions,
    hold_out,
    load_questions,
    refuse_long_contexts,
)
from pipeline.schema import ANSWER, DOCUMENT, PASSAGE, QUESTION, Document, Passage, Question, to_table
from pipeline.store import Stage
from tests.conftest import ROOT, make_config
from tests.pipeline.test_filter import answers

UNIT = "unit-00000"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run up to the answers: one passage, forty questions."""
    run_dir = str(tmp_path / "run")
    config = Config.model_validate(
        {
            "run_dir": run_dir,
            "model": {"path": str(tmp_path)},
            "read": {"paths": ["x"]},
            "publish": {"registry": str(tmp_path), "name": "test"},
        }
    )
    questions = [Question(f"q{n:02d}", "p", "fact", f"How heavy is lens number {n} of Orrin?") for n in range(40)]
    replies = answers(*((row.question_id, f"It weighs {row.question_id[1:]} kilograms.", "stop") for row in questions))
    for name, table in (
        ("dedup", to_table([Document("d", "lens.md", "Lens", "The lens.")], DOCUMENT)),
        ("chunk", to_table([Passage("p", "d", "Lens", 0, 9, "The lens.")], PASSAGE)),
        ("question", to_table(questions, QUESTION)),
        ("answer", replies),
    ):
        stage = Stage(run_dir, name)
        stage.open({})
        # A unit of questions is a shard of passages.
        stage.commit("unit" if name in ("dedup", "chunk") else UNIT, [table], [], table.num_rows)
        stage.close(0.0)
    return config


def complete_empty(config: Config) -> None:
    """Make a run that was trained on nothing new."""
    for name in ("filter", "train"):
        stage = Stage(config.run_dir, name)
        stage.open({})
        stage.close(0.0, {"previous_run": config.update.previous_run})


def filter_run(config: Config) -> Stage:
    """Filter the run's one unit, in this process."""
    worker = AnswerFilter(config, hold_out(config))
    worker.do_unit({"name": UNIT})
    stage = Stage(config.run_dir, "filter")
    stage.close(0.0)
    return stage


def test_without_a_file_a_tenth_of_the_questions_is_held_out_and_never_trained_on(config: Config) -> None:
    stage = filter_run(config)
    asked = held_out_questions(config)
    assert len(asked) == 4
    assert {question.passage_id for question in asked} == {"p"} and asked[0].document == "lens.md"
    assert asked[0].context == "Lens\n\nThe lens." and asked[0].answers[0].startswith("It weighs")
    trained = set(stage.read_unit(UNIT)["question_id"].to_pylist())
    texts = {f"How heavy is lens number {int(name[1:])} of Orrin?" for name in trained}
    assert not texts & {question.question for question in asked}
    reasons = Counter(stage.read_rejected()["reason"].to_pylist())
    assert reasons["held_out"] == 4 and len(trained) + reasons.total() == 40


def test_what_the_model_asked_itself_is_scored_by_token_f1(config: Config) -> None:
    filter_run(config)
    asked = held_out_questions(config)
    right, wrong = ([Reply(text, 1.0) for text in texts] for texts in ([q.answers[0] for q in asked], [""] * 4))
    arms = {"closed_book": wrong, "adapter": [right[0], *wrong[1:]], "gold_passage": right}
    replies = Replies(asked, arms, ANSWER.empty_table(), {}, {}, {}, {}, {})
    stage = Stage(config.run_dir, "evaluate")
    report = _score(config, replies, stage, {"adapter": np.arange(4.0)})
    assert (report["metric"], report["questions_from"]) == ("token_f1", "generated")
    assert report["scores"]["adapter"]["token_f1"] == 0.25 and report["trained_on"] == 0
    lines = [json.loads(line) for line in stage.folder.read_bytes("answers.jsonl").splitlines()]
    assert ["lineage" in line for line in lines] == [False, True, True, True]
    assert [line["adapter"]["kl_to_teacher"] for line in lines] == [0, 1, 2, 3]
    assert "kl_to_teacher" not in lines[0]["gold_passage"]


def test_questions_that_nearly_repeat_an_asked_one_are_not_trained_on(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    question = {"question": "How heavy is lens number 7, of Orrin?", "answers": ["7"], "context": "c"}
    path.write_text(json.dumps(question) + "\n")
    evaluate = Evaluate(questions=str(path), near_duplicate_threshold=1.0)
    stage = filter_run(config.model_copy(update={"evaluate": evaluate}))
    assert stage.read_rejected()["reason"].to_pylist() == ["near_evaluation"]
    assert "q07" not in stage.read_unit(UNIT)["question_id"].to_pylist()


def test_what_training_saw_before_the_file_changed_is_counted(config: Config, tmp_path: Path) -> None:
    filter_run(config)
    questions = ["How heavy is lens number 7, of Orrin?", "How old is the Kestrel Mill?"]
    asked = [held_out_questions(config)[0]._replace(question=text) for text in questions]
    exact = config.model_copy(update={"evaluate": Evaluate(near_duplicate_threshold=1.0)})
    assert count_trained_on(exact, asked) == 1
    assert count_trained_on(exact, held_out_questions(exact)) == 0
    later = {"run_dir": str(tmp_path / "later"), "update": Update(previous_run=config.run_dir)}
    later = exact.model_copy(update=later)
    assert count_trained_on(later, asked) is None, "that run has made nothing yet"
    complete_empty(later)
    assert count_trained_on(later, asked) == 1, "training goes on from what it saw"
    update = {"run_dir": str(tmp_path / "third"), "update": Update(previous_run=later.run_dir)}
    third = exact.model_copy(update=update)
    complete_empty(third)
    assert count_trained_on(third, asked) == 1, "so it does over several rounds"
    shutil.rmtree(config.run_dir)
    assert count_trained_on(third, asked) is None, "nobody knows what the first round was"


def test_near_questions_share_most_words() -> None:
    near = NearQuestions(["Who built the Kestrel Mill on the River Arden?"], 0.7)
    assert near.holds("who built the Kestrel Mill on the Arden?")
    assert not near.holds("Who owned the Orrin Lens on the River Arden?")
    assert not near.holds("")
    assert NearQuestions(["谁建造了克斯特雷尔磨坊"], 0.8).holds("谁建造了克斯特雷尔的磨坊")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        (json.dumps({"question": "Q?", "answers": ["1874"]}), "line 2: 'context'"),
        (json.dumps({"question": "Q?", "answers": "a", "context": "c"}), "line 2: 'answers' must be a list"),
        (json.dumps({"question": "", "answers": ["1874"], "context": "c"}), "line 2: 'question'"),
        (json.dumps({"question": "Q?", "answers": [1931], "context": "c"}), "line 2: 'answers' must hold strings"),
        (
            json.dumps({"id": "1", "question": "Q?", "answers": ["1874"], "context": "c"}),
            "line 2: another line has the id",
        ),
        ('["Q?"]', "line 2: not a JSON object"),
        (
            json.dumps({"question": "Q?", "answers": ["the", "?"], "context": "c"}),
            r"line 2: 'answers' = \['the', '\?'\]",
        ),
        (json.dumps({"question": "Q?", "answers": ["a \ud83d"], "context": "c"}), "line 2: not JSON in UTF-8"),
    ],
)
def test_a_bad_question_file_names_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"question": "Q\u2028?", "answers": ["1874"], "context": "c"}, ensure_ascii=False)
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        load_questions(Evaluate(questions=str(path)))
    assert len(load_questions(Evaluate(questions=str(path), max_questions=1))) == 1


def test_blank_lines_are_no_questions(tmp_path: Path) -> None:
    none = {"id": None, "kind": None}  # is as good as not there
    rows = [json.dumps({"question": f"Q{n}?", "answers": ["1874"], "context": "c", **none}) for n in range(2)]
    path = tmp_path / "questions.jsonl"
    path.write_text(f"\n{rows[0]}\n\n{rows[1]}\n\n")
    assert [(row.id, row.kind) for row in load_questions(Evaluate(questions=str(path)))] == [("2", ""), ("4", "")]
    assert [row.question for row in load_questions(Evaluate(questions=str(path)))] == ["Q0?", "Q1?"]
    assert [row.question for row in load_questions(Evaluate(questions=str(path), max_questions=1))] == ["Q0?"]


def test_a_context_that_leaves_no_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "Q?", "answers": ["1874"], "context": "word " * 600}))
    model = {"path": str(ROOT / ".models" / "smollm2-135m-instruct"), "max_model_len": 512}
    config = make_config(str(tmp_path), model=model)
    for field in ("questions", "unrelated"):
        refuse_long_contexts(config)
        with pytest.raises(ValueError, match=rf"evaluate\.{field}: '1' has 6.. tokens .* room for"):
            refuse_long_contexts(config.model_copy(update={"evaluate": Evaluate(**{field: str(path)})}))


def test_a_missing_question_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate\.questions .* no such file"):
        load_questions(Evaluate(questions=str(tmp_path / "none.jsonl")))


def test_a_question_file_without_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"evaluate\.questions .* has no questions"):
        load_questions(Evaluate(questions=str(path)))
