"""Question -> Answer: the base model answers with the passage in its prompt, its top-k captured in the same pass.

In: one shard of questions per unit, and the shard of passages it came from. Out: answers as flat Arrow arrays; prompts
that do not fit are Rejected. Requests of a passage stand together, so that its prefix is computed once.
A share of the questions is open-book: teacher and student both have the gold passage in their prompt, among others that
retrieval finds, so that there is nothing to learn but to go on reading. None of these is asked closed-book, too: its
answer would be known, and the passages would be left unread.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base_model import BaseModel
from pipeline.config import AnswerSection, Config
from pipeline.engine import Completion, Engine, render_chat
from pipeline.previous import PreviousRun
from pipeline.prompts import prompts_digest, retrieval_question, student_chat, teacher_chat
from pipeline.schema import ANSWER, PASSAGE, QUESTION, Rejected, digest, seed_of
from pipeline.stage import Job
from pipeline.store import Stage, Unit

if TYPE_CHECKING:
    from pipeline.retrieve import PassageIndex


def answer_job(config: Config, base: BaseModel, questions: Job) -> Job:
    """Describe the stage; every unit needs the unit of the same name of the question stage."""
    settings, retrieved = config.answer, config.serve.retrieval_passages
    return Job(
        Stage(config.run_dir, "answer", ANSWER),
        {
            "answer": settings.model_dump(),
            **({"retrieval_passages": retrieved} if settings.open_book_share else {}),
            "max_model_len": config.model.max_model_len,
            "model": base.identity(),
            "prompts": prompts_digest(),
            "input": questions.settings_digest,
        },
        questions.units,
        AnswerWriter,
        {
            "run_dir": config.run_dir,
            "settings": settings,
            "previous_run": config.update.previous_run,
            "retrieval_passages": retrieved,
        },
        config.max_reject_share,
    )


class OpenBook(NamedTuple):
    """Which questions are open-book, and the passages in their prompts."""

    index: "PassageIndex"
    share: float  # of the questions
    count: int  # passages, the gold passage among them

    def passages(self, question: dict[str, Any], passage: dict[str, Any]) -> list[dict[str, Any]]:
        """Return an open-book question's passages, best first, the gold one last if it was not found; of others []."""
        if seed_of("open book", question["question_id"]) >= self.share * 2**32:
            return []
        found = [hit.passage for hit in self.index.search(question["text"], self.count)]
        if passage["passage_id"] in {row["passage_id"] for row in found}:
            return found
        return [*found[: self.count - 1], passage]


class AnswerWriter:
    """One unit is the questions about one shard of passages; those of a previous run keep theirs."""

    def __init__(
        self,
        run_dir: str,
        settings: AnswerSection,
        retrieval_passages: int,
        engine: Engine,
        previous_run: str | None = None,
    ) -> None:
        self._passages = Stage(run_dir, "chunk", PASSAGE)
        self._questions = Stage(run_dir, "question", QUESTION)
        self._answers = Stage(run_dir, "answer", ANSWER)
        self._settings = settings
        self._engine = engine
        self._previous = PreviousRun(previous_run)
        self._retrieval_passages = retrieval_passages

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        passages = self._passages.read_shard(f"{unit['name']}.parquet").to_pylist()
        kept = self._previous.rows("answer", passages)
        # New ones, and those for whose prompts there was no room before.
        answered = pc.field("question_id").isin(kept["question_id"].combine_chunks())
        new = self._questions.read_unit(unit["name"]).filter(~answered)
        share = self._settings.open_book_share
        open_book = OpenBook(_index(self._passages), share, self._retrieval_passages) if share else None
        before = self._engine.stats
        written, rejected = answer_questions(
            self._engine, {row["passage_id"]: row for row in passages}, new.to_pylist(), self._settings, open_book
        )
        table = pa.concat_tables([kept, written])
        stats = self._engine.stats.since(before) | {
            "answer_tokens": float(len(table["answer_ids"].combine_chunks().flatten())),
            "unfinished": float(np.count_nonzero(np.asarray(table["finish_reason"]) == "length")),
            "tail_mass_sum": float(tail_mass(table, self._settings.top_k).sum()),
        }
        return self._answers.commit(
            unit["name"], [table], rejected, kept.num_rows + new.num_rows * self._settings.per_question, stats
        )


@lru_cache(1)
def _index(chunk: Stage) -> "PassageIndex":
    """Return an index of a run's passages, 8 kB of memory for each, for all units of it that come in a row."""
    from pipeline.retrieve import PassageIndex

    columns = ["passage_id", "heading", "text"]
    return PassageIndex.build(pa.concat_tables([chunk.read_shard(shard, columns) for shard in chunk.shards()]))


def answer_questions(
    engine: Engine,
    passages: dict[str, dict[str, Any]],
    questions: list[dict[str, Any]],
    settings: AnswerSection,
    open_book: OpenBook | None = None,
) -> tuple[pa.Table, list[Rejected]]:
    """Answer every question `settings.per_question` times; return the ANSWER table and what did not fit."""
    room = engine.max_model_len - settings.max_tokens
    rows, prompts, rejected = [], [], []
    for question in questions:
        passage, text = passages[question["passage_id"]], question["text"]
        found = open_book.passages(question, passage) if open_book else []
        if found:
            prompt = render_chat(engine.tokenizer, student_chat(retrieval_question(found, text, lambda _: True)[0]))
            student_prompt = prompt
        else:
            prompt = render_chat(engine.tokenizer, teacher_chat(passage["text"], passage["heading"], text))
            student_prompt = render_chat(engine.tokenizer, student_chat(text))
        for ordinal in range(settings.per_question):
            answer_id = answer_id_of(question["question_id"], ordinal, settings)
            if len(prompt) > room:
                rejected.append(
                    Rejected("answer", answer_id, "too_long", f"prompt of {len(prompt)} tokens, room for {room}")
                )
                continue
            rows.append(Asked(answer_id, question["question_id"], question["passage_id"], student_prompt, bool(found)))
            prompts.append(prompt)
    completions = engine.complete(
        prompts, seed_of(settings.seed, *(row.answer_id for row in rows)), settings, settings.max_tokens, settings.top_k
    )
    return answer_table(rows, completions), rejected


def answer_id_of(question_id: str, ordinal: int, settings: AnswerSection) -> str:
    """Name the answer of that ordinal to a question."""
    return digest(question_id, ordinal, settings.seed)


class Asked(NamedTuple):
    """What is known of an answer before it is written."""

    answer_id: str
    question_id: str
    passage_id: str
    prompt_ids: list[int]  # the student's
    open_book: bool = False


def answer_table(rows: list[Asked], completions: list[Completion]) -> pa.Table:
    """Build the ANSWER table of what was asked and what was answered."""

    def ragged(arrays: list[np.ndarray], kind: Any) -> pa.Array:
        offsets = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int32)
        flat = np.concatenate([array.ravel() for array in arrays]) if arrays else np.empty(0)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.astype(kind)))

    columns = [
        [row.answer_id for row in rows],
        [row.question_id for row in rows],
        [row.passage_id for row in rows],
        [completion.text.strip() for completion in completions],
        [completion.finish_reason for completion in completions],
        [row.open_book for row in rows],
        ragged([np.asarray(row.prompt_ids) for row in rows], np.int32),
        ragged([completion.token_ids for completion in completions], np.int32),
        ragged([completion.topk_ids for completion in completions], np.int32),
        ragged([completion.topk_logprobs for completion in completions], np.float16),
    ]
    return pa.table(
        [pa.array(column, type=field.type) for column, field in zip(columns, ANSWER, strict=True)], schema=ANSWER
    )


def tail_mass(answers: pa.Table, top_k: int) -> np.ndarray:
    """Return the teacher's probability outside its top-k, [answer tokens]."""
    flat = answers["topk_logprobs"].combine_chunks().flatten()
    logprobs = np.asarray(flat, dtype=np.float32).reshape(-1, top_k)
    return np.maximum(0.0, 1.0 - np.exp(logprobs).sum(axis=1))
