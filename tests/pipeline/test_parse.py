"""Parsing: every format, good and bad, from bytes alone; damage never raises, large files stream."""

import io
import json
import random
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import docx
import fpdf
import pyarrow as pa
import pyarrow.parquet as pq
import pypdf
import pytest

from pipeline.config import Read
from pipeline.parse import parse, parse_file
from pipeline.schema import Document, Rejected

MB = 1 << 20


def make_pdf(*pages: str, title: str = "") -> bytes:
    pdf = fpdf.FPDF()
    pdf.set_title(title)
    for page in pages:
        pdf.add_page()
        pdf.set_font("Helvetica", size=12)
        pdf.multi_cell(0, 8, page)
    return bytes(pdf.output())


def rewrite_pdf(data: bytes | None, password: str | None = None) -> bytes:
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(data)) if data else pypdf.PdfWriter()
    if password:
        writer.encrypt(password)
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def make_docx() -> bytes:
    document = docx.Document()
    document.add_heading("The Handbook", 0)
    document.add_heading("Pay day", 1)
    document.add_paragraph("Salaries are paid on the 25th.")
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "left", "right"
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


def make_parquet(columns: dict[str, list[Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def read_bytes(name: str, data: bytes, **settings: Any) -> list[Document | Rejected]:
    return list(parse_file(io.BytesIO(data), name, Path(name).suffix.lower(), Read(paths=["unused"], **settings)))


GOOD: dict[str, tuple[bytes, list[tuple[str, str]]]] = {
    "plain.txt": (b"\xef\xbb\xbfone\r\ntwo\rthree", [("", "one\ntwo\nthree")]),
    "front.md": (
        b"---\nid: x\ntitle: 'Front: matter'\n---\n# H\n\n*text*\n",
        [("Front: matter", "---\nid: x\ntitle: 'Front: matter'\n---\n# H\n\n*text*\n")],
    ),
    "page.html": (
        b"<html><head><title>The\n page</title><style>p{}</style></head><body><nav>menu</nav>"
        b"<script>var x</script><h1>Head</h1><p>a <b>bold</b> <a href='/u'>link</a> of x_y"
        b"<p>second<img alt='a cat' src='data:x'></body></html>",
        [("The page", "# Head\n\na **bold** link of x_y\n\nseconda cat")],
    ),
    "paper.pdf": (make_pdf("Page one.", "", "Page three.", title="A paper"), []),
    "handbook.docx": (make_docx(), []),
    "rows.jsonl": (
        b'\xef\xbb\xbf{"text": "first row", "title": "T"}\n\n{"text": "nul \\u0000 and \\ud800"}',
        [("T", "first row"), ("", "nul  and \ufffd")],
    ),
    "rows.ndjson": (b'{"text": "another", "title": 3}\r\n', [("", "another")]),
    "rows.parquet": (
        make_parquet({"text": ["cell one", "cell two"], "title": ["T", None]}),
        [("T", "cell one"), ("", "cell two")],
    ),
}

BAD: dict[str, tuple[bytes, list[str]]] = {
    "empty.txt": (b"", ["empty"]),
    "blank.md": (b" \n\t \r\n", ["empty"]),
    "bom.txt": (b"\xef\xbb\xbf", ["empty"]),
    "junk_only.html": (b"<script>x</script><nav>menu</nav>", ["empty"]),
    "scan.pdf": (make_pdf("", ""), ["empty"]),
    "no_rows.jsonl": (b"\n\n", ["empty"]),
    "no_rows.parquet": (make_parquet({"text": pa.array([], pa.string())}), ["empty"]),  # type: ignore[dict-item]
    "latin1.txt": ("café".encode("latin-1"), ["not_utf8"]),
    "latin1.html": ("<p>café".encode("latin-1"), ["not_utf8"]),
    "utf16.txt": ("wide".encode("utf-16"), ["not_utf8"]),
    "program.txt": (b"\x7fELF\0\0\xff", ["binary"]),
    "one_line.txt": (b"x" * (MB + 1), ["too_large"]),
    "cut.pdf": (make_pdf("text " * 500)[:900], ["broken"]),
    "not_a.pdf": (b"just words", ["broken"]),
    "locked.pdf": (rewrite_pdf(make_pdf("secret"), "password"), ["encrypted"]),
    "no_pages.pdf": (rewrite_pdf(None), ["no_pages"]),
    "cut.docx": (make_docx()[:5000], ["broken"]),
    "not_a.docx": (b"PK but no", ["broken"]),
    "locked.docx": (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + "EncryptedPackage".encode("utf-16-le"),
        ["encrypted"],
    ),
    "cut.parquet": (make_parquet({"text": ["a"]})[:-9], ["broken"]),
    "other_fields.parquet": (make_parquet({"body": ["a", "b"]}), ["no_text_field"]),
    "numbers.parquet": (make_parquet({"text": [1, 2]}), ["no_text_field", "no_text_field"]),
    "cells.parquet": (
        make_parquet({"text": [None, " ", "y" * (MB + 1)]}),
        ["no_text_field", "empty", "too_large"],
    ),
    "lines.jsonl": (
        b'{"text": "cut\n[1]\n{"body": "x"}\n{"text": 5}\n{"text": " "}\n{"text": "\xe9"}\n\0\n'
        + b"[" * 100_000
        + b'\n{"text": "'
        + b"z" * MB
        + b'"}\n',
        [
            *["broken", "no_text_field", "no_text_field", "no_text_field", "empty", "not_utf8"],
            *["binary", "broken", "too_large"],
        ],
    ),
}


@pytest.mark.parametrize("name", [name for name, (_, expected) in GOOD.items() if expected])
def test_good_files(name: str) -> None:
    data, expected = GOOD[name]
    rows = read_bytes(name, data)
    assert [(row.title, row.text) for row in rows if isinstance(row, Document)] == expected
    assert len(rows) == len(expected)


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name: str) -> None:
    data, expected = BAD[name]
    rows = read_bytes(name, data, max_file_mb=1)
    assert [row.reason for row in rows if isinstance(row, Rejected)] == expected
    assert len(rows) == len(expected)
    assert all(row.record_id.partition("#")[0] == name for row in rows if isinstance(row, Rejected))


def test_rows_are_named_by_their_line() -> None:
    rows = read_bytes("a.jsonl", b'\n{"text": "two"}\n\n{"body": "four"}\n{"text": "five"}')
    names = [row.source if isinstance(row, Document) else row.record_id for row in rows]
    assert names == ["a.jsonl#2", "a.jsonl#4", "a.jsonl#5"]


def test_a_disk_that_fails_is_no_broken_file() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        list(parse_file(Failing(), "a.txt", ".txt", Read(paths=["unused"])))


def test_pdf_and_docx() -> None:
    (paper,) = read_bytes("paper.pdf", GOOD["paper.pdf"][0])
    assert isinstance(paper, Document)
    assert (paper.title, paper.text) == ("A paper", "Page one.\n\nPage three.")
    (handbook,) = read_bytes("handbook.docx", GOOD["handbook.docx"][0])
    assert isinstance(handbook, Document)
    assert handbook.text.startswith("# The Handbook\n\n# Pay day\n\nSalaries are paid on the 25th.")
    assert "| left | right |" in handbook.text


def test_html_that_leaves_tags_open() -> None:
    page = "<table>" + "<tr><td>cell<p>text" * 1500
    (row,) = read_bytes("open.html", page.encode())
    assert isinstance(row, Document), row


def test_default_limit_holds_for_a_50_mb_line() -> None:
    for name in ("one.txt", "one.jsonl"):
        (row,) = read_bytes(name, b"x" * (50 * MB))
        assert isinstance(row, Rejected) and row.reason == "too_large"


def test_jsonl_streams(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        for number in range(8000):
            file.write(json.dumps({"text": f"{number} " + "word " * 400}) + "\n")
    tracemalloc.start()
    with path.open("rb") as stream:
        count = sum(1 for _ in parse_file(stream, str(path), ".jsonl", Read(paths=["unused"])))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 8000 and peak < 4 * MB < path.stat().st_size // 3


def test_docx_that_unpacks_to_too_much() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b" " * (17 * MB))
    (row,) = read_bytes("bomb.docx", buffer.getvalue(), max_file_mb=1)
    assert isinstance(row, Rejected) and row.reason == "too_large"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.pdf", make_pdf("words " * 300, "more words")),
        ("x.docx", make_docx()),
        ("x.parquet", make_parquet({"text": [f"row {i}" * 30 for i in range(500)]})),
        ("x.html", GOOD["page.html"][0]),
    ],
)
def test_damaged_files_never_raise(name: str, data: bytes) -> None:
    generator = random.Random(name)
    seen = set()
    for _ in range(20):
        damaged = bytearray(data)
        if generator.random() < 0.3:
            del damaged[generator.randrange(len(data)) :]
        for _ in range(generator.choice([1, 5, 50])):
            if damaged:
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        rows = read_bytes(name, bytes(damaged))
        assert rows
        seen |= {row.reason if isinstance(row, Rejected) else "read" for row in rows}
    assert seen <= {"read", "broken", "not_utf8", "binary", "empty", "encrypted", "no_pages"}


def test_ids_depend_on_the_content_alone() -> None:
    first, second, third = (
        row
        for name, data in (("a.txt", b"same\ntext"), ("b.txt", b"same\r\ntext"), ("a.txt", b"other"))
        for row in read_bytes(name, data)
        if isinstance(row, Document)
    )
    assert first.doc_id == second.doc_id != third.doc_id
    assert first.source != second.source


def test_parse_pdf_joins_hyphenated_words() -> None:
    assert "information" in parse(make_pdf("infor-\nmation"), ".pdf", MB).text
