"""The gate: what an adapter must reach to be published, and by whose evaluation."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.base_model import BaseModel
from pipeline.config import Config, Gate
from pipeline.previous import adapter_of
from pipeline.publish import check_gate, move_alias, previous_version, publish_adapter, version_of_run
from pipeline.schema import PASSAGE, Document, Passage, to_table
from pipeline.status import stages_of
from pipeline.store import LINE, Folder, Stage, require_line, settings_digest
from tests.conftest import make_config, write_documents

GOOD: dict[str, Any] = {
    "gap_closed": 0.6,
    "lost": {
        "kl_to_base": 0.1,
        "general_questions": {"closed_book": 0.8, "adapter": 0.78},
        "refusal": {"closed_book": 0.3, "adapter": 0.2},
    },
    "comparisons": [
        {"arm": "adapter", "over": "previous", "difference": -0.05},
        {"arm": "adapter_retrieval", "over": "retrieval", "difference": 0.1},
    ],
}
GATE = Gate()
NAN = float("nan")


def test_a_good_adapter_passes() -> None:
    assert check_gate(GOOD, GATE) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gap_closed": 0.05}, "closes 0.05 of the gap, 0.05 less than min_gap_closed = 0.1"),
        ({"gap_closed": -0.5}, "0.60 less than min_gap_closed"),
        ({"lost": GOOD["lost"] | {"kl_to_base": 2.5}}, "2.50, 2.20 more than max_kl_to_base = 0.3"),
        (
            {"lost": GOOD["lost"] | {"general_questions": {"closed_book": 0.8, "adapter": 0.4}}},
            "fall on general questions is 0.40, 0.20 more than max_general_loss = 0.2",
        ),
        (
            {"lost": GOOD["lost"] | {"refusal": {"closed_book": 0.8, "adapter": 0.1}}},
            "fall in refusals is 0.70, 0.20 more than max_refusal_loss = 0.5",
        ),
        (
            {"comparisons": [{"arm": "adapter_retrieval", "over": "retrieval", "difference": -0.5}]},
            "below the base model with retrieval is 0.50, 0.30 more than max_retrieval_loss = 0.2",
        ),
        (
            {"comparisons": [{"arm": "adapter", "over": "previous", "difference": -0.3}]},
            "below the version that clients have is 0.30, 0.10 more than max_previous_loss = 0.2",
        ),
        (
            {"gap_closed": None, "comparisons": [{"arm": "adapter", "over": "closed_book", "difference": -0.4}]},
            "below the base model alone is 0.40, 0.35 more than max_closed_book_loss = 0.05",
        ),
        ({"gap_closed": NAN}, "closes nan of the gap"),
        ({"lost": GOOD["lost"] | {"kl_to_base": NAN}}, "nan more than max_kl_to_base"),
    ],
)
def test_a_broken_adapter_is_stopped_by_the_threshold_that_it_misses(change: dict[str, Any], message: str) -> None:
    (sentence,) = check_gate(GOOD | change, GATE)
    assert message in sentence


def test_what_was_not_measured_or_is_not_asked_for_stops_nobody() -> None:
    assert check_gate({"scores": {}}, GATE) == []
    assert check_gate(GOOD | {"gap_closed": None}, GATE) == []
    nothing = Gate(min_gap_closed=None, max_kl_to_base=None, max_general_loss=None, max_refusal_loss=None)
    assert check_gate(GOOD | {"gap_closed": -1.0}, nothing) == []


def complete(stages: dict[str, Stage], name: str, **settings: Any) -> None:
    place, given = LINE.index(name), None
    if place:
        before = stages[LINE[place - 1]].require()
        # Answers are begun before their questions are there.
        given = settings_digest(before["settings"]) if name == "answer" else before["data_digest"]
    stages[name].open({**settings, "input": given}, redo=True)
    stages[name].close(0.0)


def make_line(tmp_path: Path) -> tuple[Config, dict[str, Stage]]:
    """Complete the stages without a row."""
    places = {"registry": str(tmp_path / "registry"), "name": "a"}
    config = make_config(str(tmp_path / "run"), publish=places)
    stages = stages_of(config)
    for name in LINE:
        complete(stages, name)
    return config, stages


def test_the_evaluation_of_another_adapter_is_refused(tmp_path: Path) -> None:
    config, stages = make_line(tmp_path)
    assert require_line(config.run_dir, "evaluate")["evaluate"]["stage"] == "evaluate"
    for changed, later in pairwise(LINE):
        complete(stages, changed, epochs=9)
        with pytest.raises(ValueError, match=f"stage {later} .* was made from other rows than stage {changed}"):
            require_line(config.run_dir, "evaluate")
        for name in LINE[1:]:
            complete(stages, name)
        assert require_line(config.run_dir, "evaluate")["evaluate"]["stage"] == "evaluate"


def test_the_comparison_with_a_version_that_clients_no_longer_have_is_refused(tmp_path: Path) -> None:
    config, stages = make_line(tmp_path)
    base, adapters = BaseModel("m", str(tmp_path), "1", "t", "c"), Folder(config.publish.registry) / "a"
    for version in ("first", "second"):
        (adapters / version).write_json("manifest.json", {"run_id": version, "base_revision": "1"})
    move_alias(adapters, "first")
    with pytest.raises(ValueError, match="was compared with no earlier version, and clients have first now"):
        publish_adapter(config, base)
    complete(stages, "evaluate", previous="first")
    move_alias(adapters, "second")
    with pytest.raises(ValueError, match="was compared with first, and clients have second now"):
        publish_adapter(config, base)


def test_everything_that_fails_is_named() -> None:
    assert len(check_gate({"gap_closed": 0.0, "lost": {"kl_to_base": 9.0}}, GATE)) == 2


def test_an_adapter_is_compared_with_what_clients_have_until_it_is_published(tmp_path: Path) -> None:
    config = make_config(str(tmp_path / "run"), publish={"registry": str(tmp_path / "registry"), "name": "a"})
    base = BaseModel("m", str(tmp_path), "1", "t", "c")
    stage, adapters = Stage(config.run_dir, "evaluate"), Folder(str(tmp_path / "registry")) / "a"

    def compared_with() -> str | None:
        previous = previous_version(config, base, "mine run")
        return previous and previous.name

    assert compared_with() is None
    for version, revision in (("first", "1"), ("second", "1"), ("other", "2"), ("mine", "1")):
        (adapters / version).write_json("manifest.json", {"run_id": f"{version} run", "base_revision": revision})
    for version, compared in (("first", "first"), ("second", "second"), ("other", None)):
        move_alias(adapters, version)
        assert compared_with() == compared
    stage.open({"previous": "first"})
    move_alias(adapters, "mine")
    assert compared_with() == "first"
    move_alias(adapters, "second")
    assert compared_with() == "first", "another version came, but this one is out"


def test_documents_that_moved_make_another_version(tmp_path: Path) -> None:
    base = BaseModel("m", str(tmp_path), "1", "t", "c")
    versions = []
    for run, source in (("first", "old/mill.md"), ("again", "old/mill.md"), ("moved", "new/mill.md")):
        config = make_config(str(tmp_path / run))
        write_documents(config.run_dir, "dedup", [[Document("d", source, "Mill", "The mill.")]])
        chunk = Stage(config.run_dir, "chunk")
        chunk.open({})
        chunk.commit("0", [to_table([Passage("p", "d", "Mill", 0, 9, "The mill.")], PASSAGE)], [], 1)
        chunk.close(0.0)
        adapter_of(config.run_dir).write_json("adapter_config.json", {"r": 8})
        versions.append(version_of_run(config, base))
    assert versions[0] == versions[1] != versions[2]
