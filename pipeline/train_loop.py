"""The loop that one training worker runs: DeepSpeed, checkpoints, and the adapter at the end.

In: the config, the base model and the stage to write to. Out: `adapter/`, `history.json` and `result.json` there.
Checkpoints hold whole fp32 tensors and the position in the plan, so a run resumes with any number of workers. One more
is written as soon as Ray knows that a worker's node will go: `ray start --block` announces a SIGTERM (the kubelet's,
Slurm's) and waits 30 s, and a cloud's notice is passed on with `ray drain-node`. Ray Train then starts the workers
again, as often as it takes, and they go on from there. A SIGTERM to a worker itself ends it at once, as SIGKILL does.
Before the first step the alignment guard compares student and teacher; what it refuses is written down for the driver.
"""

import json
import logging
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import ray.train
import ray.train.torch
import safetensors.torch
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from pipeline.align import TeacherPrompts, check_alignment
from pipeline.base_model import BaseModel
from pipeline.batch import AnswerData, Packed, Row, Sample, Step, pack, plan_run, rows_in_order, samples_of, topk_of
from pipeline.config import Config
from pipeline.loss import FullVocabulary, Labels, Signal, TopK
from pipeline.metrics import record_progress
from pipeline.previous import adapter_of
from pipeline.resources import compute_dtype
from pipeline.store import PROGRESS_S, Stage
from pipeline.student import Student, add_adapter, load_adapter, load_base
from pipeline.train import REFUSAL
from pipeline.training_data import Groups, training_tables

logger = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Position:
    """Where training stands; saved with every checkpoint."""

    step: int = 0  # optimiser steps taken
    tokens: int = 0
    seconds: float = 0.0


class TrainLoop:
    """One worker's view of the run: its share of every step, the engine, and the checkpoints."""

    def __init__(self, config: Config, base: BaseModel, stage: Stage) -> None:
        self.settings = config.train
        self.stage, self.folder = stage, stage.folder
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(config.cluster.worker_cpus)
        # DeepSpeed would compile its shared-memory collectives now, which takes a compiler and a minute; gloo will do.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if self.device.type == "cuda" else "gloo", verbose=False)
        self.data = AnswerData(*training_tables(config))
        self.teacher_prompts = TeacherPrompts(config) if self.settings.teacher == "online" else None
        settings = self.settings
        new, removed, *others = self.data.sizes
        self.plan = plan_run(
            self.data.lengths(),
            (new + removed, *others),
            [config.shares[group] for group in Groups._fields[2:]],
            settings.epochs,
            settings.batch_tokens,
            settings.row_tokens,
            settings.seed,
            self.data.opening,
        )
        self.answer_tokens_per_step = self.data.answer_tokens_per_step(self.plan)
        torch.manual_seed(self.settings.seed)
        model = self._load_model(config, base)
        if self.settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        student = Student(model, self.settings.loss_chunk).to(self.device)
        self.is_refused = self._is_refused(config, student)
        student.train()  # without it neither dropout nor gradient checkpointing does anything
        self.trainable = {name: value for name, value in student.named_parameters() if value.requires_grad}
        optimizer = torch.optim.AdamW(
            self.trainable.values(),
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule)
        self.micro_batches = math.ceil(max(map(len, self.plan), default=1) / self.world / self.settings.micro_rows)
        initialize: Any = deepspeed.initialize  # its annotations are narrower than what it takes
        self.engine, self.optimizer, _, self.scheduler = initialize(
            model=student,
            model_parameters=list(self.trainable.values()),
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=self._deepspeed_config(),
        )
        self.student = student
        self.position = _Position()
        self.history: list[dict[str, float]] = []

    def _load_model(self, config: Config, base: BaseModel) -> PeftModel:
        """Return the base model with a fresh adapter, or with that of the previous run."""
        model = load_base(base.path, self._common_dtype())
        if config.update.previous_run is None:
            return add_adapter(model, self.settings.lora, base.name)
        with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
            return load_adapter(model, adapter_of(config.update.previous_run).copy_to(folder), is_trainable=True)

    def _common_dtype(self) -> str:
        """Return the dtype that all workers train in: float32 if one of them is on a CPU that is slow in bf16."""
        is_bf16 = torch.ones(1, dtype=torch.int32, device=self.device)
        is_bf16 *= compute_dtype(self.device.type == "cuda") == "bfloat16"
        torch.distributed.all_reduce(is_bf16, torch.distributed.ReduceOp.MIN)
        return "bfloat16" if is_bf16.item() else "float32"

    def _is_refused(self, config: Config, student: Student) -> bool:
        """Let the first worker compare student and teacher; all workers learn what came of it, the driver reads why."""
        refused = torch.zeros(1, dtype=torch.int32, device=self.device)
        if self.rank == 0:
            try:
                check_alignment(config, student, self.device)
            except ValueError as error:
                self.folder.write_json(REFUSAL, str(error))
                refused += 1
        torch.distributed.broadcast(refused, src=0)
        return bool(refused.item())

    def _schedule(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        warmup = math.ceil(self.settings.warmup_share * len(self.plan))
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, (len(self.plan) - step) / max(1, len(self.plan) - warmup))

    def _deepspeed_config(self) -> dict[str, Any]:
        settings = self.settings
        is_bf16 = next(iter(self.trainable.values())).dtype == torch.bfloat16
        return {
            "bf16": {"enabled": is_bf16},
            # At stage 1 this chooses the optimiser without hooks on every gradient, a sixth faster on a small step.
            "data_types": {"grad_accum_dtype": "fp32"} if is_bf16 and settings.zero_stage == 1 else {},
            "gradient_clipping": settings.max_grad_norm,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.micro_batches,
            "steps_per_print": sys.maxsize,
            **settings.deepspeed,
            "zero_optimization": settings.deepspeed.get("zero_optimization", {}) | {"stage": settings.zero_stage},
        }

    def run(self) -> None:
        """Train from where an earlier run stopped; do nothing if the alignment guard refused the data."""
        if self.is_refused:
            return
        self._resume()
        began, base_seconds, shown = time.monotonic(), self.position.seconds, 0.0
        notice = None
        while self.position.step < len(self.plan):
            rate = self.scheduler.get_last_lr()[0]
            loss, num_tokens = self._step(self.plan[self.position.step])
            now = time.monotonic()
            self.position.step += 1
            self.position.tokens += num_tokens
            self.position.seconds = base_seconds + now - began
            self.history.append({"step": self.position.step, "loss": loss, "lr": rate})
            is_last = self.position.step == len(self.plan)
            if self.rank == 0 and (now - shown > PROGRESS_S or is_last):
                self._report(loss)
                shown = now
            last_notice, notice = notice, ray.train.get_preemption_info()  # the same on every worker
            is_due = self.position.step % self.settings.checkpoint_steps == 0 or notice != last_notice
            if is_due and not is_last:
                self._save()
        self._finish()

    def _step(self, step: Step) -> tuple[float, int]:
        """Take one optimiser step over this worker's rows; return the mean loss per answer token, and all tokens."""
        answer_tokens, tokens = self.data.count_tokens([index for row in step for index in row])
        mine = step[self.rank :: self.world]
        total = torch.zeros((), device=self.device)
        for number in range(self.micro_batches):
            rows = mine[number * self.settings.micro_rows : (number + 1) * self.settings.micro_rows]
            packed, signal = self._micro_batch(rows)
            losses = self.engine(packed, signal)
            # DeepSpeed averages over workers and accumulation steps. Every answer token of the run weighs the same: a
            # long sample, which has a step for itself, would weigh ten times as much by the mean over its step.
            self.engine.backward(losses.sum() * (self.world * self.micro_batches / self.answer_tokens_per_step))
            self.engine.step()
            total += losses.detach().sum()
        if self.world > 1:
            torch.distributed.all_reduce(total)
        return total.item() / answer_tokens, tokens

    def _micro_batch(self, rows: list[Row]) -> tuple[Packed, Signal]:
        answers = self.data.take([index for row in rows for index in row])
        samples = samples_of(answers)
        packed = pack(samples, [len(row) for row in rows]).to(self.device)
        settings = self.settings
        if settings.teacher in ("sft", "raw_text"):
            labels = np.concatenate([np.empty(0, np.int64), *(sample.answer_ids for sample in samples)])
            return packed, Labels(torch.from_numpy(labels.astype(np.int64)).to(self.device))
        if self.teacher_prompts is not None:
            prompts = self.teacher_prompts.of(answers)
            teacher = [Sample(prompt, sample.answer_ids) for prompt, sample in zip(prompts, samples, strict=True)]
            with self.student.adapter_off():
                hidden = self.student.hidden(pack(teacher, rows_in_order(teacher, 1024)).to(self.device))
            return packed, FullVocabulary(hidden, settings.temperature)
        ids, logprobs = topk_of(answers, len(packed.answer_index))
        return packed, TopK(ids.to(self.device), logprobs.to(self.device), settings.temperature)

    def _report(self, loss: float) -> None:
        position = self.position
        progress = {
            "step": position.step,
            "steps": len(self.plan),
            "loss": round(loss, 4),
            "tokens": position.tokens,
            "tokens_per_s": round(position.tokens / position.seconds, 1),
            "seconds_left": round(position.seconds / position.step * (len(self.plan) - position.step)),
        }
        self.folder.write_json("progress.json", progress)
        record_progress(self.stage, progress)

    def _save(self) -> None:
        """Write a checkpoint of whole tensors; gathering them takes every worker, writing them only the first."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            tensors[f"master.{name}"] = _whole(safe_get_full_fp32_param(parameter))
            for moment in MOMENTS:
                tensors[f"{moment}.{name}"] = _whole(safe_get_full_optimizer_state(parameter, moment))
        if self.rank == 0:
            name = f"{self.position.step:08d}"
            checkpoints = self.folder / "checkpoints"
            checkpoints.write_bytes(f"{name}.safetensors", safetensors.torch.save(tensors))
            checkpoints.write_json(f"{name}.json", {"position": vars(self.position), "history": self.history})
            for old in checkpoints.list():
                if not old.startswith(name):
                    checkpoints.delete_file(old)

    def _resume(self) -> None:
        checkpoints = self.folder / "checkpoints"
        names = [name for name in checkpoints.list() if name.endswith(".json")]
        if not names:
            return
        state = checkpoints.read_json(names[-1])
        tensors = safetensors.torch.load(checkpoints.read_bytes(names[-1].replace(".json", ".safetensors")))
        self.position, self.history = _Position(**state["position"]), state["history"]
        # DeepSpeed makes the optimiser's state in its first step, which changes nothing at a learning rate of zero.
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self._step(self.plan[0])
        # Under ZeRO 3 the parameters are whole only inside this context; elsewhere it does nothing.
        with deepspeed.zero.GatheredParameters(list(self.trainable.values()), modifier_rank=0):
            for name, parameter in self.trainable.items():
                parameter.data.copy_(tensors[f"master.{name}"])
        for name, parameter in self.trainable.items():
            safe_set_full_fp32_param(parameter, tensors[f"master.{name}"])
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[f"{moment}.{name}"], moment)
        for values in self.optimizer.optimizer.state.values():
            values["step"].fill_(self.position.step)
        self.scheduler.last_epoch = self.position.step - 1
        self.scheduler.step()

    def _finish(self) -> None:
        """Write the adapter, the loss history and the result; every worker takes part in gathering."""
        master = {name: _whole(safe_get_full_fp32_param(value)) for name, value in self.trainable.items()}
        if self.rank != 0:
            return
        prefix = "model."
        state = get_peft_model_state_dict(
            self.student.model,
            state_dict={name.removeprefix(prefix): value.to(torch.bfloat16) for name, value in master.items()},
        )
        adapter = self.folder / "adapter"
        adapter.write_bytes("adapter_model.safetensors", safetensors.torch.save(state, {"format": "pt"}))
        peft_config = self.student.model.peft_config["default"].to_dict() | {"inference_mode": True}
        adapter.write_json("adapter_config.json", _plain(peft_config))
        self.folder.write_json("history.json", self.history)
        losses = [entry["loss"] for entry in self.history]
        tenth = max(1, len(losses) // 10)
        self.folder.write_json(
            "result.json",
            {
                "steps": self.position.step,
                "tokens": self.position.tokens,
                "seconds": round(self.position.seconds, 3),
                "tokens_per_s": round(self.position.tokens / max(self.position.seconds, 1e-9), 1),
                "first_loss": float(np.mean(losses[:tenth])) if losses else None,
                "last_loss": float(np.mean(losses[-tenth:])) if losses else None,
                "samples": dict(zip(Groups._fields, self.data.sizes, strict=True)),
            },
        )


def train_all(tasks: list[dict[str, Any]]) -> None:
    """Train one adapter after the other; what an earlier start of this worker finished is left out.

    A single worker that fails at one of several writes down why and goes on with the next.
    """
    for task in tasks:
        folder = task["stage"].folder
        if folder.read_json("result.json") or folder.read_json(REFUSAL):
            continue
        try:
            TrainLoop(**task).run()
        except Exception as error:
            if len(tasks) == 1 or ray.train.get_context().get_world_size() > 1:
                raise
            logger.exception("%s failed", folder)
            folder.write_json(REFUSAL, f"training failed: {type(error).__name__}: {error}")


def _whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "DeepSpeed holds no full tensor for a trainable parameter"
    return tensor.detach().float().cpu().contiguous()


def _plain(value: Any) -> Any:
    """Make a PEFT config JSON-able: sets become sorted lists, enums their values."""
    return json.loads(json.dumps(value, default=lambda item: sorted(item) if isinstance(item, set) else str(item)))
