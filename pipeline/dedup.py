"""Documents -> Documents, each distinct text once; near-duplicates go too where a threshold is set.

In: the stage `read`. Out: the stage `dedup`. The driver compares ids, a part of them at a time; text stays in the
workers. Of several equals the first in order stays. Near-duplicates need the MinHash signatures of all documents in the
driver's memory, about 4 KB each: that is for corpora of up to some hundred thousand.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from datasketch import LeanMinHash, MinHash, MinHashLSH

from pipeline.config import Config
from pipeline.schema import Rejected
from pipeline.stage import Job
from pipeline.store import Stage, Unit
from pipeline.text import UNSPACED

WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
SHINGLE_WORDS = 5
PERMUTATIONS = 128
PART_ROWS = 1 << 15  # of which the driver holds the ids at a time, in about 3 MB
MAX_PARTS = 256  # files that are open at a time
HASH_BATCH = 8192  # shingles hashed together: 8 MB per temporary array of datasketch


def dedup_job(config: Config) -> Job:
    """Describe the stage; it needs the complete stage `read`."""
    run_dir, threshold = config.run_dir, config.read.near_duplicate_threshold
    return Job(
        Stage(run_dir, "dedup"),
        {
            "input": Stage(run_dir, "read").require()["data_digest"],
            "near_duplicate_threshold": threshold,
        },
        plan_units(run_dir, threshold),
        DedupWorker,
        {"run_dir": run_dir},  # without a limit on rejects: a corpus of many duplicates is no fault
    )


class DedupWorker:
    """Copies a shard of `read` without the rows that the driver found to be duplicates."""

    def __init__(self, run_dir: str) -> None:
        self._input = Stage(run_dir, "read")
        self._stage = Stage(run_dir, "dedup")

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
    stage = Stage(run_dir, "read")
    shards = stage.shards()
    starts, copies = _find_copies(stage, shards)
    near = np.empty((0, 2), np.int64) if threshold is None else _find_near(run_dir, shards, copies[:, 0], threshold)
    # A copy of a near-duplicate gives way to the row that this one gives way to.
    index = np.searchsorted(near[:, 0], copies[:, 1])
    is_near = np.isin(copies[:, 1], near[:, 0])
    copies[is_near, 1] = near[index[is_near], 1]
    dropped = np.concatenate([copies, near])
    reasons = np.repeat(["duplicate", "near_duplicate"], [len(copies), len(near)])
    order = np.argsort(dropped[:, 0])
    dropped, reasons = dropped[order], reasons[order]
    sources: dict[int, str] = {}
    stays = np.unique(dropped[:, 1])
    for shard, start, here in zip(shards, starts, _split_rows(stays, starts), strict=False):
        if len(here):
            column = stage.read_shard(shard, ["source"])["source"]
            sources.update(zip(here.tolist(), column.take(here - start).to_pylist(), strict=True))
    ends = np.searchsorted(dropped[:, 0], starts)
    for number, (shard, start) in enumerate(zip(shards, starts, strict=False)):
        here = slice(ends[number], ends[number + 1])
        drop = [
            [int(row - start), str(reason), sources[int(kept)]]
            for (row, kept), reason in zip(dropped[here], reasons[here], strict=True)
        ]
        yield {"name": f"{number:06d}", "shard": shard, "drop": drop}


def _split_rows(rows: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, np.searchsorted(rows, starts[1:-1]))


def _find_copies(stage: Stage, shards: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of every shard, and all rows with an earlier row's id: [copies, (row, first row)].

    The ids are parted into files by some of their bits, so that no two parts share one, and compared part by part.
    """
    num_parts = min(MAX_PARTS, 1 + stage.require()["rows_out"] // PART_ROWS)
    starts, copies = [0], [np.empty((0, 2), np.int64)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        parts = [stack.enter_context(Path(folder, str(number)).open("w+b")) for number in range(num_parts)]
        for shard in shards:
            ids = stage.read_shard(shard, ["doc_id"])["doc_id"].to_pylist()
            words = np.frombuffer(bytes.fromhex("".join(ids)), np.int64).reshape(-1, 2)
            rows = np.column_stack([words, np.arange(starts[-1], starts[-1] + len(ids))])  # [rows, (id, id, row)]
            starts.append(starts[-1] + len(ids))
            for number, part in enumerate(parts):
                part.write(rows[words[:, 0] % num_parts == number].tobytes())
        for part in parts:
            part.seek(0)
            rows = np.frombuffer(part.read(), np.int64).reshape(-1, 3)
            rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
            is_copy = np.append(False, (rows[1:, :2] == rows[:-1, :2]).all(axis=1))[: len(rows)]
            first = np.maximum.accumulate(np.where(is_copy, 0, np.arange(len(rows))))
            copies.append(np.column_stack([rows[:, 2], rows[first, 2]])[is_copy])
    found = np.concatenate(copies)
    return np.array(starts), found[np.argsort(found[:, 0])]


def _find_near(run_dir: str, shards: list[str], copies: np.ndarray, threshold: float) -> np.ndarray:
    """Return the rows, copies left out, that nearly repeat an earlier, kept one: [rows, (row, kept row)]."""
    import ray

    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    kept: dict[int, LeanMinHash] = {}
    near, left_out = [], set(copies.tolist())
    tasks = [ray.remote(_sign_shard).remote(run_dir, shard) for shard in shards]
    signatures = (signature for task in tasks for signature in ray.get(task))
    for row, signature in enumerate(signatures):
        if row in left_out:
            continue
        found = (cast(int, other) for other in index.query(signature))
        if same := [other for other in found if signature.jaccard(kept[other]) >= threshold]:
            near.append((row, min(same)))
        else:
            kept[row] = signature
            index.insert(row, signature)
    return np.array(near, np.int64).reshape(-1, 2)


def _sign_shard(run_dir: str, shard: str) -> list[LeanMinHash]:
    table = Stage(run_dir, "read").read_shard(shard, ["text"])
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
