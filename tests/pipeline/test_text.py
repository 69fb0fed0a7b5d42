"""Rules about words, sentences, questions and answers, in several scripts."""

import pytest

from pipeline.text import (
    content_words,
    declines,
    invents_number,
    is_about,
    is_standalone,
    sentences,
    speaks_of_text,
    told_words,
    untold,
)

PASSAGE = "The Kestrel Mill on the Arden was built in 1874 by Rosa Lindqvist. It ground barley until the flood of 1921."


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


def test_sentences_of_scripts_without_spaces_are_told_apart() -> None:
    text = "磨坊建于1874年。它磨大麦。镜子很重。"
    assert "".join(sentences(text)) == text and len(sentences(text)) == 3


def test_sentences_keep_the_whole_passage_and_are_never_empty() -> None:
    assert sentences(PASSAGE) == [PASSAGE.partition(". ")[0] + ".", PASSAGE.partition(". ")[2]]
    assert sentences("Mills") == ["Mills"]


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
