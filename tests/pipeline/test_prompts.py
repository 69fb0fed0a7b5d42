"""Prompts and the parsing of replies."""

from typing import Any

import pytest

from pipeline.config import QUESTION_KINDS, QuestionKind
from pipeline.prompts import (
    content_words,
    declines,
    invents_number,
    is_about,
    is_standalone,
    judge_chat,
    parse_grade,
    parse_questions,
    prompts_digest,
    question_chat,
    sentences,
    speaks_of_text,
    student_chat,
    teacher_chat,
    told_words,
    untold,
)

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


def test_what_a_short_answer_gives_to_its_question_is_told() -> None:
    question = "Who built the mill on the Arden?"
    assert told_words(question, "Rosa Lindqvist built the mill in 1874.") == {"rosa", "lindqvist", "1874"}
    assert not told_words(question, "The mill on the Arden was built.")
    assert not told_words(question, PASSAGE), "it recites"


def test_what_was_not_told_stands_with_its_neighbours() -> None:
    sentence = "Rosa Lindqvist built the Kestrel Mill, a corn mill, on the Arden in 1874; Rosa Lindqvist sold it."
    assert untold(sentence, {"1874", "arden"}) == [
        "Rosa Lindqvist built",
        "Kestrel Mill",
        "corn mill",
        "Rosa Lindqvist sold",
    ]
    assert untold(sentence, {"built", "kestrel", "sold", "1874", "corn", "mill", "arden"}) == ["Rosa Lindqvist"]
    assert untold(sentence, content_words(sentence)) == []
    assert untold("\u78e8\u574a\u5efa\u4e8e1874\u5e74\u3002", set()) == [], "it is one word without spaces"


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
    ("question", "standalone"),
    [
        ("Who built the Kestrel Mill?", True),
        ("What happened to the Kestrel Mill in 1921?", True),
        ("Who built it?", False),
        ("What did she build?", False),
        ("What does the passage say about the Kestrel Mill?", False),
        ("What is the author's opinion of the Kestrel Mill, according to the text?", False),
        ("Why?", False),
    ],
)
def test_standalone(question: str, standalone: bool) -> None:
    assert is_standalone(question, PASSAGE) is standalone


@pytest.mark.parametrize(
    ("question", "about"),
    [
        ("Who built the Kestrel Mill on the Arden?", True),
        ("Until when did the mill grind barley?", True),
        ("What did Napoleon think of the Kestrel Mill?", False),
        ("Was the Kestrel Mill sold in 1955?", False),
        ("How do quantum computers factor numbers?", False),
        ("What did \u00c9mile Zola build beside the Kestrel Mill?", False),
    ],
)
def test_about_the_passage(question: str, about: bool) -> None:
    assert is_about(question, PASSAGE) is about


@pytest.mark.parametrize(
    ("question", "about"),
    [
        ("In welchem Jahr wurde die Br\u00fccke \u00fcber die Elbe erbaut?", True),
        ("Wie hei\u00dft der Ingenieur der Br\u00fccke \u00fcber die Elbe?", True),
        ("Welche Br\u00fccke \u00fcber die Elbe wurde 1931 erbaut?", False),
        ("Wie hoch sind die Berge am Rand der Ebene?", False),
    ],
)
def test_a_german_noun_is_no_name(question: str, about: bool) -> None:
    passage = "Die Br\u00fccke \u00fcber die Elbe wurde 1893 von Claus K\u00f6pcke erbaut und ist heute ein Denkmal."
    assert is_about(question, passage) is about


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("According to the text, the mill was built in 1874.", True),
        ("The passage states that the mill was built in 1874.", True),
        ("As mentioned above, it ground barley.", True),
        ("The provided information given here says 1874, in this article.", True),
        ("The mill was built in 1874.", False),
        ("In the context of milling, grist is grain; the author of the treatise and the Article 8 say so.", False),
        ("He passed the bar and texted a friend.", False),
    ],
)
def test_leak_phrases(text: str, leaks: bool) -> None:
    assert speaks_of_text(text) is leaks


def test_a_row_of_numbers_is_not_one_number() -> None:
    table = "North 120 340 560\nSouth 95 2,400 310"
    assert not any(invents_number(f"{number} units were sold.", table) for number in (340, 560, 310, 2400))
    assert invents_number("341 units were sold.", table)


def test_words_of_scripts_without_spaces_count() -> None:
    assert content_words("\u78e8\u574a\u5efa\u4e8e1874\u5e74")
    assert is_standalone("\u78e8\u574a\u5efa\u4e8e\u54ea\u4e00\u5e74\uff1f", "\u78e8\u574a\u5efa\u4e8e1874\u5e74\u3002")


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


def test_sentences_of_scripts_without_spaces_are_told_apart() -> None:
    text = "磨坊建于1874年。它磨大麦。镜子很重。"
    assert "".join(sentences(text)) == text and len(sentences(text)) == 3


def test_sentences_keep_the_whole_passage_and_are_never_empty() -> None:
    assert sentences(PASSAGE) == [PASSAGE.partition(". ")[0] + ".", PASSAGE.partition(". ")[2]]
    assert sentences("Mills") == ["Mills"]


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


@pytest.mark.parametrize(
    "reply",
    [
        "I'm not aware of any prize of that name.",
        "I don't know.",
        "I don\u2019t know.",
        "I was unable to find it.",
        "I could not find any information about it.",
        "There is no record of such a person.",
        "It is unknown who wrote it.",
    ],
)
def test_a_refusal_is_seen(reply: str) -> None:
    assert declines(reply)


@pytest.mark.parametrize(
    "reply", ["It was founded in 1931 by Ida Voss.", "The known author is Ida.", "I know it well."]
)
def test_an_answer_is_no_refusal(reply: str) -> None:
    assert not declines(reply)
