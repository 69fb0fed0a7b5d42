"""How do time, memory and storage grow with passages, k and rank?

    python -m benchmarks.growth CONFIG [KEY=VALUE ...] [--k 8 20 64 256] [--rank 8 32 128 512] [--name NAME]

One at a time: a quarter, half and all of the config's files; top-k values per answer token; the adapter's rank. Time is
that of the engine at work and of the optimiser steps, so start-up is left out; memory is the most that one process of
the stage held, the model included. A slope is that of the logarithms: 1 is proportional, 0 does not grow. Documents by
the million are `benchmarks.scale`, adapters behind an endpoint `benchmarks.serve_adapters`. What limits it: sizes that
fit one machine, so fixed costs hide the smallest slopes.
"""

import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.record import ROOT, WRITTEN, branch, claim, config_parser, describe_run, save, write_once
from pipeline.config import load_config
from pipeline.status import stages_of

SAMPLE_S = 0.5
WRITING, TRAINING = ("read", "chunk", "write"), ("filter", "train")
DONE_AGAIN = {"passages": WRITTEN, "k": ("answer", "general", "filter"), "rank": ("filter",)}


def main() -> None:
    parser = config_parser(__doc__)
    parser.add_argument("--k", type=int, nargs="+", default=[8, 20, 64, 256])
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 32, 128, 512])
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    write_once(options.config, options.overrides)
    files = sorted(str(path) for place in config.read.paths for path in Path(ROOT, place).iterdir())
    parts = [files[: len(files) // 4], files[: len(files) // 2], files]
    changes = {
        "passages": [f"read.paths={part}" for part in parts],
        "k": [f"answer.top_k={k}" for k in options.k],
        "rank": [f"train.lora.rank={rank}" for rank in options.rank],
    }
    sizes = {"passages": [len(part) for part in parts], "k": options.k, "rank": options.rank}
    curves = {
        axis: [
            measure(options.config, options.overrides, axis, size, change)
            for size, change in zip(sizes[axis], axis_changes, strict=True)
        ]
        for axis, axis_changes in changes.items()
    }
    slopes = {axis: fit(axis, points) for axis, points in curves.items()}
    for axis, points in curves.items():
        print(axis)
        for name in points[0]:
            row = " ".join(f"{point[name]:11.4g}" for point in points)
            print(f"  {name:26} {row}" + (f"   slope {slopes[axis][name]:6.3f}" if name in slopes[axis] else ""))
    save(
        options.name,
        {
            "benchmark": "growth",
            **describe_run(config),
            "curves": curves,
            "slopes": slopes,
            "claims": [
                claim(f"slope.{axis}.{name}", slope, 1.1, at_most=True)
                for axis, own in slopes.items()
                for name, slope in own.items()
            ],
        },
    )


def measure(config: str, overrides: list[str], axis: str, size: int, change: str) -> dict[str, float]:
    """Run what the axis decides, from the beginning; return what it took."""
    run_dir, own = branch(config, overrides, f"{axis}={size}")
    for stage in (*DONE_AGAIN[axis], "train"):
        shutil.rmtree(run_dir / stage, ignore_errors=True)
    memory = {
        name: max(watched(stage, config, *own, change) for stage in stages)
        for name, stages in (("writing_mb", WRITING), ("training_mb", TRAINING))
    }
    found = stages_of(load_config(config, [*overrides, f"run_dir={run_dir}", change]))
    question, answer = (found[name].require() for name in ("question", "answer"))
    training = found["train"].require()["training"]
    answer_tokens = answer["stats"]["output_tokens"]
    seconds = {"question": question["stats"]["engine_seconds"], "answer": answer["stats"]["engine_seconds"]}
    if axis == "passages":
        size = found["chunk"].require()["rows_out"]
        work = {f"{name}_s": value for name, value in seconds.items()} | {"training_s": training["seconds"]}
        return {"passages": size, **work, "answer_bytes": answer["bytes"], **memory}
    training_ms = 1000 * training["seconds"] / training["tokens"]
    if axis == "rank":
        return {"rank": size, "training_ms_per_token": training_ms, "training_mb": memory["training_mb"]}
    return {
        "k": size,
        "answer_ms_per_token": 1000 * seconds["answer"] / answer_tokens,
        "answer_bytes_per_token": answer["bytes"] / answer_tokens,
        "training_ms_per_token": training_ms,
        **memory,
    }


def watched(*arguments: str) -> int:
    """Run one command of the pipeline; return the most memory that one of its processes held, in MB."""
    process = subprocess.Popen([sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    peak = max(peak, child.memory_info().rss)
        time.sleep(SAMPLE_S)
    if process.returncode:
        raise RuntimeError(f"python -m pipeline {' '.join(arguments)} ended with {process.returncode}")
    return peak >> 20


def fit(axis: str, points: list[dict[str, Any]]) -> dict[str, float]:
    """Return the slope of every figure against the axis, in logarithms."""
    size = np.log([point[axis] for point in points])
    names = [name for name in points[0] if name != axis]
    return {name: round(float(np.polyfit(size, np.log([p[name] for p in points]), 1)[0]), 3) for name in names}


if __name__ == "__main__":
    main()
