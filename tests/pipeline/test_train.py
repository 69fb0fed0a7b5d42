"""Training through Ray Train and DeepSpeed: a tiny random model, whose answers transformers captured; no vLLM."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.raylets import WORKER, empty_cluster, until
from pipeline.answer import answer_table
from pipeline.base_model import load_base_model
from pipeline.batch import AnswerData, Packed, plan_run
from pipeline.config import Train, load_config
from pipeline.engine import Completion, load_tokenizer, render_chat
from pipeline.filter import filter_answers
from pipeline.previous import previous_settings
from pipeline.prompts import student_chat, teacher_chat
from pipeline.schema import ANSWER, DOCUMENT, PASSAGE, QUESTION, Document, Passage, Question, to_table
from pipeline.stage import only
from pipeline.store import Folder, Stage
from pipeline.student import KlScorer
from pipeline.train import train_adapters
from pipeline.train_loop import TrainLoop
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

MODEL = ROOT / ".models" / "smollm2-135m-instruct"
TOP_K, NUM_ANSWERS, NUM_GENERAL, ANSWER_TOKENS = 64, 24, 6, 12


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block Llama with the default model's tokenizer, sure enough of itself to have something to teach."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, folder)
    return folder


@pytest.fixture(scope="module")
def answered(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that is complete up to the filter and general stages."""
    run_dir = tmp_path_factory.mktemp("answered")
    tokenizer = load_tokenizer(str(tiny_model))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    passages = [Passage(f"p{i}", "d", "", 0, 9, f"Mill number {i} has {i * 7} wheels.") for i in range(3)]
    questions, rows, completions = [], [], []
    torch.manual_seed(1)
    for number in range(NUM_ANSWERS + NUM_GENERAL):
        passage = passages[number % len(passages)] if number < NUM_ANSWERS else None
        text = f"What is fact {number} of the mill?"
        if passage:
            questions.append(Question(f"q{number}", passage.passage_id, "fact", text))
        student = render_chat(tokenizer, student_chat(text))
        prompt = render_chat(tokenizer, teacher_chat(passage.text, "", text)) if passage else student
        ids = model.generate(
            torch.tensor([prompt]), do_sample=True, max_new_tokens=ANSWER_TOKENS, min_new_tokens=ANSWER_TOKENS
        )
        with torch.no_grad():
            logprobs, top = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1).topk(TOP_K)
        reply = ids[0, len(prompt) :].numpy().astype(np.int32)
        completions.append(Completion(f"answer {number}", "stop", reply, top.numpy(), logprobs.numpy()))
        rows.append((f"a{number}", f"q{number}", passage.passage_id if passage else "", student))
    answers = answer_table(rows[:NUM_ANSWERS], completions[:NUM_ANSWERS])
    general = answer_table(rows[NUM_ANSWERS:], completions[NUM_ANSWERS:])
    identity = load_base_model(str(tiny_model)).identity()
    tables = {
        "dedup": to_table([Document("d", "mills.txt", "", "")], DOCUMENT),
        "chunk": to_table(passages, PASSAGE),
        "question": to_table(questions, QUESTION),
        "answer": answers,
        "filter": answers,
        "general": general,
    }
    digests: dict[str, str] = {}
    for name, table in tables.items():
        stage = Stage(str(run_dir), name)
        source = {"question": "chunk", "answer": "question", "filter": "answer"}.get(name, "")
        stage.open({"model": identity, "answer": {"top_k": TOP_K}, "input": digests.get(source)})
        stage.commit("0" if name in ("dedup", "chunk") else "0-00000", [table], [], table.num_rows)
        digests[name] = stage.close(0.0)["data_digest"]
    return run_dir


def write_run(folder: Path, answered: Path, model: Path) -> Path:
    """Copy the run directory to `folder`/run; write and return a config that trains there."""
    shutil.copytree(answered, folder / "run")
    config = folder / "config.toml"
    config.write_text(
        f"""
        run_dir = "{folder}/run"
        model.path = "{model}"
        read.paths = ["unused"]
        publish = {{ registry = "{folder}/registry", name = "test" }}
        answer.top_k = {TOP_K}
        cluster.worker_cpus = 1
        [train]
        epochs = 6
        batch_tokens = 512
        row_tokens = 128
        micro_rows = 2
        learning_rate = 5e-3
        lora.rank = 8
        checkpoint_steps = 1000
        """
    )
    return config


def train(answered: Path, model: Path, folder: Path, *overrides: str) -> tuple[list[float], Path]:
    """Train on a copy of the run directory; return the loss of every step, and the adapter's folder."""
    config = load_config(write_run(folder, answered, model), overrides)
    only(train_adapters([config], load_base_model(str(model))))
    train_dir = folder / "run" / "train"
    history = json.loads((train_dir / "history.json").read_text())
    return [entry["loss"] for entry in history], train_dir / "adapter"


@pytest.fixture(scope="module")
def reference(local_ray: None, answered: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(answered, tiny_model, tmp_path_factory.mktemp("reference"))


def test_the_loss_falls_and_the_adapter_is_the_one_that_was_trained(
    reference: tuple[list[float], Path], answered: Path, tiny_model: Path
) -> None:
    losses, adapter = reference
    assert losses[-1] < 0.8 * losses[0]
    assert min(losses) >= 0
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, str(adapter))
    row = Stage(str(answered), "filter").read_unit("0-00000").slice(0, 1).to_pylist()[0]
    ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
    top = torch.tensor(row["topk_ids"]).view(-1, TOP_K)
    teacher = torch.tensor(row["topk_logprobs"], dtype=torch.float32).view(-1, TOP_K)

    def distance() -> float:
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].float().log_softmax(-1)
        return (teacher.exp() * (teacher - logprobs.gather(1, top))).sum(-1).mean().item()

    trained = distance()
    with model.disable_adapter():
        assert trained < 0.8 * distance()


def test_every_answer_token_weighs_the_same_also_of_a_sample_that_has_a_step_for_itself(
    answered: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = load_config(write_run(tmp_path, answered, tiny_model), ["train.batch_tokens=128", "train.temperature=2.0"])
    rows = Stage(str(answered), "filter").read_unit("0-00000").to_pylist()
    rows[0] |= {"prompt_ids": rows[0]["prompt_ids"] * 9}
    gradients: list[tuple[int, float]] = []

    class Recorder:
        def __call__(self, packed: Packed, signal: Any) -> torch.Tensor:
            assert signal.temperature == 2
            return torch.ones(len(packed.answer_index))

        def backward(self, loss: torch.Tensor) -> None:
            gradients.append((len(step), loss.item()))

        def step(self) -> None: ...

    loop = object.__new__(TrainLoop)
    loop.settings, loop.data = config.train, AnswerData([pa.Table.from_pylist(rows, ANSWER)])
    loop.plan = plan_run(loop.data.lengths(), (len(rows),), (), 1, 128, 128, seed=0)
    loop.rank, loop.world, loop.micro_batches, loop.device = 0, 1, 1, torch.device("cpu")
    loop.teacher_prompts, loop.engine = None, Recorder()
    loop.answer_tokens_per_step = loop.data.answer_tokens_per_step(loop.plan)
    for step in ([sample for row in rows for sample in row] for rows in loop.plan):
        loop._step([step])
    assert {count for count, _ in gradients} >= {1, 2}
    assert len({round(loss / count, 6) for count, loss in gradients}) == 1


def test_training_compiles_nothing(reference: tuple[list[float], Path]) -> None:
    """A compiled extension of DeepSpeed costs a minute at the first start, for every new environment."""
    assert os.listdir(os.environ["TORCH_EXTENSIONS_DIR"]) == []


def test_two_workers_that_share_all_weights_take_the_same_steps(
    reference: tuple[list[float], Path], answered: Path, tiny_model: Path, tmp_path: Path
) -> None:
    losses, _ = train(answered, tiny_model, tmp_path, "cluster.num_workers=2", "train.zero_stage=3")
    # Two halves of a batch round differently in bf16, by as much as the CPU's own kernels make of it.
    np.testing.assert_allclose(losses, reference[0], rtol=0.1)


def test_shifted_targets_are_caught_by_the_alignment_guard(
    local_ray: None, answered: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The manifests agree and the stored rows do not: top-k values moved by one token."""
    shifted = tmp_path / "shifted"
    shutil.copytree(answered, shifted)
    for path in (shifted / "filter" / "data").glob("*.parquet"):
        table = pq.read_table(path)
        index = table.schema.get_field_index("topk_ids")
        moved = [row[TOP_K:] + row[:TOP_K] for row in table["topk_ids"].to_pylist()]
        field = table.schema.field(index)
        pq.write_table(table.set_column(index, field, pa.array(moved, field.type)), path)
    with pytest.raises(ValueError, match="alignment guard"):
        train(shifted, tiny_model, tmp_path)


def test_the_online_teacher_agrees_with_the_stored_one(
    reference: tuple[list[float], Path], answered: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Only the online teacher sees inside the tail that the stored top-k leaves: a little more loss, same course."""
    losses, _ = train(answered, tiny_model, tmp_path, "train.teacher=online")
    assert (np.asarray(losses) >= 0.98 * np.asarray(reference[0])).all()
    assert np.corrcoef(losses, reference[0])[0, 1] > 0.85


def test_dropout_acts_and_recomputed_activations_change_nothing(
    reference: tuple[list[float], Path], answered: Path, tiny_model: Path, tmp_path: Path
) -> None:
    recomputed, _ = train(answered, tiny_model, tmp_path / "a", "train.gradient_checkpointing=true")
    np.testing.assert_allclose(recomputed, reference[0], rtol=0.05)
    dropped, _ = train(answered, tiny_model, tmp_path / "b", "train.lora.dropout=0.5")
    assert dropped[0] == pytest.approx(reference[0][0], rel=0.05), "a fresh adapter adds nothing"
    assert dropped[-1] > 1.02 * reference[0][-1]


def test_an_adapter_may_be_of_some_layers(local_ray: None, answered: Path, tiny_model: Path, tmp_path: Path) -> None:
    _, adapter = train(answered, tiny_model, tmp_path, "train.epochs=1", "train.lora.target_modules=['down_proj']")
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors and all(".down_proj.lora_" in name for name in tensors)


@pytest.mark.long
def test_workers_save_before_their_node_goes_and_stay_where_their_labels_are(
    answered: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """SIGTERM to the node of one of two workers: both save, the node goes, another comes, and no step is lost."""
    config = write_run(tmp_path, answered, tiny_model)
    settings = ["train.epochs=150", "train.learning_rate=5e-4", "train.checkpoint_steps=1000000"]
    settings += ["cluster.num_workers=2", 'cluster.worker_labels={pool="train"}']
    train_dir = tmp_path / "run" / "train"
    saved, progress = train_dir / "checkpoints", train_dir / "progress.json"
    with empty_cluster() as cluster:
        cluster.start_head(2)
        environment = cluster.environment | {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
        _, leaving = (
            cluster.add_node(1, "--labels=pool=train", RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="6") for _ in range(2)
        )
        head, *_ = until(lambda: len(nodes := cluster.nodes()) == 3 and nodes)
        with subprocess.Popen(
            [sys.executable, "-m", "pipeline", "train", config, *settings],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
        ) as driver:
            until(progress.exists)
            assert head not in cluster.actor_nodes(WORKER), "there were free CPUs, but not the label"
            leaving.send_signal(signal.SIGTERM)
            (checkpoint,) = until(lambda: list(saved.glob("*.json")))
            assert leaving.poll() is None, "it was saved before the node went"
            until(lambda: not cluster.actors(WORKER))
            progress.unlink()
            cluster.add_node(1, "--labels=pool=train")
            until(progress.exists)
            assert json.loads(progress.read_text())["step"] > int(checkpoint.stem) > 0
            _, errors = driver.communicate()
        assert driver.returncode == 0, errors.decode()[-4000:]
    history = json.loads((train_dir / "history.json").read_text())
    assert [entry["step"] for entry in history] == list(range(1, len(history) + 1))


@pytest.fixture(scope="module")
def changed(answered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run directory after the text of passage p2 changed."""
    run_dir = tmp_path_factory.mktemp("changed") / "run"
    shutil.copytree(answered, run_dir)
    shard = run_dir / "chunk" / "data" / "0-00000.parquet"
    passages = pq.read_table(shard)
    texts = passages["text"].to_pylist()
    text = pa.array([*texts[:2], f"{texts[2]} It burnt down."])
    pq.write_table(passages.set_column(passages.column_names.index("text"), "text", text), shard)
    return run_dir


def test_an_update_goes_on_from_the_previous_adapter_with_old_answers_among_the_new(
    reference: tuple[list[float], Path], changed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """One passage of three is new: an epoch has its answers once, and a few of the old and the general ones."""
    first, adapter = reference
    previous = adapter.parents[1]
    losses, _ = train(changed, tiny_model, tmp_path, f"update={{previous_run='{previous}', replay_share=0.2}}")
    assert losses[0] < 0.8 * first[0], "the adapter of the previous run knows these answers"
    assert len(losses) < len(first), "an epoch is shorter than one over the whole corpus"
    tokens = [Stage(str(run), "train").require()["training"]["tokens"] for run in (tmp_path / "run", previous)]
    assert tokens[0] > 0.4 * tokens[1], "a third of the answers are new, and old ones stand among them"


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    loop: Any = object.__new__(TrainLoop)
    loop.settings, loop.plan = Train(warmup_share=0.2), [[]] * 10
    assert [loop._schedule(step) for step in (0, 1, 2, 6, 9, 10)] == [0.5, 1.0, 1.0, 0.5, 0.125, 0.0]


def test_answers_that_teach_nothing_are_left_out(
    local_ray: None, answered: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = load_config(write_run(tmp_path, answered, tiny_model), ["evaluate.held_out=0"])
    answers = Stage(str(answered), "answer").read_unit("0-00000")
    kl = KlScorer(config.train, str(tiny_model), 1).initial_kl(answers)
    least = float(np.median(kl))
    config = config.model_copy(update={"filter": config.filter.model_copy(update={"min_initial_kl": least})})
    shutil.rmtree(tmp_path / "run" / "filter")
    assert only(filter_answers([config]))["rejected"] == {"nothing_to_learn": NUM_ANSWERS // 2}
    kept = Stage(config.run_dir, "filter").read_unit("0-00000")["answer_id"].to_pylist()
    assert kept == [name for name, value in zip(answers["answer_id"].to_pylist(), kl, strict=True) if value >= least]


def test_in_an_update_the_adapter_says_what_teaches_nothing(
    reference: tuple[list[float], Path], changed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    _, adapter = reference
    config = load_config(
        write_run(tmp_path, changed, tiny_model), ["evaluate.held_out=0", f"update.previous_run={adapter.parents[1]}"]
    )
    answers = Stage(str(changed), "answer").read_unit("0-00000")
    new = answers.filter(pc.field("passage_id") == "p2")
    kl = KlScorer(config.train, str(tiny_model), 1, Folder(str(adapter))).kl(new)
    config = config.model_copy(
        update={"filter": config.filter.model_copy(update={"min_initial_kl": float(np.median(kl))})}
    )
    shutil.rmtree(tmp_path / "run" / "filter")
    assert only(filter_answers([config]))["rejected"] == {"nothing_to_learn": len(new) // 2}
    kept = set(Stage(config.run_dir, "filter").read_unit("0-00000")["answer_id"].to_pylist())
    assert {name for name in answers["answer_id"].to_pylist() if name not in kept} == {
        name for name, value in zip(new["answer_id"].to_pylist(), kl, strict=True) if value < np.median(kl)
    }, "what is old is kept to be replayed"


def test_an_update_with_nothing_new_keeps_the_adapter(
    reference: tuple[list[float], Path], answered: Path, tiny_model: Path, tmp_path: Path
) -> None:
    _, adapter = reference
    losses, kept = train(answered, tiny_model, tmp_path, f"update.previous_run={adapter.parents[1]}")
    assert losses == []
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, kept))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("chunk", [], "stage question in .* was made from other rows than stage chunk has now"),
        ("filter", [], "stage train in .* was made from other rows than stage filter has now"),
        ("", ["train.lora.rank=4"], "train.lora.rank is 8, now 4"),
        ("", ["train.lora.dropout=0.1"], "train.lora.dropout is 0.0, now 0.1"),
        ("", ["train.lora.target_modules=['q_proj']"], r"train.lora.target_modules is \[.*, now \['q_proj'\]"),
        ("", ["answer.top_k=1"], "answer.top_k is .*, now 1"),
    ],
)
def test_a_previous_run_that_cannot_be_gone_on_from_is_refused(
    reference: tuple[list[float], Path],
    tiny_model: Path,
    tmp_path: Path,
    stage: str,
    overrides: list[str],
    message: str,
) -> None:
    """One of its stages was made again and the later ones were not, or its adapter has another shape."""
    _, adapter = reference
    run = tmp_path / "before" / "run"
    config = write_run(tmp_path / "before", adapter.parents[1], tiny_model)
    if stage:
        again = Stage(str(run), stage)
        again.open(again.require()["settings"] | {"filter": "another"}, redo=True)
        again.close(0.0)
    settings = load_config(config, [f"run_dir={tmp_path}/run", f"update.previous_run={run}", *overrides])
    with pytest.raises(ValueError, match=message):
        previous_settings(settings, load_base_model(str(tiny_model)))
