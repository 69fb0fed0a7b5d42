"""How fast is a distillation step, and how much memory does it take?

    python -m benchmarks.train_throughput CONFIG [KEY=VALUE ...] [--quick] [--name NAME]

Every arm is a process that takes the same optimiser steps over the same stored answers, with the same LoRA:

    stored     our step on the stored top-k
    sft        the same loop on hard labels: plain cross-entropy
    online     the same loop, the teacher's pass with the passage in its prompt before every step
    trl_sft    TRL's SFTTrainer on the same samples, padded as its own collator does
    trl_gkd    TRL's GKDTrainer on the same samples with a second copy of the base model as teacher, whose prompt has
               no passage (so that its pass is shorter than ours), forward KL, nothing sampled from the student

Ours are the steps of `pipeline.train_loop` with DeepSpeed and its fp32 master copy, in Ray Train's local mode: left out
are Ray's worker processes, whose environment they have on a CPU (`KEEP_MEMORY`), and the checkpoints. TRL's AdamW steps
on the adapter itself, in bf16, too; its autocast and its gradient checkpointing are off. Trained tokens are those of
prompt and answer of every sample, without padding and without the teacher's, however often a trainer reads what the
prompts of a row have in common. What limits the number: on a CPU, what lies around the matrix products; the roofline
says how much.
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.raylets import free_port
from benchmarks.record import claim, load_written, parse_options, run_arm, save, spread
from pipeline.base_model import load_base_model
from pipeline.batch import AnswerData, samples_of
from pipeline.config import Config
from pipeline.resources import KEEP_MEMORY
from pipeline.store import Stage

OURS, TRL = ("stored", "sft", "online"), ("trl_sft", "trl_gkd")
ORDER = (*OURS, *TRL, "sft", "stored")  # there and back, so that a machine that slows down does it to both
AIMS = {"sft": 0.95, "online": 1.0, "trl_sft": 1.0, "trl_gkd": 2.0}
QUICK = ["train.batch_tokens=256", "train.lora.rank=8"]


def main() -> None:
    options = parse_options(__doc__, "train-throughput")
    if options.arm:
        request = json.loads(sys.stdin.read())
        config = load_written(options.config, [*options.overrides, *request["overrides"]])
        train = train_ours if options.arm in OURS else train_trl
        print(json.dumps(train(config, request | {"arm": options.arm})))
        return
    config = load_written(options.config, options.overrides)
    order, steps = (ORDER[:2] + TRL[:1], 1) if options.quick else (ORDER, 3)
    request: dict[str, Any] = {"steps": steps, "samples": None, "overrides": QUICK if options.quick else []}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in order}
    for name in order:
        overrides = [*request["overrides"], *([f"train.teacher={name}"] if name in OURS else [])]
        environment = KEEP_MEMORY if name in OURS and not config.cluster.worker_gpus else {}
        run = run_arm("benchmarks.train_throughput", options, name, request | {"overrides": overrides}, **environment)
        request["samples"] = request["samples"] or run["samples"]
        assert run["samples"] == request["samples"], f"{name} trained on other samples"
        runs[name].append(run)
    arms = {name: summarise(own) for name, own in runs.items()}
    assert len({arm["dtype"] for arm in arms.values()}) == 1, "arms train in different precisions"
    assert len({arm["trainable_parameters"] for arm in arms.values()}) == 1, "arms train different adapters"
    roofline = compare_with_matmul(runs)
    show(arms, roofline)
    speed = {name: arm["tokens_per_s"]["median"] for name, arm in arms.items()}
    save(
        options.name,
        {
            "benchmark": "train_throughput",
            "model": Path(config.model.path).name,
            "settings": {"train": config.train.model_dump(), "steps": steps, "order": order, "quick": options.quick},
            "arms": arms,
            "runs": {name: [{k: v for k, v in r.items() if k != "samples"} for r in own] for name, own in runs.items()},
            "roofline": roofline,
            "claims": [
                *(
                    claim(f"stored_over_{name}", round(speed["stored"] / speed[name], 3), aim)
                    for name, aim in AIMS.items()
                    if name in speed
                ),
                claim("padding", runs["stored"][0]["plan_padding"], 0.05, at_most=True),
            ],
        },
    )


def compare_with_matmul(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Say which share of the fastest matrix product seen a step on stored values reaches."""
    flop = runs["stored"][0]["step_flop"]
    seconds = statistics.median(second for run in runs["stored"] for second in run["seconds"])
    peak = max(run["matmul_flop_per_s"] for name in OURS for run in runs.get(name, []))
    return {
        "step_tflop": round(flop / 1e12, 3),
        "matmul_tflop_per_s": round(peak / 1e12, 3),
        "share": round(flop / seconds / peak, 3),
    }


def show(arms: dict[str, dict[str, Any]], roofline: dict[str, float]) -> None:
    print(f"{'arm':8} {'tokens/s':>9} {'min':>7} {'max':>7} {'peak MB':>8} {'over model':>10} {'padding':>8}")
    for name, arm in arms.items():
        speed = arm["tokens_per_s"]
        print(
            f"{name:8} {speed['median']:9.1f} {speed['min']:7.1f} {speed['max']:7.1f} {arm['peak_mb']:8.0f} "
            f"{arm['over_model_mb']:10.0f} {arm['padding']:8.3f}"
        )
    print(
        f"roofline: a step of {roofline['step_tflop']} TFLOP runs at {roofline['share']:.1%} of the "
        f"{roofline['matmul_tflop_per_s']} TFLOP/s that a matrix product of its dtype reaches here"
    )


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Bring the rounds of an arm together."""
    return {
        "tokens_per_s": spread([n / s for run in runs for n, s in zip(run["tokens"], run["seconds"], strict=True)]),
        "peak_mb": max(run["peak_mb"] for run in runs),
        "over_model_mb": max(run["peak_mb"] - run["loaded_mb"] for run in runs),
        "padding": runs[0]["padding"],
        "dtype": runs[0]["dtype"],
        "trainable_parameters": runs[0]["trainable_parameters"],
    }


def train_ours(config: Config, request: dict[str, Any]) -> dict[str, Any]:
    """Take the first steps of the run's own plan in the run's own loop; the first of all is warm-up."""
    import ray.train
    import ray.train.torch

    from pipeline.train_loop import TrainLoop

    result: dict[str, Any] = {}

    def work() -> None:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(free_port())
        with tempfile.TemporaryDirectory() as folder:
            loop = TrainLoop(config, load_base_model(config.model.path), Stage(folder, "train"))
        assert not loop.is_refused, "student and stored teacher differ; `python -m pipeline train` says where"
        result["loaded_mb"] = memory_mb()
        dtype = next(iter(loop.trainable.values())).dtype
        steps = loop.plan[: request["steps"] + 1]
        tokens, seconds = [], []
        for step in steps:
            started = time.monotonic()
            _, num_tokens = loop._step(step)
            seconds.append(time.monotonic() - started)
            tokens.append(num_tokens)
        result.update(
            samples=[[index for row in step for index in row] for step in steps],
            tokens=tokens[1:],
            seconds=seconds[1:],
            peak_mb=peak_mb(),
            padding=padding(loop, steps),
            dtype=str(dtype),
            trainable_parameters=sum(value.numel() for value in loop.trainable.values()),
            matmul_flop_per_s=measure_matmul(loop.device, dtype),
        )
        if request["arm"] == "stored" and request["samples"] is None:
            with FlopCounterMode(display=False) as counter:
                loop._step(steps[-1])
            result.update(
                step_flop=counter.get_total_flops() * sum(tokens[1:]) / len(tokens[1:]) / tokens[-1],
                plan_padding=padding(loop, loop.plan),
            )

    ray.train.torch.TorchTrainer(lambda: work(), scaling_config=ray.train.ScalingConfig(num_workers=0)).fit()
    return result


def padding(loop: Any, steps: list[list[list[int]]]) -> float:
    """Return the share of positions that hold no token, over the micro-batches of some steps."""
    opening = loop.data.opening
    lengths = loop.data.lengths() - opening
    filled = positions = 0
    for step in steps:
        for start in range(0, len(step), loop.settings.micro_rows):
            rows = [opening + int(lengths[row].sum()) for row in step[start : start + loop.settings.micro_rows]]
            filled += sum(rows)
            positions += max(rows) * len(rows)
    return round(1 - filled / positions, 4)


def train_trl(config: Config, request: dict[str, Any]) -> dict[str, Any]:
    """Take the same steps in one of TRL's trainers: a row of its dataset is a step, so that its batches are ours."""
    from pipeline.engine import load_tokenizer
    from pipeline.student import add_adapter, load_base

    torch.set_num_threads(config.cluster.worker_cpus)
    torch.manual_seed(config.train.seed)
    samples: list[list[int]] = request["samples"]
    times: list[float] = []
    tokenizer: Any = load_tokenizer(config.model.path)
    collator = StepCollator(config, tokenizer.pad_token_id or 0, samples)
    model = add_adapter(load_base(config.model.path), config.train.lora, "base")
    trainer = make_trainer(config, request["arm"], model, tokenizer, collator, times)
    loaded = memory_mb()
    trainer.train()
    trainable = [value for value in model.parameters() if value.requires_grad]
    steps = collator.steps[: len(times)]
    return {
        "samples": [samples[step] for step in steps],
        "tokens": [collator.data.count_tokens(samples[step])[1] for step in steps[1:]],
        "seconds": np.diff(times).tolist(),
        "loaded_mb": loaded,
        "peak_mb": peak_mb(),
        "padding": round(1 - collator.filled / collator.positions, 4),
        "dtype": str(trainable[0].dtype),
        "trainable_parameters": sum(value.numel() for value in trainable),
    }


class StepCollator:
    """Makes of a row of TRL's dataset, which is a step's number, that step's batch; counts what it was asked for."""

    def __init__(self, config: Config, pad_token_id: int, samples: list[list[int]]) -> None:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        from pipeline.training_data import training_tables

        self.data, self.samples = AnswerData(*training_tables(config)), samples
        self.steps: list[int] = []
        self.filled = self.positions = 0  # of these positions, so many hold a token
        self._pad = DataCollatorForLanguageModeling(pad_token_id=pad_token_id)

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        (row,) = rows
        self.steps.append(row["step"])
        examples = []
        for sample in samples_of(self.data.take(self.samples[row["step"]])):
            ids, labels = np.concatenate([sample.prompt_ids, sample.answer_ids]), np.full(len(sample.prompt_ids), -100)
            examples.append({"input_ids": ids.tolist(), "labels": [*labels.tolist(), *sample.answer_ids.tolist()]})
        batch = self._pad(examples)
        self.filled += int(batch["attention_mask"].sum())
        self.positions += batch["attention_mask"].numel()
        return batch


def make_trainer(
    config: Config, arm: str, model: Any, tokenizer: Any, collator: StepCollator, times: list[float]
) -> Any:
    """Return TRL's trainer with our settings; it adds the time at which each step ends to `times`."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from pipeline.student import load_base

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.monotonic())

    num_steps = len(collator.samples)
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="trl-"),
        "per_device_train_batch_size": 1,
        "max_steps": num_steps,
        "learning_rate": config.train.learning_rate,
        "max_grad_norm": config.train.max_grad_norm,
        "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments: dict[str, Any] = {
        "model": model,
        "train_dataset": Dataset.from_dict({"step": list(range(num_steps))}),
        "data_collator": collator,
        "processing_class": tokenizer,
        "callbacks": [Clock],
    }
    if arm == "trl_gkd":
        args = GKDConfig(**settings, lmbda=0.0, beta=0.0, temperature=1.0)
        return GKDTrainer(**arguments, args=args, teacher_model=load_base(config.model.path))
    return SFTTrainer(**arguments, args=SFTConfig(**settings))


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return the fastest rate of a square matrix product, in FLOP/s."""
    rates = []
    for size in (1024, 2048) if device.type == "cpu" else (8192,):
        a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        for _ in range(40):
            started = time.monotonic()
            (a @ b)[0, 0].item()
            rates.append(2 * size**3 / (time.monotonic() - started))
    return max(rates)


def memory_mb() -> float:
    """Return the memory in use: the device's, or this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


def peak_mb() -> float:
    """Return the most memory that was in use so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
