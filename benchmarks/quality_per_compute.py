"""What does prompt distillation reach in the seconds that fine-tuning takes, on the same questions and answers?

    python -m benchmarks.quality_per_compute CONFIG [KEY=VALUE ...] [--name NAME] [--epochs 1 2 4 8] [--seeds 2]

Every point of the two curves is a training of its own, whose learning rate has fallen to zero at its end. Seconds are
those of the optimiser steps; writing the data, which both need, and start-up are left out. Between the points the
curves are straight lines. What limits it: how many questions there are, and the spread over the seeds.
"""

from itertools import pairwise
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.ablations import figures, print_head, print_row
from benchmarks.record import claim, config_parser, describe_run, run_branch, save, write_once
from pipeline.config import load_config

TEACHERS = ("stored", "sft")


def main() -> None:
    parser = config_parser(__doc__)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=2, help="so many seeds of the training")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    write_once(options.config, options.overrides)
    curves: dict[str, list[list[dict[str, Any]]]] = {teacher: [] for teacher in TEACHERS}
    print_head()
    for epochs in sorted(options.epochs):
        for teacher, curve in curves.items():
            changes = (f"train.teacher={teacher}", f"train.epochs={epochs}")
            name = f"{teacher}, {epochs} epochs"
            runs = [run_branch(options.config, options.overrides, name, *changes, seed=n) for n in range(options.seeds)]
            curve.append([figures(run) for _, run in runs])
            print_row(name, curve[-1])
    save(
        options.name,
        {
            "benchmark": "quality_per_compute",
            **describe_run(config),
            "epochs": sorted(options.epochs),
            "curves": curves,
            "claims": make_claims(curves),
        },
    )


def make_claims(curves: dict[str, list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """How far distillation is ahead at equal seconds, and after which share of them it is where fine-tuning ends."""

    def curve(teacher: str) -> tuple[list[float], list[float]]:
        points = [
            [mean(run[key] for run in runs) for key in ("train_seconds", "gap_closed")] for runs in curves[teacher]
        ]
        seconds, gaps = zip(*sorted(points), strict=True)
        return list(seconds), list(gaps)

    seconds, distilled = curve("stored")
    tuned_seconds, tuned = curve("sft")
    both = [at for at in tuned_seconds if seconds[0] <= at <= seconds[-1]]
    ahead = [float(np.interp(at, seconds, distilled) - np.interp(at, tuned_seconds, tuned)) for at in both]
    best, best_at = max(tuned), tuned_seconds[tuned.index(max(tuned))]
    reached = first_at(best, seconds, distilled)
    return [
        claim("gap_closed_over_sft_at_equal_seconds", round(mean(ahead), 4) if ahead else None, 0.0),
        claim("seconds_to_the_best_of_sft", reached and round(reached / best_at, 3), 1.0, at_most=True),
    ]


def first_at(height: float, x: list[float], y: list[float]) -> float | None:
    """Return where the line through the points first reaches a height; None if it never does."""
    if y[0] >= height:
        return x[0]
    for (x0, y0), (x1, y1) in pairwise(zip(x, y, strict=True)):
        if y1 >= height:
            return x0 + (x1 - x0) * (height - y0) / (y1 - y0)
    return None


if __name__ == "__main__":
    main()
