"""Does the knowledge go in, in the paper's order, and at what cost? Every arm on the same questions, with intervals.

    python -m benchmarks.injection_quality CONFIG [KEY=VALUE ...] [--name NAME] [--data FILE.jsonl --passages 40]

Runs the whole line with the baselines (what is up to date is taken as it is), prints a table and saves it. With --data,
the corpus is the first so many passages of an evaluation set (rows with `id`, `doc_id`, `context`, `question` and
`answers`) and the questions are those about them. What limits the number: how well the base model reads a passage and
writes questions about it, then the questions per passage. No stage that writes or trains sees the questions of
[evaluate].
"""

import argparse
import json
from collections.abc import Iterable
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

from benchmarks.record import claim, config_parser, describe_run, run_pipeline, save
from pipeline.config import Config, load_config

ORDER = ("closed_book", "raw_text", "sft", "adapter")


def main() -> None:
    parser = set_parser(__doc__)
    parser.add_argument("--aim", type=float, default=0.7, help="share of the gap that was asked for")
    options = parser.parse_intermixed_args()
    overrides = use_set(options)
    run = run_pipeline("run", options.config, *overrides, "--force", "measured")
    config = load_config(options.config, overrides)
    for arm, scores in run["scores"].items():
        low, high = scores["substring_match_interval"]
        print(
            f"{arm:17} substring match {scores['substring_match']:.3f} [{low:.3f}, {high:.3f}]  "
            f"token F1 {scores['token_f1']:.3f}"
        )
    save(
        options.name,
        {
            "benchmark": "injection_quality",
            **describe_run(config),
            "data": name_data(options, config),
            "run": {key: value for key, value in run.items() if key != "adapter"},
            "claims": make_claims(run, options.aim),
        },
    )


def make_claims(run: dict[str, Any], aim: float) -> list[dict[str, Any]]:
    """The share of the gap, the paper's order, and by how much distillation beats hard labels beyond the interval."""
    score = {arm: scores["substring_match"] for arm, scores in run["scores"].items()}
    low = {(row["arm"], row["over"]): row["interval"][0] for row in run["comparisons"]}
    measured = [arm for arm in ORDER if arm in score]
    return [
        claim("gap_closed", run["gap_closed"], aim),
        *(
            claim(f"{better}_over_{worse}", round(score[better] - score[worse], 4), 0.0)
            for worse, better in pairwise(measured)
        ),
        claim("adapter_retrieval_over_retrieval", round(score["adapter_retrieval"] - score["retrieval"], 4), 0.0),
        *([claim("adapter_over_sft_interval_low", low["adapter", "sft"], 0.0)] if "sft" in score else []),
        *(
            claim("adapter_over_sft_kl_interval_high", row["interval"][1], 0.0, at_most=True)
            for row in run["kl_comparisons"]
            if row["over"] == "sft"
        ),
    ]


def set_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of what a benchmark takes whose documents may come from an evaluation set."""
    parser = config_parser(doc)
    parser.add_argument("--data", help="evaluation set, JSONL")
    parser.add_argument("--passages", type=int, default=40, help="passages of it")
    return parser


def use_set(options: argparse.Namespace) -> list[str]:
    """Write the passages and questions of `--data` where the run is; return the overrides that name them too."""
    if not options.data:
        return options.overrides
    rows = dict(islice(read_set(options.data).items(), options.passages))
    folder = Path(load_config(options.config, options.overrides).run_dir, "data")
    return [*options.overrides, *write_corpus(folder, rows)]


def name_data(options: argparse.Namespace, config: Config) -> str:
    """Say what the documents of a result are, without a folder of this machine where they come from a set."""
    if options.data:
        return f"first {options.passages} passages of {Path(options.data).name}"
    return ", ".join(config.read.paths)


def read_set(path: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of an evaluation set by passage, in its order."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in Path(path).read_bytes().splitlines():
        row = json.loads(line)
        rows.setdefault(row["doc_id"], []).append(row)
    return rows


def write_corpus(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Write a file for every name, with the passage that its rows are about; return the settings that name them."""
    texts = {f"{name}.txt": f"{asked[0]['context']}\n".encode() for name, asked in rows.items()}
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for file in (folder / "corpus").iterdir():
        if texts.get(file.name) == file.read_bytes():
            del texts[file.name]  # written again, its new time would make another corpus of it
        else:
            file.unlink()
    for name, text in texts.items():
        (folder / "corpus" / name).write_bytes(text)
    write_questions(folder / "questions.jsonl", chain.from_iterable(rows.values()))
    return [f"read.paths=['{folder}/corpus']", f"evaluate.questions={folder}/questions.jsonl"]


def write_questions(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write what `evaluate.questions` and `evaluate.unrelated` take."""
    lines = [json.dumps({key: row[key] for key in ("id", "question", "answers", "context")}) for row in rows]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
