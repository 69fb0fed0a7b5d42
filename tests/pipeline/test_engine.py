from functools import partial

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline import engine
from pipeline.config import Cluster, Model
from pipeline.engine import Engine, _Reporter, render_chat, render_user_opening


def test_a_cpu_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OSError, match=r"no-such-compiler.* CXX"):
        Engine(Model(path="never-loaded"), Cluster())


def test_a_chat_template_that_asks_for_the_date_gives_the_same_prompt_every_day(tokenizer_dir: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{tokenizer_dir}/tokenizer.json")
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}. {{ messages[0]['content'] }}"
    assert (
        tokenizer.decode(render_chat(tokenizer, [{"role": "user", "content": "Who?"}])) == "Today is 26 Jul 2024. Who?"
    )
    assert tokenizer.decode(render_user_opening(tokenizer)) == "Today is 26 Jul 2024. "


def test_a_model_that_can_think_answers_at_once(tokenizer_dir: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{tokenizer_dir}/tokenizer.json")
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if enable_thinking is defined and not enable_thinking %} <think></think>"
        "{% endif %} {{ date_string }}"
    )
    asked = render_chat(tokenizer, [{"role": "user", "content": "Who?"}])
    assert tokenizer.decode(asked) == "Who? <think></think> 26 Jul 2024"


def test_a_call_that_takes_long_reports_how_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM uses it: over the prompts first, then once for every request that is finished."""
    reports: list[tuple[int, int]] = []

    def call(requests: int) -> list[tuple[int, int]]:
        reports.clear()
        report = partial(_Reporter, report=lambda *counts: reports.append(counts))
        assert list(report(range(requests), desc="Rendering prompts")) == list(range(requests))
        with report(total=requests, desc="Processed prompts", dynamic_ncols=True, postfix="0 toks/s") as bar:
            for _ in range(requests):
                assert bar.format_dict["elapsed"] >= 0
                bar.update(1)
            bar.refresh()
        return sorted(set(reports))

    assert call(3) == [], "a call of no time reported"
    monkeypatch.setattr(engine, "PROGRESS_S", 0)
    assert call(3) == [(number, 3) for number in range(4)]
