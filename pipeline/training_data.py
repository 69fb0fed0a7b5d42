"""Complete stages -> the samples of a training, in groups that share an epoch.

In: the config. Out: tables of ANSWER rows: what the corpus teaches that is new, questions about removed passages, what
it taught a previous run already, general answers, and answers that must be read. A shard at a time is in memory.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.engine import load_tokenizer
from pipeline.general import FORGOTTEN, HELD_OUT
from pipeline.held_out import NearQuestions, hold_out
from pipeline.previous import PreviousRun
from pipeline.prompts import titled
from pipeline.reading import READING
from pipeline.schema import ANSWER
from pipeline.store import Stage


class Groups(NamedTuple):
    """The five groups; `new` and `removed` make up an epoch, the others have a share of it."""

    new: Iterator[pa.Table]
    removed: Iterator[pa.Table]
    old: Iterator[pa.Table]
    general: Iterator[pa.Table]
    reading: Iterator[pa.Table]


def training_tables(config: Config) -> Groups:
    """Return what is to be trained on; the iterators must be read one after the other."""
    always = (_general_answers(config), _reading_answers(config) if config.reading.per_passage else iter(()))
    if config.train.teacher == "raw_text":
        passages = Stage(config.run_dir, "chunk")
        tokenizer = load_tokenizer(config.model.path)
        texts = (text_samples(passages.read_shard(shard), tokenizer) for shard in passages.shards())
        return Groups(texts, iter(()), iter(()), *always)
    if config.update.previous_run is None:
        answers = Stage(config.run_dir, "filter")
        return Groups(map(answers.read_shard, answers.shards()), iter(()), iter(()), *always)
    previous = PreviousRun(config.update.previous_run)
    new = (new for new, _ in _split(config, previous))
    old = (old for _, old in _split(config, previous))  # read again: one group is copied first
    removed = _removed_answers(config) if config.update.forget_removed else iter(())
    return Groups(new, removed, old, *always)


def _split(config: Config, previous: PreviousRun) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield the answers of every unit: the new ones, and those that the previous run's adapter was trained on."""
    answers, passages = Stage(config.run_dir, "filter"), Stage(config.run_dir, "chunk")
    for unit in answers.units():
        yield previous.split(answers.read_unit(unit.name), passages.read_shard(f"{unit.name}.parquet").to_pylist())


def _removed_answers(config: Config) -> Iterator[pa.Table]:
    """Yield the base model's answers to questions about removed passages.

    Not to those that another passage still answers, nor to those that evaluation asks.
    """
    asked = [*Stage(config.run_dir, "question").texts(), *hold_out(config).texts]
    near = NearQuestions(asked, config.evaluate.near_duplicate_threshold)
    forgotten = Stage(config.run_dir, FORGOTTEN)
    questions = Stage(str(config.update.previous_run), "question")
    for unit in forgotten.units():
        rows, texts = forgotten.read_unit(unit.name), questions.read_unit(unit.name)
        near_ids = {row["question_id"] for row in texts.to_pylist() if near.holds(row["text"])}
        keep = [question_id not in near_ids for question_id in rows["question_id"].to_pylist()]
        yield rows.filter(pa.array(keep, pa.bool_()))


def _general_answers(config: Config) -> Iterator[pa.Table]:
    """Yield the general answers but for those to prompts that forgetting is measured with."""
    general = Stage(config.run_dir, "general")
    units = {unit.name for unit in general.units()}
    held_out = general.read_unit(HELD_OUT, ["prompt_ids"])["prompt_ids"].to_pylist() if HELD_OUT in units else []
    for name in sorted(units - {HELD_OUT}):
        rows = general.read_unit(name)
        yield rows.filter(pa.array([prompt not in held_out for prompt in rows["prompt_ids"].to_pylist()], pa.bool_()))


def _reading_answers(config: Config) -> Iterator[pa.Table]:
    """Yield the answers that must be read, to questions that are trained on without passages, too."""
    reading, kept = Stage(config.run_dir, READING), Stage(config.run_dir, "filter")
    for unit in reading.units():
        trained = kept.read_unit(unit.name, ["question_id"])["question_id"].combine_chunks()
        yield reading.read_unit(unit.name).filter(pc.field("question_id").isin(trained))


def text_samples(passages: pa.Table, tokenizer: Any) -> pa.Table:
    """Make every passage an ANSWER row without top-k: its first token is the prompt, the others are to be learnt."""
    rows = []
    for passage in passages.to_pylist():
        text = titled(passage["text"], passage["heading"])
        ids = tokenizer(text)["input_ids"]
        rows.append(
            {"prompt_ids": ids[:1], "answer_ids": ids[1:], "topk_ids": [], "topk_logprobs": [], "text": text}
            | dict.fromkeys(("answer_id", "question_id", "passage_id"), passage["passage_id"])
            | {"finish_reason": "length"}
        )
    return pa.Table.from_pylist([row for row in rows if row["answer_ids"]], ANSWER)
