"""The quota of a passage: slots, rounds, duplicates, counting; no engine needed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.answer import answer_job
from pipeline.base_model import BaseModel
from pipeline.config import QuestionSection
from pipeline.engine import EngineStats
from pipeline.question import QuestionWriter, _Quota, question_job
from pipeline.schema import PASSAGE as PASSAGE_SCHEMA
from pipeline.schema import Passage, to_table
from pipeline.store import Stage
from tests.conftest import make_config
from tests.pipeline.test_general import sampled

PASSAGE = {
    "passage_id": "p",
    "heading": "Mills",
    "text": "The Kestrel Mill was built in 1874 by Rosa Lindqvist. The Kestrel Mill ground barley for Arden.",
}
SETTINGS = QuestionSection(per_passage=5, kinds=["fact", "detail"], per_call=2)


def test_the_quota_is_shared_over_the_kinds_and_asked_for_in_calls() -> None:
    calls = _Quota(PASSAGE, SETTINGS).open_calls(0)
    assert [(call.kind, call.ordinal) for call in calls] == [("fact", 0), ("fact", 1), ("detail", 0)]
    assert len({call.request_id(seed) for call in calls for seed in (0, 1)}) == 6


def test_a_quota_by_sentences_grows_with_the_passage() -> None:
    settings = SETTINGS.model_copy(update={"per_sentence": 3})
    longer = PASSAGE | {"text": f"{PASSAGE['text']} Its wheel was lost in the flood of 1921."}
    counts = [len(_Quota(passage, settings).open_calls(0)) for passage in (PASSAGE, longer)]
    assert counts == [4, 5], "two sentences: 3 questions of each kind, in calls of 2; three: 5 and 4"


def test_a_second_round_asks_only_for_what_is_missing_and_under_other_ids() -> None:
    quota = _Quota(PASSAGE, SETTINGS)
    first = quota.open_calls(0)
    quota.take(first[0], "1. Who built the Kestrel Mill?\n2. When was the Kestrel Mill built?")
    second = quota.open_calls(1)
    assert [(call.kind, call.ordinal) for call in second] == [("fact", 0), ("detail", 0)]
    assert {c.request_id(0) for c in first}.isdisjoint(c.request_id(0) for c in second)


def test_every_candidate_becomes_a_question_or_a_rejected_row() -> None:
    quota = _Quota(PASSAGE, SETTINGS)
    (fact, _, detail) = quota.open_calls(0)
    quota.take(fact, "1. Who built the Kestrel Mill?\n2. Who built it?\n3. who built the Kestrel mill?")
    quota.take(detail, "no questions here")
    quota.take(detail._replace(round=1), "1. What did Napoleon do at the Kestrel Mill?")
    quota.take(
        detail._replace(round=2), "1. When was the Kestrel Mill built?\n2. Who is Rosa Lindqvist?\n3. What is Arden?"
    )
    assert quota.num_candidates == len(quota.questions) + len(quota.rejected) == 8
    assert [question.text for question in quota.questions] == [
        "Who built the Kestrel Mill?",
        "When was the Kestrel Mill built?",
        "Who is Rosa Lindqvist?",
    ]
    assert [row.reason for row in quota.rejected] == [
        "not_standalone",
        "duplicate_question",
        "unparsable",
        "off_passage",
        "over_quota",
    ]
    ids = [question.question_id for question in quota.questions] + [row.record_id for row in quota.rejected]
    assert len(set(ids)) == len(ids)
    assert not quota.is_full


def test_what_a_passage_was_asked_before_is_not_asked_again() -> None:
    quota = _Quota(PASSAGE, SETTINGS, had=[{"kind": "fact", "text": "Who built the Kestrel Mill?"}])
    call = quota.open_calls(0)[0]
    assert "answers: The Kestrel Mill ground" in quota.chat(call)[-1]["content"], "it goes on at the next sentence"
    quota.take(call, "1. Who built the Kestrel mill?\n2. When was the Kestrel Mill built?")
    assert [question.text for question in quota.questions] == ["When was the Kestrel Mill built?"]
    assert [row.reason for row in quota.rejected] == ["duplicate_question"]


def test_a_passage_is_asked_for_what_no_answer_told() -> None:
    settings = QuestionSection(per_passage=12, kinds=["fact"], per_call=2)

    def asked(told: set[str]) -> list[str]:
        quota = _Quota(PASSAGE, settings, [], told)
        return [
            quota.chat(call)[-1]["content"].partition("that this sentence answers: ")[2] for call in quota.open_calls(0)
        ]

    for text in asked({"kestrel", "mill", "ground", "barley", "arden", "built"}):
        assert text.startswith("The Kestrel Mill was built in 1874"), "of the other sentence all is told"
        assert "The answers are: Rosa Lindqvist, 1874." in text or "The answers are: 1874, Rosa Lindqvist." in text
    sentences = {text.partition("\n")[0] for text in asked({"kestrel", "mill"})}
    assert len(sentences) == 2, "both have something left"
    everything = {"kestrel", "mill", "ground", "barley", "arden", "built", "1874", "rosa", "lindqvist"}
    assert asked(everything) == asked(set()), "with nothing left, it is asked as it was first"


def test_calls_of_a_kind_walk_through_the_sentences() -> None:
    quota = _Quota(PASSAGE, SETTINGS)
    asked = [quota.chat(call)[-1]["content"] for call in quota.open_calls(0) if call.kind == "fact"]
    assert "answers: The Kestrel Mill was built" in asked[0]
    assert "answers: The Kestrel Mill ground" in asked[1]


def test_a_passage_that_leaves_no_room_is_asked_no_more() -> None:
    quota = _Quota(PASSAGE, QuestionSection(per_passage=2, kinds=["fact"], per_call=2))
    (call,) = quota.open_calls(0)
    quota.give_up(call, 5000, 1000)
    assert not quota.open_calls(1)
    assert [row.reason for row in quota.rejected] == ["too_long"]
    assert not quota.is_full


def test_answers_are_made_anew_with_their_questions(tmp_path: Path) -> None:
    base, chunk = BaseModel("m", "m", "r", "t", "c"), Stage(str(tmp_path), "chunk")
    chunk.open({})
    chunk.close(0.0)
    settings = []
    for seed in (0, 0, 1):
        config = make_config(str(tmp_path), question={"seed": seed})
        settings.append(answer_job(config, base, question_job(config, base)).settings)
    assert settings[0] == settings[1] != settings[2]


def test_a_blank_passage_is_asked_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def render(_: Any, chat: list[dict[str, str]]) -> list[int]:
        asked.append(chat[-1]["content"])
        return []

    monkeypatch.setattr("pipeline.question.render_chat", render)
    passages = [Passage("p", "d", "Mills", 0, 9, PASSAGE["text"]), Passage("blank", "d", "", 9, 12, " \n\n")]
    chunk = Stage(str(tmp_path), "chunk")
    chunk.commit("0", [to_table(passages, PASSAGE_SCHEMA)], [], 2)
    engine: Any = SimpleNamespace(stats=EngineStats(), tokenizer=None, max_model_len=2048)
    engine.complete = lambda prompts, *_, **__: [sampled("1. Who built the Kestrel Mill?") for _ in prompts]
    unit = QuestionWriter(str(tmp_path), SETTINGS, engine).do_unit({"name": "0-00000"})
    assert unit.stats["passages"] == 1
    assert asked and all("The Kestrel Mill was built" in text for text in asked)
