"""Question -> Answer: the base model answers with the passage in its prompt, its top-k captured in the same pass.

In: one shard of questions per unit, and the shard of passages it came from. Out: answers as flat Arrow arrays; prompts
that do not fit are Rejected. Requests of a passage stand together, so that its prefix is computed once.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base_model import BaseModel
from pipeline.config import AnswerSection, Config
from pipeline.engine import Completion, Engine, render_chat
from pipeline.previous import PreviousRun
from pipeline.prompts import prompts_digest, student_chat, teacher_chat
from pipeline.schema import ANSWER, Rejected, digest, seed_of
from pipeline.stage import Job
from pipeline.store import Stage, Unit, settings_digest


def answer_job(config: Config, base: BaseModel, questions: Job) -> Job:
    """Describe the stage; every unit needs the unit of the same name of the question stage."""
    return Job(
        Stage(config.run_dir, "answer"),
        {
            "answer": config.answer.model_dump(),
            "max_model_len": config.model.max_model_len,
            "model": base.identity(),
            "prompts": prompts_digest(),
            "input": settings_digest(questions.settings),
        },
        questions.units,
        AnswerWriter,
        {"run_dir": config.run_dir, "settings": config.answer, "previous_run": config.update.previous_run},
        config.max_reject_share,
    )


class AnswerWriter:
    """One unit is the questions about one shard of passages; those of a previous run keep theirs."""

    def __init__(self, run_dir: str, settings: AnswerSection, engine: Engine, previous_run: str | None = None) -> None:
        self._passages = Stage(run_dir, "chunk")
        self._questions = Stage(run_dir, "question")
        self._answers = Stage(run_dir, "answer")
        self._settings = settings
        self._engine = engine
        self._previous = PreviousRun(previous_run)

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        passages = self._passages.read_shard(f"{unit['name']}.parquet").to_pylist()
        kept = self._previous.rows("answer", passages)
        # New ones, and those for whose prompts there was no room before.
        answered = pc.field("question_id").isin(kept["question_id"].combine_chunks())
        new = self._questions.read_unit(unit["name"]).filter(~answered)
        before = self._engine.stats
        written, rejected = answer_questions(
            self._engine, {row["passage_id"]: row for row in passages}, new.to_pylist(), self._settings
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


def answer_questions(
    engine: Engine,
    passages: dict[str, dict[str, Any]],
    questions: list[dict[str, Any]],
    settings: AnswerSection,
) -> tuple[pa.Table, list[Rejected]]:
    """Answer every question `settings.per_question` times; return the ANSWER table and what did not fit."""
    room = engine.max_model_len - settings.max_tokens
    rows, prompts, rejected = [], [], []
    for question in questions:
        passage = passages[question["passage_id"]]
        prompt = render_chat(engine.tokenizer, teacher_chat(passage["text"], passage["heading"], question["text"]))
        for ordinal in range(settings.per_question):
            answer_id = answer_id_of(question["question_id"], ordinal, settings)
            if len(prompt) > room:
                rejected.append(
                    Rejected("answer", answer_id, "too_long", f"prompt of {len(prompt)} tokens, room for {room}")
                )
                continue
            student_prompt = render_chat(engine.tokenizer, student_chat(question["text"]))
            rows.append((answer_id, question["question_id"], question["passage_id"], student_prompt))
            prompts.append(prompt)
    completions = engine.complete(
        prompts, seed_of(settings.seed, *(row[0] for row in rows)), settings, settings.max_tokens, settings.top_k
    )
    return answer_table(rows, completions), rejected


def answer_id_of(question_id: str, ordinal: int, settings: AnswerSection) -> str:
    """Name the answer of that ordinal to a question."""
    return digest(question_id, ordinal, settings.seed)


def answer_table(rows: list[tuple[str, str, str, list[int]]], completions: list[Completion]) -> pa.Table:
    """Build the ANSWER table; a row is an answer's id, its question's, its passage's, and the student's prompt."""

    def ragged(arrays: list[np.ndarray], kind: Any) -> pa.Array:
        offsets = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int32)
        flat = np.concatenate([array.ravel() for array in arrays]) if arrays else np.empty(0)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.astype(kind)))

    columns = [
        *([row[column] for row in rows] for column in range(3)),
        [completion.text.strip() for completion in completions],
        [completion.finish_reason for completion in completions],
        ragged([np.asarray(prompt) for *_, prompt in rows], np.int32),
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
