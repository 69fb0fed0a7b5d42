"""Which sampled prompts become general ones; no model."""

import numpy as np
import pytest

from pipeline.engine import Completion
from pipeline.general import reasons_against
from pipeline.schema import REASONS

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
