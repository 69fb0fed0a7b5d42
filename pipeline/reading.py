"""Questions -> Answers that must be read: what keeps the student from answering by heart when it is given passages.

In: one shard of questions per unit, and its passages. Out: the base model's answers to some of them, with its own
top-k, and with retrieved passages in the prompt, the student's as well. There names and numbers are exchanged, so that
what the student remembers of them is wrong, and only what it reads is right (entity substitution, Longpre et al. 2021).
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import pyarrow.compute as pc
import regex

from pipeline.answer import tail_mass
from pipeline.config import AnswerSection, Config
from pipeline.engine import Engine
from pipeline.general import answer_alone
from pipeline.previous import PreviousRun
from pipeline.prompts import retrieval_question, student_chat, titled
from pipeline.schema import Rejected, digest, seed_of
from pipeline.stage import Job
from pipeline.store import Stage, Unit

READING = "reading"
# Words, and numbers that are not part of one; in scripts without spaces they stand between other characters.
_WORD = regex.compile(r"(?<![\p{L}\p{M}\d])\p{L}[\p{L}\p{M}]++(?!\d)|(?<![A-Za-z\d])\d+(?![A-Za-z\d])")
# Not what begins a sentence, a line or a list's item.
_NAME_INSIDE = regex.compile(r"(?<=[\p{L}\p{M}\d,;)][ \t]+[\"'(\u201c]?)\p{Lu}[\p{L}\p{M}]+")


def reading_job(config: Config, answers: Job) -> Job:
    """Describe the stage: made like that of the answers, whose units and needs it shares."""
    counts = {"per_passage": config.reading.per_passage, "num_passages": config.serve.retrieval_passages}
    return replace(
        answers,
        stage=Stage(config.run_dir, READING),
        settings=answers.settings | counts,
        worker=ReadingWriter,
        arguments=answers.arguments | counts,
    )


class ReadingWriter:
    """One unit is some of the new questions about one shard of passages."""

    def __init__(
        self,
        run_dir: str,
        settings: AnswerSection,
        per_passage: int,
        num_passages: int,
        engine: Engine,
        previous_run: str | None = None,
    ) -> None:
        self._passages = Stage(run_dir, "chunk")
        self._questions = Stage(run_dir, "question")
        self._reading = Stage(run_dir, READING)
        self._settings = settings
        self._per_passage = per_passage
        self._num_passages = num_passages
        self._engine = engine
        self._previous = PreviousRun(previous_run)

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        from pipeline.retrieve import PassageIndex

        settings, before = self._settings, self._engine.stats
        table = self._passages.read_shard(f"{unit['name']}.parquet")
        index, passages = PassageIndex.build(table), {row["passage_id"]: row for row in table.to_pylist()}
        names = names_in([titled(row["text"], row["heading"]) for row in passages.values()])
        had = self._previous.rows("question", list(passages.values()))["question_id"].combine_chunks()
        questions = self._questions.read_unit(unit["name"]).filter(~pc.field("question_id").isin(had)).to_pylist()
        rng = random.Random(seed_of(READING, unit["name"], settings.seed))
        rows, rejected = [], []
        for row in _pick(questions, self._per_passage, rng):
            answer_id, question = digest(READING, row["question_id"], settings.seed), row["text"]
            found = [hit.passage for hit in index.search(question, self._num_passages)]
            found = found or [passages[row["passage_id"]]]  # it shares no word with any
            texts = exchange([titled(passage["text"], passage["heading"]) for passage in found], question, names, rng)
            asked, count = retrieval_question([{"text": text, "heading": ""} for text in texts], question, self._fits)
            if count:
                rows.append((answer_id, row["question_id"], asked))
            else:
                rejected.append(Rejected(READING, answer_id, "too_long", "no room for a passage"))
        seed = seed_of(settings.seed, *(row[0] for row in rows))
        answers = answer_alone(self._engine, rows, seed, settings, settings.top_k)
        stats = self._engine.stats.since(before) | {"tail_mass_sum": float(tail_mass(answers, settings.top_k).sum())}
        return self._reading.commit(unit["name"], [answers], rejected, len(rows) + len(rejected), stats)

    def _fits(self, asked: str) -> bool:
        return self._engine.fits(student_chat(asked), self._settings.max_tokens)


def _pick(questions: Iterable[dict[str, Any]], per_passage: int, rng: random.Random) -> list[dict[str, Any]]:
    """Return so many questions of each passage, or all if there are fewer; they stand passage by passage."""
    groups = [list(group) for _, group in groupby(questions, key=lambda row: row["passage_id"])]
    return [row for group in groups for row in rng.sample(group, min(per_passage, len(group)))]


def names_in(texts: Sequence[str]) -> list[str]:
    """Return the words that have a capital letter within a sentence and never lack it, each once, in a fixed order."""
    words = {word for text in texts for word in _WORD.findall(text)}
    return sorted({name for text in texts for name in _NAME_INSIDE.findall(text) if name.lower() not in words})


def exchange(texts: Sequence[str], question: str, names: Sequence[str], rng: random.Random) -> list[str]:
    """Give every name that of another, and every number that of another as long, the same wherever it stands.

    What stands in the question stays, so that it still fits the texts.
    """
    kept = set(_WORD.findall(question.lower()))
    others = _rotate([name for name in names if name.lower() not in kept], rng)
    numbers = {word for text in texts for word in _WORD.findall(text) if word.isdecimal()} - kept
    for _, group in groupby(sorted(numbers, key=lambda number: (len(number), number)), key=len):
        others |= _rotate(list(group), rng)
    return [_WORD.sub(lambda found: others.get(found[0], found[0]), text) for text in texts]


def _rotate(words: list[str], rng: random.Random) -> dict[str, str]:
    """Map every word to the next one in a random order; a number that is alone to one with another last digit."""
    if len(words) == 1 and words[0].isdecimal():
        return {words[0]: words[0][:-1] + rng.choice("123456789".replace(words[0][-1], ""))}
    order = rng.sample(words, len(words))
    return dict(zip(order, order[1:] + order[:1], strict=True))
