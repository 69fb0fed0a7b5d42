"""What does a training step cost at a large vocabulary, with our loss and with the naive one?

    python -m benchmarks.loss_throughput CONFIG [KEY=VALUE ...] [--quick] [--name NAME]

Every arm is a process that takes the same optimiser steps with a randomly initialised model, on the GPU if there is
one. The model has the shape of the config's but another vocabulary; of its weights and tokenizer nothing is read, so
that a `config.json` will do. A step is one micro-batch of `train.micro_rows` full rows, half of it answers:

    top_k    our loss on stored top-20 values, the logits of `train.loss_chunk` answer positions at a time
    full     our loss against a teacher's hidden states, the whole vocabulary in the same chunks
    naive    the same as research code has it: both models' fp32 logits of all answer positions, `kl_div`, autograd

`full` and `naive` get their teacher's hidden states for nothing, so what they differ in is the loss; they must agree on
its value. What limits the number: the matrix products of the decoder, whose share of a step falls as the vocabulary
grows; the share is that of the FLOP of the step in what a matrix product of the same dtype reaches on the device.
"""

import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.record import claim, parse_options, run_arm, save, spread
from benchmarks.train_throughput import measure_matmul, memory_mb, peak_mb
from pipeline.batch import Packed, Sample, pack
from pipeline.config import Config, load_config
from pipeline.loss import FullVocabulary, TopK, answer_losses
from pipeline.resources import compute_dtype
from pipeline.student import Student, add_adapter

ARMS = ("top_k", "full", "naive")
VOCABULARIES, RANKS = (49_152, 128_256, 151_936), (16, 64, 256)
TOP_K, SAMPLE_TOKENS = 20, 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = getattr(torch, compute_dtype(on_gpu=DEVICE.type == "cuda"))


def main() -> int:
    options = parse_options(__doc__, "loss-throughput")
    if options.arm:
        request = json.loads(sys.stdin.read())
        config = load_config(options.config, [*options.overrides, f"train.lora.rank={request['rank']}"])
        print(json.dumps(measure(config, options.arm, request["vocabulary"], request["steps"])))
        return 0
    config = load_config(options.config, options.overrides)
    sizes, steps = ([(1024, 8)], 1) if options.quick else (list(product(VOCABULARIES, RANKS)), 5)
    print("vocabulary  rank   loss  tokens/s      min      max  over model MB  of peak")
    rows = []
    for vocabulary, rank in sizes:
        request = {"vocabulary": vocabulary, "rank": rank, "steps": steps}
        arms = {arm: run_arm("benchmarks.loss_throughput", options, arm, request) for arm in ARMS}
        assert len({(arm["tokens"], arm["dtype"]) for arm in arms.values()}) == 1, "arms differ in tokens or precision"
        values = [arms[arm]["loss"] for arm in ("full", "naive")]
        assert np.allclose(*values, rtol=1e-3), f"the same loss has two values: {values}"
        rows.append({"vocabulary": vocabulary, "rank": rank, "arms": arms})
        for name, arm in arms.items():
            speed = arm["tokens_per_s"]
            print(
                f"{vocabulary:10} {rank:5} {name:>6} {speed['median']:9.1f} {speed['min']:8.1f} {speed['max']:8.1f} "
                f"{arm['over_model_mb']:14.0f} {arm['share_of_peak']:8.1%}",
                flush=True,
            )
    save(
        options.name,
        {
            "benchmark": "loss_throughput",
            "model": f"the shape of {Path(config.model.path).name}",
            **({"gpu": torch.cuda.get_device_name()} if DEVICE.type == "cuda" else {}),
            "settings": {"train": config.train.model_dump(), "steps": steps},
            "rows": rows,
            "claims": make_claims(rows),
        },
    )
    return 0


def make_claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every vocabulary, at the rank where it counts least: our speed and memory over those of the naive loss."""
    claims = []
    for vocabulary in dict.fromkeys(row["vocabulary"] for row in rows):
        own = [row["arms"] for row in rows if row["vocabulary"] == vocabulary]
        for arm in ("top_k", "full"):
            speed = min(arms[arm]["tokens_per_s"]["median"] / arms["naive"]["tokens_per_s"]["median"] for arms in own)
            memory = max(arms[arm]["over_model_mb"] / arms["naive"]["over_model_mb"] for arms in own)
            claims += [
                claim(f"{arm}_over_naive.v{vocabulary}", round(speed, 3), 1.0),
                claim(f"{arm}_memory_over_naive.v{vocabulary}", round(memory, 3), 1.0, at_most=True),
            ]
    return claims


def measure(config: Config, arm: str, vocabulary: int, steps: int) -> dict[str, Any]:
    """Take some optimiser steps behind one that is warm-up; their speed, memory and share of the device's peak."""
    train = config.train
    if DEVICE.type == "cpu":
        torch.set_num_threads(config.cluster.worker_cpus)
    torch.manual_seed(train.seed)
    shape = AutoConfig.from_pretrained(config.model.path, vocab_size=vocabulary, use_cache=False)
    attention = "sdpa" if DEVICE.type == "cuda" else "eager"
    base = AutoModelForCausalLM.from_config(shape, dtype=DTYPE, attn_implementation=attention)
    student = Student(add_adapter(base.requires_grad_(False), train.lora, "random"), train.loss_chunk).to(DEVICE)
    optimiser = torch.optim.AdamW([value for value in student.parameters() if value.requires_grad], train.learning_rate)
    packed = make_batch(train.micro_rows, train.row_tokens, vocabulary)
    num_positions = len(packed.answer_index)
    weight = base.get_output_embeddings().weight
    teacher = torch.randn(num_positions, weight.shape[1], dtype=DTYPE, device=DEVICE)
    ids = torch.randint(vocabulary, (num_positions, TOP_K), device=DEVICE)
    signals = {"top_k": TopK(ids, torch.full(ids.shape, -4.0, device=DEVICE)), "full": FullVocabulary(teacher)}

    def step() -> float:
        hidden = student.hidden(packed)
        if arm == "naive":
            loss = naive_loss(hidden, weight, teacher).mean()
        else:
            loss = answer_losses(hidden, weight, signals[arm], train.loss_chunk).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()  # waits for the device

    loaded = memory_mb()
    first_loss = step()
    seconds = []
    for _ in range(steps):
        started = time.monotonic()
        step()
        seconds.append(time.monotonic() - started)
    peak = peak_mb()
    with FlopCounterMode(display=False) as counter:
        step()
    rate = measure_matmul(DEVICE, DTYPE)
    tokens = packed.input_ids.numel()
    return {
        "tokens": tokens,
        "answer_tokens": num_positions,
        "dtype": str(weight.dtype),
        "loss": first_loss,
        "tokens_per_s": spread([tokens / second for second in seconds]),
        "over_model_mb": round(peak - loaded, 1),
        "matmul_tflop_per_s": round(rate / 1e12, 3),
        "share_of_peak": round(counter.get_total_flops() / float(np.median(seconds)) / rate, 4),
    }


def make_batch(rows: int, row_tokens: int, vocabulary: int) -> Packed:
    """Return full rows of random samples, each half a prompt and half an answer."""
    rng = np.random.default_rng(0)
    per_row, half = row_tokens // SAMPLE_TOKENS, SAMPLE_TOKENS // 2
    samples = [
        Sample(np.r_[number % vocabulary, rng.integers(0, vocabulary, half)], rng.integers(0, vocabulary, half))
        for number in range(rows * per_row)
    ]
    return pack(samples, [per_row] * rows).to(DEVICE)


def naive_loss(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    """Return the KL of every position, [A], through logits [A, V] of both models."""
    student = (hidden @ weight.T).float().log_softmax(-1)
    target = (teacher @ weight.T).float().log_softmax(-1)
    return kl_div(student, target, reduction="none", log_target=True).sum(-1)


if __name__ == "__main__":
    sys.exit(main())
