"""Documents -> Documents, each distinct text once; near-duplicates go too where a threshold is set.

In: the stage `read`. Out: the stage `dedup`. The driver compares ids and, for near-duplicates, MinHash
signatures; text stays in the workers. Of several equals the first in order stays.
"""

import re
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pyarrow as pa
from datasketch import LeanMinHash, MinHash, MinHashLSH

from pipeline.config import Cluster
from pipeline.schema import DOCUMENT, Rejected
from pipeline.stage import Actors, Job, run_stage
from pipeline.store import Stage, Unit

# Scripts that put no spaces between words, their punctuation, and emoji.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U0001f000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
SHINGLE_WORDS = 5
PERMUTATIONS = 128
HASH_BATCH = 8192  # shingles hashed together: 8 MB per temporary array of datasketch


def drop_duplicates(run_dir: str, threshold: float | None, cluster: Cluster, redo: bool = False) -> dict[str, Any]:
    """Run the stage `dedup` and return its manifest; ValueError if `read` is not complete."""
    job = Job(
        Stage(run_dir, "dedup", DOCUMENT),
        {
            "input": Stage(run_dir, "read", DOCUMENT).require()["data_digest"],
            "near_duplicate_threshold": threshold,
        },
        plan_units(run_dir, threshold),
        DedupWorker,
        {"run_dir": run_dir},  # without a limit on rejects: a corpus of many duplicates is no fault
    )
    return run_stage(job, Actors(cluster), redo)


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
            rejected.append(Rejected("dedup", table["source"][row].as_py(), reason, f"kept: {source}"))
        return self._stage.commit(unit["name"], [table.filter(pa.array(keep))], rejected, table.num_rows)


def plan_units(run_dir: str, threshold: float | None) -> Iterator[dict[str, Any]]:
    """Yield a unit per shard of `read`: its rows to drop, each with the source of the row kept instead."""
    stage = Stage(run_dir, "read", DOCUMENT)
    shards = stage.shards()
    columns = [stage.read_shard(shard, ["doc_id"])["doc_id"] for shard in shards]
    starts = np.cumsum([0, *map(len, columns)])
    # Large strings: the ids of 67 million documents pass the 2 GiB that one array of strings can hold.
    ids = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
    codes = ids.cast(pa.large_string()).combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.unique(codes, return_index=True)[1][codes]  # [row] -> first row with this id
    rows = np.arange(len(first))
    near = rows if threshold is None else _match_near(run_dir, shards, first == rows, threshold)
    kept = near[first]  # [row] -> the row that stays in its place
    spans = list(zip(shards, starts, starts[1:], strict=False))
    stays = np.unique(kept[kept != rows])
    sources: dict[int, str] = {}
    for shard, start, end in spans:
        if len(here := stays[(stays >= start) & (stays < end)]):
            column = stage.read_shard(shard, ["source"])["source"]
            sources.update(zip(here.tolist(), column.take(here - start).to_pylist(), strict=True))
    for number, (shard, start, end) in enumerate(spans):
        drop = [
            [
                int(row - start),
                "near_duplicate" if first[row] == row else "duplicate",
                sources[int(kept[row])],
            ]
            for row in start + np.flatnonzero(kept[start:end] != rows[start:end])
        ]
        yield {"name": f"{number:06d}", "shard": shard, "drop": drop}


def _match_near(run_dir: str, shards: list[str], is_first: np.ndarray, threshold: float) -> np.ndarray:
    """Return for each row the earlier, kept row that it nearly repeats, or itself."""
    import ray

    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    kept: dict[int, LeanMinHash] = {}
    near = np.arange(len(is_first))
    tasks = [ray.remote(_sign_shard).remote(run_dir, shard) for shard in shards]
    signatures = (signature for task in tasks for signature in ray.get(task))
    for row, signature in enumerate(signatures):
        if not is_first[row]:
            continue
        found = (cast(int, other) for other in index.query(signature))
        if same := [other for other in found if signature.jaccard(kept[other]) >= threshold]:
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
