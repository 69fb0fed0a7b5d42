"""Answer -> Answer: what would teach nothing, or something wrong, or is kept for measuring, becomes Rejected.

In: one shard of answers per unit, with its questions and passages. Out: the answers worth training on, unchanged.
Questions that are held out for evaluation, and those that nearly repeat one, are kept from training here. Coverage is
measured here, because only here it is known which questions and answers remain.
"""

from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.config import Config, FilterSection
from pipeline.held_out import HeldOut, NearQuestions, hold_out
from pipeline.previous import PreviousRun, adapter_digest
from pipeline.prompts import titled
from pipeline.resources import worker_options
from pipeline.schema import REASONS, Rejected, digest
from pipeline.stage import Actors, Job, run_alike
from pipeline.store import Stage, Unit, require_line
from pipeline.text import invents_number, normalise, spaced_words, speaks_of_text, told_by_passage


def filter_answers(configs: list[Config], redo: bool = False) -> list[Any]:
    """Run the stage of several corpora; return for each its manifest, or the ValueError."""
    cluster = configs[0].cluster
    actors = Actors(cluster, cluster.num_engines)
    if configs[0].filter.min_initial_kl is not None:
        actors = Actors(cluster, cluster.num_workers, worker_options(cluster))
    return run_alike([partial(filter_job, config) for config in configs], actors, redo)


def filter_job(config: Config) -> Job:
    """Describe the stage; it needs the complete answer stage."""
    answers, line = Stage(config.run_dir, "answer"), require_line(config.run_dir, "answer")
    held_out, starts_from = hold_out(config), {}
    if config.update.previous_run and config.filter.min_initial_kl is not None:
        starts_from["adapter"] = adapter_digest(config.update.previous_run)
    return Job(
        Stage(config.run_dir, "filter"),
        {
            "filter": config.filter.model_dump(),
            "input": line["answer"]["data_digest"],
            "evaluation": {
                "questions": digest(*sorted(held_out.texts)),
                "near_duplicate_threshold": config.evaluate.near_duplicate_threshold,
            },
            **starts_from,
        },
        [{"name": name} for name in sorted(answers.committed())],
        AnswerFilter,
        {"config": config, "held_out": held_out},
        config.max_reject_share,
    )


class AnswerFilter:
    """One unit is one shard of answers; new ones are scored by what training starts from if there is a least KL."""

    def __init__(self, config: Config, held_out: HeldOut) -> None:
        self._config = config
        self._chunk = Stage(config.run_dir, "chunk")
        self._question = Stage(config.run_dir, "question")
        self._answers = Stage(config.run_dir, "answer")
        self._filtered = Stage(config.run_dir, "filter")
        self._settings = config.filter
        self._held_out = held_out
        self._near = NearQuestions(held_out.texts, config.evaluate.near_duplicate_threshold)
        self._previous = PreviousRun(None if config.filter.min_initial_kl is None else config.update.previous_run)

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        passages = {row["passage_id"]: row for row in self._chunk.read_shard(f"{unit['name']}.parquet").to_pylist()}
        texts = {row["question_id"]: row["text"] for row in self._question.read_unit(unit["name"]).to_pylist()}
        answers = self._answers.read_unit(unit["name"])
        reasons = find_reasons(answers, texts, passages, self._settings)
        for index, question_id in enumerate(answers["question_id"].to_pylist()):
            if reasons[index] is None and question_id in self._held_out.ids:
                reasons[index] = "held_out"
            elif reasons[index] is None and self._near.holds(texts[question_id]):
                reasons[index] = "near_evaluation"
        if (least := self._settings.min_initial_kl) is not None:
            from pipeline.student import initial_scorer

            new = set(self._previous.split(answers, list(passages.values()))[0]["answer_id"].to_pylist())
            ids = answers["answer_id"].to_pylist()
            judged = [index for index, reason in enumerate(reasons) if reason is None and ids[index] in new]
            scores = initial_scorer(self._config).kl(answers.take(judged)) if judged else []
            for index, kl in zip(judged, scores, strict=True):
                if kl < least:
                    reasons[index] = "nothing_to_learn"
        kept_answers = answers.filter(pa.array([reason is None for reason in reasons], pa.bool_()))
        rejected = [
            Rejected("filter", answer_id, reason, text[:200])
            for answer_id, text, reason in zip(
                answers["answer_id"].to_pylist(), answers["text"].to_pylist(), reasons, strict=True
            )
            if reason is not None
        ]
        return self._filtered.commit(
            unit["name"], [kept_answers], rejected, answers.num_rows, measure_coverage(passages, texts, kept_answers)
        )


def find_reasons(
    answers: pa.Table, questions: dict[str, str], passages: dict[str, dict[str, Any]], settings: FilterSection
) -> list[REASONS | None]:
    """Return for every answer why it is rejected, or None; `questions` maps ids to texts, `passages` ids to rows."""
    seen: set[tuple[str, str]] = set()
    reasons: list[REASONS | None] = []
    columns = ("question_id", "passage_id", "text", "finish_reason")
    for row in answers.select(columns).to_pylist():
        key = (row["question_id"], normalise(row["text"]))
        passage = passages[row["passage_id"]]
        text = titled(passage["text"], passage["heading"])
        reasons.append(_reason(row, questions[row["question_id"]], text, settings, key in seen))
        seen.add(key)
    return reasons


def _reason(row: dict[str, str], question: str, passage: str, settings: FilterSection, is_seen: bool) -> REASONS | None:
    text = normalise(row["text"])
    if not text:
        return "empty"
    if row["finish_reason"] != "stop" and not settings.keep_unfinished:
        return "unfinished"
    if text == normalise(question):
        return "echoes_question"
    if settings.reject_leak_phrases and speaks_of_text(row["text"]):
        return "leak_phrase"
    if settings.reject_invented_numbers and invents_number(row["text"], f"{passage}\n{question}"):
        return "invented_number"
    return "duplicate_answer" if is_seen else None


def measure_coverage(
    passages: dict[str, dict[str, Any]], questions: dict[str, str], answers: pa.Table
) -> dict[str, float]:
    """Count the words of the passages, each once a passage, and those that some kept answer tells."""
    told = told_by_passage(questions, answers.select(["passage_id", "question_id", "text"]).to_pylist())
    words = {passage_id: spaced_words(passage["text"]) for passage_id, passage in passages.items()}
    return {
        "words": sum(map(len, words.values())),
        "words_told": sum(len(words[passage_id] & told[passage_id]) for passage_id in passages),
    }
