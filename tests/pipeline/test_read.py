"""Reading: what is listed, and a corpus of everything through both stages, on a disk and in a bucket."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Read
from pipeline.read import UNIT_BYTES, File, _plan_units, list_files, read_documents, read_file, read_job
from pipeline.schema import Rejected
from pipeline.stage import only
from pipeline.store import Folder, Stage
from tests.conftest import assert_counted, make_config, rows

GOOD = {
    "plain.txt": b"\xef\xbb\xbfone\r\ntwo",
    "UPPER.TXT": b"upper case extension",
    "rows.jsonl": b'{"text": "first row"}\n{"body": "no text"}\n{"text": "third row"}\n',
    "sub/deep/copy.txt": b"one\ntwo",
    "sub/\udcff.txt": b"a name that is not UTF-8",
}
BAD = {"empty.txt": "empty", "photo.png": "unsupported_type", "README": "unsupported_type"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Make a folder of good and bad files, with links, a pipe and hidden files."""
    folder = tmp_path / "corpus"
    for name in (*GOOD, *BAD, ".hidden.txt", ".git/config.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(GOOD.get(name, b""))
    os.symlink(folder, folder / "sub" / "up")
    os.symlink("self.txt", folder / "self.txt")
    os.symlink("nowhere.txt", folder / "dangling.txt")
    os.symlink(folder / "sub" / "deep", folder / "alias")
    os.mkfifo(folder / "pipe.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.txt").write_bytes(b"reached through a link")
    os.symlink(tmp_path / "elsewhere", folder / "link")
    return folder


def test_a_corpus_of_everything(local_ray: None, corpus: Path, run_dir: str) -> None:
    def read_all(max_reject_share: float = 0.9, redo: bool = False) -> dict[str, Any]:
        settings = {"paths": [str(corpus)], "unit_files": 5}
        return only(read_documents([make_config(run_dir, read=settings, max_reject_share=max_reject_share)], redo))

    read, dedup = Stage(run_dir, "read"), Stage(run_dir, "dedup")
    with pytest.raises(ValueError, match="max_reject_share"):
        read_all(0.1)
    (corpus / "UPPER.TXT").write_bytes(b"changed")
    with pytest.raises(ValueError, match="listing was"):
        read_all()
    with pytest.raises(ValueError, match="max_reject_share"):
        read_all(0.1, redo=True)
    assert read.manifest() is None
    units = {path: path.stat().st_mtime_ns for path in Path(run_dir).glob("read/units/*")}

    dedup.open({"input": "older"})
    with pytest.raises(ValueError, match="input was 'older'"):
        read_all()
    manifests = read_all(redo=True)
    # A larger share needs no unit again.
    assert {path: path.stat().st_mtime_ns for path in Path(run_dir).glob("read/units/*")} == units
    assert len(units) == -(-manifests["read"]["stats"]["files"] // 5) == 3
    assert read_all() == manifests

    rejected = {os.path.relpath(row["record_id"], corpus): row["reason"] for row in read.read_rejected().to_pylist()}
    assert rejected == BAD | {
        "rows.jsonl#2": "no_text_field",
        "sub/up": "symlink_loop",
        "self.txt": "symlink_loop",
        "dangling.txt": "unreadable",
        "pipe.txt": "unreadable",
        "alias": "duplicate",
    }
    texts = {os.path.relpath(row["source"], corpus): row["text"] for row in rows(read)}
    assert texts == {
        "UPPER.TXT": "changed",
        "link/linked.txt": "reached through a link",
        "plain.txt": "one\ntwo",
        "rows.jsonl#1": "first row",
        "rows.jsonl#3": "third row",
        "sub/deep/copy.txt": "one\ntwo",
        "sub/\ufffd.txt": "a name that is not UTF-8",
    }
    assert_counted(manifests["read"])

    assert [(row["record_id"], row["reason"]) for row in dedup.read_rejected().to_pylist()] == [
        (f"{corpus}/sub/deep/copy.txt", "duplicate")
    ]
    assert manifests["dedup"]["rows_in"] == manifests["read"]["rows_out"] == len(texts)
    assert_counted(manifests["dedup"])


def test_from_bucket_to_bucket(local_ray: None, bucket: Folder) -> None:
    corpus = bucket / "corpus"
    corpus.write_bytes("a.txt", b"text")
    corpus.write_bytes(".hidden.txt", b"hidden")
    (corpus / "sub").write_bytes("b.txt", b"text")
    (corpus / "sub").write_bytes("rows.jsonl", b'{"text": "first row"}\n{"body": "no text"}\n')
    # A run inside the corpus must not read itself.
    run = corpus / "run"
    config = make_config(run.uri, read={"paths": [corpus.uri], "unit_files": 2})
    manifests = only(read_documents([config]))

    dedup = Stage(run.uri, "dedup")
    assert [(row["source"], row["text"]) for row in rows(dedup)] == [
        ("s3://bucket/corpus/a.txt", "text"),
        ("s3://bucket/corpus/sub/rows.jsonl#1", "first row"),
    ]
    (duplicate,) = dedup.read_rejected().to_pylist()
    assert duplicate["detail"] == "kept: s3://bucket/corpus/a.txt"
    assert manifests["read"]["rejected"] == {"no_text_field": 1}
    assert manifests["read"]["stats"]["files"] == 3
    assert only(read_documents([config])) == manifests

    pattern = (corpus / "**" / "*.jsonl").uri
    assert [file.source for file in list_files([pattern])] == ["s3://bucket/corpus/sub/rows.jsonl"]
    assert [file.source for file in list_files([(corpus / "a.txt").uri])] == ["s3://bucket/corpus/a.txt"]
    for missing in (bucket / "missing", Folder(bucket.uri.replace("@bucket", "@no-such-bucket"))):
        with pytest.raises(ValueError, match=r"read\.paths"):
            list_files([missing.uri])


def test_what_a_run_wrote_is_not_read(tmp_path: Path) -> None:
    for name in ("a.txt", "run/b.txt", "before/c.txt", "registry/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    config = make_config(
        f"{tmp_path}/run",
        read={"paths": [str(tmp_path)]},
        update={"previous_run": f"{tmp_path}/before"},
        publish={"registry": f"{tmp_path}/registry", "name": "a"},
    )
    assert [file["path"] for unit in read_job(config).units for file in unit["files"]] == [f"{tmp_path}/a.txt"]


def test_units_are_of_some_files_or_some_bytes() -> None:
    sizes = [1, 1, 1, 1, UNIT_BYTES, 1, UNIT_BYTES, 1]
    units = list(_plan_units([File(str(number), size=size) for number, size in enumerate(sizes)], 3))
    assert [[int(file["path"]) for file in unit["files"]] for unit in units] == [[0, 1, 2], [3, 4], [5, 6], [7]]
    assert [unit["name"] for unit in units] == ["000000", "000001", "000002", "000003"]
    assert list(_plan_units([], 3)) == []


def test_a_file_that_vanishes_after_listing(tmp_path: Path) -> None:
    (row,) = read_file(File(str(tmp_path / "gone.parquet")), Read(paths=["unused"]))
    assert isinstance(row, Rejected) and row.reason == "unreadable"


def listed(paths: list[str], root: Path, own_folder: str = "") -> list[str]:
    return [os.path.relpath(file.path, root) for file in list_files(paths, [own_folder] if own_folder else [])]


def test_globs(tmp_path: Path) -> None:
    for name in ["a.txt", "b.md", "x/c.txt", "x/y/d.txt", "x/y/e.md", "odd[1].txt", "x/.h/f.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    os.symlink(tmp_path, tmp_path / "x" / "loop")
    root = str(tmp_path)
    assert listed([f"{root}/*.txt"], tmp_path) == ["a.txt", "odd[1].txt"]
    assert listed([f"{root}/odd[1].txt"], tmp_path) == ["odd[1].txt"]
    assert listed([f"file://{root}/a.txt"], tmp_path) == ["a.txt"]
    assert listed([f"{root}/**/*.md"], tmp_path) == ["b.md", "x/y/e.md"]
    assert listed([f"{root}/x/**"], tmp_path) == ["x/c.txt", "x/y/d.txt", "x/y/e.md", "x/loop"]
    assert listed([f"{root}/x/*"], tmp_path) == ["x/c.txt", "x/loop", "x/y/d.txt", "x/y/e.md"]
    assert listed([f"{root}/x/y", root, root], tmp_path, f"{root}/x")[:2] == [
        "x/y/d.txt",
        "x/y/e.md",
    ]
    assert listed([root], tmp_path, f"{root}/x") == ["a.txt", "b.md", "odd[1].txt"]


@pytest.mark.parametrize("name", ["missing", "*.txt", "**/*.txt", "empty_folder"])
def test_a_path_that_matches_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(ValueError, match=r"read\.paths: .*" + re.escape(name) + ".*correct"):
        list_files([str(tmp_path / name)])


def test_links_that_multiply_are_followed_once(tmp_path: Path) -> None:
    for level in range(30):
        (tmp_path / f"d{level}").mkdir()
        (tmp_path / f"d{level}" / "a.txt").write_text("text")
        for name in "xy":
            os.symlink(tmp_path / f"d{(level + 1) % 30}", tmp_path / f"d{level}" / name)
    files = list_files([str(tmp_path)])
    assert sum(file.reason is None for file in files) == 30
    assert sum(file.reason == "duplicate" for file in files) == 60
