"""The whole line with a real model, as a person runs it: a subprocess, a TOML file, the last line of stdout.

Beyond the unit tests this covers the command line, Ray, vLLM, DeepSpeed and the border between every two stages, and
what no unit test can: a driver killed with SIGKILL in every stage, and started again.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import openai
import pytest
from safetensors import safe_open

from benchmarks.raylets import DEADLINE_S
from pipeline import status
from pipeline.config import load_config
from pipeline.engine import load_tokenizer
from pipeline.schema import ROWS
from pipeline.store import Folder, Stage
from pipeline.text import normalise
from tests.conftest import rows
from tests.pipeline.test_parse import BAD
from tests.serve.conftest import endpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".models" / "smollm2-135m-instruct"
WITH_ROWS = [*(name for name in status.STAGES if name in ROWS and name != "read"), "reading"]

DOCUMENTS = {
    "mill.md": "# Kestrel Mill\n\nThe Kestrel Mill on the River Arden was built in 1874 by Rosa Lindqvist. It ground "
    "barley until the flood of 1921, which carried its wheel four kilometres downstream.\n",
    "lens.html": "<html><head><title>Orrin Lens</title></head><body><h1>Orrin Lens</h1><p>The Orrin Lens is a "
    "telescope on Mount Sabel. It opened in 1962 and weighs 31 tonnes. Its mirror was polished in Tampere.</p>"
    "</body></html>",
    "copy.md": None,  # an exact duplicate of mill.md
}


def write_config(folder: Path, model: Path = MODEL) -> Path:
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for name, text in DOCUMENTS.items():
        (corpus / name).write_text(DOCUMENTS["mill.md"] or "" if text is None else text)
    for name, (data, _) in BAD.items():
        (corpus / f"bad-{name}").write_bytes(data)
    (corpus / "loop").symlink_to(corpus)
    question = {
        "question": "Who built the Kestrel Mill?",
        "answers": ["Rosa Lindqvist"],
        "context": DOCUMENTS["mill.md"],
    }
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    unrelated = {
        "question": "Which colour is the gate of Tarn?",
        "answers": ["blue"],
        "context": "The gate of Tarn is blue.",
    }
    (folder / "unrelated.jsonl").write_text(json.dumps(unrelated) + "\n")
    config = folder / "config.toml"
    config.write_text(
        f"""
        run_dir = "{folder}/run"
        max_reject_share = 1.0
        [model]
        path = "{model}"
        max_model_len = 1024
        [read]
        paths = ["{corpus}"]
        max_file_mb = 1
        [chunk]
        shard_passages = 1
        [question]
        per_passage = 4
        kinds = ["fact", "detail"]
        max_rounds = 2
        max_tokens = 64
        [answer]
        top_k = 8
        max_tokens = 32
        [filter]
        keep_unfinished = true
        reject_invented_numbers = false
        [train]
        epochs = 2
        batch_tokens = 128
        row_tokens = 128
        micro_rows = 1
        checkpoint_steps = 2
        lora = {{ rank = 8 }}
        [general]
        prompts = 6
        held_out = 4
        max_tokens = 24
        first_words = ["Name a river"]
        [reading]
        per_passage = 2
        share = 0.2
        [evaluate]
        questions = "{folder}/questions.jsonl"
        unrelated = "{folder}/unrelated.jsonl"
        max_tokens = 8
        baselines = ["raw_text"]
        judge = {{ max_tokens = 32 }}
        [publish]
        registry = "{folder}/registry"
        name = "test"
        [publish.gate]
        min_gap_closed = -9.0
        max_closed_book_loss = 1.0
        max_kl_to_base = 9.0
        max_retrieval_loss = 1.0
        max_previous_loss = 1.0
        [cluster]
        kv_cache_gb = 1
        """
    )
    return config


def start(config: Path, command: str = "run", *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", command, str(config), *overrides],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_worker_niceness": "0"},
    )


def finish(config: Path, command: str = "run", *overrides: str) -> tuple[dict, str]:
    """Run to the end; return the last line of stdout as JSON, and stderr."""
    process = start(config, command, *overrides)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1]), err


def fail(config: Path, command: str, *overrides: str) -> str:
    """Run something that must fail with one message and no traceback; return stderr."""
    process = start(config, command, *overrides)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2, err[-4000:]
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    assert not out
    return err


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.parquet"))
        if not path.name.startswith(".")
    }


def ids(run_dir: Path, stage: str) -> list[str]:
    """First column of all rows and of all rejected rows: their ids."""
    reader = Stage(str(run_dir), stage)
    kept = [row for shard in reader.shards() for row in reader.read_shard(shard).column(0).to_pylist()]
    rejected = [row.replace(str(run_dir.parent), "") for row in reader.read_rejected()["record_id"].to_pylist()]
    return sorted(kept + [f"rejected {row}" for row in rejected])


@pytest.fixture(scope="module")
def finished(embedding_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, Path]:
    """An undisturbed run: its folder, its last line of stdout, its config."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder)
    embedding = f'[evaluate]\n        embedding_model = "{embedding_model}"'
    config.write_text(config.read_text().replace("[evaluate]", embedding))
    result, _ = finish(config)
    return folder, result, config


def test_documents_in_adapter_out(finished: tuple[Path, dict, Path]) -> None:
    folder, result, _ = finished
    assert list(result["scores"]) == [
        "closed_book",
        "raw_text",
        "adapter",
        "retrieval",
        "embedding_retrieval",
        "adapter_retrieval",
        "gold_passage",
    ]
    for scores in result["scores"].values():
        assert 0 <= scores["substring_match"] <= 1
        assert 0 <= scores["token_f1"] <= 1
        assert scores["judge_unparsable"] in (0, 1)
    lost = result["lost"]
    assert lost["kl_to_base"] > 0 and lost["general_questions"]["count"] == 64
    assert lost["unrelated"]["closed_book"] < lost["reading"]["closed_book"], "the passage names the colour"
    counts = result["counts"]
    assert counts["documents"] == counts["passages"] == 2
    assert counts["questions"] > 0 and counts["answers"] > 0
    bad = Counter(reason for _, reasons in BAD.values() for reason in reasons)
    assert counts["rejected"]["read"] == bad | {"symlink_loop": 1}
    assert counts["rejected"]["dedup"] == {"duplicate": 1}
    assert result["kl_to_teacher"]["adapter"] < result["kl_to_teacher"]["closed_book"]
    line = json.loads((folder / "run" / "evaluate" / "answers.jsonl").read_text().splitlines()[0])
    sure = {line[arm]["confidence"] for arm in ("closed_book", "adapter", "raw_text")}
    assert len(sure) == 3, "the engine has every arm's own adapter"
    assert 0 < result["tail_mass"] < 1 and result["bytes_per_answer_token"] > 0


def test_every_stage_keeps_its_books(finished: tuple[Path, dict, Path]) -> None:
    run_dir = finished[0] / "run"
    before = None
    for name in WITH_ROWS:
        manifest = Stage(str(run_dir), name).require()
        if name != "chunk":
            assert manifest["rows_in"] == manifest["rows_out"] + sum(manifest["rejected"].values()), name
        if name in ("chunk", "answer", "filter"):
            assert manifest["rows_in"] == before, name
        before = manifest["rows_out"]
        assert len(set(ids(run_dir, name))) == len(ids(run_dir, name)), name


def test_stored_answers_are_whole(finished: tuple[Path, dict, Path]) -> None:
    stage = Stage(str(finished[0] / "run"), "answer")
    for row in (row for shard in stage.shards() for row in stage.read_shard(shard).to_pylist()):
        tokens = len(row["answer_ids"])
        assert "<|im_" not in row["text"]
        assert tokens and len(row["topk_ids"]) == len(row["topk_logprobs"]) == 8 * tokens
        by_token = [row["topk_logprobs"][i : i + 8] for i in range(0, 8 * tokens, 8)]
        assert all(values == sorted(values, reverse=True) and values[0] <= 0 for values in by_token)


def test_general_prompts_begin_with_the_first_words(finished: tuple[Path, dict, Path]) -> None:
    folder, _, config = finished
    general = Stage(str(folder / "run"), "general")
    prompts = [row["prompt_ids"] for shard in general.shards() for row in general.read_shard(shard).to_pylist()]
    tokenizer = load_tokenizer(load_config(config).model.path)
    assert prompts and all("user\nName a river" in tokenizer.decode(ids) for ids in prompts)


def test_what_must_be_read_stands_in_the_prompt_and_is_trained_on(finished: tuple[Path, dict, Path]) -> None:
    folder, _, config = finished
    run_dir = str(folder / "run")
    asked = {row["question_id"]: row["text"] for row in rows(Stage(run_dir, "question"))}
    words = [set(re.findall(r"\b[a-z]+\b", row["text"])) for row in rows(Stage(run_dir, "chunk"))]
    reading = rows(Stage(run_dir, "reading"))
    tokenizer = load_tokenizer(load_config(config).model.path)
    for row in reading:
        passages, _, question = str(tokenizer.decode(row["prompt_ids"])).partition("Question: ")
        assert question.startswith(asked[row["question_id"]])
        assert any(passage <= set(re.findall(r"\b[a-z]+\b", passages)) for passage in words)
        for phrase, year in (("built in", "1874"), ("flood of", "1921"), ("opened in", "1962")):
            assert year in question or f"{phrase} {year}" not in passages
        assert not row["passage_id"], "the teacher has no other prompt"
    trained = Stage(run_dir, "train").require()["training"]["samples"]
    assert 0 < trained["reading"] <= len(reading) < len(asked)


def test_the_published_version_is_whole_and_immutable(finished: tuple[Path, dict, Path]) -> None:
    folder, result, config = finished
    version = Path(result["adapter"])
    manifest = json.loads((version / "manifest.json").read_text())
    assert json.loads((version.parent / "live.json").read_text()) == {"version": version.name, "before": []}
    for name, sha in manifest["files"].items():
        assert hashlib.sha256((version / name).read_bytes()).hexdigest() == sha
    with safe_open(version / "adapter_model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
    assert len(names) == 2 * 30 * 7, "SmolLM2-135M has seven linear layers in each of 30 blocks"
    before = digests(folder), (version / "manifest.json").read_bytes()
    again, _ = finish(config, "publish")
    assert again["version"] == version.name
    assert before == (digests(folder), (version / "manifest.json").read_bytes())


def test_the_published_adapter_answers_at_the_endpoint(finished: tuple[Path, dict, Path]) -> None:
    """The line's end: one command serves the adapter, one asks it; its probe has passed, its corpus can be searched."""
    _, _, config = finished
    with endpoint(config) as url:
        command = [sys.executable, "-m", "serve.ask", "test", "Who built the Kestrel Mill?", "--url", url]
        asked = subprocess.run(
            [*command, "--retrieval", "1"], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert asked.returncode == 0 and asked.stdout.strip(), asked.stderr
        assert "'heading': 'Kestrel Mill'" in asked.stderr, "no source was named"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        question = {"role": "user", "content": "What is the Orrin Lens on Mount Sabel?"}
        auto = client.chat.completions.create(model="auto", messages=[question], max_tokens=4)  # type: ignore[list-item]
        assert auto.model.startswith("test@"), auto
        question = {"role": "user", "content": "How do I boil an egg?"}
        auto = client.chat.completions.create(model="auto", messages=[question], max_tokens=4)  # type: ignore[list-item]
        assert auto.model == MODEL.name, auto
        assert subprocess.run([*command[:3], "nobody", "?", "--url", url], cwd=ROOT).returncode == 2


def test_the_report_is_one_page_with_what_was_measured(finished: tuple[Path, dict, Path]) -> None:
    folder, result, _ = finished
    page = (folder / "run" / "report.html").read_text()
    assert "Who built the Kestrel Mill?" in page and "<svg" in page
    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["evaluation"]["scores"] == result["scores"]


def test_the_gate_stops_an_adapter_unless_it_is_forced(finished: tuple[Path, dict, Path]) -> None:
    _, _, config = finished
    settings = ("publish.name=gated", "publish.gate.max_kl_to_base=0.0")
    assert "more than max_kl_to_base = 0.0" in fail(config, "publish", *settings)
    forced, _ = finish(config, "publish", *settings, "--force", "a test")
    assert forced["forced"]["reason"] == "a test" and forced["forced"]["by"]
    assert "max_kl_to_base" in forced["forced"]["past"][0]
    again, _ = finish(config, "publish", *settings, "--force", "a test of a version that is there")
    assert again["forced"]["reason"] == "a test of a version that is there"
    assert json.loads((Path(again["uri"]) / "manifest.json").read_text())["forced"] == again["forced"]
    alias = Path(again["uri"]).parent / "live.json"
    alias.write_text(json.dumps({"version": "0" * 16, "before": [again["version"]]}))
    _, err = finish(config, "publish", *settings, "--force", "a test")
    assert "goes on meaning" in err and json.loads(alias.read_text())["version"] == "0" * 16
    alias.write_text(json.dumps(json.loads(alias.read_text()) | {"retired": [again["version"]]}))
    assert "was retired" in fail(config, "publish", *settings, "--force", "a test")


def test_a_second_run_is_up_to_date(finished: tuple[Path, dict, Path]) -> None:
    folder, result, config = finished
    before = digests(folder)
    again, err = finish(config)
    assert err.count("up to date") == 11
    assert again["scores"] == result["scores"] and again["adapter"] == result["adapter"]
    assert digests(folder) == before


def test_an_update_writes_about_what_changed_alone(finished: tuple[Path, dict, Path], tmp_path: Path) -> None:
    folder, _, config = finished
    corpus = shutil.copytree(folder / "corpus", tmp_path / "corpus", symlinks=True)
    (corpus / "loop").unlink()  # it leads to the corpus as it was
    (corpus / "lens.html").write_text((DOCUMENTS["lens.html"] or "").replace("opened in 1962", "opened in 1971"))
    shutil.copytree(folder / "registry", tmp_path / "registry")
    settings = (
        f"run_dir={tmp_path}/run",
        f"read.paths=['{corpus}']",
        f"publish.registry={tmp_path}/registry",
        f"update.previous_run={folder}/run",
        "update.forget_removed=true",
        "evaluate.baselines=[]",
        "evaluate.retrieval=false",
    )
    result, _ = finish(config, "run", *settings, "--force", "a test")
    before, after = folder / "run", tmp_path / "run"
    assert Stage(str(after), "question").require()["stats"]["passages"] == 1
    kept = set(ids(before, "answer")) & set(ids(after, "answer"))
    assert kept and kept < set(ids(after, "answer")) and kept < set(ids(before, "answer"))
    wrong = {
        row["question_id"]
        for row in rows(Stage(str(before), "answer"))
        if row["answer_id"] not in kept and "1962" in normalise(row["text"]).split()
    }
    assert wrong and {row["question_id"] for row in rows(Stage(str(after), "forgotten"))} == wrong
    general = Stage(str(after), "general").require()
    assert general["seconds"] == 0, "general answers were written again"
    assert general["data_digest"] == Stage(str(before), "general").require()["data_digest"]
    assert "previous" in result["scores"] and "retrieval" not in result["scores"]


def test_a_second_round_asks_other_questions(finished: tuple[Path, dict, Path], tmp_path: Path) -> None:
    folder, _, config = finished
    update = (f"update.previous_run={folder}/run", "update.ask_again=true", "update.ask_for_untold=true")
    settings = (f"run_dir={tmp_path}/run", *update)
    for command in ("read", "chunk", "write"):
        finish(config, command, *settings)
    asked, before = (Stage(str(run), "question") for run in (tmp_path / "run", folder / "run"))
    had = {row["question_id"] for row in rows(before)}
    questions = rows(asked)
    assert asked.require()["stats"]["passages"] == before.require()["stats"]["passages"]
    assert had < {row["question_id"] for row in questions}
    assert len({(row["passage_id"], row["text"].lower()) for row in questions}) == len(questions)
    answered = {row["question_id"] for row in rows(Stage(str(tmp_path / "run"), "answer"))}
    assert answered == {row["question_id"] for row in questions}


def test_a_plan_comes_from_a_sample(finished: tuple[Path, dict, Path], tmp_path: Path) -> None:
    _, result, config = finished
    plan, err = finish(config, "plan", f"run_dir={tmp_path}/run")
    assert f"plan: from {plan['sampled_passages']} of {plan['passages']} passages" in err
    assert plan["passages"] == result["counts"]["passages"] == plan["sampled_passages"]
    assert plan["questions"] and plan["trained_tokens"] and plan["bytes"]
    assert {"read", "question", "answer", "general", "filter", "train", "evaluate"} <= plan["seconds"].keys()


def test_status_reads_the_run(finished: tuple[Path, dict, Path]) -> None:
    status, _ = finish(finished[2], "status")
    assert all(stage["state"] == "complete" for stage in status["stages"].values())
    assert status["stages"]["answer"]["output_tokens"] > 0


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("answer", "answer.top_k=4", "answer.top_k was 8, is now 4"),
        ("train", "train.epochs=9", "train.epochs was 2, is now 9"),
        ("question", "model.max_model_len=768", "max_model_len was 1024, is now 768"),
        ("question", "question.per_pasage=3", "did you mean 'per_passage'?"),
        ("train", "train.epochs=many", "train.epochs = 'many'"),
        ("train", "train.learning_rate=7", "train.learning_rate = 7"),
        ("run", "model.path=/no/such/folder", "no such folder"),
        ("run", "update.previous_run=/no/such/run", "update.previous_run = '/no/such/run': stage chunk"),
        ("run", "read.paths=['/no/such/folder']", "read.paths"),
        ("run", "evaluate.questions=/no/such/file", "no such file"),
        ("run", "publish.registry=/dev/null/registry", "publish.registry = /dev/null/registry: cannot be written"),
        (
            "run",
            "evaluate.embedding_model=/no/such/model",
            "embedding_model = '/no/such/model': no such folder",
        ),
    ],
)
def test_bad_input_gets_one_message(
    finished: tuple[Path, dict, Path], tmp_path: Path, command: str, override: str, message: str
) -> None:
    folder, _, config = finished
    before = digests(folder)
    assert message in fail(config, command, override)
    assert digests(folder) == before


def test_a_second_process_on_a_run_is_refused(finished: tuple[Path, dict, Path]) -> None:
    folder, _, config = finished
    with Folder(str(folder / "run")).hold():
        assert "is being worked on by another process" in fail(config, "report")


def test_a_model_without_chat_template_is_refused(finished: tuple[Path, dict, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / "chat_template.jinja").unlink()
    assert "chat template" in fail(finished[2], "run", f"model.path={model}")


def test_answers_of_another_teacher_are_refused(finished: tuple[Path, dict, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    assert "another teacher: revision was" in fail(finished[2], "train", f"model.path={model}")


def test_a_killed_driver_loses_and_repeats_nothing(finished: tuple[Path, dict, Path], tmp_path: Path) -> None:
    """Killed while it writes and while it filters; `tests/cluster/test_nodes.py` kills training."""
    config = write_config(tmp_path)
    run_dir = tmp_path / "run"
    began = [
        run_dir / "answer" / "units",  # the next shard's questions are being written then
        run_dir / "filter" / "units",
    ]
    committed: dict[str, str] = {}
    for folder in began:
        process = start(config)
        wait_for_file(folder, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = digests(run_dir)
        assert committed.items() <= now.items(), f"rewritten before the kill in {folder}"
        committed = {name: value for name, value in now.items() if is_committed(run_dir, name)}
        assert committed
    finish(config, "filter")
    assert committed.items() <= digests(run_dir).items()
    for stage in WITH_ROWS:
        assert ids(run_dir, stage) == ids(finished[0] / "run", stage), stage


def is_committed(run_dir: Path, name: str) -> bool:
    stage, kind, file = Path(name).parts
    unit = file.rpartition("-")[0] if kind == "data" else file.removesuffix(".parquet")
    return (run_dir / stage / "units" / f"{unit}.json").exists()


def wait_for_file(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not any(path for path in folder.glob("[!.]*.json")):
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline, f"nothing was committed in {folder}"
        time.sleep(0.05)
