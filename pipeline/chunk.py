"""Documents -> Passages: as long as the token limit allows, cut where the Markdown says.

In: the stage `dedup`. Out: the stage `chunk`. The passages of a document are its text, cut: joined they give
it back, so whitespace is not trimmed. Text without Markdown goes the same way, and is cut at paragraphs,
sentences and words. A word is cut only if it alone is longer than the limit. What a previous run cut out of the
same file stays a passage where it still stands, so that a change does not move the cuts behind it.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from markdown_it import MarkdownIt
from semantic_text_splitter import MarkdownSplitter
from tokenizers import Tokenizer

from pipeline.config import Chunk, Config
from pipeline.previous import PassagesBySource
from pipeline.schema import PASSAGE, Document, Passage, digest, to_table
from pipeline.stage import Actors, Job, run_alike
from pipeline.store import Stage, Unit
from pipeline.text import UNSPACED

WINDOW = 40  # characters, times max_tokens, split at once; the splitter's time is not linear
SPARE = 8  # this part of max_tokens is left free by the splitter, for joining and shifting
TINY_LETTERS = 40  # about eight words: no ground for a question
MAX_HEADING_CHARS = 200  # more is a paragraph that happens to stand above a line of dashes
MAX_WORD_CHARS = 64
MOVED = 1 << 18  # characters by which a passage of an earlier version may have moved

BLOCKS = MarkdownIt("commonmark").disable("inline")
INLINE = MarkdownIt("commonmark")
MAYBE_HEADING = re.compile(r"^ {0,3}[#=-]", re.MULTILINE)
INSIDE_WORD = re.compile(rf"[^\s{UNSPACED}]{{2}}")


class Heading(NamedTuple):
    start: int  # of its line, in characters
    path: list[str]  # the headings above it, then its own text


def find_headings(text: str) -> list[Heading]:
    """Return the Markdown headings that stand outside of lists, quotes and code, in order."""
    if not MAYBE_HEADING.search(text):
        return []
    line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
    headings: list[Heading] = []
    above: list[tuple[int, str]] = []
    for token, inline in pairwise(BLOCKS.parse(text)):
        if token.type != "heading_open" or token.level or not token.map:
            continue
        start = line_starts[token.map[0]]
        # The last line of front matter stands above dashes and looks like a heading.
        is_front_matter = token.markup == "-" and start == 4 and text.startswith("---\n")
        if "\n" in inline.content or len(inline.content) > MAX_HEADING_CHARS or is_front_matter:
            continue
        parts = INLINE.parseInline(inline.content)[0].children or []
        name = "".join(part.content for part in parts if part.type != "html_inline").strip()
        level = int(token.tag[1:])
        above = [*(pair for pair in above if pair[0] < level), (level, name)]
        headings.append(Heading(start, [name for _, name in above if name]))
    return headings


class Splitter:
    """Finds where to cut a text into passages of at most `max_tokens` tokens."""

    def __init__(self, tokenizer_path: str, max_tokens: int) -> None:
        self._tokenizer = Tokenizer.from_file(f"{tokenizer_path}/tokenizer.json")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._max_tokens = max_tokens
        self._splitter = MarkdownSplitter.from_huggingface_tokenizer(
            self._tokenizer, max_tokens - max_tokens // SPARE, trim=False
        )

    def fits(self, text: str) -> bool:
        return len(self._tokenizer.encode(text, add_special_tokens=False)) <= self._max_tokens

    def find_cuts(self, text: str, headings: list[Heading]) -> list[int]:
        """Return the ends of the passages; tiny ones are joined to a neighbour where they fit."""
        section_starts = {heading.start for heading in headings}
        cuts = [0]
        for end in self._find_rough_cuts(text):
            cut = self._shift_out_of_word(text, cuts, end)
            if len(cuts) > 1:
                previous, piece = text[cuts[-2] : cut], text[cut:end]
                opens_section = cut in section_starts and end < len(text)
                is_joined = _is_tiny(previous) or (_is_tiny(piece) and not opens_section)
                if is_joined and self.fits(previous + piece):
                    cuts.pop()
                else:
                    cuts[-1] = cut
            cuts.append(end)
        return cuts[1:]

    def _find_rough_cuts(self, text: str) -> Iterator[int]:
        size = WINDOW * self._max_tokens
        start = 0
        while start < len(text):
            pieces = self._splitter.chunks(text[start : start + size])
            # The window, not the text, ends the last piece; so the next window begins with it.
            if start + size < len(text) and len(pieces) > 1:
                pieces.pop()
            for piece in pieces:
                start += len(piece)
                yield start

    def _shift_out_of_word(self, text: str, cuts: list[int], end: int) -> int:
        """Return the last of `cuts`, moved to the nearest space where both sides still fit."""
        cut = cuts[-1]
        if len(cuts) > 1 and _is_inside_word(text, cut):
            first, last = max(cuts[-2], cut - MAX_WORD_CHARS), min(end, cut + MAX_WORD_CHARS)
            before = re.search(r"\s(?=\S*\Z)", text[first:cut])
            if before and self.fits(text[first + before.end() : end]):
                return first + before.end()
            after = re.search(r"\s", text[cut:last])
            if after and cut + after.end() < end and self.fits(text[cuts[-2] : cut + after.end()]):
                return cut + after.end()
        return cut


def _is_tiny(text: str) -> bool:
    return next(islice(re.finditer(r"\w", text), TINY_LETTERS - 1, None), None) is None


def find_cuts_again(
    text: str, headings: list[Heading], splitter: Splitter, before: Sequence[dict[str, Any]]
) -> list[int]:
    """Like `Splitter.find_cuts`, but passages of an earlier version that stand in the text stay passages.

    `before` has their `start` and `text`. What lies between two of them is cut as a text of its own; if that is too
    little for a passage, a neighbour is cut anew with it.
    """
    starts = [heading.start for heading in headings]
    kept: list[tuple[int, int]] = []
    for start, end in _longest_chain(_find_again(text, before)):
        behind = kept[-1][1] if kept else 0
        if start > behind and _is_tiny(text[behind:start]):
            opens_section = bisect_left(starts, behind) < bisect_left(starts, start)
            if not kept or opens_section:
                continue
            kept.pop()
        kept.append((start, end))
    if kept and kept[-1][1] < len(text) and _is_tiny(text[kept[-1][1] :]):
        kept.pop()
    cuts, behind = [], 0
    for start, end in [*kept, (len(text), len(text))]:
        between = headings[bisect_left(starts, behind) : bisect_left(starts, start)]
        between = [heading._replace(start=heading.start - behind) for heading in between]
        cuts += [behind + cut for cut in splitter.find_cuts(text[behind:start], between)]
        cuts += [end] if end > start else []
        behind = end
    return cuts


def _find_again(text: str, before: Sequence[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    """Yield where passages still stand, or stand now if they moved less than MOVED characters."""
    for number, passage in enumerate(before, 1):
        place, length = passage["start"], len(passage["text"])
        start = text.find(passage["text"], max(0, place - MOVED), place + length + MOVED)
        end = start + length
        # The last one ended with the text; with more behind it, it is no longer as long as it may be.
        is_whole = number < len(before) or end == len(text)
        if start >= 0 and is_whole and not (_is_inside_word(text, start) or _is_inside_word(text, end)):
            yield start, end


def _longest_chain(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return as many of the spans as can be had, in their order, so that none begins before the last one ended.

    A longest increasing subsequence (Fredman 1975).
    """
    ends: list[int] = []  # of the chain of each length that ends first
    chains: list[Any] = []  # these chains, as pairs of the rest and the last span
    for start, end in spans:
        length = bisect_right(ends, start)
        chain = (chains[length - 1] if length else None, (start, end))
        if length == len(ends):
            ends.append(end)
            chains.append(chain)
        elif end < ends[length]:
            ends[length], chains[length] = end, chain
    chosen, rest = [], chains[-1] if chains else None
    while rest:
        rest, span = rest
        chosen.append(span)
    return chosen[::-1]


def _is_inside_word(text: str, place: int) -> bool:
    return place > 0 and INSIDE_WORD.match(text, place - 1) is not None


def split_document(document: Document, splitter: Splitter, before: Sequence[dict[str, Any]] = ()) -> Iterator[Passage]:
    """Yield the passages; the heading is the one in force at the first visible character.

    `before` are the passages of an earlier version of the document, if there is one.
    """
    headings = find_headings(document.text)
    start = 0
    for end in find_cuts_again(document.text, headings, splitter, before):
        text = document.text[start:end]
        visible = start + len(text) - len(text.lstrip())
        index = bisect_right(headings, visible, key=lambda heading: heading.start) - 1
        path = headings[index].path if index >= 0 else []
        if document.title and path[:1] != [document.title]:
            path = [document.title, *path]
        heading = " > ".join(path)
        passage_id = digest(document.doc_id, start, end, heading)
        yield Passage(passage_id, document.doc_id, heading, start, end, text)
        start = end


class ChunkWorker:
    """Splits the documents of one shard of `dedup`."""

    def __init__(self, run_dir: str, config: Chunk, tokenizer_path: str, previous_run: str | None) -> None:
        self._input = Stage(run_dir, "dedup")
        self._stage = Stage(run_dir, "chunk")
        self._splitter = Splitter(tokenizer_path, config.max_tokens)
        self._shard_passages = config.shard_passages
        self._before = PassagesBySource(previous_run) if previous_run else None

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        documents = self._input.read_shard(unit["shard"])
        return self._stage.commit(unit["name"], self._split(documents), [], documents.num_rows)

    def _split(self, documents: pa.Table) -> Iterator[pa.Table]:
        rows = (Document(**row) for row in documents.to_pylist())
        before = self._before
        passages = (
            passage
            for row in rows
            for passage in split_document(row, self._splitter, before.find(row.source, row.doc_id) if before else ())
        )
        while shard := list(islice(passages, self._shard_passages)):
            yield to_table(shard, PASSAGE)


def chunk_documents(configs: list[Config], redo: bool = False) -> list[Any]:
    """Run the stage `chunk` of several corpora; return for each its manifest, or the ValueError."""
    return run_alike([partial(chunk_job, config) for config in configs], Actors(configs[0].cluster), redo)


def chunk_job(config: Config) -> Job:
    """Describe the stage; it needs the complete stage `dedup`, and the tokenizer of the base model."""
    documents = Stage(config.run_dir, "dedup")
    tokenizer = digest(Path(config.model.path, "tokenizer.json").read_bytes())
    settings: dict[str, Any] = config.chunk.model_dump() | {"tokenizer": tokenizer}
    previous_run, before = config.update.previous_run, {}
    if previous_run is not None:
        manifest = Stage(previous_run, "chunk").require()
        # With another limit all is cut anew.
        if all(manifest["settings"][name] == settings[name] for name in ("max_tokens", "tokenizer")):
            before = {"previous": manifest["data_digest"]}
    return Job(
        Stage(config.run_dir, "chunk"),
        settings | {"input": documents.require()["data_digest"]} | before,
        ({"name": f"{number:06d}", "shard": shard} for number, shard in enumerate(documents.shards())),
        ChunkWorker,
        {
            "run_dir": config.run_dir,
            "config": config.chunk,
            "tokenizer_path": config.model.path,
            "previous_run": previous_run if before else None,
        },
        config.max_reject_share,
    )
