"""Questions with known answers -> the arms, their scores, and what the adapter lost.

In: a JSONL of questions, or the written questions that `filter` held out, the base model and the trained adapter.
Out: the scores in the stage's manifest, and one line per question with every arm's reply in `evaluate/answers.jsonl`.
Baselines are trained here first. The manifest also holds a probe: a training question with PEFT's answer, which the
endpoint must give, too.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pipeline.arms import Replies, Task, ask_all, general_questions, judge_key, search_all
from pipeline.base_model import BaseModel
from pipeline.config import Config, Evaluate, Update
from pipeline.held_out import (
    TestQuestion,
    count_trained_on,
    held_out_questions,
    load_questions,
    read_questions,
    rows_where,
)
from pipeline.measure import measure_adapters
from pipeline.previous import adapter_of
from pipeline.publish import previous_version
from pipeline.resources import engine_options, worker_options
from pipeline.schema import digest
from pipeline.score import (
    RIGHT,
    Points,
    calibrate,
    compare_kl,
    group_means,
    interval,
    make_report,
    substring_match,
    token_f1,
)
from pipeline.stage import attempt, in_turns, show_progress, start_ray, watching
from pipeline.store import Stage, require_line
from pipeline.text import declines
from pipeline.train import train_adapters

LINEAGE_ROWS = 3
GROUP_CORPORA = 64  # asked by one engine before their results are written: what a crash costs


def evaluate_adapters(configs: list[Config], base: BaseModel, redo: bool = False) -> list[Any]:
    """Run the stage of several corpora, many in one engine; return for each its manifest, or the ValueError.

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
        start_ray(configs[0].cluster)
        with (
            tqdm(desc="evaluate", bar_format="{desc}: {elapsed}{postfix}") as bar,
            watching(partial(show_progress, [task.stage for task in tasks.values()], bar)),
        ):
            for number, replies, measured, seconds in _ask_and_measure(tasks, base.path):
                error = next((result for result in (replies, measured) if isinstance(result, ValueError)), None)
                outcomes[number] = error or attempt(partial(_close, tasks[number], replies, measured, seconds))
    return outcomes


def _ask_and_measure(tasks: dict[int, Task], base_path: str) -> Iterator[tuple[int, Any, Any, float]]:
    """Yield each task's key, its `Replies` and what `measure_adapters` says (or a ValueError each), and its seconds.

    Groups of tasks take turns at as many engines as writing has. Each step is a process of its own, so that its memory
    is free for the next.
    """
    import ray

    def alone(function: Any, options: dict[str, Any]) -> Any:
        return ray.remote(max_calls=1)(function).options(**options)

    config = next(iter(tasks.values())).config
    engine, worker = engine_options(config.cluster), worker_options(config.cluster)
    search, ask, measure = alone(search_all, worker), alone(ask_all, engine), alone(_measure_all, worker)
    engines = config.cluster.num_engines
    key = judge_key()  # the driver's: nodes have an environment of their own

    def submit(group: list[int]) -> list[Any]:
        asked: Any = [tasks[number] for number in group]
        if config.evaluate.embedding_model:
            asked = search.remote(asked)
        replies = ask.remote(asked, key)
        return [replies, measure.remote(asked, base_path, replies)]

    size = min(GROUP_CORPORA, -(-len(tasks) // engines))
    groups = [list(tasks)[start : start + size] for start in range(0, len(tasks), size)]
    for group, (said, measured), seconds in in_turns(groups, engines, submit):
        for result in zip(group, said, measured, strict=True):
            yield *result, seconds / len(group) / min(engines, len(groups))


def _open(config: Config, base: BaseModel, redo: bool) -> Task | dict[str, Any]:
    """Return what is to be evaluated, or the manifest if nothing is."""
    general = Stage(config.run_dir, "general")
    trained = require_line(config.run_dir, "train")["train"]
    stage = Stage(config.run_dir, "evaluate")
    questions = load_questions(config.evaluate) or held_out_questions(config)
    unrelated = read_questions("evaluate.unrelated", config.evaluate.unrelated)
    adapters = {"adapter": adapter_of(config.run_dir)}
    adapters |= {name: adapter_of(config.run_dir, f"baseline-{name}") for name in config.evaluate.baselines}
    settings = {
        "evaluate": config.evaluate.model_dump(exclude={"questions", "unrelated"}),
        "retrieval_passages": config.serve.retrieval_passages,
        "questions": digest(*(json.dumps(question) for question in [*questions, *unrelated])),
        "model": base.identity(),
        "input": trained["data_digest"],
        "general": general.require()["data_digest"],
    }
    if previous := previous_version(config, base, trained["data_digest"]):
        adapters["previous"] = previous
        settings["previous"] = previous.name
    if not stage.open(settings, redo):
        print("evaluate: up to date", file=sys.stderr)
        return stage.require()
    print(f"evaluate: {len(questions)} questions, adapters {', '.join(adapters)}", file=sys.stderr)
    return Task(config, stage, questions, unrelated, adapters, [])


def _close(task: Task, replies: Replies, measured: dict[str, Any], seconds: float) -> dict[str, Any]:
    report: dict[str, Any] = {"scores": {}, "questions": len(task.questions)}
    if task.questions:
        report |= _score(task.config, replies, task.stage, measured["kl_to_teacher"])
    lost = _lost(replies, task.unrelated, task.config.evaluate)
    lost |= {"kl_to_base": measured["kl_to_base"].get("adapter"), "prompts": measured.pop("general_prompts")}
    kl = compare_kl(measured.pop("kl_to_teacher"), measured.pop("answer_tokens"), task.config.evaluate)
    return task.stage.close(seconds, report | measured | kl | {"lost": lost, "stats": replies.stats})


def _score(config: Config, replies: Replies, stage: Stage, kl: dict[str, np.ndarray]) -> dict[str, Any]:
    """Score the arms and write down every reply; `kl` has each question's, [questions], to the gold passage's arm."""
    points = score_replies(replies)
    metric = "substring_match" if config.evaluate.questions else "token_f1"
    report = make_report(points, metric, config.evaluate) | {
        "questions_from": "file" if config.evaluate.questions else "generated",
        "trained_on": count_trained_on(config, replies.questions),
        "calibration": {
            arm: calibrate([reply.confidence for reply in said], [value >= RIGHT for value in points[arm][metric]])
            for arm, said in replies.arms.items()
        },
        "by_kind": group_means("kind", [q.kind for q in replies.questions], points, metric),
        "by_document": group_means("document", [q.document for q in replies.questions], points, metric),
    }
    for arm, grades in replies.grades.items():
        report["scores"][arm]["judge_unparsable"] = grades.count(None)
    _write_answers(config, stage, replies, points, metric, kl)
    return report


def _measure_all(tasks: list[Task], base_path: str, replies: list[Any]) -> list[Any]:
    """Return what `measure_adapters` does of every task that has replies, or the ValueError, and None of the others."""
    return [
        None
        if isinstance(said, ValueError)
        else attempt(partial(measure_adapters, task.config, base_path, said.gold, task.adapters))
        for task, said in zip(tasks, replies, strict=True)
    ]


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


def _lost(replies: Replies, unrelated: list[TestQuestion], settings: Evaluate) -> dict[str, Any]:
    """What the base model could do and the adapter cannot: shares of right answers, and of refusals where none is."""
    rows = general_questions()
    right, refused = ({}, {})
    for arm, said in replies.general.items():
        pairs = list(zip(rows, said, strict=True))
        right[arm] = [float(substring_match(text, row["answers"])) for row, text in pairs if row["answers"]]
        refused[arm] = [float(declines(text)) for row, text in pairs if not row["answers"]]
    named = {"general_questions": right, "refusal": refused}
    for name, arms in (("unrelated", replies.unrelated), ("reading", replies.reading)) if unrelated else ():
        named[name] = {
            arm: [float(substring_match(text, q.answers)) for text, q in zip(said, unrelated, strict=True)]
            for arm, said in arms.items()
        }
    return {name: _before_and_after(points, settings) for name, points in named.items()}


def _before_and_after(points: dict[str, list[float]], settings: Evaluate) -> dict[str, Any]:
    before, after = (np.asarray(points[arm]) for arm in ("closed_book", "adapter"))
    return {
        "count": len(before),
        "closed_book": float(before.mean()),
        "adapter": float(after.mean()),
        "difference_interval": interval(after - before, settings, least=-1.0),
    }


def _write_answers(
    config: Config, stage: Stage, replies: Replies, points: Points, metric: str, kl: dict[str, np.ndarray]
) -> None:
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
            if arm in kl:
                line[arm]["kl_to_teacher"] = float(kl[arm][number])
        if points["adapter"][metric][number] < RIGHT:
            line["lineage"] = _nearest(question.question, taught.get(question.passage_id, []))
        lines.append(json.dumps(line, ensure_ascii=False))
    stage.folder.write_bytes("answers.jsonl", "\n".join([*lines, ""]).encode())


def _taught(config: Config, passages: set[str]) -> dict[str, list[dict[str, str]]]:
    """Return what was trained on about these passages: passage id -> question and answer."""
    kept, questions = Stage(config.run_dir, "filter"), Stage(config.run_dir, "question")
    rows = rows_where(kept, ["passage_id", "question_id", "text"], "passage_id", passages)
    asked = rows_where(questions, ["question_id", "text"], "question_id", {row["question_id"] for row in rows})
    texts = {row["question_id"]: row["text"] for row in asked}
    taught: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        pair = {"question": texts[row["question_id"]], "answer": row["text"]}
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
