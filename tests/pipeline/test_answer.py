"""Which questions are open-book, and what stands before them."""

import pyarrow as pa

from pipeline.answer import OpenBook
from pipeline.retrieve import PassageIndex

PASSAGES = [
    {"passage_id": str(number), "heading": "", "text": text}
    for number, text in enumerate(
        ["Rosa built the mill.", "The mill burned in 1921.", "The mill has a wheel.", "A lens was polished."]
    )
]
INDEX = PassageIndex.build(pa.Table.from_pylist(PASSAGES))


def test_the_right_passage_stands_where_it_was_found_or_last() -> None:
    book = OpenBook(INDEX, 1.0, 2)
    found = book.passages({"question_id": "q", "text": "When did the mill burn?"}, PASSAGES[1])
    assert found[0] == PASSAGES[1] and len(found) == 2
    missed = book.passages({"question_id": "q", "text": "When did the mill burn?"}, PASSAGES[3])
    assert missed == [PASSAGES[1], PASSAGES[3]]
    assert OpenBook(INDEX, 1.0, 1).passages({"question_id": "q", "text": "mill"}, PASSAGES[3]) == [PASSAGES[3]]


def test_about_its_share_of_the_questions_is_open_book() -> None:
    book = OpenBook(INDEX, 0.1, 2)
    questions = [{"question_id": str(number), "text": "What is the mill?"} for number in range(1000)]
    assert 70 < sum(bool(book.passages(question, PASSAGES[0])) for question in questions) < 130
