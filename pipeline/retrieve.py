"""Passages of a corpus -> a BM25 index; a question -> the passages that answer it best.

In: passages as text. Out: a folder of numpy and JSON files beside `passages.parquet`, and hits in order of their score.
bm25s does the scoring; English stop words and stems, which harm no other language. Where a script puts no spaces
between its words, pairs of letters stand for them, as in Lucene's CJK analysis.
For the evaluation also by embeddings, of any sentence-transformers model.
"""

import math
from collections.abc import Collection
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import bm25s
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import regex
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from pipeline.store import Stage
from pipeline.text import UNSPACED, normalise

PASSAGES = "passages.parquet"
SAME_TEXT = 0.4  # overlap, from which a text is said to be of another; half of one has 0.5, an unrelated one 0.1 to 0.4
STOPWORDS = frozenset(STOPWORDS_EN)
_UNSPACED_RUN = regex.compile(rf"[[{UNSPACED}]&&[\p{{L}}\p{{M}}\p{{N}}]]+", regex.V1)
_LETTER = regex.compile(r"\P{M}")  # vowel signs are not part of a word to bm25s


class Hit(NamedTuple):
    """A passage's row, and its BM25 score as a share of the idf of all the question's words, known or not: 0 to 1.

    So scores compare between questions, and between a corpus of two passages and one of a million.
    """

    passage: dict[str, Any]
    score: float


class PassageIndex:
    """BM25 over the heading and text of passages; `passages` has the columns heading and text, and any others."""

    def __init__(self, passages: pa.Table, bm25: bm25s.BM25) -> None:
        self._passages = passages
        self._bm25 = bm25

    @classmethod
    def build(cls, passages: pa.Table) -> "PassageIndex":
        bm25, words = bm25s.BM25(), _words(_texts(passages))
        bm25.index(words if any(words) else [[""]] * max(1, len(words)), show_progress=False)  # it needs some word
        return cls(passages, bm25)

    def save(self, folder: Path) -> None:
        self._bm25.save(folder, show_progress=False)
        pq.write_table(self._passages, folder / PASSAGES, compression="zstd")

    @classmethod
    def load(cls, folder: Path) -> "PassageIndex":
        """Load without pickle; the scores are mapped from the disk."""
        bm25 = bm25s.BM25.load(folder, mmap=True, allow_pickle=False, show_progress=False)
        return cls(pq.read_table(folder / PASSAGES), bm25)

    def search(self, question: str, k: int, among: tuple[str, Collection[str]] | None = None) -> list[Hit]:
        """Return the k best passages, best first; fewer if fewer share a word with the question.

        `among` is a column and the values that it may have.
        """
        (words,) = _words([question])
        if not words or not len(self._passages):
            return []
        mask = np.ones(len(self._passages), bool)
        if among is not None:
            options = pc.SetLookupOptions(pa.array(sorted(among[1]), pa.string()))
            mask = np.asarray(pc.call_function("is_in", [self._passages[among[0]]], options))
        found, scores = self._bm25.retrieve(
            [words], k=min(k, len(self._passages)), weight_mask=mask, show_progress=False
        )
        hits = [(int(row), float(score)) for row, score in zip(found[0], scores[0], strict=True) if score > 0]
        rows = self._passages.take(pa.array([row for row, _ in hits], pa.int64())).to_pylist()
        most = sum(self._idf(word) for word in words)
        return [Hit(row, score / most) for row, (_, score) in zip(rows, hits, strict=True)]

    def _idf(self, word: str) -> float:
        """Return the word's inverse document frequency as BM25 counts it (Lucene's form)."""
        token, starts = self._bm25.vocab_dict.get(word), self._bm25.scores["indptr"]
        passages = 0 if token is None else int(starts[token + 1] - starts[token])
        return math.log(1 + (len(self._passages) - passages + 0.5) / (passages + 0.5))


def nearest_passages(model: str, passages: pa.Table, questions: list[str], k: int) -> list[list[dict[str, Any]]]:
    """Return each question's k passages, nearest first, by the cosine of a sentence-transformers model's embeddings."""
    if not questions:
        return []
    from sentence_transformers import util

    encoder = _load_encoder(model)
    asked = encoder.encode_query(questions, convert_to_tensor=True, show_progress_bar=False)
    stored = encoder.encode_document(_texts(passages), convert_to_tensor=True, show_progress_bar=False)
    found = util.semantic_search(asked, stored, top_k=k)
    return [passages.take(pa.array([hit["corpus_id"] for hit in hits], pa.int64())).to_pylist() for hits in found]


def passages_of(run_dir: str) -> pa.Table:
    """Return all passages of a run with the source of their document: passage_id, source, heading, text."""
    documents, passages = Stage(run_dir, "dedup"), Stage(run_dir, "chunk")
    source_of = {
        doc_id: source
        for shard in documents.shards()
        for doc_id, source in zip(*documents.read_shard(shard, ["doc_id", "source"]).to_pydict().values(), strict=True)
    }
    columns = ["passage_id", "doc_id", "heading", "text"]
    tables = [passages.read_shard(shard, columns) for shard in passages.shards()]
    table = pa.concat_tables([pa.schema([(c, pa.string()) for c in columns]).empty_table(), *tables])
    sources = pa.array([source_of[doc_id] for doc_id in table["doc_id"].to_pylist()], pa.string())
    return table.set_column(1, "source", sources)


def overlap(text: str, other: str) -> float:
    """Return the share of the shorter text's words that the other one has, too (Szymkiewicz and Simpson's)."""
    words, others = telling_words(text), telling_words(other)
    return len(words & others) / max(1, min(len(words), len(others)))


@lru_cache(8)  # a text stands beside many others
def telling_words(text: str) -> frozenset[str]:
    """Return its words without stop words and, where a script puts no spaces, its pairs of letters."""
    return frozenset(normalise(_pair_letters(text)).split()) - STOPWORDS


@lru_cache(1)
def _load_encoder(model: str) -> Any:
    """Load a model once for all corpora of a job."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model, local_files_only=True)


def _texts(passages: pa.Table) -> list[str]:
    headings, texts = passages["heading"].to_pylist(), passages["text"].to_pylist()
    return [f"{heading}\n{text}" for heading, text in zip(headings, texts, strict=True)]


def _words(texts: list[str]) -> list[list[str]]:
    words: Any = bm25s.tokenize(
        [_pair_letters(text) for text in texts],
        stopwords="en",
        stemmer=Stemmer.Stemmer("english"),
        return_ids=False,
        show_progress=False,
    )
    return words


def _pair_letters(text: str) -> str:
    return _UNSPACED_RUN.sub(lambda run: f" {' '.join(map(''.join, pairwise(_LETTER.findall(run[0]))))} ", text)
