"""The run directory, on a disk and in a bucket: whole files, checked tables, units that count once done."""

import errno
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import store
from pipeline.schema import DOCUMENT, Document, Rejected, to_table
from pipeline.store import FORMAT, Folder, Stage, check_table, open_uri
from tests.conftest import ROOT


def table(*names: str) -> pa.Table:
    return to_table([Document(name, f"{name}.txt", "", f"text of {name}") for name in names], DOCUMENT)


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "disk":
        return Folder(str(tmp_path))
    return request.getfixturevalue("bucket") / re.sub(r"\W", "_", request.node.name)


def test_files_in_folders(folder: Folder) -> None:
    assert folder.list() == [] and folder.read_json("a.json") is None
    folder.delete()  # nothing is there, and that is fine
    folder.write_json("a.json", {"b": [1, 2]})
    (folder / "below").write_bytes("c", b"old")
    (folder / "below").write_bytes("c", b"new")
    assert folder.list() == ["a.json"] and folder.read_json("a.json") == {"b": [1, 2]}
    assert (folder / "below").read_bytes("c") == b"new"
    folder.delete_file("a.json")
    assert folder.list() == []
    folder.delete()
    assert (folder / "below").list() == []


def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path: Path) -> None:
    run = Folder(str(tmp_path / "run"))
    code = (
        "import sys; from pipeline.store import Folder\n"
        "with Folder(sys.argv[1]).hold(): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, run.uri], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="run is being worked on by another process"), run.hold():
            pass
        other.kill()
        other.wait()
        with run.hold():
            pass


def test_what_cannot_be_held_is_not_refused(folder: Folder) -> None:
    with (folder / "run").hold(), Folder("/dev/null/run").hold():
        assert folder.list() == []


def test_parameters_stay_at_the_end_of_a_uri() -> None:
    assert (Folder("s3://b/a/?region=x&scheme=http") / "c").uri == "s3://b/a/c?region=x&scheme=http"
    assert (Folder("/a/") / "c").uri == "/a/c"


def test_a_uri_that_nothing_can_open() -> None:
    with pytest.raises(ValueError, match=r"ftp://host/a.*give a local path"):
        open_uri("ftp://host/a")


def test_a_writer_that_raises_leaves_the_old_file_alone(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with pytest.raises(TypeError):
        folder.write_bytes("a", object())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    folder.write_bytes("a", b"old")
    with pytest.raises(TypeError):
        folder.write_bytes("a", object())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [tmp_path / "a"] and folder.read_bytes("a") == b"old"


def test_an_unfinished_file_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".a.json.0123").write_bytes(b"{")
    assert Folder(str(tmp_path)).list() == []


@pytest.mark.parametrize(
    "wrong",
    [
        table("a").drop_columns(["title"]),
        table("a").select(["source", "doc_id", "title", "text"]),
        table("a").set_column(3, "text", pa.array([1])),
        table("a").set_column(3, "text", pa.array(["a"], pa.large_string())),
        table("a").set_column(3, "text", pa.array([None], pa.string())),
    ],
    ids=["missing column", "other order", "other type", "wider type", "null"],
)
def test_wrong_tables_are_refused(run_dir: str, wrong: pa.Table) -> None:
    check_table(table("a"), DOCUMENT, "here")
    with pytest.raises(ValueError, match=r"here: (schema|column 'text' has 1 null)"):
        check_table(wrong, DOCUMENT, "here")
    stage = Stage(run_dir, "read")
    with pytest.raises(ValueError, match=r"read/000000-00001\.parquet"):
        stage.commit("000000", [table("a"), wrong], [], 2)
    assert stage.committed() == set() and stage.shards() == []


def test_commit_and_close(folder: Folder) -> None:
    stage = Stage(folder.uri, "read")
    assert stage.open({"limit": 1})
    rejected: list[Rejected] = []

    def tables() -> Iterator[pa.Table]:
        yield table("a", "b")
        rejected.append(Rejected("read", "c.txt", "empty", "no text"))
        yield table()
        yield table("d")

    first = stage.commit("000000", tables(), rejected, lambda: 3 + len(rejected), {"files": 4})
    second = stage.commit("000001", [], [], 0, {"files": 1})
    assert (first.rows_in, first.rows_out, first.rejected) == (4, 3, {"empty": 1})
    assert first.shards == ["000000-00000.parquet", "000000-00001.parquet"] and second.shards == []
    assert stage.committed() == {"000000", "000001"}
    assert list(stage.units()) == [first, second]
    assert stage.find_unit("000001") == second and stage.find_unit("000002") is None
    assert stage.read_unit("000000").equals(table("a", "b", "d")) and not stage.read_unit("000001").num_rows
    assert stage.read_shard(first.shards[1], ["text"]).to_pylist() == [{"text": "text of d"}]
    assert stage.read_shard(first.shards[1], ["text", "doc_id"]).column_names == ["text", "doc_id"]
    assert stage.read_rejected().to_pylist() == [
        {"stage": "read", "record_id": "c.txt", "reason": "empty", "detail": "no text"}
    ]

    with pytest.raises(ValueError, match=r"stage read .* is not complete"):
        stage.require()
    manifest = stage.close(1.23456, {"note": "x"})
    assert manifest == stage.manifest() == stage.require()
    assert (
        manifest["settings"] == {"limit": 1, "format": FORMAT}
        and manifest["seconds"] == 1.235
        and manifest["note"] == "x"
    )
    assert (manifest["rows_in"], manifest["rows_out"], manifest["rejected"]) == (4, 3, {"empty": 1})
    assert manifest["stats"] == {"files": 5} and manifest["bytes"] == first.bytes > 0
    assert not stage.open({"limit": 1})


def test_an_interrupted_unit_is_invisible(folder: Folder) -> None:
    stage = Stage(folder.uri, "read")

    def killed() -> Iterator[pa.Table]:
        yield table("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.commit("000000", killed(), [], 1)
    assert (stage.folder / "data").list() == ["000000-00000.parquet"]
    assert stage.committed() == set() and stage.shards() == [] and list(stage.units()) == []
    assert stage.totals()["rows_out"] == 0
    stage.commit("000000", [table("b")], [], 1)
    assert stage.read_unit("000000").equals(table("b"))


def test_other_settings_are_named(folder: Folder) -> None:
    stage = Stage(folder.uri, "read")
    begun = {"question": {"seed": 0, "kinds": ["fact"]}, "input": "x"}
    assert stage.open(begun)
    stage.commit("000000", [table("a")], [], 1)
    assert stage.open(begun) and stage.committed() == {"000000"}
    other = {"question": {"seed": 1, "kinds": ["fact"]}, "input": "x"}
    with pytest.raises(ValueError, match=r"other settings: question\.seed was 0, is now 1\. .*--redo"):
        stage.open(other)
    assert stage.committed() == {"000000"}
    assert stage.open(other, redo=True)
    assert stage.committed() == set() and (stage.folder / "data").list() == []
    with pytest.raises(ValueError, match=r"question\.seed was 1, is now 0"):
        stage.open(begun)
    stage.folder.write_json("settings.json", begun)
    with pytest.raises(ValueError, match=f"format was None, is now {FORMAT}"):
        stage.open(begun)


def test_units_come_in_order_of_their_names(folder: Folder) -> None:
    stage = Stage(folder.uri, "read")
    names = [f"{number:06d}" for number in range(150)]
    for name in reversed(names):
        stage.commit(name, [], [], 1)
    assert [unit.name for unit in stage.units()] == names and next(stage.units()).name == names[0]
    assert stage.totals()["rows_in"] == 150


def test_the_data_digest_is_that_of_the_rows_and_without_rows_of_the_settings(tmp_path: Path) -> None:
    def make(name: str, settings: dict[str, int], **units: str) -> str:
        stage = Stage(str(tmp_path / name), "read")
        stage.open(settings)
        for unit, text in units.items():
            stage.commit(unit, [table(text)] if text else [], [], 1)
        return stage.close(len(name))["data_digest"]

    first = make("first", {"a": 1, "b": 2}, u0="x", u1="y")
    assert first == make("in another folder and order", {"b": 2, "a": 1}, u1="y", u0="x")
    assert first == make("of files that were touched", {"a": 1, "b": 3}, u0="x", u1="y")
    assert first != make("with another row", {"a": 1, "b": 2}, u0="x", u1="z")
    assert first != make("with a row less", {"a": 1, "b": 2}, u0="x")
    assert make("empty", {"a": 1}, u0="") == make("empty as well", {"a": 1}) != make("another empty", {"a": 2})


def test_a_bucket_that_fails_for_a_moment_is_asked_again_and_a_disk_is_not(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[OSError] = []

    def fail_first(uri: str) -> Any:
        if errors:
            raise errors.pop()
        return open_uri(uri)

    monkeypatch.setattr(store, "open_uri", fail_first)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    folder.write_bytes("a", b"text")
    errors += [OSError("AWS Error INTERNAL_FAILURE during GetObject operation")] * 4
    assert folder.read_bytes("a") == b"text" and not errors
    errors += [OSError("AWS Error ACCESS_DENIED during PutObject operation")] * 6
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        folder.write_bytes("a", b"more")
    assert len(errors) == 1
    errors[:] = [OSError(errno.ENOSPC, "No space left on device")] * 2
    with pytest.raises(OSError, match="No space"):
        folder.write_bytes("a", b"more")
    assert len(errors) == 1
