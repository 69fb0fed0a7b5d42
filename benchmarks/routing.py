"""How often does `model: "auto"` choose the right corpus, and how often the base model where no corpus fits?

    python -m benchmarks.routing FILE.jsonl [FILE.jsonl ...] [--corpora 10]

Each file has rows with `doc_id`, `context` and `question`. Its passages, in the order of the file, make so many corpora
of the same size; every second one is published and the others are not, so that half of the questions belong nowhere.
The threshold is chosen on every second question and everything is counted on the others. What limits the number:
neighbouring passages come from the same articles, so that published and unpublished corpora overlap.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.record import claim, save
from pipeline.config import Serve
from pipeline.retrieve import PassageIndex

NOWHERE = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--corpora", type=int, default=10, help="corpora that each file makes")
    options = parser.parse_args()
    published, asked = [], []
    for file in options.files:
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        documents = list(dict.fromkeys(row["doc_id"] for row in rows))
        names = {d: f"{Path(file).stem}-{i * options.corpora // len(documents)}" for i, d in enumerate(documents)}
        known = {name for name in names.values() if int(name.rpartition("-")[2]) % 2 == 0}
        contexts = {row["doc_id"]: row["context"] for row in rows}
        published += [(names[d], contexts[d]) for d in documents if names[d] in known]
        asked += [(row["question"], names[row["doc_id"]] if names[row["doc_id"]] in known else NOWHERE) for row in rows]
    columns = {"name": [n for n, _ in published], "heading": [""] * len(published), "text": [t for _, t in published]}
    index = PassageIndex.build(pa.table(columns))
    started = time.monotonic()
    best = [next(iter(index.search(question, 1)), None) for question, _ in asked]
    seconds = (time.monotonic() - started) / len(asked)
    chosen = np.array([hit.passage["name"] if hit else NOWHERE for hit in best])
    scores = np.array([hit.score if hit else 0.0 for hit in best])
    truth = np.array([name for _, name in asked])
    for_choice = np.arange(len(asked)) % 2 == 0
    thresholds = np.round(np.arange(0, 1, 0.01), 2)
    accuracy = [count(chosen, scores, truth, t, for_choice)["accuracy"] for t in thresholds]
    threshold = float(thresholds[int(np.argmax(accuracy))])
    results = {
        "chosen_threshold": threshold,
        "at_chosen": count(chosen, scores, truth, threshold, ~for_choice),
        "at_default": count(chosen, scores, truth, Serve().auto_min_score, ~for_choice),
        "without_threshold": count(chosen, scores, truth, 0.0, ~for_choice),
        "milliseconds": round(1000 * seconds, 3),
    }
    for name in ("at_chosen", "at_default", "without_threshold"):
        print(name, results[name])
    result: dict[str, Any] = {
        "benchmark": "routing",
        "settings": {"files": [Path(file).name for file in options.files], "corpora": options.corpora},
        "passages": len(published),
        "questions": len(asked),
        "results": results,
        "claims": [claim("accuracy_at_default_threshold", results["at_default"]["accuracy"], 0.8)],
    }
    save("routing", result)


def count(chosen: Any, scores: Any, truth: Any, threshold: float, which: Any) -> dict[str, float]:
    """Return the shares that are right: of all questions, of those with a corpus, and of those without."""
    right = np.where(scores >= threshold, chosen, NOWHERE) == truth
    known = truth != NOWHERE
    return {
        "accuracy": round(float(right[which].mean()), 4),
        "with_corpus": round(float(right[which & known].mean()), 4),
        "without_corpus": round(float(right[which & ~known].mean()), 4),
    }


if __name__ == "__main__":
    main()
