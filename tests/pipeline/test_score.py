"""Metrics against the paper's rules, intervals, comparisons and calibration."""

import numpy as np
import pytest
from scipy.stats import binomtest

from pipeline.config import Evaluate
from pipeline.score import (
    calibrate,
    compare_kl,
    group_means,
    interval,
    make_report,
    sign_test,
    substring_match,
    token_f1,
)

ENDS = ("closed_book", "adapter", "gold_passage")


@pytest.mark.parametrize(
    ("reply", "answers", "match"),
    [
        ("It was built in 1874, by Rosa Lindqvist.", ["Rosa Lindqvist"], True),
        ("It was built by the Rosa-Lindqvist company.", ["a Rosa Lindqvist"], True),
        ("It was built by Rosa.", ["Rosa Lindqvist", "the Rosa"], True),
        ("It was built by Ida Voss.", ["Rosa Lindqvist"], False),
        ("", ["Rosa"], False),
        ("Anything at all", ["the", "..."], False),
        ("It was Rosa O'Brien, of l'Église, who said 'The Mill'.", ["O\u2019Brien"], True),
        ("It was Rosa O'Brien, of l'Église, who said 'The Mill'.", ["L\u2019Église"], True),
        ("It was Rosa O'Brien, of l'Église, who said 'The Mill'.", ["“The Mill”"], True),
        ("红楼梦的作者", ["《红楼梦》"], True),
        ("It cost 2400 crowns.", ["2,400"], True),
        ("It cost 2,400 crowns, in 1874.", ["2400"], True),
        ("It cost \uff12\uff14\uff10\uff10 crowns.", ["2400"], True),
        ("In 1874, 200 came.", ["1874200"], False),
        ("It is in **Schedule B**.", ["Schedule A"], False),
        ("It is in **Schedule A**.", ["Schedule A"], True),
        ("It was written in C++.", ["C++"], True),
        ("It was written in C.", ["C++"], False),
        ("Five percent, or 5.", ["5%"], True),
        ("It got a B.", ["B\u2013", "A"], False),
        ("It got a B\u2014.", ["B-"], True),
        ("It was built by Ida.", ["B"], False),
        ("B) Ida Voss", ["B"], True),
        ("It is Vitamin-A, or \u201cPlan A\u201d.", ["vitamin A", "x"], True),
        ("It is in Schedule All.", ["Schedule A"], False),
        ("\u7b54\u6848\u662f\u6c34", ["\u6c34\u3002"], True),
        ("\u7b54\u6848\u662f\u6c34\u3002", ["\u3002"], False),
        ("The train comes at eight.", ["Der Zug kommt um acht an."], False),
        ("Zug kommt um acht an", ["Der Zug kommt um acht an."], False),
    ],
)
def test_substring_match(reply: str, answers: list[str], match: bool) -> None:
    assert substring_match(reply, answers) is match


def test_token_f1_takes_the_best_answer() -> None:
    assert token_f1("Rosa Lindqvist", ["rosa lindqvist!"]) == 1.0
    assert token_f1("built by Rosa Lindqvist", ["Ida Voss", "Rosa Lindqvist"]) == pytest.approx(2 * 2 / 6)
    assert token_f1("nothing", ["Rosa"]) == 0.0


def test_token_f1_leaves_out_no_article_that_tells() -> None:
    assert token_f1("Schedule A", ["Schedule A"]) == token_f1("C++.", ["C++"]) == 1.0
    assert token_f1("Schedule B", ["Schedule A"]) == 0.5
    assert token_f1("C", ["C++"]) == 0.0


def test_without_spaces_characters_are_tokens() -> None:
    assert token_f1("磨坊由罗莎建造。", ["罗莎建造了磨坊"]) == pytest.approx(2 * 6 / 14)
    assert token_f1("建于1874年", ["1874年"]) == pytest.approx(2 * 2 / 6)


def test_intervals_hold_the_mean_and_shrink_with_more_questions() -> None:
    settings = Evaluate(bootstrap_resamples=500)
    low, high = interval([0.0, 1.0] * 20, settings)
    assert 0.3 < low < 0.5 < high < 0.7
    narrow = interval([0.0, 1.0] * 2000, settings)
    assert narrow[1] - narrow[0] < (high - low) / 5
    assert interval([0.0, 1.0] * 20, settings) == [low, high]


def test_answers_that_are_all_right_or_all_wrong_have_the_exact_interval() -> None:
    for right in (0, 24):
        exact = binomtest(right, 24).proportion_ci(method="exact")
        assert interval([right / 24] * 24, Evaluate()) == pytest.approx([exact.low, exact.high])
    low, high = interval([0.0] * 24, Evaluate(), least=-1.0)
    assert -low == high == pytest.approx(binomtest(0, 24).proportion_ci(method="exact").high)


@pytest.mark.parametrize(("adapter", "closed"), [([1.0, 0.0] * 4, 0.5), ([1.0] * 8, 1.0), ([0.0] * 8, 0.0)])
def test_gap_closed(adapter: list[float], closed: float) -> None:
    points = {"closed_book": [0.0] * 8, "adapter": adapter, "gold_passage": [1.0] * 8}
    report = make_report({arm: {"token_f1": points[arm]} for arm in ENDS}, "token_f1", Evaluate())
    assert report["gap_closed"] == closed
    assert report["comparisons"][0]["difference"] == closed
    if not 0 < closed < 1:
        assert report["gap_closed_interval"] is None, "what is the same in every resample is no interval"
    else:
        low, high = report["gap_closed_interval"]
        assert low < closed < high


@pytest.mark.parametrize("gold", [[1.0, 0.0] * 20, [1.0, 0.0] * 19 + [1.0, 1.0], [0.0] * 40])
def test_no_clear_gap_gives_no_share(gold: list[float]) -> None:
    """Of one question that the passage adds, an adapter that loses nine would close -900 %."""
    points = {"closed_book": [1.0, 0.0] * 20, "adapter": [0.0] * 18 + [1.0, 0.0] * 11, "gold_passage": gold}
    report = make_report({arm: {"token_f1": points[arm]} for arm in ENDS}, "token_f1", Evaluate())
    assert report["gap_closed"] is None and report["gap_closed_interval"] is None


def test_resamples_without_a_gap_are_left_out_quietly(recwarn: pytest.WarningsRecorder) -> None:
    gold = [0.0, 1.0] * 2 + [1.0] * 4  # 8 of 2,000 resamples have none of the last four
    points = {"closed_book": [0.0, 1.0] * 2 + [0.0] * 4, "adapter": gold, "gold_passage": gold}
    report = make_report({arm: {"token_f1": points[arm]} for arm in ENDS}, "token_f1", Evaluate())
    assert report["gap_closed"] == 1 and report["gap_closed_interval"] is None
    assert not recwarn.list


def test_arms_are_compared_question_by_question() -> None:
    """Two arms that differ on one question of 40 always by the same sign have a narrow interval around that."""
    base = [0.0, 1.0] * 20
    better = [1.0, *base[1:]]
    points = {"closed_book": base, "sft": base, "adapter": better, "gold_passage": [1.0] * 40}
    report = make_report({arm: {"token_f1": values} for arm, values in points.items()}, "token_f1", Evaluate())
    assert list(report["scores"]) == ["closed_book", "sft", "adapter", "gold_passage"]
    over_sft = next(row for row in report["comparisons"] if row["over"] == "sft")
    assert over_sft["difference"] == pytest.approx(1 / 40)
    assert 0 <= over_sft["interval"][0] < over_sft["interval"][1] < 0.1
    assert over_sft["p"] == 1.0, "one question says nothing"


@pytest.mark.parametrize(("better", "worse", "p"), [(0, 0, 1.0), (4, 0, 0.125), (9, 2, 0.0654), (0, 10, 0.00195)])
def test_the_sign_test_is_exact(better: int, worse: int, p: float) -> None:
    differences = np.array([0.5] * better + [-0.1] * worse + [0.0] * 20)
    assert sign_test(differences) == pytest.approx(p, rel=0.01)


def test_kl_is_the_mean_over_tokens_and_is_compared_answer_by_answer() -> None:
    """A long answer weighs more, and arms that are always a tenth apart are exactly that apart."""
    tokens, kl = np.array([10, 10, 20]), {"sft": np.array([0.1, 0.5, 0.9])}
    compared = compare_kl(kl | {"adapter": kl["sft"] - 0.1}, tokens, Evaluate())
    assert compared["kl_to_teacher"] == {"sft": pytest.approx(0.6), "adapter": pytest.approx(0.5)}
    low, high = compared["kl_to_teacher_interval"]["sft"]
    assert 0.1 <= low < 0.5 and 0.7 < high <= 0.9
    (row,) = compared["kl_comparisons"]
    assert (row["arm"], row["over"]) == ("adapter", "sft")
    assert [row["difference"], *row["interval"]] == pytest.approx([-0.1] * 3)
    assert compare_kl({}, np.empty(0), Evaluate())["kl_to_teacher"] == {}


def test_calibration_of_one_who_is_as_sure_as_right_and_of_one_who_is_not() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(size=5000)
    assert calibrate(sure.tolist(), (rng.uniform(size=5000) < sure).astype(float).tolist())["expected_error"] < 0.03
    boaster = calibrate([0.9] * 10, [0.0] * 10)
    assert boaster["expected_error"] == pytest.approx(0.9)
    assert sum(each["count"] for each in boaster["bins"]) == 10


def test_groups_stand_worst_first() -> None:
    points = {arm: {"token_f1": [1.0, 0.0, 0.0]} for arm in ENDS}
    rows = group_means("document", ["a", "a", "b"], points, "token_f1")
    assert [(row["document"], row["questions"], row["adapter"]) for row in rows] == [("b", 1, 0.0), ("a", 2, 0.5)]
    assert group_means("kind", ["", "", ""], points, "token_f1") == []
