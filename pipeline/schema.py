"""The records that cross a border between stages, and their Arrow schemas.

In: nothing. Out: one frozen dataclass and one `pa.Schema` per border; imports pyarrow only.
Rows stay in `pa.Table`s built with these schemas on their way through Ray: dict rows would come back as int64 and
double. Arrow does not enforce `nullable=False`, so `pipeline.store` checks every table that it writes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa

REASONS = Literal[
    # read
    "empty",
    "unreadable",
    "not_utf8",
    "binary",
    "encrypted",
    "broken",
    "no_pages",
    "too_large",
    "unsupported_type",
    "symlink_loop",
    "no_text_field",
    "duplicate",
    "near_duplicate",
    # question and general; too_long of answer and reading, too
    "unparsable",
    "not_standalone",
    "off_passage",
    "duplicate_question",
    "over_quota",
    "too_long",
    # filter; it and general find what is empty, too
    "unfinished",
    "leak_phrase",
    "invented_number",
    "echoes_question",
    "duplicate_answer",
    "nothing_to_learn",
    "held_out",
    "near_evaluation",
]


def digest(*parts: object) -> str:
    """Return 128 bits of SHA-256 over the length-prefixed parts, as 32 hex digits."""
    sha = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        sha.update(len(data).to_bytes(8, "big"))
        sha.update(data)
    return sha.hexdigest()[:32]


def seed_of(*parts: object) -> int:
    """Return a seed, 32 bits, that depends on all parts."""
    return int(digest(*parts)[:8], 16)


@dataclass(frozen=True, slots=True)
class Document:
    """Written by read, read by chunk. `text` is plain text or Markdown (HTML and DOCX become Markdown)."""

    doc_id: str
    source: str  # URI of the file, with "#row" behind it for a row of a JSONL or Parquet file
    title: str
    text: str


DOCUMENT = pa.schema([("doc_id", pa.string()), ("source", pa.string()), ("title", pa.string()), ("text", pa.string())])


@dataclass(frozen=True, slots=True)
class Passage:
    """Written by chunk, read by question and answer. `text` is `document.text[start:end]`, in characters."""

    passage_id: str
    doc_id: str
    heading: str  # title and headings above the passage, joined by " > "
    start: int
    end: int
    text: str


PASSAGE = pa.schema(
    [
        ("passage_id", pa.string()),
        ("doc_id", pa.string()),
        ("heading", pa.string()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Question:
    """Written by question, read by answer."""

    question_id: str
    passage_id: str
    kind: str
    text: str


QUESTION = pa.schema(
    [
        ("question_id", pa.string()),
        ("passage_id", pa.string()),
        ("kind", pa.string()),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Answer:
    """Written by answer, read by filter and batch. Built as Arrow arrays only, never one Python object per token.

    `topk_ids` and `topk_logprobs` are flat, answer tokens times k, most likely first; values fall along k. The mass
    that the k leave out is the tail: computed where it is needed, not stored.
    """

    answer_id: str
    question_id: str
    passage_id: str
    text: str
    finish_reason: str  # "stop": the last of `answer_ids` is the end-of-turn token; "length": cut off
    prompt_ids: list[int]  # the student's prompt, without the passage
    answer_ids: list[int]
    topk_ids: list[int]
    topk_logprobs: list[float]  # natural log, temperature 1


ANSWER = pa.schema(
    [
        ("answer_id", pa.string()),
        ("question_id", pa.string()),
        ("passage_id", pa.string()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
        ("topk_ids", pa.list_(pa.int32())),
        ("topk_logprobs", pa.list_(pa.float16())),
    ]
)


@dataclass(frozen=True, slots=True)
class Rejected:
    """Written by any stage, read by people. `record_id` is the id or the source of what was rejected."""

    stage: str
    record_id: str
    reason: REASONS
    detail: str


REJECTED = pa.schema(
    [("stage", pa.string()), ("record_id", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)


# What the rows of a stage are; those that are not here have none.
ROWS = {
    "read": DOCUMENT,
    "dedup": DOCUMENT,
    "chunk": PASSAGE,
    "question": QUESTION,
    "answer": ANSWER,
    "filter": ANSWER,
    "general": ANSWER,
    "reading": ANSWER,
    "forgotten": ANSWER,
}


@dataclass(frozen=True, slots=True)
class Probe:
    """A training question and the adapter's greedy answer under PEFT; an engine that loads the adapter must agree."""

    question: str
    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """Written by publish as `manifest.json` inside the adapter version, read by serve."""

    name: str
    version: str  # digest of base model, adapter and passages
    base_model: str
    base_revision: str  # digest of the base model's config and weight files
    tokenizer_digest: str
    chat_template_digest: str
    rank: int
    target_modules: list[str]
    run_id: str
    data_digest: str
    scores: dict[str, dict[str, float]]
    metric: str  # the score that says most: substring_match of questions with accepted answers, else token_f1
    created: str  # ISO 8601, UTC
    probe: Probe | None
    forced: dict[str, Any]  # who last published it past the gate, why, and past what; empty if nobody did
    files: dict[str, str]  # path below the version's folder -> SHA-256


Record = Document | Passage | Question | Rejected


def to_table(records: Sequence[Record], schema: pa.Schema) -> pa.Table:
    """Build a table with exactly this schema from records of its dataclass; an empty list gives an empty table."""
    return pa.Table.from_pylist([asdict(record) for record in records], schema=schema)
