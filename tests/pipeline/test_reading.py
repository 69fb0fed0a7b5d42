"""How passages are changed so that only reading helps, and what is asked so; the engine is the only stand-in."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import AnswerSection
from pipeline.engine import Completion, EngineStats
from pipeline.reading import READING, ReadingWriter, exchange, names_in
from pipeline.schema import ANSWER, PASSAGE, QUESTION, Passage, Question, to_table
from pipeline.store import Stage
from tests.conftest import rows

TEXTS = [
    "The mill on the River Arden was built in 1874 by Rosa Lindqvist. Lindqvist sold it to Emil Tarn in 1880.",
    "The river at the mill of Rosa Lindqvist, near Sabel, is 4 metres deep. Its garden is older.",
]
NAMES = ["Arden", "Emil", "Lindqvist", "Rosa", "Sabel", "Tarn"]


def test_names_are_words_that_never_lack_their_capital_letter() -> None:
    assert names_in(TEXTS) == NAMES, "neither River, which is a river too, nor The"
    assert names_in(["# Set it up\n\n- Configure the port\n- Restart the server\nInstall the tool"]) == []


def test_names_and_numbers_are_exchanged_alike_in_all_texts() -> None:
    for seed in range(20):
        changed = exchange(TEXTS, "Who built the mill?", NAMES, random.Random(seed))
        words, before = [" ".join(texts).replace(".", "").replace(",", "").split() for texts in (changed, TEXTS)]
        others = dict(zip(before, words, strict=True))
        assert [others[word] for word in before] == words, "a word becomes the same wherever it stands"
        assert sorted(others[name] for name in NAMES) == NAMES, "no name is lost, none comes from elsewhere"
        assert all(others[word] != word for word in [*NAMES, "1874", "1880", "4"])
        assert all(others[word] == word for word in before if word not in NAMES and not word.isdigit())
        assert (others["1874"], others["1880"], len(others["4"])) == ("1880", "1874", 1)


@pytest.mark.parametrize(
    "question", ["What did Rosa Lindqvist build in 1874?", "what did rosa lindqvist build in 1874?"]
)
def test_what_the_question_names_stays(question: str) -> None:
    changed = exchange(TEXTS, question, NAMES, random.Random(0))
    assert all("Rosa Lindqvist" in text for text in changed) and "1874" in changed[0] and "1880" not in changed[0]


def test_numbers_are_found_where_no_spaces_are() -> None:
    (changed,) = exchange(["磨坊建于1874年,高20米,1921年 the 21st"], "", [], random.Random(0))
    assert changed[:12] == "磨坊建于1921年,高2" and changed[12] != "0" and changed[13:] == "米,1874年 the 21st"


class Engine:
    """Answers "Yes." to everything."""

    stats = EngineStats()

    tokenizer = None

    def __init__(self, room: int) -> None:
        self._room = room

    def fits(self, chat: list[dict[str, str]], reply_tokens: int) -> bool:
        return len(chat[0]["content"]) <= self._room

    def complete(self, prompts: list[list[int]], *_: Any) -> list[Completion]:
        ids = np.array([[1, 2]], np.int32)
        return [Completion("Yes.", "stop", np.array([1], np.int32), ids, np.zeros((1, 2), np.float32)) for _ in prompts]


@pytest.mark.parametrize(("room", "reason"), [(10_000, None), (100, "too_long")])
def test_new_questions_are_asked_passage_by_passage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, reason: str | None
) -> None:
    monkeypatch.setattr("pipeline.general.render_chat", lambda _, chat: list(map(ord, chat[0]["content"])))
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    old, *new = [Passage(f"p{number}", "d", "", number, 9, text) for number, text in enumerate([*TEXTS, "..."])]

    def ask(passage: Passage) -> list[Question]:
        return [Question(f"q{passage.passage_id}{n}", passage.passage_id, "fact", f"Question {n}?") for n in range(3)]

    for run_dir, passages in ((before, [old]), (after, [old, *new])):
        questions = [question for passage in passages for question in ask(passage)]
        for name, unit, table in (
            ("chunk", "0", to_table(passages, PASSAGE)),
            ("question", "0-00000", to_table(questions, QUESTION)),
            ("answer", "0-00000", ANSWER.empty_table()),
        ):
            stage = Stage(run_dir, name)
            stage.open({})
            stage.commit(unit, [table], [], table.num_rows)
            stage.close(0)
    stage = Stage(after, READING)
    stage.open({})
    engine: Any = Engine(room)
    settings = AnswerSection(top_k=2)
    unit = ReadingWriter(after, settings, 2, 1, engine, before).do_unit({"name": "0-00000"})
    if reason:
        assert unit.rejected == {reason: 4} and unit.rows_out == 0
        return
    asked = [row["question_id"][:3] for row in rows(stage)]
    assert asked == ["qp1", "qp1", "qp2", "qp2"], "two of each new passage, also of one without words"
    prompts = ["".join(map(chr, row["prompt_ids"])) for row in rows(stage)]
    assert all("metres deep" in prompt and "near Sabel" not in prompt for prompt in prompts[:2])
