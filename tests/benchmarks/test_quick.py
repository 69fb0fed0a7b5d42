"""Benchmarks at their smallest: each runs to its closing line, and saves nothing unless it is given a name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.record import ROOT, write_once
from pipeline.answer import answer_table
from pipeline.base_model import load_base_model
from pipeline.engine import Completion, load_tokenizer, render_chat
from pipeline.prompts import student_chat
from pipeline.schema import PASSAGE, QUESTION, Passage, Question, to_table
from pipeline.store import Stage

pytestmark = pytest.mark.slow

MODEL = ROOT / ".models" / "smollm2-135m-instruct"
TOP_K = 20
DEMO = "benchmarks/demo/demo.toml"
# So little of everything that a run of the demo takes a minute.
SMALL = [
    "question.per_passage=2",
    "question.max_rounds=1",
    "answer.max_tokens=24",
    "filter.keep_unfinished=true",
    "general.prompts=4",
    "general.held_out=4",
    "general.max_tokens=24",
    "train.epochs=1",
    "train.lora.rank=4",
    "evaluate.max_questions=24",
    "evaluate.max_tokens=24",
]


def run(benchmark: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def claims_of(benchmark: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """Run a benchmark to its closing line; return its claims by name."""
    done = run(benchmark, *arguments)
    assert done.returncode == 0, done.stderr[-6000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["result"] is None
    return {claim["name"]: claim for claim in last["claims"]}


def places(folder: Path) -> list[str]:
    return [f"run_dir={folder}/run", f"publish.registry={folder}/registry"]


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
        "chunk": to_table(passages, PASSAGE),
        "question": to_table(questions, QUESTION),
        "answer": answers,
        "filter": answers,
    }
    for name, table in tables.items():
        stage = Stage(str(run_dir), name)
        stage.open({"model": load_base_model(str(MODEL)).identity()})
        stage.commit("0" if name == "chunk" else "0-00000", [table], [], table.num_rows)
        stage.close(0)


def test_answers_must_be_written_first(config: Path) -> None:
    done = run("store_size", str(config), "--quick")
    assert done.returncode == 1
    assert f"python -m pipeline run {config}" in done.stderr


def test_store_size(config: Path) -> None:
    write_stages(config.parent / "run")
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    claims = claims_of("store_size", str(config), "--quick")
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before, "a quick run saves nothing"
    assert claims["reads_with_arrow"]["met"]
    assert claims["loss_relative_error.k20"]["met"]
    assert claims["loss_relative_error.k64"]["met"]
    assert claims["bytes_per_token"]["value"] > TOP_K * 2


def test_loss_throughput() -> None:
    claims = claims_of("loss_throughput", DEMO, "train.row_tokens=128", "train.batch_tokens=128", "--quick")
    assert claims.keys() == {
        "logits_held_beyond_one_chunk",
        *(f"{arm}{figure}_over_naive.v1024" for arm in ("top_k", "full") for figure in ("", "_memory")),
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small demo, written once for all that only train and evaluate."""
    overrides = [*SMALL, *places(tmp_path_factory.mktemp("demo"))]
    write_once(DEMO, overrides)
    return [DEMO, *overrides]


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "claimed"),
    [
        (["ablations", "--vary", "train.lora.rank=8", "--seeds", "1"], {"given train.lora.rank over best"}),
        (["teachers", "--teachers", "stored"], set()),
        (["write_throughput", "--quick"], {"pipeline_over_limit", "pipeline_over_no_top_k"}),
        (["train_throughput", "--quick"], {"stored_over_sft", "stored_over_trl_sft"}),
        (
            ["quality_per_compute", "--epochs", "1", "2", "--seeds", "1"],
            {"gap_closed_over_sft_at_equal_seconds", "seconds_to_the_best_of_sft"},
        ),
        (
            ["growth", "--k", "4", "8", "--rank", "4", "8"],
            {"slope.passages.answer_s", "slope.k.answer_bytes_per_token"},
        ),
        (["injection_quality"], {"gap_closed", "adapter_retrieval_over_retrieval"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_benchmarks_of_a_config(demo: list[str], arguments: list[str], claimed: set[str]) -> None:
    benchmark, *options = arguments
    assert claimed <= claims_of(benchmark, *demo, *options).keys()


@pytest.mark.long
def test_end_to_end(tmp_path: Path) -> None:
    claims = claims_of("end_to_end", DEMO, *SMALL, *places(tmp_path))
    assert claims.keys() == {"share_of_time_at_work", "up_to_date_s", "help_s", "gap_closed"}
    assert 0 < claims["share_of_time_at_work"]["value"] < 1


@pytest.mark.long
def test_update(tmp_path: Path) -> None:
    """Of three passages, one is changed: its questions alone are written, and the old adapter is asked, too."""
    data = tmp_path / "data.jsonl"
    texts = [f"Mill number {i} stands at Arden and has {i + 20} wheels of oak and elm." for i in range(4)]
    rows = [
        {"id": f"q{i}", "doc_id": f"d{i}", "context": text, "question": f"How many wheels has mill number {i}?"}
        | {"answers": [str(i + 20)]}
        for i, text in enumerate(texts)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    options = ["--data", str(data), "--passages", "3", "--changed", "1"]
    claims = claims_of("update", DEMO, *SMALL, *places(tmp_path), *options)
    assert 0 < claims["share_of_written_tokens"]["value"] < 1


@pytest.mark.long
def test_scale() -> None:
    claims = {name: claim["value"] for name, claim in claims_of("scale", DEMO, "--quick").items()}
    assert claims.keys() == {
        "driver_memory_growth",
        "actor_memory_growth",
        "cost_per_document_growth",
        "efficiency_of_4_actors",
    }
    assert claims["driver_memory_growth"] < 1.2 and claims["actor_memory_growth"] < 1.2
    assert claims["efficiency_of_4_actors"] > 0.25
