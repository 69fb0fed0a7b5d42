"""What do many small corpora cost in one job, against a job for each?

    python -m benchmarks.corpora                   # 50 corpora of 3 passages in one job; 3 jobs of one, extrapolated
    python -m benchmarks.corpora --quick           # 3 corpora and an empty one in one job, and one job of one

In: nothing; the corpora and a random model of two blocks are made on the spot. Out: seconds of both, and their ratio.
The model is so small that what is measured is what jobs cost beside the model's own work: starting Ray, engines and
training workers, and every stage's passes. That is the part which sharing saves; a larger model adds the same to both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.chaos import write_corpus, write_model
from benchmarks.record import ROOT, claim, save

PASSAGES = 3
CONFIG = """
run_dir = "{folder}/runs/{{corpus}}"
max_reject_share = 1.0
corpora = "{folder}/corpora"
[model]
path = "{folder}/model"
max_model_len = 1024
[read]
paths = ["{folder}/corpora/{{corpus}}"]
[question]
per_passage = 16
kinds = ["fact", "detail"]
per_call = 4
max_tokens = 64
temperature = 1.0
[answer]
top_k = 8
max_tokens = 32
[filter]
keep_unfinished = true
[general]
prompts = 16
held_out = 8
max_tokens = 32
[train]
epochs = 1
lora = {{ rank = 8 }}
[evaluate]
max_tokens = 16
[publish]
registry = "{folder}/registry"
name = "{{corpus}}"
gate = {{ min_gap_closed = -99.0, max_closed_book_loss = 1.0, max_kl_to_base = 99.0, max_retrieval_loss = 1.0 }}
[cluster]
kv_cache_gb = 1
"""


def run(folder: Path) -> tuple[float, dict[str, Any]]:
    """Run the line on the corpora of a folder, as a person would; return the seconds and the corpora's results."""
    config = folder / "corpora.toml"
    config.write_text(CONFIG.format(folder=folder))
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pipeline", "run", config], cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - started
    assert done.stdout.strip(), done.stderr[-6000:]
    return seconds, json.loads(done.stdout.splitlines()[-1])["corpora"]


def measure(num_corpora: int, num_separate: int, with_empty: bool) -> dict[str, Any]:
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        for job, count in [("together", num_corpora), *((f"alone {n}", 1) for n in range(num_separate))]:
            folder = Path(name, job.replace(" ", "-"))
            folder.mkdir()
            write_model(folder / "model")
            (folder / "corpora").mkdir()
            for number in range(count):
                write_corpus(folder / "corpora" / f"c{number:03d}", PASSAGES)
            if with_empty and job == "together":
                (folder / "corpora" / "empty").mkdir()
            seconds[job], results = run(folder)
            failed = [corpus for corpus, result in results.items() if "error" in result]
            assert failed == (["empty"] if with_empty and job == "together" else []), results
            assert len(list((folder / "registry").iterdir())) == count, "an adapter for each"
            print(f"{job}: {count} corpora in {seconds[job]:.0f} s", file=sys.stderr)
    alone = statistics.median(value for job, value in seconds.items() if job != "together")
    return {
        "corpora": num_corpora,
        "passages_each": PASSAGES,
        "seconds": {job: round(value, 1) for job, value in seconds.items()},
        "separate_jobs": f"{num_separate} measured, the median times {num_corpora}",
        "ratio": round(seconds["together"] / (alone * num_corpora), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few corpora; saves nothing unless named")
    parser.add_argument("--name", help="name of the result file")
    options = parser.parse_args()
    result = measure(3, 1, with_empty=True) if options.quick else measure(50, 3, with_empty=False)
    claims = [claim("cost_of_one_job_over_many", result["ratio"], 1.0 if options.quick else 0.5, at_most=True)]
    name = options.name or (None if options.quick else "corpora")
    save(name, {"benchmark": "corpora", "model": "random, two blocks", "claims": claims, **result})


if __name__ == "__main__":
    main()
