"""What does our loss cost at a large vocabulary, in time and in memory, against the naive one?

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

A last arm, `held`, is the loss of `top_k` without a model, over few and over many chunks of positions: of the logits of
one chunk more, almost nothing may stay in memory.
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
HELD_VOCABULARIES, HELD_CHUNK, HELD_WIDTH = (49_152, 196_608), 64, 576
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = getattr(torch, compute_dtype(on_gpu=DEVICE.type == "cuda"))


def main() -> None:
    options = parse_options(__doc__, "loss-throughput")
    if options.arm:
        request = json.loads(sys.stdin.read())
        config = load_config(options.config, [*options.overrides, *request["overrides"]])
        work = measure_held if options.arm == "held" else measure
        print(json.dumps(work(config, request | {"arm": options.arm})))
        return
    config = load_config(options.config, options.overrides)
    sizes, steps = ([(1024, 8)], 1) if options.quick else (list(product(VOCABULARIES, RANKS)), 5)
    held_sizes = product(HELD_VOCABULARIES[:1], (2, 4)) if options.quick else product(HELD_VOCABULARIES, (2, 64))
    print("vocabulary  rank   loss  tokens/s      min      max  over model MB  of peak")
    rows = []
    for vocabulary, rank in sizes:
        request = {"vocabulary": vocabulary, "steps": steps, "overrides": [f"train.lora.rank={rank}"]}
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
    held = [
        run_arm("benchmarks.loss_throughput", options, "held", {"vocabulary": v, "chunks": n, "overrides": []})
        for v, n in held_sizes
    ]
    save(
        options.name,
        {
            "benchmark": "loss_throughput",
            "model": f"the shape of {Path(config.model.path).name}",
            **({"gpu": torch.cuda.get_device_name()} if DEVICE.type == "cuda" else {}),
            "settings": {"train": config.train.model_dump(), "steps": steps},
            "rows": rows,
            "held": held,
            "claims": [
                *make_claims(rows),
                claim("logits_held_beyond_one_chunk", beyond_one_chunk(held), 0.05, at_most=True),
            ],
        },
    )


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


def beyond_one_chunk(held: list[dict[str, Any]]) -> float:
    """Return the share of further chunks' logits that stays in memory, at most over the vocabularies.

    Counted from two chunks on: what one chunk leaves behind until the next is done does not grow with their number.
    """
    pairs = zip(held[::2], held[1::2], strict=True)
    return max(round((many["mb"] - few["mb"]) / (many["logits_mb"] - few["logits_mb"]), 4) for few, many in pairs)


def measure(config: Config, request: dict[str, Any]) -> dict[str, Any]:
    """Take some optimiser steps behind one that is warm-up; their speed, memory and share of the device's peak."""
    train, arm, vocabulary = config.train, request["arm"], request["vocabulary"]
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
    for _ in range(request["steps"]):
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


def measure_held(config: Config, request: dict[str, Any]) -> dict[str, Any]:
    """Return the memory of the loss over so many chunks of positions, of a made-up output matrix of this vocabulary."""
    vocabulary, positions = request["vocabulary"], HELD_CHUNK * request["chunks"]
    torch.set_num_threads(config.cluster.worker_cpus)
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, HELD_WIDTH, dtype=DTYPE, device=DEVICE)
    hidden = torch.randn(positions, HELD_WIDTH, dtype=DTYPE, device=DEVICE, requires_grad=True)
    ids = torch.randint(vocabulary, (positions, TOP_K), device=DEVICE)
    signal = TopK(ids, torch.full(ids.shape, -4.0, device=DEVICE))
    before = memory_mb()
    answer_losses(hidden, weight, signal, HELD_CHUNK).sum().backward()
    logits_mb = positions * vocabulary * 4 / 2**20
    shape = {"vocabulary": vocabulary, "chunks": request["chunks"]}
    return shape | {"logits_mb": logits_mb, "mb": round(peak_mb() - before, 1)}


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
    main()
