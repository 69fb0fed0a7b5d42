"""Questions + adapters -> what every arm replies, in one vLLM engine, greedily.

In: a corpus's passages, questions about them, and adapters by arm. Out: `Replies`, the teacher's top-k of the gold
passage's among them. The arms differ in what stands before the question and in the adapter alone, so they compare; the
adapter's arm is also the proof that vLLM loads it.
"""

import json
import os
import tempfile
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.config import AnswerSection, Config, Judge, Sampling
from pipeline.held_out import TestQuestion
from pipeline.prompts import judge_chat, parse_grade, retrieval_question, student_chat
from pipeline.stage import attempt
from pipeline.store import Folder, Stage

GENERAL_QUESTIONS = Path(__file__).with_name("general_questions.jsonl")
GENERAL_TOKENS = 32  # of a reply to a general question: a capital, a number, or that there is no such thing


class Task(NamedTuple):
    """One corpus to evaluate."""

    config: Config
    stage: Stage
    questions: list[TestQuestion]
    unrelated: list[TestQuestion]
    adapters: dict[str, Folder]  # by arm
    nearest: list[list[dict[str, Any]]]  # by its embeddings: passages for every question, if there is such a model


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
    reading: dict[str, list[str]]  # to the unrelated questions with their passages in the prompt
    stats: dict[str, float]  # of the engine


def general_questions() -> list[dict[str, Any]]:
    """Return the general questions that come with this package; those without answers cannot be answered by anybody."""
    return [json.loads(line) for line in GENERAL_QUESTIONS.read_text(encoding="utf-8").splitlines()]


def search_all(tasks: list[Task]) -> list[Task]:
    """Return the tasks with the passages whose embeddings are nearest to each of their questions."""
    from pipeline.retrieve import nearest_passages, passages_of

    found = []
    for task in tasks:
        model, k = str(task.config.evaluate.embedding_model), task.config.serve.retrieval_passages
        questions = [question.question for question in task.questions]
        found.append(task._replace(nearest=nearest_passages(model, passages_of(task.config.run_dir), questions, k)))
    return found


def ask_all(tasks: list[Task], api_key: str) -> list[Any]:
    """Return the `Replies` to every task, or the ValueError; a judge at an endpoint gets the key."""
    from pipeline.engine import Engine

    config = tasks[0].config
    folders = [folder for task in tasks for folder in task.adapters.values()]
    rank = max(folder.read_json("adapter_config.json")["r"] for folder in folders)
    engine = Engine(config.model, config.cluster, config.answer.top_k, rank)
    return [attempt(partial(_ask_everything, engine, task, api_key)) for task in tasks]


def _ask_everything(engine: Any, task: Task, api_key: str) -> Replies:
    from pipeline.engine import render_chat
    from pipeline.retrieve import PassageIndex, passages_of

    config, before = task.config, engine.stats
    engine.on_progress = partial(task.stage.write_progress, "questions")
    settings = config.answer.model_copy(
        update={"temperature": 0.0, "per_question": 1, "max_tokens": config.evaluate.max_tokens}
    )
    index = PassageIndex.build(passages_of(config.run_dir))
    questions = [_locate(question, index) for question in task.questions]

    def ask(chats: list[Any], adapter: str | None, max_tokens: int = settings.max_tokens) -> list[Reply]:
        prompts = [render_chat(engine.tokenizer, chat) for chat in chats]
        completions = engine.complete(prompts, 0, Sampling(temperature=0.0), max_tokens, top_k=1, adapter=adapter)
        return [Reply(done.text.strip(), _confidence(done.topk_logprobs[:, 0])) for done in completions]

    def fits(asked: str) -> bool:
        return engine.fits(student_chat(asked), settings.max_tokens)

    def with_passages(asked: list[TestQuestion], passages: list[list[dict[str, Any]]]) -> list[Any]:
        pairs = zip(asked, passages, strict=True)
        return [student_chat(retrieval_question(found, q.question, fits)[0]) for q, found in pairs]

    def grade(judge: Judge, said: list[Reply]) -> list[bool | None]:
        chats = [judge_chat(q.question, q.answers, r.text) for q, r in zip(questions, said, strict=True)]
        if judge.model:
            return list(map(parse_grade, grade_remotely(judge, chats, api_key)))
        readable = [engine.fits(chat, judge.max_tokens) for chat in chats]
        graded = iter(ask(list(compress(chats, readable)), None, judge.max_tokens))
        return [parse_grade(next(graded).text) if fits else None for fits in readable]

    gold = _read_gold_passages(engine, questions, settings)
    plain = [student_chat(question.question) for question in questions]
    general = [student_chat(row["question"]) for row in general_questions()]
    short = min(GENERAL_TOKENS, settings.max_tokens)
    others = [student_chat(question.question) for question in task.unrelated]
    reading = with_passages(task.unrelated, [[{"heading": "", "text": q.context}] for q in task.unrelated])
    with tempfile.TemporaryDirectory(prefix="adapters-") as folder:
        local = {arm: source.copy_to(f"{folder}/{arm}") for arm, source in task.adapters.items()}
        both = (("closed_book", None), ("adapter", local["adapter"]))
        arms = {"closed_book": ask(plain, None)} | {arm: ask(plain, path) for arm, path in local.items()}
        if config.evaluate.retrieval:
            k = config.serve.retrieval_passages
            found = with_passages(questions, [[hit.passage for hit in index.search(q.question, k)] for q in questions])
            arms |= {"retrieval": ask(found, None), "adapter_retrieval": ask(found, local["adapter"])}
        if task.nearest:
            arms["embedding_retrieval"] = ask(with_passages(questions, task.nearest), None)
        arms["gold_passage"] = [
            Reply(text, _confidence(np.asarray(values, np.float32)[:: settings.top_k]))
            for text, values in zip(gold["text"].to_pylist(), gold["topk_logprobs"].to_pylist(), strict=True)
        ]
        judge = config.evaluate.judge
        grades = {arm: grade(judge, said) for arm, said in arms.items()} if judge else {}
        return Replies(
            questions,
            arms,
            gold,
            grades,
            {arm: [reply.text for reply in ask(general, path, short)] for arm, path in both},
            {arm: [reply.text for reply in ask(others, path)] for arm, path in both},
            {arm: [reply.text for reply in ask(reading, path)] for arm, path in both},
            engine.stats.since(before),
        )


def _read_gold_passages(engine: Any, questions: list[TestQuestion], settings: AnswerSection) -> pa.Table:
    """Return the base model's answers with each question's own context in the prompt; ValueError if one is too long."""
    from pipeline.answer import answer_id_of, answer_questions

    contexts = {question.id: {"text": question.context, "heading": ""} for question in questions}
    asked = [{"question_id": q.id, "passage_id": q.id, "text": q.question} for q in questions]
    gold, rejected = answer_questions(engine, contexts, asked, settings)
    if rejected:
        ids = {answer_id_of(question.id, 0, settings): question.id for question in questions}
        first = rejected[0]
        raise ValueError(
            f"{len(rejected)} contexts of evaluation questions are too long, first that of {ids[first.record_id]!r} "
            f"({first.detail}); shorten them, or lower evaluate.max_tokens"
        )
    return gold


def _locate(question: TestQuestion, index: Any) -> TestQuestion:
    """Find the passage that a question's context comes from, by its words; the corpus may have none."""
    from pipeline.retrieve import SAME_TEXT, overlap

    if question.passage_id:
        return question
    for hit in index.search(question.context, 1):
        if overlap(question.context, hit.passage["text"]) >= SAME_TEXT:
            return question._replace(document=hit.passage["source"], passage_id=hit.passage["passage_id"])
    return question


def _confidence(logprobs: np.ndarray) -> float:
    return float(np.exp(logprobs.mean())) if len(logprobs) else 0.0


def judge_key() -> str:
    """Return the key for a judge at an endpoint that stands in this process's environment."""
    return os.environ.get("OPENAI_API_KEY", "none")


def try_judge(judge: Judge, api_key: str) -> None:
    """Raise ValueError unless the model at an endpoint grades."""
    chat = judge_chat("Who designed the bridge?", ["Ida Voss"], "Ida Voss did.")
    grade_remotely(judge, [chat], api_key, refusals=())


def grade_remotely(
    judge: Judge, chats: list[Any], api_key: str, refusals: tuple[int, ...] = (400, 413, 422)
) -> list[str]:
    """Grade through an OpenAI-compatible endpoint, many at a time; the client retries what fails for a while.

    A request that it refuses by its content, as too long or filtered, with one of the `refusals`, gets no grade.
    """
    from concurrent.futures import ThreadPoolExecutor

    import openai

    client = openai.OpenAI(base_url=judge.url, api_key=api_key, max_retries=5)

    def grade(chat: Any) -> str:
        try:
            done = client.chat.completions.create(
                model=str(judge.model), messages=chat, temperature=0, max_tokens=judge.max_tokens
            )
        except openai.APIStatusError as error:
            if error.status_code in refusals:
                return ""
            raise
        return (done.choices[0].message.content or "") if done.choices else ""

    try:
        with ThreadPoolExecutor(judge.concurrency) as pool:
            return list(pool.map(grade, chats))
    except openai.OpenAIError as error:
        raise ValueError(f"evaluate.judge: {judge.model!r} does not grade ({error})") from None
