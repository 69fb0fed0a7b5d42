"""What does a change of a few documents cost, and what becomes of what the adapter knew?

    python -m benchmarks.update CONFIG [KEY=VALUE ...] --data FILE.jsonl [--passages N --changed M --name NAME]

In: an evaluation set (rows with `id`, `doc_id`, `context`, `question` and `answers`). The line runs on one file for
each of its first passages; then the first few files get the text of other passages, from all over the rest of the set,
and it runs again with the first run as `update.previous_run`. Compared are tokens written and trained, seconds, and the
scores on questions about changed and unchanged passages, and about the text that is gone. What limits it: general
answers in every epoch, the old answers among the new (`update.replay_share`), and start-up, which is in the seconds.
"""

import json
import sys
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.injection_quality import read_set, write_corpus, write_questions
from benchmarks.record import claim, config_parser, describe_run, run_pipeline, save
from pipeline.config import load_config
from pipeline.score import gap_closed
from pipeline.status import stages_of

STAGES = ("question", "answer", "train")


def main() -> None:
    parser = config_parser(__doc__)
    parser.add_argument("--data", required=True, help="evaluation set, JSONL")
    parser.add_argument("--passages", type=int, default=100)
    parser.add_argument("--changed", type=int, default=5)
    options = parser.parse_intermixed_args()
    run_dir = Path(load_config(options.config, options.overrides).run_dir)
    rows = list(read_set(options.data).items())
    if len(rows) < options.passages + options.changed:
        sys.exit(f"{options.data} has {len(rows)} passages; lower --passages or --changed")
    before, rest = dict(rows[: options.passages]), rows[options.passages :]
    spare = [rest[number * len(rest) // options.changed] for number in range(options.changed)]
    changed = {name: asked for name, (_, asked) in zip(before, spare, strict=False)}
    first = [*options.overrides, *write_corpus(run_dir / "data", before), "evaluate.baselines=[]"]
    run_pipeline("run", options.config, *first, "--force", "measured")

    updated = run_dir.with_name(f"{run_dir.name}-updated")
    gone = updated / "data" / "gone.jsonl"
    second = [
        *options.overrides,
        # The changed ones first, so that evaluate.max_questions cuts others.
        *write_corpus(updated / "data", changed | {name: before[name] for name in before if name not in changed}),
        f"run_dir={updated}",
        f"update.previous_run={run_dir}",
        f"evaluate.unrelated={gone}",
        "evaluate.baselines=[]",
    ]
    write_questions(gone, (row for name in islice(before, len(changed)) for row in before[name]))
    run = run_pipeline("run", options.config, *second, "--force", "measured")

    costs = [cost(options.config, overrides) for overrides in (first, second)]
    new = {row["id"] for asked in changed.values() for row in asked}
    scores = score(updated, new)
    print(f"{'':18} {'first run':>10} {'update':>10} {'share':>7}")
    for name, value in costs[0].items():
        print(f"{name:18} {value:10.0f} {costs[1][name]:10.0f} {costs[1][name] / value:7.3f}")
    print(f"{'substring match':18} {'questions':>10} {'before':>10} {'after':>10} {'gold passage':>13}")
    for name, of in scores.items():
        print(f"{name:18} {of['questions']:10} {of['previous']:10.3f} {of['adapter']:10.3f} {of['gold_passage']:13.3f}")
    print(f"{'KL to the teacher':18} {'closed book':>10} {'before':>10} {'after':>10}")
    for name, of in scores.items():
        print(f"{name:18}", *(f"{value:10.3f}" for value in of["kl_to_teacher"].values()))
    save(
        options.name,
        {
            "benchmark": "update",
            **describe_run(load_config(options.config, second)),
            "data": f"first {options.passages} passages of {Path(options.data).name}, {options.changed} changed",
            "costs": dict(zip(("first run", "update"), costs, strict=True)),
            "scores": scores,
            "run": {key: value for key, value in run.items() if key != "adapter"},
            "claims": make_claims(costs, scores, options.changed / options.passages),
        },
    )


def cost(config: str, overrides: list[str]) -> dict[str, float]:
    """Return the tokens that were written and trained on, and the seconds of the stages that did it."""
    stages = stages_of(load_config(config, overrides))
    manifests = {name: stages[name].require() for name in STAGES}
    return {
        "written tokens": sum(manifests[name]["stats"]["output_tokens"] for name in ("question", "answer")),
        "trained tokens": manifests["train"]["training"]["tokens"],
        **{f"{name} seconds": manifest["seconds"] for name, manifest in manifests.items()},
    }


def score(run_dir: Path, new: set[str]) -> dict[str, dict[str, Any]]:
    """Return the means over the questions about changed and about unchanged passages: substring match, and KL."""
    lines = [json.loads(line) for line in (run_dir / "evaluate" / "answers.jsonl").read_bytes().splitlines()]
    groups: dict[str, list[dict[str, Any]]] = {"changed": [], "unchanged": []}
    for line in lines:
        groups["changed" if line["id"] in new else "unchanged"].append(line)
    arms = ("closed_book", "previous", "adapter", "gold_passage")
    return {
        name: {"questions": len(group)}
        | {arm: mean(line[arm]["substring_match"] for line in group) for arm in arms}
        | {"kl_to_teacher": {arm: mean(line[arm]["kl_to_teacher"] for line in group) for arm in arms[:-1]}}
        for name, group in groups.items()
    }


def make_claims(costs: list[dict[str, float]], scores: dict[str, dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """The written tokens follow the change; training is a small share; new facts go in and old ones stay."""

    def gap(group: dict[str, Any]) -> float | None:
        ends = (np.asarray(group[arm]) for arm in ("closed_book", "gold_passage", "adapter"))
        return gap_closed(*ends)

    def of(name: str) -> float:
        return round(costs[1][name] / costs[0][name], 4)

    def nearer(group: dict[str, Any]) -> float:
        kl = group["kl_to_teacher"]
        return 1 - kl["adapter"] / kl["closed_book"]

    kept = scores["unchanged"]
    new, old = gap(scores["changed"]), gap(kept) or 0.0
    return [
        claim("share_of_written_tokens", of("written tokens"), 1.25 * share, at_most=True),
        claim("share_of_trained_tokens", of("trained tokens"), 0.25, at_most=True),
        claim("unchanged_after_minus_before", round(kept["adapter"] - kept["previous"], 4), -0.05),
        claim(
            "gap_closed_on_changed_over_unchanged", round(new / old, 3) if new is not None and old > 0 else None, 0.8
        ),
        claim("kl_closed_on_changed_over_unchanged", round(nearer(scores["changed"]) / nearer(kept), 3), 0.8),
    ]


if __name__ == "__main__":
    main()
