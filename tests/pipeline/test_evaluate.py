"""Metrics against the paper's rules, intervals, and the questions file."""

import json
from pathlib import Path

import pytest

from pipeline.config import Evaluate
from pipeline.evaluate import ARMS, interval, load_questions, make_report, substring_match, token_f1


@pytest.mark.parametrize(
    ("reply", "answers", "match"),
    [
        ("It was built in 1874, by Rosa Lindqvist.", ["Rosa Lindqvist"], True),
        ("It was built by the Rosa-Lindqvist company.", ["a Rosa Lindqvist"], True),
        ("It was built by Rosa.", ["Rosa Lindqvist", "the Rosa"], True),
        ("It was built by Ida Voss.", ["Rosa Lindqvist"], False),
        ("", ["Rosa"], False),
        ("Anything at all", ["the", "..."], False),
    ],
)
def test_substring_match(reply: str, answers: list[str], match: bool) -> None:
    assert substring_match(reply, answers) is match


def test_token_f1_takes_the_best_answer() -> None:
    assert token_f1("Rosa Lindqvist", ["rosa lindqvist!"]) == 1.0
    assert token_f1("built by Rosa Lindqvist", ["Ida Voss", "Rosa Lindqvist"]) == pytest.approx(2 * 2 / 6)
    assert token_f1("nothing", ["Rosa"]) == 0.0


def test_intervals_hold_the_mean_and_shrink_with_more_questions() -> None:
    settings = Evaluate(bootstrap_resamples=500)
    low, high = interval([0.0, 1.0] * 20, settings)
    assert 0.3 < low < 0.5 < high < 0.7
    narrow = interval([0.0, 1.0] * 2000, settings)
    assert narrow[1] - narrow[0] < (high - low) / 5
    assert interval([1.0, 1.0], settings) == [1.0, 1.0]
    assert interval([0.0, 1.0] * 20, settings) == [low, high]


@pytest.mark.parametrize(("adapter", "closed"), [([1.0, 0.0, 1.0, 0.0], 0.5), ([1.0] * 4, 1.0), ([0.0] * 4, 0.0)])
def test_gap_closed(adapter: list[float], closed: float) -> None:
    points = {"closed_book": [0.0] * 4, "gold_passage": [1.0] * 4, "adapter": adapter}
    report = make_report({arm: {"substring_match": points[arm], "token_f1": points[arm]} for arm in ARMS}, Evaluate())
    assert report["gap_closed"] == closed
    assert report["adapter_minus_closed_book"]["substring_match"] == closed


def test_no_gap_gives_no_share() -> None:
    report = make_report({arm: {"substring_match": [0.0, 1.0], "token_f1": [0.0, 1.0]} for arm in ARMS}, Evaluate())
    assert report["gap_closed"] is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        (json.dumps({"question": "Q?", "answers": ["a"]}), "line 2: 'context'"),
        (json.dumps({"question": "Q?", "answers": "a", "context": "c"}), "line 2: 'answers' must be a list"),
        (json.dumps({"question": "", "answers": ["a"], "context": "c"}), "line 2: 'question'"),
    ],
)
def test_a_bad_question_file_names_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"question": "Q?", "answers": ["a"], "context": "c"})
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        load_questions(Evaluate(questions=str(path)))
    assert len(load_questions(Evaluate(questions=str(path), max_questions=1))) == 1


def test_a_missing_question_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate\.questions .* no such file"):
        load_questions(Evaluate(questions=str(tmp_path / "none.jsonl")))
