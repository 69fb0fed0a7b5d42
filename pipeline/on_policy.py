"""Questions -> Answers in the student's words: on-policy distillation (Agarwal et al. 2024), stored like any other.

In: one shard of questions per unit, and its passages. Out: what the previous run's adapter answers to some of them
without their passage, with the top-k that the base model, which has the passage, gives at every token of it. Where the
student goes wrong by itself, the teacher never was: a teacher's answer does not show it the way back.
"""

import random
import tempfile
from dataclasses import replace
from typing import Any

from pipeline.answer import answer_table, tail_mass
from pipeline.config import AnswerSection, Config
from pipeline.engine import Engine, render_chat
from pipeline.previous import adapter_of
from pipeline.prompts import student_chat, teacher_chat
from pipeline.question import pick_questions
from pipeline.schema import ANSWER, PASSAGE, QUESTION, Rejected, digest, seed_of
from pipeline.stage import Job
from pipeline.store import Stage, Unit

ON_POLICY = "on_policy"


def on_policy_job(config: Config, answers: Job) -> Job:
    """Describe the stage: made like that of the answers, whose units and needs it shares."""
    counts = {"per_passage": config.update.on_policy}
    adapter = Stage(str(config.update.previous_run), "train", ANSWER).require()["data_digest"]
    return replace(
        answers,
        stage=Stage(config.run_dir, ON_POLICY, ANSWER),
        settings=answers.settings | counts | {"adapter": adapter},
        worker=OnPolicyWriter,
        arguments=answers.arguments | counts,
    )


class OnPolicyWriter:
    """One unit is some of the questions about one shard of passages, those of the previous run among them."""

    def __init__(
        self, run_dir: str, settings: AnswerSection, per_passage: int, engine: Engine, previous_run: str
    ) -> None:
        self._passages = Stage(run_dir, "chunk", PASSAGE)
        self._questions = Stage(run_dir, "question", QUESTION)
        self._on_policy = Stage(run_dir, ON_POLICY, ANSWER)
        self._settings = settings
        self._per_passage = per_passage
        self._engine = engine
        self._folder = tempfile.TemporaryDirectory(prefix="adapter-")
        self._adapter = adapter_of(previous_run).copy_to(self._folder.name)

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        engine, settings, before = self._engine, self._settings, self._engine.stats
        passages = {row["passage_id"]: row for row in self._passages.read_shard(f"{unit['name']}.parquet").to_pylist()}
        rng = random.Random(seed_of(ON_POLICY, unit["name"], settings.seed))
        room = engine.max_model_len - settings.max_tokens
        rows, prompts, rejected = [], [], []
        for row in pick_questions(self._questions.read_unit(unit["name"]).to_pylist(), self._per_passage, rng):
            passage, answer_id = passages[row["passage_id"]], digest(ON_POLICY, row["question_id"], settings.seed)
            prompt = render_chat(engine.tokenizer, teacher_chat(passage["text"], passage["heading"], row["text"]))
            if len(prompt) > room:
                detail = f"prompt of {len(prompt)} tokens, room for {room}"
                rejected.append(Rejected(ON_POLICY, answer_id, "too_long", detail))
                continue
            asked = render_chat(engine.tokenizer, student_chat(row["text"]))
            rows.append((answer_id, row["question_id"], row["passage_id"], asked))
            prompts.append(prompt)
        seed = seed_of(settings.seed, *(row[0] for row in rows))
        asked = [prompt for *_, prompt in rows]
        said = engine.complete(asked, seed, settings, settings.max_tokens, adapter=self._adapter)
        judged = engine.score(prompts, [reply.token_ids for reply in said], settings.top_k)
        answers = answer_table(rows, judged)
        stats = engine.stats.since(before) | {"tail_mass_sum": float(tail_mass(answers, settings.top_k).sum())}
        return self._on_policy.commit(unit["name"], [answers], rejected, len(rows) + len(rejected), stats)
