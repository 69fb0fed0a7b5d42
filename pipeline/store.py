"""The run directory: what stands at a border between two stages, on a local disk or in a bucket.

In: tables of one unit of work. Out: Parquet shards, one JSON file per committed unit, and a manifest per stage, last.
A unit's shards appear before its JSON file and the manifest after every unit, so what is not listed does not exist:
a killed run redoes the units without a JSON file and touches no other.

    RUN/config.json                          the resolved config of the last call
    RUN/<stage>/settings.json                what the stage was begun with
    RUN/<stage>/data/<unit>-<n>.parquet      rows
    RUN/<stage>/rejected/<unit>.parquet      rejected rows of the unit, if any
    RUN/<stage>/units/<unit>.json            counts and shard names: the unit is committed
    RUN/<stage>/progress/<unit>.json         how many requests an engine has finished for a unit
    RUN/<stage>/manifest.json                settings, inputs and totals: the stage is complete
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_random_exponential

from pipeline.schema import REJECTED, ROWS, Rejected, digest, to_table

FORMAT = 1  # of a run directory; raise it when a folder that older code wrote cannot be gone on with
LINE = ("chunk", "question", "answer", "filter", "train", "evaluate")  # each made from what stands before it
PROGRESS_S = 5.0  # between two reports of work that takes long
READERS = 16  # requests for units' JSON at a time: a bucket takes tens of milliseconds for each
SPLIT = "topk_logprobs.list.element"  # Parquet's name of the column that takes the most room


# A bucket's client tries again by itself, but not after every failure, such as an answer that broke off. Its errors
# have no number; those of a local disk have one, and stay.
_again = retry(
    retry=retry_if_exception(lambda error: isinstance(error, OSError) and error.errno is None),
    wait=wait_random_exponential(max=10),
    stop=stop_after_attempt(5),
    reraise=True,
)


@lru_cache(maxsize=256)
def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem and the path on it of a local path or an s3:// or gs:// URI; else ValueError."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if uri.startswith("s3://") and "allow_delayed_open=" not in uri:
        # Up to 5 MB in one request instead of three, and no half of an upload is left by a writer that was killed.
        uri += ("&" if "?" in uri else "?") + "allow_delayed_open=true"
    try:
        return pafs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri!r} is no usable URI ({error}); give a local path, s3:// or gs://") from error


@dataclass(frozen=True)
class Unit:
    """A committed unit of work: `rows_in` = `rows_out` + the sum of `rejected`, unless one row makes several."""

    name: str
    rows_in: int
    rows_out: int
    rejected: dict[str, int]
    shards: list[str]
    bytes: int
    stats: dict[str, float] = field(default_factory=dict)  # added up over the units of a stage
    digest: str = ""  # of the shards' bytes


@dataclass(frozen=True)
class Folder:
    """A folder on any filesystem, with writes that appear whole or not at all."""

    uri: str

    def __str__(self) -> str:
        """The URI as a message may show it: without credentials and parameters."""
        return re.sub(r"(?<=://)[^/]*@", "", self.uri.partition("?")[0])

    @property
    def name(self) -> str:
        return str(self).rstrip("/").rpartition("/")[2]

    def __truediv__(self, name: str) -> "Folder":
        base, query, parameters = self.uri.partition("?")
        return Folder(f"{base.rstrip('/')}/{name}{query}{parameters}")

    def try_to_write(self) -> None:
        """Write a file, read it and delete it; OSError if that cannot be done here."""
        name = f"check-{uuid.uuid4().hex}"
        self.write_bytes(name, b"check")
        if self.read_bytes(name) != b"check":
            raise OSError("it does not give back what was written")
        self.delete_file(name)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the folder for the block or until this process dies; ValueError if another one holds it.

        Buckets cannot be held, nor every network disk, nor what cannot be written: there nothing is checked.
        """
        filesystem, path = open_uri(self.uri)
        with contextlib.ExitStack() as held:
            if isinstance(filesystem, pafs.LocalFileSystem):
                try:
                    filesystem.create_dir(path)
                    folder = os.open(path, os.O_RDONLY)
                    held.callback(os.close, folder)
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(
                        f"{self} is being worked on by another process; wait until it ends, or stop it"
                    ) from None
                except OSError:
                    pass
            yield

    @_again
    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a file that appears whole or not at all: moved into place on a disk, uploaded at once to a bucket."""
        filesystem, path = open_uri(self.uri)
        if not isinstance(filesystem, pafs.LocalFileSystem):
            with filesystem.open_output_stream(f"{path}/{name}") as stream:
                stream.write(data)
            return
        os.makedirs(path, exist_ok=True)
        unfinished = Path(path, f".{name}.{uuid.uuid4().hex}")
        try:
            unfinished.write_bytes(data)
            unfinished.replace(f"{path}/{name}")
        finally:
            unfinished.unlink(missing_ok=True)

    @_again
    def read_bytes(self, name: str) -> bytes:
        filesystem, path = open_uri(self.uri)
        with filesystem.open_input_stream(f"{path}/{name}") as stream:
            return stream.read()

    @_again
    def size(self, name: str) -> int:
        """Return a file's size in bytes; FileNotFoundError if there is none."""
        filesystem, path = open_uri(self.uri)
        info = filesystem.get_file_info(f"{path}/{name}")
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(errno.ENOENT, "no such file", f"{self}/{name}")
        return info.size

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """Return the parsed file, or None where there is none."""
        try:
            return json.loads(self.read_bytes(name))
        except FileNotFoundError:
            return None

    @_again
    def folders(self) -> list[str]:
        """Return the sorted names of the folders in this folder, without hidden ones."""
        filesystem, path = open_uri(self.uri)
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory and i.base_name[0] != ".")

    @_again
    def list(self) -> list[str]:
        """Return the sorted names of the files in this folder, without unfinished ones."""
        filesystem, path = open_uri(self.uri)
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.is_file and not info.base_name.startswith("."))

    def copy_to(self, target: str) -> str:
        """Copy the files to a local folder and return it: vLLM and PEFT read local files only."""
        Path(target).mkdir(parents=True, exist_ok=True)
        for name in self.list():
            Path(target, name).write_bytes(self.read_bytes(name))
        return target

    def delete_file(self, name: str) -> None:
        filesystem, path = open_uri(self.uri)
        filesystem.delete_file(f"{path}/{name}")

    @_again
    def delete(self) -> None:
        filesystem, path = open_uri(self.uri)
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            filesystem.delete_dir(path)


def check_table(table: pa.Table, schema: pa.Schema, where: str) -> None:
    """Raise ValueError unless the table has exactly this schema and no null: Arrow itself would let both pass."""
    if not table.schema.equals(schema):
        raise ValueError(f"{where}: schema is {table.schema}, expected {schema}")
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count:
            raise ValueError(f"{where}: column {name!r} has {column.null_count} nulls")


@dataclass(frozen=True)
class Stage:
    """One stage's folder in a run directory."""

    run_dir: str
    name: str

    @property
    def schema(self) -> pa.Schema:
        """What its rows are; KeyError for a stage without rows."""
        return ROWS[self.name]

    @property
    def folder(self) -> Folder:
        return Folder(self.run_dir) / self.name

    def commit(
        self,
        unit: str,
        tables: Iterable[pa.Table],
        rejected: list[Rejected],
        rows_in: int | Callable[[], int],
        stats: dict[str, float] | None = None,
    ) -> Unit:
        """Write a unit's shards, one per table, then its JSON file; empty tables give no shard.

        `tables` may be a generator, so that a unit larger than memory passes through; `rejected`,
        `stats` and a callable `rows_in` are looked at only after it has ended.
        """
        shards, rows_out, num_bytes, content = [], 0, 0, hashlib.sha256()
        for table in tables:
            if not table.num_rows:
                continue
            name = f"{unit}-{len(shards):05d}.parquet"
            data = self._write(self.folder / "data", name, table, self.schema)
            num_bytes += data.size
            content.update(data)
            rows_out += table.num_rows
            shards.append(name)
        if rejected:
            self._write(self.folder / "rejected", f"{unit}.parquet", to_table(list(rejected), REJECTED), REJECTED)
        reasons = dict(Counter(row.reason for row in rejected))
        rows_in = rows_in() if callable(rows_in) else rows_in
        done = Unit(unit, rows_in, rows_out, reasons, shards, num_bytes, stats or {}, content.hexdigest())
        (self.folder / "units").write_json(f"{unit}.json", asdict(done))
        return done

    def _write(self, folder: Folder, name: str, table: pa.Table, schema: pa.Schema) -> pa.Buffer:
        check_table(table, schema, f"{self.name}/{name}")
        buffer = pa.BufferOutputStream()
        # Bytes of like significance side by side, and no dictionaries: a fifth less than Parquet's defaults.
        encoding = {SPLIT: "BYTE_STREAM_SPLIT"} if SPLIT.partition(".")[0] in schema.names else None
        pq.write_table(
            table, buffer, compression="zstd", compression_level=7, use_dictionary=False, column_encoding=encoding
        )
        data = buffer.getvalue()
        folder.write_bytes(name, data)
        return data

    def committed(self) -> set[str]:
        """Return the names of the committed units, without reading them."""
        return {name.removesuffix(".json") for name in (self.folder / "units").list()}

    def units(self) -> Iterator[Unit]:
        """Yield the committed units in order of their names."""
        folder = self.folder / "units"
        names = folder.list()
        with ThreadPoolExecutor(READERS) as readers:
            for start in range(0, len(names), 4 * READERS):
                for unit in readers.map(folder.read_json, names[start : start + 4 * READERS]):
                    yield Unit(**unit)

    def write_progress(self, unit: str, finished: int, requests: int) -> None:
        """Say how many of its requests for a unit an engine has finished; what cannot be written is left out."""
        folder, name = self.folder / "progress", f"{unit}.json"
        with contextlib.suppress(OSError):
            if finished < requests:
                folder.write_json(name, {"finished": finished, "requests": requests})
            else:
                folder.delete_file(name)

    def read_progress(self) -> dict[str, int]:
        """Return the requests, finished and all, of the units that engines are at; {} if there are none."""
        folder, sums = self.folder / "progress", Counter[str]()
        for name in folder.list():
            sums.update(folder.read_json(name) or {})
        return dict(sums)

    def find_unit(self, name: str) -> Unit | None:
        """Return a unit, or None if it is not committed."""
        found = (self.folder / "units").read_json(f"{name}.json")
        return found and Unit(**found)

    def read_unit(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Return all rows of one committed unit; ValueError if it is not committed."""
        unit = self.find_unit(name)
        if unit is None:
            raise ValueError(f"stage {self.name} in {Folder(self.run_dir)} has no unit {name}; run it first")
        empty = self.schema.empty_table().select(columns or self.schema.names)
        return pa.concat_tables([empty, *(self.read_shard(shard, columns) for shard in unit.shards)])

    def shards(self) -> list[str]:
        """Return the names of the committed shards, in order."""
        return [shard for unit in self.units() for shard in unit.shards]

    def texts(self) -> Iterator[str]:
        """Yield the text of every row, a shard in memory at a time."""
        for shard in self.shards():
            yield from self.read_shard(shard, ["text"])["text"].to_pylist()

    @_again
    def read_shard(self, name: str, columns: list[str] | None = None) -> pa.Table:
        filesystem, path = open_uri((self.folder / "data").uri)
        # pq.read_table does the same with two requests more, in three times the time.
        with filesystem.open_input_file(f"{path}/{name}") as file:
            return pq.ParquetFile(file, pre_buffer=True).read(columns)

    def read_rejected(self) -> pa.Table:
        folder = self.folder / "rejected"
        # By unit: a call that was killed may have left a file that no unit speaks of.
        names = [f"{unit.name}.parquet" for unit in self.units() if unit.rejected]
        tables = [pq.read_table(pa.BufferReader(folder.read_bytes(name))) for name in names]
        return pa.concat_tables([REJECTED.empty_table(), *tables])

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest of the complete stage, or None."""
        return self.folder.read_json("manifest.json")

    def require(self) -> dict[str, Any]:
        """Return the manifest; ValueError if the stage is not complete."""
        manifest = self.manifest()
        if manifest is None:
            raise ValueError(f"stage {self.name} in {Folder(self.run_dir)} is not complete; run it first")
        return manifest

    def open(self, settings: dict[str, Any], redo: bool = False) -> bool:
        """Prepare the stage for work with these settings; return False if it is already complete with them.

        `settings` holds all that decides the stage's rows, its inputs' digests included. Raises ValueError that names
        the differing setting if the folder was begun with others; with `redo` it is emptied instead.
        """
        begun, settings = self.folder.read_json("settings.json"), _as_json(settings)
        if begun is not None and begun != settings:
            if not redo:
                raise ValueError(
                    f"stage {self.name} in {Folder(self.run_dir)} was made with other settings: "
                    f"{'; '.join(_differences(begun, settings))}. Restore them, choose another run_dir, or pass --redo"
                )
            self._empty()
        if begun != settings:
            self.folder.write_json("settings.json", settings)
        return self.manifest() is None

    def _empty(self) -> None:
        """Delete all but the settings, which say until then what this was; first what says that something is there."""
        folder = self.folder
        for name in folder.list():
            if name != "settings.json":
                folder.delete_file(name)
        for name in sorted(folder.folders(), key="units".__ne__):
            (folder / name).delete()

    def is_complete(self, settings: dict[str, Any]) -> bool:
        """Say whether the stage was completed with these settings."""
        manifest = self.manifest()
        return manifest is not None and manifest["settings"] == _as_json(settings)

    def copy_from(self, other: "Stage") -> None:
        """Complete this stage, which is open, with the data of another that is complete and has the same settings."""
        for name in ("data", "rejected", "units"):
            source, target = other.folder / name, self.folder / name
            for file in source.list():
                target.write_bytes(file, source.read_bytes(file))
        self.close(seconds=0.0)

    def totals(self) -> dict[str, Any]:
        """Add up the committed units; `data_digest` is that of the rows so far, or of the settings if there are none.

        So files that were touched, and give the same rows, cost a reading and no writing.
        """
        rows_in = rows_out = num_bytes = 0
        rejected: Counter[str] = Counter()
        stats: Counter[str] = Counter()
        contents: list[str] = []
        for unit in self.units():
            contents += [*unit.shards, unit.digest] if unit.shards else []
            rows_in += unit.rows_in
            rows_out += unit.rows_out
            num_bytes += unit.bytes
            rejected.update(unit.rejected)
            stats.update(unit.stats)
        return {
            "rows_in": rows_in,
            "rows_out": rows_out,
            "rejected": dict(rejected),
            "bytes": num_bytes,
            "stats": dict(stats),
            "data_digest": digest(*(contents or [json.dumps(self.folder.read_json("settings.json"), sort_keys=True)])),
        }

    def close(
        self, seconds: float, extra: dict[str, Any] | None = None, totals: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write the manifest: settings, and the totals over all units, unless they were added up already; return it.

        `seconds` are those of the call that completed the stage.
        """
        manifest = {
            "stage": self.name,
            "settings": self.folder.read_json("settings.json"),
            **(totals or self.totals()),
            "seconds": round(seconds, 3),
            **(extra or {}),
        }
        self.folder.write_json("manifest.json", manifest)
        (self.folder / "progress").delete()
        return manifest


def settings_digest(settings: dict[str, Any]) -> str:
    """What a stage that reads another one's rows depends on, before there are any."""
    return digest(json.dumps({name: value for name, value in settings.items() if name != "format"}, sort_keys=True))


def require_line(run_dir: str, last: str) -> dict[str, dict[str, Any]]:
    """Return the manifests of LINE down to the stage `last`, by name.

    ValueError unless each was made from what the one before it has now: its rows or, begun beside it, its settings.
    """
    manifests = {name: Stage(run_dir, name).require() for name in LINE[: LINE.index(last) + 1]}
    for earlier, later in pairwise(manifests.values()):
        if later["settings"]["input"] not in (earlier["data_digest"], settings_digest(earlier["settings"])):
            raise ValueError(
                f"stage {later['stage']} in {Folder(run_dir)} was made from other rows than stage "
                f"{earlier['stage']} has now; run it again, with --redo"
            )
    return manifests


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({**settings, "format": FORMAT}))


def _differences(begun: Any, wanted: Any, name: str = "") -> Iterator[str]:
    if isinstance(begun, dict) and isinstance(wanted, dict):
        for key in sorted(begun.keys() | wanted.keys()):
            yield from _differences(begun.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif begun != wanted:
        yield f"{name} was {begun!r}, is now {wanted!r}"
