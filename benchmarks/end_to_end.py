"""From documents to a published adapter: where do the seconds go?

    python -m benchmarks.end_to_end CONFIG [KEY=VALUE ...] [--name NAME]

Runs the whole line in an empty run directory, then again when everything is up to date, and asks for the help text.
Work is time in which an engine generates or the trainer steps; the rest is starting processes, loading models, reading,
chunking, filtering and publishing. What limits the share: every start of Ray, of an engine and of the trainer costs the
same however small the corpus is. Evaluation counts as no work at all.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, claim, config_parser, save
from pipeline.config import load_config
from pipeline.status import stages_of

REPEATS = 5


def main() -> None:
    parser = config_parser(__doc__)
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    if Path(config.run_dir).exists():
        sys.exit(f"{config.run_dir} exists, and this measures a run from its beginning; remove it or choose another")
    arguments = ["run", options.config, *options.overrides, "--force", "measured"]
    seconds, run = timed(*arguments)
    manifests = {name: stage.require() for name, stage in stages_of(config).items()}
    work = {name: manifest["stats"].get("engine_seconds", 0.0) for name, manifest in manifests.items()}
    work["train"] = run["training"]["seconds"]
    stages = {
        name: {"seconds": manifest["seconds"], "work": round(work[name], 1)} for name, manifest in manifests.items()
    }
    without_evaluation = seconds - stages["evaluate"]["seconds"]
    share = sum(work.values()) / without_evaluation
    again = [timed(*arguments)[0] for _ in range(REPEATS)]
    help_text = [timed("--help")[0] for _ in range(REPEATS)]
    print(f"{'stage':10} {'seconds':>8} {'work':>8}")
    for name, figures in stages.items():
        print(f"{name:10} {figures['seconds']:8.1f} {figures['work']:8.1f}")
    print(f"{'all':10} {seconds:8.1f} {sum(work.values()):8.1f}   share without evaluation {share:.3f}")
    print(f"up to date {statistics.median(again):.2f} s, --help {statistics.median(help_text):.2f} s")
    save(
        options.name,
        {
            "benchmark": "end_to_end",
            "model": Path(config.model.path).name,
            "seconds": round(seconds, 1),
            "stages": stages,
            "up_to_date_s": again,
            "help_s": help_text,
            "run": {key: value for key, value in run.items() if key != "adapter"},
            "claims": [
                claim("share_of_time_at_work", round(share, 3), 0.85),
                claim("up_to_date_s", round(statistics.median(again), 2), 3.0, at_most=True),
                claim("help_s", round(statistics.median(help_text), 2), 0.5, at_most=True),
                claim("gap_closed", run["gap_closed"], 1 / 3),
            ],
        },
    )


def timed(*arguments: str) -> tuple[float, dict[str, Any]]:
    """Run a command of the pipeline; return its seconds and, if it ends with one, its JSON line."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pipeline", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - started
    last = done.stdout.splitlines()[-1]
    return seconds, json.loads(last) if last.startswith("{") else {}


if __name__ == "__main__":
    main()
