"""Predict tokens, storage, time and money of a run from a sample of its passages, or say why it cannot fit.

In: a config. Out: one JSON object, or ValueError with the number that is too small. Reading and chunking are done in
full, since they cost little and the run uses them; a few passages then go through the real stages in RUN/plan, and what
was measured is scaled to all of them. An update of an earlier run is planned as if all of it were new.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from scipy.optimize import nnls

from pipeline.arms import general_questions
from pipeline.base_model import BaseModel
from pipeline.chunk import chunk_documents
from pipeline.config import Config, Update
from pipeline.engine import load_tokenizer, render_chat
from pipeline.filter import filter_answers
from pipeline.held_out import load_questions, read_questions
from pipeline.previous import adapter_of
from pipeline.prompts import question_chat, teacher_chat
from pipeline.read import read_documents
from pipeline.reading import READING
from pipeline.resources import cluster_address, compute_dtype, loaded_bytes, model_fits
from pipeline.stage import only
from pipeline.store import Folder, Stage, open_uri
from pipeline.train import train_adapters
from pipeline.write import write

SAMPLE_PASSAGES = 8
SAMPLE_PROMPTS = 16
MANY_USES = 20  # of one general prompt: from there on its answer is learnt by heart, and little else kept
CHECKPOINT = 6  # bytes of a checkpoint for one of the adapter: three fp32 numbers for one in bf16


class Measured(NamedTuple):
    """What is scaled up: manifests by stage, of what was done in full and of the sample."""

    full: dict[str, dict[str, Any]]
    written: dict[str, dict[str, Any]]
    kept: dict[str, Any]
    trained: dict[str, Any]
    num_sampled: int  # passages
    adapter_bytes: int


def make_plan(config: Config, base: BaseModel, redo: bool = False) -> dict[str, Any]:
    """Return counts, tokens, bytes and seconds that the whole run will take; `cost` if a price is configured.

    Raises ValueError, one line per reason, for what cannot fit.
    """
    if reasons := [reason for reason in (*too_long(config, base), _too_large(config, base)) if reason]:
        raise ValueError("\n".join(reasons))
    read = only(read_documents([config], redo))
    chunked = only(chunk_documents([config], redo))
    share = config.general.share if config.general.prompts else 0.0
    general = {"prompts": SAMPLE_PROMPTS, "held_out": 0, "share": share}
    sample = config.model_copy(
        update={
            "run_dir": (Folder(config.run_dir) / "plan").uri,
            "general": config.general.model_copy(update=general),
            "train": config.train.model_copy(update={"epochs": 1}),
            "evaluate": config.evaluate.model_copy(update={"held_out": 0}),
            "update": Update(),
        }
    )
    num_sampled = _write_sample(config, sample, chunked["data_digest"])
    written = only(write([sample], base, redo=True))
    kept = only(filter_answers([sample], redo=True))
    trained = only(train_adapters([sample], base, redo=True))
    adapter = adapter_of(sample.run_dir).size("adapter_model.safetensors")
    shards = len(Stage(config.run_dir, "chunk").shards())
    measured = Measured(read | {"chunk": chunked}, written, kept, trained, num_sampled, adapter)
    plan = scale_up(config, measured, min(config.cluster.num_engines, shards))
    print(f"plan: from {num_sampled} of {chunked['rows_out']} passages", file=sys.stderr)
    new = 1 - sum(config.shares.values())
    uses = plan["answers"] / new * share * config.train.epochs / max(1, config.general.prompts)
    if uses > MANY_USES:
        print(f"plan: each general prompt would be trained on {uses:.0f} times; raise general.prompts", file=sys.stderr)
    refuse_full_disk(config.run_dir, plan["bytes"] + plan["training_bytes"])
    return plan


def scale_up(config: Config, measured: Measured, num_engines: int) -> dict[str, Any]:
    """Return the plan for the whole corpus, at which so many engines write."""
    full, written, kept, trained, num_sampled, adapter_bytes = measured
    scale = full["chunk"]["rows_out"] / num_sampled
    num_prompts = config.general.prompts + config.general.held_out
    times = {**dict.fromkeys(written, scale), "general": num_prompts / SAMPLE_PROMPTS}
    trained_times = scale * config.train.epochs
    seconds = {name: done["seconds"] for name, done in full.items()}
    # What a stage takes beside its engine's work is its start, which does not grow with the corpus.
    busy = {name: done["stats"]["engine_seconds"] for name, done in written.items()}
    seconds |= {name: done["seconds"] + busy[name] * (times[name] / num_engines - 1) for name, done in written.items()}
    by_model = config.filter.min_initial_kl is not None
    seconds["filter"] = kept["seconds"] * (scale / config.cluster.num_workers if by_model else 1)
    training = trained["seconds"] + trained["training"]["seconds"] * (trained_times - 1)
    seconds |= dict.fromkeys(_trained_stages(config), training)
    # The evaluation starts an engine once more and, to measure, what training starts.
    starts = sum(done["seconds"] - busy[name] for name, done in written.items())
    starts += trained["seconds"] - trained["training"]["seconds"]
    seconds["evaluate"] = starts + reply_seconds(config, written, scale * written["question"]["rows_out"])
    return {
        "passages": full["chunk"]["rows_out"],
        "sampled_passages": num_sampled,
        "questions": round(written["question"]["rows_out"] * scale),
        "answers": round(kept["rows_out"] * scale),
        "written_tokens": round(sum(done["stats"]["output_tokens"] * times[name] for name, done in written.items())),
        "trained_tokens": round(trained["training"]["tokens"] * trained_times),
        "bytes": round(
            sum(done["bytes"] * times[name] for name, done in written.items())
            + kept["bytes"] * scale
            + sum(done["bytes"] for done in full.values())
        ),
        # One checkpoint is written before the last one is deleted, and the baselines train like the adapter.
        "training_bytes": adapter_bytes * (1 + 2 * CHECKPOINT) * (1 + len(config.evaluate.baselines)),
        "seconds": {name: round(value) for name, value in seconds.items()},
        **price(config, seconds, num_engines),
    }


def _trained_stages(config: Config) -> list[str]:
    return ["train", *(f"baseline-{name}" for name in config.evaluate.baselines)]


def reply_seconds(config: Config, written: dict[str, Any], num_questions: float) -> float:
    """Estimate what the engine takes for the evaluation's replies."""
    settings = config.evaluate
    stats = [done["stats"] for done in written.values()]
    # Seconds for a prompt's token that is not in the prefix cache, and for a token written: what fits the stages.
    tokens = np.asarray([[one["prompt_tokens"] - one["cached_tokens"], one["output_tokens"]] for one in stats])
    (per_read, per_written), _ = nnls(tokens, np.asarray([one["engine_seconds"] for one in stats]))
    asked = len(load_questions(settings)) or min(settings.held_out, int(num_questions) // 10)
    unrelated = len(read_questions("evaluate.unrelated", settings.unrelated))
    answers = written["answer"]["rows_out"]
    prompt, reply = (written["answer"]["stats"][name] / answers for name in ("prompt_tokens", "output_tokens"))
    retrievals = 2 * settings.retrieval + bool(settings.embedding_model)
    passages = asked * (1 + retrievals * config.serve.retrieval_passages) + 2 * unrelated
    replies = asked * (3 + retrievals + len(settings.baselines)) + 2 * (len(general_questions()) + 2 * unrelated)
    return per_read * prompt * passages + per_written * reply * replies


def price(config: Config, seconds: dict[str, float], num_engines: int) -> dict[str, float]:
    """Return the hours of the cluster and of the GPUs at work, and the cost of the former."""
    cluster, hours = config.cluster, sum(seconds.values()) / 3600
    trained = _trained_stages(config)
    if config.filter.min_initial_kl is not None:
        trained.append("filter")
    gpus: dict[str, float] = dict.fromkeys(trained, cluster.num_workers * cluster.worker_gpus)
    gpus |= dict.fromkeys(("question", "answer", "general", READING), num_engines * cluster.engine_gpus)
    gpus["evaluate"] = cluster.engine_gpus
    total = {"hours": round(hours, 3)}
    if gpu_seconds := sum(gpus.get(name, 0) * value for name, value in seconds.items()):
        total["gpu_hours"] = round(gpu_seconds / 3600, 3)
    if cluster.price_per_hour is not None:
        total["cost"] = round(hours * cluster.price_per_hour, 2)
    return total


def too_long(config: Config, base: BaseModel) -> Iterator[str]:
    """Say where the longest passage, its prompt without heading and question, and the reply exceed the context."""
    tokenizer = load_tokenizer(base.path)
    asking = [question_chat("", "", kind, config.question.per_call, "") for kind in config.question.kinds]
    for name, chats, reply in (
        ("question", asking, config.question.max_tokens),
        ("answer", [teacher_chat("", "", "")], config.answer.max_tokens),
    ):
        prompt = max(len(render_chat(tokenizer, chat)) for chat in chats)
        needed = config.chunk.max_tokens + prompt + reply
        if needed > config.model.max_model_len:
            yield (
                f"model.max_model_len = {config.model.max_model_len} is too small: a passage of chunk.max_tokens = "
                f"{config.chunk.max_tokens}, a prompt of {prompt} and {name}.max_tokens = {reply} take {needed}; raise "
                "it, or lower the others"
            )


def _too_large(config: Config, base: BaseModel) -> str | None:
    """Say why the base model does not fit this machine; `python -m cluster check` looks at a cluster's nodes."""
    if cluster_address(config.cluster):
        return None
    import torch

    gpus = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    weights = loaded_bytes(base.path, compute_dtype(config.cluster.engine_gpus > 0))
    return model_fits(config, weights, min(gpus, default=0), memory)


def refuse_full_disk(run_dir: str, needed: int) -> None:
    if "://" not in run_dir and needed > (free := shutil.disk_usage(open_uri(run_dir)[1]).free):
        raise ValueError(
            f"run_dir = {run_dir!r} has {free / 2**30:.1f} GiB free, and the run will take {needed / 2**30:.1f} GiB; "
            "make room, or give another place"
        )


def _write_sample(config: Config, sample_config: Config, data_digest: str) -> int:
    """Put evenly spaced passages into the chunk stage of the sample's run directory; return how many."""
    whole = Stage(config.run_dir, "chunk")
    sample = Stage(sample_config.run_dir, "chunk")
    shards = whole.shards()
    if not shards:
        raise ValueError(f"there are no passages to plan for; {Folder(whole.run_dir)}/read/rejected says why")
    # A GPU's speed depends on how much it works on at a time, so it gets as much as in the run: a whole unit.
    wanted = config.chunk.shard_passages if config.cluster.engine_gpus else SAMPLE_PASSAGES
    count = min(wanted, len(shards))
    picked = [shards[index * len(shards) // count] for index in range(count)]
    per_shard = -(-wanted // count)
    if sample.open({"passages": wanted, "input": data_digest}, redo=True):
        tables = []
        for shard in picked:
            table = whole.read_shard(shard)
            rows = min(per_shard, table.num_rows)
            tables.append(table.take([index * table.num_rows // rows for index in range(rows)]))
        table = pa.concat_tables(tables)
        sample.commit("sample", [table], [], table.num_rows)
        sample.close(0.0)
    return sample.require()["rows_out"]
