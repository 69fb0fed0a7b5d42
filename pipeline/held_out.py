"""What evaluation asks, and what is kept from training for it.

In: the questions file of the config or, without one, the written questions. Out: `TestQuestion`s; and for `filter`,
which questions must not be trained on: those held out, and those that nearly repeat one that evaluation asks.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config, Evaluate
from pipeline.engine import load_tokenizer, render_chat
from pipeline.previous import PreviousRun, earlier_runs
from pipeline.prompts import teacher_chat, titled
from pipeline.score import comparable
from pipeline.store import Stage, open_uri
from pipeline.text import normalise, split_words


class TestQuestion(NamedTuple):
    """A question for measuring, the strings that count as right, and the passage that holds the answer."""

    id: str
    question: str
    answers: list[str]
    context: str
    kind: str = ""
    document: str = ""
    passage_id: str = ""


def load_questions(settings: Evaluate) -> list[TestQuestion]:
    """Read the questions of the config; ValueError names the line and the field that is missing or has a wrong type."""
    return read_questions("evaluate.questions", settings.questions, settings.max_questions)


def read_questions(field: str, uri: str | None, limit: int | None = None) -> list[TestQuestion]:
    """Read a JSONL of questions that the config names in `field`; none gives []."""
    if uri is None:
        return []
    filesystem, path = open_uri(uri)
    try:
        with filesystem.open_input_stream(path) as stream:
            lines = stream.read().splitlines()
    except FileNotFoundError:
        raise ValueError(f"{field} = {uri!r}: no such file") from None
    except OSError as error:
        raise ValueError(f"{field} = {uri!r}: cannot be read ({error})") from None
    questions: dict[str, TestQuestion] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(questions) == limit:
            break
        where = f"{field} = {uri!r}, line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a character, which JSON may escape, no file can hold
        except ValueError as error:
            raise ValueError(f"{where}: not JSON in UTF-8 ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not a JSON object")
        for name, kind in (("question", str), ("answers", list), ("context", str)):
            if not isinstance(row.get(name), kind) or not row[name]:
                raise ValueError(f"{where}: {name!r} must be a {kind.__name__} that is not empty")
        if not all(isinstance(answer, str) for answer in row["answers"]):
            raise ValueError(f"{where}: 'answers' must hold strings only")
        if not any(map(comparable, row["answers"])):
            told = "articles and punctuation are not compared; give other words"
            raise ValueError(f"{where}: 'answers' = {row['answers']}: {told}")
        name = str(number if row.get("id") is None else row["id"])
        if name in questions:
            raise ValueError(f"{where}: another line has the id {name!r}, too; give each its own")
        questions[name] = TestQuestion(
            name, row["question"], row["answers"], row["context"], str(row.get("kind") or "")
        )
    if not questions:
        raise ValueError(f"{field} = {uri!r} has no questions; give some, or remove the setting")
    return list(questions.values())


def refuse_long_contexts(config: Config) -> None:
    """Raise ValueError if a question of the config's files, with its context, leaves no room for a reply."""
    asked = {
        "evaluate.questions": load_questions(config.evaluate),
        "evaluate.unrelated": read_questions("evaluate.unrelated", config.evaluate.unrelated),
    }
    room = config.model.max_model_len - config.evaluate.max_tokens
    for field, questions in asked.items():
        for question in questions:
            chat = teacher_chat(question.context, "", question.question)
            tokens = len(render_chat(_load_tokenizer(config.model.path), chat))
            if tokens > room:
                raise ValueError(
                    f"{field}: {question.id!r} has {tokens} tokens with its context, and there is room for {room}; "
                    "shorten it, lower evaluate.max_tokens or raise model.max_model_len (then all is written anew)"
                )


@lru_cache(1)
def _load_tokenizer(path: str) -> Any:
    """Load it once for all corpora of a job, and not before a question needs it."""
    return load_tokenizer(path)


class HeldOut(NamedTuple):
    """What evaluation asks: ids of the questions that were taken from the written ones, if any, and all texts."""

    ids: frozenset[str]
    texts: list[str]


def hold_out(config: Config) -> HeldOut:
    """Return the questions of the evaluation's file; without one, written ones, those whose ids come first.

    At most a tenth of what was written about new passages, and in an update what was held out before.
    """
    settings = config.evaluate
    if settings.questions is not None:
        texts = [question.question for question in read_questions("evaluate.questions", settings.questions)]
        return HeldOut(frozenset(), texts)
    new: list[tuple[str, str]] = []
    held_before: list[tuple[str, str]] = []
    num_new = 0
    for written, before in _untrained_questions(config):
        num_new += written.num_rows
        new = heapq.nsmallest(settings.held_out, [*new, *_ids_and_texts(written)])
        held_before = heapq.nsmallest(settings.held_out, [*held_before, *_ids_and_texts(before)])
    if config.update.previous_run is not None:
        new = _not_asked_before(new, config.update.previous_run, settings.near_duplicate_threshold)
    chosen = heapq.nsmallest(settings.held_out, [*new[: num_new // 10], *held_before])
    return HeldOut(frozenset(i for i, _ in chosen), [text for _, text in chosen])


def _untrained_questions(config: Config) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield the questions about new passages, and those of the previous run that its adapter never saw."""
    questions, passages = Stage(config.run_dir, "question"), Stage(config.run_dir, "chunk")
    columns = ["question_id", "passage_id", "text"]
    if config.update.previous_run is None:
        for shard in questions.shards():
            table = questions.read_shard(shard, columns)
            yield table, table.slice(0, 0)
        return
    previous = PreviousRun(config.update.previous_run)
    held: dict[str, list[str]] = {}
    for row in _held_out_answers(config.update.previous_run):
        held.setdefault(row["passage_id"], []).append(row["question_id"])
    for unit in questions.units():
        rows = questions.read_unit(unit.name).select(columns)
        about = passages.read_shard(f"{unit.name}.parquet").to_pylist()
        new = pa.array([row["passage_id"] for row in about if not previous.holds(row)], pa.string())
        ids = pa.array(sorted(previous.ids_now(held, about)), pa.string())
        # Other questions about passages that stood there may nearly repeat what its adapter was trained on.
        yield rows.filter(pc.field("passage_id").isin(new)), rows.filter(pc.field("question_id").isin(ids))


def _not_asked_before(chosen: list[tuple[str, str]], previous_run: str, threshold: float) -> list[tuple[str, str]]:
    """Leave out what nearly repeats a question of the previous run, whose adapter may have been trained on it."""
    near = NearQuestions([text for _, text in chosen], threshold)
    repeated = {index for text in Stage(previous_run, "question").texts() for index in near.find(text)}
    return [pair for index, pair in enumerate(chosen) if index not in repeated]


def _ids_and_texts(questions: pa.Table) -> Iterator[tuple[str, str]]:
    return zip(questions["question_id"].to_pylist(), questions["text"].to_pylist(), strict=True)


class NearQuestions:
    """Finds whether a question is, but for a few words, one of these; `threshold` is the Jaccard similarity."""

    def __init__(self, texts: list[str], threshold: float) -> None:
        self._threshold = threshold
        self._words = [frozenset(split_words(normalise(text))) for text in texts]
        self._with_word: dict[str, list[int]] = {}
        for index, words in enumerate(self._words):
            for word in words:
                self._with_word.setdefault(word, []).append(index)

    def holds(self, question: str) -> bool:
        """True if the question nearly repeats one of the texts."""
        return bool(self.find(question))

    def find(self, question: str) -> list[int]:
        """Return the places of the texts that it nearly repeats: the similarity of their words says so."""
        words = set(split_words(normalise(question)))
        shared = Counter(index for word in words for index in self._with_word.get(word, ()))
        return [
            index
            for index, count in shared.items()
            if count >= self._threshold * (len(words) + len(self._words[index]) - count)
        ]


def count_trained_on(config: Config, questions: list[TestQuestion]) -> int | None:
    """Return how many of the questions one that was trained on, now or in an earlier run, nearly repeats.

    0, unless `evaluate.questions` changed after a `filter`, which takes such answers out of training. None if it cannot
    be told because an earlier run, from which the adapter comes, is not there any more.
    """
    near = NearQuestions([question.question for question in questions], config.evaluate.near_duplicate_threshold)
    repeated: set[int] = set()
    for run_dir in (config.run_dir, *earlier_runs(config)):
        kept, written = Stage(run_dir, "filter"), Stage(run_dir, "question")
        if kept.manifest() is None:
            return None
        for unit in kept.units():
            ids = kept.read_unit(unit.name, ["question_id"])["question_id"].combine_chunks()
            rows = written.read_unit(unit.name, ["question_id", "text"]).filter(pc.field("question_id").isin(ids))
            repeated |= {index for text in rows["text"].to_pylist() for index in near.find(text)}
    return len(repeated)


def held_out_questions(config: Config) -> list[TestQuestion]:
    """Return the written questions that `filter` kept from training; the stored answer is the accepted one."""
    questions, passages, documents = (Stage(config.run_dir, name) for name in ("question", "chunk", "dedup"))
    by_question = {row["question_id"]: row for row in _held_out_answers(config.run_dir)}  # one answer for each
    chosen = set(sorted(by_question)[: config.evaluate.max_questions])
    found = [row for key, row in by_question.items() if key in chosen]
    if not found:
        return []

    def look_up(stage: Stage, columns: list[str], rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        key = columns[0]
        return {row[key]: row for row in rows_where(stage, columns, key, {row[key] for row in rows})}

    asked = look_up(questions, ["question_id", "kind", "text"], found)
    read = look_up(passages, ["passage_id", "doc_id", "heading", "text"], found)
    sources = look_up(documents, ["doc_id", "source"], read.values())
    result = []
    for row in found:
        question, passage = asked[row["question_id"]], read[row["passage_id"]]
        context, source = titled(passage["text"], passage["heading"]), sources[passage["doc_id"]]["source"]
        result.append(
            TestQuestion(
                row["answer_id"], question["text"], [row["text"]], context, question["kind"], source, row["passage_id"]
            )
        )
    return result


def _held_out_answers(run_dir: str) -> list[dict[str, Any]]:
    rejected = Stage(run_dir, "filter").read_rejected()
    ids = set(rejected.filter(pc.field("reason") == "held_out")["record_id"].to_pylist())
    columns = ["question_id", "answer_id", "passage_id", "text"]
    return rows_where(Stage(run_dir, "answer"), columns, "answer_id", ids) if ids else []


def rows_where(stage: Stage, columns: list[str], key: str, wanted: set[str]) -> list[dict[str, Any]]:
    """Return the rows of a stage whose `key` is wanted, one shard in memory at a time."""
    values = pa.array(sorted(wanted), pa.string())
    tables = (stage.read_shard(shard, columns) for shard in stage.shards())
    return [row for table in tables for row in table.filter(pc.field(key).isin(values)).to_pylist()]
