"""Passages for a question, from an adapter's own corpus; and the corpus that a question belongs to."""

import tempfile
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.publish import move_alias, write_version
from pipeline.retrieve import PassageIndex, nearest_passages
from pipeline.store import Folder
from serve.registry import Refused, Registry, Version
from serve.retrieval import Corpora
from tests.serve.test_registry import BASE

CORPORA = {
    "mills": ["The Kestrel Mill on the River Arden was built in 1874.", "Its wheel was carried off by a flood."],
    "lenses": ["The Orrin Lens is a telescope on Mount Sabel.", "Its mirror was polished in Tampere."],
}
CONFIG = {"r": 8, "peft_type": "LORA", "target_modules": ["q_proj"]}


def passages(texts: list[str]) -> pa.Table:
    numbers = [str(number) for number in range(len(texts))]
    return pa.table({"passage_id": numbers, "source": numbers, "heading": [""] * len(texts), "text": texts})


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    for number, (name, texts) in enumerate(CORPORA.items()):
        with tempfile.TemporaryDirectory() as folder:
            PassageIndex.build(passages(texts)).save(Path(folder))
            index = {f"retrieval/{file.name}": file.read_bytes() for file in Path(folder).iterdir()}
        contents = {"adapter_config.json": str(CONFIG).replace("'", '"').encode(), **index}
        adapters = Folder(str(tmp_path)) / name
        write_version(adapters, f"{number:016x}", BASE, contents, probe=None)
        move_alias(adapters, f"{number:016x}")
    return Registry(str(tmp_path))


def test_an_index_finds_its_passages(tmp_path: Path) -> None:
    texts = [text for corpus in CORPORA.values() for text in corpus]
    PassageIndex.build(passages(texts)).save(tmp_path)
    index = PassageIndex.load(tmp_path)
    hits = index.search("Where was the mirror of the lens polished?", k=2)
    assert [hit.passage["text"] for hit in hits] == [texts[3], texts[2]]
    assert hits[0].score > hits[1].score > 0
    assert index.search("zebra", k=2) == []
    assert index.search("the of and", k=2) == []


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("克斯特雷尔磨坊由罗莎·林奎斯特于1874年建造。", "谁建造了克斯特雷尔磨坊?"),
        ("ケストレル水車はアーデン川にあります。", "アーデン川には何がありますか"),
        ("โรงสีเคสเตรลสร้างขึ้นในปี 1874", "ใครสร้างโรงสีเคสเตรล"),
    ],
    ids=["Chinese", "Japanese", "Thai"],
)
def test_a_script_without_spaces_is_searched_by_pairs_of_letters(text: str, question: str) -> None:
    index = PassageIndex.build(passages(["奥林透镜是一台望远镜。", "กล้องโทรทรรศน์", text, *CORPORA["mills"]]))
    hit, *others = index.search(question, k=5)
    assert hit.passage["text"] == text
    assert all(other.score < hit.score / 2 for other in others)
    assert index.search("山", k=5) == []


def test_embeddings_find_passages(embedding_model: str) -> None:
    texts = [text for corpus in CORPORA.values() for text in corpus]
    asked = ["Was the Kestrel Mill on the River Arden built in 1874?", "Was its mirror polished in Tampere?"]
    found = nearest_passages(embedding_model, passages(texts), asked, k=3)
    assert [len(rows) for rows in found] == [3, 3]
    assert [rows[0]["text"] for rows in found] == [texts[0], texts[3]]
    assert nearest_passages(embedding_model, passages(texts), [], k=3) == []


def test_an_adapter_searches_its_own_corpus_only(registry: Registry) -> None:
    corpora = Corpora(registry, 1 << 30)
    mills = registry.resolve("mills")
    hits = corpora.search(mills, "Which river drove the mill, and who polished the mirror in Tampere?", k=20)
    assert {hit.passage["text"] for hit in hits} <= set(CORPORA["mills"])
    with pytest.raises(Refused) as refused:
        corpora.search(Version("mills", "f" * 16), "Who?", k=1)
    assert refused.value.status == 409


def test_a_question_finds_its_corpus(registry: Registry) -> None:
    corpora = Corpora(registry, 1 << 30)
    live = frozenset(map(registry.resolve, CORPORA))
    every = frozenset(CORPORA)

    def route(question: str, allowed: frozenset[str] = every) -> tuple[str, float] | None:
        found = corpora.route(question, live, allowed)
        return found and (found[0].name, found[1])

    mill, lens = route("When was the Kestrel Mill built?"), route("Where is the Orrin Lens?")
    assert mill and mill[0] == "mills"
    assert lens and lens[0] == "lenses"
    vague = route("What was built on the first floor of the library?")
    assert vague is None or vague[1] < mill[1] / 2
    assert route("Where is the Orrin Lens?", frozenset({"mills"})) is None
    assert route("zebra") is None
    only = frozenset({registry.resolve("mills")})
    assert corpora.route("Where is the Orrin Lens?", only, every) is None, "it is live no more"
    assert route("Where is the Orrin Lens?") == lens
