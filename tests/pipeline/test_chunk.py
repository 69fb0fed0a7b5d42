"""Chunking: passages cover the text, keep to the limit, spare words, and carry their headings."""

import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from pipeline.chunk import MAX_WORD_CHARS, Splitter, chunk_documents, find_headings, split_document
from pipeline.schema import Document, Passage, digest
from pipeline.stage import only
from pipeline.store import Stage
from tests.conftest import make_config, rows, write_documents

WORDS = ["the", "quick", "brown", "fox", "don't", "jump", "over", "foo-bar", "3.14", "lazy", "dogs,"]
WORDS += ["however.", "It", "**was**", "`x`"]
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
ODD_TEXTS = {
    "one letter": "a",
    "only space": " \n\n \t ",
    "no newline": " ".join(WORDS * 300),
    "lines": "\n".join(WORDS * 300),
    "table": "| a | b |\n|---|---|\n" + "| some cell | 12 |\n" * 800,
    "chinese": "我们在这里学习。" * 500,
    "chinese without marks": "我们在这里学习" * 500,
    "emoji": FAMILY * 1000,
    "arabic": "هذا نص طويل من اليمين إلى اليسار. " * 300,
    "one long word": "x" * 20_000,
    "blank gap": "start" + " \n" * 5000 + "end",
    "headings only": "# a\n" * 1000,
    "code": "```\n" + "    value = call(1)\n" * 800 + "```\n",
    "open fence": "```\n" + "word " * 3000,
}


@pytest.fixture(scope="session")
def splitter(tokenizer_dir: str) -> Splitter:
    return Splitter(tokenizer_dir, 64)


def split(splitter: Splitter, text: str, title: str = "", before: Sequence[Passage] = ()) -> list[Passage]:
    rows = [asdict(passage) for passage in before]
    return list(split_document(Document("doc", "source", title, text), splitter, rows))


def assert_sound(passages: list[Passage], text: str, tokenizer_dir: str, max_tokens: int) -> None:
    """Check what holds for every document: cover, spans, limit, and words that stay whole."""
    tokenizer = Tokenizer.from_file(f"{tokenizer_dir}/tokenizer.json")
    assert "".join(passage.text for passage in passages) == text
    assert all(passage.text == text[passage.start : passage.end] for passage in passages)
    assert len({passage.passage_id for passage in passages}) == len(passages)
    for passage in passages:
        assert passage.text
        assert len(tokenizer.encode(passage.text, add_special_tokens=False)) <= max_tokens
    for passage in passages[:-1]:
        if re.match(r"[a-z\u0600-\u06ff]{2}", text[passage.end - 1 :]):
            left, right = re.search(r"\S*\Z", passage.text), re.match(r"\S*", text[passage.end :])
            assert left and right and len(left[0] + right[0]) > MAX_WORD_CHARS


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_texts(splitter: Splitter, tokenizer_dir: str, name: str) -> None:
    text = ODD_TEXTS[name]
    passages = split(splitter, text)
    assert_sound(passages, text, tokenizer_dir, 64)
    if name == "emoji":
        assert all(passage.text.startswith(FAMILY[0]) for passage in passages)
    if len(text) > 3000 and name != "blank gap":
        tokens = Tokenizer.from_file(f"{tokenizer_dir}/tokenizer.json").encode(text)
        assert len(passages) < 2 * len(tokens) / 64


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("max_tokens", [16, 64, 256])
def test_random_markdown(tokenizer_dir: str, seed: int, max_tokens: int) -> None:
    generator = random.Random(seed)
    pieces = [
        *WORDS,
        "\n",
        "\n\n",
        "\n# One\n\n",
        "\n## Two\n",
        "\n- item",
        "\n> quote",
        "| cell |",
        "\n---\n",
    ]
    pieces += ["snake_case", "un**believ**able", "[a link](http://a.b/c-d)", "\n\t", "中文。"]
    text = " ".join(generator.choices(pieces, k=generator.randrange(1, 2500)))
    passages = split(Splitter(tokenizer_dir, max_tokens), text)
    assert_sound(passages, text, tokenizer_dir, max_tokens)


PLAIN = " ".join(f"Sentence {number} is about mill {number * 7} and its wheel." for number in range(300))


@pytest.mark.parametrize("place", [0, 1000, len(PLAIN)])
@pytest.mark.parametrize("new", ["One more sentence has come in and is long enough for a passage. ", "Short. "])
def test_a_change_moves_no_cut_behind_it(splitter: Splitter, tokenizer_dir: str, place: int, new: str) -> None:
    before = split(splitter, PLAIN)
    place = PLAIN.rfind(" ", 0, place) + 1 if place < len(PLAIN) else place
    text = f"{PLAIN[:place]} {new}{PLAIN[place:]}"
    after = split(splitter, text, before=before)
    assert_sound(after, text, tokenizer_dir, 64)
    assert len({passage.text for passage in before} - {passage.text for passage in after}) <= 2
    assert len(after) <= len(before) + 2


def test_a_passage_that_moves_leaves_the_others(splitter: Splitter, tokenizer_dir: str) -> None:
    before = split(splitter, PLAIN)
    text = "".join(passage.text for passage in [*before[:2], *before[4:], *before[2:4]])
    after = split(splitter, text, before=before)
    assert_sound(after, text, tokenizer_dir, 64)
    assert len({passage.text for passage in before} & {passage.text for passage in after}) >= len(before) - 3


def test_a_text_that_grows_is_not_cut_into_sentences(splitter: Splitter) -> None:
    text, passages = "", []
    for sentence in PLAIN.split(". ")[:60]:
        text += f"{sentence}. "
        passages = split(splitter, text, before=passages)
    assert len(passages) <= len(split(splitter, text)) + 2


def test_a_new_heading_stands_above_what_follows(splitter: Splitter) -> None:
    before = split(splitter, PLAIN)
    place = before[5].start
    text = f"{PLAIN[:place]}\n\n## Returns\n\n{PLAIN[place:]}"
    (passage,) = [passage for passage in split(splitter, text, before=before) if "## Returns" in passage.text]
    assert passage.text.strip().startswith("## Returns") and passage.heading == "Returns"


@pytest.mark.parametrize("seed", range(20))
def test_any_edit_leaves_sound_passages(splitter: Splitter, tokenizer_dir: str, seed: int) -> None:
    generator = random.Random(seed)
    pieces = [*WORDS, "word.\n\n", "\n## Part\n\n", "中文。", "\n- item\n"]
    before = [" ".join(generator.choices(pieces, k=generator.randrange(1, 200))) for _ in range(8)]
    after = [part for part in before if generator.random() < 0.7]
    after = generator.sample(after, len(after)) if seed % 2 else after
    after.insert(generator.randrange(len(after) + 1), generator.choice(["", "in", " and ", PLAIN[:2000]]))
    text = generator.choice(["", " "]).join(after)
    assert_sound(split(splitter, text, before=split(splitter, "".join(before))), text, tokenizer_dir, 64)


def test_words_stay_whole(splitter: Splitter) -> None:
    text = " ".join(["un**believ**able", "don't", "AT&T", "foo-bar", "a@b.org", "wasn\u2019t"] * 300)
    for passage in split(splitter, text)[:-1]:
        assert re.search(r"\s\Z", passage.text) or text[passage.end].isspace()


def test_headings_are_found() -> None:
    text = (
        "---\nid: x\n---\nIntro\n\n# A *big* `one`\n\ntext\n\n## B\n\n```\n# not\n```\n\n"
        "> # nor this\n\nC\n===\n\nlong\nparagraph\n---\n\n### D [x](y)\n"
    )
    found = find_headings(text)
    assert [heading.path for heading in found] == [
        ["A big one"],
        ["A big one", "B"],
        ["C"],
        ["C", "D x"],
    ]
    assert [text[heading.start] for heading in found] == ["#", "#", "C", "#"]


def test_passages_carry_their_headings(splitter: Splitter) -> None:
    body = "plain words of the body " * 10
    text = f"{body}\n\n# Work\n\n{body}\n\n## Leave\n\n{body}\n\n# Pay\n\n{body}\n"
    passages = split(splitter, text, "Handbook")
    headings = list(dict.fromkeys(passage.heading for passage in passages))
    assert headings == ["Handbook", "Handbook > Work", "Handbook > Work > Leave", "Handbook > Pay"]
    assert split(splitter, "# Handbook\n\nwords", "Handbook")[0].heading == "Handbook"
    assert split(splitter, "words")[0].heading == ""


def test_small_sections_share_a_passage(splitter: Splitter) -> None:
    text = "".join(f"## Part {number}\n\nA few words stand here.\n\n" for number in range(40))
    passages = split(splitter, text)
    assert len(passages) < 20
    assert all(passage.text.startswith("## Part") for passage in passages)


def test_a_lone_heading_joins_its_section(tokenizer_dir: str) -> None:
    body = "plain words of the body. " * 100
    text = f"# Title\n\n## Part\n\n{body}\n\n## Next\n\n{body}"
    passages = split(Splitter(tokenizer_dir, 256), text)
    assert not any(re.fullmatch(r"(#+ \w+\s*)+", passage.text) for passage in passages)


def test_time_grows_with_length(splitter: Splitter) -> None:
    text = " ".join(WORDS)
    seconds = []
    for size in (50_000, 400_000):
        started = time.process_time()
        split(splitter, (text * (size // len(text) + 1))[:size])
        seconds.append(time.process_time() - started)
    assert seconds[1] < 16 * seconds[0]


def test_chunk_stage(local_ray: None, run_dir: str, tmp_path: Path, tokenizer_dir: str) -> None:
    def chunk(max_tokens: int = 64, model: str = tokenizer_dir) -> dict[str, Any]:
        settings = {"max_tokens": max_tokens, "shard_passages": 8}
        return only(chunk_documents([make_config(run_dir, chunk=settings, model={"path": model})]))

    with pytest.raises(ValueError, match=r"dedup in .* is not complete"):
        chunk()
    documents = [
        Document(str(number), "source", "", f"# Doc {number}\n\n" + "words here. " * 400) for number in range(5)
    ]
    write_documents(run_dir, "dedup", [documents[:3], documents[3:]])
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        chunk(model=str(tmp_path))
    manifest = chunk()

    stage = Stage(run_dir, "chunk")
    assert manifest["rows_in"] == 5
    for unit in stage.units():
        sizes = [stage.read_shard(shard).num_rows for shard in unit.shards]
        assert sizes[:-1] == [8] * (len(sizes) - 1) and 0 < sizes[-1] <= 8
    passages = rows(stage)
    assert manifest["rows_out"] == len(passages) == len({row["passage_id"] for row in passages})
    assert {row["heading"] for row in passages} == {f"Doc {number}" for number in range(5)}
    assert chunk() == manifest
    with pytest.raises(ValueError, match="max_tokens"):
        chunk(32)
    write_documents(run_dir, "dedup", [documents[:1]])
    with pytest.raises(ValueError, match="input was"):
        chunk()


def test_a_file_that_changed_keeps_the_passages_that_it_still_has(
    local_ray: None, run_dir: str, tmp_path: Path, tokenizer_dir: str
) -> None:
    def chunk(run_dir: str, text: str, **update: str) -> list[str]:
        write_documents(run_dir, "dedup", [[Document(digest(text), "plain.txt", "", text)]])
        sections = {"chunk": {"max_tokens": 64}, "model": {"path": tokenizer_dir}, "update": update}
        only(chunk_documents([make_config(run_dir, **sections)]))
        return [row["text"] for row in rows(Stage(run_dir, "chunk"))]

    before = chunk(run_dir, PLAIN)
    changed = f"A preface was written for the mill, and tells of its wheel. {PLAIN}"
    after = chunk(str(tmp_path / "after"), changed, previous_run=run_dir)
    assert after[-len(before) + 2 :] == before[2:]
    anew = chunk(str(tmp_path / "anew"), changed)
    assert len(set(before) & set(anew)) < len(before) / 2, "without it most passages would be others"
