"""How many bytes does a stored answer token take, how fast is it written and read, what does rounding cost the loss?

    python -m benchmarks.store_size CONFIG [KEY=VALUE ...] [--quick] [--name NAME]

The run's stored answers go through the store's own writer again, and through Parquet writers with other options over
the same schema. For the error, and for k = 64, the base model with the passage in its prompt gives exact float32 values
at the same answer tokens; the loss of the closed-book student on these is compared with that on stored float16 ones.
What limits the number: the entropy of ids and log-probabilities. Bytes count whole files, with texts and prompts; a
shard of few answers pays more for its frame.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch

from benchmarks.record import claim, load_written, parse_options, save, spread
from pipeline.align import TeacherPrompts
from pipeline.batch import AnswerData, Sample, pack, rows_in_order, samples_of
from pipeline.config import Config
from pipeline.loss import TopK, answer_losses
from pipeline.schema import ANSWER
from pipeline.store import Stage
from pipeline.student import Student, add_adapter, load_base

KS = (20, 64)
BATCH = 8  # answers of one forward pass
SPLIT = {"topk_logprobs.list.element": "BYTE_STREAM_SPLIT"}
BOTH = SPLIT | {"topk_ids.list.element": "BYTE_STREAM_SPLIT"}
DELTA = SPLIT | {"topk_ids.list.element": "DELTA_BINARY_PACKED"}
WRITERS: dict[str, dict[str, Any]] = {
    "zstd 1, dictionaries": {"compression_level": 1},
    "zstd 19, dictionaries": {"compression_level": 19},
    "zstd 7": {"compression_level": 7, "use_dictionary": False},
    "zstd 3, split logprobs": {"compression_level": 3, "use_dictionary": False, "column_encoding": SPLIT},
    "zstd 7, split logprobs": {"compression_level": 7, "use_dictionary": False, "column_encoding": SPLIT},
    "zstd 9, split logprobs": {"compression_level": 9, "use_dictionary": False, "column_encoding": SPLIT},
    "zstd 19, split logprobs": {"compression_level": 19, "use_dictionary": False, "column_encoding": SPLIT},
    "zstd 7, split both": {"compression_level": 7, "use_dictionary": False, "column_encoding": BOTH},
    "zstd 7, delta ids": {"compression_level": 7, "use_dictionary": False, "column_encoding": DELTA},
    "zstd 7, split, groups of 64": {
        "compression_level": 7,
        "use_dictionary": False,
        "column_encoding": SPLIT,
        "row_group_size": 64,
    },
}


def main() -> None:
    options = parse_options(__doc__, "store-size")
    config = load_written(options.config, options.overrides)
    repeats, rescored = (2, 8) if options.quick else (5, 96)
    torch.set_num_threads(config.cluster.worker_cpus)
    stage = Stage(config.run_dir, "answer")
    stored = pa.concat_tables(map(stage.read_shard, stage.shards())).combine_chunks()
    exact = rescore(config, stored.slice(0, rescored))
    tables = {f"stored k={config.answer.top_k}": stored}
    tables |= {f"rescored k={k}": exact.table(k) for k in KS}
    with tempfile.TemporaryDirectory() as folder:
        store = {name: measure_store(folder, name, table, repeats) for name, table in tables.items()}
    writers = {
        name: {k: measure_writer(table, options, repeats) for k, table in tables.items()}
        for name, options in WRITERS.items()
    }
    errors = {f"k={k}": exact.error(k) for k in KS}
    print(f"{'writer':28} {'table':14} {'B/token':>8} {'of it top-k':>11} {'write tok/s':>12} {'read tok/s':>12}")
    for writer, by_table in {"the store": store, **writers}.items():
        for name, one in by_table.items():
            print(
                f"{writer:28} {name:14} {one['bytes_per_token']:8.2f} {one['topk_bytes_per_token']:11.2f} "
                f"{one['write_tokens_per_s']['median']:12.0f} {one['read_tokens_per_s']['median']:12.0f}"
            )
    for name, error in errors.items():
        print(
            f"{name}: loss {error['loss']:.4f} nats, tail mass {error['tail_mass']:.3f}; float16 changes the mean by "
            f"{error['relative_of_mean']:.1e} of it, a token by {error['relative_per_token']:.1e}"
        )
    first = next(iter(store))
    save(
        options.name,
        {
            "benchmark": "store_size",
            "model": Path(config.model.path).name,
            "answers": stored.num_rows,
            "answer_tokens": count_tokens(stored),
            "rescored_answers": exact.answers.num_rows,
            "settings": {"answer": config.answer.model_dump(), "repeats": repeats, "quick": options.quick},
            "store": store,
            "writers": writers,
            "loss_error": errors,
            "claims": [
                claim("bytes_per_token", store[first]["bytes_per_token"], 60, at_most=True),
                claim("loss_relative_error.k20", errors["k=20"]["relative_per_token"], 1e-3, at_most=True),
                claim("loss_relative_error.k64", errors["k=64"]["relative_per_token"], 1e-3, at_most=True),
                claim("reads_with_arrow", float(all(one["arrow_reads_it"] for one in store.values())), 1),
            ],
        },
    )


class Exact:
    """Answers with the teacher's exact values at the largest k, and the student's hidden states at the same tokens."""

    def __init__(self, answers: pa.Table, ids: torch.Tensor, logprobs: torch.Tensor, hidden: torch.Tensor, weight: Any):
        self.answers, self._ids, self._logprobs, self._hidden, self._weight = answers, ids, logprobs, hidden, weight

    def table(self, k: int) -> pa.Table:
        """Return the answers with the k most likely tokens as they would be stored."""
        tokens = np.asarray(pc.call_function("list_value_length", [self.answers["answer_ids"]]))
        offsets = pa.array(np.cumsum([0, *tokens]) * k, pa.int32())
        ids = pa.ListArray.from_arrays(offsets, pa.array(self._ids[:, :k].reshape(-1).numpy().astype(np.int32)))
        values = self._logprobs[:, :k].reshape(-1).numpy().astype(np.float16)
        columns = [*self.answers.columns[:-2], ids, pa.ListArray.from_arrays(offsets, pa.array(values))]
        return pa.table(columns, schema=ANSWER)

    def error(self, k: int) -> dict[str, float]:
        """Compare the student's loss on exact and on stored values, token by token."""
        ids, exact = self._ids[:, :k], self._logprobs[:, :k]
        kept = exact.half().float()
        a, b = (answer_losses(self._hidden, self._weight, TopK(ids, values), 256).double() for values in (exact, kept))
        return {
            "loss": float(a.mean()),
            "tail_mass": float((1 - exact.exp().sum(-1)).mean()),
            "relative_of_mean": abs(float(a.mean() - b.mean())) / float(a.mean()),
            "relative_per_token": float((a - b).abs().sum() / a.sum()),
        }


def rescore(config: Config, answers: pa.Table) -> Exact:
    """Run the teacher and the closed-book student over stored answers."""
    student = Student(add_adapter(load_base(config.model.path), config.train.lora, "base"), config.train.loss_chunk)
    weight = student.model.get_base_model().get_output_embeddings().weight.detach()  # type: ignore[operator]
    prompts = TeacherPrompts(config)
    ids, logprobs, hidden = [], [], []
    with student.adapter_off():
        for start in range(0, answers.num_rows, BATCH):
            batch = answers.slice(start, BATCH)
            samples = samples_of(batch)
            teacher = [Sample(p, s.answer_ids) for p, s in zip(prompts.of(batch), samples, strict=True)]
            for states in student.hidden(pack(teacher, rows_in_order(teacher, 512))).split(256):
                top = (states @ weight.T).float().log_softmax(-1).topk(max(KS))
                ids.append(top.indices)
                logprobs.append(top.values)
            hidden.append(student.hidden(pack(samples, rows_in_order(samples, 512))))
    return Exact(answers, torch.cat(ids), torch.cat(logprobs), torch.cat(hidden), weight)


def measure_store(folder: str, name: str, table: pa.Table, repeats: int) -> dict[str, Any]:
    """Send a table through the store: commit a unit, read it back, and pick single answers as training does."""
    stage = Stage(f"{folder}/{name.replace(' ', '-')}", "answer")
    result = measure(
        table,
        repeats,
        lambda: stage.commit("unit", [table], [], table.num_rows).bytes,
        lambda: stage.read_unit("unit"),
    )
    shard = f"{stage.folder}/data/unit-00000.parquet"
    data = AnswerData([stage.read_unit("unit")])
    order = np.random.default_rng(0).permutation(table.num_rows).tolist()
    started = time.perf_counter()
    for index in order:
        assert data.take([index])["answer_id"][0].as_py() == table["answer_id"][index].as_py()
    return result | {
        "topk_bytes_per_token": topk_bytes(pq.read_metadata(shard)) / count_tokens(table),
        "pick_one_answer_us": round(1e6 * (time.perf_counter() - started) / len(order), 1),
        "arrow_reads_it": ds.dataset(shard).to_table().equals(table) and pq.read_schema(shard).equals(ANSWER),
    }


def measure_writer(table: pa.Table, options: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Write and read a table in memory with these options of `pq.write_table`."""
    written: list[pa.Buffer] = []

    def write() -> int:
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd", **options)
        written.append(buffer.getvalue())
        return written[-1].size

    result = measure(table, repeats, write, lambda: pq.read_table(pa.BufferReader(written[-1])))
    metadata = pq.read_metadata(pa.BufferReader(written[-1]))
    return result | {"topk_bytes_per_token": topk_bytes(metadata) / count_tokens(table)}


def measure(table: pa.Table, repeats: int, write: Callable[[], int], read: Callable[[], pa.Table]) -> dict[str, Any]:
    """Write and read so many times; what is read must be what was written."""
    num_tokens = count_tokens(table)
    size, write_rates, read_rates = 0, [], []
    for _ in range(repeats):
        started = time.perf_counter()
        size = write()
        middle = time.perf_counter()
        again = read()
        ended = time.perf_counter()
        assert again.equals(table), "read rows differ from written ones"
        write_rates.append(num_tokens / (middle - started))
        read_rates.append(num_tokens / (ended - middle))
    return {
        "bytes_per_token": round(size / num_tokens, 2),
        "write_tokens_per_s": spread(write_rates, 0),
        "read_tokens_per_s": spread(read_rates, 0),
    }


def count_tokens(table: pa.Table) -> int:
    return len(table["answer_ids"].combine_chunks().flatten())


def topk_bytes(metadata: pq.FileMetaData) -> int:
    """Return the compressed bytes of the two top-k columns."""
    columns = [
        metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(metadata.num_columns)
    ]
    return sum(column.total_compressed_size for column in columns if column.path_in_schema.startswith("topk_"))


if __name__ == "__main__":
    main()
