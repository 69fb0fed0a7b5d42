"""Complete stages -> the samples of a training, in groups that share an epoch.

In: the config. Out: tables of ANSWER rows: what the corpus teaches that is new, questions about removed passages, what
it taught a previous run already, answers to find in retrieved passages, and general answers. A shard at a time is in
memory, and for the retrieved ones an index of all passages.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.config import Config
from pipeline.engine import load_tokenizer, render_chat
from pipeline.general import FORGOTTEN, HELD_OUT
from pipeline.held_out import NearQuestions, hold_out
from pipeline.previous import PreviousRun
from pipeline.prompts import retrieval_chat, titled
from pipeline.schema import ANSWER, PASSAGE, QUESTION
from pipeline.store import Stage


class Groups(NamedTuple):
    """The five groups; `new` and `removed` make up an epoch, the others have a share of it."""

    new: Iterator[pa.Table]
    removed: Iterator[pa.Table]
    old: Iterator[pa.Table]
    retrieval: Iterator[pa.Table]
    general: Iterator[pa.Table]


def training_tables(config: Config) -> Groups:
    """Return what is to be trained on; the iterators must be read one after the other."""
    general = _general_answers(config)
    if config.train.teacher == "raw_text":
        passages = Stage(config.run_dir, "chunk", PASSAGE)
        tokenizer = load_tokenizer(config.model.path)
        texts = (text_samples(passages.read_shard(shard), tokenizer) for shard in passages.shards())
        return Groups(texts, iter(()), iter(()), iter(()), general)
    retrieval = _retrieval_answers(config)
    if config.update.previous_run is None:
        answers = Stage(config.run_dir, "filter", ANSWER)
        return Groups(map(answers.read_shard, answers.shards()), iter(()), iter(()), retrieval, general)
    previous = PreviousRun(config.update.previous_run)
    new = (new for new, _ in _split(config, "filter", ANSWER, previous))
    old = (old for _, old in _split(config, "filter", ANSWER, previous))  # read again: one group is copied first
    removed = _removed_answers(config, previous) if config.update.forget_removed else iter(())
    return Groups(new, removed, old, retrieval, general)


def _split(config: Config, name: str, schema: pa.Schema, previous: PreviousRun) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield the rows of every unit: those about new questions, and those about questions of the previous run."""
    stage, passages = Stage(config.run_dir, name, schema), Stage(config.run_dir, "chunk", PASSAGE)
    for unit in stage.units():
        yield previous.split(stage.read_unit(unit.name), passages.read_shard(f"{unit.name}.parquet").to_pylist())


def _removed_answers(config: Config, previous: PreviousRun) -> Iterator[pa.Table]:
    """Yield the base model's answers to questions about removed passages.

    Not to those that a new passage still answers, where only its wording changed, nor to those that evaluation asks.
    """
    asked = [text for new, _ in _split(config, "question", QUESTION, previous) for text in new["text"].to_pylist()]
    held_out = hold_out(config)
    near = NearQuestions(held_out._replace(texts=[*asked, *held_out.texts]))
    forgotten = Stage(config.run_dir, FORGOTTEN, ANSWER)
    questions = Stage(str(config.update.previous_run), "question", QUESTION)
    for unit in forgotten.units():
        rows, texts = forgotten.read_unit(unit.name), questions.read_unit(unit.name)
        near_ids = {row["question_id"] for row in texts.to_pylist() if near.holds(row["text"])}
        keep = [question_id not in near_ids for question_id in rows["question_id"].to_pylist()]
        yield rows.filter(pa.array(keep, pa.bool_()))


def _retrieval_answers(config: Config) -> Iterator[pa.Table]:
    """Yield answers with retrieved passages in their prompts, evenly spaced among all, about as many as are taken."""
    share = config.train.retrieval_share
    if not share:
        return
    from pipeline.retrieve import PassageIndex, passages_of

    every = max(1, int(1 / (share * config.train.epochs)))
    answers, questions = Stage(config.run_dir, "filter", ANSWER), Stage(config.run_dir, "question", QUESTION)
    index, tokenizer = PassageIndex.build(passages_of(config.run_dir)), load_tokenizer(config.model.path)
    column = ANSWER.get_field_index("prompt_ids")
    for unit in answers.units():
        rows = answers.read_unit(unit.name)
        rows = rows.take(pa.array(range(0, rows.num_rows, every), pa.int64()))
        texts = {row["question_id"]: row["text"] for row in questions.read_unit(unit.name).to_pylist()}
        prompts = []
        for question_id, answer_ids in zip(rows["question_id"].to_pylist(), rows["answer_ids"], strict=True):
            hits = index.search(texts[question_id], config.serve.retrieval_passages)
            room = config.model.max_model_len - len(answer_ids)
            chat = retrieval_chat(
                [(hit.passage["heading"], hit.passage["text"]) for hit in hits],
                texts[question_id],
                lambda chat, room=room: len(render_chat(tokenizer, chat)) <= room,
            )
            prompts.append(render_chat(tokenizer, chat))
        yield rows.set_column(column, ANSWER.field(column), [pa.array(prompts, ANSWER.field(column).type)])


def _general_answers(config: Config) -> Iterator[pa.Table]:
    general = Stage(config.run_dir, "general", ANSWER)
    for unit in general.units():
        if unit.name != HELD_OUT:
            yield from map(general.read_shard, unit.shards)


def text_samples(passages: pa.Table, tokenizer: Any) -> pa.Table:
    """Make every passage an ANSWER row without top-k: its first token is the prompt, the others are to be learnt."""
    rows = []
    for passage in passages.to_pylist():
        text = titled(passage["text"], passage["heading"])
        first, *others = tokenizer(text)["input_ids"]
        rows.append(
            {"prompt_ids": [first], "answer_ids": others, "topk_ids": [], "topk_logprobs": [], "text": text}
            | dict.fromkeys(("answer_id", "question_id", "passage_id"), passage["passage_id"])
            | {"finish_reason": "length"}
        )
    return pa.Table.from_pylist([row for row in rows if row["answer_ids"]], ANSWER)
