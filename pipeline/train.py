"""Answers -> adapter directory: Ray Train runs the loop of `train_loop` on its workers.

In: the complete filter and general stages and a config whose base model wrote them. Out: `train/adapter` (PEFT
safetensors), `train/history.json` and the stage's manifest; a baseline's stand in a folder of its own.
"""

import sys
import threading
import time
from typing import Any

from tqdm import tqdm

from pipeline.base_model import BaseModel
from pipeline.config import Config
from pipeline.schema import ANSWER
from pipeline.stage import start_ray
from pipeline.store import Stage, open_uri

PROGRESS_S = 5.0
REFUSAL = "refusal.json"


def train_adapter(config: Config, base: BaseModel, redo: bool = False, name: str = "train") -> dict[str, Any]:
    """Run the stage and return its manifest; it needs complete filter and general stages, made by this base model."""
    answers, general = Stage(config.run_dir, "filter", ANSWER), Stage(config.run_dir, "general", ANSWER)
    model = check_manifest(Stage(config.run_dir, "answer", ANSWER).require(), base)
    stage = Stage(config.run_dir, name, ANSWER)
    settings = {
        "train": config.train.model_dump(exclude={"checkpoint_steps", "micro_rows", "loss_chunk"}),
        "general_share": config.general.share,
        "model": model,
        "input": answers.require()["data_digest"],
        "general": general.require()["data_digest"],
    }
    if not stage.open(settings, redo):
        print(f"{name}: up to date", file=sys.stderr)
        return stage.require()
    if not answers.require()["rows_out"]:
        raise ValueError("no answers are left to train on; loosen [filter] or write more questions")
    start_ray(config.cluster)
    started = time.monotonic()
    stage.folder.write_json(REFUSAL, None)
    with _ProgressBar(stage):
        _fit(config, base, stage)
    if refusal := stage.folder.read_json(REFUSAL):
        raise ValueError(refusal)
    return stage.close(time.monotonic() - started, {"training": stage.folder.read_json("result.json")})


def check_manifest(answers: dict[str, Any], base: BaseModel) -> dict[str, str]:
    """Raise ValueError unless this base model wrote the answers; return what the two share."""
    wrote, trains = answers["settings"]["model"], base.identity()
    for name, value in trains.items():
        if wrote[name] != value:
            raise ValueError(
                f"the answers were written by another teacher: {name} was {wrote[name]}, that of model.path = "
                f"{base.path!r} is {value}; train the model that wrote them, or write the answers anew"
            )
    return trains


class _ProgressBar:
    """Shows what the first worker writes into progress.json, from a thread of the driver."""

    def __init__(self, stage: Stage) -> None:
        self._name = stage.name
        self._folder = stage.folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        with tqdm(desc=self._name, unit="step") as bar:
            is_last = False
            while not is_last:
                is_last = self._stop.wait(PROGRESS_S / 2)
                if progress := self._folder.read_json("progress.json"):
                    bar.total = progress["steps"]
                    bar.set_postfix(
                        loss=progress["loss"],
                        tokens_per_s=progress["tokens_per_s"],
                        left=tqdm.format_interval(progress["seconds_left"]),
                    )
                    bar.update(progress["step"] - bar.n)


def _fit(config: Config, base: BaseModel, stage: Stage) -> None:
    import ray.train.torch

    cluster = config.cluster
    filesystem, path = open_uri(stage.folder.uri)
    result = ray.train.torch.TorchTrainer(
        _run_loop,
        train_loop_config={"config": config, "base": base, "stage": stage},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.worker_gpus > 0,
            resources_per_worker={"CPU": cluster.worker_cpus}
            | ({"GPU": cluster.worker_gpus} if cluster.worker_gpus else {}),
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if cluster.worker_gpus else "gloo"),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    ).fit()
    if result.error is not None:
        raise result.error


def _run_loop(arguments: dict[str, Any]) -> None:
    from pipeline.train_loop import TrainLoop

    TrainLoop(**arguments).run()
