"""Files, folders, globs and bucket URIs -> Documents, each distinct text once.

In: `config.Read`. Out: the stages `read` (all that could be parsed) and `dedup` (that without duplicates).
The driver lists files; text stays in the workers. What cannot be read is Rejected, and the run goes on.
"""

import errno
import glob
import io
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import PurePath
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.config import Config, Read
from pipeline.dedup import dedup_job
from pipeline.parse import SUFFIXES, parse_file, reject
from pipeline.schema import DOCUMENT, REASONS, Document, Rejected, digest, to_table
from pipeline.stage import Actors, Job, run_alike
from pipeline.store import Stage, Unit, open_uri

UNIT_BYTES = 256 << 20  # a unit ends here even with fewer files: it is what a crash repeats
SHARD_ROWS = 1000
SHARD_CHARS = 16 << 20


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


def read_documents(configs: list[Config], redo: bool = False) -> list[Any]:
    """Run the stages `read` and `dedup` of several corpora; return for each their manifests, or the ValueError.

    It is an error if a path matches nothing, and whatever `run_stages` refuses.
    """
    actors = Actors(configs[0].cluster)
    read = run_alike([partial(read_job, config) for config in configs], actors, redo)

    def deduplicate(config: Config, outcome: Any) -> Job:
        if isinstance(outcome, ValueError):
            raise outcome
        return dedup_job(config)

    made = [partial(deduplicate, *pair) for pair in zip(configs, read, strict=True)]
    deduped = run_alike(made, actors, redo)
    return [
        last if isinstance(last, ValueError) else {"read": first, "dedup": last}
        for first, last in zip(read, deduped, strict=True)
    ]


def read_job(config: Config) -> Job:
    """Describe the stage `read`."""
    settings, listing = config.read, ""
    own = (config.run_dir, config.update.previous_run, config.publish.registry)
    files = list_files(settings.paths, [folder for folder in own if folder])
    for file in files:
        listing = digest(listing, file.source, file.size, file.changed, file.reason)
    return Job(
        Stage(config.run_dir, "read"),
        settings.model_dump(exclude={"paths", "near_duplicate_threshold"}) | {"listing": listing},
        _plan_units(files, settings.unit_files),
        ReadWorker,
        {"run_dir": config.run_dir, "config": settings},
        config.max_reject_share,
    )


def _plan_units(files: Iterable[File], unit_files: int) -> Iterator[dict[str, Any]]:
    number, unit, unit_bytes = 0, [], 0
    for file in files:
        if unit and (unit_bytes >= UNIT_BYTES or len(unit) == unit_files):
            yield {"name": f"{number:06d}", "files": unit}
            number, unit, unit_bytes = number + 1, [], 0
        unit.append(asdict(file))
        unit_bytes += file.size
    if unit:
        yield {"name": f"{number:06d}", "files": unit}


class ReadWorker:
    """Parses the files of a unit."""

    def __init__(self, run_dir: str, config: Read) -> None:
        self._stage = Stage(run_dir, "read")
        self._config = config

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        files = [File(**file) for file in unit["files"]]
        rejected: list[Rejected] = []
        num_rows = 0

        def documents() -> Iterator[Document]:
            nonlocal num_rows
            for file in files:
                for row in read_file(file, self._config):
                    num_rows += 1
                    if isinstance(row, Document):
                        yield row
                    else:
                        rejected.append(row)

        stats: dict[str, float] = {"files": len(files), "bytes_read": sum(file.size for file in files)}
        return self._stage.commit(unit["name"], _to_tables(documents()), rejected, lambda: num_rows, stats)


def _to_tables(documents: Iterable[Document]) -> Iterator[pa.Table]:
    shard: list[Document] = []
    num_chars = 0
    for document in documents:
        shard.append(document)
        num_chars += len(document.text)
        if len(shard) == SHARD_ROWS or num_chars >= SHARD_CHARS:
            yield to_table(shard, DOCUMENT)
            shard, num_chars = [], 0
    yield to_table(shard, DOCUMENT)


def read_file(file: File, config: Read) -> Iterator[Document | Rejected]:
    """Yield the file's rows, Rejected where the file or a row cannot be used; raises nothing."""
    suffix = os.path.splitext(file.path)[1].lower()
    if file.reason is not None:
        yield reject(file.source, file.reason, file.detail)
    elif suffix not in SUFFIXES:
        detail = f"extension {suffix!r} is none of {', '.join(sorted(SUFFIXES))}"
        yield reject(file.source, "unsupported_type", detail)
    else:
        try:
            with _open(file) as stream:
                yield from parse_file(stream, file.source, suffix, config)
        except OSError as error:
            yield reject(file.source, "unreadable", f"{type(error).__name__}: {error}")


def _open(file: File) -> BinaryIO:
    if not file.root:
        return open(file.path, "rb", buffering=1 << 20)
    return io.BufferedReader(cast(Any, open_uri(file.root)[0].open_input_file(file.path)), 1 << 20)


def list_files(paths: list[str], own_folders: Sequence[str] = ()) -> list[File]:
    """Return every file once, without hidden ones and `own_folders`; ValueError if a path matches nothing."""
    listed: dict[str, File] = {}
    for path in paths:
        path = path.removeprefix("file://")
        files = list((_match_remote if "://" in path else _match_local)(path, own_folders))
        if not files:
            raise ValueError(f"read.paths: {path!r} matches no file; correct the path or glob, or remove it")
        listed |= {file.source: file for file in files}
    return list(listed.values())


def _match_remote(uri: str, own_folders: Sequence[str]) -> Iterator[File]:
    base, mark, query = uri.partition("?")
    parts = base.rstrip("/").split("/")
    depth = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    root = "/".join(parts[:depth]) + mark + query
    try:
        filesystem, head = open_uri(root)
        infos = [filesystem.get_file_info(head)]
        if not infos[0].is_file:
            infos = filesystem.get_file_info(pafs.FileSelector(head, recursive=True, allow_not_found=True))
    except OSError as error:
        raise ValueError(f"read.paths: cannot list {uri!r} ({error}); check URI and credentials") from error
    own = tuple(f"{open_uri(folder)[1]}/" for folder in own_folders if "://" in folder)
    for info in sorted(infos, key=lambda info: info.path):
        below = PurePath(info.path).relative_to(head).parts
        is_skipped = any(part.startswith(".") for part in below) or info.path.startswith(own)
        if info.is_file and not is_skipped and _matches(below, parts[depth:]):
            yield File(info.path, root, info.size or 0, info.mtime_ns or 0)


def _match_local(pattern: str, own_folders: Sequence[str]) -> Iterator[File]:
    pattern = os.path.abspath(os.path.expanduser(pattern))
    parts = pattern.split("/")
    # glob itself would follow every loop of links under "**".
    depth = parts.index("**") if "**" in parts else len(parts)
    heads, rest = sorted(glob.glob("/".join(parts[:depth]) or "/")), parts[depth:]
    if os.path.lexists(pattern):
        heads, rest = [pattern], []
    for head in heads:
        for file in _walk(head, own_folders):
            if _matches(PurePath(file.path).relative_to(head).parts, rest):
                yield file


def _matches(path: tuple[str, ...], pattern: list[str]) -> bool:
    """Say whether the pattern matches the path or a folder above it."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _walk(root: str, own_folders: Sequence[str]) -> Iterator[File]:
    """Yield the files at or below a local path; linked folders last, so that files keep their real paths."""
    seen = {os.path.realpath(os.path.expanduser(folder)): folder for folder in own_folders}
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
        real, is_link = os.path.realpath(path), os.path.islink(path)
        if stat.S_ISREG(info.st_mode):
            yield File(path, "", info.st_size, info.st_mtime_ns)
        elif names is None:
            yield File(path, reason="unreadable", detail="not a regular file")
        elif is_link and os.path.commonpath([real, os.path.realpath(os.path.dirname(path))]) == real:
            yield File(path, reason="symlink_loop", detail=f"leads back up to {real}")
        elif real not in seen:
            seen[real] = path
            below = [os.path.join(path, name) for name in names if not name.startswith(".")]
            linked = {child for child in below if os.path.islink(child) and os.path.isdir(child)}
            pending += [child for child in below if child not in linked]
            links += sorted(linked)
        elif is_link:
            yield File(path, reason="duplicate", detail=f"the same folder as {seen[real]}")
