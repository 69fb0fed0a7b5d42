"""Does the stored top-k teach as well as the exact teacher, and better than hard labels?

    python -m benchmarks.teachers CONFIG [KEY=VALUE ...] [--name NAME] [--teachers stored online sft]

Writes the answers once, trains one adapter per teacher on the same rows in the same order, and evaluates each. What
limits the comparison: the tail mass that k values leave out, and the width of the intervals on so many questions. The
loss of `stored` is a lower bound of that of `online` for the same adapter; `sft` has another loss, so only its scores
compare.
"""

import json

import numpy as np

from benchmarks.record import claim, config_parser, describe_run, run_branch, save, write_once
from pipeline.config import load_config


def main() -> None:
    parser = config_parser(__doc__)
    parser.add_argument("--teachers", nargs="+", default=["stored", "online"])
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    write_once(options.config, options.overrides)
    runs, curves = {}, {}
    for teacher in options.teachers:
        run_dir, run = run_branch(options.config, options.overrides, teacher, f"train.teacher={teacher}")
        runs[teacher] = run
        history = json.loads((run_dir / "train" / "history.json").read_text())
        curves[teacher] = [round(step["loss"], 4) for step in history]
    print(f"{'teacher':8} {'last loss':>9} {'KL held out':>11} {'substring':>9} {'F1':>6} {'gap':>6} {'tokens/s':>8}")
    for teacher, run in runs.items():
        adapter = run["scores"]["adapter"]
        print(
            f"{teacher:8} {run['training']['last_loss']:9.3f} {run['kl_to_teacher']['adapter']:11.3f} "
            f"{adapter['substring_match']:9.3f} {adapter['token_f1']:6.3f} {run['gap_closed']:6.3f} "
            f"{run['training']['tokens_per_s']:8.0f}"
        )
    claims = []
    if {"stored", "online"} <= runs.keys():
        correlation = float(np.corrcoef(curves["stored"], curves["online"])[0, 1])
        share = runs["stored"]["gap_closed"] / runs["online"]["gap_closed"]
        claims = [
            claim("loss_correlation", round(correlation, 4), 0.95),
            claim("gap_over_online", round(share, 3), 0.9),
        ]
    save(
        options.name,
        {
            "benchmark": "teachers",
            **describe_run(config),
            "runs": {teacher: {k: v for k, v in run.items() if k != "adapter"} for teacher, run in runs.items()},
            "loss_curves": curves,
            "claims": claims,
        },
    )


if __name__ == "__main__":
    main()
