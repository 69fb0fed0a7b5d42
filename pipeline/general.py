"""Nothing but the base model -> Answers on general matters: what the student must not forget.

In: the base model. Out: answers without a passage, with the base model's own top-k. It writes the prompts itself: given
the chat template up to a user's first words, an instruct model goes on with others (Magpie, Xu et al. 2024). Training
mixes them in, so that the student stays the base model where the corpus has no say; the unit `held-out` is for
measuring how far it moved. Where a corpus lost passages, the questions about them are answered likewise.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.answer import answer_table, tail_mass
from pipeline.base_model import BaseModel
from pipeline.config import AnswerSection, Config, General
from pipeline.engine import Completion, Engine, render_chat, render_user_opening
from pipeline.previous import previous_settings
from pipeline.prompts import student_chat
from pipeline.retrieve import SAME_TEXT, PassageIndex, overlap, telling_words
from pipeline.schema import REASONS, Rejected, digest, seed_of
from pipeline.stage import Job
from pipeline.store import Stage, Unit
from pipeline.text import normalise

HELD_OUT = "held-out"
FORGOTTEN = "forgotten"
UNIT_PROMPTS = 128
SPARE = 2  # prompts sampled for each one wanted: some are empty, or there already
MIN_CHARS = 6  # of a prompt's words; not a number of words, which some scripts do not separate
NEAREST = 4  # new passages that an old one is looked for in: what it said may be cut elsewhere now


def general_job(config: Config, base: BaseModel) -> Job:
    """Describe the stage; it needs no other."""
    settings = config.general
    counts = {
        f"{number:06d}": min(UNIT_PROMPTS, settings.prompts - start)
        for number, start in enumerate(range(0, settings.prompts, UNIT_PROMPTS))
    } | ({HELD_OUT: settings.held_out} if settings.held_out else {})
    return Job(
        Stage(config.run_dir, "general"),
        {
            "general": settings.model_dump(exclude={"share"}),
            "top_k": config.answer.top_k,
            "model": base.identity(),
        },
        [{"name": name, "count": count} for name, count in counts.items()],
        GeneralWriter,
        # No limit on rejects: prompts are sampled to spare.
        {"run_dir": config.run_dir, "settings": settings, "top_k": config.answer.top_k},
    )


class GeneralWriter:
    """One unit is so many prompts with their answers."""

    def __init__(self, run_dir: str, settings: General, top_k: int, engine: Engine) -> None:
        self._stage = Stage(run_dir, "general")
        self._settings = settings
        self._top_k = top_k
        self._engine = engine

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        settings, before = self._settings, self._engine.stats
        sampled = self._sample_prompts(unit["name"], SPARE * unit["count"])
        rows: list[tuple[str, str, str]] = []
        rejected = []
        for ordinal, (prompt, reason) in enumerate(zip(sampled, reasons_against(sampled, unit["count"]), strict=True)):
            prompt_id = digest("general", unit["name"], ordinal, settings.seed)
            text = prompt.text.strip()
            if reason:
                rejected.append(Rejected("general", prompt_id, reason, text[:200]))
            else:
                rows.append((prompt_id, prompt_id, text))
        seed = seed_of("general answers", unit["name"], settings.seed)
        table = answer_alone(self._engine, rows, seed, settings, self._top_k)
        stats = self._engine.stats.since(before) | {"tail_mass_sum": float(tail_mass(table, self._top_k).sum())}
        return self._stage.commit(unit["name"], [table], rejected, len(sampled), stats)

    def _sample_prompts(self, unit_name: str, count: int) -> list[Completion]:
        """Return prompts as the model completes them, their first words included."""
        engine, settings = self._engine, self._settings
        opening = render_user_opening(engine.tokenizer)
        words = [engine.tokenizer.encode(text, add_special_tokens=False) for text in settings.first_words]
        words = list(islice(cycle(words), count))
        seed = seed_of("general prompts", unit_name, settings.seed)
        prompts = engine.complete([opening + ids for ids in words], seed, settings, settings.max_tokens)
        texts = [
            str(engine.tokenizer.decode([*ids, *prompt.token_ids], skip_special_tokens=True))
            for ids, prompt in zip(words, prompts, strict=True)
        ]
        return [prompt._replace(text=text) for prompt, text in zip(prompts, texts, strict=True)]


def forgotten_job(config: Config, base: BaseModel) -> Job:
    """Describe the stage `forgotten`: questions about removed passages, as the base model alone answers them."""
    previous_run = config.update.previous_run
    assert previous_run is not None
    return Job(
        Stage(config.run_dir, FORGOTTEN),
        {
            "answer": config.answer.model_dump(),
            "model": base.identity(),
            "input": Stage(config.run_dir, "chunk").require()["data_digest"],
            **previous_settings(config, base),
        },
        [{"name": shard.removesuffix(".parquet")} for shard in Stage(previous_run, "chunk").shards()],
        ForgottenWriter,
        {"run_dir": config.run_dir, "previous_run": previous_run, "settings": config.answer},
    )


class ForgottenWriter:
    """One unit is one shard of the previous run's passages, of which it takes those whose text stands nowhere any more.

    Some of what they said may stand in new passages, of this file or another; questions about that are left out.
    Holds 100 bytes a passage of both runs in memory, and the new texts.
    """

    def __init__(self, run_dir: str, previous_run: str, settings: AnswerSection, engine: Engine) -> None:
        self._stage = Stage(run_dir, FORGOTTEN)
        self._passages = Stage(previous_run, "chunk")
        self._questions = Stage(previous_run, "question")
        self._answers = Stage(previous_run, "answer")
        before = set(map(digest, self._passages.texts()))
        self._now: set[str] = set()
        new = []
        for text in Stage(run_dir, "chunk").texts():
            self._now.add(key := digest(text))
            if key not in before:
                new.append(text)
        self._new = PassageIndex.build(pa.table({"heading": [""] * len(new), "text": new}))
        self._settings = settings
        self._engine = engine

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        settings, before = self._settings, self._engine.stats
        passages = self._passages.read_shard(f"{unit['name']}.parquet").to_pylist()
        gone = {
            row["passage_id"]: (row["text"], self._find_new(row["text"]))
            for row in passages
            if digest(row["text"]) not in self._now
        }
        wrong = {
            row["question_id"]
            for row in self._answers.read_unit(unit["name"], ["question_id", "passage_id", "text"]).to_pylist()
            if row["passage_id"] in gone and is_wrong_now(row["text"], *gone[row["passage_id"]])
        }
        questions = self._questions.read_unit(unit["name"])
        questions = questions.filter(pc.field("question_id").isin(pa.array(sorted(wrong), pa.string())))
        rows = [
            (digest(FORGOTTEN, row["question_id"]), row["question_id"], row["text"]) for row in questions.to_pylist()
        ]
        seed = seed_of(FORGOTTEN, unit["name"], settings.seed)
        table = answer_alone(self._engine, rows, seed, settings, settings.top_k)
        return self._stage.commit(unit["name"], [table], [], len(rows), self._engine.stats.since(before))

    def _find_new(self, text: str) -> str:
        found = (hit.passage["text"] for hit in self._new.search(text, NEAREST))
        return "\n".join(new for new in found if overlap(text, new) >= SAME_TEXT)


def is_wrong_now(answer: str, said: str, new: str) -> bool:
    """True if an answer has a word of its passage that stands no more in what is new, or nothing of it stands there."""
    before, now = telling_words(said), telling_words(new)
    return not before & now or bool((before - now) & telling_words(answer))


def answer_alone(
    engine: Engine, rows: list[tuple[str, str, str]], seed: int, settings: AnswerSection | General, top_k: int
) -> pa.Table:
    """Let the base model answer prompts without a passage; a row is an answer's id, its question's, and the prompt."""
    prompts = [render_chat(engine.tokenizer, student_chat(text)) for *_, text in rows]
    replies = engine.complete(prompts, seed, settings, settings.max_tokens, top_k)
    asked = [(answer_id, of, "", ids) for (answer_id, of, _), ids in zip(rows, prompts, strict=True)]
    return answer_table(asked, replies)


def reasons_against(prompts: Sequence[Completion], count: int) -> list[REASONS | None]:
    """Return for every sampled prompt why it is left out, or None, which at most `count` get.

    Whole ones come first, but one that was cut off is a prompt as well: the base model has an answer to it.
    """
    reasons: list[REASONS | None] = ["over_quota"] * len(prompts)
    chosen: set[str] = set()
    for index in sorted(range(len(prompts)), key=lambda index: prompts[index].finish_reason != "stop"):
        text = normalise(prompts[index].text)
        if len(text) < MIN_CHARS:
            reasons[index] = "empty"
        elif text in chosen:
            reasons[index] = "duplicate_question"
        elif len(chosen) < count:
            reasons[index] = None
            chosen.add(text)
    return reasons
