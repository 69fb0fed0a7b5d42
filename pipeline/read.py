"""Files, folders, globs and bucket URIs -> Documents, each distinct text once.

In: `config.Read`. Out: the stages `read` (all that could be parsed) and `dedup` (that without
duplicates). The driver lists files and compares ids; text stays in the workers, a few megabytes at
a time. A file is one row, except JSONL and Parquet, which have their own; one that breaks halfway
counts one more row for its lost rest. What cannot be read is Rejected, and the run goes on.
"""

import errno
import glob
import io
import json
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple, cast

import mammoth
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pypdfium2
import pypdfium2.raw as pdfium
import ray
from bs4 import BeautifulSoup
from datasketch import LeanMinHash, MinHash, MinHashLSH
from markdownify import ATX, MarkdownConverter

from pipeline.config import Read
from pipeline.schema import DOCUMENT, REASONS, Document, Record, Rejected, digest, to_table
from pipeline.stage import Actors, run_stage
from pipeline.store import Stage, Unit, open_uri

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown"})
HTML_SUFFIXES = frozenset({".html", ".htm"})
ROW_SUFFIXES = frozenset({".jsonl", ".ndjson", ".parquet"})
SUFFIXES = TEXT_SUFFIXES | HTML_SUFFIXES | ROW_SUFFIXES | {".pdf", ".docx"}
# Not <form>: some sites wrap the whole page in one. Not <header>: it often holds the only <h1>.
HTML_JUNK = ["head", "script", "style", "noscript", "template", "nav", "footer", "button", "select"]
HTML_JUNK += ["textarea", "svg", "iframe", "canvas", "object"]

UNIT_BYTES = 256 << 20  # a unit ends here even with fewer files: it is what a crash repeats
SHARD_ROWS = 1000
SHARD_CHARS = 16 << 20
PARQUET_ROWS = 64  # decoded together; a row may be as large as max_file_mb
DOCX_EXPANSION = 16  # a DOCX may unpack to this many times max_file_mb

# Scripts that put no spaces between words, their punctuation, and emoji.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff"
UNSPACED += r"\uf900-\ufaff\uff00-\uffef\U0001f000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
SURROGATE = re.compile("[\ud800-\udfff]")
FRONT_MATTER_TITLE = re.compile(
    r"\A---\n(?:[^\n]+\n)*?title:[ \t]*(['\"]?)([^\n]+?)\1[ \t]*\n(?:[^\n]+\n)*?---\n"
)
SHINGLE_WORDS = 5
PERMUTATIONS = 128
HASH_BATCH = 8192  # shingles hashed together: 8 MB per temporary array of datasketch


@dataclass(frozen=True, slots=True)
class File:
    """A listed file; `reason` is set where listing already shows that it cannot be read."""

    path: str  # absolute, on its filesystem
    root: str = ""  # URI that opens the filesystem, empty for the local one
    size: int = 0
    changed: int = 0  # nanoseconds; 0 where unknown
    reason: REASONS | None = None
    detail: str = ""

    @property
    def source(self) -> str:
        return f"{self.root.partition('://')[0]}://{self.path}" if self.root else self.path

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.path)[1].lower()


class Parsed(NamedTuple):
    title: str
    text: str


class Refused(Exception):
    """Raised inside this module with a reason and a detail; `read_file` makes it a Rejected row."""


def list_files(paths: list[str], own_folder: str = "") -> Iterator[File]:
    """Yield every file once, in order, hidden ones and those in `own_folder` left out.

    Raises ValueError for a path that matches nothing.
    """
    listed: set[str] = set()
    for path in paths:
        is_found = False
        path = path.removeprefix("file://")
        match = _match_remote if "://" in path else _match_local
        for file in match(path, own_folder):
            is_found = True
            if file.source not in listed:
                listed.add(file.source)
                yield file
        if not is_found:
            raise ValueError(
                f"read.paths: {path!r} matches no file; correct the path or glob, or remove it"
            )


def _match_local(pattern: str, own_folder: str) -> Iterator[File]:
    pattern = os.path.abspath(os.path.expanduser(pattern))
    parts = pattern.split("/")
    # glob itself would follow every loop of links under "**".
    depth = parts.index("**") if "**" in parts else len(parts)
    heads, rest = sorted(glob.glob("/".join(parts[:depth]) or "/")), parts[depth:]
    if os.path.lexists(pattern):
        heads, rest = [pattern], []
    for head in heads:
        for file in _walk(head, own_folder):
            if _matches(_parts_below(head, file.path), rest):
                yield file


def _match_remote(uri: str, own_folder: str) -> Iterator[File]:
    base, mark, query = uri.partition("?")
    parts = base.rstrip("/").split("/")
    depth = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    root = "/".join(parts[:depth]) + mark + query
    try:
        filesystem, head = open_uri(root)
        infos = [filesystem.get_file_info(head)]
        if not infos[0].is_file:
            infos = filesystem.get_file_info(
                pafs.FileSelector(head, recursive=True, allow_not_found=True)
            )
    except OSError as error:
        raise ValueError(
            f"read.paths: cannot list {uri!r} ({error}); check the URI and the credentials"
        ) from error
    own = f"{own_folder.partition('?')[0].rstrip('/')}/"
    for info in sorted(infos, key=lambda info: info.path):
        below = _parts_below(head, info.path)
        file = File(info.path, root, info.size or 0, info.mtime_ns or 0)
        is_skipped = file.source.startswith(own) or any(part.startswith(".") for part in below)
        if info.is_file and not is_skipped and _matches(below, parts[depth:]):
            yield file


def _parts_below(head: str, path: str) -> list[str]:
    return [part for part in path.removeprefix(head).split("/") if part]


def _matches(path: list[str], pattern: list[str]) -> bool:
    """Say whether the pattern matches the path or a folder above it."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _walk(root: str, own_folder: str) -> Iterator[File]:
    """Yield the files at or below a local path; linked folders last, so files keep real paths."""
    seen = {os.path.realpath(own_folder): own_folder} if own_folder else {}
    pending, links = [root], []
    while pending or links:
        path = pending.pop() if pending else links.pop(0)
        try:
            info = os.stat(path)
            names = sorted(os.listdir(path), reverse=True) if stat.S_ISDIR(info.st_mode) else None
        except OSError as error:
            reason = "symlink_loop" if error.errno == errno.ELOOP else "unreadable"
            yield File(path, reason=reason, detail=error.strerror or "")
            continue
        if names is None:
            if stat.S_ISREG(info.st_mode):
                yield File(path, "", info.st_size, info.st_mtime_ns)
            else:
                yield File(path, reason="unreadable", detail="not a regular file")
            continue
        real = os.path.realpath(path)
        if os.path.islink(path):
            if f"{os.path.realpath(os.path.dirname(path))}/".startswith(f"{real.rstrip('/')}/"):
                yield File(path, reason="symlink_loop", detail=f"leads back up to {real}")
                continue
            if real in seen:
                yield File(path, reason="duplicate", detail=f"the same folder as {seen[real]}")
        if real not in seen:
            seen[real] = path
            below = [os.path.join(path, name) for name in names if not name.startswith(".")]
            linked = {child for child in below if os.path.islink(child) and os.path.isdir(child)}
            pending += [child for child in below if child not in linked]
            links += sorted(linked)


def read_file(file: File, config: Read) -> Iterator[Document | Rejected]:
    """Yield the file's rows, Rejected where the file or a row cannot be used; raises nothing."""
    limit = config.max_file_mb << 20
    try:
        if file.reason is not None:
            raise Refused(file.reason, file.detail)
        if file.suffix not in SUFFIXES:
            raise Refused(
                "unsupported_type",
                f"extension {file.suffix!r} is none of {', '.join(sorted(SUFFIXES))}",
            )
        with _open(file) as stream:
            if file.suffix not in ROW_SUFFIXES:
                if len(data := stream.read(limit + 1)) > limit:
                    raise Refused("too_large", f"read.max_file_mb = {config.max_file_mb}")
                yield _document(file.source, *parse(data, file.suffix, limit))
                return
            read_rows = _read_parquet if file.suffix == ".parquet" else _read_jsonl
            num_rows = 0
            for row in read_rows(stream, file.source, config):
                num_rows += 1
                yield row
            if not num_rows:
                raise Refused("empty", "no rows")
    except Refused as refused:
        yield _reject(file.source, *refused.args)
    except Exception as error:
        # Damaged files raise a dozen types from zlib, expat, mammoth, bs4, Arrow and pdfium; none
        # may end the run. Arrow reports damage as OSError too, but without an errno.
        is_unreadable = isinstance(error, OSError) and error.errno is not None
        yield _reject(
            file.source,
            "unreadable" if is_unreadable else "broken",
            f"{type(error).__name__}: {error}",
        )


@lru_cache(maxsize=8)
def _filesystem(root: str) -> pafs.FileSystem:
    return open_uri(root)[0]


def _open(file: File) -> BinaryIO:
    if not file.root:
        return open(file.path, "rb", buffering=1 << 20)
    return io.BufferedReader(cast(Any, _filesystem(file.root).open_input_file(file.path)), 1 << 20)


def _reject(source: str, reason: REASONS, detail: str) -> Rejected:
    return Rejected("read", _clean(source), reason, _clean(detail)[:300])


def _clean(text: str) -> str:
    """Normalise newlines; remove a BOM, NULs, and lone surrogates, which Arrow cannot take."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").removeprefix("\ufeff")
    return SURROGATE.sub("\ufffd", text)


def _document(source: str, title: str, text: str) -> Document | Rejected:
    title, text = " ".join(_clean(title).split()), _clean(text)
    if not text.strip():
        return _reject(source, "empty", "no text")
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
    found = (
        FRONT_MATTER_TITLE.match(_clean(text)[:4096]) if suffix in (".md", ".markdown") else None
    )
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
    # pdfium refuses a file without pages and leaves its last error as it was, from whichever file
    # that came; failing to open a file without a name puts a value there that bytes cannot.
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
        pages = []
        for number in range(len(pdf)):
            page = pdf[number]
            text_page = page.get_textpage()
            # U+FFFE is pdfium's mark for a hyphen that broke a word at the end of a line.
            pages.append(text_page.get_text_range().replace("\ufffe", "").strip())
            text_page.close()
            page.close()
        return Parsed(pdf.get_metadata_value("Title"), "\n\n".join(filter(None, pages)))


def _lines(stream: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Yield the lines; None for one of more than `limit` bytes, which is never held whole."""
    while line := stream.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        while (more := stream.readline(limit)) and not more.endswith(b"\n"):
            pass
        yield None


def _read_jsonl(stream: BinaryIO, source: str, config: Read) -> Iterator[Document | Rejected]:
    for number, line in enumerate(_lines(stream, config.max_file_mb << 20), 1):
        try:
            if line is None:
                raise Refused("too_large", f"read.max_file_mb = {config.max_file_mb}")
            if text := _decode(line).strip():
                yield _row(f"{source}#{number}", json.loads(text), config)
        except Refused as refused:
            yield _reject(f"{source}#{number}", *refused.args)
        except (ValueError, RecursionError) as error:
            yield _reject(f"{source}#{number}", "broken", str(error))


def _row(source: str, row: object, config: Read) -> Document | Rejected:
    if not isinstance(row, dict) or not isinstance(text := row.get(config.text_field), str):
        return _reject(
            source, "no_text_field", f"no string in field {config.text_field!r} (read.text_field)"
        )
    title = row.get(config.title_field)
    return _document(source, title if isinstance(title, str) else "", text)


def _read_parquet(stream: BinaryIO, source: str, config: Read) -> Iterator[Document | Rejected]:
    parquet = pq.ParquetFile(stream, pre_buffer=False)
    names = parquet.schema_arrow.names
    if config.text_field not in names:
        raise Refused(
            "no_text_field", f"no column {config.text_field!r} (read.text_field) in {names}"
        )
    columns = [name for name in (config.text_field, config.title_field) if name in names]
    number = 0
    for batch in parquet.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
        for cells in zip(*batch.columns, strict=True):
            number += 1
            try:
                row = dict(zip(batch.schema.names, (cell.as_py() for cell in cells), strict=True))
            except UnicodeDecodeError as error:
                yield _reject(f"{source}#{number}", "not_utf8", str(error))
                continue
            text = row.get(config.text_field)
            if isinstance(text, str) and len(text.encode()) > config.max_file_mb << 20:
                yield _reject(
                    f"{source}#{number}", "too_large", f"read.max_file_mb = {config.max_file_mb}"
                )
            else:
                yield _row(f"{source}#{number}", row, config)


def _to_tables(documents: Iterable[Document]) -> Iterator[pa.Table]:
    shard: list[Record] = []
    num_chars = 0
    for document in documents:
        shard.append(document)
        num_chars += len(document.text)
        if len(shard) == SHARD_ROWS or num_chars >= SHARD_CHARS:
            yield to_table(shard, DOCUMENT)
            shard, num_chars = [], 0
    if shard:
        yield to_table(shard, DOCUMENT)


class ReadWorker:
    """Parses the files of a unit."""

    def __init__(self, run_dir: str, config: Read) -> None:
        self._stage = Stage(run_dir, "read", DOCUMENT)
        self._config = config

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        files = [File(**file) for file in unit["files"]]
        rejected: list[Rejected] = []
        num_rows = 0
        # `commit` wants the number of rows first, and only reading tells it: rows wait on disk.
        with tempfile.TemporaryFile() as spool:
            with pa.ipc.new_stream(
                spool, DOCUMENT, options=pa.ipc.IpcWriteOptions(compression="zstd")
            ) as writer:
                for table in _to_tables(self._documents(files, rejected)):
                    num_rows += table.num_rows
                    writer.write_table(table)
            spool.seek(0)
            tables = (pa.Table.from_batches([batch]) for batch in pa.ipc.open_stream(spool))
            stats: dict[str, float] = {
                "files": len(files),
                "bytes_read": sum(f.size for f in files),
            }
            return self._stage.commit(
                unit["name"], tables, rejected, num_rows + len(rejected), stats
            )

    def _documents(self, files: list[File], rejected: list[Rejected]) -> Iterator[Document]:
        for file in files:
            for item in read_file(file, self._config):
                if isinstance(item, Rejected):
                    rejected.append(item)
                else:
                    yield item


class DedupWorker:
    """Copies a shard of `read` without the rows that the driver found to be duplicates."""

    def __init__(self, run_dir: str) -> None:
        self._input = Stage(run_dir, "read", DOCUMENT)
        self._stage = Stage(run_dir, "dedup", DOCUMENT)

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        table = self._input.read_shard(unit["shard"])
        keep = np.ones(table.num_rows, dtype=bool)
        rejected = []
        for row, reason, source in unit["drop"]:
            keep[row] = False
            record_id = table["source"][row].as_py()
            rejected.append(Rejected("dedup", record_id, reason, f"kept: {source}"))
        kept = table.filter(pa.array(keep))
        return self._stage.commit(unit["name"], [kept], rejected, table.num_rows)


def _plan_dedup(run_dir: str, threshold: float | None) -> Iterator[dict[str, Any]]:
    """Yield a unit per shard of `read`: its rows to drop, each with the source kept instead."""
    stage = Stage(run_dir, "read", DOCUMENT)
    shards = stage.shards()
    if not shards:
        return
    columns = [stage.read_shard(shard, ["doc_id"])["doc_id"] for shard in shards]
    starts = np.cumsum([0, *(len(column) for column in columns)])
    ids = pa.chunked_array([chunk for column in columns for chunk in column.chunks]).cast(
        pa.large_string()
    )
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.unique(codes, return_index=True)[1][codes]  # [row] -> first row with this id
    rows = np.arange(len(first))
    near = rows if threshold is None else _match_near(run_dir, shards, first == rows, threshold)
    kept = near[first]  # [row] -> the row that stays in its place
    spans = list(zip(starts, starts[1:], shards, strict=False))
    targets = np.unique(kept[kept != rows])
    sources: dict[int, str] = {}
    for start, end, shard in spans:
        if len(wanted := targets[(targets >= start) & (targets < end)]):
            column = stage.read_shard(shard, ["source"])["source"]
            sources.update((int(row), column[int(row - start)].as_py()) for row in wanted)
    for number, (start, end, shard) in enumerate(spans):
        drop = []
        for row in start + np.flatnonzero(kept[start:end] != rows[start:end]):
            reason = "duplicate" if first[row] != row else "near_duplicate"
            drop.append([int(row - start), reason, sources[int(kept[row])]])
        yield {"name": f"{number:06d}", "shard": shard, "drop": drop}


def _match_near(
    run_dir: str, shards: list[str], is_first: np.ndarray, threshold: float
) -> np.ndarray:
    """Return for each row the earlier, kept row that it nearly repeats, or itself."""
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    kept: dict[int, LeanMinHash] = {}
    near = np.arange(len(is_first))
    tasks = [ray.remote(_sign_shard).remote(run_dir, shard) for shard in shards]
    signatures = (signature for task in tasks for signature in ray.get(task))
    for row, signature in enumerate(signatures):
        if not is_first[row]:
            continue
        found = (cast(int, other) for other in index.query(signature))
        same = [other for other in found if signature.jaccard(kept[other]) >= threshold]
        if same:
            near[row] = min(same)
        else:
            kept[row] = signature
            index.insert(row, signature)
    return near


def _sign_shard(run_dir: str, shard: str) -> list[LeanMinHash]:
    table = Stage(run_dir, "read", DOCUMENT).read_shard(shard, ["text"])
    return [sign(text) for text in table["text"].to_pylist()]


def sign(text: str) -> LeanMinHash:
    """Return the MinHash of the text's word 5-grams; an unspaced script's character is a word."""
    words = WORD.findall(text.casefold()) or [text]
    minhash = MinHash(num_perm=PERMUTATIONS)
    num_shingles = max(1, len(words) - SHINGLE_WORDS + 1)
    for start in range(0, num_shingles, HASH_BATCH):
        positions = range(start, min(start + HASH_BATCH, num_shingles))
        minhash.update_batch(" ".join(words[i : i + SHINGLE_WORDS]).encode() for i in positions)
    return LeanMinHash(minhash)


def _plan_read(files: Iterable[File], unit_files: int) -> tuple[list[dict[str, Any]], str]:
    """Return the units and a digest of the listing."""
    units: list[dict[str, Any]] = []
    listing, unit_bytes = "", UNIT_BYTES
    for file in files:
        if unit_bytes >= UNIT_BYTES or len(units[-1]["files"]) == unit_files:
            units.append({"name": f"{len(units):06d}", "files": []})
            unit_bytes = 0
        units[-1]["files"].append(asdict(file))
        unit_bytes += file.size
        listing = digest(listing, file.source, file.size, file.changed, file.reason)
    return units, listing


def read_documents(
    run_dir: str, config: Read, max_reject_share: float, redo: bool = False
) -> dict[str, dict[str, Any]]:
    """Run the stages `read` and `dedup`; return their manifests.

    Raises ValueError for a path that matches nothing and for whatever `run_stage` refuses.
    """
    units, listing = _plan_read(list_files(config.paths, run_dir), config.unit_files)
    actors = Actors(count=max(1, int(ray.cluster_resources().get("CPU", 1))))
    read = run_stage(
        Stage(run_dir, "read", DOCUMENT),
        config.model_dump(exclude={"paths", "near_duplicate_threshold"}) | {"listing": listing},
        units,
        ReadWorker,
        {"run_dir": run_dir, "config": config},
        actors,
        max_reject_share,
        redo,
    )
    threshold = config.near_duplicate_threshold
    dedup = run_stage(
        Stage(run_dir, "dedup", DOCUMENT),
        {"input": read["data_digest"], "near_duplicate_threshold": threshold},
        _plan_dedup(run_dir, threshold),
        DedupWorker,
        {"run_dir": run_dir},
        actors,
        max_reject_share,
        redo,
    )
    return {"read": read, "dedup": dedup}
