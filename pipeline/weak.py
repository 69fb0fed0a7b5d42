"""The adapter of an earlier run -> how far it is from the teacher about each passage: a second round asks the worst.

In: `update.previous_run` with its answers and its adapter. Out: rows of a passage there and its mean KL, in nats per
token, over a few of the answers that were trained on.
"""

import math
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.base_model import BaseModel
from pipeline.config import Config
from pipeline.previous import adapter_of, previous_settings
from pipeline.schema import ANSWER, PASSAGE_KL
from pipeline.stage import Job, run_alike, training_actors
from pipeline.store import Stage, Unit

ANSWERS_PER_PASSAGE = 8


def measure_passages(configs: list[Config], base: BaseModel, redo: bool = False) -> list[Any]:
    """Run the stage of several corpora; return for each its manifest, or the ValueError."""
    actors = training_actors(configs[0].cluster)
    return run_alike([partial(_weak_job, config, base) for config in configs], actors, redo)


def weak_passages(config: Config) -> set[str]:
    """Return the passages of the previous run on which its adapter is weakest, `update.weak_share` of them.

    Those of which nothing was trained on are not among them: they were asked, in vain.
    """
    stage = Stage(config.run_dir, "weak", PASSAGE_KL)
    rows = [row for shard in stage.shards() for row in stage.read_shard(shard).to_pylist()]
    rows.sort(key=lambda row: (row["kl"], row["passage_id"]), reverse=True)
    return {row["passage_id"] for row in rows[: math.ceil(config.update.weak_share * len(rows))]}


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
    """One unit is one shard of the previous run's answers."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._adapter = adapter_of(str(config.update.previous_run))
        self._answers = Stage(str(config.update.previous_run), "filter", ANSWER)
        self._stage = Stage(config.run_dir, "weak", PASSAGE_KL)

    def do_unit(self, unit: dict[str, Any]) -> Unit:
        from pipeline.student import shared_scorer

        answers = self._answers.read_unit(unit["name"])
        places: dict[str, list[int]] = {}
        for place, passage_id in enumerate(answers["passage_id"].to_pylist()):
            places.setdefault(passage_id, []).append(place)
        asked = answers.take(pa.array([place for about in places.values() for place in _spaced(about)], pa.int64()))
        kl = shared_scorer(self._config, self._adapter).kl(asked)
        table = pa.table({"passage_id": asked["passage_id"], "kl": kl})
        means = table.group_by("passage_id").aggregate([("kl", "mean")]).rename_columns(PASSAGE_KL.names)
        return self._stage.commit(unit["name"], [means], [], means.num_rows)


def _spaced(places: list[int]) -> list[int]:
    """Return at most `ANSWERS_PER_PASSAGE` of them, evenly spaced."""
    return places[:: math.ceil(len(places) / ANSWERS_PER_PASSAGE)]
