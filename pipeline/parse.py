"""One file's bytes -> Documents: every format that is read, and a reason for all that cannot be.

In: an open file and its source. Out: one row; from JSONL and Parquet one for each of theirs, a few megabytes
at a time, and one more for the lost rest of a file that breaks halfway. HTML and DOCX become Markdown.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import mammoth
import pyarrow.parquet as pq
import pypdfium2
import pypdfium2.raw as pdfium
from bs4 import BeautifulSoup
from markdownify import ATX, MarkdownConverter

from pipeline.config import Read
from pipeline.schema import REASONS, Document, Rejected, digest

MARKDOWN_SUFFIXES = frozenset({".md", ".markdown"})
HTML_SUFFIXES = frozenset({".html", ".htm"})
ROW_SUFFIXES = frozenset({".jsonl", ".ndjson", ".parquet"})
SUFFIXES = MARKDOWN_SUFFIXES | HTML_SUFFIXES | ROW_SUFFIXES | {".txt", ".text", ".pdf", ".docx"}
# Not <form>: some sites wrap the whole page in one. Not <header>: it often holds the only <h1>.
HTML_JUNK = ["head", "script", "style", "noscript", "template", "nav", "footer", "button", "select"]
HTML_JUNK += ["textarea", "svg", "iframe", "canvas", "object"]
PARQUET_ROWS = 64  # decoded together; each may be as large as max_file_mb
DOCX_EXPANSION = 16  # a DOCX may unpack to this many times max_file_mb

SURROGATE = re.compile("[\ud800-\udfff]")
FRONT_MATTER_TITLE = re.compile(r"\A---\n(?:[^\n]+\n)*?title:[ \t]*(['\"]?)([^\n]+?)\1[ \t]*\n(?:[^\n]+\n)*?---\n")


class Parsed(NamedTuple):
    title: str
    text: str


class Refused(Exception):
    """Its arguments are a reason and a detail; `parse_file` makes it a Rejected row."""


def parse_file(stream: BinaryIO, source: str, suffix: str, config: Read) -> Iterator[Document | Rejected]:
    """Yield the file's rows, Rejected where it or a row cannot be used; OSError if reading itself fails."""
    limit = config.max_file_mb << 20
    try:
        if suffix not in ROW_SUFFIXES:
            data = stream.read(limit + 1)
            _check_size(len(data), limit)
            yield _document(source, parse(data, suffix, limit))
            return
        is_empty = True
        read_rows = _read_parquet if suffix == ".parquet" else _read_jsonl
        for number, row in read_rows(stream, config):
            is_empty = False
            yield _parse_row(f"{source}#{number}", row, config)
        if is_empty:
            raise Refused("empty", "no rows")
    except Refused as refused:
        yield reject(source, *refused.args)
    except Exception as error:
        # Damaged files raise a dozen types from zlib, expat, mammoth, bs4, Arrow and pdfium; none may end the
        # run. Arrow reports damage as OSError too, but without an errno.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield reject(source, "broken", f"{type(error).__name__}: {error}")


def reject(source: str, reason: REASONS, detail: str) -> Rejected:
    return Rejected("read", _clean(source), reason, _clean(detail)[:300])


def _clean(text: str) -> str:
    """Normalise newlines; remove a BOM, NULs, and lone surrogates, which Arrow cannot take."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").removeprefix("\ufeff")
    return SURROGATE.sub("\ufffd", text)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise Refused("too_large", f"more than read.max_file_mb = {limit >> 20}")


def _document(source: str, parsed: Parsed) -> Document:
    title, text = " ".join(_clean(parsed.title).split()), _clean(parsed.text)
    if not text.strip():
        raise Refused("empty", "no text")
    return Document(digest(title, text), _clean(source), title, text)


def parse(data: bytes, suffix: str, limit: int) -> Parsed:
    """Return a whole file's title and text; raises Refused, or what a parser raises on damage."""
    if suffix == ".pdf":
        return _parse_pdf(data)
    if suffix == ".docx":
        return _parse_docx(data, limit)
    text = _decode(data)
    if suffix in HTML_SUFFIXES:
        return _parse_html(text)
    found = FRONT_MATTER_TITLE.match(_clean(text[:4096])) if suffix in MARKDOWN_SUFFIXES else None
    return Parsed(found[2] if found else "", text)


def _decode(data: bytes) -> str:
    if b"\0" in data and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Refused("binary", "holds NUL bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("not_utf8", str(error)) from error


def _parse_html(html: str) -> Parsed:
    soup = BeautifulSoup(html, "lxml")
    title = soup.title.get_text() if soup.title else ""
    for tag in soup(HTML_JUNK):
        tag.decompose()
    for image in soup("img"):
        image.replace_with(str(image.get("alt") or ""))
    converter = MarkdownConverter(
        heading_style=ATX,
        bullets="-",
        strip=["a"],
        escape_asterisks=False,
        escape_underscores=False,
        table_infer_header=True,
    )
    return Parsed(title, converter.convert_soup(soup).strip())


def _parse_docx(data: bytes, limit: int) -> Parsed:
    if data.startswith(b"\xd0\xcf\x11\xe0") and "EncryptedPackage".encode("utf-16-le") in data:
        raise Refused("encrypted", "needs a password")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = sum(info.file_size for info in archive.infolist())
    if size > DOCX_EXPANSION * limit:
        raise Refused("too_large", f"unpacks to {size} bytes")
    result = mammoth.convert_to_html(
        io.BytesIO(data),
        style_map="p[style-name='Title'] => h1:fresh",
        convert_image=mammoth.images.img_element(lambda image: {"src": ""}),
    )
    return _parse_html(result.value)


def _parse_pdf(data: bytes) -> Parsed:
    # pdfium refuses a file without pages and leaves its last error as it was, from whichever file that came;
    # failing to open a file without a name puts a value there that bytes cannot.
    pdfium.FPDF_LoadDocument(b"", None)
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if error.err_code == pdfium.FPDF_ERR_PASSWORD:
            raise Refused("encrypted", "needs a password") from error
        if error.err_code == pdfium.FPDF_ERR_FILE:
            raise Refused("no_pages", "a PDF without pages") from error
        raise
    with pdf:
        texts = []
        for page in pdf:
            # U+FFFE is pdfium's mark for a hyphen that broke a word at the end of a line.
            texts.append(page.get_textpage().get_text_range().replace("\ufffe", "").strip())
            page.close()
        return Parsed(pdf.get_metadata_value("Title"), "\n\n".join(filter(None, texts)))


def _read_jsonl(stream: BinaryIO, config: Read) -> Iterator[tuple[int, object]]:
    """Yield each line's number with its value, or with why it has none; blank lines are no rows."""
    limit = config.max_file_mb << 20
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        rest = line  # that of a line too long is skipped piece by piece
        while len(rest) >= limit and not rest.endswith(b"\n"):
            rest = stream.readline(limit)
        try:
            _check_size(len(line.rstrip(b"\n")), limit)
            if not (text := _decode(line).strip()):
                continue
            row = json.loads(text)
        except Refused as refused:
            row = refused
        except (ValueError, RecursionError) as error:
            row = Refused("broken", str(error))
        yield number, row


def _read_parquet(stream: BinaryIO, config: Read) -> Iterator[tuple[int, object]]:
    """Yield each row's number with its title and text, or with why it has none."""
    parquet = pq.ParquetFile(stream, pre_buffer=False)
    names = parquet.schema_arrow.names
    if config.text_field not in names:
        raise Refused("no_text_field", f"no column {config.text_field!r} (read.text_field) in {names}")
    columns = [name for name in (config.text_field, config.title_field) if name in names]
    number = 0
    for batch in parquet.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
        for cells in zip(*batch.columns, strict=True):
            number += 1
            try:
                row = dict(zip(batch.schema.names, (cell.as_py() for cell in cells), strict=True))
            except UnicodeDecodeError as error:
                row = Refused("not_utf8", str(error))
            yield number, row


def _parse_row(source: str, row: object, config: Read) -> Document | Rejected:
    try:
        if isinstance(row, Refused):
            raise row
        fields = row if isinstance(row, dict) else {}
        text, title = fields.get(config.text_field), fields.get(config.title_field)
        if not isinstance(text, str):
            raise Refused("no_text_field", f"no string in field {config.text_field!r} (read.text_field)")
        _check_size(len(text.encode("utf-8", "surrogatepass")), config.max_file_mb << 20)
        return _document(source, Parsed(title if isinstance(title, str) else "", text))
    except Refused as refused:
        return reject(source, *refused.args)
