"""Question -> passages of an adapter's own corpus, and question -> the adapter whose corpus answers it best.

In: the passages and the index published with every version. Out: hits in order of their score.
Indexes are copied and loaded on first use, least recently used out first; the routing index holds every live corpus and
is built again when a live version changes.
"""

import shutil
import tempfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from cachetools import LRUCache, cached

from pipeline.retrieve import PASSAGES, Hit, PassageIndex
from serve.registry import Refused, Registry, Version

INDEXES_IN_MEMORY = 64


class Corpora:
    """The corpora of a registry, for one process; its methods block and may be called from several threads."""

    def __init__(self, registry: Registry, max_bytes: int) -> None:
        self._registry = registry
        self._max_bytes = max_bytes
        self._routing = threading.Lock()
        self._passages: dict[Version, pa.Table | None] = {}
        # Who needs an index that is being fetched waits for it; who needs another does not.
        self._index = cached(LRUCache(INDEXES_IN_MEMORY), condition=threading.Condition())(self._load)
        self._routed: frozenset[Version] = frozenset()
        self._routes: PassageIndex | None = None

    def search(self, version: Version, question: str, k: int) -> list[Hit]:
        """Return the k best passages of a version's corpus; Refused with 409 if it was published without them."""
        return self._index(version).search(question, k)

    def _load(self, version: Version) -> PassageIndex:
        folder = self._fetch(version)
        index = PassageIndex.load(folder)
        shutil.rmtree(folder)  # mapped files live on until the index is dropped
        return index

    def route(
        self, question: str, versions: frozenset[Version], allowed: frozenset[str]
    ) -> tuple[Version, float] | None:
        """Return the live version whose best passage fits the question best, and the score; None if none fits."""
        with self._routing:
            if versions != self._routed:
                self._routes, self._routed = self._build_routes(versions), versions
            index = self._routes
        hits = index.search(question, 1, among=("name", allowed)) if index else []
        return next(((Version(hit.passage["name"], hit.passage["version"]), hit.score) for hit in hits), None)

    def _build_routes(self, versions: frozenset[Version]) -> PassageIndex | None:
        known = self._passages
        self._passages = {version: known[version] if version in known else self._read(version) for version in versions}
        tables = [table for _, table in sorted(self._passages.items()) if table is not None]
        return PassageIndex.build(pa.concat_tables(tables)) if tables else None

    def _read(self, version: Version) -> pa.Table | None:
        """Return the passages of a version; None if it was published without: it can be named, not found."""
        try:
            folder = self._fetch(version, {PASSAGES})
        except Refused:
            return None
        passages = pq.read_table(folder / PASSAGES, columns=["heading", "text"])
        shutil.rmtree(folder)
        for column, value in version._asdict().items():
            passages = passages.append_column(column, pa.array([value] * len(passages), pa.string()))
        return passages

    def _fetch(self, version: Version, only: set[str] | None = None) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="passages-"))
        try:
            self._registry.fetch_retrieval(version, folder, self._max_bytes, only)
        except BaseException:
            shutil.rmtree(folder)
            raise
        return folder
