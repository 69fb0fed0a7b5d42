"""How much of the gap between closed book and gold passage does an adapter close, and at what cost?

    python -m benchmarks.gap_closed CONFIG [section.key=value ...] --name NAME --aim SHARE

Runs the whole line (what is up to date is taken as it is), prints a table and saves a JSON file to benchmarks/results/.
What limits the number: how well the base model reads a passage and writes questions about it, then the questions per
passage. The questions of [evaluate] are read by no other stage.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--name", required=True, help="name of the result file")
    parser.add_argument("--aim", type=float, required=True, help="share of the gap that was asked for")
    options = parser.parse_args()
    command = [sys.executable, "-m", "pipeline", "run", options.config, *options.overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    run = json.loads(done.stdout.splitlines()[-1])
    config = load_config(options.config, options.overrides)
    result = {
        "benchmark": "gap_closed",
        "name": options.name,
        "date": datetime.now(UTC).date().isoformat(),
        **describe_machine(),
        "model": Path(config.model.path).name,
        "settings": config.model_dump(include={"chunk", "question", "answer", "filter", "train"}),
        "run": {key: value for key, value in run.items() if key != "adapter"},
        "claims": [claim("gap_closed", run["gap_closed"], options.aim)],
    }
    for arm, scores in run["scores"].items():
        low, high = scores["substring_match_interval"]
        print(
            f"{arm:14} substring match {scores['substring_match']:.3f} [{low:.3f}, {high:.3f}]  "
            f"token F1 {scores['token_f1']:.3f}"
        )
    path = ROOT / "benchmarks" / "results" / f"{options.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"result": str(path.relative_to(ROOT)), "claims": result["claims"]}))
    return 0


def claim(name: str, value: float | None, aim: float, at_most: bool = False) -> dict[str, Any]:
    """One figure that was asked for, met or not: at least the aim, or `at_most` the aim."""
    met = value is not None and (value <= aim if at_most else value >= aim)
    return {"name": name, "value": value, "aim": aim, "met": met}


def describe_machine() -> dict[str, Any]:
    """Versions, device and commit, and whether the tree was clean."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    cpu = next(
        (
            line.partition(": ")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "device": f"{cpu}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in PACKAGES},
    }


if __name__ == "__main__":
    sys.exit(main())
