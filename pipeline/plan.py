"""Predict tokens, storage, time and money of a run from a sample of its passages.

In: a config. Out: one JSON object. Reading and chunking are done in full, since they cost little and the run uses them;
a few passages then go through the real stages in RUN/plan, and what was measured is scaled to all of them.
"""

import sys
from typing import Any

import pyarrow as pa

from pipeline.base_model import BaseModel
from pipeline.chunk import chunk_documents
from pipeline.config import Config
from pipeline.filter import filter_answers
from pipeline.read import read_documents
from pipeline.schema import PASSAGE
from pipeline.store import Folder, Stage
from pipeline.train import train_adapter
from pipeline.write import write

SAMPLE_PASSAGES = 8
SAMPLE_PROMPTS = 16


def make_plan(config: Config, base: BaseModel) -> dict[str, Any]:
    """Return counts, tokens, bytes and seconds that the whole run will take; `cost` if a price is configured."""
    read_documents(config.run_dir, config.read, config.cluster, config.max_reject_share)
    chunked = chunk_documents(config.run_dir, config.chunk, base.path, config.cluster, config.max_reject_share)
    sample_config = config.model_copy(
        update={
            "run_dir": (Folder(config.run_dir) / "plan").uri,
            "general": config.general.model_copy(update={"prompts": SAMPLE_PROMPTS, "held_out": 0}),
            "train": config.train.model_copy(update={"epochs": 1}),
        }
    )
    num_sampled = _write_sample(config, sample_config, chunked["data_digest"])
    written = write(sample_config, base, redo=True)
    questions, answers, general = written["question"], written["answer"], written["general"]
    kept = filter_answers(sample_config, base, redo=True)
    training = train_adapter(sample_config, base, redo=True)["training"]
    scale = chunked["rows_out"] / num_sampled
    engines, epochs = config.cluster.num_engines, config.train.epochs
    prompts = (config.general.prompts + config.general.held_out) / SAMPLE_PROMPTS
    seconds = {
        # What a stage takes beside its engine's work is its start, which does not grow with the corpus.
        name: (manifest["seconds"] - busy) + busy * times / engines
        for name, manifest, busy, times in (
            ("question", questions, questions["stats"]["engine_seconds"], scale),
            ("answer", answers, answers["stats"]["engine_seconds"], scale),
            ("general", general, general["stats"]["engine_seconds"], prompts),
        )
    } | {"train": training["seconds"] * scale * epochs}
    total = sum(seconds.values())
    plan = {
        "passages": chunked["rows_out"],
        "sampled_passages": num_sampled,
        "questions": round(questions["rows_out"] * scale),
        "answers": round(kept["rows_out"] * scale),
        "written_tokens": round(
            (questions["stats"]["output_tokens"] + answers["stats"]["output_tokens"]) * scale
            + general["stats"]["output_tokens"] * prompts
        ),
        "trained_tokens": round(training["tokens"] * scale * epochs),
        "bytes": round((answers["bytes"] + kept["bytes"]) * scale + general["bytes"] * prompts + chunked["bytes"]),
        "seconds": {name: round(value) for name, value in seconds.items()},
        "hours": round(total / 3600, 3),
    }
    if (price := config.cluster.price_per_hour) is not None:
        plan["cost"] = round(total / 3600 * price, 2)
    print(f"plan: from {num_sampled} of {chunked['rows_out']} passages", file=sys.stderr)
    return plan


def _write_sample(config: Config, sample_config: Config, data_digest: str) -> int:
    """Put evenly spaced passages into the chunk stage of the sample's run directory; return how many."""
    whole = Stage(config.run_dir, "chunk", PASSAGE)
    sample = Stage(sample_config.run_dir, "chunk", PASSAGE)
    shards = whole.shards()
    picked = shards[:: max(1, len(shards) // SAMPLE_PASSAGES)][:SAMPLE_PASSAGES]
    per_shard = -(-SAMPLE_PASSAGES // max(1, len(picked)))
    if sample.open({"passages": SAMPLE_PASSAGES, "input": data_digest}, redo=True):
        tables = []
        for shard in picked:
            table = whole.read_shard(shard)
            tables.append(table.take(list(range(0, table.num_rows, max(1, table.num_rows // per_shard)))[:per_shard]))
        table = pa.concat_tables(tables)
        sample.commit("sample", [table], [], table.num_rows)
        sample.close(0.0)
    return sample.require()["rows_out"]
