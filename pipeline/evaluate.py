"""Questions with known answers -> the arms and their scores.

In: a JSONL of held-out questions, the base model and the trained adapter. Out: `evaluate/report.json` and one line per
question with every arm's answer in `evaluate/answers.jsonl`. The arms run in one vLLM engine, greedily; the adapter's
arm is also the proof that vLLM loads the adapter. The questions are for measuring only: no other stage reads them.
"""

import json
import re
import string
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline.base_model import BaseModel
from pipeline.config import Config, Evaluate, Sampling
from pipeline.schema import ANSWER, digest
from pipeline.store import Folder, Stage, open_uri

ARMS = ("closed_book", "gold_passage", "adapter")
METRICS = ("substring_match", "token_f1")


class TestQuestion(NamedTuple):
    """A held-out question, the strings that count as right, and the passage that holds the answer."""

    id: str
    question: str
    answers: list[str]
    context: str


def evaluate_adapter(config: Config, base: BaseModel, redo: bool = False) -> dict[str, Any]:
    """Run the stage and return its manifest, whose `scores` are empty if the config names no questions."""
    train = Stage(config.run_dir, "train", ANSWER)
    stage = Stage(config.run_dir, "evaluate", ANSWER)
    questions = load_questions(config.evaluate)
    settings = {
        "evaluate": config.evaluate.model_dump(exclude={"questions"}),
        "questions": digest(*(json.dumps(question) for question in questions)),
        "model": base.identity(),
        "input": train.require()["data_digest"],
    }
    if not stage.open(settings, redo):
        print("evaluate: up to date", file=sys.stderr)
        return stage.require()
    started = time.monotonic()
    if not questions:
        print("evaluate: [evaluate] questions is not set, so there is nothing to score", file=sys.stderr)
        return stage.close(time.monotonic() - started, {"scores": {}})
    print(f"evaluate: {len(questions)} questions, arms {', '.join(ARMS)}", file=sys.stderr)
    cluster = config.cluster
    # A process of its own for each, so that its memory is free again for the next.
    arms = ray.remote(num_cpus=cluster.engine_cpus, num_gpus=cluster.engine_gpus, max_calls=1)(_answer_arms)
    replies, gold = ray.get(arms.remote(config, questions))
    scorer = ray.remote(num_cpus=cluster.worker_cpus, num_gpus=cluster.worker_gpus, max_calls=1)(_held_out_kl)
    kl = ray.get(scorer.remote(config, base.path, gold))
    points = {arm: score_replies(replies[arm], questions) for arm in ARMS}
    report = make_report(points, config.evaluate) | {"kl_to_teacher": kl}
    stage.folder.write_json("report.json", report)
    lines = [
        json.dumps(
            question._asdict()
            | {arm: {"reply": replies[arm][i], **{m: points[arm][m][i] for m in METRICS}} for arm in ARMS},
            ensure_ascii=False,
        )
        for i, question in enumerate(questions)
    ]
    stage.folder.write_bytes("answers.jsonl", "\n".join([*lines, ""]).encode())
    return stage.close(time.monotonic() - started, report)


def load_questions(settings: Evaluate) -> list[TestQuestion]:
    """Read the JSONL; ValueError names the line and the field that is missing or of the wrong type."""
    if settings.questions is None:
        return []
    filesystem, path = open_uri(settings.questions)
    try:
        with filesystem.open_input_stream(path) as stream:
            lines = stream.read().decode("utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"evaluate.questions = {settings.questions!r}: no such file") from None
    questions = []
    for number, line in enumerate(lines[: settings.max_questions], 1):
        where = f"evaluate.questions = {settings.questions!r}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        for name, kind in (("question", str), ("answers", list), ("context", str)):
            if not isinstance(row.get(name), kind) or not row[name]:
                raise ValueError(f"{where}: {name!r} must be a {kind.__name__} that is not empty")
        questions.append(TestQuestion(str(row.get("id", number)), row["question"], row["answers"], row["context"]))
    return questions


def _answer_arms(config: Config, questions: list[TestQuestion]) -> tuple[dict[str, list[str]], pa.Table]:
    """Answer every question in every arm; return the replies, and the gold-passage answers with their top-k."""
    from pipeline.answer import answer_questions
    from pipeline.engine import Engine, render_chat
    from pipeline.prompts import student_chat

    settings = config.answer.model_copy(
        update={"temperature": 0.0, "per_question": 1, "max_tokens": config.evaluate.max_tokens}
    )
    engine = Engine(config.model, config.cluster, settings.top_k, adapter_rank=config.train.lora.rank)
    passages = {question.id: {"text": question.context, "heading": ""} for question in questions}
    asked = [{"question_id": q.id, "passage_id": q.id, "text": q.question} for q in questions]
    gold, rejected = answer_questions(engine, passages, asked, settings)
    if rejected:
        raise ValueError(f"evaluate.questions: {len(rejected)} contexts are too long, the first: {rejected[0].detail}")
    prompts = [render_chat(engine.tokenizer, student_chat(question.question)) for question in questions]
    greedy = Sampling(temperature=0.0)

    def answer(adapter: str | None) -> list[str]:
        completions = engine.complete(prompts, 0, greedy, config.evaluate.max_tokens, adapter=adapter)
        return [completion.text.strip() for completion in completions]

    with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
        copy_adapter(config, folder)
        replies = {"closed_book": answer(None), "gold_passage": gold["text"].to_pylist(), "adapter": answer(folder)}
    return replies, gold


def _held_out_kl(config: Config, base_path: str, gold: pa.Table) -> dict[str, float]:
    """KL to the teacher on its own held-out answers, before and after training, in nats per token."""
    from pipeline.student import KlScorer

    with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
        copy_adapter(config, folder)
        scorer = KlScorer(config.train, base_path, config.cluster.worker_cpus, folder)
        tokens = np.asarray(pc.call_function("list_value_length", [gold["answer_ids"]]))
        before, after = scorer.initial_kl(gold), scorer.kl(gold)
    return {
        "closed_book": float(np.average(before, weights=tokens)),
        "adapter": float(np.average(after, weights=tokens)),
    }


def copy_adapter(config: Config, target: str) -> None:
    """Copy the trained adapter to a local folder: vLLM and PEFT read local files only."""
    source = Folder(config.run_dir) / "train" / "adapter"
    for name in source.list():
        Path(target, name).write_bytes(source.read_bytes(name))


def score_replies(replies: list[str], questions: list[TestQuestion]) -> dict[str, list[float]]:
    """Return every metric of every reply: the best over the accepted answers."""
    return {
        "substring_match": [float(substring_match(r, q.answers)) for r, q in zip(replies, questions, strict=True)],
        "token_f1": [token_f1(r, q.answers) for r, q in zip(replies, questions, strict=True)],
    }


def normalise_answer(text: str) -> str:
    """Lower case, punctuation and articles out, white space folded (SQuAD; Rajpurkar et al. 2016)."""
    text = "".join(" " if char in string.punctuation + "\u2013\u2014" else char for char in text.lower())
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def substring_match(reply: str, answers: list[str]) -> bool:
    """True if any accepted answer stands in the reply, both normalised (the paper's Appendix N)."""
    reply = normalise_answer(reply)
    return any((wanted := normalise_answer(answer)) and wanted in reply for answer in answers)


def token_f1(reply: str, answers: list[str]) -> float:
    """Harmonic mean of token precision and recall, the best over the accepted answers (SQuAD)."""
    given = normalise_answer(reply).split()

    def f1(answer: str) -> float:
        wanted = normalise_answer(answer).split()
        common = sum((Counter(given) & Counter(wanted)).values())
        return 2 * common / (len(given) + len(wanted)) if common else 0.0

    return max(map(f1, answers))


def make_report(points: dict[str, dict[str, list[float]]], settings: Evaluate) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals, and the share of the gap that the adapter closes."""
    scores: dict[str, Any] = {}
    for arm, metrics in points.items():
        scores[arm] = {}
        for metric, values in metrics.items():
            scores[arm][metric] = float(np.mean(values))
            scores[arm][f"{metric}_interval"] = interval(values, settings)
    closed, gold, adapter = (np.asarray(points[arm]["substring_match"]) for arm in ARMS)
    gap = gold.mean() - closed.mean()
    return {
        "scores": scores,
        "questions": len(closed),
        "adapter_minus_closed_book": {
            "substring_match": float((adapter - closed).mean()),
            "interval": interval(adapter - closed, settings),
        },
        "gap_closed": float((adapter.mean() - closed.mean()) / gap) if gap > 0 else None,
    }


def interval(values: Any, settings: Evaluate) -> list[float]:
    """95 % percentile bootstrap interval of the mean; all values equal give that value twice."""
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=float)
    if np.ptp(values) == 0:
        return [float(values[0])] * 2
    result = bootstrap(
        (values,),
        np.mean,
        n_resamples=settings.bootstrap_resamples,
        method="percentile",
        rng=np.random.default_rng(settings.seed),
        batch=100,
    )
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]
