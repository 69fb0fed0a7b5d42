"""Prompts and the parsing of replies."""

from typing import Any

import pytest

from pipeline.config import QUESTION_KINDS, QuestionKind
from pipeline.prompts import (
    judge_chat,
    parse_grade,
    parse_questions,
    prompts_digest,
    question_chat,
    student_chat,
    teacher_chat,
)
from pipeline.text import is_about, is_standalone, speaks_of_text

PASSAGE = "The Kestrel Mill on the Arden was built in 1874 by Rosa Lindqvist. It ground barley until the flood of 1921."


def test_teacher_and_student_differ_by_what_stands_before_the_question() -> None:
    (teacher,), (student,) = teacher_chat(PASSAGE, "Mills", "Who built it?"), student_chat("Who built it?")
    assert teacher["role"] == student["role"] == "user"
    assert teacher["content"].endswith(student["content"])
    assert PASSAGE in teacher["content"] and PASSAGE not in student["content"]
    assert teacher["content"].startswith("Mills")


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_every_kind_has_a_worked_example_that_follows_its_own_rules(kind: QuestionKind) -> None:
    ask_example, example, ask = question_chat(PASSAGE, "", kind, 3, "It ground barley until the flood of 1921.")
    questions = parse_questions(example["content"])
    assert len(questions) == 3
    source = ask_example["content"].partition("\n\n---")[0]
    for question in questions:
        assert is_about(question, source), question
        assert not speaks_of_text(question)
    assert ask["content"].startswith(PASSAGE)


def test_questions_are_asked_for_the_answers_that_are_wanted() -> None:
    *example, ask = question_chat(PASSAGE, "", "fact", 3, PASSAGE, ["Rosa Lindqvist", "1874"])
    *same, plain = question_chat(PASSAGE, "", "fact", 3, PASSAGE)
    assert "The answers are: Rosa Lindqvist, 1874.\n" in ask["content"]
    assert example == same and "The answers" not in plain["content"]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("1. Who built it?\n2. When?", ["Who built it?", "When?"]),
        ("1) Who built it?\n\n2) When?", ["Who built it?", "When?"]),
        ("Here are the questions:\n- **Who built it?**\n* When?", ["Who built it?", "When?"]),
        ("Question 1. Who built it?\nQ2: When?", ["Who built it?", "When?"]),
        ('["Who built it?", "When?"]', ["Who built it?", "When?"]),
        ("Who built it?\nWhen?", ["Who built it?", "When?"]),
        ("1. Who built it?\n2. When was the mi", ["Who built it?"]),
        ("1. \u8c01\u5efa\u9020\u4e86\u5b83\uff1f", ["\u8c01\u5efa\u9020\u4e86\u5b83\uff1f"]),
        ('{"a": 1}', []),
        ("I cannot help with that.", []),
        ("", []),
        ("1. " + "x" * 500 + "?", []),
        ('["Who built it \\ud83c?"]', ["Who built it ??"]),
        ("[" * 5000, []),
    ],
)
def test_replies_are_parsed(reply: str, expected: list[str]) -> None:
    assert parse_questions(reply) == expected


@pytest.mark.parametrize(
    ("question", "passage"),
    [
        ("केस्ट्रल मिल किस नदी पर स्थित है?", "केस्ट्रल मिल आर्डेन नदी पर स्थित है।"),
        ("কেস্ট্রেল মিল কোন নদীর তীরে?", "কেস্ট্রেল মিল আর্ডেন নদীর তীরে অবস্থিত।"),
        ("โรงสีเคสเทรลอยู่ที่ไหน?", "โรงสีเคสเทรลตั้งอยู่บนแม่น้ำอาร์เดน"),
        ("Πότε χτίστηκε η γέφυρα Κέστρελ;", "1874: χτίστηκε η γέφυρα Κέστρελ."),
    ],
)
def test_questions_of_other_scripts_are_kept(question: str, passage: str) -> None:
    assert parse_questions(f"1. {question}\n2. Ende") == [question]
    assert is_standalone(question, passage) and is_about(question, passage)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("_EXAMPLE_PASSAGE", "Another example."),
        ("teacher_chat", lambda passage, heading, question: [question]),
        ("student_chat", lambda question: [question]),
    ],
)
def test_a_changed_prompt_changes_the_digest(monkeypatch: pytest.MonkeyPatch, name: str, changed: Any) -> None:
    before = prompts_digest()
    monkeypatch.setattr(f"pipeline.prompts.{name}", changed)
    assert prompts_digest() != before


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Reason: it names her.\nGrade: correct", True),
        ("Grade: **wrong**", False),
        ("GRADE: correct is not what I would say.\nGrade: wrong", False),
        ("The reply is correct.", None),
        ("", None),
    ],
)
def test_a_grade_is_read_or_missing(text: str, grade: bool | None) -> None:
    assert parse_grade(text) is grade


def test_the_judge_sees_question_answers_and_reply_after_worked_examples_of_both_grades() -> None:
    *examples, last = judge_chat("Who built it?", ["Rosa", "R. Lindqvist"], "Ida did.")
    assert {parse_grade(turn["content"]) for turn in examples if turn["role"] == "assistant"} == {True, False}
    assert all(part in last["content"] for part in ("Who built it?", "Rosa, or R. Lindqvist", "Ida did."))
