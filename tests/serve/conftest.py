"""A registry of adapters that answer differently, made once, and what PEFT on transformers answers with each."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from benchmarks.random_adapters import publish_random_adapters
from benchmarks.raylets import DEADLINE_S, free_port
from pipeline.config import Lora
from pipeline.engine import load_tokenizer, render_chat
from pipeline.prompts import student_chat
from pipeline.student import add_adapter, continue_greedily, load_base
from serve.registry import Registry

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".models" / "smollm2-135m-instruct"
NAMES = ["ada", "bob", "cleo", "dora", "emil", "fay"]
QUESTION = "Who built the Kestrel Mill, and when?"
ANSWER_TOKENS = 12


class Published(NamedTuple):
    """`expected` maps a name, or "" for the base model, to the token ids that PEFT answers `QUESTION` with."""

    registry: Registry
    expected: dict[str, list[int]]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("registry")
    publish_random_adapters(str(folder), str(MODEL), NAMES, rank=8)
    registry = Registry(str(folder))
    prompt = render_chat(load_tokenizer(str(MODEL)), student_chat(QUESTION))
    model = add_adapter(load_base(str(MODEL)), Lora(rank=8), "base").eval()
    expected = {}
    with model.disable_adapter():
        expected[""] = continue_greedily(model, prompt, ANSWER_TOKENS)[0]
    for name in NAMES:
        version = registry.resolve(name)
        weights = load_file(folder / name / version.version / "adapter_model.safetensors")
        own = {key.replace(".weight", ".default.weight"): value for key, value in weights.items()}
        missing = model.load_state_dict(own, strict=False)
        assert not missing.unexpected_keys
        expected[name] = continue_greedily(model, prompt, ANSWER_TOKENS)[0]
    assert len({json.dumps(ids) for ids in expected.values()}) == len(expected), "adapters answer alike"
    return Published(registry, expected)


@pytest.fixture
def registry(published: Published, tmp_path: Path) -> Registry:
    """Return a copy of the registry that a test may damage."""
    shutil.copytree(published.registry.folder.uri, tmp_path / "registry")
    return Registry(str(tmp_path / "registry"))


@contextlib.contextmanager
def endpoint(config: Path, *overrides: str) -> Iterator[str]:
    """Run `python -m serve` until the block ends; yield its URL once it answers."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", str(config), f"serve.port={port}", *overrides],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_worker_niceness": "0"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        line = process.stdout.readline()  # type: ignore[union-attr]  # blocks until it serves, or ends
        assert line.startswith("serving"), process.communicate()[1][-4000:]
        yield url
    finally:
        process.terminate()
        try:
            process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
