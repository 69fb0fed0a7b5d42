import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from pipeline.config import Cluster, Config, Model, Sampling, load_config
from pipeline.engine import Completion, Engine, render_chat

DEMO = "benchmarks/demo/demo.toml"


def test_a_cpu_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OSError, match=r"no-such-compiler.* CXX"):
        Engine(Model(path="never-loaded"), Cluster())


def complete_twice(config: Config) -> tuple[list[Completion], list[int]]:
    """Ask in this thread and in another; return all completions, and how many threads there were after each."""
    engine = Engine(config.model, config.cluster, top_k=5)
    prompt = render_chat(engine.tokenizer, [{"role": "user", "content": "Name three rivers of Europe."}])
    sampling, done, threads = Sampling(temperature=0.7), [], []

    def ask() -> None:
        done.extend(engine.complete([prompt] * 4, 3, sampling, max_tokens=24, top_k=5))
        threads.append(psutil.Process().num_threads())

    ask()
    with ThreadPoolExecutor(1) as other:
        other.submit(ask).result()
        threads[1] -= 1  # the other thread itself
    return done, threads


def test_completions_are_whole_and_any_thread_may_ask_for_them() -> None:
    config = load_config(DEMO, [])
    with multiprocessing.get_context("spawn").Pool(1) as process:
        done, threads = process.apply(complete_twice, (config,))
    assert threads[0] == threads[1]  # a second OpenMP team would compete with the first for the cores
    for first, second in zip(done[:4], done[4:], strict=True):
        assert first.text == second.text != ""
        assert first.topk_ids.shape == first.topk_logprobs.shape == (len(first.token_ids), 5)
        assert (np.diff(first.topk_logprobs) <= 0).all()
        np.testing.assert_array_equal(first.token_ids, second.token_ids)
    assert not any("<|im_end|>" in one.text for one in done)
