"""What a run tells Prometheus and the logs: rows, tokens, bytes, loss, seconds left.

In: committed units and the trainer's progress, in the workers that make them. Out: series that Ray's agent on each node
exports as `ray_<name>`, a counter's with `_total` behind it; `cluster/grafana.json` draws them. And a log line for
each: with RAY_LOGGING_CONFIG_ENCODING=JSON in the driver's environment its fields are JSON, beside Ray's own job, node
and worker; without, it is not written. Counters move when a unit is committed: a rate wants the time of several units.
"""

import logging
from typing import Any

from ray.util.metrics import Counter, Gauge

from pipeline.store import Stage, Unit

logger = logging.getLogger(__name__)
TAGS = ("run", "stage")

REJECTED = Counter("distillery_rejected_rows", "Rows rejected.", (*TAGS, "reason"))
# By the name that a unit or its `stats` has for them.
UNIT = {
    "rows_out": Counter("distillery_rows", "Rows written.", TAGS),
    "bytes": Counter("distillery_bytes", "Bytes of rows stored.", TAGS),
    "output_tokens": Counter("distillery_written_tokens", "Tokens that engines wrote.", TAGS),
    "prompt_tokens": Counter("distillery_prompt_tokens", "Tokens of the engines' prompts.", TAGS),
    "cached_tokens": Counter("distillery_cached_prompt_tokens", "Prompt tokens found in the prefix cache.", TAGS),
    "engine_seconds": Counter("distillery_engine_seconds", "Seconds that engines worked.", TAGS),
}
# By the name that they have in progress.json.
PROGRESS = {
    "loss": Gauge("distillery_train_loss", "Loss of the last step, nats per answer token.", TAGS),
    "step": Gauge("distillery_train_step", "Optimiser steps taken.", TAGS),
    "steps": Gauge("distillery_train_steps", "Optimiser steps of the whole training.", TAGS),
    "tokens": Gauge("distillery_train_tokens", "Tokens trained on, those of an earlier part included.", TAGS),
    "seconds_left": Gauge("distillery_train_seconds_left", "Seconds that training will still take.", TAGS),
}


def record_unit(stage: Stage, unit: Unit) -> None:
    """Count a committed unit."""
    tags = _tags(stage)
    amounts = {"rows_out": unit.rows_out, "bytes": unit.bytes} | unit.stats
    for name, counter in UNIT.items():
        if amount := amounts.get(name):
            counter.inc(amount, tags)
    for reason, count in unit.rejected.items():
        REJECTED.inc(count, tags | {"reason": reason})
    logger.info("unit committed", extra=tags | amounts | {"unit": unit.name, "rejected": unit.rejected})


def record_progress(stage: Stage, progress: dict[str, Any]) -> None:
    """Show where training stands; Ray shows it no longer when the worker has ended."""
    tags = _tags(stage)
    for name, gauge in PROGRESS.items():
        gauge.set(progress[name], tags)
    logger.info("training", extra=tags | progress)


def _tags(stage: Stage) -> dict[str, str]:
    return {"run": str(stage.folder).rpartition("/")[0], "stage": stage.name}
