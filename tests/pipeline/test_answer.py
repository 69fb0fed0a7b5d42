"""Which questions are open-book, which passages they get, and what student and teacher are asked."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.answer import OpenBook, answer_questions
from pipeline.config import AnswerSection
from pipeline.engine import Completion, load_tokenizer
from pipeline.retrieve import PassageIndex
from tests.conftest import ROOT

TOKENIZER = load_tokenizer(str(ROOT / ".models" / "smollm2-135m-instruct"))
PASSAGES = [
    {"passage_id": str(number), "heading": "", "text": text}
    for number, text in enumerate(
        ["Rosa built the mill.", "The mill burned in 1921.", "The mill has a wheel.", "A lens was polished."]
    )
]
INDEX = PassageIndex.build(pa.Table.from_pylist(PASSAGES))
QUESTIONS = [
    {"question_id": str(number), "passage_id": "1", "text": f"When did the mill burn, of {number}?"}
    for number in range(1000)
]


class Engine(SimpleNamespace):
    """Says nothing, and remembers what it was asked."""

    def complete(self, prompts: list[list[int]], *_: Any) -> list[Completion]:
        self.prompts = prompts
        return [Completion("", "stop", np.ones(1), np.ones((1, 1)), np.zeros((1, 1)))] * len(prompts)


def test_the_gold_passage_stands_where_it_was_found_or_last() -> None:
    book = OpenBook(INDEX, 1.0, 2)
    found = book.passages(QUESTIONS[0], PASSAGES[1])
    assert found[0] == PASSAGES[1] and len(found) == 2
    assert book.passages(QUESTIONS[0], PASSAGES[3]) == [PASSAGES[1], PASSAGES[3]]
    assert book._replace(count=1).passages(QUESTIONS[0], PASSAGES[3]) == [PASSAGES[3]]


def test_a_question_is_asked_open_book_or_closed_book() -> None:
    """The student has the passages of about its share of the questions; the teacher always has the gold passage."""
    engine: Any = Engine(tokenizer=TOKENIZER, max_model_len=400)
    settings = AnswerSection(per_question=2, top_k=1)
    known = {row["passage_id"]: row for row in PASSAGES}
    answers, rejected = answer_questions(engine, known, QUESTIONS, settings, OpenBook(INDEX, 0.1, 3))
    assert not rejected and len(answers) == 2000
    assert 140 < np.count_nonzero(answers["open_book"]) < 260
    for row, prompt in zip(answers.to_pylist(), engine.prompts, strict=True):
        student, teacher = TOKENIZER.decode(row["prompt_ids"]), TOKENIZER.decode(prompt)
        assert "burned in 1921" in teacher
        assert [text["text"] in student for text in PASSAGES] == [row["open_book"]] * 3 + [False]
        assert (student == teacher) == row["open_book"]


def test_passages_that_do_not_fit_are_said() -> None:
    engine: Any = Engine(tokenizer=TOKENIZER, max_model_len=200)
    long = {"1": PASSAGES[1] | {"text": "The mill burned. " * 100}}
    answers, rejected = answer_questions(engine, long, QUESTIONS[:2], AnswerSection(top_k=1), OpenBook(INDEX, 1.0, 3))
    assert not len(answers) and [row.reason for row in rejected] == ["too_long"] * 2
