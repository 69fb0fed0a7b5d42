"""Does a second round of questions pay, and more so about the passages that the adapter knows least?

    python -m benchmarks.second_round CONFIG [KEY=VALUE ...] [--share 0.5 --seeds 2 --name NAME]

The config's run is the first round; it needs `evaluate.questions`. From its adapter two others go on, with as many new
questions: one about a share of the passages, the weakest (`update.weak_share`), the other about all of them. Both train
the same epochs over the new answers, with old ones among them, so what they have before the first round is more
questions and more steps. What limits it: the number of evaluation questions, and the spread over the seeds, which are
those of the order of the samples.
"""

import sys
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.ablations import figures, print_head, print_row
from benchmarks.record import claim, config_parser, describe_run, run_pipeline, save
from pipeline.config import load_config

FIRST, WEAKEST, ALL = "first round", "second, the weakest", "second, all"


def main() -> int:
    parser = config_parser(__doc__)
    parser.add_argument("--share", type=float, default=0.5, help="share of the passages that count as weak")
    parser.add_argument("--seeds", type=int, default=2, help="so many seeds of the training")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    if config.evaluate.questions is None or config.question.per_sentence is not None:
        sys.exit("the rounds compare on questions of evaluate.questions, and by question.per_passage alone")
    quota = config.question.per_passage
    runs: dict[str, list[dict[str, Any]]] = {
        FIRST: [figures(run_pipeline("run", options.config, *options.overrides, "--force", "measured"))]
    }
    print_head()
    print_row(FIRST, runs[FIRST])
    for name, share, per_passage in ((WEAKEST, options.share, quota), (ALL, 1.0, round(options.share * quota))):
        run_dir = Path(config.run_dir).with_name(f"{Path(config.run_dir).name}-{name.rpartition(' ')[2]}")
        settings = [
            f"run_dir={run_dir}",
            f"update.previous_run={config.run_dir}",
            f"update.weak_share={share}",
            f"question.per_passage={per_passage}",
            "evaluate.baselines=[]",
        ]
        command = ("run", options.config, *options.overrides, *settings, "--redo", "--force", "measured")
        runs[name] = [
            figures(run_pipeline(*command, f"train.seed={seed}", f"publish.registry={run_dir}/registry-{seed}"))
            for seed in range(options.seeds)
        ]
        print_row(name, runs[name])
    save(
        options.name,
        {
            "benchmark": "second_round",
            **describe_run(config),
            "share": options.share,
            "runs": runs,
            "claims": make_claims(runs),
        },
    )
    return 0


def make_claims(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A second round helps, and more where the adapter is weak."""
    gap = {name: mean(run["gap_closed"] for run in of) for name, of in runs.items()}
    kl = {name: mean(run["kl_to_teacher"] for run in of) for name, of in runs.items()}
    return [
        claim("gap_closed_over_first", round(gap[WEAKEST] - gap[FIRST], 4), 0.0),
        claim("gap_closed_over_all", round(gap[WEAKEST] - gap[ALL], 4), 0.0),
        claim("kl_to_teacher_over_all", round(kl[WEAKEST] / kl[ALL], 4), 1.0, at_most=True),
    ]


if __name__ == "__main__":
    sys.exit(main())
