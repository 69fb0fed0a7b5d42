"""Answers -> adapter directory: Ray Train runs the loop of `train_loop` on its workers.

In: the complete filter and general stages and a config whose base model wrote them. Out: `train/adapter` (PEFT
safetensors), `train/history.json` and the stage's manifest; a baseline's stand in a folder of its own.
"""

import sys
import time
from functools import partial
from typing import Any

from tqdm import tqdm

from pipeline.base_model import BaseModel
from pipeline.config import Config
from pipeline.general import FORGOTTEN
from pipeline.previous import adapter_digest, previous_settings
from pipeline.reading import READING
from pipeline.resources import worker_options
from pipeline.schema import digest
from pipeline.stage import attempt, start_ray, watching
from pipeline.store import Stage, open_uri, require_line

REFUSAL = "refusal.json"


def train_adapters(configs: list[Config], base: BaseModel, redo: bool = False, name: str = "train") -> list[Any]:
    """Run the stage of several corpora, with the same workers; return for each its manifest, or the ValueError."""
    outcomes = [attempt(partial(_open, config, base, redo, name)) for config in configs]
    todo = {number: outcome for number, outcome in enumerate(outcomes) if isinstance(outcome, Stage)}
    if todo:
        start_ray(configs[0].cluster)
        started = time.monotonic()
        with tqdm(unit="step") as bar, watching(partial(_show_progress, list(todo.values()), bar)):
            _fit([{"config": configs[number], "base": base, "stage": stage} for number, stage in todo.items()])
        seconds = time.monotonic() - started
        results = {number: stage.folder.read_json("result.json") or {} for number, stage in todo.items()}
        busy = sum(result.get("seconds", 0.0) for result in results.values())
        for number, stage in todo.items():
            close = partial(_close, configs[number], stage, results[number], seconds / max(busy, 1e-9))
            outcomes[number] = attempt(close)
    return outcomes


def _open(config: Config, base: BaseModel, redo: bool, name: str) -> Stage | dict[str, Any]:
    """Return the stage if it is to be trained, or its manifest; it needs complete filter and general stages."""
    line, general = require_line(config.run_dir, "filter"), _require_answers(config, "general", base)
    stage = Stage(config.run_dir, name)
    settings = {
        "train": config.train.model_dump(exclude={"checkpoint_steps", "micro_rows", "loss_chunk", "zero_stage"}),
        "general_share": config.general.share,
        "model": check_manifest(line["answer"], base),
        "input": line["filter"]["data_digest"],
        "general": general["data_digest"],
        **_reading_settings(config, base),
        **_update_settings(config, base),
    }
    if not stage.open(settings, redo):
        print(f"{name}: up to date", file=sys.stderr)
        return stage.require()
    if not line["filter"]["rows_out"]:
        raise ValueError("no answers are left to train on; loosen [filter] or write more questions")
    stage.folder.write_json(REFUSAL, None)
    return stage


def _close(config: Config, stage: Stage, result: dict[str, Any], overhead: float) -> dict[str, Any]:
    if refusal := stage.folder.read_json(REFUSAL):
        raise ValueError(refusal)
    adapter, totals = stage.folder / "adapter", stage.totals()
    # Of two trainings with the same settings only one made what is evaluated and published.
    contents = (part for name in adapter.list() for part in (name, adapter.read_bytes(name)))
    totals["data_digest"] = digest(totals["data_digest"], *contents)
    made_from = {"training": result, "previous_run": config.update.previous_run}
    return stage.close(result["seconds"] * overhead, made_from, totals)


def check_manifest(answers: dict[str, Any], base: BaseModel) -> dict[str, str]:
    """Raise ValueError unless this base model wrote a stage's answers; return what the two share."""
    wrote, trains = answers["settings"]["model"], base.identity()
    for name, value in trains.items():
        if wrote[name] != value:
            raise ValueError(
                f"stage {answers['stage']} was written by another teacher: {name} was {wrote[name]}, that of "
                f"model.path = {base.path!r} is {value}; train the model that wrote them, or write the answers anew"
            )
    return trains


def _require_answers(config: Config, name: str, base: BaseModel) -> dict[str, Any]:
    """Return the manifest of a stage that this base model wrote; else ValueError."""
    manifest = Stage(config.run_dir, name).require()
    check_manifest(manifest, base)
    return manifest


def _reading_settings(config: Config, base: BaseModel) -> dict[str, Any]:
    if not config.reading.per_passage:
        return {}
    return {"reading": [config.reading.share, _require_answers(config, READING, base)["data_digest"]]}


def _update_settings(config: Config, base: BaseModel) -> dict[str, Any]:
    """Return what training goes on from; ValueError if that has become impossible since the writing."""
    update = config.update
    if update.previous_run is None:
        return {}
    previous_settings(config, base)
    forgotten = _require_answers(config, FORGOTTEN, base)["data_digest"] if update.forget_removed else None
    adapter = adapter_digest(update.previous_run)
    return {"update": {"adapter": adapter, "replay_share": update.replay_share, "forgotten": forgotten}}


def _show_progress(stages: list[Stage], bar: tqdm) -> None:
    """Show what the first worker says of the first of these stages; those that have ended leave the list."""
    while stages:
        stage = stages[0]
        bar.set_description(str(stage.folder), refresh=False)
        if progress := stage.folder.read_json("progress.json"):
            bar.total, bar.n = progress["steps"], progress["step"]
            left = tqdm.format_interval(progress["seconds_left"])
            bar.set_postfix(refresh=False, loss=progress["loss"], tokens_per_s=progress["tokens_per_s"], left=left)
        bar.refresh()
        if not stage.folder.read_json(REFUSAL) and (progress is None or bar.n < bar.total):
            return
        del stages[0]


def _fit(tasks: list[dict[str, Any]]) -> None:
    import ray.train.torch

    cluster = tasks[0]["config"].cluster
    filesystem, path = open_uri(tasks[0]["stage"].folder.uri)
    result = ray.train.torch.TorchTrainer(
        _run_loop,
        train_loop_config={"tasks": tasks},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.worker_gpus > 0,
            resources_per_worker={"CPU": cluster.worker_cpus}
            | ({"GPU": cluster.worker_gpus} if cluster.worker_gpus else {}),
            label_selector=cluster.worker_labels or None,
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if cluster.worker_gpus else "gloo"),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=3),
            worker_runtime_env=worker_options(cluster)["runtime_env"],
        ),
    ).fit()
    if result.error is not None:
        raise result.error


def _run_loop(arguments: dict[str, Any]) -> None:
    from pipeline.train_loop import train_all

    train_all(arguments["tasks"])
