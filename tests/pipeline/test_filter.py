"""What is rejected, why, and what coverage counts."""

import pyarrow as pa
import pytest

from pipeline.config import FilterSection
from pipeline.filter import find_reasons, measure_coverage
from pipeline.schema import ANSWER


def answers(*rows: tuple[str, str, str]) -> pa.Table:
    """Build answers from (question_id, text, finish_reason)."""
    return pa.Table.from_pylist(
        [
            {
                "answer_id": str(number),
                "question_id": question_id,
                "passage_id": "p",
                "text": text,
                "finish_reason": finish_reason,
                "prompt_ids": [1],
                "answer_ids": [2],
                "topk_ids": [2],
                "topk_logprobs": [0.0],
            }
            for number, (question_id, text, finish_reason) in enumerate(rows)
        ],
        schema=ANSWER,
    )


QUESTIONS = {"q": "Who built the mill?", "r": "When was the mill built?"}
PASSAGES = {"p": {"heading": "Mills of 1880", "text": "Rosa Lindqvist built the mill in 1874, for 2,400 crowns."}}


@pytest.mark.parametrize(
    ("text", "finish_reason", "reason"),
    [
        ("Rosa Lindqvist built the mill.", "stop", None),
        ("  ...  ", "stop", "empty"),
        ("Rosa Lindqvist built the", "length", "unfinished"),
        ("who built the mill", "stop", "echoes_question"),
        ("According to the passage, Rosa Lindqvist.", "stop", "leak_phrase"),
        ("Rosa Lindqvist, in 1874, for 2400 crowns; it is 1 of the mills of 1880.", "stop", None),
        ("Rosa Lindqvist, for 2 400 crowns, twelve (12) years after 1874\u201380.", "stop", None),
        ("Rosa Lindqvist, in \u0661\u0668\u0667\u0664.", "stop", None),
        ("Rosa Lindqvist, in 187", "stop", None),
        ("Rosa Lindqvist, in 1875.", "stop", "invented_number"),
    ],
)
def test_reasons(text: str, finish_reason: str, reason: str | None) -> None:
    assert find_reasons(answers(("q", text, finish_reason)), QUESTIONS, PASSAGES, FilterSection()) == [reason]


def test_only_the_same_answer_to_the_same_question_is_a_duplicate() -> None:
    table = answers(("q", "In 1874.", "stop"), ("q", "in 1874", "stop"), ("r", "In 1874.", "stop"))
    assert find_reasons(table, QUESTIONS, PASSAGES, FilterSection()) == [None, "duplicate_answer", None]


def test_unfinished_leaking_and_inventing_answers_are_kept_on_request() -> None:
    table = answers(("q", "The text says 1875 and", "length"))
    settings = FilterSection(keep_unfinished=True, reject_leak_phrases=False, reject_invented_numbers=False)
    assert find_reasons(table, QUESTIONS, PASSAGES, settings) == [None]


def test_coverage_counts_the_words_that_an_answer_gives_to_its_question() -> None:
    text = "Rosa Lindqvist built the Kestrel Mill. Barley prices collapsed after the great flood downstream."
    passages = {"p": {"text": text}}

    def told(*texts: str) -> dict[str, float]:
        return measure_coverage(passages, QUESTIONS, answers(*(("q", text, "stop") for text in texts)))

    assert told() == {"words": 11, "words_told": 0}
    assert told("Rosa Lindqvist built the Kestrel Mill.")["words_told"] == 3, "the question has two"
    assert told("Rosa Lindqvist, a baker of Oslo.")["words_told"] == 2, "two of them are not in the passage"
    assert told(text)["words_told"] == 0, "it recites"
