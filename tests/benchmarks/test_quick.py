"""Benchmarks in quick mode: the store's, and the one of four raylets; the others start engines and trainers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.record import ROOT
from pipeline.answer import answer_table
from pipeline.base_model import load_base_model
from pipeline.engine import Completion, load_tokenizer, render_chat
from pipeline.prompts import student_chat
from pipeline.schema import ANSWER, PASSAGE, QUESTION, Passage, Question, to_table
from pipeline.store import Stage

pytestmark = pytest.mark.slow

MODEL = ROOT / ".models" / "smollm2-135m-instruct"
TOP_K = 20


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config whose run directory has answers of made-up log-probabilities, as far as the filter stage."""
    file = tmp_path / "small.toml"
    file.write_text(
        f'run_dir = "{tmp_path}/run"\n[model]\npath = "{MODEL}"\n[read]\npaths = ["unused"]\n'
        f'[publish]\nregistry = "{tmp_path}/registry"\nname = "small"\n'
    )
    return file


def write_stages(run_dir: Path) -> None:
    tokenizer, rng = load_tokenizer(str(MODEL)), np.random.default_rng(0)
    passages = [Passage(f"p{i}", "d", "", 0, 9, f"Mill number {i} has {i * 7} wheels.") for i in range(3)]
    questions = [Question(f"q{i}", f"p{i % 3}", "fact", f"How many wheels has mill {i % 3}?") for i in range(12)]
    rows, completions = [], []
    for question in questions:
        text = f"The mill in question has {question.question_id} wheels, and all of them turn."
        ids = np.asarray(tokenizer(text)["input_ids"], dtype=np.int32)
        prompt = render_chat(tokenizer, student_chat(question.text))
        rows.append((f"a-{question.question_id}", question.question_id, question.passage_id, prompt))
        topk = np.sort(-rng.exponential(3, (len(ids), TOP_K)))[:, ::-1]
        completions.append(Completion(text, "stop", ids, rng.integers(0, 49152, topk.shape), topk - 2))
    answers = answer_table(rows, completions)
    tables = {
        "chunk": (PASSAGE, to_table(passages, PASSAGE)),
        "question": (QUESTION, to_table(questions, QUESTION)),
        "answer": (ANSWER, answers),
        "filter": (ANSWER, answers),
    }
    for name, (schema, table) in tables.items():
        stage = Stage(str(run_dir), name, schema)
        stage.open({"model": load_base_model(str(MODEL)).identity()})
        stage.commit("0", [table], [], table.num_rows)
        stage.close(0)


def run(config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.store_size", str(config), "--quick"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_answers_must_be_written_first(config: Path) -> None:
    done = run(config)
    assert done.returncode == 1
    assert f"python -m pipeline run {config}" in done.stderr


def test_store_size(config: Path) -> None:
    write_stages(config.parent / "run")
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    done = run(config)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    claims = {claim["name"]: claim for claim in last["claims"]}
    assert last["result"] is None
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before, "a quick run saves nothing"
    assert claims["reads_with_arrow"]["met"]
    assert claims["loss_relative_error.k20"]["met"]
    assert claims["loss_relative_error.k64"]["met"]
    assert claims["bytes_per_token"]["value"] > TOP_K * 2


@pytest.mark.long
def test_scale() -> None:
    config = ROOT / "benchmarks" / "demo" / "demo.toml"
    command = [sys.executable, "-m", "benchmarks.scale", str(config), "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    claims = {claim["name"]: claim["value"] for claim in last["claims"]}
    assert last["result"] is None
    assert claims.keys() == {
        "driver_memory_growth",
        "actor_memory_growth",
        "cost_per_document_growth",
        "efficiency_of_4_actors",
    }
    assert claims["driver_memory_growth"] < 1.2 and claims["actor_memory_growth"] < 1.2
    assert claims["efficiency_of_4_actors"] > 0.25
