"""Questions with known answers -> the arms, their scores, and what the adapter lost.

In: a JSONL of questions, or the written questions that `filter` held out, the base model and the trained adapter.
Out: `evaluate/report.json`, and one line per question with every arm's reply in `evaluate/answers.jsonl`. The arms run
in one vLLM engine, greedily; the adapter's arm is also the proof that vLLM loads it. Baselines are trained here first.
The manifest also holds a probe: a training question with PEFT's answer, which the endpoint must give, too.
"""

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.base_model import BaseModel
from pipeline.config import Config, Evaluate, Judge, Sampling, Update
from pipeline.held_out import (
    TestQuestion,
    by_id,
    held_out_questions,
    load_questions,
    read_questions,
    rows_where,
    values_of,
)
from pipeline.measure import measure_adapters
from pipeline.prompts import declines, judge_chat, parse_grade, retrieval_question, student_chat
from pipeline.schema import ANSWER, DOCUMENT, PASSAGE, QUESTION, digest
from pipeline.score import RIGHT, Points, calibrate, group_means, interval, make_report, substring_match, token_f1
from pipeline.stage import attempt, start_ray
from pipeline.store import Folder, Stage
from pipeline.train import train_adapters

GENERAL_QUESTIONS = Path(__file__).with_name("general_questions.jsonl")
LINEAGE_ROWS = 3
GENERAL_TOKENS = 32  # of a reply to a general question: a capital, a number, or that there is no such thing


class Reply(NamedTuple):
    """`confidence` is the geometric mean of the tokens' probabilities."""

    text: str
    confidence: float


class Replies(NamedTuple):
    """What one engine said to everything that was asked."""

    questions: list[TestQuestion]  # with the passage and document that each belongs to
    arms: dict[str, list[Reply]]
    gold: pa.Table  # the gold-passage arm with its top-k
    grades: dict[str, list[bool | None]]  # of a judge, if there is one
    general: dict[str, list[str]]  # to the shipped general questions, by closed_book and adapter
    unrelated: dict[str, list[str]]


class Task(NamedTuple):
    """One corpus to evaluate."""

    config: Config
    stage: Stage
    questions: list[TestQuestion]
    unrelated: list[TestQuestion]
    adapters: dict[str, Folder]  # by arm


def evaluate_adapters(configs: list[Config], base: BaseModel, redo: bool = False) -> list[Any]:
    """Run the stage of several corpora, in one engine; return for each its manifest, or the ValueError.

    Where there are no questions, a manifest's `scores` are empty.
    """
    failed: dict[int, ValueError] = {}
    for name in configs[0].evaluate.baselines:
        baselines = []
        for config in configs:
            train_config = config.train.model_copy(update={"teacher": name})
            baselines.append(config.model_copy(update={"train": train_config, "update": Update()}))
        trained = enumerate(train_adapters(baselines, base, redo, f"baseline-{name}"))
        failed |= {number: done for number, done in trained if isinstance(done, ValueError)}
    outcomes = [failed.get(n) or attempt(partial(_open, config, base, redo)) for n, config in enumerate(configs)]
    tasks = {number: outcome for number, outcome in enumerate(outcomes) if isinstance(outcome, Task)}
    if tasks:
        import ray

        started = time.monotonic()
        cluster = configs[0].cluster
        start_ray(cluster)
        # A process of its own for each, so that its memory is free again for the next.
        asker = ray.remote(max_calls=1)(_ask_all).options(
            num_cpus=cluster.engine_cpus, num_gpus=cluster.engine_gpus, label_selector=cluster.engine_labels
        )
        replies: list[Any] = ray.get(asker.remote(list(tasks.values())))
        measurer = ray.remote(max_calls=1)(_measure_all).options(
            num_cpus=cluster.worker_cpus, num_gpus=cluster.worker_gpus, label_selector=cluster.worker_labels
        )
        measured: list[Any] = ray.get(measurer.remote(list(tasks.values()), base.path, replies))
        seconds = (time.monotonic() - started) / len(tasks)
        for (number, task), said, found in zip(tasks.items(), replies, measured, strict=True):
            outcomes[number] = said if isinstance(said, ValueError) else _close(task, said, found, seconds)
    return outcomes


def _open(config: Config, base: BaseModel, redo: bool) -> Task | dict[str, Any]:
    """Return what is to be evaluated, or the manifest if nothing is."""
    train, general = Stage(config.run_dir, "train", ANSWER), Stage(config.run_dir, "general", ANSWER)
    stage = Stage(config.run_dir, "evaluate", ANSWER)
    questions = load_questions(config.evaluate) or held_out_questions(config)
    unrelated = read_questions("evaluate.unrelated", config.evaluate.unrelated)
    adapters = {"adapter": train.folder / "adapter"}
    for name in config.evaluate.baselines:
        adapters[name] = Folder(config.run_dir) / f"baseline-{name}" / "adapter"
    settings = {
        "evaluate": config.evaluate.model_dump(exclude={"questions", "unrelated"}),
        "retrieval_passages": config.serve.retrieval_passages,
        "questions": digest(*(json.dumps(question) for question in [*questions, *unrelated])),
        "model": base.identity(),
        "input": train.require()["data_digest"],
        "general": general.require()["data_digest"],
    }
    if not stage.open(settings, redo):
        print("evaluate: up to date", file=sys.stderr)
        return stage.require()
    if previous := previous_version(config, base):
        adapters["previous"] = previous
    print(f"evaluate: {len(questions)} questions, adapters {', '.join(adapters)}", file=sys.stderr)
    return Task(config, stage, questions, unrelated, adapters)


def _close(task: Task, replies: Replies, measured: dict[str, Any], seconds: float) -> dict[str, Any]:
    report: dict[str, Any] = {"scores": {}, "questions": len(task.questions)}
    if task.questions:
        report |= _score(task.config, replies, task.stage)
    lost = _lost(replies, task.unrelated, task.config.evaluate)
    lost |= {"kl_to_base": measured["kl_to_base"].get("adapter"), "prompts": measured.pop("general_prompts")}
    report |= measured | {"lost": lost}
    task.stage.folder.write_json("report.json", report)
    return task.stage.close(seconds, report)


def _score(config: Config, replies: Replies, stage: Stage) -> dict[str, Any]:
    """Score the arms and write down every reply."""
    points = score_replies(replies)
    metric = "substring_match" if config.evaluate.questions else "token_f1"
    report = make_report(points, metric, config.evaluate) | {
        "questions_from": "file" if config.evaluate.questions else "generated",
        "calibration": {
            arm: calibrate([reply.confidence for reply in said], points[arm][metric])
            for arm, said in replies.arms.items()
        },
        "by_kind": group_means("kind", [q.kind for q in replies.questions], points, metric),
        "by_document": group_means("document", [q.document for q in replies.questions], points, metric),
    }
    for arm, grades in replies.grades.items():
        report["scores"][arm]["judge_unparsable"] = grades.count(None)
    _write_answers(config, stage, replies, points, metric)
    return report


def previous_version(config: Config, base: BaseModel) -> Folder | None:
    """Return the version that clients had before this adapter, if it is of this base model."""
    from pipeline.publish import ALIAS, MANIFEST, version_of_run

    adapters = Folder(config.publish.registry) / config.publish.name
    alias = adapters.read_json(ALIAS) or {}
    own = version_of_run(config, base)
    for version in (alias.get("version"), *alias.get("before", [])):
        if version and version != own:
            manifest = (adapters / version).read_json(MANIFEST)
            return adapters / version if manifest and manifest["base_revision"] == base.revision else None
    return None


def _ask_all(tasks: list[Task]) -> list[Any]:
    """Return the `Replies` to every task, or the ValueError."""
    from pipeline.engine import Engine

    config = tasks[0].config
    folders = [folder for task in tasks for folder in task.adapters.values()]
    rank = max(folder.read_json("adapter_config.json")["r"] for folder in folders)
    engine = Engine(config.model, config.cluster, config.answer.top_k, rank)
    return [attempt(partial(_ask_everything, engine, *task)) for task in tasks]


def _measure_all(tasks: list[Task], base_path: str, replies: list[Any]) -> list[Any]:
    """Return what `measure_adapters` does of every task that has replies, and None of the others."""
    return [
        None if isinstance(said, ValueError) else measure_adapters(task.config, base_path, said.gold, task.adapters)
        for task, said in zip(tasks, replies, strict=True)
    ]


def _ask_everything(
    engine: Any,
    config: Config,
    stage: Stage,
    questions: list[TestQuestion],
    unrelated: list[TestQuestion],
    adapters: dict[str, Folder],
) -> Replies:
    from pipeline.answer import answer_questions
    from pipeline.engine import render_chat
    from pipeline.retrieve import PassageIndex, corpus_passages

    settings = config.answer.model_copy(
        update={"temperature": 0.0, "per_question": 1, "max_tokens": config.evaluate.max_tokens}
    )
    documents, passages = Stage(config.run_dir, "dedup", DOCUMENT), Stage(config.run_dir, "chunk", PASSAGE)
    index = PassageIndex.build(corpus_passages(documents, passages))
    questions = [_locate(question, index) for question in questions]

    def ask(chats: list[Any], adapter: str | None, max_tokens: int = settings.max_tokens) -> list[Reply]:
        prompts = [render_chat(engine.tokenizer, chat) for chat in chats]
        completions = engine.complete(prompts, 0, Sampling(temperature=0.0), max_tokens, top_k=1, adapter=adapter)
        return [Reply(done.text.strip(), _confidence(done.topk_logprobs[:, 0])) for done in completions]

    def retrieval_chat(question: str) -> Any:
        hits = [hit.passage for hit in index.search(question, config.serve.retrieval_passages)]
        while True:
            found = [(passage["heading"], passage["text"]) for passage in hits]
            chat = student_chat(retrieval_question(found, question) if found else question)
            if not found or len(render_chat(engine.tokenizer, chat)) + settings.max_tokens <= engine.max_model_len:
                return chat
            hits.pop()

    contexts = {question.id: {"text": question.context, "heading": ""} for question in questions}
    asked = [{"question_id": q.id, "passage_id": q.id, "text": q.question} for q in questions]
    gold, rejected = answer_questions(engine, contexts, asked, settings)
    if rejected:
        raise ValueError(f"evaluate.questions: {len(rejected)} contexts are too long, the first: {rejected[0].detail}")
    plain = [student_chat(question.question) for question in questions]
    found = [retrieval_chat(question.question) for question in questions]
    general = [student_chat(row["question"]) for row in general_questions()]
    short = min(GENERAL_TOKENS, settings.max_tokens)
    others = [student_chat(question.question) for question in unrelated]
    with tempfile.TemporaryDirectory(prefix="adapters-") as folder:
        local = {arm: source.copy_to(f"{folder}/{arm}") for arm, source in adapters.items()}
        both = (("closed_book", None), ("adapter", local["adapter"]))
        arms = {"closed_book": ask(plain, None)} | {arm: ask(plain, path) for arm, path in local.items()}
        arms |= {"retrieval": ask(found, None), "adapter_retrieval": ask(found, local["adapter"])}
        arms["gold_passage"] = [
            Reply(text, _confidence(np.asarray(values, np.float32)[:: settings.top_k]))
            for text, values in zip(gold["text"].to_pylist(), gold["topk_logprobs"].to_pylist(), strict=True)
        ]
        grades = {}
        if judge := config.evaluate.judge:
            for arm, said in arms.items():
                chats = [judge_chat(q.question, q.answers, r.text) for q, r in zip(questions, said, strict=True)]
                if judge.model:
                    graded = _grade_remotely(judge, chats)
                else:
                    graded = [reply.text for reply in ask(chats, None, judge.max_tokens)]
                grades[arm] = list(map(parse_grade, graded))
        return Replies(
            questions,
            arms,
            gold,
            grades,
            {arm: [reply.text for reply in ask(general, path, short)] for arm, path in both},
            {arm: [reply.text for reply in ask(others, path)] for arm, path in both},
        )


def _locate(question: TestQuestion, index: Any) -> TestQuestion:
    """Find the passage that a question's context comes from, by its words."""
    if question.passage_id:
        return question
    for hit in index.search(question.context, 1):
        return question._replace(document=hit.passage["source"], passage_id=hit.passage["passage_id"])
    return question


def _confidence(logprobs: np.ndarray) -> float:
    return float(np.exp(logprobs.mean())) if len(logprobs) else 0.0


def _grade_remotely(judge: Judge, chats: list[Any]) -> list[str]:
    """Grade through an OpenAI-compatible endpoint, many at a time; the client retries what fails for a while."""
    from concurrent.futures import ThreadPoolExecutor

    import openai

    client = openai.OpenAI(base_url=judge.url, max_retries=5)

    def grade(chat: Any) -> str:
        done = client.chat.completions.create(
            model=str(judge.model), messages=chat, temperature=0, max_tokens=judge.max_tokens
        )
        return done.choices[0].message.content or ""

    with ThreadPoolExecutor(judge.concurrency) as pool:
        return list(pool.map(grade, chats))


def score_replies(replies: Replies) -> Points:
    """Return every arm's points on every question."""
    points: Points = {}
    for arm, said in replies.arms.items():
        pairs = [(reply.text, question.answers) for reply, question in zip(said, replies.questions, strict=True)]
        points[arm] = {
            "substring_match": [float(substring_match(*pair)) for pair in pairs],
            "token_f1": [token_f1(*pair) for pair in pairs],
        }
        if arm in replies.grades:
            points[arm]["judge"] = [float(grade is True) for grade in replies.grades[arm]]
    return points


def general_questions() -> list[dict[str, Any]]:
    """Return the general questions that come with this package; those without answers cannot be answered by anybody."""
    return [json.loads(line) for line in GENERAL_QUESTIONS.read_text(encoding="utf-8").splitlines()]


def _lost(replies: Replies, unrelated: list[TestQuestion], settings: Evaluate) -> dict[str, Any]:
    """What the base model could do and the adapter cannot: shares of right answers, and of refusals where none is."""
    rows = general_questions()
    right, refused, other = ({}, {}, {})
    for arm, said in replies.general.items():
        pairs = list(zip(rows, said, strict=True))
        right[arm] = [float(substring_match(text, row["answers"])) for row, text in pairs if row["answers"]]
        refused[arm] = [float(declines(text)) for row, text in pairs if not row["answers"]]
    for arm, said in replies.unrelated.items():
        other[arm] = [float(substring_match(text, q.answers)) for text, q in zip(said, unrelated, strict=True)]
    named = {"general_questions": right, "refusal": refused} | ({"unrelated": other} if unrelated else {})
    return {name: _before_and_after(points, settings) for name, points in named.items()}


def _before_and_after(points: dict[str, list[float]], settings: Evaluate) -> dict[str, Any]:
    before, after = (np.asarray(points[arm]) for arm in ("closed_book", "adapter"))
    return {
        "count": len(before),
        "closed_book": float(before.mean()),
        "adapter": float(after.mean()),
        "difference_interval": interval(after - before, settings),
    }


def _write_answers(config: Config, stage: Stage, replies: Replies, points: Points, metric: str) -> None:
    wrong = {
        q.passage_id for q, point in zip(replies.questions, points["adapter"][metric], strict=True) if point < RIGHT
    }
    taught = _taught(config, wrong)
    lines = []
    for number, question in enumerate(replies.questions):
        line: dict[str, Any] = question._asdict()
        for arm, said in replies.arms.items():
            line[arm] = {"reply": said[number].text, "confidence": said[number].confidence}
            line[arm] |= {name: values[number] for name, values in points[arm].items()}
        if points["adapter"][metric][number] < RIGHT:
            line["lineage"] = _nearest(question.question, taught.get(question.passage_id, []))
        lines.append(json.dumps(line, ensure_ascii=False))
    stage.folder.write_bytes("answers.jsonl", "\n".join([*lines, ""]).encode())


def _taught(config: Config, passages: set[str]) -> dict[str, list[dict[str, str]]]:
    """Return what was trained on about these passages: passage id -> question and answer."""
    kept, questions = Stage(config.run_dir, "filter", ANSWER), Stage(config.run_dir, "question", QUESTION)
    rows = rows_where(kept, ["passage_id", "question_id", "text"], "passage_id", passages)
    texts = by_id(rows_where(questions, ["question_id", "text"], "question_id", values_of(rows, "question_id")))
    taught: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        pair = {"question": texts[row["question_id"]]["text"], "answer": row["text"]}
        taught.setdefault(row["passage_id"], []).append(pair)
    return taught


def _nearest(question: str, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the training rows that should have taught a question, the nearest first."""
    from pipeline.retrieve import PassageIndex

    if not rows:
        return []
    columns = {"heading": [row["question"] for row in rows], "text": [row["answer"] for row in rows]}
    hits = PassageIndex.build(pa.table(columns)).search(question, LINEAGE_ROWS)
    return [{"question": hit.passage["heading"], "answer": hit.passage["text"]} for hit in hits]
