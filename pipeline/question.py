"""Passage -> Question: the base model reads a passage and writes a quota of questions about it.

In: one shard of passages per unit. Out: questions in the order of their passages; what cannot be used is Rejected.
Ids name the slot (passage, kind, round, call, ordinal), not the sampled text. An open quota is asked for again with
other seeds for a bounded number of rounds. A second run may ask for the words of a passage that no short answer of the
first one gave.
"""

import math
import random
from collections import Counter
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.base_model import BaseModel
from pipeline.config import Config, QuestionKind, QuestionSection
from pipeline.engine import Engine, render_chat
from pipeline.previous import PreviousRun, previous_settings
from pipeline.prompts import parse_questions, prompts_digest, question_chat, questions_schema
from pipeline.schema import QUESTION, Question, Rejected, digest, seed_of, to_table
from pipeline.stage import Job
from pipeline.store import Stage, Unit
from pipeline.text import is_about, is_standalone, normalise, sentences, told_by_passage, untold


class Call(NamedTuple):
    """One request for `count` questions."""

    passage_id: str
    kind: QuestionKind
    round: int
    ordinal: int

    def request_id(self, seed: int) -> str:
        return digest(*self, seed)


def question_job(config: Config, base: BaseModel) -> Job:
    """Describe the stage; it needs the complete chunk stage."""
    passages, settings, update = Stage(config.run_dir, "chunk"), config.question, config.update
    if update.previous_run:
        had = Stage(update.previous_run, "question").require()["settings"]["question"]["seed"]
        # The same requests again would give the same ids, and the same questions.
        settings = settings.model_copy(update={"seed": max(settings.seed, had + update.ask_again)})
    return Job(
        Stage(config.run_dir, "question"),
        {
            "question": settings.model_dump(),
            "max_model_len": config.model.max_model_len,
            "model": base.identity(),
            "prompts": prompts_digest(),
            "input": passages.require()["data_digest"],
            **{name: True for name in ("ask_again", "ask_for_untold") if getattr(update, name)},
            **previous_settings(config, base),
        },
        [{"name": shard.removesuffix(".parquet")} for shard in passages.shards()],
        QuestionWriter,
        {
            "run_dir": config.run_dir,
            "settings": settings,
            "previous_run": update.previous_run,
            "ask_again": update.ask_again,
            "ask_for_untold": update.ask_for_untold,
        },
        config.max_reject_share,
    )


class QuestionWriter:
    """One unit is one shard of passages; those of a previous run keep their questions, and may get more."""

    def __init__(
        self,
        run_dir: str,
        settings: QuestionSection,
        engine: Engine,
        previous_run: str | None = None,
        ask_again: bool = False,
        ask_for_untold: bool = False,
    ) -> None:
        self._passages = Stage(run_dir, "chunk")
        self._questions = Stage(run_dir, "question")
        self._settings = settings
        self._engine = engine
        self._previous = PreviousRun(previous_run)
        self._ask_again = ask_again
        self._ask_for_untold = ask_for_untold

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        passages = self._passages.read_shard(f"{unit['name']}.parquet").to_pylist()
        kept = self._previous.rows("question", passages)
        had: dict[str, list[dict[str, str]]] = {}
        for row in kept.to_pylist():
            had.setdefault(row["passage_id"], []).append(row)
        told = self._told(kept, passages) if self._ask_for_untold else {}
        quotas = [
            _Quota(passage, self._settings, had.get(passage["passage_id"], []), told.get(passage["passage_id"], set()))
            for passage in passages
            if (self._ask_again or passage["passage_id"] not in had) and passage["text"].strip()
        ]
        before = self._engine.stats
        for round_ in range(self._settings.max_rounds):
            calls = [(quota, call) for quota in quotas for call in quota.open_calls(round_)]
            self._ask(calls)
        questions = [question for quota in quotas for question in quota.questions]
        rejected = [row for quota in quotas for row in quota.rejected]
        return self._questions.commit(
            unit["name"],
            [pa.concat_tables([kept, to_table(questions, QUESTION)])],
            rejected,
            rows_in=kept.num_rows + sum(quota.num_candidates for quota in quotas),
            stats=self._engine.stats.since(before)
            | {"passages": len(quotas), "passages_full": sum(quota.is_full for quota in quotas)},
        )

    def _told(self, questions: pa.Table, passages: list[dict[str, Any]]) -> dict[str, set[str]]:
        """Return the words that the previous run's answers to these questions told, by the passage they are about."""
        texts = dict(zip(questions["question_id"].to_pylist(), questions["text"].to_pylist(), strict=True))
        answers = self._previous.rows("filter", passages).select(["question_id", "passage_id", "text"])
        return told_by_passage(texts, answers.to_pylist())

    def _ask(self, calls: list[tuple["_Quota", Call]]) -> None:
        engine, settings = self._engine, self._settings
        room = engine.max_model_len - settings.max_tokens
        prompts, asked = [], []
        for quota, call in calls:
            prompt = render_chat(engine.tokenizer, quota.chat(call))
            if len(prompt) > room:
                quota.give_up(call, len(prompt), room)
            else:
                prompts.append(prompt)
                asked.append((quota, call))
        replies = engine.complete(
            prompts,
            seed_of(*(call.request_id(settings.seed) for _, call in asked)),
            settings,
            settings.max_tokens,
            json_schema=questions_schema(settings.per_call) if settings.structured else None,
        )
        for (quota, call), reply in zip(asked, replies, strict=True):
            quota.take(call, reply.text)


class _Quota:
    """The questions of one passage: how many of each kind are still wanted, what was kept and what rejected.

    Once answers have told some of its words, it is asked for the others.
    """

    def __init__(
        self,
        passage: dict[str, Any],
        settings: QuestionSection,
        had: Sequence[dict[str, str]] = (),
        told: Container[str] = (),
    ) -> None:
        self._passage = passage
        self._settings = settings
        self._sentences = sentences(passage["text"])
        self._untold = [untold(sentence, told) for sentence in self._sentences] if told else []
        per_sentence = settings.per_sentence
        self._wanted = per_sentence * len(self._sentences) if per_sentence else settings.per_passage
        share, rest = divmod(self._wanted, len(settings.kinds))
        self._open: dict[QuestionKind, int] = {
            kind: share + (index < rest) for index, kind in enumerate(settings.kinds)
        }
        counts = Counter(row["kind"] for row in had)
        self._asked = Counter({kind: math.ceil(counts[kind] / settings.per_call) for kind in settings.kinds})
        self._seen = {normalise(row["text"]) for row in had}
        self.num_candidates = 0  # a reply without any counts as one
        self.questions: list[Question] = []
        self.rejected: list[Rejected] = []

    @property
    def is_full(self) -> bool:
        return len(self.questions) == self._wanted

    def open_calls(self, round_: int) -> list[Call]:
        return [
            Call(self._passage["passage_id"], kind, round_, ordinal)
            for kind, count in self._open.items()
            for ordinal in range(math.ceil(count / self._settings.per_call))
        ]

    def chat(self, call: Call) -> list[dict[str, str]]:
        passage = self._passage
        # Every kind starts at another sentence, so that a small quota still spreads over the passage.
        turn = self._settings.kinds.index(call.kind) + self._asked[call.kind]
        self._asked[call.kind] += 1
        focus, answers = self._sentences[turn % len(self._sentences)], []
        if any(self._untold):
            rng = random.Random(call.request_id(self._settings.seed))
            (number,) = rng.choices(range(len(self._untold)), [len(words) for words in self._untold])
            focus, words = self._sentences[number], self._untold[number]
            answers = rng.sample(words, min(self._settings.per_call, len(words)))
        return question_chat(passage["text"], passage["heading"], call.kind, self._settings.per_call, focus, answers)

    def give_up(self, call: Call, prompt_tokens: int, room: int) -> None:
        """Reject a call whose prompt leaves no room for a reply; the kind is asked for no more."""
        self._open[call.kind] = 0
        self.num_candidates += 1
        self._reject(
            call.request_id(self._settings.seed), "too_long", f"prompt of {prompt_tokens} tokens, room for {room}"
        )

    def take(self, call: Call, reply: str) -> None:
        request_id = call.request_id(self._settings.seed)
        texts = parse_questions(reply)
        self.num_candidates += max(1, len(texts))
        if not texts:
            self._reject(request_id, "unparsable", reply[:200])
        about = f"{self._passage['heading']} {self._passage['text']}"
        for ordinal, text in enumerate(texts):
            question_id = digest(request_id, ordinal)
            if not is_standalone(text, about):
                self._reject(question_id, "not_standalone", text)
            elif not is_about(text, about):
                self._reject(question_id, "off_passage", text)
            elif (key := normalise(text)) in self._seen:
                self._reject(question_id, "duplicate_question", text)
            elif self._open[call.kind]:
                self._open[call.kind] -= 1
                self._seen.add(key)
                self.questions.append(Question(question_id, call.passage_id, call.kind, text))
            else:
                self._reject(question_id, "over_quota", text)

    def _reject(self, record_id: str, reason: Any, detail: str) -> None:
        self.rejected.append(Rejected("question", record_id, reason, detail))
