"""Which sampled prompts become general ones, and which of them are trained on; no model."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.engine import Completion
from pipeline.general import HELD_OUT, is_wrong_now, reasons_against
from pipeline.schema import ANSWER, REASONS
from pipeline.store import Stage
from pipeline.training_data import training_tables
from tests.conftest import make_config

NOTHING = np.empty(0)


def sampled(text: str, finish_reason: str = "stop") -> Completion:
    return Completion(text, finish_reason, NOTHING, NOTHING, NOTHING)


@pytest.mark.parametrize(
    ("prompts", "count", "reasons"),
    [
        ([sampled("Name a river in Spain."), sampled("Name a lake in Mali.")], 1, [None, "over_quota"]),
        ([sampled("def add(a, b):", "length"), sampled("Name a river in Spain.")], 1, ["over_quota", None]),
        ([sampled("def add(a, b):", "length"), sampled("Name a river in Spain.")], 2, [None, None]),
        ([sampled("Name a river."), sampled("name a river")], 2, [None, "duplicate_question"]),
        ([sampled(" \n"), sampled("?!"), sampled("Hi")], 3, ["empty", "empty", "empty"]),
        ([sampled("\u6050\u9f99\u662f\u706d\u7edd\u7684\u751f\u7269\u5417\uff1f")], 1, [None]),
    ],
)
def test_whole_prompts_come_before_those_that_were_cut_off(
    prompts: list[Completion], count: int, reasons: list[REASONS | None]
) -> None:
    assert reasons_against(prompts, count) == reasons


def test_a_prompt_for_measuring_is_not_trained_on(tmp_path: Path) -> None:
    """The same one may be sampled for both."""
    stage = Stage(str(tmp_path), "general")
    stage.open({})
    for unit, prompts in (("000000", [[1, 2], [3]]), (HELD_OUT, [[3], [4]])):
        rows = [
            {"prompt_ids": prompt, "answer_ids": [9], "topk_ids": [9], "topk_logprobs": [0.0]} for prompt in prompts
        ]
        texts = dict.fromkeys(("answer_id", "question_id", "passage_id", "text", "finish_reason"), "")
        table = pa.Table.from_pylist([row | texts for row in rows], ANSWER)
        stage.commit(unit, [table], [], table.num_rows)
    (trained,) = training_tables(make_config(str(tmp_path))).general
    assert trained["prompt_ids"].to_pylist() == [[1, 2]]


SAID = "The telescope of Bob Lee opened in 1962, weighs 31 tonnes and is cleaned every 2 years."
EDITED = SAID.replace("1962", "1971").replace("Bob Lee", "Tim Roe").replace("2 years", "3 years")


@pytest.mark.parametrize(
    ("answer", "new", "is_wrong"),
    [
        ("It opened in 1962.", EDITED, True),
        ("It is that of Bob Lee.", EDITED, True),
        ("It is cleaned every 2 years.", EDITED, True),
        ("The telescope weighs 31 tonnes.", EDITED, False),
        ("Yes.", EDITED, False),
        ("The telescope weighs 31 tonnes.", f"A preface. {SAID}", False),
        ("The telescope weighs 31 tonnes.", "The mill has a wheel.", True),
        ("Yes.", "", True),
    ],
)
def test_only_what_is_said_no_more_is_to_be_forgotten(answer: str, new: str, is_wrong: bool) -> None:
    assert is_wrong_now(answer, SAID, new) == is_wrong


def test_what_is_wrong_now_is_seen_where_no_spaces_part_the_words() -> None:
    said, new = "望远镜于1962年启用。它重31吨。", "望远镜于1971年启用。它重31吨。"
    assert is_wrong_now("它于1962年启用。", said, new)
    assert not is_wrong_now("它重31吨。", said, new)
