"""The adapter of an earlier run -> how far it is from the teacher about each passage: a second round asks the worst.

In: `update.previous_run` with its answers and its adapter. Out: rows of a passage there and its mean KL, in nats per
token, over a few of the answers that were trained on.
"""

import heapq
import math
import tempfile
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.base_model import BaseModel
from pipeline.config import Config
from pipeline.previous import previous_settings
from pipeline.schema import ANSWER, PASSAGE, PASSAGE_KL
from pipeline.stage import Job, run_alike, training_actors
from pipeline.store import Stage, Unit
from pipeline.train import adapter_of

ANSWERS_PER_PASSAGE = 8


def measure_passages(configs: list[Config], base: BaseModel, redo: bool = False) -> list[Any]:
    """Run the stage of several corpora; return for each its manifest, or the ValueError."""
    actors = training_actors(configs[0].cluster)
    return run_alike([partial(_weak_job, config, base) for config in configs], actors, redo)


def weak_passages(config: Config) -> set[str]:
    """Return the passages of the previous run on which its adapter is weakest, `update.weak_share` of them.

    One of which nothing was trained on is weaker than any other.
    """
    if not config.update.weak_share:
        return set()
    measured = Stage(config.run_dir, "weak", PASSAGE_KL)
    measured.require()
    passages = Stage(str(config.update.previous_run), "chunk", PASSAGE)
    kl = {row["passage_id"]: row["kl"] for shard in measured.shards() for row in measured.read_shard(shard).to_pylist()}
    ids = [name for shard in passages.shards() for name in passages.read_shard(shard, ["passage_id"])[0].to_pylist()]
    return set(heapq.nlargest(round(config.update.weak_share * len(ids)), ids, key=lambda name: kl.get(name, math.inf)))


def _weak_job(config: Config, base: BaseModel) -> Job:
    """Describe the stage; it needs the complete previous run."""
    previous_run = str(config.update.previous_run)
    answers = Stage(previous_run, "filter", ANSWER)
    adapter = Stage(previous_run, "train", ANSWER).require()["data_digest"]
    return Job(
        Stage(config.run_dir, "weak", PASSAGE_KL),
        {"input": answers.require()["data_digest"], "adapter": adapter, **previous_settings(config, base)},
        [{"name": name} for name in sorted(answers.committed())],
        PassageScorer,
        {"config": config},
    )


class PassageScorer:
    """One unit is one shard of the previous run's answers; owns the model with the previous adapter."""

    def __init__(self, config: Config) -> None:
        from pipeline.student import KlScorer

        previous_run = str(config.update.previous_run)
        self._answers = Stage(previous_run, "filter", ANSWER)
        self._stage = Stage(config.run_dir, "weak", PASSAGE_KL)
        with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
            adapter = adapter_of(previous_run).copy_to(folder)
            self._scorer = KlScorer(config.train, config.model.path, config.cluster.worker_cpus, adapter)

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        answers = self._answers.read_unit(unit["name"])
        places: dict[str, list[int]] = {}
        for place, passage_id in enumerate(answers["passage_id"].to_pylist()):
            places.setdefault(passage_id, []).append(place)
        asked = answers.take([place for about in places.values() for place in _spaced(about)])
        table = pa.table({"passage_id": asked["passage_id"], "kl": self._scorer.kl(asked)})
        means = table.group_by("passage_id").aggregate([("kl", "mean")]).rename_columns(PASSAGE_KL.names)
        return self._stage.commit(unit["name"], [means], [], means.num_rows)


def _spaced(places: list[int]) -> list[int]:
    """Return at most `ANSWERS_PER_PASSAGE` of them, evenly spaced."""
    return places[:: math.ceil(len(places) / ANSWERS_PER_PASSAGE)]
